"""Cells with a neighbor beside each: the second batch of contrastive training, on the host or a device."""

from __future__ import annotations

import os
import zlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Self

import numpy as np

from hbx_gpu._datasets.base import Dataset
from hbx_gpu._datasets.cells import CellDataset
from hbx_gpu._protocols import AnyCollate, AnyFeed, Collating, Rows, TensorBatch
from hbx_gpu.batch import SparseBatch
from hbx_gpu.errors import InvalidDataError, UnsupportedError
from hbx_gpu.scdl._format.features import VariableFeatureIndex, var_folder
from hbx_gpu.scdl._format.neighbors import NeighborSamplingStrategy, NeighborTable, open_neighbors

if TYPE_CHECKING:
    from hbx_gpu._storage.readers import Reader

KEYS = ("neighbor_X", "neighbor_index", "neighbor_weight")
"""Keys of the neighbors in a batch dict."""


@dataclass(slots=True)
class PairBatch:
    """Rows, each with one neighbor.

    Attributes
    ----------
    cells, neighbors
        Batches of n rows; row i of `neighbors` is the neighbor drawn for row i of `cells`.
    neighbor_index
        int64, (n,). Row number of each neighbor; that of the cell itself where it has none.
    neighbor_weight
        float32, (n,). Stored weights of the links; 0 where a cell stands in for its neighbor.
    """

    cells: SparseBatch
    neighbors: SparseBatch
    neighbor_index: np.ndarray
    neighbor_weight: np.ndarray

    @property
    def metadata(self) -> dict[str, np.ndarray] | None:
        """Metadata of the cells."""
        return self.cells.metadata

    @metadata.setter
    def metadata(self, metadata: dict[str, np.ndarray] | None) -> None:
        self.cells.metadata = metadata

    def __len__(self) -> int:
        return len(self.cells)


