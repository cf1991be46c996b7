"""Tables of cells as Arrow, united over stores, and columns as batches carry them."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from hbx_gpu._arrow import common_type
from hbx_gpu.errors import InvalidDataError

if TYPE_CHECKING:
    import pandas as pd

_EXACT = 2**53  # integers up to here are exact as float64


def to_arrow(frame: pd.DataFrame, where: str) -> pa.Table:
    """A table of cells as Arrow: categoricals as dictionaries, missing values as nulls.

    NaN in a column of floats is a value and stays one. A column that no table holds, of complex numbers or
    of objects of several kinds, is left out with a warning.
    """
    import pandas as pd

    columns, names = [], []
    for name in frame.columns:
        values = frame[name]
        try:
            if isinstance(values.dtype, pd.CategoricalDtype):
                column = _categorical(values)
            else:
                floats = values.dtype.kind == "f" and not isinstance(
                    values.dtype, pd.api.extensions.ExtensionDtype
                )
                column = pa.array(values.to_numpy(), from_pandas=False) if floats else pa.array(values)
        except (pa.ArrowInvalid, pa.ArrowTypeError, pa.ArrowNotImplementedError) as error:
            warnings.warn(
                f"{where}: column {name!r} of obs holds {values.dtype} values that cannot be queried, and is "
                f"left out: {error}",
                UserWarning,
                stacklevel=3,
            )
            continue
        if pa.types.is_binary(column.type):
            column = column.cast(pa.string())
        if pa.types.is_large_string(column.type) or pa.types.is_string_view(column.type):
            column = column.cast(pa.string())
        columns.append(column)
        names.append(str(name))
    if not names:
        return pa.table({"": pa.nulls(len(frame))}).select([])
    return pa.Table.from_arrays(columns, names)


def _categorical(values: pd.Series) -> pa.Array:
    codes = values.cat.codes.to_numpy().astype(np.int32)
    categories = pa.array(values.cat.categories)
    if pa.types.is_large_string(categories.type):
        categories = categories.cast(pa.string())
    return pa.DictionaryArray.from_arrays(
        pa.array(codes, mask=codes < 0), categories, ordered=bool(values.cat.ordered)
    )


def to_series(column: pa.ChunkedArray) -> pd.Series:
    """A column in pandas; integers and booleans that miss values become nullable, and stay exact."""
    import pandas as pd

    kind = column.type
    if column.null_count and (pa.types.is_integer(kind) or pa.types.is_boolean(kind)):
        name = "boolean" if pa.types.is_boolean(kind) else str(kind).replace("i", "I").replace("u", "U")
        return column.to_pandas(types_mapper=lambda _: pd.api.types.pandas_dtype(name))
    return column.to_pandas()


def united(columns: Sequence[pa.ChunkedArray | None], lengths: Sequence[int], name: str) -> pa.ChunkedArray:
    """One column over the cells of all stores, null where a store lacks it.

    Raises
    ------
    InvalidDataError
        The stores hold types that no type holds without loss.
    """
    there = [column for column in columns if column is not None]
    kind = _common([column.type for column in there], name)
    if pa.types.is_floating(kind):
        _check_exact(there, name)
    chunks: list[pa.Array] = []
    for column, length in zip(columns, lengths, strict=True):
        if column is None:
            chunks.append(pa.nulls(length, kind))
            continue
        if pa.types.is_boolean(column.type) and pa.types.is_floating(kind):
            column = column.cast(pa.uint8())
        if pa.types.is_dictionary(column.type) and not pa.types.is_dictionary(kind):
            column = column.cast(column.type.value_type)
        chunks += (column if column.type == kind else column.cast(kind)).chunks
    whole = pa.chunked_array(chunks, type=kind)
    return whole.unify_dictionaries() if pa.types.is_dictionary(kind) else whole


def _common(types: Sequence[pa.DataType], name: str) -> pa.DataType:
    common = common_type(types, booleans=False)
    if common is None:
        kinds = " in one store and ".join(map(str, dict.fromkeys(types)))
        raise InvalidDataError(
            f"obs column {name!r} is {kinds} in another; open these stores apart, or convert the column in "
            "one of them"
        )
    return common


def _check_exact(columns: Sequence[pa.ChunkedArray], name: str) -> None:
    for column in columns:
        if pa.types.is_integer(column.type) and len(column) > column.null_count:
            low, high = pc.min_max(column).as_py().values()
            if max(abs(low), abs(high)) > _EXACT:
                raise InvalidDataError(
                    f"obs column {name!r} holds integers beyond 2**53 in one store and fractions in another, "
                    "which no type holds together; open these stores apart"
                )
