"""`CellDataset`: the cells of one sparse feature space."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from itertools import accumulate
from typing import TYPE_CHECKING, Self

import numpy as np

from hbx_gpu._buffers import POOL
from hbx_gpu._datasets.stored import Kind, StoredDataset
from hbx_gpu._plan.index import CompactIndex, compacted
from hbx_gpu._plan.rows import INDEX_ROLE, BatchPlan, SourceTable, needed_chunks, source_table
from hbx_gpu._source import RowIndex, RowTable, Source
from hbx_gpu.batch import SparseBatch
from hbx_gpu.errors import CorruptDataError, UnsupportedError
from hbx_gpu.loader_stats import stage

if TYPE_CHECKING:
    from hbx_gpu._engine.device import DeviceEngine
    from hbx_gpu._engine.device.backend import Backend
    from hbx_gpu._engine.host import HostEngine
    from hbx_gpu._storage.readers import Slab


_AT_ONCE = 1 << 20  # rows that are looked at together


class CellDataset(StoredDataset[RowTable, BatchPlan, SparseBatch]):
    """Map-style dataset over the cells of one sparse feature space.

    Made by :meth:`hbx_gpu.atlas.AtlasQuery.to_cell_dataset`. Rows are numbered in query order.

    Parameters
    ----------
    sources, rows, layer, n_features, feature_uids, obs, recipe, feature_space, reader
        As for :class:`~hbx_gpu._datasets.stored.StoredDataset`.

    Attributes
    ----------
    n_cells, n_features
        Shape of the whole dataset as one dense matrix.
    layer, layers
        Name of the first layer, and names of all layers.
    feature_uids
        (n_features,) object array. uid of the feature of each column.
    groups_np
        int32, (n_cells,). Number of the stored matrix of every row; samplers can keep its rows together.
    categories
        Vocabulary of every metadata column that batches carry as codes.
    dtype, dtypes
        dtype of batch values, and dtype of each layer; they are the same for all batches.

    Raises
    ------
    CorruptDataError
        A row points outside its arrays, or a layer is not as long as its index.
    UnsupportedError
        A Source is dense: :class:`~hbx_gpu._datasets.dense.DenseCellDataset` reads those.
    """

    kind: Kind = "sparse"
    _engine: HostEngine

    def _open(self) -> None:
        self._table = source_table(self._sources, self.layers, self.n_features)
        self._open_files(
            [
                layout
                for source in self._sources
                if source.index is not None
                for layout in (source.index, *(source.layers[name] for name in self.layers))
            ]
        )
        self._engine = self._new_engine()

    def _new_engine(self) -> HostEngine:
        from hbx_gpu._engine.host import HostEngine

        dtypes, keep = list(self.dtypes.values()), self._view.decoded_cache
        return HostEngine(self._table, self._directory, dtypes, POOL, keep=keep)

    def _dtype(self, layer: str) -> np.dtype:
        """Return the dtype of a layer in batches, which is float32 where batches become sparse tensors."""
        return np.dtype(np.float32) if self._view.wide else super()._dtype(layer)

    def _check(self, sources: Sequence[Source], rows: RowTable) -> None:
        for layer in self.layers:
            _check_rows(sources, rows, layer)

    def _kept(self, rows: RowTable) -> RowTable:
        return compacted(rows)

    def _some_rows(self, chosen: np.ndarray) -> RowTable:
        return compacted(self._rows.at(chosen))

    @staticmethod
    def _rows_of(arrays: dict[str, np.ndarray]) -> RowTable:
        return RowIndex(**arrays) if "source" in arrays else CompactIndex(**arrays)

    @property
    def table(self) -> SourceTable:
        """Vectors of the stored matrices, for planning."""
        return self._table

    def plan(self, selection: np.ndarray) -> BatchPlan:
        """See :meth:`StoredDataset.plan`."""
        from hbx_gpu._plan.rows_numba import plan_rows_numba

        return plan_rows_numba(self._table, self._rows, selection)

    def needed_chunks(self) -> np.ndarray:
        """See :meth:`StoredDataset.needed_chunks`."""
        return needed_chunks(self._table, self._rows)

    def column_limits(self) -> np.ndarray:
        """See :meth:`StoredDataset.column_limits`."""
        source, role = self._table.roles(np.arange(len(self._directory.layouts)))
        return np.where(role == INDEX_ROLE, self._table.remap_length[source], -1)

    def decode(self, plan: BatchPlan, slab: Slab, selections: Sequence[np.ndarray]) -> list[SparseBatch]:
        """See :meth:`StoredDataset.decode`."""
        with stage("decode") as decoding:
            rows = self._engine.canonical if self._view.wide else self._engine.csr
            indices, values, offsets = rows(plan, slab)
            decoding.nbytes = indices.nbytes + sum(layer.nbytes for layer in values)
        several = self.layers if len(self.layers) > 1 else ()
        result, row = [], 0
        for part, metadata in zip(selections, self._metadata(selections), strict=True):
            stop = row + len(part)
            first, last = offsets[row], offsets[stop]
            result.append(
                SparseBatch(
                    indices=indices[first:last],
                    values=values[0][first:last],
                    offsets=offsets[row : stop + 1] - first,
                    n_features=self.n_features,
                    metadata=metadata,
                    layers={k: v[first:last] for k, v in zip(several, values, strict=False)},
                    ascending=self._view.wide,
                )
            )
            row = stop
        return result

    def marked(self, batch: SparseBatch) -> SparseBatch:
        """See :meth:`Dataset.marked`."""
        return replace(batch, axes=self.axes())

    @property
    def row_lengths(self) -> np.ndarray:
        """Stored values of each cell, int32, (n_cells,), counted without reading; samplers sort by them."""
        return self._rows.length

    def rows_nbytes(self, selections: Sequence[np.ndarray]) -> list[int]:
        """See :meth:`Dataset.rows_nbytes`; columns that are dropped count."""
        selection = np.concatenate([*selections, np.empty(0, np.int64)])
        elements = np.concatenate([[0], np.cumsum(self._rows.at(selection).length, dtype=np.int64)])
        ends = list(accumulate(map(len, selections), initial=0))
        itemsize = (8 if self._view.wide else 4) + sum(dtype.itemsize for dtype in self.dtypes.values())
        found: list[int] = (np.diff(elements[ends]) * itemsize).tolist()
        return found

    def with_wide_columns(self) -> Self:
        """This dataset with batches that sparse tensors are made of without a copy.

        Their columns are int64, ascending and each once within a row; their values are float32, those of
        repeated columns summed.
        """
        other = self._showing(replace(self._view, wide=True))
        other._engine = other._new_engine()
        return other

    def device_engine(self, backend: Backend, *, decode: str = "auto") -> DeviceEngine:
        """An engine that decodes what :meth:`read` returns on a device."""
        from hbx_gpu._engine.device import DeviceEngine

        dtypes = list(self.dtypes.values())
        return DeviceEngine(self._table, self._directory, dtypes, backend, decode=decode)


def _check_rows(sources: Sequence[Source], rows: RowTable, layer: str) -> None:
    """Check that every segment lies inside the arrays of its Source, and that these agree in length."""
    lengths = np.empty(len(sources) + 1, dtype=np.int64)
    lengths[-1] = 0  # rows without the modality (source -1) hold nothing
    for i, source in enumerate(sources):
        if source.index is None:
            raise UnsupportedError(
                f"group {source.name!r} is not a sparse matrix; open it as a DenseCellDataset"
            )
        lengths[i] = source.index.shape[0]
        stored = source.layers[layer].shape[0]
        if stored != lengths[i]:
            raise CorruptDataError(
                f"group {source.name!r}: layer {layer!r} holds {stored} elements but the column indices "
                f"hold {lengths[i]}; the two must be parallel"
            )
    outermost = rows.outermost()
    if outermost.source.min(initial=-1) < -1 or outermost.source.max(initial=-1) >= len(sources):
        raise ValueError(f"row sources must lie in [-1, {len(sources)})")
    if not _outside(outermost, lengths).any():
        return
    for begin in range(0, len(rows), _AT_ONCE):
        part = rows.slice(begin, begin + _AT_ONCE)
        stop = part.start + part.length
        bad = _outside(part, lengths)
        if bad.any():
            i = int(np.flatnonzero(bad)[0])
            source = sources[part.source[i]]
            raise CorruptDataError(
                f"row {begin + i} points at elements [{part.start[i]}, {stop[i]}) of group {source.name!r}, "
                f"whose arrays hold {lengths[part.source[i]]}"
            )


def _outside(rows: RowIndex, lengths: np.ndarray) -> np.ndarray:
    """bool, (n,). Which rows reach beyond the arrays of their Source, of these lengths; the last is of -1."""
    stop = rows.start + rows.length
    found: np.ndarray = (rows.source >= 0) & (
        (rows.start < 0) | (rows.length < 0) | (stop > lengths[rows.source])
    )
    return found
