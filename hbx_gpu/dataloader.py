"""Datasets, collates and `make_loader`: the names a training script imports.

Importing this module pulls in NumPy and the reading rooms only: it is what a spawned worker imports.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np

from hbx_gpu import dataset_state
from hbx_gpu.batch import DenseBatch, MultimodalBatch, SparseBatch
from hbx_gpu.buffers import POOL
from hbx_gpu.collates import (
    DenseCollate,
    dense_to_tensor_collate,
    multimodal_to_dense_collate,
    sparse_to_csr_collate,
    sparse_to_dense_collate,
)
from hbx_gpu.errors import CorruptDataError, UnsupportedError
from hbx_gpu.loading import make_loader
from hbx_gpu.plan import BatchPlan, SourceTable, plan_rows, source_table
from hbx_gpu.source import ObsColumns, RowIndex, Source
from hbx_gpu.stats import stage

if TYPE_CHECKING:
    from hbx_gpu.engine.device import DeviceEngine
    from hbx_gpu.engine.device.backend import Backend
    from hbx_gpu.engine.host import HostEngine
    from hbx_gpu.storage.chunks import ChunkDirectory
    from hbx_gpu.storage.readers import Reader, Slab

__all__ = [
    "CellDataset",
    "DenseBatch",
    "DenseCollate",
    "MultimodalBatch",
    "MultimodalCellDataset",
    "SparseBatch",
    "dense_to_tensor_collate",
    "make_loader",
    "multimodal_to_dense_collate",
    "sparse_to_csr_collate",
    "sparse_to_dense_collate",
]


class Recipe(Protocol):
    """What a dataset was made from; small, picklable, and enough to make it again."""

    def rebuild(self) -> CellDataset: ...


class CellDataset:
    """Map-style dataset over the cells of one sparse feature space.

    Made by :meth:`hbx_gpu.atlas.AtlasQuery.to_cell_dataset`. Rows are numbered in query order.

    Parameters
    ----------
    sources
        The stored matrices; `rows.source` counts in them.
    rows
        Where each row lies.
    layer
        Name of the layer that becomes `values`.
    n_features
        Width of the dense matrix.
    feature_uids
        (n_features,) uid of every output column.
    obs
        Metadata columns of the rows and their vocabularies.
    recipe
        How to make this dataset again in a process that cannot map its arrays; None: pickles whole.
    feature_space
        Name of the feature space.
    reader
        ``"mmap"`` or ``"preadv"``: how compressed bytes are read.

    Attributes
    ----------
    n_cells, n_features
        Shape of the whole as one dense matrix.
    feature_uids
        (n_features,) object array: which column is which.
    groups_np
        int32, (n_cells,). Stored matrix of every row; what samplers keep together.
    categories
        Vocabulary of every metadata column that batches carry as codes.
    dtype
        dtype of batch values: one for the whole dataset.

    Raises
    ------
    CorruptDataError
        A row points outside its arrays, or a layer is not as long as its index.
    UnsupportedError
        A Source is dense.
    """

    def __init__(
        self,
        sources: Sequence[Source],
        rows: RowIndex,
        *,
        layer: str,
        n_features: int,
        feature_uids: np.ndarray,
        obs: ObsColumns | None = None,
        recipe: Recipe | None = None,
        feature_space: str = "",
        reader: str = "mmap",
    ) -> None:
        _check_rows(sources, rows, layer)
        self._sources = list(sources)
        self._rows = rows
        self._obs = obs or ObsColumns()
        self._recipe = recipe
        self._reader_kind = reader
        self.layer = layer
        self.feature_space = feature_space
        self.n_features = int(n_features)
        self.feature_uids = feature_uids
        self._spill: str | None = None
        self._open()

    def _open(self) -> None:
        """Open what does not travel: chunk tables, files and the engine."""
        from hbx_gpu.engine.host import HostEngine
        from hbx_gpu.storage.chunks import ChunkDirectory
        from hbx_gpu.storage.readers import open_reader

        table = source_table(self._sources, [self.layer], self.n_features)
        layouts = [
            layout
            for source in self._sources
            if source.index is not None
            for layout in (source.index, source.layers[self.layer])
        ]
        dtypes = {source.layers[self.layer].dtype for source in self._sources}
        self.dtype = np.result_type(*dtypes) if dtypes else np.dtype(np.float32)
        self._table = table
        self._directory: ChunkDirectory = ChunkDirectory(layouts)
        self._reader: Reader = open_reader(self._reader_kind, self._directory)
        self._engine: HostEngine = HostEngine(table, self._directory, [self.dtype], POOL)

    @property
    def n_cells(self) -> int:
        return len(self._rows)

    @property
    def groups_np(self) -> np.ndarray:
        return self._rows.source

    @property
    def row_index(self) -> RowIndex:
        """Where every row lies: 16 bytes per row."""
        return self._rows

    @property
    def sources(self) -> list[Source]:
        """The stored matrices; `groups_np` counts in them."""
        return self._sources

    @property
    def reader_kind(self) -> str:
        """``"mmap"`` or ``"preadv"``: how compressed bytes are read."""
        return self._reader_kind

    @property
    def table(self) -> SourceTable:
        """Vectors of the stored matrices, for planning."""
        return self._table

    @property
    def n_groups(self) -> int:
        return len(self._sources)

    @property
    def present(self) -> np.ndarray:
        """bool, (n_cells,). Which rows have this modality; all, unless it is part of a multimodal dataset."""
        return self._rows.source >= 0

    @property
    def categories(self) -> dict[str, np.ndarray]:
        return self._obs.categories

    @property
    def columns(self) -> dict[str, np.ndarray]:
        """The requested metadata of all rows: numbers as stored, codes where `categories` has the name."""
        return self._obs.columns

    def __len__(self) -> int:
        return self.n_cells

    def __repr__(self) -> str:
        return (
            f"CellDataset({self.n_cells:,} cells x {self.n_features:,} features of "
            f"{self.feature_space or 'one space'}, layer {self.layer!r} ({self.dtype}), "
            f"{len(self._sources)} groups)"
        )

    def __getitem__(self, rows: int | slice | Sequence[int] | np.ndarray) -> SparseBatch:
        """A batch of the rows asked for; one row number gives a batch of one row."""
        if isinstance(rows, slice):
            rows = np.arange(self.n_cells)[rows]
        elif isinstance(rows, int | np.integer):
            rows = [int(rows)]
        return self.__getitems__(rows)

    def __getitems__(self, rows: Sequence[int] | np.ndarray) -> SparseBatch:
        """One batch of `rows`, in the order asked; negative and repeated numbers are fine.

        Raises
        ------
        IndexError
            A row number is outside ``[-n_cells, n_cells)``.
        CorruptChunkError
            A chunk that holds one of the rows cannot be decoded.
        """
        return self.read_batches([rows])[0]

    def read_batches(self, batches: Sequence[Sequence[int] | np.ndarray]) -> list[SparseBatch]:
        """Several batches under one plan: a chunk that many of them need is read and decoded once.

        Parameters
        ----------
        batches
            Row numbers of each batch.

        Returns
        -------
        list of SparseBatch
            Their arrays are views of one allocation.
        """
        selections = [self.row_numbers(rows) for rows in batches]
        selection = np.concatenate([*selections, np.empty(0, np.int64)])
        plan, slab = self.read(selection)
        with stage("decode") as decoding:
            indices, (values,), offsets = self._engine.csr(plan, slab)
            decoding.nbytes = indices.nbytes + values.nbytes
        metadata = {name: column[selection] for name, column in self._obs.columns.items()}
        result, row = [], 0
        for part in selections:
            stop = row + len(part)
            first, last = offsets[row], offsets[stop]
            result.append(
                SparseBatch(
                    indices=indices[first:last],
                    values=values[first:last],
                    offsets=offsets[row : stop + 1] - first,
                    n_features=self.n_features,
                    metadata={k: v[row:stop] for k, v in metadata.items()} or None,
                )
            )
            row = stop
        return result

    def read(self, selection: np.ndarray, reader: Reader | None = None) -> tuple[BatchPlan, Slab]:
        """Plan of the rows `selection`, and the stored bytes of the chunks it needs.

        Parameters
        ----------
        selection
            int64, (n,), as from :meth:`row_numbers`.
        reader
            Instead of the dataset's own; from :meth:`open_reader`.
        """
        with stage("plan"):
            plan = plan_rows(self._table, self._rows, selection)
            extents = self._directory.extents(plan.chunks)
        with stage("read") as reading:
            slab = (reader or self._reader).read(extents)
            reading.nbytes = int(slab.nbytes[slab.nbytes > 0].sum())
        return plan, slab

    def reading_with(self, reader: Reader) -> CellDataset:
        """This dataset with another reader of its chunks; everything else is shared."""
        other: CellDataset = object.__new__(type(self))
        other.__dict__.update(self.__dict__, _reader=reader)
        return other

    def open_reader(self, kind: str) -> Reader:
        """A reader of this dataset's chunks: ``"mmap"``, ``"preadv"`` or ``"pinned"``."""
        from hbx_gpu.storage.readers import open_reader

        return open_reader(kind, self._directory)

    def device_engine(self, backend: Backend) -> DeviceEngine:
        """An engine that decodes what :meth:`read` returns on a device."""
        from hbx_gpu.engine.device import DeviceEngine

        return DeviceEngine(self._table, self._directory, [self.dtype], backend)

    def batch_nbytes(self, rows: Sequence[int] | np.ndarray) -> int:
        """Bytes of one batch of `rows`, metadata aside; twice its arrays while columns are dropped."""
        elements = int(self._rows.length[self.row_numbers(rows)].sum(dtype=np.int64))
        return elements * (4 + self.dtype.itemsize) * (2 if self._table.drops else 1)

    def row_numbers(self, rows: Sequence[int] | np.ndarray) -> np.ndarray:
        """Row numbers as int64 in ``[0, n_cells)``."""
        rows = np.asarray(rows)
        if rows.ndim != 1:
            raise IndexError(f"row numbers must be one-dimensional, got shape {rows.shape}")
        if rows.size == 0:
            return np.empty(0, np.int64)
        if rows.dtype == bool:
            if len(rows) != self.n_cells:
                raise IndexError(f"a boolean mask needs {self.n_cells} entries, got {len(rows)}")
            return np.flatnonzero(rows)
        if rows.dtype.kind not in "iu":
            raise IndexError(f"row numbers must be integers, got {rows.dtype}")
        rows = rows.astype(np.int64, copy=False)
        low, high = rows.min(), rows.max()
        if low < -self.n_cells or high >= self.n_cells:
            bad = low if low < -self.n_cells else high
            raise IndexError(f"row {bad} is out of range for a dataset of {self.n_cells} cells")
        return np.where(rows < 0, rows + self.n_cells, rows) if low < 0 else rows

    def close(self) -> None:
        """Close the files; the dataset opens them again when it is read again."""
        self._reader.close()

    # -- crossing to another process ---------------------------------------------------------------

    def __getstate__(self) -> dict[str, Any]:
        if self._recipe is None:
            return {"whole": self._state(), "rows": self._rows, "obs": self._obs.columns}
        if self._spill is None:
            arrays = {"source": self._rows.source, "start": self._rows.start, "length": self._rows.length}
            plain = {k: v for k, v in self._obs.columns.items() if v.dtype != object}
            arrays |= {f"column-{i}": column for i, column in enumerate(plain.values())}
            objects = {k: v for k, v in self._obs.columns.items() if v.dtype == object}
            try:
                self._spill = dataset_state.spill(self, arrays, (self._state(), list(plain), objects))
            except OSError:  # no room: the receiver runs the query again
                return {"recipe": self._recipe, "spill": None}
        return {"recipe": self._recipe, "spill": self._spill}

    def _state(self) -> dict[str, Any]:
        return {
            "_sources": self._sources,
            "_recipe": self._recipe,
            "_reader_kind": self._reader_kind,
            "categories": self._obs.categories,
            "layer": self.layer,
            "feature_space": self.feature_space,
            "n_features": self.n_features,
            "feature_uids": self.feature_uids,
        }

    def __setstate__(self, state: dict[str, Any]) -> None:
        if "whole" in state:
            self._restore(state["whole"], state["rows"], state["obs"])
            return
        try:
            if state["spill"] is None:
                raise FileNotFoundError
            arrays, (fields, names, columns) = dataset_state.unspill(state["spill"])
        except FileNotFoundError:
            self.__dict__.update(state["recipe"].rebuild().__dict__)
            return
        rows = RowIndex(arrays["source"], arrays["start"], arrays["length"])
        columns |= {name: arrays[f"column-{i}"] for i, name in enumerate(names)}
        self._restore(fields, rows, columns)
        self._spill = state["spill"]

    def _restore(self, fields: dict[str, Any], rows: RowIndex, columns: dict[str, np.ndarray]) -> None:
        fields = dict(fields)
        self._rows = rows
        self._obs = ObsColumns(columns, fields.pop("categories"))
        self._spill = None
        self.__dict__.update(fields)
        self._open()


