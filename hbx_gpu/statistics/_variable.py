"""Highly variable features as Seurat v3 and scanpy find them, from the counts in histograms."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Protocol

import numpy as np

from hbx_gpu.statistics._bins import Counted, edges
from hbx_gpu.statistics._loess import loess

if TYPE_CHECKING:
    import pandas as pd

_LEAST = 3  # features that a regression needs


class Moments(Protocol):
    """What is needed of :class:`~hbx_gpu.statistics.Statistics`, by the same names."""

    @property
    def feature_uids(self) -> np.ndarray: ...

    @property
    def measured(self) -> np.ndarray: ...

    @property
    def mean(self) -> np.ndarray: ...

    @property
    def variance(self) -> np.ndarray: ...

    @property
    def histogram(self) -> Counted: ...


def seurat_v3(
    whole: Moments, batches: Sequence[Moments], n: int, span: float, *, by_batch: bool
) -> pd.DataFrame:
    """The `n` most variable features; see :meth:`Statistics.highly_variable`.

    Parameters
    ----------
    whole
        Statistics of all cells, for means and variances.
    batches
        Those of each batch, or `whole` alone.
    n, span, by_batch
        As the method has them.
    """
    import pandas as pd

    variances = np.stack(
        [normalized_variances(batch, span) for batch in batches] or [np.zeros(whole.mean.shape)]
    )
    place = np.argsort(np.argsort(-variances, axis=1, kind="stable"), axis=1).astype(np.float64)
    place[(place >= n) | (variances == 0)] = np.nan
    in_batches = np.isfinite(place).sum(axis=0)
    found = np.flatnonzero(in_batches)
    rank = np.full(len(in_batches), np.nan)
    rank[found] = np.nanmedian(place[:, found], axis=0)
    order = np.lexsort((-in_batches, rank))[: min(n, len(found))]  # stable, NaN last
    columns = {
        "means": whole.mean[order],
        "variances": whole.variance[order],
        "variances_norm": variances.mean(axis=0)[order],
        "highly_variable_rank": rank[order],
    }
    if by_batch:
        columns["highly_variable_nbatches"] = in_batches[order]
    return pd.DataFrame(columns, index=pd.Index(whole.feature_uids[order], name="feature_uid"))


def normalized_variances(batch: Moments, span: float) -> np.ndarray:
    """float64, (n_features,). Variances of counts that are standardized and clipped; 0 where nothing varies.

    A regression of log variance on log mean says which standard deviation is expected of each feature. Counts
    more than ``sqrt(number of cells)`` of these above the mean are clipped there.
    """
    mean = np.nan_to_num(batch.mean)
    variance = np.nan_to_num(batch.variance)
    varies = np.flatnonzero(variance > 0)
    result = np.zeros(len(mean))
    if len(varies) < _LEAST:
        return result
    expected = np.ones(len(mean))
    expected[varies] = 10 ** loess(np.log10(mean[varies]), np.log10(variance[varies]), span)
    n = batch.measured.astype(np.float64)
    highest = np.sqrt(expected * n) + mean
    result[varies] = variance[varies] / expected[varies]

    counted = batch.histogram
    low, high = edges(counted.code, whole=True)
    clipped = np.zeros(len(mean), bool)
    clipped[counted.cell[high > highest[counted.cell]]] = True
    clipped &= variance > 0
    if not clipped.any():
        return result
    here = np.flatnonzero(clipped[counted.cell])
    cell = counted.cell[here]
    value = np.minimum((low[here] + high[here]) / 2, highest[cell])
    times = counted.count[here]
    total = np.bincount(cell, value * times, len(mean))[clipped]
    squares = np.bincount(cell, value**2 * times, len(mean))[clipped]
    n, mean = n[clipped], mean[clipped]
    result[clipped] = (n * mean**2 + squares - 2 * total * mean) / ((n - 1) * expected[clipped])
    return result
