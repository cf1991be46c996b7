"""Arrow types of obs and var columns that are written to a table, and how differing types merge."""

from __future__ import annotations

import logging
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from hbx_gpu._advice import option
from hbx_gpu.atlas._model.column_types import (
    EXACT_IN_DOUBLE,
    NAMED_TYPES,
    Column,
    cast_sql,
    convert,
    is_empty,
    is_text,
    join_types,
    value_type,
)
from hbx_gpu.errors import InvalidDataError

if TYPE_CHECKING:
    import pandas as pd

_log = logging.getLogger(__name__)

# LanceDB reserves these names.
_DATABASE_NAMES = {
    "_rowid",
    "_rowaddr",
    "_rowoffset",
    "_distance",
    "_score",
    "_relevance_score",
    "_row_created_at_version",
    "_row_last_updated_at_version",
}
NAME_IN_FILE = b"hbx_gpu.name_in_file"
"""Metadata key of a field: the name of its column in the source files, where that differs."""


@dataclass(frozen=True, slots=True)
class Merge:
    """Changes that a table needs before it can take the columns of some data.

    Attributes
    ----------
    new
        Fields to add.
    changed
        Existing columns that change type: name -> new type, and the SQL expression that gives the values.
    left_out
        Columns of the data that are not stored.
    notes
        Sentences that tell the user which columns change type.
    """

    new: tuple[pa.Field, ...]
    changed: Mapping[str, tuple[pa.DataType, str]] = field(default_factory=dict)
    left_out: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()


def to_arrow(
    frame: pd.DataFrame,
    *,
    reserved: Collection[str],
    source: str,
    known: Mapping[str, str] | None = None,
    types: Mapping[str, str] | None = None,
    lenient: bool = False,
) -> pa.Table:
    """Columns of a data frame in the types that tables of an atlas use.

    Integers become int64, floating point numbers double (NaN: missing), strings and categories of
    strings string, times timestamp[us]; booleans stay. The index is left out. Fields of columns that are
    stored under another name carry the name in the file.

    Parameters
    ----------
    frame
        obs or var.
    reserved
        Names that the table uses for something else; such columns get the suffix ``_in_file``.
    source
        File and table, for messages.
    known
        Name in a file -> name in the table, for the columns that the table has; see :func:`names_in_files`.
    types
        Column -> name of the requested type (see `column_types.NAMED_TYPES`); rounding is accepted.
    lenient
        Leave out a column that cannot be stored, with a warning, instead of raising.

    Raises
    ------
    InvalidDataError
        The values of a column have no common type or do not fit the type; the message names the column.
    """
    names = stored_names([str(name) for name in frame.columns], reserved, known)
    types = types or {}
    arrays, fields = [], []
    for i, (old, new) in enumerate(names.items()):
        where = f"{source}, column {old!r}"
        try:
            array = (
                _as_asked(frame.iloc[:, i], types[old], where)
                if old in types
                else (_column(frame.iloc[:, i], where))
            )
        except InvalidDataError as error:
            if not lenient:
                raise
            _log.warning("%s; the column is left out", error)
            continue
        if old != new:
            _log.warning("%s: column %r is stored as %r", source, old, new)
        arrays.append(array)
        fields.append(
            pa.field(new, array.type, metadata={NAME_IN_FILE: old.encode()} if old != new else None)
        )
    return pa.Table.from_arrays(arrays, schema=pa.schema(fields))


def names_in_files(schema: pa.Schema) -> dict[str, str]:
    """Name in a file -> name in the table, for all columns of a table."""
    return {(f.metadata or {}).get(NAME_IN_FILE, f.name.encode()).decode(): f.name for f in schema}


