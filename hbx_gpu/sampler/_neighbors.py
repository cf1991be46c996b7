"""Batches with neighbors of each cell: rows of another sampler, then those of their neighbors."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import ArrayLike

from hbx_gpu.sampler._epoch import EpochSampler
from hbx_gpu.sampler._position import at_least, digest
from hbx_gpu.sampler._runs import as_array

if TYPE_CHECKING:
    from scipy.sparse import csr_matrix


class NeighborSampler:
    """The batches of a sampler, each followed by k neighbors of every cell.

    A loader reads cells and neighbors under one plan, and hands neighbors out below the key ``"neighbors"``:
    dense tensors (n, k, ...), or CSR with the k neighbors of a cell in consecutive rows.

    Parameters
    ----------
    sampler
        Decides cells, order, ranks and position.
    neighbors
        Integer (n_cells, k): row numbers of the neighbors of each cell; -1 stands for the cell itself. See
        :func:`neighbor_table`.

    Raises
    ------
    ValueError
        `neighbors` is not a table of integers.
    IndexError
        A row number is out of range.
    """

    def __init__(self, sampler: EpochSampler, neighbors: ArrayLike) -> None:
        table = as_array("neighbors", neighbors)
        if table.ndim != 2 or table.dtype.kind not in "iu" or table.shape[1] < 1:
            raise ValueError(
                "neighbors must be integers of shape (n_cells, k), with k of 1 or more; got "
                f"{table.dtype} of shape {table.shape}"
            )
        if table.size and (table.min() < -1 or table.max() >= len(table)):
            wrong = int(table.min()) if table.min() < -1 else int(table.max())
            raise IndexError(f"neighbor {wrong} is out of range for {len(table)} cells")
        self.sampler = sampler
        self.neighbors_per_cell = table.shape[1]
        self.batch_size = sampler.batch_size
        self.drop_last = sampler.drop_last
        self.num_workers = sampler.num_workers
        self._table = table
        self._digest = digest(table)

    @property
    def seed(self) -> int:
        """Seed of the order."""
        return self.sampler.seed

    @property
    def epoch(self) -> int:
        """Epoch of the running or the next iteration."""
        return self.sampler.epoch

    @property
    def rank(self) -> int:
        """See :class:`EpochSampler`."""
        return self.sampler.rank

    @property
    def world_size(self) -> int:
        """See :class:`EpochSampler`."""
        return self.sampler.world_size

    @property
    def n_done(self) -> int:
        """See :class:`EpochSampler`."""
        return self.sampler.n_done

    @property
    def resumed(self) -> bool:
        """See :class:`EpochSampler`."""
        return self.sampler.resumed

    def __len__(self) -> int:
        return len(self.sampler)

    def set_epoch(self, epoch: int) -> None:
        """See :class:`EpochSampler`."""
        self.sampler.set_epoch(epoch)

    def __iter__(self) -> Iterator[list[int]]:
        for rows in self.batches():
            yield rows.tolist()

    def batches(self) -> Iterator[np.ndarray]:
        """Begin an iteration: int64 (n + n * k,), the cells, then the neighbors of the first cell, and so on.

        Raises
        ------
        IndexError
            The sampler yields a row that the table does not have.
        """
        return map(self._with_neighbors, self.sampler.batches())

    def _with_neighbors(self, cells: np.ndarray) -> np.ndarray:
        if len(cells) and cells.max() >= len(self._table):
            raise IndexError(
                f"the sampler yields row {cells.max()}, and neighbors are there for {len(self._table)} cells"
            )
        found = self._table[cells].astype(np.int64)
        found = np.where(found < 0, cells[:, None], found)
        return np.concatenate([cells, found.reshape(-1)])

    def state_dict(self, delivered: int | None = None) -> dict[str, object]:
        """See :class:`EpochSampler`."""
        return {**self.sampler.state_dict(delivered), "neighbors": self._digest}

    def load_state_dict(self, state: Mapping[str, object]) -> None:
        """See :class:`EpochSampler`.

        Raises
        ------
        ValueError
            The state belongs to another order, or to other neighbors.
        """
        if state.get("neighbors") != self._digest:
            raise ValueError(
                "this state was saved with other neighbors, or with none: make the sampler with those of the "
                "saved run, or start the epoch anew without the state"
            )
        self.sampler.load_state_dict(state)


def neighbor_table(graph: csr_matrix, k: int, *, nearest: str = "largest") -> np.ndarray:
    """The k nearest neighbors of each cell in a graph, such as ``adata.obsp["connectivities"]``.

    Parameters
    ----------
    graph
        CSR matrix (n_cells, n_cells); stored entries are links.
    k
        Number of neighbors.
    nearest
        Whether the ``"largest"`` values are the nearest neighbors, as in connectivities, or the
        ``"smallest"``, as in distances. Of equal values, the lower row number comes first.

    Returns
    -------
    numpy.ndarray
        int64 (n_cells, k), nearest first. A cell with fewer links has -1 in the places that are left.

    Raises
    ------
    ValueError
        The graph is not square, or `nearest` is unknown.
    """
    if nearest not in ("largest", "smallest"):
        raise ValueError(f"nearest must be 'largest' or 'smallest', got {nearest!r}")
    n = graph.shape[0]
    if graph.shape != (n, n):
        raise ValueError(f"a graph has as many rows as columns, got {graph.shape}")
    k = at_least("k", k, 1)
    counts = np.diff(graph.indptr)
    row = np.repeat(np.arange(n), counts)
    values = np.asarray(graph.data, np.float64) * (-1 if nearest == "largest" else 1)
    order = np.lexsort((graph.indices, values, row))
    place = np.arange(len(row)) - np.repeat(np.asarray(graph.indptr[:-1], np.int64), counts)
    kept = place < k
    table = np.full((n, k), -1, np.int64)
    table[row[kept], place[kept]] = graph.indices[order][kept]
    return table
