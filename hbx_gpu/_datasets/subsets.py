"""Some rows of a dataset, and which rows a dataset has."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol, Self

import numpy as np

from hbx_gpu._source import BoxIndex, ObsColumns, RowIndex, Source


class _Rebuildable(Protocol):
    def rebuild(self) -> Any: ...


@dataclass(frozen=True, slots=True)
class SubsetRecipe:
    """How to make some rows of a dataset again.

    Attributes
    ----------
    whole
        What makes the dataset.
    rows
        Row numbers, int32 where they fit.
    """

    whole: _Rebuildable
    rows: np.ndarray

    @property
    def version(self) -> int | None:
        """Snapshot of the atlas, if the dataset is from one."""
        return getattr(self.whole, "version", None)

    def rebuild(self) -> Any:
        """The dataset of these rows."""
        return self.whole.rebuild().subset(self.rows)


class StoredRows:
    """What datasets of stored rows say about these rows, and datasets of some of them."""

    _sources: list[Source]
    _rows: Any
    _obs: ObsColumns
    _recipe: Any
    _identity: dict[str, Any] | None = None

    def row_numbers(self, rows: Any) -> np.ndarray:
        """Row numbers as int64 in ``[0, n_cells)``."""
        raise NotImplementedError

    def subset(self, rows: Sequence[int] | np.ndarray) -> Self:
        """The dataset of some rows, in the order given; everything but their numbers is shared.

        Parameters
        ----------
        rows
            Row numbers, or a boolean mask of all rows. Batches of the subset number its rows from 0.

        Raises
        ------
        IndexError
            A row number is outside ``[-n_cells, n_cells)``.
        """
        chosen = self.row_numbers(rows)
        other = object.__new__(type(self))
        obs = ObsColumns({k: v[chosen] for k, v in self._obs.columns.items()}, self._obs.categories)
        narrow = chosen.astype(np.int32) if len(self._rows) < 2**31 else chosen
        recipe = None if self._recipe is None else SubsetRecipe(self._recipe, narrow)
        index = {name: getattr(self._rows, name)[chosen] for name in self._rows.__slots__}
        changes = {"_rows": type(self._rows)(**index), "_obs": obs, "_recipe": recipe}
        other.__dict__.update(self.__dict__, **changes, _spill=None, _identity=None)
        return other

    def identity(self) -> dict[str, Any]:
        """Which rows these are: ``cells``, ``rows`` (a digest) and ``snapshot`` (None outside an atlas).

        The digest follows from the stored matrices and the place of each row in them. It does not change
        with the columns or layers that are read, nor when matrices are compressed anew.
        """
        if self._identity is None:
            rows = digest_of_rows(self._sources, self._rows)
            snapshot = getattr(self._recipe, "version", None)
            self._identity = {"cells": len(self._rows), "rows": rows, "snapshot": snapshot}
        return dict(self._identity)


def digest_of_rows(sources: Sequence[Source], rows: RowIndex | BoxIndex) -> str:
    """A short name of the rows: equal for the same rows in the same order, however sources are numbered."""
    used = np.zeros(len(sources) + 1, bool)
    used[rows.source] = True  # -1, a row without the modality, is the last one
    number = np.cumsum(used, dtype=np.int32)
    state = hashlib.blake2b(digest_size=8)
    for source, is_used in zip(sources, used[:-1].tolist(), strict=True):
        if is_used:
            state.update(source.name.encode() + b"\0")
    state.update(number[rows.source].tobytes())
    for name in rows.__slots__:
        if name not in ("source", "length"):
            state.update(np.ascontiguousarray(getattr(rows, name)).tobytes())
    return state.hexdigest()
