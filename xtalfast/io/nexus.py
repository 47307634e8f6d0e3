"""NeXus/Eiger HDF5: images of a master file, in it or in the data files it links to, one by one.

Layouts read: `/entry/data/data` (plain, external link or virtual) and `/entry/data/data_000001`, ... of the Dectris
filewriter. Pixels come as int32: the all-ones value of an unsigned type (a masked pixel) becomes -1.
"""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
from numpy.typing import NDArray

from xtalfast.errors import CorruptImageError, InputError, MissingExtraError

__all__ = ["NexusImages", "is_hdf5", "pixels_from_counts"]

_INT32_MAX = np.iinfo(np.int32).max


def is_hdf5(data: bytes) -> bool:
    """Whether a file begins as HDF5."""
    return data.startswith(b"\x89HDF\r\n\x1a\n")


def _h5py():
    try:
        import h5py
    except ImportError as error:
        raise MissingExtraError("h5py", "io", "reading HDF5 images") from error
    try:
        import hdf5plugin  # noqa: F401  (registers the bitshuffle, LZ4 and zstd filters with HDF5)
    except ImportError as error:
        raise MissingExtraError("hdf5plugin", "io", "reading compressed HDF5 images") from error
    return h5py


def pixels_from_counts(values: NDArray, where: str, *, mask_all_ones: bool) -> NDArray[np.int32]:
    """Stored values [slow, fast] -> int32; beyond int32 -> the largest int32.

    Args:
        values: as stored, [slow, fast].
        where: file (and image) for errors.
        mask_all_ones: the largest value of an unsigned type means a masked pixel (Eiger) and becomes -1.

    Raises:
        InputError: the values are not integers, so they are no photon counts.
    """
    if values.dtype.kind == "f":
        whole = np.isfinite(values) & (values == np.floor(values))
        if not whole.all():
            raise InputError(
                f"{where}: wanted photon counts, got {values.dtype} with fractions or NaN; convert to counts"
            )
        values = values.astype(np.int64)
    if values.dtype.kind not in "iu":
        raise InputError(f"{where}: wanted integer pixels, got {values.dtype}")
    if values.dtype.itemsize < 4 or values.dtype == np.int32:
        pixels = values.astype(np.int32)
    else:
        # A count beyond int32 stays above every trusted range.
        pixels = np.clip(values, np.iinfo(np.int32).min if values.dtype.kind == "i" else 0, _INT32_MAX).astype(np.int32)
    if mask_all_ones and values.dtype.kind == "u":
        pixels[values == np.iinfo(values.dtype).max] = -1
    return pixels


