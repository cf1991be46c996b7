"""The type that holds the values of two merged obs columns without loss (docs/columns.md)."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from hbx_gpu._advice import option
from hbx_gpu.errors import InvalidDataError

if TYPE_CHECKING:
    import datetime

Kind = Literal["empty", "truth", "whole", "fractions", "text", "time", "list", "other"]
"""What the values of a column are, whatever type they come in."""

EXACT_IN_DOUBLE = 2**53
"""float64 holds every integer up to here."""

NAMED_TYPES: dict[str, pa.DataType] = {
    "int": pa.int64(),
    "float": pa.float64(),
    "bool": pa.bool_(),
    "str": pa.string(),
    "string": pa.string(),
    "datetime": pa.timestamp("us"),
}
"""Types that users can ask for by name."""

Values = Callable[[], pa.ChunkedArray]


@dataclass(frozen=True)
class Column:
    """One of the two columns that are merged.

    Attributes
    ----------
    type
        Arrow type of the column, as stored or as it arrived.
    values
        Function that reads the values; called only where the type alone does not decide.
    """

    type: pa.DataType
    values: Values

    def kind(self) -> Kind:
        """What the values are. Floating point numbers that are all whole count as whole."""
        found = value_type(self.type)
        types = pa.types
        if types.is_null(found) or is_empty(self.values()):
            return "empty"
        if types.is_floating(found):
            return "whole" if all_whole(self.values()) else "fractions"
        return kind_of_type(found)

    def largest(self) -> int:
        """Largest absolute value of whole numbers."""
        extent = pc.min_max(plain(self.values()))
        return max(abs(int(extent[end].as_py() or 0)) for end in ("min", "max"))


def value_type(kind: pa.DataType) -> pa.DataType:
    """The type of the values of a column, which may be stored as codes."""
    return kind.value_type if pa.types.is_dictionary(kind) else kind


def plain(values: pa.Array | pa.ChunkedArray) -> pa.Array | pa.ChunkedArray:
    """Decoded values of a column that may be dictionary-encoded."""
    return values.cast(values.type.value_type) if pa.types.is_dictionary(values.type) else values


def kind_of_type(found: pa.DataType) -> Kind:
    """The kind that follows from the type alone; floating point numbers then count as fractions."""
    types = pa.types
    if types.is_boolean(found):
        return "truth"
    if types.is_integer(found):
        return "whole"
    if types.is_floating(found):
        return "fractions"
    if is_text(found):
        return "text"
    if types.is_timestamp(found):
        return "time"
    if types.is_list(found) or types.is_large_list(found) or types.is_fixed_size_list(found):
        return "list"
    return "other"


def is_text(found: pa.DataType) -> bool:
    """Whether a type holds texts."""
    types = pa.types
    result: bool = types.is_string(found) or types.is_large_string(found) or types.is_string_view(found)
    return result


def is_empty(values: pa.Array | pa.ChunkedArray) -> bool:
    """Whether every value is missing; NaN counts as missing."""
    found = plain(values)
    if found.null_count == len(found):
        return True
    return pa.types.is_floating(found.type) and bool(pc.all(pc.is_nan(pc.drop_null(found))).as_py())


def all_whole(values: pa.Array | pa.ChunkedArray) -> bool:
    """Whether all floating point numbers present are whole, and small enough to be exact."""
    found = (
        pc.drop_null(plain(values)).to_numpy(zero_copy_only=False)
        if isinstance(values, pa.Array)
        else (pc.drop_null(plain(values)).to_numpy())
    )
    found = found.astype(np.float64, copy=False)
    found = found[~np.isnan(found)]
    with np.errstate(invalid="ignore"):
        return bool(
            (np.isfinite(found) & (np.trunc(found) == found) & (np.abs(found) <= EXACT_IN_DOUBLE)).all()
        )


def join_types(there: Column, new: Column, where: str) -> pa.DataType:
    """The type of a column that takes the values of both sides without loss.

    Parameters
    ----------
    there, new
        The stored column and the arriving one.
    where
        File and column, named in error messages.

    Raises
    ------
    InvalidDataError
        No type holds both; the message says what the user can do.
    """
    a, b = there.kind(), new.kind()
    kinds = {a, b} - {"empty"}
    if a == "empty":
        return new.type if b != "empty" else there.type
    if b == "empty":
        return there.type
    if "list" in kinds or "other" in kinds:
        if a == b == "list":
            return pa.list_(_join_plain(there.type.value_type, new.type.value_type, where))
        raise _cannot(there.type, new.type, where, "these have no common type")
    if kinds == {"time"}:
        return _join_times(there.type, new.type)
    if "text" in kinds or "time" in kinds:
        return pa.string()
    if kinds == {"truth"}:
        return pa.bool_()
    if "fractions" not in kinds:
        if (
            kinds == {"whole"}
            and pa.types.is_floating(value_type(there.type))
            and pa.types.is_floating(new.type)
        ):
            return pa.float64()
        return pa.int64()
    for side, kind in ((there, a), (new, b)):
        if kind == "whole" and side.largest() > EXACT_IN_DOUBLE:
            raise _cannot(
                there.type,
                new.type,
                where,
                f"{side.largest()} is too large to be exact among numbers with fractions",
            )
    return pa.float64()


def _join_plain(there: pa.DataType, new: pa.DataType, where: str) -> pa.DataType:
    a, b = kind_of_type(there), kind_of_type(new)
    if there == new:
        return there
    if a == b and a in ("whole", "fractions", "text"):
        return {"whole": pa.int64(), "fractions": pa.float64(), "text": pa.string()}[a]
    if {a, b} == {"whole", "fractions"}:
        return pa.float64()
    raise _cannot(pa.list_(there), pa.list_(new), where, "their elements have no common type")


def _join_times(there: pa.DataType, new: pa.DataType) -> pa.DataType:
    if (there.tz is None) != (new.tz is None):
        return pa.string()  # a time without a zone does not fix a moment
    return pa.timestamp("us", tz=there.tz if there.tz == new.tz else "UTC")


def _cannot(there: pa.DataType, new: pa.DataType, where: str, why: str) -> InvalidDataError:
    name = where.rpartition("column ")[2].strip("'\"") or "NAME"
    return InvalidDataError(
        f"{where}: the atlas holds {there}, the file {new}: {why}. Store both as text with "
        f"{option('obs_types', _typed(name, 'str'))}, keep them apart with "
        f"{option('rename_obs', _renamed(name))}, or leave the column out with "
        f"{option('drop_obs', _listed(name))}"
    )


def _typed(name: str, kind: str) -> str:
    return f"{name}={kind}" if "=" not in option("obs_types") else f"{{{name!r}: {kind!r}}}"


def _renamed(name: str) -> str:
    return f"{name}=NEW" if "=" not in option("rename_obs") else f"{{{name!r}: 'new name'}}"


def _listed(name: str) -> str:
    return name if "=" not in option("drop_obs") else f"[{name!r}]"


# Values in their joined type


def convert(values: pa.Array, wanted: pa.DataType, where: str) -> pa.Array:
    """Convert values to a type that :func:`join_types` found, without rounding.

    Raises
    ------
    InvalidDataError
        A value that the type does not hold exactly.
    """
    found = plain(values)
    target = value_type(wanted)
    try:
        if is_text(target) and not is_text(found.type):
            return as_text(found).cast(target)
        if pa.types.is_boolean(found.type) and pa.types.is_floating(target):
            return found.cast(pa.int64()).cast(target)
        if pa.types.is_floating(found.type) and pa.types.is_integer(target):
            # NaN is pandas' way to say that an integer is missing.
            found = pc.if_else(pc.is_nan(found), pa.scalar(None, found.type), found)
        return found.cast(target)
    except pa.ArrowException as error:
        raise InvalidDataError(f"{where}: {error}; the atlas stores it as {wanted}") from error


def as_text(values: pa.Array) -> pa.Array:
    """Values as the texts under which they are stored: 1, 0.5, True, 2020-01-31T12:00:00.

    Whole floating point numbers are written without a fraction where all are whole; :func:`to_text_sql`
    writes the same texts.
    """
    if pa.types.is_floating(values.type) and all_whole(values):
        values = convert(values, pa.int64(), "")
    kind = values.type
    if pa.types.is_integer(kind):
        return values.cast(pa.string())
    write: Callable[[Any], str]
    if pa.types.is_floating(kind):
        write = _float_text
    elif pa.types.is_boolean(kind):
        write = str
    elif pa.types.is_timestamp(kind):
        values = values.cast(pa.timestamp("us", tz="UTC" if kind.tz else None))
        write = _time_text
    else:
        write = str
    listed = values.to_pylist()
    missing = [value is None or (isinstance(value, float) and math.isnan(value)) for value in listed]
    return pa.array([None if no else write(v) for v, no in zip(listed, missing, strict=True)], pa.string())


def _float_text(value: float) -> str:
    """The shortest text that gives the number back, exponents as the database writes them."""
    digits, e, exponent = repr(float(value)).partition("e")
    return f"{digits}e{int(exponent)}" if e else digits


def _time_text(value: datetime.datetime) -> str:
    text = value.isoformat(timespec="seconds").removesuffix("+00:00")
    micros = value.microsecond
    if micros:
        text += f".{micros // 1000:03d}" if micros % 1000 == 0 else f".{micros:06d}"
    return text + ("Z" if value.tzinfo else "")


def cast_sql(name: str, there: Column, wanted: pa.DataType) -> str:
    """SQL that gives the values of a stored column in the type that :func:`join_types` found."""
    column, found = f"`{name}`", value_type(there.type)
    if there.kind() == "empty" and not pa.types.is_null(found):
        return (
            f"CAST({column} AS {_sql_type(wanted)})"
            if not pa.types.is_timestamp(wanted)
            else (f"CAST(CAST({column} AS STRING) AS {_sql_type(wanted)})")
        )
    if is_text(wanted):
        if pa.types.is_boolean(found):
            return f"initcap(CAST({column} AS STRING))"
        if pa.types.is_floating(found) and there.kind() == "whole":
            return f"CAST(CAST({column} AS BIGINT) AS STRING)"
        return f"CAST({column} AS STRING)"
    return f"CAST({column} AS {_sql_type(wanted)})"


def _sql_type(wanted: pa.DataType) -> str:
    if is_text(wanted):
        return "STRING"
    if pa.types.is_integer(wanted):
        return "BIGINT"
    if pa.types.is_boolean(wanted):
        return "BOOLEAN"
    if pa.types.is_timestamp(wanted):
        return "TIMESTAMP"
    return "DOUBLE"
