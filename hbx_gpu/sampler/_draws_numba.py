"""Uniform numbers of positions in compiled code, as :func:`hbx_gpu.sampler._draws.uniform_pairs` has them."""

from __future__ import annotations

import numba
import numpy as np

from hbx_gpu._draws import MULTIPLIERS, ROUNDS, WEYL

_M0, _M1 = np.uint64(MULTIPLIERS[0]), np.uint64(MULTIPLIERS[1])
_W0, _W1 = np.uint64(WEYL[0]), np.uint64(WEYL[1])
_LOW, _HALF = np.uint64(0xFFFFFFFF), np.uint64(32)
_5, _6, _26 = np.uint64(5), np.uint64(6), np.uint64(26)
_SCALE = 2.0**-53


@numba.njit(nogil=True, cache=True, boundscheck=False)
def pairs(begin, end, low, high):
    """Two uniform numbers, float64 in [0, 1), for each of the positions ``[begin, end)``."""
    first, second = np.empty(end - begin), np.empty(end - begin)
    for i in range(end - begin):
        position = np.uint64(begin + i)
        a, b, c, d = position & _LOW, position >> _HALF, np.uint64(0), np.uint64(0)
        key_0, key_1 = np.uint64(low), np.uint64(high)
        for _ in range(ROUNDS):
            left, right = a * _M0, c * _M1
            a, c = (right >> _HALF) ^ b ^ key_0, (left >> _HALF) ^ d ^ key_1
            b, d = right & _LOW, left & _LOW
            key_0, key_1 = (key_0 + _W0) & _LOW, (key_1 + _W1) & _LOW
        first[i] = np.float64(((a >> _5) << _26) | (b >> _6)) * _SCALE
        second[i] = np.float64(((c >> _5) << _26) | (d >> _6)) * _SCALE
    return first, second