def stored_names(
    names: Sequence[str], reserved: Collection[str], known: Mapping[str, str] | None = None
) -> dict[str, str]:
    """Name in a file -> name in the table: no dots or backticks, none reserved, none twice.

    A column keeps the name that the table has for it, and never gets one that the table has for another:
    ``percent.mt`` of one file and ``percent_mt`` of another stay two columns.

    Raises
    ------
    InvalidDataError
        The file itself has a name twice.
    """
    if len(set(names)) != len(names):
        twice = sorted({name for name in names if list(names).count(name) > 1})
        raise InvalidDataError(f"column names occur more than once: {twice}; rename them in the file")
    blocked = set(reserved) | _DATABASE_NAMES
    known = {name: stored for name, stored in (known or {}).items() if stored not in blocked}
    out = {name: known[name] for name in names if name in known}
    taken = set(known.values())
    # Names that can stay are given out first, so that a renamed column yields to them.
    stay = {name for name in names if name not in {*known, *taken, *blocked} and _plain(name) == name}
    out |= {name: name for name in stay}
    taken |= stay
    for name in names:
        if name in out:
            continue
        new = _plain(name)
        if new in blocked:
            new += "_in_file"
        while new in taken | blocked:
            new += "_"
        taken.add(new)
        out[name] = new
    return {name: out[name] for name in names}


def _plain(name: str) -> str:
    # LanceDB reads a dot as a step into a struct; backticks would end a quoted name in SQL.
    return name.replace(".", "_").replace("`", "_") or "unnamed"


def _column(values: pd.Series, where: str) -> pa.Array:
    advice = (
        f"leave the column out with {option('drop_obs')}, or store it as one type that an atlas knows: "
        "numbers, strings, booleans or times"
    )
    if values.dtype.kind == "c":
        raise InvalidDataError(
            f"{where}: complex numbers cannot be stored; store real and imaginary part as two columns, or "
            f"leave the column out with {option('drop_obs')}"
        )
    try:
        array = pa.Array.from_pandas(values)
        if isinstance(array, pa.ChunkedArray):
            array = array.combine_chunks()
        if pa.types.is_dictionary(array.type):
            array = array.dictionary_decode()
        if pa.types.is_uint64(array.type) and len(array) and (pc.max(array).as_py() or 0) >= 2**63:
            raise InvalidDataError(
                f"{where}: {pc.max(array).as_py()} does not fit the 64-bit signed integers that an atlas "
                f"stores; store the column as text with {option('obs_types')}, or leave it out with "
                f"{option('drop_obs')}"
            )
        return array.cast(_stored_type(array.type, where))
    except (pa.ArrowException, OverflowError, TypeError) as error:
        raise InvalidDataError(f"{where}: {error}; {advice}") from error


def _as_asked(values: pd.Series, name: str, where: str) -> pa.Array:
    wanted = NAMED_TYPES[name]
    try:
        array = _column(values, where)
    except InvalidDataError:
        if not is_text(wanted):
            raise
        # Every value has a text form.
        return pa.array([None if no else str(v) for v, no in zip(values, values.isna(), strict=True)], wanted)
    try:
        if pa.types.is_integer(array.type) and pa.types.is_floating(wanted):
            return array.cast(wanted, safe=False)
        return convert(array, wanted, where)
    except InvalidDataError as error:
        raise InvalidDataError(f"{error}, as {option('obs_types')} asks for") from error


def _stored_type(found: pa.DataType, where: str) -> pa.DataType:
    kind = pa.types
    if kind.is_integer(found):
        return pa.int64()
    if kind.is_floating(found):
        return pa.float64()
    if kind.is_boolean(found) or kind.is_null(found):
        return found
    if is_text(found):
        return pa.string()
    if kind.is_timestamp(found):
        return pa.timestamp("us", tz=found.tz)
    if kind.is_date(found):
        return pa.timestamp("us")
    if kind.is_list(found) or kind.is_large_list(found):
        return pa.list_(_stored_type(found.value_type, where))
    raise InvalidDataError(
        f"{where}: values of type {found} cannot be stored; turn them into numbers, strings, booleans or "
        f"times, or leave the column out with {option('drop_obs')}"
    )


