"""Checks that the note of an unfinished ingest names nothing that a snapshot or another ingest relies on."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

from hbx_gpu.atlas._catalog import tables
from hbx_gpu.atlas._catalog.journal import IngestNote, Journal
from hbx_gpu.atlas._catalog.names import Names
from hbx_gpu.atlas._catalog.paths import LAYOUT_TABLE, group_path, plain_column
from hbx_gpu.atlas._catalog.snapshot_records import SnapshotRecord, read_records
from hbx_gpu.atlas._model.schema import default_registry
from hbx_gpu.atlas._model.spaces import known_spaces

if TYPE_CHECKING:
    from lancedb.table import Table


class Written(Protocol):
    """The parts of a catalog open for writing that these checks read."""

    root: Path
    store: Path
    names: Names
    journal: Journal

    def staging(self, name: str) -> Path:
        """Folder for the unfinished files of one ingest."""
        ...


def check(catalog: Written, note: IngestNote) -> None:
    """Refuse a note that names something unfinished work cannot have made. Nothing is changed.

    Raises
    ------
    AtlasError
        The note is invalid; the message names it and the fault.
    UnsafePathError
        A name leads out of the store.
    """
    if (reason := _fault(catalog, note)) is not None:
        raise catalog.journal.refused(note, reason)


def _fault(catalog: Written, note: IngestNote) -> str | None:
    catalog.staging(note.staging)
    names = catalog.names
    records = read_records(catalog.root, version_table_name=names.version_table)
    pinned = {table for record in records for table in record.pinned}
    kept = pinned | {*names.obs_tables, names.dataset_table, names.version_table, LAYOUT_TABLE}
    registries = {*names.registries.values()}
    if note.obs_table not in names.obs_tables:
        return f"there is no obs table {note.obs_table!r}"
    known = registries | {default_registry(space) for space in known_spaces()}
    for table in note.new_registries:
        if table in kept or table not in known:
            return f"table {table!r} was not made by an ingest that did not end"
    listed = _groups_of_snapshots(catalog, records) if note.groups else set()
    for group in note.groups:
        group_path(catalog.store, group.zarr_group)  # what is removed is reached through no link
        plain_column(group.field_name)
        if group.zarr_group in listed:
            return f"group {group.zarr_group!r} is part of a snapshot"
    for table, columns in note.new_columns.items():
        if table in note.new_registries:
            continue
        if table not in kept | registries:
            return f"there is no table {table!r}"
        opened = tables.open_table(catalog.root, table)
        for column in map(plain_column, columns):
            if column in opened.schema.names and _is_used(catalog, note, opened, column):
                return f"column {column!r} of table {table!r} holds values"
    return None


def _groups_of_snapshots(catalog: Written, records: Sequence[SnapshotRecord]) -> set[str]:
    """Names of all groups that the last snapshot lists; groups are never removed from it."""
    if not records:
        return set()
    name, version = records[-1].dataset_table
    table = tables.open_table(catalog.root, name)
    table.checkout(version)
    return set(tables.read(table, ["zarr_group"]).column("zarr_group").to_pylist())


def _is_used(catalog: Written, note: IngestNote, table: Table, column: str) -> bool:
    """Whether rows that this ingest did not add have a value in a column."""
    where = f"`{column}` IS NOT NULL"
    if "dataset_uid" in table.schema.names:
        where += f" AND NOT ({tables.one_of('dataset_uid', note.dataset_uids)})"
    elif table.name in catalog.names.registries.values():
        where += " AND global_index IS NOT NULL"
    return table.count_rows(where) > 0
