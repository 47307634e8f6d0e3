"""Training and test split by parent structure, never by fragment, and the guard that keeps them apart."""

from __future__ import annotations

import hashlib
import os
import re
from collections.abc import Iterable, Mapping
from pathlib import Path

from xtalfast.errors import InputError

SPLITS = ("train", "test")
_ENTITY = re.compile(r"([1-9][A-Za-z0-9]{3})_\w+")


class Clusters:
    """Sequence clusters: names that must stay in one split.

    A file has one cluster a line (PDB's clusters-by-entity files) or one `representative member` pair a line (MMseqs2,
    CD-HIT tables); both are lines of names that belong together. An entity `4AZ3_1` belongs with its entry `4AZ3`.
    """

    def __init__(self, lines: Iterable[Iterable[str]] = ()) -> None:
        self._leader: dict[str, str] = {}
        for names in lines:
            first = None
            for name in names:
                entity = _ENTITY.fullmatch(name)
                for member in (name, entity.group(1)) if entity else (name,):
                    first = self._join(first, member.upper())

    @classmethod
    def read(cls, path: str | os.PathLike) -> Clusters:
        """Read a cluster file; names are separated by white space. Raises InputError if unreadable or empty."""
        try:
            lines = [line.split() for line in Path(path).read_text(encoding="utf-8").splitlines()]
        except (OSError, UnicodeDecodeError) as error:
            raise InputError(f"cannot read the cluster file {path}: {error}") from error
        if not any(lines):
            raise InputError(f"{path} holds no clusters; wanted lines of names that belong together")
        return cls(lines)

    def _find(self, name: str) -> str:
        while (leader := self._leader.setdefault(name, name)) != name:
            # Halve the path on the way, so that long chains of pairs stay cheap.
            self._leader[name] = self._leader.setdefault(leader, leader)
            name = leader
        return name

    def _join(self, one: str | None, other: str) -> str:
        if one is None:
            return self._find(other)
        low, high = sorted((self._find(one), self._find(other)))
        self._leader[high] = low
        return low

    def fingerprint(self) -> str:
        """Equal for equal clusters."""
        pairs = sorted((name, self._find(name)) for name in list(self._leader))
        return hashlib.sha256(repr(pairs).encode()).hexdigest()

    def group(self, parent: str) -> str:
        """What the split goes by: the alphabetically first name of the parent's cluster, or the parent itself."""
        return self._find(parent.upper()) if parent.upper() in self._leader else parent


def split_of(group: str, *, test_fraction: float = 0.1) -> str:
    """`train` or `test` from a hash of the group's name alone, so that adding structures moves none."""
    digest = hashlib.sha256(group.encode()).digest()
    return "test" if int.from_bytes(digest[:8], "big") < test_fraction * 2**64 else "train"


def require_disjoint(training_groups: Iterable[str], evaluated: Mapping[str, int] | Iterable[str]) -> None:
    """Refuse to judge a model on structures it was trained on.

    Args:
        training_groups: groups (parents or clusters) recorded in the checkpoint.
        evaluated: groups of the examples to be judged on.

    Raises:
        InputError: they have groups in common; the first are named.
    """
    common = sorted(set(training_groups) & set(evaluated))
    if common:
        raise InputError(
            f"{len(common)} of the structures to evaluate on were trained on ({', '.join(common[:5])}"
            f"{', ...' if len(common) > 5 else ''}); use the test split of the set the checkpoint was trained with"
        )
