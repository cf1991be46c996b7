"""Random numbers that belong to a cell: a function of (seed, epoch, cell, step, ...) and of nothing else.

Philox4x32-10, the counter-based generator of Salmon, Moraes, Dror and Shaw, "Parallel random numbers: as easy
as 1, 2, 3" (SC 2011): the key is the seed, the counter says what the number is for. There is no state, so
neither batches, workers, threads nor order can change what a cell draws.
"""

from __future__ import annotations

import operator
from collections.abc import Sequence

import numpy as np

MULTIPLIERS = 0xD2511F53, 0xCD9E8D57
WEYL = 0x9E3779B9, 0xBB67AE85
ROUNDS = 10
MAX_CELLS = 2**40
"""Row numbers lie below this, so that the counter has room for a block number."""

_LOW, _HALF = np.uint64(0xFFFFFFFF), np.uint64(32)


def philox(counter: np.ndarray, key: tuple[int, int]) -> np.ndarray:
    """Ten rounds of Philox4x32.

    Parameters
    ----------
    counter
        uint64 (4, ...), 32-bit words.
    key
        Two 32-bit words.

    Returns
    -------
    np.ndarray
        uint64 like `counter`, 32-bit words.
    """
    a, b, c, d = counter
    key_0, key_1 = key
    for _ in range(ROUNDS):
        left, right = a * np.uint64(MULTIPLIERS[0]), c * np.uint64(MULTIPLIERS[1])
        a, c = (right >> _HALF) ^ b ^ np.uint64(key_0), (left >> _HALF) ^ d ^ np.uint64(key_1)
        b, d = right & _LOW, left & _LOW
        key_0, key_1 = (key_0 + WEYL[0]) & 0xFFFFFFFF, (key_1 + WEYL[1]) & 0xFFFFFFFF
    return np.stack([a, b, c, d])


def check_seed(name: str, seed: int) -> None:
    """Refuse a seed that is not an integer of 64 bits.

    Raises
    ------
    ValueError, TypeError
        Name it.
    """
    try:
        number = operator.index(seed)
    except TypeError:
        raise TypeError(f"{name} must be an integer, got {seed!r}") from None
    if not 0 <= number < 2**64:
        raise ValueError(f"{name} must be in 0 .. 2**64 - 1, got {seed}")


def check(seed: int, epoch: int, cells: np.ndarray) -> None:
    """Refuse numbers that do not fit the counter.

    Raises
    ------
    ValueError
        Names the number that is out of bounds.
    TypeError
        The seed is not an integer.
    """
    check_seed("seed", seed)
    if not 0 <= epoch < 2**32:
        raise ValueError(f"epoch must be in 0 .. 2**32 - 1, got {epoch}")
    if len(cells) and cells.min() < 0:
        raise ValueError(f"cells must be row numbers of the dataset, got {cells.min()}")


def uniform(seed: int, epoch: int, cells: np.ndarray, steps: Sequence[int]) -> np.ndarray:
    """Two independent numbers for each cell and step.

    Parameters
    ----------
    seed
        0 .. 2**64 - 1.
    epoch
        0 .. 2**32 - 1.
    cells
        int64 (n,), row numbers, not negative.
    steps
        What the numbers are for, k of them.

    Returns
    -------
    np.ndarray
        float64 (k, 2, n), uniform in [0, 1), multiples of 2**-53.

    Raises
    ------
    ValueError
        A number that is out of bounds.
    """
    cells = np.asarray(cells, np.int64)
    check(seed, epoch, cells)
    rows = cells.astype(np.uint64)
    counter = np.empty((4, len(steps), len(rows)), np.uint64)
    counter[0], counter[1] = rows & _LOW, rows >> _HALF
    counter[2], counter[3] = epoch, np.asarray(steps, np.uint64)[:, None]
    words = philox(counter, (seed & 0xFFFFFFFF, seed >> 32)).swapaxes(0, 1)
    return unit(words[:, 0::2], words[:, 1::2])


def unit(first: np.ndarray, second: np.ndarray) -> np.ndarray:
    """Two 32-bit words to one float64 in [0, 1): 27 bits of the first and 26 of the second."""
    high, low = first >> np.uint64(5), second >> np.uint64(6)
    return (high * 2.0**26 + low) * 2.0**-53
