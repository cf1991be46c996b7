"""Philox in numba: keys of many genes, in vectors."""

from __future__ import annotations

import numba
import numpy as np

from hbx_gpu._draws import MULTIPLIERS, ROUNDS, WEYL
from hbx_gpu.tokens._host.lanes import LANES, eight_keys, eight_pairs

# Kernels that allocate nothing need no reference counts of views, which are atomic and cost a twentieth of
# their time. numba's stubs do not know `_nrt`.
jit = numba.njit(nogil=True, cache=True, boundscheck=False, error_model="numpy", _nrt=False)  # type: ignore[call-overload]
"""For kernels that neither allocate nor return arrays."""
allocating = numba.njit(nogil=True, cache=True, boundscheck=False, error_model="numpy", _nrt=True)  # type: ignore[call-overload]
"""For kernels that allocate; `_nrt` would else be that of the caller."""
sums = numba.njit(  # type: ignore[call-overload]
    nogil=True, cache=True, boundscheck=False, error_model="numpy", _nrt=False, fastmath={"reassoc"}
)
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
def _begun(seed, epoch, cell, step, block):
    """The first three rounds, as far as they are the same for all genes of a row.

    Of a counter only its last word differs from gene to gene, and reaches one more word with each round.
    """
    u, v = seed & LOW, seed >> HALF
    left, right = (cell & LOW) * _M0, np.uint64(epoch) * _M1
    a_1 = ((right >> HALF) ^ ((cell >> HALF) | (np.uint64(block) << EIGHT)) ^ u) & LOW
    b_1, c_1, d_1 = right & LOW, (left >> HALF) ^ v, left & LOW
    u, v = (u + _W0) & LOW, (v + _W1) & LOW
    left = a_1 * _M0
    a_2, c_2, d_2 = b_1 ^ u, ((left >> HALF) ^ d_1 ^ v) & LOW, left & LOW
    u, v = (u + _W0) & LOW, (v + _W1) & LOW
    right = c_2 * _M1
    return c_1 ^ np.uint64(step), a_2, (right >> HALF) ^ u, right & LOW, d_2 ^ v


@jit
def keys(seed, epoch, cell, step, block, index, n, out):
    """out[i] = 64-bit key of index[i], which are 32-bit integers."""
    c_1, a_2, a_3, b_3, c_3 = _begun(seed, epoch, cell, step, block)
    u, v = seed & LOW, seed >> HALF
    if n < LANES:
        for i in range(n):
            w0, w1, _, _ = words(seed, epoch, cell, step, index[i], block)
            out[i] = (w0 << HALF) | w1
        return
    for i in range(0, n - LANES + 1, LANES):
        eight_keys(index, i, c_1, a_2, a_3, b_3, c_3, u, v, out)
    eight_keys(index, n - LANES, c_1, a_2, a_3, b_3, c_3, u, v, out)  # the rest, and some once more


@jit
def two_keys(seed, epoch, cell, step, index, n, out, out_2):
    """out[i] = 64-bit key of index[i], and out_2[i] another one: the other two words of the same draw."""
    c_1, a_2, a_3, b_3, c_3 = _begun(seed, epoch, cell, step, 0)
    u, v = seed & LOW, seed >> HALF
    if n < LANES:
        for i in range(n):
            w0, w1, w2, w3 = words(seed, epoch, cell, step, index[i], 0)
            out[i], out_2[i] = (w0 << HALF) | w1, (w2 << HALF) | w3
        return
    for i in range(0, n - LANES + 1, LANES):
        eight_pairs(index, i, c_1, a_2, a_3, b_3, c_3, u, v, out, out_2)
    eight_pairs(index, n - LANES, c_1, a_2, a_3, b_3, c_3, u, v, out, out_2)


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