class MultimodalCellDataset:
    """Several feature spaces of the same cells; a cell without a modality has an empty row there.

    Parameters
    ----------
    datasets
        One dataset per field over the same rows, absent ones included (their source is -1). Metadata is
        taken from the first.

    Attributes
    ----------
    n_cells
        Rows of the query, whatever they have measured.
    n_features
        Width per field.
    groups_np
        int32, (n_cells,). Stored matrix of every row in the first field; rows that lack it form one group
        more.
    """

    def __init__(self, datasets: Mapping[str, CellDataset]) -> None:
        if not datasets:
            raise ValueError("a multimodal dataset needs at least one feature space")
        self.datasets = dict(datasets)
        sizes = {name: len(dataset) for name, dataset in self.datasets.items()}
        if len(set(sizes.values())) > 1:
            raise ValueError(f"all fields must number the same rows, got {sizes}")
        self._first = next(iter(self.datasets.values()))

    @property
    def n_cells(self) -> int:
        return len(self._first)

    @property
    def n_features(self) -> dict[str, int]:
        return {name: dataset.n_features for name, dataset in self.datasets.items()}

    @property
    def groups_np(self) -> np.ndarray:
        groups = self._first.groups_np
        return np.where(groups < 0, self._first.n_groups, groups).astype(np.int32)

    @property
    def categories(self) -> dict[str, np.ndarray]:
        return self._first.categories

    def __len__(self) -> int:
        return self.n_cells

    def __getitem__(self, rows: int | slice | Sequence[int] | np.ndarray) -> MultimodalBatch:
        if isinstance(rows, slice):
            rows = np.arange(self.n_cells)[rows]
        elif isinstance(rows, int | np.integer):
            rows = [int(rows)]
        return self.__getitems__(rows)

    def __getitems__(self, rows: Sequence[int] | np.ndarray) -> MultimodalBatch:
        """One batch of `rows`, in the order asked, every modality with a row for every cell."""
        selection = self._first.row_numbers(rows)
        batches = {name: dataset.__getitems__(selection) for name, dataset in self.datasets.items()}
        metadata = batches[next(iter(batches))].metadata
        for batch in batches.values():
            batch.metadata = None
        return MultimodalBatch(
            modalities=dict(batches),
            present={name: dataset.present[selection] for name, dataset in self.datasets.items()},
            metadata=metadata,
            n_cells=len(selection),
        )


