"""Local quadratic regression of one variable on another: what ``loess(x, y, span, degree=2)`` fits.

As in the Fortran program of Cleveland and Grosse, which R and scikit-misc run, regressions are made at the
vertices of a tree of cells, and values between two vertices come from the cubic polynomial that has the
values and slopes of both.
"""

from __future__ import annotations

import numpy as np

from hbx_gpu._advice import option

_CELL = 0.2  # a cell with at most this share of a neighborhood is not cut
_MARGIN = 0.005  # of the range of x, by which the outermost vertices lie outside
_SMALLEST = 100 * np.finfo(np.float64).eps  # singular values below this, relative to the largest, count as 0


def loess(x: np.ndarray, y: np.ndarray, span: float = 0.3) -> np.ndarray:
    """Fitted values.

    Parameters
    ----------
    x, y
        float64, (n,), finite.
    span
        Share of the points that each regression looks at, above 0 and at most 1.

    Returns
    -------
    ndarray
        float64, (n,).

    Raises
    ------
    ValueError
        The span is outside (0, 1], or there are too few different points for a quadratic polynomial.
    """
    if not 0 < span <= 1:
        raise ValueError(f"span must be above 0 and at most 1, got {span}")
    order = np.argsort(x, kind="stable")
    x_sorted, y_sorted = x[order], y[order]
    n = len(x)
    near = min(n, int(n * span + 1e-5))
    if near < 3 or len(np.unique(x)) < 3:
        raise ValueError(
            "a local quadratic regression needs at least 3 different points in each neighborhood; there are "
            f"{n} points, and span={span} makes neighborhoods of {near}; {_remedy(x)}"
        )
    vertices = _vertices(x_sorted, int(n * span * _CELL))
    fits = np.array([_fit(x_sorted, y_sorted, at, near) for at in vertices])
    cell = np.clip(np.searchsorted(vertices, x_sorted, side="right") - 1, 0, len(vertices) - 2)
    width = vertices[cell + 1] - vertices[cell]
    t = (x_sorted - vertices[cell]) / width
    (value, slope), (next_value, next_slope) = fits[cell].T, fits[cell + 1].T
    fitted = (
        (1 + 2 * t) * (1 - t) ** 2 * value
        + t * (1 - t) ** 2 * width * slope
        + t**2 * (3 - 2 * t) * next_value
        + t**2 * (t - 1) * width * next_slope
    )
    result = np.empty(n)
    result[order] = fitted
    return result


def _vertices(x: np.ndarray, most: int) -> np.ndarray:
    """Ends of the cells, ascending: a cell with more than `most` points is cut at its median."""
    low, high = float(x[0]), float(x[-1])
    margin = _MARGIN * max(high - low, max(abs(low), abs(high)) * 1e-10 + 1e-30)
    vertices = [low - margin, high + margin]
    pending = [(0, len(x) - 1, vertices[0], vertices[1])]
    while pending:
        first, last, left, right = pending.pop()
        if last - first + 1 <= most:
            continue
        middle = _between(x, first, last)
        cut = float(x[middle])
        if cut in (left, right):
            continue
        vertices.append(cut)
        pending += [(first, middle, left, cut), (middle + 1, last, cut, right)]
    return np.unique(vertices)


def _between(x: np.ndarray, first: int, last: int) -> int:
    """The place nearest to the middle of a cell whose point differs from the next one (x ascending)."""
    middle = (first + last) // 2
    offset = 0
    while first <= middle + offset < last:
        if x[middle + offset] != x[middle + offset + 1]:
            return middle + offset
        offset = -offset if offset > 0 else 1 - offset
    return middle


def _fit(x: np.ndarray, y: np.ndarray, at: float, near: int) -> tuple[float, float]:
    """Value and slope, at a point, of the quadratic polynomial through its neighborhood (x ascending)."""
    distance = np.abs(x - at)
    reach = np.partition(distance, near - 1)[near - 1]
    if reach == 0:  # all neighbors are at this very point; the original gives up here
        reach = distance[distance > 0].min()
    ratio = distance / reach
    inside = np.flatnonzero(ratio < 1)
    root = np.sqrt((1 - ratio[inside] ** 3) ** 3)
    step = x[inside] - at
    terms = np.stack([root, root * step, root * step**2], axis=1)
    norms = np.sqrt((terms**2).sum(axis=0))
    norms[norms == 0] = 1.0
    found = np.linalg.lstsq(terms / norms, y[inside] * root, rcond=_SMALLEST)[0] / norms
    return float(found[0]), float(found[1])


def _remedy(x: np.ndarray) -> str:
    if len(np.unique(x)) < 3:
        return "so few cannot be ranked: take more features or more cells"
    larger = option("span", f"{min(1.0, np.ceil(100 * 3 / len(x)) / 100):g}")
    return f"choose a larger span: pass {larger} to highly_variable() of the statistics"
