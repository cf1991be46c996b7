"""From sums and counts to statistics."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from hbx_gpu.statistics import _kernels as kernels
from hbx_gpu.statistics._bins import RELATIVE_ERROR, Counted, binned_medians
from hbx_gpu.statistics._kernels import Sums
from hbx_gpu.statistics._partial import Partial
from hbx_gpu.statistics._result import Statistics

_SAFE = 2.0**62  # products below this are computed in int64


@dataclass(frozen=True)
class Asked:
    """What the columns and groups of a result are.

    Attributes
    ----------
    feature_uids
        (n_features,).
    by, names
        obs column and its values; None and () without groups.
    n_cells
        int64, (n_groups,). Cells of each group; where there are names, a last group holds the cells without a
        value.
    measured
        int64, (n_features, n_groups). Cells of each group that measure each feature.
    target_sum
        See :class:`Statistics`.
    """

    feature_uids: np.ndarray
    by: str | None
    names: tuple[str, ...]
    n_cells: np.ndarray
    measured: np.ndarray
    target_sum: float | None

    @property
    def n_groups(self) -> int:
        return len(self.n_cells)


def finished(partial: Partial, asked: Asked) -> Statistics:
    """The statistics of all cells, and those of each group."""
    n_features, n_groups = len(asked.feature_uids), asked.n_groups
    whole, ratios = partial.whole.counted(), partial.ratios.counted()
    cell = np.concatenate([part[0] for part in partial.listed] or [np.empty(0, np.int64)])
    value = np.concatenate([part[1] for part in partial.listed] or [np.empty(0)])
    partial.listed = []  # its memory is needed now

    def medians(bins: Counted, cells: np.ndarray, n: int) -> np.ndarray:
        if partial.exact:
            found: np.ndarray = kernels.listed_medians(cells, value, n)
            return found
        return binned_medians(bins, n)

    def one(
        sums: Sums,
        n_cells: int,
        measured: np.ndarray,
        median: np.ndarray,
        histogram: Counted,
        **groups: object,
    ) -> Statistics:
        total, mean, variance = moments(sums, measured)
        return Statistics(
            feature_uids=asked.feature_uids,
            n_cells=n_cells,
            measured=measured,
            nonzero=sums.nonzero,
            sum=total,
            mean=mean,
            variance=variance,
            median=np.where(sums.odd == 0, median, np.nan),
            target_sum=asked.target_sum,
            median_error=0.0 if partial.exact else RELATIVE_ERROR,
            whole=sums.n == 0,
            histogram=histogram,
            **groups,  # type: ignore[arg-type]
        )

    groups = {}
    if asked.by is not None:
        median = medians(ratios, cell, n_features * n_groups).reshape(n_features, n_groups)
        histograms = _split(whole, n_groups)
        for g, (name, histogram) in enumerate(zip(asked.names, histograms, strict=False)):
            sums = Sums(*(array.reshape(n_features, n_groups)[:, g].copy() for array in partial.sums))
            measured = asked.measured[:, g].copy()
            groups[name] = one(sums, int(asked.n_cells[g]), measured, median[:, g].copy(), histogram)
    feature = np.repeat(np.arange(n_features), n_groups)
    return one(
        _folded(partial.sums, n_groups),
        int(asked.n_cells.sum()),
        asked.measured.sum(axis=1),
        medians(ratios.of_cells(feature), cell // n_groups, n_features),
        whole.of_cells(feature),
        by=asked.by,
        groups=groups,
    )


def _split(whole: Counted, n_groups: int) -> Iterator[Counted]:
    """The counts of each group, cells numbered by feature."""
    feature, group = np.divmod(whole.cell, n_groups)
    order = np.argsort(group, kind="stable")
    ends = np.searchsorted(group[order], np.arange(n_groups + 1))
    for begin, end in itertools.pairwise(ends):
        part = order[begin:end]
        yield Counted(feature[part], whole.code[part], whole.count[part])


def _folded(sums: Sums, n_groups: int) -> Sums:
    """Sums over all groups."""
    if n_groups == 1:
        return sums
    shaped = Sums(*(array.reshape(-1, n_groups) for array in sums))
    n, mean, m2 = (np.ascontiguousarray(array[:, 0]) for array in (shaped.n, shaped.mean, shaped.m2))
    for g in range(1, n_groups):
        kernels.merge_floats(n, mean, m2, shaped.n[:, g], shaped.mean[:, g], shaped.m2[:, g])
    low = shaped.square_low.sum(axis=1)
    return Sums(
        shaped.nonzero.sum(axis=1),
        shaped.total.sum(axis=1),
        shaped.square_high.sum(axis=1) + (low >> 32),
        low & ((1 << 32) - 1),
        n,
        mean,
        m2,
        shaped.odd.sum(axis=1),
    )


def moments(sums: Sums, measured: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Sum, mean and variance (divisor ``measured - 1``) over the cells that measure each feature, float64.

    Where all values are whole numbers, everything before the last division is computed in integers.
    """
    n = measured
    numerator = _times_minus_square(n, sums)  # n * (sum of squares) - (sum)**2
    with np.errstate(invalid="ignore", divide="ignore"):
        pairs = n.astype(np.float64) * (n - 1)
        mean = sums.total / n
        variance = np.where(n > 1, numerator / pairs, np.nan)
    total = sums.total.astype(np.float64)
    mixed = np.flatnonzero(sums.n)
    if len(mixed):
        some = Sums(*(np.ascontiguousarray(array[mixed]) for array in sums))
        count = some.nonzero - some.n
        with np.errstate(invalid="ignore", divide="ignore"):
            at = np.where(count > 0, some.total / count, 0.0)
            m2 = np.where(count > 0, _times_minus_square(count, some) / count, 0.0)
        zeros = n[mixed] - some.nonzero
        kernels.merge_floats(count, at, m2, some.n, some.mean, some.m2)
        nonzero_mean, nonzero = at.copy(), count.copy()
        kernels.merge_floats(count, at, m2, zeros, np.zeros(len(mixed)), np.zeros(len(mixed)))
        total[mixed], mean[mixed] = nonzero_mean * nonzero, at
        with np.errstate(invalid="ignore", divide="ignore"):
            variance[mixed] = np.where(count > 1, m2 / (count - 1), np.nan)
    return total, mean, variance


def _times_minus_square(n: np.ndarray, sums: Sums) -> np.ndarray:
    """float64. ``n * (sum of squares) - (sum)**2`` in integers, rounded once."""
    squares = sums.square_high * 2.0**32 + sums.square_low
    small = n * squares < _SAFE
    with np.errstate(over="ignore"):
        exact = n * ((sums.square_high << 32) + sums.square_low) - sums.total * sums.total
    result: np.ndarray = exact.astype(np.float64)
    for i in np.flatnonzero(~small).tolist():
        square = (int(sums.square_high[i]) << 32) + int(sums.square_low[i])
        result[i] = float(int(n[i]) * square - int(sums.total[i]) ** 2)
    return result