def plan_merge(
    schema: pa.Schema,
    data: pa.Table,
    *,
    allow_new: bool,
    source: str,
    stored: Callable[[str], pa.ChunkedArray],
    lenient: bool = False,
) -> Merge:
    """How a table with `schema` must change so that it can take the columns of `data`.

    Parameters
    ----------
    schema, data
        Schema of the table, and the arriving data.
    allow_new
        Add columns that the table lacks, and let columns change type; otherwise columns that do not fit are
        left out or refused.
    source
        Name of the data, used in error messages.
    stored
        Function that reads a column of the table.
    lenient
        Leave out a column that cannot be merged, with a warning, instead of raising.

    Raises
    ------
    InvalidDataError
        A column has one type in the table and an incompatible one in the data.
    """
    new: list[pa.Field] = []
    changed: dict[str, tuple[pa.DataType, str]] = {}
    left_out: list[str] = []
    notes: list[str] = []
    for column in data.schema:
        if column.name not in schema.names:
            # A column whose values are all missing and whose type is unknown holds nothing to store.
            if pa.types.is_null(column.type):
                continue
            if allow_new:
                new.append(column)
            else:
                left_out.append(column.name)
            continue
        where = f"{source}, column {column.name!r}"
        try:
            change = _change(schema.field(column.name), data.column(column.name), allow_new, where, stored)
        except InvalidDataError as error:
            if not lenient:
                raise
            _log.warning("%s; the column is left out", error)
            left_out.append(column.name)
            continue
        if change is not None:
            notes.append(f"{where}: the atlas holds {change[0]}, the file {change[1]}; stored as {change[2]}")
            changed[column.name] = (change[2], change[3])
    if left_out and not lenient:
        _log.info("%s: columns %s are not in the table's schema class and left out", source, left_out)
    return Merge(tuple(new), changed, tuple(left_out), tuple(notes))


def _change(
    there: pa.Field,
    values: pa.ChunkedArray,
    allow_new: bool,
    where: str,
    stored: Callable[[str], pa.ChunkedArray],
) -> tuple[pa.DataType, pa.DataType, pa.DataType, str] | None:
    """Stored type, arriving type, joined type, SQL for the stored values; None if these stay unchanged."""
    kind, new = pa.types, values.type
    mixed = kind.is_integer(new) and kind.is_floating(there.type)
    zones = kind.is_timestamp(new) and kind.is_timestamp(there.type) and new.tz != there.type.tz
    if new == there.type or (fits(new, there.type) and not (mixed and allow_new) and not zones):
        return None
    if not allow_new and not (kind.is_floating(new) and kind.is_integer(there.type)) and not is_empty(values):
        raise InvalidDataError(
            f"{where}: the table's schema class says {there.type}, the file has {new}; convert the column in "
            f"the file, or leave it out with {option('drop_obs')}"
        )
    here = Column(there.type, lambda: stored(there.name))
    joined = join_types(here, Column(new, lambda: values), where)
    if joined == there.type or (joined == value_type(there.type)):
        return None
    return there.type, new, joined, cast_sql(there.name, here, joined)


def merged_schema(schema: pa.Schema, merge: Merge) -> pa.Schema:
    """Schema of a table after a merge."""
    changed = [f.with_type(merge.changed[f.name][0]) if f.name in merge.changed else f for f in schema]
    return pa.schema([*changed, *merge.new], schema.metadata)


def fits(found: pa.DataType, wanted: pa.DataType) -> bool:
    """Whether values of one type go into a column of another (each must still be exact there)."""
    kind = pa.types
    if kind.is_dictionary(found):
        found = found.value_type
    if kind.is_struct(found) and kind.is_struct(wanted):
        return {f.name for f in found} <= {f.name for f in wanted}
    if found == wanted or kind.is_null(found):
        return True
    if kind.is_dictionary(wanted):
        return fits(found, wanted.value_type)
    for same in (kind.is_integer, kind.is_floating, kind.is_timestamp):
        if same(found) and same(wanted):
            return True
    if kind.is_integer(found) and kind.is_floating(wanted):
        return True
    text = (kind.is_string, kind.is_large_string)
    if any(t(found) for t in text) and any(t(wanted) for t in text):
        return True
    lists = (kind.is_list, kind.is_large_list, kind.is_fixed_size_list)
    return (
        any(t(found) for t in lists)
        and any(t(wanted) for t in lists)
        and fits(found.value_type, wanted.value_type)
    )


