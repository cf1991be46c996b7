"""Questions to one obs table of one snapshot: which rows, which features, and in what form they come."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa

from hbx_gpu.atlas._query import obs as obs_room
from hbx_gpu.atlas._query import opening as reading
from hbx_gpu.atlas._query import results
from hbx_gpu.atlas._query.matrices import Matrices, measured, obs_frame, to_pandas
from hbx_gpu.atlas._query.recipe import QueryRecipe
from hbx_gpu.atlas._query.state import QueryState
from hbx_gpu.atlas._query.steps import QuerySteps, whole
from hbx_gpu.errors import UnknownNameError

if TYPE_CHECKING:
    import pandas as pd
    from anndata import AnnData
    from mudata import MuData

    from hbx_gpu._datasets.cells import CellDataset
    from hbx_gpu._datasets.multimodal import MultimodalCellDataset
    from hbx_gpu.atlas._catalogue.snapshot import PointerField
    from hbx_gpu.atlas._query.results import MultimodalResult
    from hbx_gpu.chromatin import Bins, Fragments, Peaks

__all__ = ["AtlasQuery", "QueryRecipe", "QueryState"]


class AtlasQuery(QuerySteps):
    """Rows of an obs table, described step by step and read when a result is asked for."""

    # Results without measurements

    def count(self, group_by: str | list[str] | None = None) -> int | pd.DataFrame:
        """Number of rows, or a frame of the distinct values of columns and their ``count``, sorted by value.

        Raises
        ------
        ValueError
            A malformed filter or an unknown column.
        """
        rowids = self._rowids()
        if group_by is not None:
            return self._grouped_count([group_by] if isinstance(group_by, str) else list(group_by), rowids)
        if rowids is not None:
            return len(rowids)
        with obs_room.explain_filter(self._state.where):
            return int(self._table.count_rows(self._state.where))

    def _grouped_count(self, columns: list[str], rowids: np.ndarray | None) -> pd.DataFrame:
        obs_room.check_columns(self._schema, columns)
        partial = []
        for batch in self._scan(columns, rowids):
            plain = {name: obs_room.plain(batch.column(name)) for name in columns}
            grouped = pa.table(plain).group_by(columns).aggregate([([], "count_all")])
            partial.append(grouped.select([*columns, "count_all"]))
        if not partial:
            empty = obs_room.read_table(self._table, columns, rowids=np.empty(0, np.uint64))
            return empty.append_column("count", pa.array([], pa.int64())).to_pandas()
        total = pa.concat_tables(partial).group_by(columns).aggregate([("count_all", "sum")])
        total = total.select([*columns, "count_all_sum"]).rename_columns([*columns, "count"])
        return to_pandas(total.sort_by([(name, "ascending") for name in columns]))

    def to_arrow(self) -> pa.Table:
        """Obs rows as an Arrow table: the selected columns, or all of them, pointers included."""
        names = list(self._schema.names if self._state.columns is None else self._state.columns)
        return obs_room.read_table(self._table, names, where=self._state.where, rowids=self._rowids())

    def to_pandas(self) -> pd.DataFrame:
        """Obs rows as a pandas frame, without pointer columns."""
        return to_pandas(self._plain_arrow())

    def to_polars(self) -> Any:
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
        return polars.from_arrow(self._plain_arrow())

    def _plain_arrow(self) -> pa.Table:
        return obs_room.read_table(
            self._table, self._plain_columns(), where=self._state.where, rowids=self._rowids()
        )

    # Results with measurements

    def to_cell_dataset(
        self,
        feature_space: str | None = None,
        layer: str | Sequence[str] | None = None,
        metadata_columns: list[str] | None = None,
        *,
        field_name: str | None = None,
        dtype: Any = None,
        matrix: Bins | Peaks | None = None,
    ) -> CellDataset:
        """A map-style dataset over the rows that have a modality.

        Rows without it are left out before `limit` and `offset` count.

        Parameters
        ----------
        feature_space
            Name of the modality or of the pointer field; may be left out where there is one sparse field.
        layer
            Values to read; the space's first required layer by default. A list reads several at once: a
            batch then has them all as ``layers``.
        metadata_columns
            Obs columns that batches carry.
        field_name
            Pointer field, where several have the same feature space.
        dtype
            Of batches of dense spaces and images; by default as stored, and where groups differ what NumPy
            promotes them to.
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
        pointer = self._pointer(feature_space, field_name)
        self._only_panels([pointer])
        return self._dataset(pointer, layer, metadata_columns, dtype, matrix=matrix)

    def to_multimodal_dataset(
        self,
        feature_spaces: Sequence[str] | None = None,
        layers: Mapping[str, str | Sequence[str]] | None = None,
        metadata_columns: list[str] | None = None,
        *,
        field_names: Sequence[str] | None = None,
        dtypes: Mapping[str, Any] | None = None,
        matrices: Mapping[str, Bins | Peaks] | None = None,
    ) -> MultimodalCellDataset:
        """A map-style dataset over all rows, several modalities of each.

        A row that lacks a modality has zeros there, and ``present`` False.

        Parameters
        ----------
        feature_spaces
            Names of modalities, or of pointer fields; by default all that the query considers. Batches call
            them as they are called here.
        layers
            By modality: layer, or list of layers, to read; elsewhere the space's first required layer.
        metadata_columns
            Obs columns that batches carry.
        field_names
            Pointer fields, instead of `feature_spaces`.
        dtypes, matrices
            By modality: `dtype` and `matrix` of :meth:`to_cell_dataset`.

        Raises
        ------
        ValueError
            Unknown, ambiguous or repeated names, a malformed filter.
        CorruptDataError
            A pointer outside its arrays.
        """
        from hbx_gpu._datasets.multimodal import MultimodalCellDataset

        pointers = self._fields().several(feature_spaces, field_names)
        self._only_panels(list(pointers.values()))
        for what, given in (("layers", layers), ("dtypes", dtypes), ("matrices", matrices)):
            if strangers := sorted(set(given or ()) - set(pointers)):
                raise UnknownNameError(
                    f"{what} were given for {strangers}, but the dataset reads {list(pointers)}"
                )
        datasets: dict[str, CellDataset] = {}
        for name, pointer in pointers.items():
            # Labels once; every part has the same rows.
            columns = metadata_columns if not datasets else None
            layer, dtype = (layers or {}).get(name), (dtypes or {}).get(name)
            matrix = (matrices or {}).get(name)
            datasets[name] = self._dataset(pointer, layer, columns, dtype, matrix=matrix, absent=True)
        return MultimodalCellDataset(datasets)

    def dataset_of(self, recipe: QueryRecipe) -> CellDataset:
        """The dataset that a recipe describes; what it says of snapshot and query is not looked at."""
        return self._dataset(
            self._pointer(None, recipe.field_name),
            recipe.layers,
            None if recipe.metadata_columns is None else list(recipe.metadata_columns),
            dict(recipe.dtypes),
            absent=recipe.absent,
        )

    def _dataset(
        self,
        pointer: PointerField,
        layer: str | Sequence[str] | None,
        metadata_columns: list[str] | None,
        dtype: Any = None,
        *,
        matrix: Bins | Peaks | None = None,
        absent: bool = False,
    ) -> Any:
        names = self._metadata(metadata_columns)
        columns = self._columns(pointer)
        found = self._read_rows(pointer, names, absent=absent)
        layers = _layer_names(layer)
        if matrix is not None:
            layers = results.fragment_layers(pointer, layers)
        if layers is None:
            layers = (reading.default_layer(self._snapshot, pointer.feature_space, found.groups),)
        if dtype is not None and not isinstance(dtype, Mapping):
            dtype = dict.fromkeys(layers, np.dtype(dtype).name)
        recipe = QueryRecipe(
            path=str(self._snapshot.path),
            version=self._snapshot.version,
            store=str(self._snapshot.store_path),
            table=self._name,
            state=self._state,
            field_name=pointer.name,
            layers=layers,
            metadata_columns=None if metadata_columns is None else tuple(names),
            dtypes=tuple((dtype or {}).items()),
            absent=absent,
            version_table_name=self._snapshot.version_table_name,
        )
        dataset = reading.open_dataset(
            self._snapshot, self._name, pointer, found, layers, columns, recipe, dtype or None
        )
        if matrix is None:
            return dataset
        from hbx_gpu.chromatin import FragmentMatrixDataset

        registry = self._snapshot.registry(pointer.feature_space).frame
        return FragmentMatrixDataset.registered(dataset, matrix, registry)

    def to_modality_obs(self, feature_space: str | None = None, *, field_name: str | None = None) -> pa.Table:
        """Obs rows that have a modality, without pointers: row for row those of :meth:`to_cell_dataset`."""
        found = self._read_rows(self._pointer(feature_space, field_name), [])
        return obs_room.read_table(self._table, self._plain_columns(), rowids=found.rowids)

    def to_anndata(self) -> AnnData:
        """Everything in memory as AnnData: the rows that have the modality, in query order.

        The modality is the only one the table has, or the one that :meth:`feature_spaces` or
        :meth:`select_fields` leaves. ``X`` is of the stored dtype, CSR for sparse spaces.

        Raises
        ------
        ValueError
            Several modalities to choose from.
        TypeError
            Images or fragments, which are no rows of a matrix.
        """
        matrices = self._matrices(self._fields().matrix())
        return matrices.cut(0, len(matrices))

    def to_batches(self, batch_size: int = 1024) -> Iterator[AnnData]:
        """As :meth:`to_anndata`, `batch_size` rows at a time; all pieces have the same columns.

        Raises
        ------
        ValueError
            `batch_size` is not positive.
        """
        if whole(batch_size, "batch_size") == 0:
            raise ValueError("batch_size must be positive")
        return self._matrices(self._fields().matrix()).pieces(batch_size)

    def to_array(self, field: str, layer: str | None = None) -> np.ndarray | list[np.ndarray]:
        """A dense modality in memory: the rows that have it, in query order, in the stored dtype.

        Which rows these are says :meth:`to_modality_obs`.

        Parameters
        ----------
        field
            Name of the modality or of the pointer field.
        layer
            The space's first required layer by default.

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
        batch: Any = dataset[:]
        data: np.ndarray | list[np.ndarray] = batch.data
        return data

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
        return results.read_fragments(self._modality(self._pointer(field, None)))

    def to_multimodal(self) -> MultimodalResult:
        """All modalities in memory, each as what it is: AnnData, fragments, or arrays.

        Modalities are those that :meth:`feature_spaces` or :meth:`select_fields` leave.
        """
        return results.read_multimodal([self._modality(p, absent=True) for p in self._fields().active()])

    def to_mudata(self) -> MuData:
        """The matrices among the modalities as MuData; others are left out, with a warning.

        Raises
        ------
        ImportError
            mudata is not installed.
        """
        return self.to_multimodal().to_mudata()

    def _modality(self, pointer: PointerField, *, absent: bool = False) -> results.Modality:
        """Rows of a field, and what reads them."""
        found = self._read_rows(pointer, [], absent=absent)
        there = found.rows.source >= 0
        names = [name for name in self._plain_columns() if name != "uid"]
        rows = obs_room.read_table(self._table, ["uid", *names], rowids=found.rowids)
        kept = obs_room.some_rows(found, there)
        return results.Modality(
            pointer=pointer,
            present=there,
            obs=obs_frame(rows, names),
            open=lambda layers: self._opened(pointer, kept, layers),
            matrices=lambda: self._matrices(pointer, kept),
        )

    def _opened(
        self, pointer: PointerField, found: obs_room.ModalityRows, layers: Sequence[str] | None
    ) -> tuple[CellDataset, pd.DataFrame | None]:
        """A dataset over rows that were found, and the registry of its columns."""
        space = pointer.feature_space
        if layers is None:
            asked = dict(self._state.layers).get(space)
            layers = asked or (reading.default_layer(self._snapshot, space, found.groups),)
        columns = self._columns(pointer)
        dataset = reading.open_dataset(self._snapshot, self._name, pointer, found, layers, columns, None)
        if space not in self._snapshot.record.registries:
            return dataset, None
        return dataset, self._snapshot.registry(space).frame.reindex(list(columns.uids))

    def _matrices(self, pointer: PointerField, found: obs_room.ModalityRows | None = None) -> Matrices:
        space = pointer.feature_space
        found = self._read_rows(pointer, []) if found is None else found
        panel = dict(self._state.panels).get(space)
        registry = self._snapshot.registry(space)
        if panel is None:
            index = measured(self._snapshot, space, found.groups, self._state.join)
        else:
            index = registry.resolve(panel)
        columns = reading.chosen_columns(self._snapshot, space, index)
        layers = dict(self._state.layers).get(space)
        if layers is None:
            layers = (reading.default_layer(self._snapshot, space, found.groups),)
        datasets = {
            layer: reading.open_dataset(self._snapshot, self._name, pointer, found, (layer,), columns, None)
            for layer in layers
        }
        names = [name for name in self._plain_columns() if name != "uid"]
        obs = obs_room.read_table(self._table, ["uid", *names], rowids=found.rowids)
        return Matrices(datasets, obs, names, registry.frame.reindex(list(columns.uids)))


def _layer_names(layer: str | Sequence[str] | None) -> tuple[str, ...] | None:
    if layer is None or isinstance(layer, str):
        return None if layer is None else (layer,)
    names = tuple(dict.fromkeys(layer))
    if not names:
        raise ValueError("choose at least one layer, or none at all for the default")
    return names
