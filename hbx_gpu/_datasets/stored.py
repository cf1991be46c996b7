"""`StoredDataset`: the base of datasets whose cells lie in stored groups, and what their batches carry."""

from __future__ import annotations

import operator
from abc import abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import accumulate, pairwise
from typing import TYPE_CHECKING, Any, Generic, Literal, Protocol, Self, TypeAlias, TypeVar

import numpy as np

from hbx_gpu._datasets.base import BatchT, Dataset, digest_of_axes
from hbx_gpu._datasets.state import Spill, unspill
from hbx_gpu._datasets.subsets import SubsetRecipe, Versioned, digest_of_rows
from hbx_gpu._protocols import Rows
from hbx_gpu._source import ArrayLayout, BoxIndex, GroupRuns, ObsColumns, RowTable, Source
from hbx_gpu._tensors import check_columns, gathered
from hbx_gpu.errors import UnknownNameError
from hbx_gpu.loader_stats import stage

if TYPE_CHECKING:
    from hbx_gpu._storage.chunks import ChunkDirectory
    from hbx_gpu._storage.readers import Reader, Slab

Kind = Literal["sparse", "matrix", "arrays"]
"""Kind of a dataset's rows: sparse, rows of a dense matrix, or arrays without columns."""


class Planned(Protocol):
    """The part of any plan that readers use."""

    @property
    def chunks(self) -> np.ndarray:
        """int64. Global numbers of the chunks that are needed."""

    @property
    def share(self) -> float:
        """Part of these chunks that decoding looks at, 0 to 1."""


IndexT = TypeVar("IndexT", bound=RowTable | BoxIndex)
PlanT = TypeVar("PlanT", bound=Planned)


class Recipe(Protocol):
    """How to make a dataset again; small and picklable."""

    def rebuild(self) -> AnyStored:
        """Make the dataset again, with the same rows, layers and metadata."""


@dataclass(frozen=True, slots=True)
class View:
    """The choice of what batches of a dataset carry; every pickle of the dataset holds it.

    Attributes
    ----------
    layers
        Layers that are read; the first becomes the values of a batch.
    metadata
        Whether batches carry the dataset's metadata columns.
    more
        Metadata columns beside those.
    numbered
        Whether batches carry row numbers, as metadata column ``index``.
    wide
        Whether rows of sparse batches are in the form of CSR tensors: ascending int64 columns, float32
        values.
    decoded_cache
        Bytes of decoded chunks that are kept for later batches; None for a number that follows from the data
        and the free memory.
    """

    layers: tuple[str, ...]
    metadata: bool = True
    more: Mapping[str, np.ndarray] = field(default_factory=dict)
    numbered: bool = False
    wide: bool = False
    decoded_cache: int | None = None