class NexusImages:
    """The images of one NeXus/Eiger file. Reads are thread-safe (HDF5 does them one at a time).

    Attributes:
        path: the master file.
        shape: px, (slow, fast).
        saturation: counts at and above which the detector does not vouch for a pixel; None if the file is silent.

    Raises:
        InputError: no HDF5 file, or no image data in it.
    """

    def __init__(self, path: str | os.PathLike) -> None:
        self.path = Path(path)
        h5py = _h5py()
        try:
            self._file = h5py.File(self.path, "r")
        except OSError as error:
            if not self.path.is_file():
                raise InputError(f"cannot read {path}: no such file") from error
            raise CorruptImageError(f"{path}: not a readable HDF5 file ({error}); fetch it again") from error
        self._datasets: list[Any] = []
        self._missing: Path | None = None  # the first linked data file that is not there
        self._find_datasets(h5py)
        self._ends = np.cumsum([1 if d.ndim == 2 else d.shape[0] for d in self._datasets])
        shapes = {tuple(int(n) for n in d.shape[-2:]) for d in self._datasets}
        if len(shapes) > 1:
            raise InputError(f"{path}: wanted images of one size, got {sorted(shapes)}")
        self.shape: tuple[int, int] = shapes.pop()  # type: ignore[assignment]
        self._detector = self._entry.get("instrument/detector", {})
        self.saturation = self._saturation()

    def __enter__(self) -> NexusImages:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __len__(self) -> int:
        """Images before the first missing data file."""
        return int(self._ends[-1])

    def close(self) -> None:
        """Close the file; no image can be read afterwards."""
        self._file.close()

    def _open(self, group: Any, name: str) -> Any | None:
        """The dataset `name` of `group`, or None (and the file noted) if it lives in a file that is not there."""
        h5py = _h5py()
        link = group.get(name, getlink=True)
        target = Path(link.filename) if isinstance(link, h5py.ExternalLink) else self.path
        target = target if target.is_absolute() else self.path.parent / target
        if not target.is_file():
            self._missing = target
            return None
        try:
            dataset = group[name]
        except (KeyError, OSError) as error:
            raise CorruptImageError(f"{target}: cannot open the images of {self.path.name} ({error})") from error
        if not isinstance(dataset, h5py.Dataset) or dataset.ndim not in (2, 3) or 0 in dataset.shape:
            raise InputError(f"{self.path}: wanted images [n, slow, fast] in {name}, got {dataset}")
        if dataset.is_virtual:
            # HDF5 would fill the frames of a missing source with zeros and say nothing.
            for source in dataset.virtual_sources():
                file = Path(dataset.file.filename).parent / source.file_name
                if source.file_name != "." and not file.is_file():
                    raise InputError(f"{self.path}: data file {file} is missing; put it beside the master file")
        return dataset

    def _find_datasets(self, h5py: Any) -> None:
        entries = [
            g for g in self._file.values() if isinstance(g, h5py.Group) and isinstance(g.get("data"), h5py.Group)
        ]
        if not entries:
            raise InputError(
                f"{self.path}: wanted a NeXus entry with a data group (/entry/data), got {list(self._file)}"
            )
        self._entry = entries[0]
        group = self._entry["data"]
        names = ["data"] if "data" in group.keys() else sorted(n for n in group if re.fullmatch(r"data_\d+", n))
        for name in names:
            dataset = self._open(group, name)
            if dataset is None:  # the number of its images is unknown, so nothing behind it can be counted
                break
            self._datasets.append(dataset)
        if not names:
            raise InputError(f"{self.path}: wanted data or data_000001 in {group.name}, got {list(group)}")
        if not self._datasets:
            raise InputError(f"{self.path}: data file {self._missing} is missing; put it beside the master file")

    def _saturation(self) -> int | None:
        for name in ("saturation_value", "detectorSpecific/countrate_correction_count_cutoff"):
            if name in self._detector:
                return int(np.ravel(self._detector[name][()])[0])
        return None

    def static_mask(self) -> NDArray[np.bool_]:
        """True where the file's pixel_mask is 0 (good pixels): [slow, fast]; all True if it has none."""
        for name in ("pixel_mask", "detectorSpecific/pixel_mask"):
            if name in self._detector:
                mask = np.asarray(self._detector[name][()])
                mask = mask[0] if mask.ndim == 3 else mask
                if mask.shape != self.shape:
                    raise InputError(f"{self.path}: wanted {name} {list(self.shape)}, got {list(mask.shape)}")
                return mask == 0
        return np.ones(self.shape, bool)

    def refuse(self, index: int) -> NoReturn:
        """Raise the InputError that says why there is no image `index`."""
        if index >= 0 and self._missing is not None:
            raise InputError(f"{self.path}: data file {self._missing} is missing; put it beside the master file")
        raise InputError(f"{self.path}: wanted an image index of 0 to {len(self) - 1}, got {index}")

    def read(self, index: int) -> NDArray[np.int32]:
        """Image `index` (0-based): int32 [slow, fast].

        Raises:
            InputError: no such image, or its data file is missing.
            CorruptImageError: the image cannot be decompressed.
        """
        if not 0 <= index < len(self):
            self.refuse(index)
        k = int(np.searchsorted(self._ends, index, side="right"))
        dataset = self._datasets[k]
        try:
            values = dataset[()] if dataset.ndim == 2 else dataset[index - (int(self._ends[k - 1]) if k else 0)]
        except (OSError, RuntimeError) as error:
            raise CorruptImageError(
                f"{dataset.file.filename}: cannot read image {index} ({error}); fetch the file again"
            ) from error
        return pixels_from_counts(values, f"{self.path} image {index}", mask_all_ones=True)
