"""Rows of several datasets on their way into one table, so that they cost it one version together."""

from __future__ import annotations

import logging
from collections.abc import Mapping

import pyarrow as pa
from lancedb.table import Table

from hbx_gpu.atlas._catalog.tables import Addition, read
from hbx_gpu.atlas._model import columns
from hbx_gpu.atlas._model.columns import Merge

_log = logging.getLogger(__name__)


class _Unsettled(Exception):
    """Whether rows fit depends on values that are on their way themselves."""


class Rows:
    """Rows for one table, each lot checked against the table and the lots before it.

    Parameters
    ----------
    table
        The table; nothing else may change it until the rows are in it.
    allow_new
        Add columns that the table lacks; otherwise they are left out.
    defaults
        Values for columns that the data lack.
    lenient
        Leave out a column that cannot be merged with the table's, with a warning, instead of raising.
    """

    def __init__(
        self,
        table: Table,
        *,
        allow_new: bool,
        defaults: Mapping[str, object] | None = None,
        lenient: bool = False,
    ) -> None:
        self._table, self._allow_new, self._lenient = table, allow_new, lenient
        self._defaults = defaults or {}
        self._schema: pa.Schema = table.schema
        self._lots: list[tuple[pa.Table, str]] = []
        self._new: list[pa.Field] = []
        self._changed: dict[str, tuple[pa.DataType, str]] = {}

    def check(self, data: pa.Table, source: str) -> Merge | None:
        """How the table must change for some rows; None where the rows before must be in the table first.

        Columns change type by a step of their own, so a lot that needs one is the first of its commit.

        Raises
        ------
        InvalidDataError
            As of :func:`hbx_gpu.atlas._catalog.tables.prepare`.
        """

        def stored(name: str) -> pa.ChunkedArray:
            if self._lots:
                raise _Unsettled
            return read(self._table, [name]).column(name)

        try:
            merge = columns.plan_merge(
                self._schema,
                data,
                allow_new=self._allow_new,
                source=source,
                stored=stored,
                lenient=self._lenient,
            )
        except _Unsettled:
            return None
        if merge.changed and self._lots:
            return None
        kept = self._kept(data, merge)
        columns.fit(
            kept,
            columns.merged_schema(self._schema, merge),
            defaults=self._defaults,
            source=source,
            table=self._table.name,
        )
        return merge

    def take(self, data: pa.Table, source: str, merge: Merge) -> None:
        """Take rows after :meth:`check`, which gave `merge`."""
        for note in merge.notes:
            _log.warning("%s", note)
        self._lots.append((self._kept(data, merge), source))
        self._schema = columns.merged_schema(self._schema, merge)
        self._new += merge.new
        self._changed |= merge.changed

    def _kept(self, data: pa.Table, merge: Merge) -> pa.Table:
        return data.drop_columns([name for name in merge.left_out if name in self._schema.names])

    @property
    def new_columns(self) -> tuple[str, ...]:
        """Names of the columns that the table gets."""
        return tuple(field.name for field in self._new)

    @property
    def name(self) -> str:
        """Name of the table."""
        return str(self._table.name)

    def commit(self) -> None:
        """Change the table's columns as needed, then append all rows in one commit, in order."""
        if not self._lots:
            return
        fitted = [
            columns.fit(data, self._schema, defaults=self._defaults, source=source, table=self.name)
            for data, source in self._lots
        ]
        merge = Merge(tuple(self._new), self._changed)
        whole = Addition(self._table, self.name, pa.concat_tables(fitted), merge, self._defaults, self.name)
        whole.commit()
