"""Philox in numba: keys of many genes in one loop that the compiler can vectorise."""

from __future__ import annotations

import numba
import numpy as np

from hbx_gpu._draws import MULTIPLIERS, ROUNDS, WEYL

jit = numba.njit(nogil=True, cache=True, boundscheck=False)

_M0, _M1 = np.uint64(MULTIPLIERS[0]), np.uint64(MULTIPLIERS[1])
_W0, _W1 = np.uint64(WEYL[0]), np.uint64(WEYL[1])
LOW, HALF, EIGHT = np.uint64(0xFFFFFFFF), np.uint64(32), np.uint64(8)


@jit
def _round(a, b, c, d, key_0, key_1):
    left = a * _M0
    right = c * _M1
    return (right >> HALF) ^ b ^ key_0, right & LOW, (left >> HALF) ^ d ^ key_1, left & LOW


@jit
def philox(a, b, c, d, key_0, key_1):
    """Four words of a counter of four words; all uint64 that hold 32 bits."""
    for _ in range(ROUNDS):
        a, b, c, d = _round(a, b, c, d, key_0, key_1)
        key_0, key_1 = (key_0 + _W0) & LOW, (key_1 + _W1) & LOW
    return a, b, c, d


@jit
def words(seed, epoch, cell, step, index, block):
    """The four words of one draw."""
    return philox(
        cell & LOW,
        (cell >> HALF) | (np.uint64(block) << EIGHT),
        np.uint64(epoch),
        np.uint64(step) | (np.uint64(index) << EIGHT),
        seed & LOW,
        seed >> HALF,
    )


@jit
def keys(seed, epoch, cell, step, block, index, n, out):
    """out[i] = 64-bit key of index[i]."""
    key_0, key_1 = seed & LOW, seed >> HALF
    first, second = cell & LOW, (cell >> HALF) | (np.uint64(block) << EIGHT)
    third, fourth = np.uint64(epoch), np.uint64(step)
    for i in range(n):
        # The rounds of `philox` in the loop itself, which is what makes it vectors.
        a, b, c, d = first, second, third, fourth | (np.uint64(index[i]) << EIGHT)
        k0, k1 = key_0, key_1
        a, b, c, d = _round(a, b, c, d, k0, k1)
        k0, k1 = (k0 + _W0) & LOW, (k1 + _W1) & LOW
        a, b, c, d = _round(a, b, c, d, k0, k1)
        k0, k1 = (k0 + _W0) & LOW, (k1 + _W1) & LOW
        a, b, c, d = _round(a, b, c, d, k0, k1)
        k0, k1 = (k0 + _W0) & LOW, (k1 + _W1) & LOW
        a, b, c, d = _round(a, b, c, d, k0, k1)
        k0, k1 = (k0 + _W0) & LOW, (k1 + _W1) & LOW
        a, b, c, d = _round(a, b, c, d, k0, k1)
        k0, k1 = (k0 + _W0) & LOW, (k1 + _W1) & LOW
        a, b, c, d = _round(a, b, c, d, k0, k1)
        k0, k1 = (k0 + _W0) & LOW, (k1 + _W1) & LOW
        a, b, c, d = _round(a, b, c, d, k0, k1)
        k0, k1 = (k0 + _W0) & LOW, (k1 + _W1) & LOW
        a, b, c, d = _round(a, b, c, d, k0, k1)
        k0, k1 = (k0 + _W0) & LOW, (k1 + _W1) & LOW
        a, b, c, d = _round(a, b, c, d, k0, k1)
        k0, k1 = (k0 + _W0) & LOW, (k1 + _W1) & LOW
        a, b, c, d = _round(a, b, c, d, k0, k1)
        out[i] = (a << HALF) | b


@jit
def unit_bits(key):
    """The 53 bits that make a key's number in [0, 1)."""
    return ((key >> np.uint64(37)) << np.uint64(26)) | ((key & LOW) >> np.uint64(6))


@jit
def mulhi(key, span):
    """The upper 64 bits of key * span."""
    high, low = key >> HALF, key & LOW
    span_high, span_low = span >> HALF, span & LOW
    middle = high * span_low + ((low * span_low) >> HALF)
    return high * span_high + (middle >> HALF) + ((low * span_high + (middle & LOW)) >> HALF)
