"""Diffraction images of any format, one file or a whole experiment, as int32 arrays in the panels of the detector.

CBF and NeXus/Eiger have readers of their own (`cbf`, `nexus`); SMV and all else go through fabio.
"""

from __future__ import annotations

import os
import re
import threading
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from xtalfast.errors import CorruptImageError, InputError, MissingExtraError
from xtalfast.io.cbf import is_cbf, read_bytes, read_cbf
from xtalfast.io.dials_mask import read_dials_mask
from xtalfast.io.nexus import NexusImages, is_hdf5, pixels_from_counts
from xtalfast.models import Experiment

__all__ = ["ImageReader", "open_images", "read_image"]

# fabio's readers of some thirty formats raise whatever their parsing trips over.
_FABIO_ERRORS = (
    ArithmeticError,
    AssertionError,
    AttributeError,
    EOFError,
    LookupError,
    OSError,
    RuntimeError,
    TypeError,
    ValueError,
)


def _first_bytes(path: str | os.PathLike) -> bytes:
    try:
        with open(path, "rb") as handle:
            return handle.read(16)
    except OSError as error:
        raise InputError(f"cannot read image {path}: {error.strerror or error}") from error


def read_image(path: str | os.PathLike, *, frame: int | None = None, verify: bool = False) -> NDArray[np.int32]:
    """Read one image, its format recognised by content.

    Args:
        path: CBF (plain, gzip or bzip2), NeXus/Eiger HDF5 master, or any format of fabio (SMV, TIFF, MarCCD, ...).
        frame: 0-based image of a file of many; None is the only or first one.
        verify: compare checksums where the format has them (CBF: Content-MD5).

    Returns:
        int32 [slow, fast], values as in the file: negative pixels are masked by the detector.

    Raises:
        InputError: the file cannot be read, is of no known format, or has no such frame.
        CorruptImageError: the bytes contradict the header, or the checksum is wrong.
    """
    head = _first_bytes(path)
    if is_hdf5(head):
        with NexusImages(path) as images:
            return images.read(frame or 0)
    named_cbf = ".cbf" in Path(path).name.lower()  # so that a damaged one is reported as what it should be
    if named_cbf or is_cbf(head) or head.startswith((b"\x1f\x8b", b"BZh")):
        data = read_bytes(path)
        if named_cbf or is_cbf(data):
            if frame:
                raise InputError(f"{path}: wanted frame {frame}, but a CBF file holds one image")
            return read_cbf(path, verify=verify, data=data)
    return _read_with_fabio(path, frame or 0)


def _read_with_fabio(path: str | os.PathLike, frame: int) -> NDArray[np.int32]:
    try:
        import fabio
    except ImportError as error:
        raise MissingExtraError("fabio", "io", f"reading {path}") from error
    try:
        with fabio.open(str(path)) as image:
            if not 0 <= frame < image.nframes:
                raise InputError(f"{path}: wanted frame {frame}, got a file of {image.nframes}")
            values = np.asarray(image.get_frame(frame).data)
    except InputError:
        raise
    except (
        OSError,
        EOFError,
        RuntimeError,
        ValueError,
        TypeError,
        LookupError,
        AssertionError,
        ArithmeticError,
    ) as error:
        reason = " ".join(str(error).split()) or type(error).__name__
        raise CorruptImageError(f"{path}: no readable image ({reason}); check the format, or fetch it again") from error
    if values.ndim != 2:
        raise InputError(f"{path}: wanted one image [slow, fast], got {list(values.shape)}")
    # 65535 of a CCD or Timepix is an overload, which the trusted range tells from a masked pixel.
    return pixels_from_counts(values, str(path), mask_all_ones=False)


def fill_template(template: str, number: int) -> str:
    """Name of image `number`, which fills the last run of hashes in the file name, as in DIALS; none: the template."""
    name = Path(template).name
    hashes = re.findall("#+", name)
    if not hashes:
        return template
    stem, _, tail = name.rpartition(hashes[-1])
    return str(Path(template).parent / f"{stem}{number:0{len(hashes[-1])}d}{tail}")


def _sources(experiment: Experiment, image_dir: str | os.PathLike | None) -> list[tuple[Path, int | None]]:
    """File and frame (None: a file of one image) of each image of the scan, or of each still."""
    block = experiment.imageset or {}
    template: str = block.get("template") or ""
    images: list[str] = block.get("images") or []
    if not template and not images:
        raise InputError(
            "the experiment names no images (imageset template or images); import them again with dials.import"
        )

    def locate(name: str) -> Path:
        return Path(image_dir) / Path(name).name if image_dir is not None else Path(name)

    scan = experiment.scan
    frames = block.get("single_file_indices")
    if images:
        files = [locate(name) for name in images]
        if scan is not None and len(files) != scan.n_images:
            raise InputError(
                f"wanted {scan.n_images} images (scan {scan.image_range[0]} to {scan.image_range[1]}), "
                f"got a list of {len(files)}, beginning with {files[0]}"
            )
        frames = frames or [None] * len(files)
        if len(frames) != len(files):
            raise InputError(f"wanted single_file_indices for {len(files)} images, got {len(frames)}")
        return list(zip(files, frames))
    if scan is None:
        raise InputError(f"image template {template} needs a scan that says which images; import them again")
    first, last = scan.image_range
    if "#" not in Path(template).name:  # one file with all images
        if frames and len(frames) != scan.n_images:
            raise InputError(
                f"{template}: wanted {scan.n_images} images of the scan, got {len(frames)} in the imageset"
            )
        return [(locate(template), frame) for frame in frames or range(first - 1, last)]
    return [(locate(fill_template(template, number)), None) for number in range(first, last + 1)]


