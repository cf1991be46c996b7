"""Questions to one obs table of one snapshot: which rows, which features, and in what form they come."""

from __future__ import annotations

import operator
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa

from hbx_gpu.atlas import obs as obs_room
from hbx_gpu.atlas import reading
from hbx_gpu.atlas.balance import balanced_rows, value_codes
from hbx_gpu.atlas.recipe import FeatureJoin, QueryRecipe, QueryState
from hbx_gpu.atlas.spaces import get_space, known_spaces
from hbx_gpu.errors import UnknownNameError

if TYPE_CHECKING:
    import pandas as pd
    from anndata import AnnData

    from hbx_gpu.atlas.snapshot import PointerField, Snapshot
    from hbx_gpu.dataloader import CellDataset

__all__ = ["AtlasQuery", "QueryRecipe", "QueryState"]


class AtlasQuery:
    """Rows of an obs table, described step by step and read when a result is asked for.

    Every step returns the same object; the order of steps does not matter, and a step taken again
    replaces what it said before. Rows come in ascending row id of the pinned table.

    Parameters
    ----------
    snapshot
        The atlas at one version.
    table
        Obs table; may be left out where there is only one.
    state
        What was asked before, when a query is built again.
    """

    def __init__(
        self, snapshot: Snapshot, table: str | None = None, *, state: QueryState | None = None
    ) -> None:
        self._snapshot = snapshot
        self._name = snapshot.obs_table_name(table)
        self._table = snapshot.obs_table(self._name)
        self._schema: pa.Schema = self._table.schema
        self._pointers = snapshot.pointer_fields(self._name)
        self._state = state or QueryState()

    def __repr__(self) -> str:
        return f"AtlasQuery(table={self._name!r}, version={self._snapshot.version}, {self._state})"

    def _with(self, **changes: Any) -> AtlasQuery:
        self._state = replace(self._state, **changes)
        return self

    # Steps

    def where(self, sql: str | None) -> AtlasQuery:
        """Keep rows for which a SQL expression (DataFusion's dialect) holds; None keeps all.

        Any column may be named, members of pointers too: ``gene_expression.zarr_group = 'a'``. Put names
        with capitals or blanks in backticks.
        """
        return self._with(where=sql)

    def select(self, columns: list[str] | None) -> AtlasQuery:
        """Obs columns of tables and AnnData; all by default.

        Raises
        ------
        ValueError
            Not a list, or a column that does not exist.
        """
        if columns is None:
            return self._with(columns=None)
        if not isinstance(columns, list | tuple):
            raise ValueError(f"Columns must be a list, got {columns!r}")
        obs_room.check_columns(self._schema, columns)
        return self._with(columns=tuple(columns))

    def features(self, uids: Sequence[str], feature_space: str) -> AtlasQuery:
        """Read only these features of a space; columns come in the order given here.

        Parameters
        ----------
        uids
            Feature uids, each once. Unknown ones are reported when the query is read.
        feature_space
            Name of the space, or of a pointer field.

        Raises
        ------
        ValueError
            An unknown space, or a uid given twice.
        """
        if isinstance(uids, str):
            raise ValueError(f"features() needs a list of uids, got the string {uids!r}")
        panel = tuple(str(uid) for uid in uids)
        if len(set(panel)) != len(panel):
            seen: set[str] = set()
            twice = [uid for uid in panel if uid in seen or seen.add(uid)]  # type: ignore[func-returns-value]
            raise ValueError(f"every feature may be asked for once; repeated: {twice[:5]}")
        space = self._space_named(feature_space)
        others = tuple(entry for entry in self._state.panels if entry[0] != space)
        return self._with(panels=(*others, (space, panel)))

    def feature_join(self, how: FeatureJoin) -> AtlasQuery:
        """Columns of AnnData: features that any group measured ("union"), or all ("intersection")."""
        if how not in ("union", "intersection"):
            raise ValueError(f"feature_join must be 'union' or 'intersection', got {how!r}")
        return self._with(join=how)

    def limit(self, n: int | None) -> AtlasQuery:
        """At most `n` rows, after filtering; 0 gives none, None gives all.

        Raises
        ------
        ValueError
            Negative, or combined with :meth:`balanced_limit`.
        """
        if n is not None and self._state.balanced is not None:
            raise ValueError("limit() and balanced_limit() cannot be combined; use one of them")
        return self._with(limit=None if n is None else _whole(n, "limit"))

    def offset(self, n: int) -> AtlasQuery:
        """Skip the first `n` matching rows."""
        return self._with(offset=_whole(n, "offset"))

    def balanced_limit(self, n: int, column: str) -> AtlasQuery:
        """`n` rows in which the values of a column are as equally frequent as the data allow.

        Rows without a value are left out. The first rows of each value are taken; where a value has too
        few, the others give more, so the total is `n` whenever that many rows exist. Where equal shares do
        not come out even, values that sort first get one row more.

        Raises
        ------
        ValueError
            Negative, an unknown column, or combined with :meth:`limit`.
        """
        if self._state.limit is not None:
            raise ValueError("limit() and balanced_limit() cannot be combined; use one of them")
        obs_room.check_columns(self._schema, [column])
        return self._with(balanced=(_whole(n, "balanced_limit"), column))

    def layers(self, feature_space: str, names: Sequence[str]) -> AtlasQuery:
        """Layers of a space that AnnData holds: the first as ``X``, the others in ``layers``."""
        if isinstance(names, str) or not names:
            raise ValueError(f"layers() needs a list of at least one layer name, got {names!r}")
        space = self._space_named(feature_space)
        others = tuple(entry for entry in self._state.layers if entry[0] != space)
        return self._with(layers=(*others, (space, tuple(names))))

    def feature_spaces(self, *spaces: str) -> AtlasQuery:
        """Consider only these feature spaces.

        Raises
        ------
        ValueError
            A space that the table does not have.
        """
        have = {pointer.feature_space for pointer in self._pointers.values()}
        if missing := sorted(set(spaces) - have):
            raise UnknownNameError(
                f"unknown feature space(s) {missing}; table {self._name!r} has {sorted(have)}"
            )
        return self._with(spaces=spaces)

    def select_fields(self, *fields: str) -> AtlasQuery:
        """Consider only these pointer fields.

        Raises
        ------
        ValueError
            A field that the table does not have.
        """
        if missing := [name for name in fields if name not in self._pointers]:
            raise UnknownNameError(
                f"unknown pointer field(s) {missing}; table {self._name!r} has {sorted(self._pointers)}"
            )
        return self._with(fields=fields)

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
        return reading.to_pandas(total.sort_by([(name, "ascending") for name in columns]))

    def to_arrow(self) -> pa.Table:
        """Obs rows as an Arrow table: the selected columns, or all of them, pointers included."""
        names = list(self._schema.names if self._state.columns is None else self._state.columns)
        return obs_room.read_table(self._table, names, where=self._state.where, rowids=self._rowids())

    def to_pandas(self) -> pd.DataFrame:
        """Obs rows as a pandas frame, without pointer columns."""
        return reading.to_pandas(self._plain_arrow())

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

    def _plain_columns(self) -> list[str]:
        names = self._schema.names if self._state.columns is None else self._state.columns
        return [name for name in names if name not in self._pointers]

    # Results with measurements

    def to_cell_dataset(
        self,
        feature_space: str | None = None,
        layer: str | None = None,
        metadata_columns: list[str] | None = None,
        *,
        field_name: str | None = None,
    ) -> CellDataset:
        """A map-style dataset over the rows that have a modality.

        Rows without it are left out before `limit` and `offset` count.

        Parameters
        ----------
        feature_space
            Name of the modality or of the pointer field; may be left out where there is one sparse field.
        layer
            Values to read; the space's first required layer by default.
        metadata_columns
            Obs columns that batches carry.
        field_name
            Pointer field, where several have the same feature space.

        Raises
        ------
        ValueError
            Unknown or ambiguous names (the message lists what exists), a malformed filter.
        CorruptDataError
            A pointer outside its arrays.
        """
        pointer = self._pointer(feature_space, field_name)
        names = self._metadata(metadata_columns)
        columns = self._columns(pointer)
        found = self._read_rows(pointer, names)
        layer = layer or reading.default_layer(self._snapshot, pointer.feature_space, found.groups)
        recipe = QueryRecipe(
            path=str(self._snapshot.path),
            version=self._snapshot.version,
            store=str(self._snapshot.store_path),
            table=self._name,
            state=self._state,
            field_name=pointer.name,
            layer=layer,
            metadata_columns=None if metadata_columns is None else tuple(names),
            version_table_name=self._snapshot.version_table_name,
        )
        return reading.open_dataset(self._snapshot, self._name, pointer, found, layer, columns, recipe)

    def to_modality_obs(self, feature_space: str | None = None, *, field_name: str | None = None) -> pa.Table:
        """Obs rows that have a modality, without pointers: row for row those of :meth:`to_cell_dataset`."""
        found = self._read_rows(self._pointer(feature_space, field_name), [])
        return obs_room.read_table(self._table, self._plain_columns(), rowids=found.rowids)

    def to_anndata(self) -> AnnData:
        """Everything in memory as AnnData: the rows that have the modality, in query order.

        The modality is the only one the table has, or the one that :meth:`feature_spaces` or
        :meth:`select_fields` leaves. ``X`` is CSR in the stored dtype.

        Raises
        ------
        ValueError
            Several modalities to choose from.
        TypeError
            Images or fragments, which are no rows of a matrix.
        """
        matrices = self._matrices()
        return matrices.cut(0, len(matrices))

    def to_batches(self, batch_size: int = 1024) -> Iterator[AnnData]:
        """As :meth:`to_anndata`, `batch_size` rows at a time; all pieces have the same columns.

        Raises
        ------
        ValueError
            `batch_size` is not positive.
        """
        if _whole(batch_size, "batch_size") == 0:
            raise ValueError("batch_size must be positive")
        return self._matrices().pieces(batch_size)

    def _matrices(self) -> reading.Matrices:
        pointer = self._matrix_pointer()
        space = pointer.feature_space
        found = self._read_rows(pointer, [])
        panel = dict(self._state.panels).get(space)
        registry = self._snapshot.registry(space)
        if panel is None:
            index = reading.measured(self._snapshot, space, found.groups, self._state.join)
        else:
            index = registry.resolve(panel)
        columns = reading.chosen_columns(self._snapshot, space, index)
        layers = dict(self._state.layers).get(space)
        if layers is None:
            layers = (reading.default_layer(self._snapshot, space, found.groups),)
        datasets = {
            layer: reading.open_dataset(self._snapshot, self._name, pointer, found, layer, columns, None)
            for layer in layers
        }
        names = [name for name in self._plain_columns() if name != "uid"]
        obs = obs_room.read_table(self._table, ["uid", *names], rowids=found.rowids)
        return reading.Matrices(datasets, obs, names, registry.frame.reindex(list(columns.uids)))

    # Rows

    def _scan(
        self, columns: Sequence[str] | dict[str, str], rowids: np.ndarray | None
    ) -> Iterator[pa.RecordBatch]:
        return obs_room.scan(self._table, columns, where=self._state.where, rowids=rowids)

    def _read_rows(self, pointer: PointerField, columns: Sequence[str]) -> obs_room.ModalityRows:
        if pointer.kind == "discrete_spatial":
            raise TypeError(
                f"field {pointer.name!r} holds image crops ({pointer.feature_space!r}), which datasets and "
                "AnnData do not read yet; sparse and dense fields can be read"
            )
        return obs_room.read_modality(
            self._snapshot,
            self._name,
            pointer,
            columns,
            where=self._state.where,
            rowids=self._rowids(pointer),
        )

    def _rowids(self, pointer: PointerField | None = None) -> np.ndarray | None:
        """uint64, ascending: rows that limit, offset and balanced_limit leave; None where nothing limits.

        With a pointer only rows that have its modality count.
        """
        state = self._state
        if state.limit is None and state.balanced is None and not state.offset:
            return None
        wanted = {}
        if pointer is not None:
            wanted["group"] = obs_room.column_expression(pointer.name, "zarr_group")
        if state.balanced is not None:
            wanted["value"] = obs_room.column_expression(state.balanced[1])
        ids: list[np.ndarray] = [np.empty(0, np.uint64)]
        values: list[pa.Array] = []
        for batch in self._scan(wanted or ["uid"], None):
            if pointer is not None:
                batch = batch.filter(pa.array(obs_room.present(batch.column("group"))))
            ids.append(batch.column(obs_room.ROWID).to_numpy())
            if state.balanced is not None:
                values.append(obs_room.plain(batch.column("value")))
        rowids = np.concatenate(ids)
        order = np.argsort(rowids, kind="stable")
        stop = None if state.limit is None else state.offset + state.limit
        order = order[state.offset : stop]
        if state.balanced is not None:
            number, column = state.balanced
            codes = value_codes(values, self._schema.field(column))[order]
            order = order[balanced_rows(codes, number)]
        return rowids[order]

    # Names

    def _space_named(self, name: str) -> str:
        spaces = {pointer.feature_space for pointer in self._pointers.values()}
        if name in spaces:
            return name
        if name in self._pointers:
            return self._pointers[name].feature_space
        raise UnknownNameError(
            f"no feature space {name!r} in table {self._name!r}; available: {sorted(spaces)}"
        )

    def _active(self) -> list[PointerField]:
        state = self._state
        return [
            pointer
            for pointer in self._pointers.values()
            if (state.spaces is None or pointer.feature_space in state.spaces)
            and (state.fields is None or pointer.name in state.fields)
        ]

    def _pointer(self, feature_space: str | None, field_name: str | None) -> PointerField:
        if field_name is not None:
            if field_name not in self._pointers:
                raise UnknownNameError(
                    f"no pointer field {field_name!r} in table {self._name!r}; available: {self._described()}"
                )
            pointer = self._pointers[field_name]
            if feature_space not in (None, pointer.feature_space, pointer.name):
                raise ValueError(
                    f"field {field_name!r} holds {pointer.feature_space!r}, not {feature_space!r}"
                )
            return pointer
        if feature_space is None:
            active = self._active()
            sparse = [pointer for pointer in active if pointer.kind == "sparse"]
            return self._only(sparse or active, "the table")
        matches = [p for p in self._active() if p.feature_space == feature_space]
        matches = matches or [p for p in self._pointers.values() if p.feature_space == feature_space]
        if matches:
            return self._only(matches, f"feature space {feature_space!r}")
        if feature_space in self._pointers:
            return self._pointers[feature_space]
        raise UnknownNameError(
            f"no feature space or field {feature_space!r} in table {self._name!r}; "
            f"available: {self._described()}"
        )

    def _only(self, pointers: list[PointerField], what: str) -> PointerField:
        if len(pointers) == 1:
            return pointers[0]
        if not pointers:
            raise ValueError(f"{what} has no data to read; available: {self._described()}")
        names = [pointer.name for pointer in pointers]
        raise ValueError(f"{what} has several pointer fields: {names}; choose one with field_name=")

    def _matrix_pointer(self) -> PointerField:
        active = self._active()
        matrices = [pointer for pointer in active if _is_matrix(pointer.feature_space)]
        if active and not matrices:
            raise TypeError(
                f"{[p.name for p in active]} hold images or fragments, not rows of a matrix; "
                "read them with to_cell_dataset(field_name=...)"
            )
        if len(matrices) > 1:
            raise ValueError(
                f"to_anndata() needs exactly one AnnData-capable pointer field, table {self._name!r} has "
                f"{[p.name for p in matrices]}; choose one with feature_spaces(...) or select_fields(...)"
            )
        return self._only(matrices, "the table")

    def _described(self) -> dict[str, str]:
        return {pointer.name: pointer.feature_space for pointer in self._pointers.values()}

    def _columns(self, pointer: PointerField) -> reading.Columns:
        panels = dict(self._state.panels)
        space = pointer.feature_space
        if space in panels:
            index = self._snapshot.registry(space).resolve(panels[space])
            return reading.chosen_columns(self._snapshot, space, index)
        if panels:
            raise ValueError(
                f"features() was given for {sorted(panels)}, but this dataset reads {space!r}; ask for "
                f"features of {space!r}, or use a query of its own"
            )
        return reading.all_columns(self._snapshot, space)

    def _metadata(self, columns: list[str] | None) -> list[str]:
        if isinstance(columns, str):
            raise ValueError(f"metadata_columns must be a list, got {columns!r}")
        names = list(dict.fromkeys(columns or ()))
        obs_room.check_columns(self._schema, names)
        if pointers := [name for name in names if name in self._pointers]:
            raise ValueError(
                f"{pointers} are pointer columns, not metadata; choose from {self._plain_columns()}"
            )
        return names


def _is_matrix(feature_space: str) -> bool:
    if feature_space not in known_spaces():
        return True
    space = get_space(feature_space)
    return space.has_features and not space.repeats


def _whole(n: int, what: str) -> int:
    number = operator.index(n)
    if number < 0:
        raise ValueError(f"{what} must not be negative, got {number}")
    return number
