"""Make subsets of datasets again after unpickling, and identify the rows that a dataset has."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Generic, Protocol, Self, TypeVar, runtime_checkable

import numpy as np

from hbx_gpu._source import BoxIndex, RowIndex, RowTable, Source

_AT_ONCE = 1 << 20  # rows that are looked at together


class _Whole(Protocol):
    def subset(self, rows: np.ndarray) -> Self: ...


WholeT = TypeVar("WholeT", bound=_Whole)
WholeT_co = TypeVar("WholeT_co", bound=_Whole, covariant=True)


class _Rebuildable(Protocol[WholeT_co]):
    def rebuild(self) -> WholeT_co: ...


@runtime_checkable
class Versioned(Protocol):
    """A recipe of a dataset that has a version, as those of atlases."""

    @property
    def version(self) -> int | None: ...


@dataclass(frozen=True, slots=True)
class SubsetRecipe(Generic[WholeT]):
    """How to make some rows of a dataset again.

    Attributes
    ----------
    whole
        Recipe of the whole dataset.
    rows
        Row numbers, int32 where they fit.
    """

    whole: _Rebuildable[WholeT]
    rows: np.ndarray

    @property
    def version(self) -> int | None:
        """Snapshot of the atlas, if the dataset is from one."""
        return self.whole.version if isinstance(self.whole, Versioned) else None

    def rebuild(self) -> WholeT:
        """The dataset of these rows."""
        return self.whole.rebuild().subset(self.rows)


def digest_of_rows(sources: Sequence[Source], rows: RowTable | BoxIndex) -> str:
    """Return a digest that is equal for the same rows in the same order, however Sources are numbered."""
    used = np.zeros(len(sources) + 1, bool)
    used[rows.groups().codes] = True  # -1, a row without the modality, is the last one
    number = np.cumsum(used, dtype=np.int32)
    state = hashlib.blake2b(digest_size=8)
    for source, is_used in zip(sources, used[:-1].tolist(), strict=True):
        if is_used:
            state.update(source.name.encode() + b"\0")
    # Array after array, and each part by part: no array of all rows is made.
    for which in range(3):
        for begin in range(0, len(rows), _AT_ONCE):
            part = rows.at(np.arange(begin, min(begin + _AT_ONCE, len(rows))))
            arrays = [number[part.source], *_places(part)]
            if which < len(arrays):
                state.update(np.ascontiguousarray(arrays[which]).tobytes())
    return state.hexdigest()


def _places(part: RowIndex | BoxIndex) -> list[np.ndarray]:
    return [part.start] if isinstance(part, RowIndex) else [part.lower, part.size]
