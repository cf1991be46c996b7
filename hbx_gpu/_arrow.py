"""The Arrow type that holds columns of several types."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pyarrow as pa


def common_type(types: Sequence[pa.DataType], *, booleans: bool = True) -> pa.DataType | None:
    """The type that holds columns of all these types; None if there is none, as for text and numbers.

    Numbers join as NumPy promotes them, texts become strings, categories of texts stay categories, and a
    column without values (null) joins whatever there is.

    Parameters
    ----------
    types
        Types of the columns. Without any the result is null.
    booleans
        Whether booleans count as numbers where they meet numbers.
    """
    common = pa.null()
    for kind in dict.fromkeys(types):
        both = _promoted(common, kind, booleans)
        if both is None:
            return None
        common = both
    return common


def _promoted(a: pa.DataType, b: pa.DataType, booleans: bool) -> pa.DataType | None:
    if a == b or pa.types.is_null(b):
        return a
    if pa.types.is_null(a):
        return b
    values = [kind.value_type if pa.types.is_dictionary(kind) else kind for kind in (a, b)]
    if all(pa.types.is_string(kind) or pa.types.is_large_string(kind) for kind in values):
        both = pa.types.is_dictionary(a) and pa.types.is_dictionary(b)
        return pa.dictionary(pa.int32(), pa.string()) if both else pa.string()
    numbers = (pa.types.is_integer, pa.types.is_floating, *((pa.types.is_boolean,) if booleans else ()))
    if all(any(is_kind(kind) for is_kind in numbers) for kind in values):
        return pa.from_numpy_dtype(np.promote_types(values[0].to_pandas_dtype(), values[1].to_pandas_dtype()))
    return None
