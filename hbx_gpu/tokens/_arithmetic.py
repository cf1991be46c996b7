"""Floating-point steps of the recipes in NumPy, in the order that the published packages round in.

Every step is one IEEE operation. The engines repeat them one by one, so logarithms are made here of such
steps too: those of C libraries differ in the last bit.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from hbx_gpu.tokens._program import Curve, Norm

SQRT_HALF = 0.7071067811865476
LN2_HIGH, LN2_LOW = 6.93147180369123816490e-01, 1.90821492927058770002e-10
LOG_SERIES = (
    6.666666666666735130e-01,
    3.999999999940941908e-01,
    2.857142874366239149e-01,
    2.222219843214978396e-01,
    1.818357216161805012e-01,
    1.531383769920937332e-01,
    1.479819860511658591e-01,
)
INV_LN2, INV_LN10 = 1.4426950408889634, 0.4342944819032518
"""1 / log(2) and 1 / log(10)."""


def log1p(x: np.ndarray) -> np.ndarray:
    """``log(1 + x)`` of x >= 0 in float64, to about one unit in the last place.

    1 + x = 2**k * (1 + f) with 1 + f in [sqrt(1/2), sqrt(2)), and log(1 + f) from the series of
    2 * atanh(f / (2 + f)): the method of fdlibm's ``s_log1p.c``, with its coefficients.
    """
    x = np.asarray(x, np.float64)
    u = 1.0 + x
    m, k = np.frexp(u)
    low = m < SQRT_HALF
    m, k = np.where(low, m * 2.0, m), (k - low).astype(np.float64)
    small = x < 0.41421356237309503  # 1 + x below sqrt(2): x itself is exact, 1 + x may not be
    f = np.where(small, x, m - 1.0)
    k = np.where(small, 0.0, k)
    # What rounding 1 + x lost.
    c = np.where(small, 0.0, np.where(k >= 1.0, 1.0 - (u - x), x - (u - 1.0)) / u)
    half = 0.5 * f * f
    s = f / (2.0 + f)
    z = s * s
    w = z * z
    a = LOG_SERIES
    even = w * (a[1] + w * (a[3] + w * a[5]))
    odd = z * (a[0] + w * (a[2] + w * (a[4] + w * a[6])))
    result: np.ndarray = (s * (half + (odd + even)) + (k * LN2_LOW + c) - half + f) + k * LN2_HIGH
    return result


def normalize(norm: Norm, x: np.ndarray, total: int, known: int, kept: float, target: float) -> np.ndarray:
    """Counts scaled; see :class:`Norm`.

    Parameters
    ----------
    x
        float64 (n,), whole numbers.
    total, known, kept
        Sums over all genes of the cell, over known ones, over those that are kept.
    target
        What the sum becomes.

    Returns
    -------
    np.ndarray
        float64 (n,); float32 arithmetics are widened. 0 where a count is 0, also of a cell without counts.
    """
    with np.errstate(invalid="ignore", divide="ignore"):
        return np.where(x == 0, 0.0, _scaled(norm, x, total, known, kept, target))


def _scaled(norm: Norm, x: np.ndarray, total: int, known: int, kept: float, target: float) -> np.ndarray:
    """As `normalize`, but for zeros of a cell without counts."""
    if norm in (Norm.F64_DIV, Norm.F64_RECIP, Norm.F64_KNOWN):
        if norm == Norm.F64_RECIP:
            return x * (1.0 / np.float64(total)) * target
        return x / np.float64(known if norm == Norm.F64_KNOWN else total) * target
    one, n = np.float32(1), np.float32(target)
    y, t, t_known = x.astype(np.float32), np.float32(total), np.float32(known)
    ways: dict[Norm, Callable[[], np.ndarray]] = {
        Norm.COUNT: lambda: y,
        Norm.F32_RECIP: lambda: y * (one / t) * n,
        Norm.F32_DIV: lambda: y / t_known * n,
        Norm.F32_EPS: lambda: n * y / (t + np.float32(1e-6)),
        Norm.F32_FACTOR: lambda: y * (n / t),
        Norm.F32_KNOWN_EPS: lambda: y / (t_known + np.float32(1e-9)) * n,
        Norm.F32_KEPT: lambda: y / np.float32(kept) * n,
        Norm.F32_TIMES: lambda: y * n / t,
    }
    return ways[norm]().astype(np.float64)


def rank_keys(norm: Norm, values: np.ndarray, scale: np.ndarray) -> np.ndarray:
    """float64. Scaled counts by the scales of their genes, reciprocals where the arithmetic takes those."""
    if norm in (Norm.F64_RECIP, Norm.F32_RECIP):
        result: np.ndarray = values * scale
        return result
    if norm == Norm.F32_EPS:
        return (values.astype(np.float32) / scale.astype(np.float32)).astype(np.float64)
    result = values / scale
    return result


def bend(curve: Curve, values: np.ndarray, clip: float) -> np.ndarray:
    """float32. Scaled values after curve and clip."""
    if curve == Curve.LOG1P:
        values = log1p(values)
    elif curve == Curve.LOG2P1:
        y = np.float32(1) + values.astype(np.float32)
        values = log1p(y.astype(np.float64) - 1.0) * INV_LN2
    return np.minimum(values.astype(np.float32), np.float32(clip))


def edges_numpy(values: np.ndarray, bins: int) -> np.ndarray:
    """float64 (bins - 1,). Quantiles as ``numpy.quantile(values, numpy.linspace(0, 1, bins - 1))``.

    Parameters
    ----------
    values
        float32 (n,), n >= 1.
    """
    s = np.sort(values)
    n, steps = len(s), bins - 2
    q = np.arange(bins - 1) * (1.0 / steps)
    q[-1] = 1.0
    t = q * (n - 1)
    f = np.floor(t).astype(np.int64)
    g = t - f
    a, b = s[f], s[np.minimum(f + 1, n - 1)]
    d = (b - a).astype(np.float64)
    result: np.ndarray = np.where(g < 0.5, a + d * g, b - d * (1.0 - g))
    return result


def edges_torch(values: np.ndarray, bins: int) -> np.ndarray:
    """float32 (bins - 1,). Quantiles as ``torch.quantile(values, torch.linspace(0, 1, bins - 1))``.

    Parameters
    ----------
    values
        float32 (n,), n >= 1.
    """
    s = np.sort(values)
    t = linspace32(bins - 1) * np.float32(len(s) - 1)
    f, h = np.floor(t).astype(np.int64), np.ceil(t).astype(np.int64)
    w = t - np.floor(t)
    a, b = s[f], s[h]
    d = b - a
    result: np.ndarray = np.where(w < np.float32(0.5), a + w * d, b - d * (np.float32(1) - w))
    return result


def linspace32(steps: int) -> np.ndarray:
    """float32 (steps,). ``torch.linspace(0, 1, steps)``: from both ends, rounded once, as torch does it."""
    step = np.float64(np.float32(1) / np.float32(steps - 1))
    i = np.arange(steps)
    # Exact in float64, as in the fused multiply-add of torch's vector loop.
    return np.where(i < steps // 2, i * step, 1.0 - (steps - 1 - i) * step).astype(np.float32)


def digits(values: np.ndarray, edges: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """int64, int64. Edges below each value, and edges not above it."""
    wide = values.astype(edges.dtype)
    return np.searchsorted(edges, wide, side="left"), np.searchsorted(edges, wide, side="right")
