"""Queries of one obs table of one snapshot: which rows, which features, and in what form."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, NoReturn, Self, TypeAlias, Unpack, overload

import numpy as np
import pyarrow as pa

from hbx_gpu.atlas._query import obs, results
from hbx_gpu.atlas._query.ahead import rows_and_arrays
from hbx_gpu.atlas._query.matrices import to_pandas
from hbx_gpu.atlas._query.opening import default_layer
from hbx_gpu.atlas._query.recipe import QueryRecipe
from hbx_gpu.atlas._query.results import Modality
from hbx_gpu.atlas._query.selection import Selection
from hbx_gpu.atlas._query.state import FeatureJoin, QueryState, whole_number
from hbx_gpu.atlas._query.statistics import Options, highly_variable, statistics_of
from hbx_gpu.errors import UnknownNameError, UnsupportedError

if TYPE_CHECKING:
    import pandas as pd
    import polars
    from anndata import AnnData
    from mudata import MuData

    from hbx_gpu._datasets.dense import FeatureDataset
    from hbx_gpu._datasets.modality import Modality as Part
    from hbx_gpu._datasets.multimodal import MultimodalCellDataset
    from hbx_gpu.atlas._catalog.snapshot import PointerColumn, Snapshot
    from hbx_gpu.atlas._query.results import MultimodalResult
    from hbx_gpu.chromatin import Bins, Fragments, Peaks
    from hbx_gpu.chromatin._dataset import FragmentMatrixDataset
    from hbx_gpu.statistics import Statistics

DType: TypeAlias = str | type | np.dtype
"""A dtype, by name or as NumPy has it."""


class AtlasQuery:
    """Rows of an obs table, described step by step and read when a result is asked for.

    Every step changes the query and returns it; get a new query from the atlas for every other question. The
    order of steps does not matter. Conditions of several :meth:`where` calls must all hold; a second call of
    any other step replaces the first. Rows come in ascending row id of the pinned table.

    Parameters
    ----------
    snapshot
        The atlas at one version.
    table
        Obs table; optional where there is only one.
    state
        Steps of an earlier query that is built again.
    """

    def __init__(
        self, snapshot: Snapshot, table: str | None = None, *, state: QueryState | None = None
    ) -> None:
        self._selection = Selection.of(snapshot, table, state or QueryState())

    def __repr__(self) -> str:
        chosen = self._selection
        return (
            f"{type(self).__name__}(table={chosen.name!r}, version={chosen.snapshot.version}, {chosen.state})"
        )

    @property
    def selection(self) -> Selection:
        """The selection made by the steps so far."""
        return self._selection

    def _changed(self, **changes: object) -> Self:
        self._selection = self._selection.changed(**changes)
        return self

    # Steps

    def where(self, sql: str | None) -> Self:
        """Keep rows for which a SQL expression (DataFusion's dialect) holds.

        Called again, it keeps the rows for which all expressions hold. None drops earlier expressions. Any
        column may be named, also members of pointers: ``gene_expression.zarr_group = 'a'``. Put names with
        capitals or blanks in backticks.
        """
        before = self._selection.state.where
        if sql is None or before is None:
            return self._changed(where=sql)
        return self._changed(where=obs.both(before, sql))

    def select(self, columns: list[str] | None) -> Self:
        """Obs columns of tables and AnnData; all by default. A second call replaces the first.

        Raises
        ------
        ValueError
            Not a list, or a column that does not exist.
        """
        if columns is None:
            return self._changed(columns=None)
        if not isinstance(columns, list | tuple):
            raise ValueError(f"Columns must be a list, got {columns!r}")
        obs.check_columns(self._selection.schema, columns)
        return self._changed(columns=tuple(columns))

    def features(self, uids: Sequence[str] | str, feature_space: str) -> Self:
        """Read only these features of a space, as columns in the given order.

        A second call for the same space replaces the first. Results in memory, and a dataset of a single
        modality, are those of the spaces for which features were asked for, unless :meth:`feature_spaces` or
        :meth:`select_fields` says otherwise.

        Parameters
        ----------
        uids
            Feature uids, each once. Unknown uids raise when results are read. ``"hvg:2000"``: the 2,000 most
            variable features of all cells of the table, from its :meth:`statistics`.
        feature_space
            Name of the space, or of a pointer field.

        Raises
        ------
        ValueError
            An unknown space, a uid that is given twice, or a text that is not ``"hvg:"`` and a number.
        InvalidDataError
            The values are not counts, for ``"hvg:2000"``.
        """
        space = self._selection.fields.space_named(feature_space)
        if isinstance(uids, str):
            uids = highly_variable(self._selection, uids, space)
        panel = tuple(str(uid) for uid in uids)
        if len(set(panel)) != len(panel):
            seen: set[str] = set()
            twice = [uid for uid in panel if uid in seen or seen.add(uid)]  # type: ignore[func-returns-value]
            raise ValueError(f"every feature may be asked for once; repeated: {twice[:5]}")
        others = tuple(entry for entry in self._selection.state.panels if entry[0] != space)
        return self._changed(panels=(*others, (space, panel)))

    def feature_join(self, how: FeatureJoin) -> Self:
        """Columns of AnnData results: features measured by any group ("union") or by all ("intersection").

        A second call replaces the first.
        """
        if how not in ("union", "intersection"):
            raise ValueError(f"feature_join must be 'union' or 'intersection', got {how!r}")
        return self._changed(join=how)

    def search(self, *_: object, **__: object) -> NoReturn:
        """Not offered: full-text and vector searches go to LanceDB itself, whose answer :meth:`where` takes.

        Raises
        ------
        UnsupportedError
            Always; the message shows the two steps.
        """
        database = str(self._selection.snapshot.path / "lance_db")
        raise UnsupportedError(
            "queries of hbx_gpu have no search(); ask LanceDB for the cells, then query them: "
            f"table = lancedb.connect({database!r}).open_table({self._selection.name!r}); "
            "uids = table.search(...).limit(n).to_pandas()['uid']; "
            "query.where(f'uid IN ({str(list(uids))[1:-1]})')"
        )

    def limit(self, n: int | None) -> Self:
        """At most `n` rows after filtering; 0 gives none, None gives all. A second call replaces the first.

        Raises
        ------
        ValueError
            Negative, or combined with :meth:`balanced_limit`.
        """
        if n is not None and self._selection.state.balanced is not None:
            raise ValueError("limit() and balanced_limit() cannot be combined; use one of them")
        return self._changed(limit=None if n is None else whole_number(n, "limit"))

    def offset(self, n: int) -> Self:
        """Skip the first `n` matching rows. A second call replaces the first."""
        return self._changed(offset=whole_number(n, "offset"))

    def balanced_limit(self, n: int, column: str) -> Self:
        """Take `n` rows in which the values of a column are as equally frequent as the data allow.

        A second call replaces the first.

        Rows without a value are left out. The first rows of each value are taken. Where a value has too few
        rows, the others contribute more, so the total is `n` whenever that many rows exist. If `n` does not
        divide evenly, values that sort first get one more row.

        Raises
        ------
        ValueError
            Negative, an unknown column, or combined with :meth:`limit`.
        """
        if self._selection.state.limit is not None:
            raise ValueError("limit() and balanced_limit() cannot be combined; use one of them")
        obs.check_columns(self._selection.schema, [column])
        return self._changed(balanced=(whole_number(n, "balanced_limit"), column))

    def layers(self, feature_space: str, names: Sequence[str]) -> Self:
        """Choose the layers of a space for AnnData results: the first becomes ``X``, the others ``layers``.

        A second call for the same space replaces the first.
        """
        if isinstance(names, str) or not names:
            raise ValueError(f"layers() needs a list of at least one layer name, got {names!r}")
        space = self._selection.fields.space_named(feature_space)
        others = tuple(entry for entry in self._selection.state.layers if entry[0] != space)
        return self._changed(layers=(*others, (space, tuple(names))))

    def feature_spaces(self, *spaces: str) -> Self:
        """Consider only these feature spaces. A second call replaces the first.

        Raises
        ------
        ValueError
            A space that the table does not have.
        """
        have = {pointer.feature_space for pointer in self._selection.pointers.values()}
        if missing := sorted(set(spaces) - have):
            raise UnknownNameError(
                f"unknown feature space(s) {missing}; table {self._selection.name!r} has {sorted(have)}"
            )
        return self._changed(spaces=spaces)

    def select_fields(self, *fields: str) -> Self:
        """Consider only these pointer fields. A second call replaces the first.

        Raises
        ------
        ValueError
            A field that the table does not have.
        """
        have, table = self._selection.pointers, self._selection.name
        if missing := [name for name in fields if name not in have]:
            raise UnknownNameError(f"unknown pointer field(s) {missing}; table {table!r} has {sorted(have)}")
        return self._changed(fields=fields)

    # Results without measurements

    @overload
    def count(self, group_by: None = None) -> int: ...

    @overload
    def count(self, group_by: str | list[str]) -> pd.DataFrame: ...

    def count(self, group_by: str | list[str] | None = None) -> int | pd.DataFrame:
        """Number of rows; or the distinct values of columns and their ``count`` (int64), sorted by value.

        Parameters
        ----------
        group_by
            An obs column or several; None for all rows together.

        Raises
        ------
        ValueError
            A malformed filter or an unknown column.
        """
        rowids = self._selection.rowids()
        if group_by is not None:
            return results.grouped_count(
                self._selection, [group_by] if isinstance(group_by, str) else list(group_by), rowids
            )
        if rowids is not None:
            return len(rowids)
        with obs.explain_filter(self._selection.state.where):
            return int(self._selection.table.count_rows(self._selection.state.where))

    def to_arrow(self) -> pa.Table:
        """Obs rows as an Arrow table: the selected columns, or all of them, pointers included."""
        columns = self._selection.state.columns
        return self._selection.read_table(list(self._selection.schema.names if columns is None else columns))

    def to_pandas(self) -> pd.DataFrame:
        """Obs rows as a pandas frame, without pointer columns."""
        return to_pandas(self._selection.read_table(self._selection.plain_columns()))

    def to_polars(self) -> polars.DataFrame:
        """Obs rows as a polars frame, without pointer columns.

        Raises
        ------
        ImportError
            polars is not installed.
        """
        try:
            import polars
        except ImportError as error:
            raise ImportError(
                "to_polars() needs polars, which hbx_gpu does not install: pip install polars, "
                "or use to_pandas()"
            ) from error
        frame = polars.from_arrow(self._selection.read_table(self._selection.plain_columns()))
        assert isinstance(frame, polars.DataFrame)  # a table never becomes a Series
        return frame

    def statistics(self, by: str | None = None, **options: Unpack[Options]) -> Statistics:
        """Statistics of the features over the rows that the query selects, in one pass (docs/statistics.md).

        The result is kept in a local atlas, and read from there the next time.

        Parameters
        ----------
        by
            obs column; the result then also has ``groups``, the statistics of each of its values.
        **options
            `feature_space`, `layer` and `field_name` as in :meth:`to_cell_dataset`; `target_sum`, `medians`,
            `executor` and `progress` as in :func:`hbx_gpu.statistics.compute`; ``keep=False`` neither reads
            nor writes the file in the atlas.

        Returns
        -------
        Statistics
            One entry per feature: cells measured, nonzero cells, sum, mean, variance and median.

        Raises
        ------
        UnknownNameError
            A column, layer, feature space or field does not exist.
        UnsupportedError
            The modality has no features, or `by` has more than 10,000 values.
        ResourceError
            Groups times features take more memory than there is.
        """
        return statistics_of(self._selection, by, options)

    # Results with measurements

    @overload
    def to_cell_dataset(
        self,
        feature_space: str | None = None,
        layer: str | Sequence[str] | None = None,
        metadata_columns: list[str] | None = None,
        *,
        field_name: str | None = None,
        dtype: DType | Mapping[str, DType] | None = None,
        matrix: None = None,
    ) -> FeatureDataset: ...

    @overload
    def to_cell_dataset(
        self,
        feature_space: str | None = None,
        layer: str | Sequence[str] | None = None,
        metadata_columns: list[str] | None = None,
        *,
        field_name: str | None = None,
        dtype: DType | Mapping[str, DType] | None = None,
        matrix: Bins | Peaks,
    ) -> FragmentMatrixDataset: ...

    def to_cell_dataset(
        self,
        feature_space: str | None = None,
        layer: str | Sequence[str] | None = None,
        metadata_columns: list[str] | None = None,
        *,
        field_name: str | None = None,
        dtype: DType | Mapping[str, DType] | None = None,
        matrix: Bins | Peaks | None = None,
    ) -> FeatureDataset | FragmentMatrixDataset:
        """A map-style dataset over the rows that have a modality.

        Rows without it are left out before `limit` and `offset` count.

        Parameters
        ----------
        feature_space
            Name of the modality or of the pointer field; optional where there is one sparse field.
        layer
            Layer to read; by default the first required layer of the space. A list reads several at once,
            and a batch then holds them as ``layers``.
        metadata_columns
            Obs columns that batches carry.
        field_name
            Pointer field, where several have the same feature space.
        dtype
            Dtype of batches of dense spaces and images. By default the stored dtype, promoted as in NumPy
            where groups differ.
        matrix
            For fragments: :class:`~hbx_gpu.chromatin.Bins` or :class:`~hbx_gpu.chromatin.Peaks` to count them
            in when a batch is read; batches are then rows of that matrix.

        Raises
        ------
        ValueError
            Unknown or ambiguous names (the message lists what exists), a malformed filter.
        CorruptDataError
            A pointer outside its arrays.
        """
        pointer = self._selection.fields.one(feature_space, field_name)
        self._selection.check_panels([pointer])
        dataset = self._dataset(pointer, layer, metadata_columns, dtype, matrix=matrix)
        self._selection.warn_if_empty(dataset)
        return dataset

    def to_multimodal_dataset(
        self,
        feature_spaces: Sequence[str] | None = None,
        layers: Mapping[str, str | Sequence[str]] | None = None,
        metadata_columns: list[str] | None = None,
        *,
        field_names: Sequence[str] | None = None,
        dtypes: Mapping[str, DType | Mapping[str, DType]] | None = None,
        matrices: Mapping[str, Bins | Peaks] | None = None,
    ) -> MultimodalCellDataset:
        """A map-style dataset over all rows, with several modalities of each row.

        A row that lacks a modality has zeros there, and ``present`` False.

        Parameters
        ----------
        feature_spaces
            Names of modalities or of pointer fields; by default all that the query considers. Batches use
            the same names.
        layers
            Modality -> layer or list of layers to read; other modalities use the first required layer of
            their space.
        metadata_columns
            Obs columns that batches carry.
        field_names
            Pointer fields, instead of `feature_spaces`.
        dtypes, matrices
            Modality -> `dtype` and `matrix`, as in :meth:`to_cell_dataset`.

        Raises
        ------
        ValueError
            Unknown, ambiguous or repeated names, a malformed filter.
        CorruptDataError
            A pointer outside its arrays.
        """
        from hbx_gpu._datasets.multimodal import MultimodalCellDataset

        pointers = self._selection.fields.several(feature_spaces, field_names)
        self._selection.check_panels(list(pointers.values()))
        for what, given in (("layers", layers), ("dtypes", dtypes), ("matrices", matrices)):
            if strangers := sorted(set(given or ()) - set(pointers)):
                raise UnknownNameError(
                    f"{what} were given for {strangers}, but the dataset reads {list(pointers)}"
                )
        datasets: dict[str, Part] = {}
        for name, pointer in pointers.items():
            # Read labels once, because every part has the same rows.
            columns = metadata_columns if not datasets else None
            layer, dtype = (layers or {}).get(name), (dtypes or {}).get(name)
            matrix = (matrices or {}).get(name)
            datasets[name] = self._dataset(pointer, layer, columns, dtype, matrix=matrix, absent=True)
        dataset = MultimodalCellDataset(datasets)
        self._selection.warn_if_empty(dataset)
        return dataset

    def _dataset(
        self,
        pointer: PointerColumn,
        layer: str | Sequence[str] | None,
        metadata_columns: list[str] | None,
        dtype: DType | Mapping[str, DType] | None = None,
        *,
        matrix: Bins | Peaks | None = None,
        absent: bool = False,
    ) -> FeatureDataset | FragmentMatrixDataset:
        chosen = self._selection
        names = chosen.metadata(metadata_columns)
        layers = _layer_names(layer)
        if matrix is not None:
            layers = results.fragment_layers(pointer, layers)
        found, opened = rows_and_arrays(chosen, pointer, names, layers, absent=absent)
        if layers is None:
            layers = (default_layer(chosen.snapshot, pointer.feature_space, found.groups),)
        dtypes = (
            {} if dtype is None else dtype if isinstance(dtype, Mapping) else dict.fromkeys(layers, dtype)
        )
        named = tuple((name, np.dtype(wanted).name) for name, wanted in dtypes.items())
        columns = None if metadata_columns is None else names
        recipe = QueryRecipe.of(chosen, pointer, layers, columns, dtypes=named, absent=absent)
        dataset = recipe.dataset(chosen, found, opened)
        if matrix is None:
            return dataset
        from hbx_gpu._datasets.cells import CellDataset
        from hbx_gpu.chromatin import FragmentMatrixDataset

        assert isinstance(dataset, CellDataset)  # fragments are sparse
        registry = chosen.snapshot.registry(pointer.feature_space).frame
        return FragmentMatrixDataset.registered(dataset, matrix, registry)

    def to_modality_obs(self, feature_space: str | None = None, *, field_name: str | None = None) -> pa.Table:
        """Obs rows that have a modality, without pointers, in the order of :meth:`to_cell_dataset`."""
        found = self._selection.read_rows(self._selection.fields.one(feature_space, field_name), [])
        return obs.read_table(self._selection.table, self._selection.plain_columns(), rowids=found.rowids)

    def to_anndata(self) -> AnnData:
        """Everything in memory as AnnData: the rows that have the modality, in query order.

        The modality is the only one of the table, or the one that :meth:`feature_spaces`,
        :meth:`select_fields` or :meth:`features` leaves. ``X`` has the stored dtype, and is CSR for sparse
        spaces.

        Raises
        ------
        ValueError
            Several modalities to choose from, or features of another one.
        TypeError
            The modality holds images or fragments, which are not rows of a matrix.
        """
        matrices = self._selection.matrices(self._selection.fields.matrix())
        return matrices.cut(0, len(matrices))

    def to_batches(self, batch_size: int = 1024) -> Iterator[AnnData]:
        """As :meth:`to_anndata`, `batch_size` rows at a time; all pieces have the same columns.

        Raises
        ------
        ValueError
            `batch_size` is not positive.
        """
        if whole_number(batch_size, "batch_size") == 0:
            raise ValueError("batch_size must be positive")
        return self._selection.matrices(self._selection.fields.matrix()).pieces(batch_size)

    def to_array(self, field: str, layer: str | None = None) -> np.ndarray | list[np.ndarray]:
        """A dense modality in memory: the rows that have it, in query order, in the stored dtype.

        :meth:`to_modality_obs` returns the obs of these rows.

        Parameters
        ----------
        field
            Name of the modality or of the pointer field.
        layer
            Layer to read; by default the first required layer of the space.

        Returns
        -------
        ndarray or list of ndarray
            (n, n_features) for spaces with features; (n, C, H, W) for tiles; a list of arrays for boxes,
            encoded images, and tiles of differing shape.

        Raises
        ------
        TypeError
            A sparse modality.
        """
        from hbx_gpu._datasets.dense import DenseCellDataset

        dataset = self.to_cell_dataset(field, layer)
        if not isinstance(dataset, DenseCellDataset):
            raise TypeError(
                f"{field!r} is sparse: to_anndata() gives matrices, to_fragments() fragments, and "
                "to_cell_dataset() rows"
            )
        return dataset[:].data

    def to_fragments(self, field: str = "chromatin_accessibility") -> Fragments:
        """Fragments of the rows that have them, in query order.

        Parameters
        ----------
        field
            Name of the modality or of the pointer field.

        Raises
        ------
        TypeError
            A modality without fragments.
        """
        pointer = self._selection.fields.one(field, None)
        return results.read_fragments(Modality.of(self._selection, pointer))

    def to_multimodal(self) -> MultimodalResult:
        """All modalities in memory, as AnnData, fragments or arrays depending on their kind.

        :meth:`feature_spaces` and :meth:`select_fields` restrict which modalities these are; without them,
        :meth:`features` does.
        """
        pointers = self._selection.fields.in_memory()
        return results.read_multimodal([Modality.of(self._selection, p, absent=True) for p in pointers])

    def to_mudata(self) -> MuData:
        """The matrices among the modalities as MuData; others are left out, with a warning.

        Raises
        ------
        ImportError
            mudata is not installed.
        """
        return self.to_multimodal().to_mudata()


def _layer_names(layer: str | Sequence[str] | None) -> tuple[str, ...] | None:
    if layer is None or isinstance(layer, str):
        return None if layer is None else (layer,)
    names = tuple(dict.fromkeys(layer))
    if not names:
        raise ValueError("choose at least one layer, or none at all for the default")
    return names
