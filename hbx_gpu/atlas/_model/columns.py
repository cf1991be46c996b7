"""Columns of obs and var on their way into a table: their Arrow types, and how differing ones merge."""

from __future__ import annotations

import logging
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from hbx_gpu.errors import InvalidDataError

if TYPE_CHECKING:
    import pandas as pd

_log = logging.getLogger(__name__)

# Names that LanceDB gives a meaning of its own.
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
# float64 holds every integer up to here.
_EXACT_IN_DOUBLE = 2**53


@dataclass(frozen=True, slots=True)
class Merge:
    """What a table needs before columns of some data fit in.

    Attributes
    ----------
    new
        Fields to add.
    to_double
        Integer columns that become double.
    """

    new: tuple[pa.Field, ...]
    to_double: tuple[str, ...]


def to_arrow(frame: pd.DataFrame, *, reserved: Collection[str], source: str) -> pa.Table:
    """Columns of a data frame in the types that tables of an atlas use.

    Integers become int64, floating point numbers double (NaN: missing), strings and categories of
    strings string, times timestamp[us]; booleans stay. The index is left out.

    Parameters
    ----------
    frame
        obs or var.
    reserved
        Names that mean something else in the table: such columns get the suffix ``_in_file``.
    source
        File and table, for messages.

    Raises
    ------
    InvalidDataError
        Names a column whose values have no common type or do not fit the type.
    """
    names = stored_names([str(name) for name in frame.columns], reserved)
    for old, new in names.items():
        if old != new:
            _log.warning("%s: column %r is stored as %r", source, old, new)
    arrays = [_column(frame.iloc[:, i], f"{source}, column {name!r}") for i, name in enumerate(names)]
    return pa.table(arrays, names=list(names.values())) if arrays else pa.table({})


def stored_names(names: Sequence[str], reserved: Collection[str]) -> dict[str, str]:
    """Name in a file -> name in the table: no dots or backticks, none reserved, none twice.

    Raises
    ------
    InvalidDataError
        The file itself has a name twice.
    """
    if len(set(names)) != len(names):
        twice = sorted({name for name in names if list(names).count(name) > 1})
        raise InvalidDataError(f"column names occur more than once: {twice}; rename them in the file")
    blocked = set(reserved) | _DATABASE_NAMES
    out: dict[str, str] = {}
    # Names that can stay are given out first, so that a renamed column yields to them.
    taken = {name for name in names if name not in blocked and _plain(name) == name}
    for name in names:
        new = _plain(name)
        if new in blocked:
            new += "_in_file"
        while new != name and new in taken | blocked:
            new += "_"
        taken.add(new)
        out[name] = new
    return out


def _plain(name: str) -> str:
    # LanceDB reads a dot as a step into a struct; backticks would end a quoted name in SQL.
    return name.replace(".", "_").replace("`", "_") or "unnamed"


def _column(values: pd.Series, where: str) -> pa.Array:
    try:
        array = pa.Array.from_pandas(values)
        if isinstance(array, pa.ChunkedArray):
            array = array.combine_chunks()
        if pa.types.is_dictionary(array.type):
            array = array.dictionary_decode()
        return array.cast(_stored_type(array.type, where))
    except (pa.ArrowException, OverflowError) as error:
        raise InvalidDataError(
            f"{where}: {error}; store it as one type, or remove it from the file"
        ) from error


def _stored_type(found: pa.DataType, where: str) -> pa.DataType:
    kind = pa.types
    if kind.is_integer(found):
        return pa.int64()
    if kind.is_floating(found):
        return pa.float64()
    if kind.is_boolean(found) or kind.is_null(found):
        return found
    if kind.is_string(found) or kind.is_large_string(found) or kind.is_string_view(found):
        return pa.string()
    if kind.is_timestamp(found):
        return pa.timestamp("us", tz=found.tz)
    if kind.is_list(found) or kind.is_large_list(found):
        return pa.list_(_stored_type(found.value_type, where))
    raise InvalidDataError(
        f"{where}: values of type {found} cannot be stored; turn them into numbers, strings, booleans or "
        "times, or remove the column from the file"
    )


