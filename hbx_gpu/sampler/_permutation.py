"""Permutations that take no memory: any stretch of a shuffled order is computed alone.

A permutation of n positions is a keyed bijection: x is written as ``l + a * r`` with a about the square root
of n, and each round adds a keyed hash of one half to the other half, modulo its size. This is the generalized
Feistel network of Black and Rogaway, "Ciphers with arbitrary finite domains" (CT-RSA 2002); the few values
that fall outside n are sent through again until they fall inside (cycle walking). The hash is the output
function of SplitMix64. At most `EXACT` positions are shuffled by NumPy instead, because a network over very
few values is further from uniform.

:func:`network` says what is right; :mod:`hbx_gpu.sampler._permutation_numba` does the same in compiled code.
"""

from __future__ import annotations

import math
from collections.abc import Iterable

import numpy as np

EXACT = 1024
"""Up to so many positions are shuffled in memory, exactly uniformly."""
ROUNDS = 8
_GOLDEN = np.uint64(0x9E3779B97F4A7C15)
_FIRST, _SECOND = np.uint64(0xBF58476D1CE4E5B9), np.uint64(0x94D049BB133111EB)
_SHIFTS = np.uint64(30), np.uint64(27), np.uint64(31)
_MOST = 2**52  # a side then has at most 26 bits, so that hash times side fits 64


class Permutation:
    """A uniform shuffle of ``range(n)``, a function of its key alone.

    Parameters
    ----------
    n
        Number of positions, at most 2**52.
    key
        What the order is a function of; its state is read, not changed.

    Attributes
    ----------
    n
        Number of positions.
    """

    __slots__ = ("_exact", "_keys", "_sides", "n")

    def __init__(self, n: int, key: np.random.SeedSequence) -> None:
        if not 0 <= n <= _MOST:
            raise ValueError(f"an order has 0 .. 2**52 positions, got {n}")
        self.n = n
        self._exact: np.ndarray | None = None
        self._sides, self._keys = (1, 1), np.empty(0, np.uint64)
        if n <= EXACT:
            self._exact = np.random.default_rng(key).permutation(n).astype(np.int16)
        else:
            self._sides = sides(n)
            self._keys = key.generate_state(ROUNDS, np.uint64).astype(np.uint64, copy=False)

    def at(self, positions: np.ndarray) -> np.ndarray:
        """What comes at positions of the shuffled order.

        Parameters
        ----------
        positions
            int64 (k,), each in ``[0, n)``.

        Returns
        -------
        numpy.ndarray
            int64 (k,).
        """
        if self._exact is not None:
            exact: np.ndarray = self._exact[positions].astype(np.int64)
            return exact
        from hbx_gpu.sampler._permutation_numba import forward

        result: np.ndarray = forward(np.asarray(positions, np.int64), self._keys, *self._sides, self.n)
        return result

    def span(self, begin: int, end: int) -> np.ndarray:
        """What comes at the positions ``range(begin, end)``, int64."""
        return self.at(np.arange(begin, end))

    def find(self, values: np.ndarray) -> np.ndarray:
        """Positions at which values come: the inverse of :meth:`at`."""
        if self._exact is not None:
            places = np.empty(self.n, np.int64)
            places[self._exact] = np.arange(self.n)
            found: np.ndarray = places[values]
            return found
        from hbx_gpu.sampler._permutation_numba import backward

        result: np.ndarray = backward(np.asarray(values, np.int64), self._keys, *self._sides, self.n)
        return result


class Permutations:
    """Several uniform shuffles, each a function of its key alone, looked up together.

    Parameters
    ----------
    sizes
        int64 (k,). Positions of each.
    keys
        As of :class:`Permutation`, one for each.
    """

    __slots__ = ("_exact", "_keys", "_sizes")

    def __init__(self, sizes: np.ndarray, keys: Iterable[np.random.SeedSequence]) -> None:
        self._exact: dict[int, Permutation] = {}
        self._keys = np.zeros((len(sizes), ROUNDS), np.uint64)
        self._sizes = np.ones((len(sizes), 3), np.int64)
        for number, (n, key) in enumerate(zip(sizes.tolist(), keys, strict=True)):
            one = Permutation(n, key)
            if one._exact is not None:
                self._exact[number] = one
                self._sizes[number, 2] = 0
            else:
                self._keys[number], self._sizes[number] = one._keys, (*one._sides, n)

    def at(self, which: np.ndarray, positions: np.ndarray) -> np.ndarray:
        """What comes at positions, int64 (n,), of the shuffles `which`, int64 (n,): int64 (n,)."""
        from hbx_gpu.sampler._permutation_numba import forward_each

        result: np.ndarray = forward_each(positions, which, self._keys, self._sizes)
        if self._exact:
            for number in np.unique(which).tolist():
                if number in self._exact:
                    mine = which == number
                    result[mine] = self._exact[number].at(positions[mine])
        return result


def sides(n: int) -> tuple[int, int]:
    """Sizes a and b of the two halves: a * b is at least n, and less than n + a."""
    a = math.isqrt(n - 1) + 1
    return a, -(-n // a)


def network(values: np.ndarray, keys: np.ndarray, a: int, b: int, n: int, *, inverse: bool) -> np.ndarray:
    """The permutation of ``range(n)`` that `keys` choose, or its inverse, in plain NumPy.

    Parameters
    ----------
    values
        int64 (k,), each in ``[0, n)``.
    keys
        uint64 (rounds,).
    a, b
        From :func:`sides`.
    """
    result = np.array(values, np.int64)
    walking = np.arange(len(result))
    while len(walking):
        result[walking] = _through(result[walking], keys, a, b, inverse=inverse)
        walking = walking[result[walking] >= n]
    return result


def _through(values: np.ndarray, keys: np.ndarray, a: int, b: int, *, inverse: bool) -> np.ndarray:
    """Send values of ``range(a * b)`` through all rounds once."""
    left, right = values % a, values // a
    for j in range(len(keys) - 1, -1, -1) if inverse else range(len(keys)):
        if j % 2 == 0:
            moved = hashed(right, keys[j], a)
            left = (left - moved if inverse else left + moved) % a
        else:
            moved = hashed(left, keys[j], b)
            right = (right - moved if inverse else right + moved) % b
    result: np.ndarray = left + a * right
    return result


def hashed(half: np.ndarray, key: np.uint64, size: int) -> np.ndarray:
    """A keyed hash of each value, int64 in ``[0, size)``."""
    z = half.astype(np.uint64) * _GOLDEN + key
    z = (z ^ (z >> _SHIFTS[0])) * _FIRST
    z = (z ^ (z >> _SHIFTS[1])) * _SECOND
    z ^= z >> _SHIFTS[2]
    bits = np.uint64(size.bit_length())
    return (((z >> bits) * np.uint64(size)) >> (np.uint64(64) - bits)).astype(np.int64)
