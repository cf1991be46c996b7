"""Cells by group, as runs of cells that lie side by side."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Self

import numpy as np
from numpy.typing import ArrayLike

from hbx_gpu._source import GroupRuns
from hbx_gpu.sampler._position import digest
from hbx_gpu.sampler._runs import integers, number


@dataclass(frozen=True, slots=True)
class GroupTable:
    """The cells of each group, ascending, group after group; memory grows with the runs only.

    Attributes
    ----------
    sizes
        int64 (n_groups,). Cells of each group that occurs, groups in ascending order of their numbers.
    begins
        int64 (n_groups,). Place of each group's first cell in the list of all cells by group.
    first
        int64 (n_runs,). First cell of each run, in the order of that list.
    places
        int64 (n_runs + 1,). Place of each run's first cell in that list.
    """

    sizes: np.ndarray
    begins: np.ndarray
    first: np.ndarray
    places: np.ndarray

    @classmethod
    def of(cls, runs: GroupRuns) -> Self:
        """The table of groups given as runs in the order of the cells."""
        codes, _ = number(runs.codes)
        lengths = np.diff(runs.starts)
        # Codes become small numbers first, because bincount counts up to the largest.
        sizes = np.bincount(codes, weights=lengths, minlength=0).astype(np.int64)
        order = np.argsort(codes, kind="stable")
        places = np.concatenate([np.zeros(1, np.int64), np.cumsum(lengths[order])])
        return cls(sizes, np.cumsum(sizes) - sizes, runs.starts[:-1][order], places)

    def cells(self, places: np.ndarray) -> np.ndarray:
        """Cells at places of the list of all cells by group, int64."""
        if len(self.first) == 1:
            only: np.ndarray = places + self.first[0]
            return only
        run = np.searchsorted(self.places, places, "right") - 1
        result: np.ndarray = self.first[run] + places - self.places[run]
        return result

    def digest(self) -> str:
        """A short name for the groups, for comparing states."""
        return digest(self.first, self.places, self.sizes)

    def place_of(self, cell: int) -> int:
        """Where a cell is in the list of all cells by group."""
        run = int(np.flatnonzero((self.first <= cell) & (cell < self.first + np.diff(self.places)))[0])
        return int(self.places[run]) + cell - int(self.first[run])


def group_runs(groups: ArrayLike | GroupRuns, rows: np.ndarray | None = None) -> GroupRuns:
    """Runs of equal group numbers.

    Parameters
    ----------
    groups
        Integer (n_cells,), or runs.
    rows
        Row numbers, to get the runs of these rows in their order; None for all rows.
    """
    given = groups if isinstance(groups, GroupRuns) else integers("groups_np", groups)
    if rows is not None:
        return GroupRuns.of(given[rows])
    return given if isinstance(given, GroupRuns) else GroupRuns.of(given)