def fit(
    data: pa.Table,
    schema: pa.Schema,
    *,
    defaults: Mapping[str, object] | None = None,
    source: str,
    table: str,
) -> pa.Table:
    """`data` with exactly the columns of a table, in its order and types; nothing is rounded.

    Parameters
    ----------
    data
        The data; columns that `schema` lacks are left out.
    schema
        Schema of the table.
    defaults
        One value per column that the data lack, used for all rows.
    source, table
        Name of the data, used in error messages.

    Raises
    ------
    InvalidDataError
        A required column is missing or has missing values; a value does not fit its column exactly.
    """
    columns = []
    for column in schema:
        if column.name in data.schema.names:
            array = data.column(column.name).combine_chunks()
            array = _cast(array, column.type, f"{source}, column {column.name!r}")
        else:
            array = _constant((defaults or {}).get(column.name), column.type, len(data))
        if array.null_count and not column.nullable:
            missing = "is missing" if array.null_count == len(data) else f"lacks {array.null_count} values"
            raise InvalidDataError(
                f"{source}: column {column.name!r} {missing}, but table {table!r} requires it for every row; "
                "add it to the file"
            )
        columns.append(array)
    return pa.Table.from_arrays(columns, schema=schema)


def _cast(array: pa.Array, wanted: pa.DataType, where: str) -> pa.Array:
    if array.type == wanted:
        return array
    if is_empty(array):
        return pa.nulls(len(array), wanted)
    if pa.types.is_dictionary(wanted):
        return convert(array, wanted.value_type, where).dictionary_encode().cast(wanted)
    if pa.types.is_integer(array.type) and pa.types.is_floating(wanted):
        check_exact(array, where)
    out = convert(array, wanted, where)
    if pa.types.is_floating(wanted):
        same = pc.all(pc.equal(out.cast(pa.float64()), convert(array, pa.float64(), where)))
        if same.as_py() is False:  # None means that there is nothing to compare
            raise InvalidDataError(
                f"{where}: not every value is exact in {wanted}, as which the atlas stores it"
            )
    return out


def check_exact(array: pa.Array | pa.ChunkedArray, where: str) -> None:
    """Refuse integers that would change when they become doubles."""
    extent = pc.min_max(array)
    for value in (extent["min"].as_py(), extent["max"].as_py()):
        if value is not None and abs(value) > EXACT_IN_DOUBLE:
            raise InvalidDataError(
                f"{where}: {value} is too large to be stored exactly as double, which the column must become "
                "to hold fractions too; rename one of the two columns"
            )


def _constant(value: object, kind: pa.DataType, length: int) -> pa.Array:
    if value is None:
        return pa.nulls(length, kind)
    if pa.types.is_dictionary(kind):
        return pa.array([value] * length, kind.value_type).dictionary_encode().cast(kind)
    return pa.array(np.full(length, value) if not isinstance(value, list | dict) else [value] * length, kind)


def features_table(features: Any, source: str) -> pa.Table:
    """Features in any form (records of a schema class, pandas, Arrow, polars) as a table without indices.

    Raises
    ------
    ValueError
        There is no column ``uid``.
    """
    if isinstance(features, Sequence):
        import pandas as pd

        features = pd.DataFrame([record.model_dump() for record in features])
    elif not isinstance(features, pa.Table) and hasattr(features, "to_arrow"):  # polars, which is optional
        features = features.to_arrow()
    if not isinstance(features, pa.Table):
        if "uid" not in features.columns and features.index.name == "uid":
            features = features.reset_index()
        features = to_arrow(features, reserved=(), source=source)
    if "uid" not in features.schema.names:
        raise ValueError(f"{source}: expected a column 'uid', found {features.schema.names}")
    return features.drop_columns([name for name in ("global_index",) if name in features.schema.names])
