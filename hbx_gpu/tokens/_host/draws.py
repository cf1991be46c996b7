"""Philox in numba: keys of many genes in loops that the compiler turns into vector instructions."""

from __future__ import annotations

import numba
import numpy as np

from hbx_gpu._draws import MULTIPLIERS, ROUNDS, WEYL

jit = numba.njit(nogil=True, cache=True, boundscheck=False, error_model="numpy")
sums = numba.njit(nogil=True, cache=True, boundscheck=False, error_model="numpy", fastmath={"reassoc"})
"""For sums of whole numbers below 2**53, which are the same in any order: adding may become vectors."""

_M0, _M1 = np.uint64(MULTIPLIERS[0]), np.uint64(MULTIPLIERS[1])
_W0, _W1 = np.uint64(WEYL[0]), np.uint64(WEYL[1])
LOW, HALF, EIGHT = np.uint64(0xFFFFFFFF), np.uint64(32), np.uint64(8)


@jit
def _round(a, b, c, d, key_0, key_1):
    """One round. Upper halves of the words hold leftovers, which a product of lower halves never sees."""
    left = (a & LOW) * _M0
    right = (c & LOW) * _M1
    return (right >> HALF) ^ b ^ key_0, right, (left >> HALF) ^ d ^ key_1, left


@jit
def philox(a, b, c, d, key_0, key_1):
    """Four words of a counter of four words; all uint64 that hold 32 bits."""
    for _ in range(ROUNDS):
        a, b, c, d = _round(a, b, c, d, key_0, key_1)
        key_0, key_1 = (key_0 + _W0) & LOW, (key_1 + _W1) & LOW
    return a & LOW, b & LOW, c & LOW, d & LOW


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
    """out[i] = 64-bit key of index[i].

    Of a counter only its last word differs from gene to gene, so that half of the first three rounds is the
    same for all; of the last two rounds only what makes the first two words is computed.
    """
    u, v = seed & LOW, seed >> HALF
    fourth = np.uint64(step)
    # Round 1: the last word reaches one word only.
    left, right = (cell & LOW) * _M0, np.uint64(epoch) * _M1
    a_1 = ((right >> HALF) ^ ((cell >> HALF) | (np.uint64(block) << EIGHT)) ^ u) & LOW
    b_1, c_1, d_1 = right & LOW, (left >> HALF) ^ v, left & LOW
    u, v = (u + _W0) & LOW, (v + _W1) & LOW
    # Round 2: two words.
    left = a_1 * _M0
    a_2, c_2, d_2 = b_1 ^ u, ((left >> HALF) ^ d_1 ^ v) & LOW, left & LOW
    u, v = (u + _W0) & LOW, (v + _W1) & LOW
    # Round 3: three words.
    right = c_2 * _M1
    a_3, b_3, c_3 = (right >> HALF) ^ u, right & LOW, d_2 ^ v
    u_4, v_4 = (u + _W0) & LOW, (v + _W1) & LOW
    u_5, v_5 = (u_4 + _W0) & LOW, (v_4 + _W1) & LOW
    u_6, v_6 = (u_5 + _W0) & LOW, (v_5 + _W1) & LOW
    u_7, v_7 = (u_6 + _W0) & LOW, (v_6 + _W1) & LOW
    u_8, v_8 = (u_7 + _W0) & LOW, (v_7 + _W1) & LOW
    v_9 = (v_8 + _W1) & LOW
    u_10 = (u_8 + _W0 + _W0) & LOW
    for i in range(n):
        c = c_1 ^ fourth ^ (np.uint64(index[i]) << EIGHT)
        right = (c & LOW) * _M1
        a = a_2 ^ (right >> HALF)
        left = (a & LOW) * _M0
        a, b, c, d = a_3 ^ right, b_3, c_3 ^ (left >> HALF), left
        a, b, c, d = _round(a, b, c, d, u_4, v_4)
        a, b, c, d = _round(a, b, c, d, u_5, v_5)
        a, b, c, d = _round(a, b, c, d, u_6, v_6)
        a, b, c, d = _round(a, b, c, d, u_7, v_7)
        a, b, c, d = _round(a, b, c, d, u_8, v_8)
        right = (c & LOW) * _M1
        c = ((a & LOW) * _M0 >> HALF) ^ d ^ v_9
        b = right
        right = (c & LOW) * _M1
        out[i] = (((right >> HALF) ^ b ^ u_10) << HALF) | (right & LOW)


@jit
def two_keys(seed, epoch, cell, step, index, n, out, out_2):
    """out[i] = 64-bit key of index[i], and out_2[i] another one: the other two words of the same draw."""
    u, v = seed & LOW, seed >> HALF
    for i in range(n):
        a, b = cell & LOW, cell >> HALF
        c, d = np.uint64(epoch), np.uint64(step) | (np.uint64(index[i]) << EIGHT)
        key_0, key_1 = u, v
        for _ in range(ROUNDS):
            a, b, c, d = _round(a, b, c, d, key_0, key_1)
            key_0, key_1 = (key_0 + _W0) & LOW, (key_1 + _W1) & LOW
        out[i] = (a << HALF) | (b & LOW)
        out_2[i] = (c << HALF) | (d & LOW)


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
