"""What is asked of an obs table, step by step, and the rows that leaves."""

from __future__ import annotations

import operator
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any, Self

import numpy as np
import pyarrow as pa

from hbx_gpu.atlas._query import obs as obs_room
from hbx_gpu.atlas._query import opening as reading
from hbx_gpu.atlas._query.balance import balanced_rows, value_codes
from hbx_gpu.atlas._query.fields import Fields
from hbx_gpu.atlas._query.state import FeatureJoin, QueryState
from hbx_gpu.errors import UnknownNameError

if TYPE_CHECKING:
    from hbx_gpu.atlas._catalogue.snapshot import PointerField, Snapshot


class QuerySteps:
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
        return f"{type(self).__name__}(table={self._name!r}, version={self._snapshot.version}, {self._state})"

    def _with(self, **changes: Any) -> Self:
        self._state = replace(self._state, **changes)
        return self

    # Steps

    def where(self, sql: str | None) -> Self:
        """Keep rows for which a SQL expression (DataFusion's dialect) holds; None keeps all.

        Any column may be named, members of pointers too: ``gene_expression.zarr_group = 'a'``. Put names
        with capitals or blanks in backticks.
        """
        return self._with(where=sql)

    def select(self, columns: list[str] | None) -> Self:
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

    def features(self, uids: Sequence[str], feature_space: str) -> Self:
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
        space = self._fields().space_named(feature_space)
        others = tuple(entry for entry in self._state.panels if entry[0] != space)
        return self._with(panels=(*others, (space, panel)))

    def feature_join(self, how: FeatureJoin) -> Self:
        """Columns of AnnData: features that any group measured ("union"), or all ("intersection")."""
        if how not in ("union", "intersection"):
            raise ValueError(f"feature_join must be 'union' or 'intersection', got {how!r}")
        return self._with(join=how)

    def limit(self, n: int | None) -> Self:
        """At most `n` rows, after filtering; 0 gives none, None gives all.

        Raises
        ------
        ValueError
            Negative, or combined with :meth:`balanced_limit`.
        """
        if n is not None and self._state.balanced is not None:
            raise ValueError("limit() and balanced_limit() cannot be combined; use one of them")
        return self._with(limit=None if n is None else whole(n, "limit"))

    def offset(self, n: int) -> Self:
        """Skip the first `n` matching rows."""
        return self._with(offset=whole(n, "offset"))

    def balanced_limit(self, n: int, column: str) -> Self:
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
        return self._with(balanced=(whole(n, "balanced_limit"), column))

    def layers(self, feature_space: str, names: Sequence[str]) -> Self:
        """Layers of a space that AnnData holds: the first as ``X``, the others in ``layers``."""
        if isinstance(names, str) or not names:
            raise ValueError(f"layers() needs a list of at least one layer name, got {names!r}")
        space = self._fields().space_named(feature_space)
        others = tuple(entry for entry in self._state.layers if entry[0] != space)
        return self._with(layers=(*others, (space, tuple(names))))

    def feature_spaces(self, *spaces: str) -> Self:
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

    def select_fields(self, *fields: str) -> Self:
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

    # Rows

    def _scan(
        self, columns: Sequence[str] | dict[str, str], rowids: np.ndarray | None
    ) -> Iterator[pa.RecordBatch]:
        return obs_room.scan(self._table, columns, where=self._state.where, rowids=rowids)

    def _read_rows(
        self, pointer: PointerField, columns: Sequence[str], *, absent: bool = False
    ) -> obs_room.ModalityRows:
        return obs_room.read_modality(
            self._snapshot,
            self._name,
            pointer,
            columns,
            where=self._state.where,
            rowids=self._rowids(None if absent else pointer),
            absent=absent,
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

    def _fields(self) -> Fields:
        return Fields(self._name, self._pointers, self._state.spaces, self._state.fields)

    def _pointer(self, feature_space: str | None, field_name: str | None) -> PointerField:
        return self._fields().one(feature_space, field_name)

    def _columns(self, pointer: PointerField) -> reading.Columns:
        panels = dict(self._state.panels)
        space = pointer.feature_space
        if space in panels:
            index = self._snapshot.registry(space).resolve(panels[space])
            return reading.chosen_columns(self._snapshot, space, index)
        return reading.all_columns(self._snapshot, space)

    def _only_panels(self, pointers: Sequence[PointerField]) -> None:
        """Refuse features of spaces that are not read."""
        spaces = list(dict.fromkeys(pointer.feature_space for pointer in pointers))
        panels = {space for space, _ in self._state.panels}
        if strangers := sorted(panels - set(spaces)):
            read = ", ".join(map(repr, spaces))
            raise ValueError(
                f"features() was given for {strangers}, but this dataset reads {read}; ask for features of "
                f"{read}, or use a query of its own"
            )

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

    def _plain_columns(self) -> list[str]:
        names = self._schema.names if self._state.columns is None else self._state.columns
        return [name for name in names if name not in self._pointers]


def whole(n: int, what: str) -> int:
    number = operator.index(n)
    if number < 0:
        raise ValueError(f"{what} must not be negative, got {number}")
    return number
