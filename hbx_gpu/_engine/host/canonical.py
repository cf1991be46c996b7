"""Bring CSR rows to canonical form: int64 columns that ascend, each once within its row."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np

from hbx_gpu._engine.host import canonical_kernels as kernels


def drop_columns(
    offsets: np.ndarray, columns: np.ndarray, layers: Sequence[np.ndarray]
) -> tuple[np.ndarray, np.ndarray, list[np.ndarray]]:
    """Leave out the elements whose column is negative, in place.

    Parameters
    ----------
    offsets, columns
        The rows: int64, (n_rows + 1,), and integers, (nnz,).
    layers
        Values of each layer, (nnz,).

    Returns
    -------
    offsets
        int64, (n_rows + 1,), a new array.
    columns, layers
        Views of the given arrays, as long as what is left.
    """
    for values in layers:
        kernels.drop_values(columns, values)
    kept = np.empty_like(offsets)
    kernels.drop_columns(offsets, columns, kept)
    return kept, columns[: kept[-1]], [values[: kept[-1]] for values in layers]


def sort_rows(
    offsets: np.ndarray,
    columns: np.ndarray,
    layers: Sequence[np.ndarray],
    n_features: int,
    unsorted_rows: np.ndarray,
) -> tuple[np.ndarray, np.ndarray, list[np.ndarray]]:
    """Rows in canonical form, in place: sorted by column, repeated columns summed in the order they had.

    Parameters
    ----------
    offsets
        int64, (n_rows + 1,).
    columns
        int64, (nnz,), in [0, n_features).
    layers
        Values of each layer, float32, (nnz,).
    n_features
        Width of the matrix.
    unsorted_rows
        bool, (n_rows,). False for rows whose columns are known to ascend, each once.

    Returns
    -------
    offsets, columns, layers
        The given arrays, or shorter views of them where columns were repeated.

    Notes
    -----
    Equals ``scipy.sparse.csr_matrix.sum_duplicates``, which adds repeats in no particular order.
    """
    if not unsorted_rows.any():
        return offsets, columns, list(layers)
    longest = int(np.diff(offsets).max(initial=0))
    # An index array sorted once says where the values of several layers go.
    several = len(layers) != 1
    moved = np.arange(len(columns)) if several else layers[0]
    scratch = np.empty(longest, np.uint32), np.empty(longest, moved.dtype)
    repeats = kernels.sort_rows(offsets, n_features, unsorted_rows, columns, moved, *scratch)
    layers = [values[moved] for values in layers] if several else layers
    if not repeats:
        return offsets, columns, list(layers)
    for values in layers:
        kernels.sum_repeats(offsets, columns, values)
    kept = np.empty_like(offsets)
    kernels.drop_repeats(offsets, columns, kept)
    return kept, columns[: kept[-1]], [values[: kept[-1]] for values in layers]


def sorting_order(offsets: np.ndarray, columns: np.ndarray, n_features: int, rows: np.ndarray) -> np.ndarray:
    """Where the elements of rows come from once each row is sorted by column; equal columns keep their order.

    Parameters
    ----------
    offsets, columns
        The rows: int64, (n_rows + 1,), and int64, (nnz,), in [0, n_features). Columns are sorted in place.
    n_features
        Width of the matrix.
    rows
        bool, (n_rows,). False for rows that stay as they are.

    Returns
    -------
    int64, (nnz,). Position of each element before sorting.
    """
    order = np.arange(len(columns))
    longest = int(np.diff(offsets).max(initial=0))
    scratch = np.empty(longest, np.uint32), np.empty(longest, order.dtype)
    kernels.sort_rows(offsets, n_features, rows, columns, order, *scratch)
    return order


def as_float32(values: np.ndarray, empty: Callable[[int, type[np.float32]], np.ndarray]) -> np.ndarray:
    """Values as float32: the same array where it has that dtype, else a copy in memory from `empty`."""
    if values.dtype == np.float32:
        return values
    out = empty(len(values), np.float32)
    np.copyto(out, values, casting="unsafe")
    return out
