"""Numba kernels that write dense rows: one row at a time, while it is in cache."""

from __future__ import annotations

import math

import numba
import numpy as np

NATIVE, BFLOAT16, FLOAT16 = 0, 1, 2
"""Formats of an output element: its own float dtype, or bit patterns in uint16."""

_jit = numba.njit(nogil=True, cache=True, boundscheck=False)


@_jit
def bfloat16_bits(x):
    """Nearest bfloat16 of a float32, ties to even."""
    bits = np.float32(x).view(np.uint32)
    if (bits & np.uint32(0x7FFFFFFF)) > np.uint32(0x7F800000):
        return np.uint16(0x7FC0)
    return np.uint16((bits + np.uint32(0x7FFF) + ((bits >> np.uint32(16)) & np.uint32(1))) >> np.uint32(16))


@_jit
def float16_bits(x):
    """Nearest float16 of a float32, ties to even; beyond 65,504 infinite, as NumPy casts."""
    bits = np.float32(x).view(np.uint32)
    sign = (bits >> np.uint32(16)) & np.uint32(0x8000)
    size = np.uint32(bits & np.uint32(0x7FFFFFFF))  # numba widens: every step back to 32 bits
    if size > np.uint32(0x7F800000):
        return np.uint16(sign | np.uint32(0x7E00))
    if size >= np.uint32(0x47800000):
        return np.uint16(sign | np.uint32(0x7C00))
    if size < np.uint32(0x38800000):  # subnormal: adding 0.5 puts the last bit where float16 has it
        rounded = np.float32(size.view(np.float32) + np.float32(0.5))
        return np.uint16(sign | (rounded.view(np.uint32) - np.uint32(0x3F000000)))
    odd = (size >> np.uint32(13)) & np.uint32(1)
    size = np.uint32(size + np.uint32(0xC8000FFF) + odd)  # exponent bias 127 -> 15, and round
    return np.uint16(sign | (size >> np.uint32(13)))


@_jit
def _scale_of(values, a, b, target_sum):
    """Factor that makes values[a:b] sum to target_sum; 1 without one or for an empty row."""
    if target_sum <= 0:
        return 1.0
    total = 0.0
    for k in range(a, b):
        total += values[k]
    return target_sum / total if total > 0 else 1.0


@_jit
def add_rows(offsets, indices, values, target_sum, out):
    """Rows into a float matrix: zero a row, add to it while it is in cache, go on."""
    number = out.dtype.type
    for row in range(len(offsets) - 1):
        a, b = offsets[row], offsets[row + 1]
        line = out[row]
        line[:] = 0
        scale = _scale_of(values, a, b, target_sum)
        if scale == 1.0:
            for k in range(a, b):
                line[indices[k]] += number(values[k])
        else:
            for k in range(a, b):
                line[indices[k]] += number(values[k] * scale)


@_jit
def convert_rows(offsets, indices, values, target_sum, log, kind, tile, out):
    """As `add_rows`, then a function of each sum: log1p, or a narrower float.

    `tile` is one row of float32 zeros, and is left so: repeated columns add up there first.
    """
    for row in range(len(offsets) - 1):
        a, b = offsets[row], offsets[row + 1]
        line = out[row]
        line[:] = 0
        scale = _scale_of(values, a, b, target_sum)
        for k in range(a, b):
            tile[indices[k]] += np.float32(values[k] * scale)
        for k in range(a, b):
            x = tile[indices[k]]
            if log:
                x = np.float32(math.log1p(x))
            if kind == BFLOAT16:
                line[indices[k]] = bfloat16_bits(x)
            elif kind == FLOAT16:
                line[indices[k]] = float16_bits(x)
            else:
                line[indices[k]] = x
        for k in range(a, b):
            tile[indices[k]] = 0