def _check_rows(sources: Sequence[Source], rows: RowIndex, layer: str) -> None:
    """Every segment lies inside its Source's arrays, and these agree in length."""
    lengths = np.empty(len(sources) + 1, dtype=np.int64)
    lengths[-1] = 0  # rows without the modality (source -1) hold nothing
    for i, source in enumerate(sources):
        if source.index is None:
            raise UnsupportedError(
                f"group {source.name!r} is a dense matrix; this release reads sparse feature spaces only"
            )
        lengths[i] = source.index.shape[0]
        stored = source.layers[layer].shape[0]
        if stored != lengths[i]:
            raise CorruptDataError(
                f"group {source.name!r}: layer {layer!r} holds {stored} elements but the column indices "
                f"hold {lengths[i]}; the two must be parallel"
            )
    if not len(rows):
        return
    if rows.source.min() < -1 or rows.source.max() >= len(sources):
        raise ValueError(f"row sources must lie in [-1, {len(sources)})")
    stop = rows.start + rows.length
    bad = (rows.source >= 0) & ((rows.start < 0) | (rows.length < 0) | (stop > lengths[rows.source]))
    if bad.any():
        i = int(np.flatnonzero(bad)[0])
        source = sources[rows.source[i]]
        raise CorruptDataError(
            f"row {i} points at elements [{rows.start[i]}, {stop[i]}) of group {source.name!r}, "
            f"whose arrays hold {lengths[rows.source[i]]}"
        )
