"""Arithmetic on runs: arrays cut into consecutive stretches, one for each group, block or batch."""

from __future__ import annotations

from collections.abc import Sequence, Sized
from typing import Protocol, runtime_checkable

import numpy as np
from numpy.typing import ArrayLike


@runtime_checkable
class _Array(Protocol):
    """What NumPy makes an array of at once: arrays of other packages, columns of pandas, tensors."""

    def __array__(self) -> np.ndarray: ...


def as_array(name: str, values: ArrayLike | Sequence[ArrayLike]) -> np.ndarray:
    """`values` as an array; a dataset or a table in its place is an error.

    NumPy would read a dataset row by row, since it has a length and items.

    Raises
    ------
    ValueError
        `values` is not array-like.
    """
    if isinstance(values, Sized) and not isinstance(values, np.ndarray | Sequence | memoryview | _Array):
        raise ValueError(
            f"{name} must be an array with an entry for each cell, such as dataset.groups_np or "
            f"dataset.columns['cell_type'], got a {type(values).__name__}"
        )
    return np.asarray(values)


def integers(name: str, values: ArrayLike) -> np.ndarray:
    """`values` as a one-dimensional integer array, or an error that names them."""
    array = as_array(name, values)
    if array.ndim != 1:
        raise ValueError(f"{name} must be one-dimensional, one integer per cell; got shape {array.shape}")
    if array.size == 0:
        return array.astype(np.int64)
    if array.dtype.kind not in "iu":
        raise ValueError(f"{name} must be integer codes, got dtype {array.dtype}")
    return array


def number(values: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Renumber integers 0..k-1 in ascending order of those that occur; also how often each occurs."""
    if values.size == 0:
        return np.empty(0, np.int64), np.empty(0, np.int64)
    low, high = int(values.min()), int(values.max())
    if high - low > 4 * values.size + 65536:
        _, codes, counts = np.unique(values, return_inverse=True, return_counts=True)
        return codes, counts
    # Group ids and label codes are dense: counting them costs a tenth of sorting them.
    codes = values.astype(np.int64) - low if low else values
    counts = np.bincount(codes)
    if counts.all():
        return codes, counts
    return (np.cumsum(counts > 0) - 1)[codes], counts[counts > 0]


def rows_by_code(codes: np.ndarray) -> np.ndarray:
    """Positions sorted by code, equal ones in their order."""
    small = codes.max(initial=0) < 65536
    # NumPy sorts 16-bit integers stably by radix, an order of magnitude faster than wider ones.
    return np.argsort(codes.astype(np.uint16) if small else codes, kind="stable")


def ranges(starts: np.ndarray, lengths: np.ndarray) -> np.ndarray:
    """``concatenate([arange(s, s + n) for s, n in zip(starts, lengths)])``, int64."""
    before = np.cumsum(lengths) - lengths
    return np.repeat(starts - before, lengths) + np.arange(int(lengths.sum()))


def shuffle_runs(values: np.ndarray, ends: np.ndarray, rng: np.random.Generator) -> None:
    """Shuffle in place each stretch of `values` that ends at one of `ends`."""
    begin = 0
    for end in ends.tolist():
        if end - begin > 1:
            rng.shuffle(values[begin:end])
        begin = end
