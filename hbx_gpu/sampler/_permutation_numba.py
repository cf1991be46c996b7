"""The network of :mod:`hbx_gpu.sampler._permutation` in compiled code: one pass, without the GIL."""

from __future__ import annotations

import numba
import numpy as np

_GOLDEN = np.uint64(0x9E3779B97F4A7C15)
_FIRST, _SECOND = np.uint64(0xBF58476D1CE4E5B9), np.uint64(0x94D049BB133111EB)
_30, _27, _31, _64 = np.uint64(30), np.uint64(27), np.uint64(31), np.uint64(64)

_jit = numba.njit(nogil=True, cache=True, boundscheck=False)


@_jit
def _hashed(half, key, size, bits):
    z = np.uint64(half) * _GOLDEN + key
    z = (z ^ (z >> _30)) * _FIRST
    z = (z ^ (z >> _27)) * _SECOND
    z ^= z >> _31
    return np.int64(((z >> bits) * size) >> (_64 - bits))


@_jit
def _bits(size):
    n = 0
    while size >> n:
        n += 1
    return np.uint64(n)


@_jit
def _through(value, keys, a, b, n, bits_a, bits_b):
    size_a, size_b = np.uint64(a), np.uint64(b)
    while True:
        right = value // a
        left = value - right * a
        for j in range(0, len(keys), 2):
            left += _hashed(right, keys[j], size_a, bits_a)
            if left >= a:
                left -= a
            right += _hashed(left, keys[j + 1], size_b, bits_b)
            if right >= b:
                right -= b
        value = left + a * right
        if value < n:
            return value


@_jit
def forward(positions, keys, a, b, n):
    """What comes at `positions`: :func:`~hbx_gpu.sampler._permutation.network`."""
    result = np.empty(len(positions), np.int64)
    bits_a, bits_b = _bits(a), _bits(b)
    for i in range(len(positions)):
        result[i] = _through(positions[i], keys, a, b, n, bits_a, bits_b)
    return result


@_jit
def forward_each(positions, which, keys, sizes):
    """What comes at `positions` of several permutations.

    `which` is the permutation of each position, `keys` uint64 (n, rounds), and `sizes` int64 (n, 3): a, b and
    n of each permutation. Those with n = 0 leave their positions as they are.
    """
    result = positions.copy()
    bits = np.empty((len(sizes), 2), np.uint64)
    for k in range(len(sizes)):
        bits[k, 0], bits[k, 1] = _bits(sizes[k, 0]), _bits(sizes[k, 1])
    for i in range(len(positions)):
        k = which[i]
        a, b, n = sizes[k]
        if n:
            result[i] = _through(positions[i], keys[k], a, b, n, bits[k, 0], bits[k, 1])
    return result


@_jit
def backward(values, keys, a, b, n):
    """Where `values` come: the inverse of :func:`forward`."""
    result = np.empty(len(values), np.int64)
    bits_a, bits_b, size_a, size_b = _bits(a), _bits(b), np.uint64(a), np.uint64(b)
    for i in range(len(values)):
        value = values[i]
        while True:
            right = value // a
            left = value - right * a
            for j in range(len(keys) - 2, -1, -2):
                right -= _hashed(left, keys[j + 1], size_b, bits_b)
                if right < 0:
                    right += b
                left -= _hashed(right, keys[j], size_a, bits_a)
                if left < 0:
                    left += a
            value = left + a * right
            if value < n:
                break
        result[i] = value
    return result
