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
    """Return the factor that makes values[a:b] sum to target_sum; 1 without target_sum and for empty rows."""
    if target_sum <= 0:
        return 1.0
    total = 0.0
    for k in range(a, b):
        total += values[k]
    return target_sum / total if total > 0 else 1.0


@_jit
def log1p32(x, out):
    """out = log(1 + x) for float32 x, to float32 accuracy; a fraction of the library's time.

    In double: 1 + x = m * 2**e with m in [sqrt(1/2), sqrt(2)), log m from the series of
    2 * atanh((m - 1) / (m + 1)), whose argument stays below 0.172. Where 1 + x would round x away, its own
    series is exact enough. Negative or huge x: the library.
    """
    low = high = np.float32(0)
    for k in range(len(x)):
        low, high = min(low, x[k]), max(high, x[k])
    if not (low >= 0 and high < 1e30):
        for k in range(len(x)):
            out[k] = math.log1p(np.float64(x[k]))
        return
    for k in range(len(x)):
        v = np.float64(x[k])
        bits = np.float64(1.0 + v).view(np.int64)
        # Adding the bits of 1 - sqrt(1/2) carries into the exponent just where m should be halved.
        exponent = (bits + 0x95F619980C433) >> 52
        m = np.int64(bits - ((exponent - 1023) << 52)).view(np.float64)
        z = (m - 1.0) / (m + 1.0)
        w = z * z
        series = 1.0 + w * (
            1.0 / 3.0 + w * (1.0 / 5.0 + w * (1.0 / 7.0 + w * (1.0 / 9.0 + w * (1.0 / 11.0 + w / 13.0))))
        )
        far = 2.0 * z * series + (exponent - 1023) * 0.6931471805599453
        near = v * (1.0 - v * (0.5 - v * (1.0 / 3.0)))
        out[k] = np.float32(near if v < 1e-4 else far)


@_jit
def _inside(indices, a, b, n_features):
    """Return whether all of indices[a:b] lie in [0, n_features)."""
    part = indices[a:b]
    low, high = np.int32(0), np.int32(-1)
    for k in range(len(part)):
        if part[k] > high:
            high = part[k]
        if part[k] < low:
            low = part[k]
    return low >= 0 and high < n_features


@_jit
def add_rows(offsets, indices, values, target_sum, out):
    """Write rows to a float matrix: zero each row, then add to it while it is in cache.

    Returns the first row with a column outside the matrix, or -1.
    """
    number = out.dtype.type
    for row in range(len(offsets) - 1):
        a, b = offsets[row], offsets[row + 1]
        if not _inside(indices, a, b, out.shape[1]):
            return row
        line = out[row]
        line[:] = 0
        scale = _scale_of(values, a, b, target_sum)
        columns, counts = indices[a:b], values[a:b]
        # Columns are made unsigned: numba would test each signed one for being negative, to count from the
        # end.
        if scale == 1.0:
            for k in range(len(columns)):
                line[np.uint64(columns[k])] += number(counts[k])
        else:
            for k in range(len(columns)):
                line[np.uint64(columns[k])] += number(counts[k] * scale)
    return -1


@_jit
def convert_rows(offsets, indices, values, target_sum, log, kind, tile, sums, out):
    """Do what `add_rows` does, then apply log1p to each sum or convert it to a narrower float.

    `tile` is one row of float32 zeros, in which repeated columns are added up first; it is all zeros again
    afterwards. `sums` has room for the values of the longest row. Returns the first row with a column
    outside the matrix, or -1, and the largest finite absolute value that was written as float16, or 0.
    """
    largest = np.float32(0)
    for row in range(len(offsets) - 1):
        a, b = offsets[row], offsets[row + 1]
        if not _inside(indices, a, b, out.shape[1]):
            return row, largest
        line = out[row]
        line[:] = 0
        scale = _scale_of(values, a, b, target_sum)
        columns, counts, x = indices[a:b], values[a:b], sums[: b - a]
        for k in range(len(columns)):
            tile[np.uint64(columns[k])] += np.float32(counts[k] * scale)
        for k in range(len(columns)):
            x[k] = tile[np.uint64(columns[k])]
        if log:
            log1p32(x, x)
        for k in range(len(columns)):
            column = np.uint64(columns[k])
            if kind == BFLOAT16:
                line[column] = bfloat16_bits(x[k])
            elif kind == FLOAT16:
                size = abs(x[k])
                if size > largest and size < np.float32(np.inf):
                    largest = size
                line[column] = float16_bits(x[k])
            else:
                line[column] = x[k]
            tile[column] = 0
    return -1, largest
