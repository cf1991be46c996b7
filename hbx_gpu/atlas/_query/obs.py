"""Reads obs tables at their pinned versions into NumPy, batch by batch: no Python object per row.

Rows are sorted here by ascending ``_rowid``; nothing relies on the order in which a scan delivers them.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, cast

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from hbx_gpu._buffers import give_back_unused
from hbx_gpu._plan.index import IndexMaker
from hbx_gpu._source import BoxIndex, ObsColumns, RowTable
from hbx_gpu.atlas._query.encoders import (
    Encoder,
    GrowingVocabulary,
    encoder_of,
    is_bool,
    is_categorical,
    is_text,
    narrow,
    plain,
)
from hbx_gpu.atlas._query.ids import IdMaker, IdRuns, id_runs
from hbx_gpu.errors import CorruptDataError, TableError, UnknownNameError

if TYPE_CHECKING:
    from lancedb.table import Table

    from hbx_gpu.atlas._catalog.snapshot import PointerColumn, Snapshot

ROWID = "_rowid"
_BATCH_ROWS = 65_536
_MANY_ROWS = 1 << 22
_TAKE_AT_MOST = 4_096
"""Up to this many rows are fetched by id; more are read by a scan that keeps the requested ones."""


def column_expression(*path: str) -> str:
    """SQL for a column, or a member of a struct column, whatever characters its name holds."""
    return ".".join(f"`{name}`" for name in path)


def check_columns(schema: pa.Schema, names: Sequence[str]) -> None:
    """Raise for columns that `schema` lacks.

    Raises
    ------
    UnknownNameError
        A column does not exist; the message lists those that do.
    """
    if missing := [name for name in names if name not in schema.names]:
        raise UnknownNameError(f"unknown obs column(s) {missing}; the table has {schema.names}")


_OF_FILTERS = re.compile("filter|Invalid user input|Schema error: No field|Error during planning")


@contextmanager
def explain_filter(where: str | None) -> Iterator[None]:
    """Turn database errors about a malformed filter into a ValueError that shows the filter."""
    try:
        yield
    except TableError as failed:
        error = failed.__cause__
        # Some filters fail only on the values. Older releases raise other errors than ValueError.
        if where is None or not (isinstance(error, ValueError) or _OF_FILTERS.search(str(error))):
            raise
        reason = re.sub(r",? /\S+\.rs:\d+(:\d+)?", "", str(error))
        raise ValueError(f"where({where!r}) is not a valid filter: {reason}") from error


def scan(
    table: Table,
    columns: Sequence[str] | Mapping[str, str],
    *,
    where: str | None = None,
    also: str | None = None,
    rowids: np.ndarray | None = None,
    limit: int | None = None,
) -> Iterator[pa.RecordBatch]:
    """Stream the rows of a table, in no promised order.

    Parameters
    ----------
    table
        Checked out at its pinned version.
    columns
        Names, or output name -> SQL expression.
    where
        SQL filter of the user, shown where it is malformed.
    also
        Second filter, which the rows must match too.
    rowids
        uint64, ascending, distinct: return only these of the matching rows.
    limit
        Return so many of the matching rows, whichever the database finds first; None for all.

    Yields
    ------
    pyarrow.RecordBatch
        The columns, then ``_rowid``.

    Raises
    ------
    ValueError
        Malformed filter.
    """
    if rowids is not None and not len(rowids):
        return
    wanted: Any = dict(columns) if isinstance(columns, Mapping) else list(columns)
    if rowids is not None and len(rowids) <= _TAKE_AT_MOST:
        # The ids came from this filter, so it need not run again.
        taken = table.take_row_ids(rowids.tolist()).select(wanted).with_row_id().to_arrow()
        if len(taken) != len(rowids):
            raise CorruptDataError(f"asked the obs table for {len(rowids)} rows by id and got {len(taken)}")
        yield from taken.to_batches()
        return
    conditions = [condition for condition in (where, also) if condition is not None]
    query = table.search().where(both(*conditions)) if conditions else table.search()
    if limit is not None:
        query = query.limit(limit)
    with explain_filter(where):
        for batch in query.select(wanted).with_row_id(True).to_batches(_BATCH_ROWS):
            if rowids is not None:
                ids = batch.column(ROWID).to_numpy()
                at = np.minimum(np.searchsorted(rowids, ids), len(rowids) - 1)
                batch = batch.filter(pa.array(rowids[at] == ids))
            if batch.num_rows:
                yield batch


def first_rows(
    table: Table,
    count: int | None,
    *,
    where: str | None,
    also: str | None = None,
    column: str = ROWID,
) -> np.ndarray:
    """Numbers of the first `count` matching rows, without reading those of all rows.

    A scan usually delivers ascending row ids, but not once a table was compacted. So `count` matching rows
    are read in whatever order: the largest of their numbers bounds the numbers wanted, and a second query
    returns the matching rows up to that bound, which are few more than `count` where the order was the usual
    one.

    Parameters
    ----------
    table, where, also
        As in :func:`scan`.
    count
        Number of rows at most; None for all.
    column
        The numbers: ``_rowid``, or a column of distinct int64 by which rows are ordered.

    Returns
    -------
    numpy.ndarray
        uint64 row ids, or int64 values of `column`: ascending, at most `count`.

    Raises
    ------
    ValueError
        Malformed filter.
    """
    named, kind = ([], np.uint64) if column == ROWID else ([column], np.int64)

    def ascending(also: str | None, limit: int | None) -> np.ndarray:
        batches = scan(table, named, where=where, also=also, limit=limit)
        return np.sort(np.concatenate([np.empty(0, kind), *(b.column(column).to_numpy() for b in batches)]))

    if count == 0:
        return np.empty(0, kind)
    found = ascending(also, count)
    if count is None or len(found) < count:
        return found
    bound = f"{column} <= {found[-1]}"
    return ascending(bound if also is None else both(also, bound), None)[:count]


def both(*filters: str) -> str:
    """SQL filter for the rows that match all of some filters; a single one stays as it is.

    Each is on its own line, so that a comment at the end of one does not swallow the next.
    """
    return filters[0] if len(filters) == 1 else " AND ".join(f"({one}\n)" for one in filters)


def read_table(
    table: Table, names: Sequence[str], *, where: str | None = None, rowids: np.ndarray | None = None
) -> pa.Table:
    """Columns of the matching rows by ascending row id, with the table's own types.

    Integer and boolean fields are marked if any row of the whole table lacks a value: see :func:`has_gaps`.
    """
    schema = pa.schema([_marked(table, table.schema.field(name)) for name in names])
    batches = list(scan(table, names, where=where, rowids=rowids))
    if not batches:
        return schema.empty_table()
    found = pa.Table.from_batches(batches)
    for name in names:
        if pa.types.is_dictionary(schema.field(name).type):
            at = found.schema.get_field_index(name)
            found = found.set_column(at, name, _recoded(found.column(name), schema.field(name).type))
    order = _ascending(found.column(ROWID).to_numpy())
    if order is not None:
        found = found.take(pa.array(order))
    columns = [found.column(name).cast(schema.field(name).type) for name in names]
    return pa.Table.from_arrays(columns, schema=schema) if names else found.select([])


_GAPS_KEY = b"hbx_gpu.has_gaps"
# (table, version, column) -> whether some row lacks a value; a version never changes.
_gaps: dict[tuple[str, int, str], bool] = {}


def _marked(table: Table, column: pa.Field) -> pa.Field:
    kind = column.type
    if not column.nullable or not (pa.types.is_integer(kind) or pa.types.is_boolean(kind)):
        return column
    at: Any = table  # a LanceTable, whose base class does not declare its location
    key = (str(at.uri), int(table.version), column.name)
    if key not in _gaps:
        _gaps[key] = table.count_rows(f"`{column.name}` IS NULL") > 0
    return column.with_metadata({**(column.metadata or {}), _GAPS_KEY: b"yes"}) if _gaps[key] else column


def has_gaps(column: pa.Field) -> bool:
    """Whether some row of the table that a column was read from lacks a value."""
    return _GAPS_KEY in (column.metadata or {})


def _recoded(column: pa.ChunkedArray, kind: pa.DictionaryType) -> pa.DictionaryArray:
    """Encode with one dictionary of sorted distinct values; scans deliver one per batch, with repeats."""
    values = column.cast(kind.value_type)
    distinct = pc.drop_null(values.unique())
    distinct = distinct.take(pc.sort_indices(distinct))
    codes = pc.index_in(values, value_set=distinct).cast(kind.index_type).combine_chunks()
    return pa.DictionaryArray.from_arrays(codes, distinct, ordered=kind.ordered)


def _ascending(ids: np.ndarray) -> np.ndarray | None:
    """Permutation that sorts `ids`, None if they are already sorted."""
    if (ids[1:] > ids[:-1]).all():
        return None
    return np.argsort(ids, kind="stable")


# Vocabularies and columns


def categories(snapshot: Snapshot, table: str, column: str) -> np.ndarray | None:
    """Vocabulary of a column over all rows of the table at this snapshot, whatever a query selects.

    Returns
    -------
    numpy.ndarray or None
        object (strings, sorted, no missing) or bool (``[False, True]``); None for other types.

    Raises
    ------
    UnknownNameError
        No such column.
    """
    schema = snapshot.obs_schema(table)
    check_columns(schema, [column])
    kind = schema.field(column).type
    if not is_categorical(kind):
        return None
    if is_bool(kind):
        return np.array([False, True])
    result: np.ndarray | None = (
        _vocabulary(snapshot, table, column).to_numpy(zero_copy_only=False).astype(object)
    )
    return result


def _vocabulary(snapshot: Snapshot, table: str, column: str) -> pa.Array:
    key = (table, column)
    if key not in snapshot.vocabularies:
        pieces = [
            pc.drop_null(plain(batch.column(0)).cast(pa.string()).unique())
            for batch in scan(snapshot.obs_table(table), [column])
        ]
        distinct = pa.chunked_array(pieces, type=pa.string()).unique()
        snapshot.vocabularies[key] = distinct.take(pc.sort_indices(distinct))
    return snapshot.vocabularies[key]


# Rows of a modality


@dataclass(frozen=True, slots=True)
class ModalityRows:
    """Rows of a modality, by ascending row id.

    Attributes
    ----------
    ids
        Row id of each row.
    groups
        Sorted names of the zarr groups that occur; `rows.source` is an index into this list.
    rows
        Place of each row in its group; source is -1 where the row lacks the modality.
    obs
        Requested obs columns.
    """

    ids: IdRuns
    groups: list[str]
    rows: RowTable | BoxIndex
    obs: ObsColumns

    @property
    def rowids(self) -> np.ndarray:
        """uint64, (n,). Row id of each row, made anew at each call."""
        return self.ids.all()


def some_rows(found: ModalityRows, keep: np.ndarray) -> ModalityRows:
    """The rows for which the mask `keep` is True."""
    if keep.all():
        return found
    rows = found.rows.at(np.flatnonzero(keep))
    columns = {name: column[keep] for name, column in found.obs.columns.items()}
    return ModalityRows(
        id_runs(found.rowids[keep]), found.groups, rows, ObsColumns(columns, found.obs.categories)
    )


def is_present(pointer: PointerColumn) -> str:
    """SQL filter for the rows that have the modality of a pointer column, as :func:`present` finds them."""
    return f"{column_expression(pointer.name, 'zarr_group')} != ''"


def present(groups: pa.Array) -> np.ndarray:
    """bool, (n,). True for rows that have the modality: the name is neither null nor empty."""
    return cast(np.ndarray, pc.fill_null(pc.not_equal(groups, ""), False).to_numpy(zero_copy_only=False))


def read_modality(
    snapshot: Snapshot,
    table: str,
    pointer: PointerColumn,
    columns: Sequence[str] = (),
    *,
    where: str | None = None,
    rowids: np.ndarray | None = None,
    absent: bool = False,
) -> ModalityRows:
    """Pointers and columns of the matching rows that have a modality, in one scan.

    Parameters
    ----------
    snapshot, table, pointer
        What to read.
    columns
        Obs columns to return.
    where, rowids
        As in :func:`scan`.
    absent
        Whether to return rows without the modality too.

    Raises
    ------
    UnknownNameError
        No such column.
    CorruptDataError
        A pointer is incomplete, negative, ends before it starts, or spans more than 2^31 - 1 elements.
    """
    schema = snapshot.obs_schema(table)
    check_columns(schema, columns)
    growing: dict[str, GrowingVocabulary] = {}
    if where is None and rowids is None:
        # All rows are read, so the words of a column are found with its codes.
        unknown = [name for name in columns if (table, name) not in snapshot.vocabularies]
        kinds = {name: schema.field(name).type for name in unknown}
        growing = {n: GrowingVocabulary() for n, kind in kinds.items() if is_text(kind)}
    encoders, vocabularies = _encoders(snapshot, table, [name for name in columns if name not in growing])
    # Aliases, because a column of the user may be called "start".
    alias = {name: f"column {name}" for name in columns}
    lower, upper = _BOUNDS[pointer.kind]
    wanted = {
        "group": column_expression(pointer.name, "zarr_group"),
        "lower": column_expression(pointer.name, lower),
        "upper": column_expression(pointer.name, upper),
        **{alias[name]: column_expression(name) for name in columns},
    }
    spatial = pointer.kind == "discrete_spatial"
    names: dict[str, int] = {}
    ids, places = IdMaker(), IndexMaker()
    pieces: dict[str, list[np.ndarray]] = {name: [] for name in alias.values()}
    if spatial:
        pieces |= {"group": [np.empty(0, np.int32)]}
        pieces |= {key: [np.empty((0, 0), np.int64)] for key in ("start", "length")}
    for batch in scan(snapshot.obs_table(table), wanted, where=where, rowids=rowids):
        group_of, ends = _runs(batch.column("group"))
        there = np.repeat(present(group_of), np.diff(ends, prepend=0))
        codes = {alias[name]: grow(batch.column(alias[name])) for name, grow in growing.items()}
        if not absent and not there.all():
            codes = {shown: part[there] for shown, part in codes.items()}
            batch = batch.filter(pa.array(there))
            group_of, ends = _runs(batch.column("group"))
            there = there[there]
        start, length = (_boxes if spatial else _extents)(snapshot, table, pointer, batch, there)
        group = _group_codes(group_of, ends, names)
        ids.add(batch.column(ROWID).to_numpy())
        if spatial:
            for key, part in (("group", group), ("start", start), ("length", length)):
                pieces[key].append(part)
        else:
            places.add(group, start, length)
        for shown, part in codes.items():
            pieces[shown].append(part)
        for name, encode in encoders.items():
            # Copies, because views would keep the whole batch in memory.
            pieces[alias[name]].append(encode(batch.column(alias[name])).copy())
    for name, grow in growing.items():
        words, whole = grow.finish(pieces[alias[name]])
        pieces[alias[name]] = [whole]
        snapshot.vocabularies[table, name] = words
        vocabularies[name] = words.to_numpy(zero_copy_only=False).astype(object)
    for name, encode in encoders.items():
        shown = alias[name]
        pieces[shown] = pieces[shown] or [encode(pa.array([], type=schema.field(name).type))]
    if spatial:
        n_axes = max(part.shape[1] for part in pieces["start"])
        for key, filling in (("start", 0), ("length", -1)):
            pieces[key] = [_wider(part, n_axes, filling) for part in pieces[key]]

    found = ids.finish()
    order = None if found.ascending else np.argsort(found.all(), kind="stable")

    def joined(key: str) -> np.ndarray:
        whole = np.concatenate(pieces.pop(key))
        return whole if order is None else whole[order]

    groups = sorted(names)
    rank = np.empty(len(groups) + 1, dtype=np.int32)
    rank[[names[group] for group in groups]] = np.arange(len(groups), dtype=np.int32)
    rank[-1] = -1  # rows without the modality
    index: RowTable | BoxIndex
    if spatial:
        index = BoxIndex(rank[joined("group")], joined("start"), joined("length"))
    else:
        compact = places.finish()
        index = compact = replace(compact, run_source=rank[compact.run_source])
        if order is not None:
            index = compact.plain().at(order)
    kept = ObsColumns({name: joined(shown) for name, shown in alias.items()}, vocabularies)
    if len(found) >= _MANY_ROWS:
        pa.default_memory_pool().release_unused()
        give_back_unused()
    return ModalityRows(found if order is None else id_runs(found.all()[order]), groups, index, kept)


_BOUNDS = {
    "sparse": ("start", "end"),
    "dense": ("position", "position"),
    "discrete_spatial": ("min_corner", "max_corner"),
}


def _wider(part: np.ndarray, n_axes: int, filling: int) -> np.ndarray:
    """Pad corners to the largest number of axes in the table."""
    return np.pad(part, ((0, 0), (0, n_axes - part.shape[1])), constant_values=filling)


def _encoders(
    snapshot: Snapshot, table: str, columns: Sequence[str]
) -> tuple[dict[str, Encoder], dict[str, np.ndarray]]:
    """Encoder of each column, and the vocabularies of columns that become codes."""
    encoders: dict[str, Encoder] = {}
    vocabularies: dict[str, np.ndarray] = {}
    for name in columns:
        kind = snapshot.obs_schema(table).field(name).type
        words = None
        if (coded := categories(snapshot, table, name)) is not None:
            vocabularies[name] = coded
            words = None if is_bool(kind) else _vocabulary(snapshot, table, name)
        encoders[name] = encoder_of(kind, words)
        if coded is not None:
            encoders[name] = narrow(encoders[name], len(coded))
    return encoders, vocabularies


def _extents(
    snapshot: Snapshot, table: str, pointer: PointerColumn, batch: pa.RecordBatch, there: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """First element and number of elements of each row; both 0 for rows without the modality."""
    # A missing number cannot be a position; -1 fails the check.
    start, end = (pc.fill_null(batch.column(name), -1).to_numpy() for name in ("lower", "upper"))
    length = end - start
    if pointer.kind == "dense":
        length += 1
    if not there.all():
        start, length = np.where(there, start, 0), np.where(there, length, 0)
    most = np.iinfo(np.int32).max
    if min(start.min(initial=0), length.min(initial=0)) < 0 or length.max(initial=0) > most:
        row = int(np.flatnonzero((start < 0) | (length < 0) | (length > most))[0])
        end = start + length
        raise _bad_pointer(snapshot, table, pointer, batch, row, f"[{start[row]}, {end[row]})")
    return start, length.astype(np.int32)


def _boxes(
    snapshot: Snapshot, table: str, pointer: PointerColumn, batch: pa.RecordBatch, there: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """First element and number of elements per axis, int64 (n, n_axes), of boxes.

    Boxes with fewer axes than others have 0 and -1 (the full axis) on the remaining axes; rows without the
    modality have 0 and 0.
    """
    lower, upper = (pc.list_value_length(batch.column(name)) for name in ("lower", "upper"))
    axes = pc.fill_null(lower, -1).to_numpy().astype(np.int64)
    agree = axes == pc.fill_null(upper, -1).to_numpy()
    n_axes = int(axes[there].max(initial=0))
    start = np.zeros((len(batch), n_axes), np.int64)
    length = np.full((len(batch), n_axes), -1, np.int64)
    length[~there] = 0
    good = there & agree & (axes > 0)
    inside = (np.arange(n_axes) < axes[:, None]) & good[:, None]
    kept = batch.filter(pa.array(good))
    corners = [pc.fill_null(pc.list_flatten(kept.column(name)), -1).to_numpy() for name in ("lower", "upper")]
    start[inside] = corners[0]
    length[inside] = corners[1] - corners[0]
    bad = np.flatnonzero(there & (~good | (inside & ((start < 0) | (length < 0))).any(axis=1)))
    if bad.size:
        row = int(bad[0])
        found = f"{batch.column('lower')[row].as_py()} to {batch.column('upper')[row].as_py()}"
        raise _bad_pointer(snapshot, table, pointer, batch, row, found)
    return start, length


def _bad_pointer(
    snapshot: Snapshot, table: str, pointer: PointerColumn, batch: pa.RecordBatch, row: int, found: str
) -> CorruptDataError:
    return CorruptDataError(
        f"pointer {pointer.name!r} of row {row_uid(snapshot, table, batch.column(ROWID)[row].as_py())!r} "
        f"into group {batch.column('group')[row].as_py()!r} is not a valid range: {found}"
    )


def _group_codes(group_of: pa.Array, ends: np.ndarray, names: dict[str, int]) -> np.ndarray:
    """Group number of each row, -1 where it has none; groups not seen before are added to `names`.

    `group_of` and `ends` are runs of rows, as :func:`_runs` finds them.
    """
    there = present(group_of)
    encoded = group_of.filter(pa.array(there)).dictionary_encode()
    codes = [names.setdefault(name, len(names)) for name in encoded.dictionary.to_pylist()]
    of_run = np.full(len(group_of), -1, np.int32)
    of_run[there] = np.array(codes, dtype=np.int32)[encoded.indices.to_numpy()]
    return np.repeat(of_run, np.diff(ends, prepend=0))


def _runs(texts: pa.Array) -> tuple[pa.Array, np.ndarray]:
    """The value of each run of equal neighbors, and the number of the row after each run.

    Rows of a group mostly follow each other, so there are few runs. Names of groups mostly have the same
    length, and then their bytes are compared as they lie, in a third of the time.
    """
    n = len(texts)
    if n and not texts.null_count and texts.type == pa.string():
        _, at, text = texts.buffers()
        offsets = np.frombuffer(at, np.int32)[texts.offset : texts.offset + n + 1]
        width = int(offsets[1] - offsets[0])
        if width and (np.diff(offsets) == width).all():
            word = np.dtype(f"u{math.gcd(width, 8)}")
            words = np.frombuffer(text, np.uint8)[offsets[0] : offsets[-1]].view(word)
            per_row = width // word.itemsize
            changed = words[per_row:] != words[:-per_row]
            if np.count_nonzero(changed) <= n:
                begins = np.unique(np.flatnonzero(changed) // per_row) + 1
                return texts.take(pa.array(np.append(0, begins))), np.append(begins, n)
    runs = pc.run_end_encode(texts)
    return runs.values, runs.run_ends.to_numpy()


def row_uid(snapshot: Snapshot, table: str, rowid: int) -> str:
    """Uid of a row, used in error messages."""
    rows = read_table(snapshot.obs_table(table), ["uid"], rowids=np.array([rowid], dtype=np.uint64))
    return str(rows.column("uid")[0].as_py())