def plan_merge(schema: pa.Schema, data: pa.Table, *, allow_new: bool, source: str) -> Merge:
    """How a table with `schema` must change so that it can take the columns of `data`.

    Parameters
    ----------
    schema, data
        Of the table; what comes.
    allow_new
        Add columns that the table lacks; otherwise they are left out.
    source
        For messages.

    Raises
    ------
    InvalidDataError
        A column has one type in the table and an incompatible one in the data.
    """
    new, to_double, left_out = [], [], []
    for column in data.schema:
        if column.name not in schema.names:
            # Where every value is missing there is nothing to store, and no type to store it as.
            if not pa.types.is_null(column.type):
                new.append(pa.field(column.name, column.type))
            continue
        there = schema.field(column.name).type
        if pa.types.is_floating(column.type) and pa.types.is_integer(there):
            to_double.append(column.name)
        elif not fits(column.type, there):
            raise InvalidDataError(
                f"{source}, column {column.name!r}: the atlas holds {there}, the file {column.type}; rename "
                "the column in the file, or convert it there to the atlas's type"
            )
    if new and not allow_new:
        left_out = [field.name for field in new]
        _log.info("%s: columns %s are not in the table's schema class and left out", source, left_out)
    return Merge(() if left_out else tuple(new), tuple(to_double))


def merged_schema(schema: pa.Schema, merge: Merge) -> pa.Schema:
    """Schema of a table after a merge."""
    changed = [f.with_type(pa.float64()) if f.name in merge.to_double else f for f in schema]
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
    data: pa.Table, schema: pa.Schema, *, defaults: Mapping[str, Any] | None = None, source: str, table: str
) -> pa.Table:
    """`data` with exactly the columns of a table, in its order and types; nothing is rounded.

    Parameters
    ----------
    data
        Columns that `schema` lacks are left out.
    schema
        Of the table.
    defaults
        Values for columns that the data lack, one for all rows.
    source, table
        For messages.

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
    try:
        if pa.types.is_dictionary(wanted):
            return array.cast(wanted.value_type).dictionary_encode().cast(wanted)
        if pa.types.is_integer(array.type) and pa.types.is_floating(wanted):
            check_exact(array, where)
        out = array.cast(wanted)
    except pa.ArrowException as error:
        raise InvalidDataError(f"{where}: {error}; the atlas stores it as {wanted}") from error
    if pa.types.is_floating(wanted):
        same = pc.all(pc.equal(out.cast(pa.float64()), array.cast(pa.float64())))
        if same.as_py() is False:  # None: nothing to compare
            raise InvalidDataError(
                f"{where}: not every value is exact in {wanted}, as which the atlas stores it"
            )
    return out


def check_exact(array: pa.Array | pa.ChunkedArray, where: str) -> None:
    """Refuse integers that would change when they become doubles."""
    extent = pc.min_max(array)
    for value in (extent["min"].as_py(), extent["max"].as_py()):
        if value is not None and abs(value) > _EXACT_IN_DOUBLE:
            raise InvalidDataError(
                f"{where}: {value} is too large to be stored exactly as double, which the column must become "
                "to hold fractions too; rename one of the two columns"
            )


def _constant(value: Any, kind: pa.DataType, length: int) -> pa.Array:
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
    elif not isinstance(features, pa.Table) and hasattr(features, "to_arrow"):
        features = features.to_arrow()
    if not isinstance(features, pa.Table):
        if "uid" not in features.columns and features.index.name == "uid":
            features = features.reset_index()
        features = to_arrow(features, reserved=(), source=source)
    if "uid" not in features.schema.names:
        raise ValueError(f"{source}: expected a column 'uid', found {features.schema.names}")
    return features.drop_columns([name for name in ("global_index",) if name in features.schema.names])