class ImageReader:
    """The images of one experiment, each split into the panels of its detector. Reads are thread-safe.

    Raises:
        InputError: images are missing (the first is named), or their number is not that of the scan.
    """

    def __init__(self, experiment: Experiment, image_dir: str | os.PathLike | None = None) -> None:
        self._detector = experiment.detector
        self._imageset = experiment.imageset or {}
        self._sources = _sources(experiment, image_dir)
        self._open_files: dict[Path, NexusImages] = {}
        self._lock = threading.Lock()
        files = list(dict.fromkeys(path for path, _ in self._sources))
        missing = [path for path in files if not path.is_file()]
        if missing:
            raise InputError(
                f"image {missing[0]} is missing ({len(missing)} of {len(files)} files); "
                "put it back, or name the directory of the images with --image-dir"
            )
        offsets = [panel.raw_image_offset for panel in self._detector]
        if len(set(offsets)) < len(offsets):
            raise InputError(
                f"wanted panels at different raw_image_offset, got {offsets[:4]}...; import the images again"
            )
        self._check_frames()

    def _check_frames(self) -> None:
        """An HDF5 file that is one image short shall fail now, not after an hour of reading."""
        last: dict[Path, int] = {}
        for path, frame in self._sources:
            if frame is not None:
                last[path] = max(frame, last.get(path, 0))
        for path, frame in last.items():
            if is_hdf5(_first_bytes(path)) and frame >= len(self._hdf5(path)):
                self._hdf5(path).refuse(frame)

    def __len__(self) -> int:
        """Images of the scan, or stills."""
        return len(self._sources)

    def __enter__(self) -> ImageReader:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Close the HDF5 files; others are opened and closed by each read."""
        with self._lock:
            for images in self._open_files.values():
                images.close()
            self._open_files.clear()

    def path(self, i: int) -> Path:
        """File of the i-th image (0-based)."""
        return self._sources[i][0]

    def _hdf5(self, path: Path) -> NexusImages:
        with self._lock:
            if path not in self._open_files:
                self._open_files[path] = NexusImages(path)
            return self._open_files[path]

    def read_raw(self, i: int, *, verify: bool = False) -> NDArray[np.int32]:
        """The i-th image (0-based) as in the file: int32 [slow, fast], not split into panels."""
        path, frame = self._sources[i]
        if frame is not None and is_hdf5(_first_bytes(path)):
            return self._hdf5(path).read(frame)
        return read_image(path, frame=frame, verify=verify)

    def read(self, i: int, *, verify: bool = False) -> list[NDArray[np.int32]]:
        """The i-th image (0-based): int32 [slow, fast] for each panel, negative where the detector masks a pixel.

        Raises:
            InputError: the image cannot be read, or has not the size of the detector.
            CorruptImageError: its bytes contradict its header.
        """
        return self._panels(self.read_raw(i, verify=verify), self.path(i))

    def _panels(self, raw: NDArray, path: Path) -> list[NDArray]:
        slow, fast = raw.shape
        areas = [(*panel.raw_image_offset, *panel.image_size) for panel in self._detector]
        wanted = (max(x + nx for x, _, nx, _ in areas), max(y + ny for _, y, _, ny in areas))
        # A single panel at the origin is the whole image; others may leave a margin of it unused.
        fits = fast >= wanted[0] and slow >= wanted[1] and (len(areas) > 1 or areas[0][:2] != (0, 0))
        if (fast, slow) != wanted and not fits:
            raise InputError(
                f"{path}: wrong detector: wanted {wanted[0]} x {wanted[1]} pixels (fast x slow) as in the .expt, "
                f"got {fast} x {slow}; use the .expt of these images"
            )
        if len(areas) == 1 and (fast, slow) == areas[0][2:]:
            return [raw]
        return [np.ascontiguousarray(raw[y : y + ny, x : x + nx]) for x, y, nx, ny in areas]

    def static_mask(self) -> list[NDArray[np.bool_]]:
        """True where a pixel may be used, [slow, fast] per panel: panel rectangles, mask file, pixel_mask of HDF5.

        Raises:
            InputError: a mask cannot be read or is of another size than its panel.
        """
        masks = [panel.valid_pixels() for panel in self._detector]
        if self._imageset.get("mask"):
            path = self._imageset["mask"]
            for mask, extra in zip(masks, self._checked(read_dials_mask(path), path)):
                mask &= extra
        first = self.path(0)
        if is_hdf5(_first_bytes(first)):
            for mask, extra in zip(masks, self._panels(self._hdf5(first).static_mask(), first)):
                mask &= extra
        return masks

    def _checked(self, masks: list[NDArray[np.bool_]], path: str) -> list[NDArray[np.bool_]]:
        wanted = [panel.image_size[::-1] for panel in self._detector]
        if [mask.shape for mask in masks] != wanted:
            got = [mask.shape for mask in masks]
            raise InputError(f"mask {path}: wanted (slow, fast) {wanted[:4]} for the panels, got {got[:4]}")
        return masks


def open_images(experiment: Experiment, image_dir: str | os.PathLike | None = None) -> ImageReader:
    """Open the images of an experiment: a numbered template, a list of files, or one HDF5 file of many.

    Args:
        experiment: detector, scan and imageset (paths resolved, as `read_expt` does).
        image_dir: directory of the images, if not where the .expt says.

    Raises:
        InputError: images are missing, or their number is not that of the scan.
    """
    return ImageReader(experiment, image_dir)
