"""Neighbors of the rows of an archive as SCDL's API has them, with a generator of their own."""

from __future__ import annotations

import operator
import os
import sys
import warnings
from collections.abc import Sequence
from typing import Any

import numpy as np

from hbx_gpu.scdl._api.rows import RowReader
from hbx_gpu.scdl._format.neighbors import NeighborSamplingStrategy, NeighborTable


class NeighborReader(RowReader):
    """Rows with a neighbor; without `load_neighbors` every cell is its own.

    Attributes
    ----------
    load_neighbors
        Whether neighbors were asked for. Only then the next two exist.
    neighbor_sampling_strategy, fallback_to_identity
        How a neighbor is drawn, and whether cells without neighbors pass without a warning.
    neighbor_seed
        Seed of the generator, or None.
    """

    load_neighbors: bool
    neighbor_sampling_strategy: NeighborSamplingStrategy
    fallback_to_identity: bool
    neighbor_seed: int | None
    _neighbors: NeighborTable | None = None
    _no_neighbors = ""
    _generator: np.random.Generator | None = None
    _generator_process = 0

    def _neighbor_table(self) -> NeighborTable:
        if self._neighbors is None:
            raise ValueError(
                "Cannot get neighbors: load_neighbors was asked for, but no neighbor data is available "
                f"({self._no_neighbors})"
            )
        return self._neighbors

    def _neighbor_row(self, index: Any) -> int:
        row = operator.index(index)
        if not 0 <= row < self.archive.n_rows:
            raise IndexError(f"Cell index {row} is out of bounds: the archive has {self.archive.n_rows} rows")
        return row

    def get_neighbor_indices_for_cell(self, cell_index: int) -> np.ndarray:
        """uint32, (n_neighbors,). Row numbers of the neighbors of a cell; empty without `load_neighbors`.

        Raises
        ------
        ValueError
            The archive has no neighbors.
        IndexError
            No such row.
        """
        if not self.load_neighbors:
            return np.empty(0, np.uint32)
        table = self._neighbor_table()
        return table.of(self._neighbor_row(cell_index))[0]

    def get_neighbor_weights_for_cell(self, cell_index: int) -> np.ndarray:
        """float32, (n_neighbors,). Weights of the neighbors; otherwise as the method for their indices."""
        if not self.load_neighbors:
            return np.empty(0, np.float32)
        table = self._neighbor_table()
        return table.of(self._neighbor_row(cell_index))[1]

    def sample_neighbor_index(self, cell_index: int) -> Any:
        """Row number of one neighbor, drawn as `neighbor_sampling_strategy` says.

        The cell itself if it has none, or without `load_neighbors`. Errors as
        :meth:`get_neighbor_indices_for_cell`.
        """
        if not self.load_neighbors:
            return cell_index
        table = self._neighbor_table()
        row = self._neighbor_row(cell_index)
        if not len(table.of(row)[0]):
            if not self.fallback_to_identity:
                warnings.warn(f"Cell {row} has no neighbors: it is its own", UserWarning, stacklevel=2)
            return cell_index
        drawn = table.draw(np.array([row]), self._random(), self.neighbor_sampling_strategy)
        return np.uint32(drawn[0])

    def sample_neighbor_indices(
        self, cell_indices: Sequence[int] | np.ndarray, n: int | None = None
    ) -> np.ndarray:
        """Neighbors of many cells, drawn together.

        Parameters
        ----------
        cell_indices
            Row numbers.
        n
            Neighbors per cell, with replacement; None for one.

        Returns
        -------
        np.ndarray
            int64, (n_cells,) or (n_cells, n). A cell without neighbors is its own.
        """
        rows = np.array([self._row(index) for index in cell_indices], np.int64)
        if not self.load_neighbors:
            return rows if n is None else np.repeat(rows[:, None], n, axis=1)
        return self._neighbor_table().draw(rows, self._random(), self.neighbor_sampling_strategy, n)

    def _random(self) -> np.random.Generator:
        if self._generator is None or self._generator_process != os.getpid():
            torch = sys.modules.get("torch")
            worker = torch.utils.data.get_worker_info() if torch else None
            seed: Any = self.neighbor_seed
            if worker is not None:
                seed = worker.seed if seed is None else [seed, worker.id]
            self._generator, self._generator_process = np.random.default_rng(seed), os.getpid()
        return self._generator

    def get_row_with_neighbor(
        self,
        index: int,
        return_var_features: bool = False,
        var_feature_names: Sequence[str] | None = None,
        return_obs_features: bool = False,
        obs_feature_names: Sequence[str] | None = None,
    ) -> dict[str, Any]:
        """One cell and a neighbor of it.

        Parameters and errors are those of :meth:`get_row`.

        Returns
        -------
        dict
            ``current_cell`` and ``next_cell``: values and columns; ``current_cell_index``,
            ``next_cell_index``; ``var_features``, ``obs_features`` of the current cell, or None.

        Raises
        ------
        ValueError
            Opened without `load_neighbors`, or no neighbors in the archive.
        """
        if not self.load_neighbors or self._neighbors is None:
            raise ValueError(
                "Cannot include neighbor data: "
                + (self._no_neighbors or "no neighbors were loaded; open with load_neighbors=True")
            )
        row = self._row(index)
        current, var, obs = self.get_row(
            row, return_var_features, var_feature_names, return_obs_features, obs_feature_names
        )
        other = self.sample_neighbor_index(row)
        return {
            "current_cell": current,
            "next_cell": self.get_row(other)[0],
            "current_cell_index": row,
            "next_cell_index": other,
            "var_features": var,
            "obs_features": obs,
        }

    def get_row_padded_with_neighbor(
        self,
        index: int,
        return_var_features: bool = False,
        var_feature_names: Sequence[str] | None = None,
        return_obs_features: bool = False,
        obs_feature_names: Sequence[str] | None = None,
    ) -> dict[str, Any]:
        """As :meth:`get_row_with_neighbor`, with dense rows as :meth:`get_row_padded` has them."""
        found = self.get_row_with_neighbor(
            index, return_var_features, var_feature_names, return_obs_features, obs_feature_names
        )
        for cell in ("current_cell", "next_cell"):
            found[cell] = self._padded(int(found[f"{cell}_index"]), found[cell])
        return found

    def get_neighbor_stats(self) -> dict[str, Any]:
        """``has_neighbors``; with neighbors also counts of them over all cells."""
        if not self.load_neighbors or self._neighbors is None:
            return {"has_neighbors": False}
        counts = self._neighbors.counts()
        return {
            "has_neighbors": True,
            "total_connections": len(self._neighbors.indices),
            "min_neighbors_per_cell": int(counts.min()) if len(counts) else 0,
            "max_neighbors_per_cell": int(counts.max(initial=0)),
            "avg_neighbors_per_cell": float(counts.mean()) if len(counts) else 0.0,
            "cells_with_no_neighbors": int((counts == 0).sum()),
        }
