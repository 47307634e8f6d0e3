"""DIALS experiment lists (`.expt`) without DIALS: every model in, and back out with all that is not modelled kept."""

from __future__ import annotations

import copy
import json
import logging
import os
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

from xtalfast.errors import InputError
from xtalfast.io import expt_blocks as blocks
from xtalfast.io.expt_blocks import Block
from xtalfast.io.files import write_text
from xtalfast.models import Experiment

logger = logging.getLogger(__name__)

_READERS: dict[str, Callable[[Block, str], Any]] = {
    "beam": blocks.read_beam,
    "detector": blocks.read_detector,
    "goniometer": blocks.read_goniometer,
    "scan": blocks.read_scan,
    "crystal": blocks.read_crystal,
    "profile": lambda block, where: copy.deepcopy(block),
}
_WRITERS: dict[str, Callable[[Any], Block]] = {
    "beam": blocks.beam_block,
    "detector": blocks.detector_block,
    "goniometer": blocks.goniometer_block,
    "scan": blocks.scan_block,
    "crystal": blocks.crystal_block,
    "profile": copy.deepcopy,
}
_SECTIONS = ("imageset", *_READERS, "scaling_model")
_LOOKUP_FILES = ("mask", "gain", "pedestal", "dx", "dy")


class ExperimentList(list[Experiment]):
    """The experiments of one file. Experiments that share a model in the file share the object.

    Attributes:
        path: the file, None for a list made from scratch.
        raw: the parsed json; `write_expt` starts from it, so that nothing in it is lost.
    """

    path: Path | None
    raw: dict[str, Any]

    def __init__(
        self, experiments: Iterable[Experiment] = (), path: Path | None = None, raw: dict[str, Any] | None = None
    ) -> None:
        super().__init__(experiments)
        self.path = path
        self.raw = {"__id__": "ExperimentList", "experiment": []} if raw is None else raw

    @classmethod
    def from_experiments(cls, experiments: Iterable[Experiment]) -> ExperimentList:
        """A list that can be written as a complete file; models that are one object are written once."""
        experiments = list(experiments)
        raw: dict[str, Any] = {
            "__id__": "ExperimentList",
            "experiment": [{"__id__": "Experiment", "identifier": e.identifier} for e in experiments],
        }
        raw.update({section: [] for section in _SECTIONS})
        return cls(experiments, None, raw)

    def select(self, rows: Sequence[int]) -> ExperimentList:
        """Some of the experiments, by number; the blocks of the file stay with them."""
        raw = copy.deepcopy(self.raw)
        raw["experiment"] = [raw["experiment"][i] for i in rows]
        return ExperimentList((self[i] for i in rows), self.path, raw)


def _resolve(path: str, directory: Path, image_dir: Path | None) -> str:
    """Absolute path of a file named in a `.expt` in `directory`: found under `image_dir` when that is given."""
    expanded = Path(os.path.expandvars(path)).expanduser()
    if image_dir is None:
        return os.path.abspath(directory / expanded)
    nested = image_dir / expanded
    moved = nested if not expanded.is_absolute() and nested.parent.is_dir() else image_dir / expanded.name
    return os.path.abspath(moved)


def _read_imageset(block: Block, directory: Path, image_dir: Path | None) -> Block:
    """The imageset block with absolute paths; `image_dir` moves the images, not masks or gain maps."""
    block = copy.deepcopy(block)
    if block.get("template"):
        block["template"] = _resolve(block["template"], directory, image_dir)
    if block.get("images"):
        block["images"] = [_resolve(image, directory, image_dir) for image in block["images"]]
    for key in _LOOKUP_FILES:
        if block.get(key):
            block[key] = _resolve(block[key], directory, None)
    return block


def _read_block(reader: Callable[[Block, str], Any], block: Block, where: str) -> Any:
    """The model of a block; whatever a reader stumbles over that it does not check itself becomes one line too."""
    try:
        return reader(block, where)
    except InputError:
        raise
    except (AttributeError, IndexError, KeyError, OverflowError, TypeError, ValueError) as error:
        raise InputError(f"{where} is malformed ({error})") from error


