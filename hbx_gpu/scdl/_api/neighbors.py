"""Neighbors of the cells of an opened archive, and draws among them with a generator of their own."""

from __future__ import annotations

import operator
import os
import sys
import warnings
from dataclasses import dataclass, field
from typing import SupportsIndex

import numpy as np

from hbx_gpu.scdl._format.archive import Archive
from hbx_gpu.scdl._format.neighbors import NeighborSamplingStrategy, NeighborsUnusableError, NeighborTable


@dataclass
class NeighborDraws:
    """Draws neighbors of the cells of an archive; a dataset opened with `load_neighbors` holds one.

    Attributes
    ----------
    archive
        The archive whose neighbor files are read.
    strategy
        How a neighbor is drawn.
    fallback_to_identity
        Whether cells without neighbors pass without a warning.
    seed
        Seed of the generator, or None.
    missing
        Why the archive has no usable neighbors; empty if it has them.
    """

    archive: Archive
    strategy: NeighborSamplingStrategy
    fallback_to_identity: bool
    seed: int | None
    missing: str = field(init=False, default="")
    _generator: np.random.Generator | None = field(init=False, default=None, repr=False)
    _generator_process: int = field(init=False, default=0, repr=False)

    def __post_init__(self) -> None:
        try:
            if self.archive.neighbors is None:
                self.missing = f"neighbor files are missing at {self.archive.path}"
        except NeighborsUnusableError as error:
            self.missing = str(error)

    def __getstate__(self) -> dict[str, object]:
        # Another process draws with a generator of its own.
        return {**self.__dict__, "_generator": None, "_generator_process": 0}

    @property
    def table(self) -> NeighborTable:
        """The stored neighbors.

        Raises
        ------
        ValueError
            The archive has none that can be used.
        """
        found = None if self.missing else self.archive.neighbors
        if found is None:
            raise ValueError(
                "Cannot get neighbors: load_neighbors was asked for, but no neighbor data is available "
                f"({self.missing})"
            )
        return found

    def of(self, cell: SupportsIndex) -> tuple[np.ndarray, np.ndarray]:
        """Return row numbers (uint32) and weights (float32) of the neighbors of a cell.

        Raises
        ------
        ValueError
            The archive has no neighbors.
        IndexError
            No such row.
        """
        return self.table.of(self._row(cell))

    def one(self, cell: int) -> int | np.uint32:
        """Return the row number of one neighbor, or the cell itself if it has none."""
        table, row = self.table, self._row(cell)
        if not len(table.of(row)[0]):
            if not self.fallback_to_identity:
                # Attributed to the caller of the dataset's method.
                warnings.warn(f"Cell {row} has no neighbors: it is its own", UserWarning, stacklevel=3)
            return cell
        return np.uint32(table.draw(np.array([row]), self._random(), self.strategy)[0])

    def many(self, rows: np.ndarray, n: int | None) -> np.ndarray:
        """Return one neighbor of each row, int64 (n_rows,), or `n` of each, (n_rows, n)."""
        return self.table.draw(rows, self._random(), self.strategy, n)

    def stats(self) -> dict[str, bool | int | float]:
        """Return counts of neighbors over all cells."""
        table = self.table
        counts = table.counts()
        return {
            "has_neighbors": True,
            "total_connections": len(table.indices),
            "min_neighbors_per_cell": int(counts.min()) if len(counts) else 0,
            "max_neighbors_per_cell": int(counts.max(initial=0)),
            "avg_neighbors_per_cell": float(counts.mean()) if len(counts) else 0.0,
            "cells_with_no_neighbors": int((counts == 0).sum()),
        }

    def _row(self, index: SupportsIndex) -> int:
        row = operator.index(index)
        if not 0 <= row < self.archive.n_rows:
            raise IndexError(f"Cell index {row} is out of bounds: the archive has {self.archive.n_rows} rows")
        return row

    def _random(self) -> np.random.Generator:
        if self._generator is None or self._generator_process != os.getpid():
            torch = sys.modules.get("torch")
            worker = torch.utils.data.get_worker_info() if torch else None
            seed: int | list[int] | None = self.seed
            if worker is not None:
                seed = worker.seed if self.seed is None else [self.seed, worker.id]
            self._generator, self._generator_process = np.random.default_rng(seed), os.getpid()
        return self._generator
