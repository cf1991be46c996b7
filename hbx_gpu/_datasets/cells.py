"""`CellDataset`: the cells of one sparse feature space, and what all datasets have in common."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import accumulate, pairwise
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np

from hbx_gpu._buffers import POOL
from hbx_gpu._datasets import state as dataset_state
from hbx_gpu._datasets.subsets import StoredRows
from hbx_gpu._plan.rows import BatchPlan, SourceTable, needed_chunks, plan_rows, source_table
from hbx_gpu._source import ObsColumns, RowIndex, Source
from hbx_gpu.batch import SparseBatch
from hbx_gpu.errors import CorruptDataError, UnknownNameError, UnsupportedError
from hbx_gpu.stats import stage

if TYPE_CHECKING:
    from hbx_gpu._engine.device import DeviceEngine
    from hbx_gpu._engine.device.backend import Backend
    from hbx_gpu._engine.host import HostEngine
    from hbx_gpu._storage.chunks import ChunkDirectory
    from hbx_gpu._storage.readers import Reader, Slab


class Recipe(Protocol):
    """What a dataset was made from; small, picklable, and enough to make it again."""

    def rebuild(self) -> CellDataset: ...


class CellDataset(StoredRows):
    """Map-style dataset over the cells of one sparse feature space.

    Made by :meth:`hbx_gpu.atlas.AtlasQuery.to_cell_dataset`. Rows are numbered in query order.

    Parameters
    ----------
    sources
        The stored matrices; `rows.source` counts in them.
    rows
        Where each row lies.
    layer
        Name of the layer that becomes `values`; or several, read at once, of which the first does.
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
    layer, layers
        Name of the first layer; of all.
    feature_uids
        (n_features,) object array: which column is which.
    groups_np
        int32, (n_cells,). Stored matrix of every row; what samplers keep together.
    categories
        Vocabulary of every metadata column that batches carry as codes.
    dtype, dtypes
        dtype of batch values, and of all layers: one for the whole dataset.

    Raises
    ------
    CorruptDataError
        A row points outside its arrays, or a layer is not as long as its index.
    UnsupportedError
        A Source is dense: :class:`~hbx_gpu._datasets.dense.DenseCellDataset` reads those.
    """

    per_cell_shape: tuple[int, ...] | None = None
    _index_type: type[Any] = RowIndex
    _wide = False

    def __init__(
        self,
        sources: Sequence[Source],
        rows: RowIndex,
        *,
        layer: str | Sequence[str],
        n_features: int,
        feature_uids: np.ndarray,
        obs: ObsColumns | None = None,
        recipe: Recipe | None = None,
        feature_space: str = "",
        reader: str = "mmap",
    ) -> None:
        self.layers = (layer,) if isinstance(layer, str) else tuple(layer)
        self._check(sources, rows)
        self._sources = list(sources)
        self._rows = rows
        self._obs = obs or ObsColumns()
        self._recipe = recipe
        self._reader_kind = reader
        self.feature_space = feature_space
        self.n_features = int(n_features)
        self.feature_uids = feature_uids
        self._spill: str | None = None
        self._open()

    def _open(self) -> None:
        """Open what does not travel: chunk tables, files and the engine."""
        from hbx_gpu._engine.host import HostEngine
        from hbx_gpu._storage.choice import open_reader
        from hbx_gpu._storage.chunks import ChunkDirectory

        table = source_table(self._sources, self.layers, self.n_features)
        layouts = [
            layout
            for source in self._sources
            if source.index is not None
            for layout in (source.index, *(source.layers[name] for name in self.layers))
        ]
        self.dtypes = self._dtypes()
        self._table = table
        self._directory: ChunkDirectory = ChunkDirectory(layouts)
        self._reader: Reader = open_reader(self._reader_kind, self._directory)
        self._engine: HostEngine = HostEngine(table, self._directory, list(self.dtypes.values()), POOL)

    def _dtypes(self) -> dict[str, np.dtype[Any]]:
        """dtype of each layer in batches: float32 for sparse tensors."""
        stored = {name: common_dtype(self._sources, name) for name in self.layers}
        return dict.fromkeys(stored, np.dtype(np.float32)) if self._wide else stored

    def _check(self, sources: Sequence[Source], rows: RowIndex) -> None:
        for layer in self.layers:
            _check_rows(sources, rows, layer)

    @property
    def layer(self) -> str:
        return self.layers[0]

    @property
    def dtype(self) -> np.dtype[Any]:
        return self.dtypes[self.layer]

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
        return self.__getitems__(several_rows(self.n_cells, rows))

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
        selection, selections = row_numbers_of(self, batches)
        plan, slab = self.read(selection)
        return self.decode(plan, slab, selections)

    def decode(self, plan: BatchPlan, slab: Slab, selections: Sequence[np.ndarray]) -> list[SparseBatch]:
        """The batches that a plan is for.

        Parameters
        ----------
        plan, slab
            From :meth:`read`, of all rows of `selections`.
        selections
            int64. Row numbers of each batch, for their metadata.
        """
        with stage("decode") as decoding:
            rows = self._engine.canonical if self._wide else self._engine.csr
            indices, values, offsets = rows(plan, slab)
            decoding.nbytes = indices.nbytes + sum(layer.nbytes for layer in values)
        selection = np.concatenate([*selections, np.empty(0, np.int64)])
        metadata = {name: column[selection] for name, column in self._obs.columns.items()}
        several = self.layers if len(self.layers) > 1 else ()
        result, row = [], 0
        for part in selections:
            stop = row + len(part)
            first, last = offsets[row], offsets[stop]
            result.append(
                SparseBatch(
                    indices=indices[first:last],
                    values=values[0][first:last],
                    offsets=offsets[row : stop + 1] - first,
                    n_features=self.n_features,
                    metadata={k: v[row:stop] for k, v in metadata.items()} or None,
                    layers={k: v[first:last] for k, v in zip(several, values, strict=False)},
                    ascending=self._wide,
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
            plan = self.plan(selection)
            extents = self._directory.extents(plan.chunks)
        with stage("read") as reading:
            slab = (reader or self._reader).read(extents)
            reading.nbytes = int(slab.nbytes[slab.nbytes > 0].sum())
        return plan, slab

    def plan(self, selection: np.ndarray) -> BatchPlan:
        """Which chunks the rows `selection` need, by number in :attr:`directory`, and what goes where."""
        return plan_rows(self._table, self._rows, selection)

    def needed_chunks(self) -> np.ndarray:
        """int64. Chunks that any row needs, in an order whose beginning serves whole rows."""
        return needed_chunks(self._table, self._rows)

    @property
    def directory(self) -> ChunkDirectory:
        """Where the chunks lie."""
        return self._directory

    def with_layers(self, *names: str) -> CellDataset:
        """This dataset reading only some of its layers, in the order given.

        Raises
        ------
        UnknownNameError
            It does not read one of them.
        """
        if unknown := [name for name in names if name not in self.layers]:
            raise UnknownNameError(f"no layer {unknown} here; this dataset reads {list(self.layers)}")
        other: CellDataset = object.__new__(type(self))
        other.__dict__.update(self.__dict__, layers=names, _spill=None, _recipe=None)
        other._open()
        return other

    def with_columns(self, columns: Mapping[str, np.ndarray]) -> CellDataset:
        """This dataset with more metadata columns; everything else is shared."""
        other: CellDataset = object.__new__(type(self))
        obs = ObsColumns({**self._obs.columns, **columns}, self._obs.categories)
        other.__dict__.update(self.__dict__, _obs=obs, _recipe=None, _spill=None)
        return other

    def without_metadata(self) -> CellDataset:
        """This dataset without obs columns; everything else is shared."""
        other: CellDataset = object.__new__(type(self))
        other.__dict__.update(self.__dict__, _obs=ObsColumns(), _spill=None)
        return other

    def with_wide_columns(self) -> CellDataset:
        """This dataset with batches that sparse tensors are made of without a copy.

        Their columns are int64, ascending and each once within a row; their values are float32, those of
        repeated columns summed.
        """
        from hbx_gpu._engine.host import HostEngine

        other: CellDataset = object.__new__(type(self))
        other.__dict__.update(self.__dict__, _wide=True, _spill=None)
        other.dtypes = other._dtypes()
        other._engine = HostEngine(self._table, self._directory, list(other.dtypes.values()), POOL)
        return other

    def measured_masks(self, groups: np.ndarray) -> np.ndarray:
        """bool, (len(groups), n_features). Which columns a stored matrix has; none for group -1."""
        masks = np.zeros((len(groups), self.n_features), dtype=bool)
        for mask, group in zip(masks, groups.tolist(), strict=True):
            if group >= 0:
                remap = self._sources[group].remap
                mask[remap[remap >= 0]] = True
        return masks

    def reading_with(self, reader: Reader) -> CellDataset:
        """This dataset with another reader of its chunks; everything else is shared."""
        other: CellDataset = object.__new__(type(self))
        other.__dict__.update(self.__dict__, _reader=reader)
        return other

    def open_reader(self, kind: str) -> Reader:
        """A reader of this dataset's chunks: ``"mmap"``, ``"preadv"`` or ``"pinned"``."""
        from hbx_gpu._storage.choice import open_reader

        return open_reader(kind, self._directory)

    def device_engine(self, backend: Backend, *, decode: str = "auto") -> DeviceEngine:
        """An engine that decodes what :meth:`read` returns on a device."""
        from hbx_gpu._engine.device import DeviceEngine

        dtypes = list(self.dtypes.values())
        return DeviceEngine(self._table, self._directory, dtypes, backend, decode=decode)

    def batch_nbytes(self, rows: Sequence[int] | np.ndarray) -> int:
        """Bytes of one batch of `rows`, metadata aside; columns that are dropped count."""
        return self.batches_nbytes([rows])[0]

    def batches_nbytes(self, batches: Sequence[Sequence[int] | np.ndarray]) -> list[int]:
        """:meth:`batch_nbytes` of each of several batches."""
        selection, selections = row_numbers_of(self, batches)
        elements = np.concatenate([[0], np.cumsum(self._rows.length[selection], dtype=np.int64)])
        ends = list(accumulate(map(len, selections), initial=0))
        itemsize = (8 if self._wide else 4) + sum(dtype.itemsize for dtype in self.dtypes.values())
        found: list[int] = (np.diff(elements[ends]) * itemsize).tolist()
        return found

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
            arrays = {name: getattr(self._rows, name) for name in self._rows.__slots__}
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
            "_wide": self._wide,
            "categories": self._obs.categories,
            "layers": self.layers,
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
        rows = self._index_type(**{name: arrays[name] for name in self._index_type.__slots__})
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


