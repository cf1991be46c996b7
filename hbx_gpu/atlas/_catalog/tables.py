"""Small steps on LanceDB tables. Each is one commit or safe to repeat, and none removes a version."""

from __future__ import annotations

import logging
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

import lancedb
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from lancedb.table import Table

from hbx_gpu._remote.lookup import folders, is_dir
from hbx_gpu._remote.places import AnyPath
from hbx_gpu.atlas._catalog.table_errors import guarded, lance_errors, open_guarded
from hbx_gpu.atlas._model import columns
from hbx_gpu.atlas._model.columns import Merge
from hbx_gpu.errors import AtlasError

_log = logging.getLogger(__name__)

# By default LanceDB removes versions older than seven days when it optimizes. Snapshots refer to versions,
# so all must be kept.
_KEEP = timedelta(days=36_500)
# Values per SQL condition.
_SQL_BATCH = 1000
# Suffix of a column that is about to replace another one.
_PROMOTED = "__hbx_gpu_new_type"


def connect(root: Path) -> lancedb.DBConnection:
    """The database of the atlas at `root`."""
    return lancedb.connect(str(root / "lance_db"))


def table_names(root: AnyPath) -> list[str]:
    """Names of all tables of the atlas at `root`, sorted."""
    found = (path.name for path in folders(root / "lance_db"))
    return sorted(name.removesuffix(".lance") for name in found if name.endswith(".lance"))


def open_table(root: AnyPath, name: str) -> Table:
    """The newest state of a table.

    Raises
    ------
    AtlasError
        The table does not exist.
    """
    if not is_dir(root / "lance_db" / f"{name}.lance"):
        raise AtlasError(f"the atlas at {root} has no table {name!r}; its tables: {table_names(root)}")
    return open_guarded(root, name)


def ensure_table(root: Path, name: str, schema: pa.Schema) -> Table:
    """The table `name`, created empty if it does not exist."""
    if (root / "lance_db" / f"{name}.lance").is_dir():
        return open_table(root, name)
    with lance_errors(root, name):
        made = connect(root).create_table(name, schema=schema)
    return guarded(made, root, name)


def drop_table(root: Path, name: str) -> None:
    """Remove a table with all its versions; nothing happens if it does not exist."""
    if (root / "lance_db" / f"{name}.lance").is_dir():
        with lance_errors(root, name):
            connect(root).drop_table(name)


def quoted(value: str) -> str:
    """A string as SQL."""
    return "'" + value.replace("'", "''") + "'"


def one_of(column: str, values: Iterable[str]) -> str:
    """SQL: the column has one of these values."""
    listed = ", ".join(map(quoted, values))
    return f"`{column}` IN ({listed})" if listed else "false"


def batches(column: str, values: Sequence[str]) -> Iterator[str]:
    """SQL conditions of bounded length; together they select the rows whose column has one of the values."""
    for i in range(0, len(values), _SQL_BATCH):
        yield one_of(column, values[i : i + _SQL_BATCH])


def read(table: Table, columns: Sequence[str], where: str | None = None) -> pa.Table:
    """Columns of the rows for which a SQL expression holds, in no particular order."""
    query = table.search() if where is None else table.search().where(where)
    return query.select(list(columns)).to_arrow().select(list(columns))


@dataclass(frozen=True)
class Addition:
    """Rows that are known to fit a table; see :func:`prepare`."""

    table: Table
    name: str
    data: pa.Table
    merge: Merge
    defaults: Mapping[str, object]
    source: str

    def commit(self, extra: Mapping[str, pa.Array] | None = None) -> None:
        """Change the table's columns as needed, then append all rows in one commit, in order.

        Parameters
        ----------
        extra
            Columns whose values were not known when the rows were prepared.
        """
        for name, (_, sql) in self.merge.changed.items():
            self.table.add_columns({name + _PROMOTED: sql})
            finish_promotions(self.table)
        if self.merge.new:
            self.table.add_columns(list(self.merge.new))
        data = self.data
        for name, array in (extra or {}).items():
            data = data.append_column(name, array)
        schema = self.table.schema
        rows = columns.fit(data, schema, defaults=self.defaults, source=self.source, table=self.name)
        # A stream, because several tasks may write a table at once and mix up the order of rows.
        self.table.add(rows.to_reader())


def prepare(
    table: Table,
    data: pa.Table,
    *,
    allow_new: bool,
    defaults: Mapping[str, object] | None = None,
    later: Collection[str] = (),
    source: str,
    lenient: bool = False,
) -> Addition:
    """Check that rows fit a table, if necessary after merging columns. Nothing is written.

    Parameters
    ----------
    table, data
        The rows and the table that takes them.
    allow_new
        Add columns that the table lacks; otherwise they are left out.
    defaults
        Values for columns that the data lack.
    later
        Columns that are passed only at the commit.
    source
        Name of the data, used in error messages.
    lenient
        Leave out a column that cannot be merged with the table's, with a warning, instead of raising.

    Raises
    ------
    InvalidDataError
        Types are incompatible, a value cannot be stored exactly, a required column is missing.
    """
    merge = columns.plan_merge(
        table.schema,
        data,
        allow_new=allow_new,
        source=source,
        stored=lambda name: read(table, [name]).column(name),
        lenient=lenient,
    )
    for note in merge.notes:
        _log.warning("%s", note)
    data = data.drop_columns([name for name in merge.left_out if name in table.schema.names])
    schema = columns.merged_schema(table.schema, merge)
    for name in later:
        schema = schema.remove(schema.get_field_index(name))
    columns.fit(data, schema, defaults=defaults, source=source, table=table.name)
    return Addition(table, table.name, data, merge, defaults or {}, source)


def finish_promotions(table: Table) -> None:
    """Complete interrupted changes of column types; safe to repeat after a crash."""
    for name in [name for name in table.schema.names if name.endswith(_PROMOTED)]:
        final = name.removesuffix(_PROMOTED)
        if final in table.schema.names:
            if metadata := table.schema.field(final).metadata:
                table.update_field_metadata({"path": name, "metadata": _texts(metadata)})
            table.drop_columns([final])
        # Typed as an iterable of changes, but it takes each change as an argument.
        rename: Any = {"path": name, "rename": final}
        table.alter_columns(rename)


def _texts(metadata: Mapping[bytes, bytes]) -> dict[str, str]:
    return {key.decode(): value.decode() for key, value in metadata.items()}


def drop_repeats(table: Table, key: Sequence[str], *, keep_first_by: str, where: str | None = None) -> None:
    """Remove all but one of the rows with equal `key`: the smallest `keep_first_by`, nulls last, is kept."""
    query = table.search() if where is None else table.search().where(where)
    rows = query.select([*key, keep_first_by]).with_row_id(True).to_arrow()
    rows = rows.sort_by([*((name, "ascending") for name in (*key, keep_first_by)), ("_rowid", "ascending")])
    if len(rows) < 2:
        return
    same = np.ones(len(rows) - 1, bool)
    for name in key:
        column = rows.column(name).combine_chunks()
        same &= pc.equal(column[1:], column[:-1]).to_numpy(zero_copy_only=False)
    repeats = rows.column("_rowid").to_numpy()[1:][same]
    for i in range(0, len(repeats), _SQL_BATCH):
        table.delete(f"_rowid IN ({', '.join(map(str, repeats[i : i + _SQL_BATCH]))})")


def compact(table: Table) -> None:
    """Merge small fragments; every version stays readable."""
    table.optimize(cleanup_older_than=_KEEP)