class PairedDataset(Dataset[PairBatch]):
    """The cells of a dataset, a drawn neighbor beside each.

    Which neighbors a batch has follows from the seed and from the batch's rows alone: not from workers,
    read-ahead or what was drawn before, so a resumed epoch draws the same ones.

    Parameters
    ----------
    cells
        Rows of archives, in their order.
    archives
        The archives, for their stored neighbors.
    strategy
        ``random``, ``first`` or ``weighted``; see
        :class:`~hbx_gpu.scdl._format.neighbors.NeighborSamplingStrategy`.
    seed
        Seed of the draws.

    Raises
    ------
    InvalidDataError
        None of the archives stores neighbors.
    ValueError
        Unknown strategy.
    """

    def __init__(
        self,
        cells: CellDataset,
        archives: Sequence[str | os.PathLike[str]],
        *,
        strategy: str = NeighborSamplingStrategy.RANDOM,
        seed: int = 0,
    ) -> None:
        self.cells, self.seed = cells, seed
        self.strategy = NeighborSamplingStrategy.parse(strategy)
        self._archives = [Path(path) for path in archives]
        self._open()

    def _open(self) -> None:
        groups = self.cells.groups_np
        self._tables: list[NeighborTable | None] = []
        first = [0]
        for path in self._archives:
            n = VariableFeatureIndex.load(var_folder(path)).number_of_rows()
            first.append(first[-1] + n)
            self._tables.append(open_neighbors(path, n))
        self._first = np.array(first, np.int64)
        if first[-1] != len(groups):
            raise InvalidDataError(
                f"the archives have {first[-1]} rows, the dataset {len(groups)}: neighbors need all of them"
            )
        if not any(table is not None for table in self._tables):
            raise InvalidDataError(
                f"no neighbors are stored in {', '.join(map(str, self._archives))}; convert the source "
                "again with load_neighbors=True and its neighbor_key"
            )

    @property
    def n_features(self) -> int:
        return self.cells.n_features

    @property
    def feature_uids(self) -> np.ndarray:
        return self.cells.feature_uids

    @property
    def groups_np(self) -> np.ndarray:
        return self.cells.groups_np

    @property
    def n_groups(self) -> int:
        return self.cells.n_groups

    @property
    def columns(self) -> dict[str, np.ndarray]:
        return self.cells.columns

    @property
    def categories(self) -> dict[str, np.ndarray]:
        return self.cells.categories

    @property
    def reader_kind(self) -> str:
        return self.cells.reader_kind

    def __len__(self) -> int:
        return len(self.cells)

    def __getstate__(self) -> dict[str, object]:
        names = ("cells", "seed", "strategy", "_archives")
        return {name: self.__dict__[name] for name in names}

    def __setstate__(self, state: dict[str, object]) -> None:
        self.__dict__.update(state)
        self._open()

    def draw(self, rows: Sequence[int] | np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """The neighbors of a batch.

        Returns
        -------
        neighbor_index, neighbor_weight
            As in :class:`PairBatch`.

        Raises
        ------
        NeighborsUnusableError, InvalidDataError
            As :meth:`NeighborTable.links`.
        """
        return self._draw(self.cells.row_numbers(rows))

    def _draw(self, rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        rng = np.random.default_rng([self.seed, zlib.crc32(rows.tobytes())])
        uniform = rng.random(len(rows))
        index, weight = rows.copy(), np.zeros(len(rows), np.float32)
        archive = np.searchsorted(self._first, rows, "right") - 1
        for k in np.unique(archive):
            table = self._tables[k]
            if table is None:
                continue
            mine = np.flatnonzero(archive == k)
            links = table.links(rows[mine] - self._first[k], uniform[mine], self.strategy)
            mine, links = mine[links >= 0], links[links >= 0]
            index[mine] = table.indices[links].astype(np.int64) + self._first[k]
            weight[mine] = table.weights[links]
        return index, weight

    def read_rows(self, selections: Sequence[np.ndarray]) -> list[PairBatch]:
        """See :meth:`CellDataset.read_rows`."""
        drawn = [self._draw(rows) for rows in selections]
        both = [part for rows, (index, _) in zip(selections, drawn, strict=True) for part in (rows, index)]
        read = self.cells.read_rows(both)
        for batch in read[1::2]:
            batch.metadata = None
        return [
            PairBatch(cells, neighbors, *found)
            for cells, neighbors, found in zip(read[::2], read[1::2], drawn, strict=True)
        ]

    def rows_nbytes(self, selections: Sequence[np.ndarray]) -> list[int]:
        """See :meth:`CellDataset.rows_nbytes`; neighbors are taken to be as large as their cells."""
        return [2 * nbytes for nbytes in self.cells.rows_nbytes(selections)]

    def measured_masks(self, groups: np.ndarray) -> np.ndarray:
        """See :meth:`CellDataset.measured_masks`."""
        return self.cells.measured_masks(groups)

    def with_columns(self, columns: Mapping[str, np.ndarray]) -> Self:
        """See :meth:`CellDataset.with_columns`; columns of the cells, not of their neighbors."""
        return self._derived(cells=self.cells.with_columns(columns))

    def with_row_numbers(self) -> Self:
        """See :meth:`CellDataset.with_row_numbers`."""
        return self._derived(cells=self.cells.with_row_numbers())

    def with_wide_columns(self) -> Self:
        """See :meth:`CellDataset.with_wide_columns`."""
        return self._derived(cells=self.cells.with_wide_columns())

    def identity(self) -> dict[str, object]:
        """See :meth:`CellDataset.identity`."""
        return self.cells.identity()

    def reading_with(self, reader: Reader) -> Self:
        """See :meth:`CellDataset.reading_with`."""
        return self._derived(cells=self.cells.reading_with(reader))

    def open_reader(self, kind: str) -> Reader:
        """See :meth:`CellDataset.open_reader`."""
        return self.cells.open_reader(kind)

    def needed_chunks(self) -> np.ndarray:
        """See :meth:`CellDataset.needed_chunks`."""
        return self.cells.needed_chunks()

    def collate_with(self, collate: AnyCollate) -> PairCollate:
        """A collate for batches of pairs from one for batches of cells; what `make_loader` uses."""
        return PairCollate(collate)

    def feed_with(self, make: Callable[[CellDataset], AnyFeed]) -> PairFeed:
        """A feed of pairs from one of cells; what `make_loader` uses on a device."""
        return PairFeed(make(self.cells), self)


@dataclass(frozen=True, slots=True)
class PairCollate(Collating):
    """Batches of pairs to dicts: what `collate` makes of the cells, and beside it `KEYS`."""

    collate: AnyCollate

    @property
    def sparse(self) -> bool:
        return self.collate.sparse

    def set_epoch(self, epoch: int) -> None:
        """See :class:`~hbx_gpu._protocols.Collate`."""
        self.collate.set_epoch(epoch)

    def __call__(self, batch: PairBatch) -> TensorBatch:
        """See :class:`PairCollate`.

        Raises
        ------
        ValueError
            A metadata column has the name of one of `KEYS`.
        """
        import torch

        _check_names(batch.metadata or ())
        return {
            **self.collate(batch.cells),
            "neighbor_X": self.collate(batch.neighbors)["X"],
            "neighbor_index": torch.from_numpy(batch.neighbor_index),
            "neighbor_weight": torch.from_numpy(batch.neighbor_weight),
        }

    def nbytes(self, n_rows: int, n_features: int, /) -> int:
        """Bytes of both matrices, as far as the inner collate can tell."""
        return 2 * self.collate.nbytes(n_rows, n_features)


class PairFeed:
    """A device feed of pairs: a batch and its neighbors are two batches of one window of the inner feed."""

    def __init__(self, feed: AnyFeed, dataset: PairedDataset) -> None:
        if feed.one_batch_per_window:
            raise UnsupportedError(
                "neighbors on a device need batches whose columns are all kept; use layout='dense', or all "
                "features"
            )
        _check_names(dataset.cells.columns)
        self._feed, self._dataset = feed, dataset
        self.one_batch_per_window = False

    def checked(self, batches: Sequence[Rows]) -> list[np.ndarray]:
        """See :class:`~hbx_gpu._protocols.Feed`."""
        return self._feed.checked(batches)

    def make(self, selections: Sequence[np.ndarray]) -> list[tuple[object, object, np.ndarray]]:
        """See :class:`~hbx_gpu._protocols.Feed`."""
        drawn = [self._dataset._draw(rows) for rows in selections]
        both = [part for rows, (index, _) in zip(selections, drawn, strict=True) for part in (rows, index)]
        made = self._feed.make(both)
        return list(zip(made[::2], made[1::2], [weight for _, weight in drawn], strict=True))

    def deliver(self, made: tuple[object, object, np.ndarray]) -> TensorBatch:
        """See :class:`~hbx_gpu._protocols.Feed`."""
        import torch

        cells, neighbors, weight = made
        batch: TensorBatch = self._feed.deliver(cells)
        others: TensorBatch = self._feed.deliver(neighbors)
        weights = torch.from_numpy(weight).to(batch["X"].device)
        return batch | dict(zip(KEYS, (others["X"], others["index"], weights), strict=True))

    def nbytes(self, selections: Sequence[np.ndarray]) -> list[int]:
        """See :class:`~hbx_gpu._protocols.Feed`."""
        return [2 * nbytes for nbytes in self._feed.nbytes(selections)]

    def set_epoch(self, epoch: int) -> None:
        """See :class:`~hbx_gpu._protocols.Feed`."""
        self._feed.set_epoch(epoch)


def _check_names(columns: Iterable[str]) -> None:
    if taken := sorted(set(columns) & set(KEYS)):
        raise ValueError(
            f"metadata column {taken[0]!r} would be overwritten by what batches hold of the neighbors; "
            "leave it out of metadata_columns"
        )