def _load_json(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise InputError(f"cannot read {path}: {error.strerror}") from error
    except ValueError as error:  # not UTF-8, or not json
        raise InputError(f"{path}: wanted a DIALS experiment list (.expt), got no json ({error})") from error
    kind = content.get("__id__") if isinstance(content, dict) else type(content).__name__
    if kind != "ExperimentList":
        raise InputError(f"{path}: wanted a DIALS experiment list ('__id__': 'ExperimentList'), got {kind!r}")
    for section in ("experiment", *_SECTIONS):
        blocks_of_section = content.get(section) or []
        if not isinstance(blocks_of_section, list) or not all(isinstance(b, dict | None) for b in blocks_of_section):
            raise InputError(f"{path}: {section} must be a list of blocks, got {blocks_of_section!r:.60}")
    if not content.get("experiment") or None in content["experiment"]:
        raise InputError(f"{path}: wanted at least one experiment, got none")
    return content


def read_expt(path: str | os.PathLike, image_dir: str | os.PathLike | None = None) -> ExperimentList:
    """Read the experiments of a DIALS `.expt` file.

    Args:
        path: the file.
        image_dir: where the images are, if not where the file says (relative names there are relative to the file).

    Returns:
        The experiments in file order, image names absolute; whether images exist is found out when they are read.

    Raises:
        InputError: no such file, not an experiment list, or a block that is missing or malformed.
    """
    path = Path(path)
    raw = _load_json(path)
    directory = path.absolute().parent
    readers = dict(_READERS)
    readers["imageset"] = lambda block, where: _read_imageset(block, directory, Path(image_dir) if image_dir else None)
    cache: dict[tuple[str, int], Any] = {}

    def model(kind: str, entry: Block, where: str) -> Any:
        index = entry.get(kind)
        if index is None:
            return None
        section = raw.get(kind) or []
        if not isinstance(index, int) or not 0 <= index < len(section):
            raise InputError(f"{where} names {kind} {index!r}, the file has {len(section)}")
        if (kind, index) not in cache:
            block = section[index]
            cache[kind, index] = None if block is None else _read_block(readers[kind], block, f"{path}: {kind} {index}")
        return cache[kind, index]

    experiments = []
    for i, entry in enumerate(raw["experiment"]):
        where = f"{path}: experiment {i}"
        models = {kind: model(kind, entry, where) for kind in readers}
        for kind in ("beam", "detector"):
            if models[kind] is None:
                raise InputError(f"{where} has no {kind}; wanted one")
        experiment = Experiment(**models, identifier=entry.get("identifier", ""))
        _check(experiment, where)
        experiments.append(experiment)
    return ExperimentList(experiments, path, raw)


def _check(experiment: Experiment, where: str) -> None:
    """What the models of one experiment must agree on."""
    scan, crystal, imageset = experiment.scan, experiment.crystal, experiment.imageset
    if scan is not None and crystal is not None and crystal.A_at_scan_points is not None:
        n = len(crystal.A_at_scan_points)
        if n != scan.n_images + 1:
            raise InputError(
                f"{where}: A_at_scan_points must have one point more than images, got {n} and {scan.n_images} images"
            )
    if imageset is not None and (imageset.get("dx") or imageset.get("dy")):
        logger.warning("%s: the maps dx and dy are not used; pixel positions may be off by up to a pixel", where)


def write_expt(path: str | os.PathLike, experiments: Sequence[Experiment]) -> None:
    """Write experiments as a `.expt` file that DIALS reads.

    An `ExperimentList` keeps every block and key of the file it was read from; only what has been changed in its
    models is written anew, and relative image names are made to fit the new place.

    Args:
        path: the file; it appears whole or not at all.
        experiments: an ExperimentList, or experiments from which a file is made from scratch.

    Raises:
        InputError: experiments were added to or taken from an ExperimentList, or a place that cannot be written.
    """
    path = Path(path)
    if not isinstance(experiments, ExperimentList):
        experiments = ExperimentList.from_experiments(experiments)
    if len(experiments) != len(experiments.raw["experiment"]):
        raise InputError(
            f"experiments: the list was read with {len(experiments.raw['experiment'])} experiments and now has "
            f"{len(experiments)}; use ExperimentList.select or ExperimentList.from_experiments"
        )
    raw = copy.deepcopy(experiments.raw)
    old_directory = None if experiments.path is None else experiments.path.absolute().parent
    for kind in _READERS:
        _update_section(raw, kind, [getattr(e, kind) for e in experiments])
    _update_imagesets(raw, [e.imageset for e in experiments], old_directory, path.absolute().parent)
    for experiment, entry in zip(experiments, raw["experiment"]):
        entry["identifier"] = experiment.identifier
    write_text(path, json.dumps(raw, indent=2))


def _slots(raw: dict[str, Any], kind: str, models: Sequence[Any]) -> Iterable[tuple[Any, Block]]:
    """Each distinct model and the block it is written to: a new one where it has none, or shares one with another."""
    section = raw.setdefault(kind, [])
    owner: dict[int, Any] = {}
    index_of: dict[int, int] = {}
    for model, entry in zip(models, raw["experiment"]):
        index = entry.get(kind)
        if model is None:
            # An index to a null block is as good as none.
            if index is not None and section[index] is not None:
                entry.pop(kind)
            continue
        if id(model) in index_of:
            entry[kind] = index_of[id(model)]
            continue
        if index is None or section[index] is None or index in owner:
            section.append(copy.deepcopy(section[index]) if index in owner else {})
            index = len(section) - 1
        entry[kind] = index_of[id(model)] = index
        owner[index] = model
        yield model, section[index]


def _update_section(raw: dict[str, Any], kind: str, models: Sequence[Any]) -> None:
    """Write the models of one kind into the blocks of `raw`, touching only what differs."""
    read, write = _READERS[kind], _WRITERS[kind]
    # Listed first: _slots copies shared blocks, which must happen before any of them is changed.
    for model, block in list(_slots(raw, kind, models)):
        before = read(block, kind) if block else None
        if before is None:
            block.update(write(model))
        elif kind == "detector" and len(before) == len(model):
            for old, new, panel, parent in zip(before, model, block["panels"], blocks.parent_frames(block, kind)):
                _merge(panel, blocks.panel_block(old, parent), blocks.panel_block(new, parent))
        elif (old_block := write(before)) != (new_block := write(model)):
            if kind in ("beam", "crystal"):
                _merge(block, old_block, new_block)
                for key in [key for key in block if key.startswith("B_covariance")]:
                    del block[key]  # no longer that of this crystal
            else:
                block.clear()
                block.update(new_block)


def _merge(block: Block, before: Block, after: Block) -> None:
    """Into `block` whatever differs between `before` and `after`."""
    for key in before.keys() - after.keys():
        block.pop(key, None)
    block.update({key: value for key, value in after.items() if before.get(key) != value})


def _update_imagesets(raw: dict[str, Any], imagesets: Sequence[Any], old: Path | None, new: Path) -> None:
    """Imageset blocks for a file in the directory `new`: names that were relative to `old` stay relative."""

    def name(resolved: str, original: str | None) -> str:
        unchanged = original and old is not None and _resolve(original, old, None) == resolved
        if not unchanged or original is None:
            return resolved
        if old == new or Path(os.path.expandvars(original)).expanduser().is_absolute():
            return original
        return os.path.relpath(resolved, new)

    for imageset, block in list(_slots(raw, "imageset", imagesets)):
        original = copy.deepcopy(block)
        block.update(copy.deepcopy(imageset))
        for key in ("template", *_LOOKUP_FILES):
            if block.get(key):
                block[key] = name(block[key], original.get(key))
        if block.get("images"):
            before = original.get("images") or []
            before += [None] * (len(block["images"]) - len(before))
            block["images"] = [name(image, was) for image, was in zip(block["images"], before)]
