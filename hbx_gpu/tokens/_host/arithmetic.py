"""The arithmetic of :mod:`hbx_gpu.tokens._arithmetic` for one value, step by step the same."""

from __future__ import annotations

import math

import numpy as np

from hbx_gpu.tokens._arithmetic import INV_LN2, LN2_HIGH, LN2_LOW, LOG_SERIES, SQRT_HALF
from hbx_gpu.tokens._host.draws import jit
from hbx_gpu.tokens._program import Curve, Norm

_A0, _A1, _A2, _A3, _A4, _A5, _A6 = LOG_SERIES
_F64_DIV, _F64_RECIP, _F64_KNOWN = int(Norm.F64_DIV), int(Norm.F64_RECIP), int(Norm.F64_KNOWN)
_COUNT, _F32_RECIP, _F32_DIV = int(Norm.COUNT), int(Norm.F32_RECIP), int(Norm.F32_DIV)
_F32_EPS, _F32_FACTOR = int(Norm.F32_EPS), int(Norm.F32_FACTOR)
_F32_KNOWN_EPS, _F32_KEPT = int(Norm.F32_KNOWN_EPS), int(Norm.F32_KEPT)
_LOG1P, _LOG2P1 = int(Curve.LOG1P), int(Curve.LOG2P1)
_ONE = np.float32(1)


@jit
def log1p(x):
    """See :func:`hbx_gpu.tokens._arithmetic.log1p`."""
    if x < 0.41421356237309503:
        k, f, c = 0.0, x, 0.0
    else:
        u = 1.0 + x
        m, e = math.frexp(u)
        if m < SQRT_HALF:
            m *= 2.0
            e -= 1
        k = np.float64(e)
        f = m - 1.0
        c = (1.0 - (u - x) if k >= 1.0 else x - (u - 1.0)) / u
    half = 0.5 * f * f
    s = f / (2.0 + f)
    z = s * s
    w = z * z
    even = w * (_A1 + w * (_A3 + w * _A5))
    odd = z * (_A0 + w * (_A2 + w * (_A4 + w * _A6)))
    return (s * (half + (odd + even)) + (k * LN2_LOW + c) - half + f) + k * LN2_HIGH


@jit
def normalize(norm, x, total, known, kept, target):
    """See :func:`hbx_gpu.tokens._arithmetic.normalize`."""
    if x == 0.0:
        return 0.0
    if norm == _F64_DIV:
        return x / total * target
    if norm == _F64_RECIP:
        return x * (1.0 / total) * target
    if norm == _F64_KNOWN:
        return x / known * target
    y, n, t, v = np.float32(x), np.float32(target), np.float32(total), np.float32(known)
    if norm == _COUNT:
        r = y
    elif norm == _F32_RECIP:
        r = np.float32(np.float32(y * np.float32(_ONE / t)) * n)
    elif norm == _F32_DIV:
        r = np.float32(np.float32(y / v) * n)
    elif norm == _F32_EPS:
        r = np.float32(np.float32(n * y) / np.float32(t + np.float32(1e-6)))
    elif norm == _F32_FACTOR:
        r = np.float32(y * np.float32(n / t))
    elif norm == _F32_KNOWN_EPS:
        r = np.float32(np.float32(y / np.float32(v + np.float32(1e-9))) * n)
    elif norm == _F32_KEPT:
        r = np.float32(np.float32(y / np.float32(kept)) * n)
    else:
        r = np.float32(np.float32(y * n) / t)
    return np.float64(r)


@jit
def rank_key(norm, value, scale):
    """See :func:`hbx_gpu.tokens._arithmetic.rank_keys`."""
    if norm in (_F64_RECIP, _F32_RECIP):
        return value * scale
    if norm == _F32_EPS:
        return np.float64(np.float32(np.float32(value) / np.float32(scale)))
    return value / scale


@jit
def bend(curve, value, clip):
    """See :func:`hbx_gpu.tokens._arithmetic.bend`."""
    if curve == _LOG1P:
        value = log1p(value)
    elif curve == _LOG2P1:
        y = np.float32(_ONE + np.float32(value))
        value = log1p(np.float64(y) - 1.0) * INV_LN2
    return min(np.float32(value), np.float32(clip))