def several_rows(n_cells: int, rows: int | slice | Sequence[int] | np.ndarray) -> Sequence[int] | np.ndarray:
    """What ``dataset[rows]`` asks for, as row numbers of a batch."""
    if isinstance(rows, slice):
        return np.arange(n_cells)[rows]
    # One number in any coat: an int, a NumPy integer, an array or tensor without axes.
    if isinstance(rows, int) or np.ndim(rows) == 0:
        return np.atleast_1d(np.asarray(rows))
    return rows


def row_numbers_of(
    dataset: Any, batches: Sequence[Sequence[int] | np.ndarray]
) -> tuple[np.ndarray, list[np.ndarray]]:
    """Row numbers of several batches end to end, as :meth:`CellDataset.row_numbers`, and those of each."""
    if not all(isinstance(rows, np.ndarray) and rows.dtype == np.int64 for rows in batches):
        batches = [dataset.row_numbers(rows) for rows in batches]
    whole: np.ndarray = dataset.row_numbers(np.concatenate([*batches, np.empty(0, np.int64)]))
    ends = accumulate(map(len, batches), initial=0)
    return whole, [whole[first:last] for first, last in pairwise(ends)]


def common_dtype(sources: Sequence[Source], layer: str) -> np.dtype[Any]:
    """One dtype that holds a layer of all Sources, as NumPy promotes; float32 where there are none."""
    dtypes = {source.layers[layer].dtype for source in sources}
    return np.result_type(*dtypes) if dtypes else np.dtype(np.float32)


def _check_rows(sources: Sequence[Source], rows: RowIndex, layer: str) -> None:
    """Every segment lies inside its Source's arrays, and these agree in length."""
    lengths = np.empty(len(sources) + 1, dtype=np.int64)
    lengths[-1] = 0  # rows without the modality (source -1) hold nothing
    for i, source in enumerate(sources):
        if source.index is None:
            raise UnsupportedError(
                f"group {source.name!r} is no sparse matrix; open it as a DenseCellDataset"
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
