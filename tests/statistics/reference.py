"""Statistics as one would write them down in NumPy: a dense matrix, exact fractions, no parts."""

from __future__ import annotations

from fractions import Fraction

import numpy as np


def columns_of(
    dense: np.ndarray, measured: np.ndarray, target_sum: float | None = 10_000.0
) -> dict[str, np.ndarray]:
    """What :class:`hbx_gpu.statistics.Statistics` says of each feature.

    Parameters
    ----------
    dense
        float64, (n_cells, n_features).
    measured
        bool, (n_cells, n_features). Which features each cell's dataset has.
    target_sum
        What totals are scaled to for medians.
    """
    n_features = dense.shape[1]
    names = ("measured", "nonzero", "sum", "mean", "variance", "median")
    found = {name: np.full(n_features, np.nan) for name in names}
    with np.errstate(invalid="ignore", divide="ignore"):
        totals = dense.sum(axis=1, keepdims=True)
        scaled = dense if target_sum is None else dense / totals * target_sum
    for feature in range(n_features):
        has = measured[:, feature]
        n, values = int(has.sum()), [Fraction(x) for x in dense[has, feature].tolist()]
        found["measured"][feature], found["nonzero"][feature] = n, sum(x != 0 for x in values)
        found["sum"][feature] = float(sum(values))
        if n:
            found["mean"][feature] = float(sum(values) / n)
        if n > 1:
            mean = sum(values) / n
            found["variance"][feature] = float(sum((x - mean) ** 2 for x in values) / (n - 1))
        nonzero = scaled[dense[:, feature] != 0, feature]
        if len(nonzero):
            found["median"][feature] = np.median(nonzero)
    return found
