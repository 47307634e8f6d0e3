"""A fragment set on disk: one store per split, what was rejected and why, and the scale of its maps.

Work is done and saved in parts of a few structures, each of which depends on its own input alone. An interrupted run
goes on where it stopped and ends with the same bytes.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import shutil
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Executor, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np

import xtalfast
from xtalfast.density.cells import solvent_fraction
from xtalfast.density.conformers import conformers, mass_of
from xtalfast.density.fragments import REPEATED_NAME, UNREADABLE, FragmentSettings, Tally, cut_structure
from xtalfast.density.grids import bin_statistics, grid_size
from xtalfast.density.scale import MapScale, fit_scale
from xtalfast.density.split import SPLITS, Clusters, split_of
from xtalfast.density.store import FragmentStore
from xtalfast.errors import InputError
from xtalfast.io.files import write_text
from xtalfast.io.structure import StructureFile, count_structures, iter_structures

logger = logging.getLogger(__name__)

Progress = Callable[[str, int, int], None]

_FORMAT = "xtalfast fragment set 1"
_PART = 16  # structures; a few seconds of work
_SCALE_SAMPLE = 1024  # fragments; their largest map values hardly grow any more


@dataclass
class FragmentSet:
    """A directory made by `xtalfast fragments`.

    Attributes:
        path: the directory.
        settings: how the fragments were cut.
        tally: what was accepted and rejected.
        statistics: solvent content, atoms, cell edges (5, 50, 95 % each), grid bins, bytes per fragment.
        scale: what the maps of this set are divided by.
        stores: one per split, memory-mapped.
    """

    path: Path
    settings: FragmentSettings
    tally: Tally
    statistics: dict[str, Any]
    scale: MapScale
    stores: dict[str, FragmentStore]

    @classmethod
    def open(cls, path: str | os.PathLike) -> FragmentSet:
        """Open a finished set. Raises InputError if it is missing, unfinished or damaged."""
        path = Path(path)
        header = _read_header(path)
        if header is None:
            hint = "unfinished; run the same xtalfast fragments command again" if path.is_dir() else "no such directory"
            raise InputError(f"{path} is no fragment set ({hint})")
        try:
            return cls(
                path,
                FragmentSettings(**header["settings"]),
                Tally.from_dict(header["tally"]),
                header["statistics"],
                MapScale(**header["scale"]),
                {split: FragmentStore.open(path / f"{split}.safetensors") for split in SPLITS},
            )
        except (KeyError, TypeError, AttributeError) as error:
            raise InputError(f"{path / 'set.json'} is damaged ({error}); make the set again") from error

    def __getitem__(self, split: str) -> FragmentStore:
        if split not in self.stores:
            raise InputError(f"split must be one of {', '.join(self.stores)}, got {split!r}")
        return self.stores[split]


def _read_header(path: Path) -> dict[str, Any] | None:
    """`set.json` of a finished set, None if there is none."""
    file = path / "set.json"
    if not file.exists():
        return None
    try:
        header = json.loads(file.read_text(encoding="utf-8"))
        if header["format"] != _FORMAT:
            raise ValueError(f"format {header['format']!r}, wanted {_FORMAT!r}")
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise InputError(f"{file} is no fragment set ({error}); make it again") from error
    return header


def _parts(files: Iterable[StructureFile]) -> Iterator[list[StructureFile]]:
    part: list[StructureFile] = []
    for file in files:
        part.append(file)
        if len(part) == _PART:
            yield part
            part = []
    if part:
        yield part


def _key(settings: FragmentSettings, files: Sequence[StructureFile], repeated: int = 0) -> str:
    """Says whether a part on disk was made from these files with these settings."""
    content = [settings.as_dict(), xtalfast.__version__, repeated, *((file.name, file.checksum) for file in files)]
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def _set_key(part_keys: Sequence[str], clusters: Clusters) -> str:
    return hashlib.sha256("".join([*part_keys, clusters.fingerprint()]).encode()).hexdigest()


def _make_part(path: Path, files: Sequence[StructureFile], settings: FragmentSettings, repeated: int) -> Tally:
    """Cut some structures and write their fragments; a part that is already there is used."""
    key = _key(settings, files, repeated)
    if path.exists():
        done = FragmentStore.open(path)
        if done.metadata.get("key") == key:
            return Tally.from_dict(json.loads(done.metadata["tally"]))
    tally = Tally()
    if repeated:
        tally.rejected_structures[REPEATED_NAME] += repeated
    fragments = []
    for file in files:
        try:
            fragments += cut_structure(file, settings, tally)
        except InputError as error:
            tally.rejected_structures[UNREADABLE] += 1
            logger.warning("%s", error)
    store = FragmentStore.from_fragments(fragments, settings.length)
    store.write(path, {"key": key, "tally": json.dumps(tally.as_dict())})
    return tally


class _Inline(Executor):
    """Runs what is submitted at once, in this process."""

    def submit(self, fn: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Future[Any]:
        future: Future[Any] = Future()
        future.set_result(fn(*args, **kwargs))
        return future


def make_fragments(
    inputs: Sequence[str | os.PathLike],
    out_dir: str | os.PathLike,
    settings: FragmentSettings | None = None,
    *,
    clusters: Clusters | None = None,
    jobs: int = 1,
    progress: Progress | None = None,
) -> FragmentSet:
    """Cut the structures in `inputs` into fragments in tight P1 cells and split them by parent structure.

    Args:
        inputs: PDB or mmCIF files, directories or tar archives of them.
        out_dir: the set; made if needed.
        settings: the paper's, when not given.
        clusters: parents of one sequence cluster go to the same split.
        jobs: processes.
        progress: called with stage, done, total.

    Returns:
        The set, opened. A finished set made from the same input is opened as it is.

    Raises:
        InputError: unusable input, not one fragment, a set of other input in `out_dir`, or a directory that cannot be
            written. Files that are no structures are counted, logged and left out.
    """
    settings = settings or FragmentSettings()
    clusters = clusters or Clusters()
    if jobs < 1:
        raise InputError(f"jobs must be 1 or more, got {jobs}")
    out_dir = Path(out_dir)
    total = count_structures(inputs)
    if total == 0:
        raise InputError(f"no PDB or mmCIF file in {', '.join(map(str, inputs))}")
    header = _read_header(out_dir)
    if header is not None:
        if header.get("key") != _set_key([_key(settings, part) for part in _parts(iter_structures(inputs))], clusters):
            raise InputError(
                f"{out_dir} holds a fragment set of other structures or settings; choose another directory"
            )
        return FragmentSet.open(out_dir)
    parts_dir = out_dir / "parts"
    try:
        parts_dir.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"cannot make {parts_dir}: {error.strerror or error}") from error
    paths, keys, tally = _cut_all(inputs, parts_dir, settings, jobs, total, progress)
    if tally.accepted == 0:
        reasons = tally.rejected_structures + tally.rejected_fragments
        listed = ", ".join(f"{n} {reason}" for reason, n in reasons.most_common()) or "no chain is long enough"
        shutil.rmtree(parts_dir)
        raise InputError(f"not one fragment of {settings.length} residues in {total} structures ({listed})")
    stores = _write_splits(out_dir, [FragmentStore.open(path) for path in paths], settings, clusters)
    training = stores["train"] if len(stores["train"]) else stores["test"]
    scale = fit_scale(training, sample=_SCALE_SAMPLE, seed=settings.seed, progress=progress)
    header = {
        "format": _FORMAT,
        "version": xtalfast.__version__,
        "key": _set_key(keys, clusters),
        "settings": settings.as_dict(),
        "tally": tally.as_dict(),
        "statistics": _statistics(out_dir, stores),
        "scale": scale.as_dict(),
    }
    write_text(out_dir / "set.json", json.dumps(header, indent=1) + "\n")
    shutil.rmtree(parts_dir)
    return FragmentSet.open(out_dir)


def _cut_all(
    inputs: Sequence[str | os.PathLike],
    parts_dir: Path,
    settings: FragmentSettings,
    jobs: int,
    total: int,
    progress: Progress | None,
) -> tuple[list[Path], list[str], Tally]:
    """Make every part that is not there yet; their paths, keys and the sum of their tallies."""
    paths: list[Path] = []
    keys: list[str] = []
    tally = Tally()
    seen: set[str] = set()
    running: dict[Future[Tally], int] = {}
    done = 0

    def collect(enough: int) -> None:
        nonlocal done
        while len(running) > enough:
            for future in wait(running, return_when=FIRST_COMPLETED).done:
                done += running.pop(future)
                tally.add(future.result())
                if progress:
                    progress("cut fragments", done, total)

    # A pool of fresh processes: a forked one would share the threads and locks of torch.
    pool = _Inline() if jobs == 1 else ProcessPoolExecutor(jobs, mp_context=get_context("spawn"))
    try:
        with pool:
            for number, part in enumerate(_parts(iter_structures(inputs))):
                keys.append(_key(settings, part))
                new = []
                for file in part:
                    if file.name not in seen:
                        seen.add(file.name)
                        new.append(file)
                paths.append(parts_dir / f"{number:06d}.safetensors")
                running[pool.submit(_make_part, paths[-1], new, settings, len(part) - len(new))] = len(part)
                collect(2 * jobs)  # no more, so that the structures waiting stay few
            collect(0)
    except BrokenProcessPool as error:
        raise InputError("a worker process was killed (out of memory?); the same command goes on from here") from error
    return paths, keys, tally


def _write_splits(
    out_dir: Path, parts: Sequence[FragmentStore], settings: FragmentSettings, clusters: Clusters
) -> dict[str, FragmentStore]:
    """Write one store per split; `parent` becomes the group the split goes by."""
    merged = FragmentStore.concatenate(parts)
    groups = [clusters.group(parent) for parent in merged.parents]
    names = sorted(set(groups))
    number = {name: i for i, name in enumerate(names)}
    group = np.array([number[name] for name in groups], np.int32)[merged.arrays["parent"]]
    merged = FragmentStore({**merged.arrays, "parent": group}, names, merged.sources)
    split = np.array([split_of(name, test_fraction=settings.test_fraction) for name in names])[group]
    stores = {}
    for name in SPLITS:
        path = out_dir / f"{name}.safetensors"
        merged.select(np.flatnonzero(split == name)).write(path)
        stores[name] = FragmentStore.open(path)
    return stores


def _statistics(out_dir: Path, stores: dict[str, FragmentStore]) -> dict[str, Any]:
    """What there is to know about a set before training on it."""
    filled = [store.arrays for store in stores.values() if len(store)]
    cells = np.concatenate([arrays["cells"] for arrays in filled])
    residues = np.concatenate([arrays["residue_ids"] for arrays in filled])
    atoms = np.concatenate([np.diff(arrays["ptr"]) for arrays in filled])
    masses = np.array([conformer.mass for conformer in conformers()])
    ends = mass_of(residues[0]) - masses[residues[0]].sum()  # waters lost, the same for all of one length
    grids = {multiple: grid_size(cells, 1.5, multiple=multiple) for multiple in (4, 8)}

    def percentiles(values: np.ndarray) -> list:
        return np.round(np.percentile(values, [5, 50, 95], axis=0), 3).tolist()

    bins = {m: bin_statistics(sizes) for m, sizes in grids.items()}
    return {
        "fragments": {name: len(store) for name, store in stores.items()},
        "parents": {name: len(store.parents) for name, store in stores.items()},
        "solvent_5_50_95": percentiles(solvent_fraction(masses[residues].sum(axis=1) + ends, cells)),
        "atoms_5_50_95": percentiles(atoms),
        "edges_5_50_95": percentiles(cells[:, :3]),
        "grids_at_1.5": {f"multiple_of_{m}": {"bins": n, "in_bins_of_20": round(f, 4)} for m, (n, f) in bins.items()},
        "bytes_per_fragment": round(
            sum((out_dir / f"{name}.safetensors").stat().st_size for name in stores) / len(cells)
        ),
    }
