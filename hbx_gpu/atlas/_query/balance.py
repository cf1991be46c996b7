"""Chooses rows so that the values of a column are as equally frequent as the data allow."""

from __future__ import annotations

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc


def value_codes(values: list[pa.Array], column: pa.Field) -> np.ndarray:
    """int64 rank of each value among the sorted distinct ones, -1 where missing (null or NaN)."""
    kind = column.type.value_type if pa.types.is_dictionary(column.type) else column.type
    whole = pa.chunked_array(values, type=kind)
    if pa.types.is_floating(kind):
        whole = pc.if_else(pc.is_nan(whole), None, whole)
    try:
        distinct = pc.drop_null(whole.unique())
        distinct = distinct.take(pc.sort_indices(distinct))
        result: np.ndarray = pc.fill_null(
            pc.index_in(whole, value_set=distinct).cast(pa.int64()), -1
        ).to_numpy()
        return result
    except pa.ArrowNotImplementedError as error:
        raise ValueError(
            f"balanced_limit() needs a column of plain values; {column.name!r} is {column.type}"
        ) from error


def balanced_rows(codes: np.ndarray, n: int) -> np.ndarray:
    """Ascending positions of `n` rows whose codes are as equally frequent as possible.

    Parameters
    ----------
    codes
        int, (n_rows,). Code of each row; -1 means that the row is never taken.
    n
        Number of rows wanted; fewer are returned only if fewer rows have a code.
    """
    counts = np.bincount(codes[codes >= 0]) if (codes >= 0).any() else np.zeros(0, np.int64)
    quotas = _quotas(counts, n)
    order = np.argsort(codes, kind="stable")
    order = order[np.count_nonzero(codes < 0) :]
    begin = np.cumsum(counts) - counts
    rank = np.arange(len(order)) - np.repeat(begin, counts)
    return np.sort(order[rank < np.repeat(quotas, counts)])


def _quotas(counts: np.ndarray, n: int) -> np.ndarray:
    """Split `n` into shares as equal as the counts allow; the first codes get the remainder."""
    quotas = np.zeros(len(counts), dtype=np.int64)
    left = min(n, int(counts.sum()))
    while left:
        open_ = np.flatnonzero(quotas < counts)
        if left < len(open_):
            quotas[open_[:left]] += 1
            break
        # Raise all shares that are not full to the smallest count among them, as far as the rest allows.
        step = min(left // len(open_), int((counts - quotas)[open_].min()))
        quotas[open_] += step
        left -= step * len(open_)
    return quotas