class StoredDataset(Dataset[BatchT], Generic[IndexT, PlanT, BatchT]):
    """Map-style dataset over the cells of one feature space, as stored in groups.

    Parameters
    ----------
    sources
        The stored arrays; `rows.source` counts in them.
    rows
        Where each row lies.
    layer
        Name of the layer to read, or names of several layers to read together.
    n_features
        Width of the dense matrix.
    feature_uids
        (n_features,) uid of every output column.
    obs
        Metadata columns of the rows and their vocabularies.
    recipe
        How to make this dataset again in a process that cannot map its arrays. None: pickles hold the arrays.
    feature_space
        Name of the feature space.
    reader
        ``"mmap"`` or ``"preadv"``: how compressed bytes are read.
    """

    kind: Kind
    per_cell_shape: tuple[int, ...] | None = None
    _identity: dict[str, object] | None = None
    _axes: tuple[tuple[object, ...], str] | None = None
    _directory: ChunkDirectory
    _reader: Reader

    def __init__(
        self,
        sources: Sequence[Source],
        rows: IndexT,
        *,
        layer: str | Sequence[str],
        n_features: int,
        feature_uids: np.ndarray,
        obs: ObsColumns | None = None,
        recipe: Recipe | None = None,
        feature_space: str = "",
        reader: str = "mmap",
    ) -> None:
        self._view = View((layer,) if isinstance(layer, str) else tuple(layer))
        self._check(sources, rows)
        self._sources = list(sources)
        self._rows: IndexT = self._kept(rows)
        self._obs = obs or ObsColumns()
        self._recipe = recipe
        self._reader_kind = reader
        self.feature_space = feature_space
        self._n_features = int(n_features)
        self.feature_uids = feature_uids
        self._spill = Spill()
        self._open()

    @abstractmethod
    def _open(self) -> None:
        """Open what a pickle does not hold: the chunk directory, files and the engine."""

    @abstractmethod
    def _check(self, sources: Sequence[Source], rows: IndexT) -> None:
        """Check that every row lies inside the arrays of its Source."""

    def _kept(self, rows: IndexT) -> IndexT:
        """The index in the form in which it is kept."""
        return rows

    @abstractmethod
    def _some_rows(self, chosen: np.ndarray) -> IndexT:
        """The index of some rows, int64."""

    @staticmethod
    @abstractmethod
    def _rows_of(arrays: dict[str, np.ndarray]) -> IndexT:
        """The index that consists of these arrays."""

    @abstractmethod
    def plan(self, selection: np.ndarray) -> PlanT:
        """Plan the rows `selection`: the chunks of :attr:`directory` they need, and where each piece goes."""

    @abstractmethod
    def needed_chunks(self) -> np.ndarray:
        """Return the chunks that any row needs, int64, in an order whose beginning serves whole rows."""

    def column_limits(self) -> np.ndarray:
        """What every column number of an array of the directory is less than.

        Returns
        -------
        ndarray
            int64, (n_arrays,); -1 for arrays whose elements are not column numbers.
        """
        return np.full(len(self._directory.layouts), -1, np.int64)

    @abstractmethod
    def decode(self, plan: PlanT, slab: Slab, selections: Sequence[np.ndarray]) -> list[BatchT]:
        """Decode the batches of a plan.

        Parameters
        ----------
        plan, slab
            From :meth:`read`, for all rows of `selections`.
        selections
            int64. Row numbers of each batch, for their metadata.
        """

    def _open_files(self, layouts: Sequence[ArrayLayout]) -> None:
        from hbx_gpu._storage.chunks import ChunkDirectory

        self._directory = ChunkDirectory(list(layouts))
        self._reader = self.open_reader(self._reader_kind)

    @property
    def n_features(self) -> int:
        return self._n_features

    @property
    def layers(self) -> tuple[str, ...]:
        """Names of the layers that are read."""
        return self._view.layers

    @property
    def layer(self) -> str:
        """Name of the first layer."""
        return self.layers[0]

    @property
    def dtypes(self) -> dict[str, np.dtype]:
        """dtype of each layer in batches: one for the whole dataset."""
        return {name: self._dtype(name) for name in self.layers}

    @property
    def dtype(self) -> np.dtype:
        """dtype of batch values."""
        return self.dtypes[self.layer]

    def _dtype(self, layer: str) -> np.dtype:
        return common_dtype(self._sources, layer)

    @property
    def groups_np(self) -> np.ndarray:
        """Number of the stored matrix of every row, int32, (n_cells,); samplers may keep these together.

        The array is made at each call. :attr:`group_runs` says the same in less memory.
        """
        return self._rows.source

    @property
    def group_runs(self) -> GroupRuns:
        """Number of the stored matrix of every row, as runs of equal numbers; samplers take it too."""
        return self._rows.groups()

    def groups_of(self, rows: np.ndarray) -> np.ndarray:
        """Number of the stored matrix of some rows, int32."""
        return self._rows.at(rows).source

    @property
    def row_index(self) -> IndexT:
        """Index that says where every row lies."""
        return self._rows

    @property
    def sources(self) -> list[Source]:
        """The stored matrices; `groups_np` holds positions in this list."""
        return self._sources

    @property
    def reader_kind(self) -> str:
        """``"mmap"`` or ``"preadv"``: how compressed bytes are read."""
        return self._reader_kind

    @property
    def n_groups(self) -> int:
        """Number of stored matrices."""
        return len(self._sources)

    @property
    def present(self) -> np.ndarray:
        """bool, (n_cells,). Which rows have this modality; all, unless it is part of a multimodal dataset."""
        return self._rows.source >= 0

    @property
    def categories(self) -> dict[str, np.ndarray]:
        """Vocabulary of every metadata column that batches carry as codes."""
        return self._obs.categories if self._view.metadata else {}

    @property
    def columns(self) -> dict[str, np.ndarray]:
        """The requested metadata of all rows: numbers as stored, codes where `categories` has the name."""
        return {**(self._obs.columns if self._view.metadata else {}), **self._view.more}

    @property
    def directory(self) -> ChunkDirectory:
        """Directory of the chunks of all Sources."""
        return self._directory

    def __len__(self) -> int:
        return len(self._rows)

    def __repr__(self) -> str:
        return (
            f"{type(self).__name__}({self.n_cells:,} cells x {self._shape()} of "
            f"{self.feature_space or 'one space'}, layer {self.layer!r} ({self.dtype}), "
            f"{len(self._sources)} groups)"
        )

    def _shape(self) -> str:
        return f"{self.n_features:,} features"

    def read_rows(self, selections: Sequence[np.ndarray]) -> list[BatchT]:
        """Several batches under one plan, of row numbers that :meth:`checked` has returned."""
        plan, slab = self.read(joined(selections))
        return self.decode(plan, slab, selections)

    def read(self, selection: np.ndarray, reader: Reader | None = None) -> tuple[PlanT, Slab]:
        """Plan the rows `selection`, and read the stored bytes of the chunks that the plan needs.

        Parameters
        ----------
        selection
            int64, (n,). Row numbers, from :meth:`row_numbers`.
        reader
            Reader to use instead of the dataset's own; from :meth:`open_reader`.
        """
        with stage("plan"):
            plan = self.plan(selection)
            extents = self._directory.extents(plan.chunks, plan.share)
        with stage("read") as reading:
            slab = (reader or self._reader).read(extents)
            reading.nbytes = int(slab.nbytes.sum(where=slab.nbytes > 0))
        return plan, slab

    def _metadata(self, selections: Sequence[np.ndarray]) -> list[dict[str, np.ndarray] | None]:
        """Metadata of each of several batches."""
        rows = joined(selections)
        whole = gathered(self.columns, self.categories, rows)
        if self._view.numbered:
            whole["index"] = rows
        if len(selections) == 1:
            return [whole or None]
        ends = accumulate(map(len, selections), initial=0)
        return [{name: x[a:b] for name, x in whole.items()} or None for a, b in pairwise(ends)]

    def with_layers(self, *names: str) -> Self:
        """This dataset reading only some of its layers, in the order given.

        Raises
        ------
        UnknownNameError
            The dataset does not read one of these layers.
        """
        if unknown := [name for name in names if name not in self.layers]:
            raise UnknownNameError(f"no layer {unknown} here; this dataset reads {list(self.layers)}")
        other = self._showing(replace(self._view, layers=names))
        other._open()
        return other

    def subset(self, rows: Rows) -> Self:
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
        narrow = chosen.astype(np.int32) if len(self._rows) < 2**31 else chosen
        more = {name: column[chosen] for name, column in self._view.more.items()}
        return self._derived(
            _rows=self._some_rows(chosen),
            _obs=ObsColumns({k: v[chosen] for k, v in self._obs.columns.items()}, self._obs.categories),
            _recipe=None if self._recipe is None else SubsetRecipe(self._recipe, narrow),
            _view=replace(self._view, more=more),
            _spill=Spill(),
            _identity=None,
        )

    def identity(self) -> dict[str, object]:
        """Which rows these are: ``cells``, ``rows`` (a digest) and ``snapshot`` (None outside an atlas).

        The digest follows from the stored matrices and the place of each row in them. It does not change
        with the columns or layers that are read, nor when matrices are compressed anew.
        """
        if self._identity is None:
            rows = digest_of_rows(self._sources, self._rows)
            snapshot = self._recipe.version if isinstance(self._recipe, Versioned) else None
            self._identity = {"cells": len(self._rows), "rows": rows, "snapshot": snapshot}
        return dict(self._identity)

    def with_columns(self, columns: Mapping[str, np.ndarray]) -> Self:
        """This dataset with more metadata columns; everything else is shared."""
        return self._showing(replace(self._view, more={**self._view.more, **columns}))

    def without_metadata(self) -> Self:
        """This dataset with batches that carry no metadata; everything else is shared."""
        return self._showing(replace(self._view, metadata=False, more={}, numbered=False))

    def with_row_numbers(self) -> Self:
        """This dataset with row numbers as metadata column ``index`` of its batches.

        Raises
        ------
        ValueError
            A metadata column has a name that means something else in a batch.
        """
        check_columns([*self.columns, "index"])
        return self._showing(replace(self._view, numbered=True))

    def with_decoded_cache(self, nbytes: int | None) -> Self:
        """This dataset with another bound on the decoded chunks that are kept in memory for later batches.

        It matters where chunks decode whole only, as those of zstd, gzip and lzf do: a random row of a chunk
        that is kept costs a copy. Chunks of atlases written by hbx_gpu and uncompressed ones are never kept,
        because their rows are read alone.

        Parameters
        ----------
        nbytes
            Bytes of host memory in each process that reads; 0 keeps nothing. None (the default of a dataset):
            as many as all chunks take, but at most an eighth of the memory that is free when the dataset is
            opened, and at least 64 MiB. Worker processes share that eighth.

        Raises
        ------
        ValueError
            `nbytes` is negative.
        """
        if nbytes is not None and (nbytes := operator.index(nbytes)) < 0:
            raise ValueError(f"a cache of decoded chunks has 0 bytes or more, got {nbytes}")
        other = self._showing(replace(self._view, decoded_cache=nbytes))
        other._open()
        return other

    def _showing(self, view: View) -> Self:
        return self._derived(_view=view)

    def axes(self) -> str:
        """Digest of features, layers and vocabularies: what columns and codes of batches mean."""
        parts = (self.layers, self.feature_uids, self._obs.categories, self._view.metadata)
        if self._axes is None or any(a is not b for a, b in zip(self._axes[0], parts, strict=True)):
            digest = digest_of_axes(self.feature_uids, self.layers, self.categories, self.per_cell_shape)
            self._axes = parts, digest
        return self._axes[1]

    def measured_masks(self, groups: np.ndarray) -> np.ndarray:
        """bool, (len(groups), n_features). Which columns a stored matrix has; none for group -1."""
        masks = np.zeros((len(groups), self.n_features), dtype=bool)
        for mask, group in zip(masks, groups.tolist(), strict=True):
            if group >= 0:
                remap = self._sources[group].remap
                mask[remap[remap >= 0]] = True
        return masks

    def reading_with(self, reader: Reader) -> Self:
        """This dataset with another reader of its chunks; everything else is shared."""
        return self._derived(_reader=reader)

    def open_reader(self, kind: str) -> Reader:
        """A reader of this dataset's chunks: ``"mmap"``, ``"preadv"`` or ``"pinned"``."""
        from hbx_gpu._storage.choice import open_reader

        return open_reader(kind, self._directory)

    def close(self) -> None:
        """Close the files; the dataset opens them again when it is read again."""
        self._reader.close()

    # -- pickling ----------------------------------------------------------------------------------

    def __getstate__(self) -> dict[str, object]:
        if self._recipe is None:
            return {"view": self._view, "whole": self._state(), "rows": self._rows, "obs": self._obs.columns}
        columns = self._obs.columns
        plain = {k: v for k, v in columns.items() if v.dtype != object}
        objects = {k: v for k, v in columns.items() if v.dtype == object}
        arrays = self._rows.arrays()
        arrays |= {f"column-{i}": column for i, column in enumerate(plain.values())}
        # The folder is None where the disk has no room: the receiver then uses the recipe.
        folder = self._spill.write(arrays, lambda: (self._state(), list(columns), list(plain), objects))
        return {"view": self._view, "recipe": self._recipe, "spill": folder}

    def _state(self) -> dict[str, object]:
        """Return what a pickle holds besides rows, columns and view."""
        return {
            "_sources": self._sources,
            "_recipe": self._recipe,
            "_reader_kind": self._reader_kind,
            "categories": self._obs.categories,
            "feature_space": self.feature_space,
            "_n_features": self._n_features,
            "feature_uids": self.feature_uids,
        }

    def __setstate__(self, state: dict[str, Any]) -> None:
        self._view = state["view"]
        if "whole" in state:
            self._restore(state["whole"], state["rows"], state["obs"], Spill())
            return
        try:
            if state["spill"] is None:
                raise FileNotFoundError
            arrays, (fields, names, plain, columns) = unspill(state["spill"])
        except FileNotFoundError:
            # The recipe makes the original dataset; the view holds the changes made to it afterwards.
            self.__dict__.update(state["recipe"].rebuild().__dict__, _view=self._view)
            self._open()
            return
        rows = self._rows_of({k: v for k, v in arrays.items() if not k.startswith("column-")})
        columns |= {name: arrays[f"column-{i}"] for i, name in enumerate(plain)}
        self._restore(fields, rows, {name: columns[name] for name in names}, Spill(state["spill"]))

    def _restore(
        self, fields: Mapping[str, Any], rows: IndexT, columns: dict[str, np.ndarray], spill: Spill
    ) -> None:
        fields = dict(fields)
        self._rows = rows
        self._obs = ObsColumns(columns, fields.pop("categories"))
        self._spill = spill
        self.__dict__.update(fields)
        self._open()


AnyStored: TypeAlias = StoredDataset[Any, Any, Any]
"""A stored dataset of any rows."""


def joined(selections: Sequence[np.ndarray]) -> np.ndarray:
    """The row numbers of several batches end to end, in an array of their own."""
    if len(selections) == 1:
        return selections[0].copy()
    return np.concatenate([*selections, np.empty(0, np.int64)])


def common_dtype(sources: Sequence[Source], layer: str) -> np.dtype:
    """Return the dtype that NumPy promotes a layer of all Sources to; float32 without Sources."""
    dtypes = {source.layers[layer].dtype for source in sources}
    return np.result_type(*dtypes) if dtypes else np.dtype(np.float32)
