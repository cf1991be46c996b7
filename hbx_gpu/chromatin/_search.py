"""Build the tables in which `kernels` find the peaks that a position lies in."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True, slots=True)
class PeakSearch:
    """Peaks sorted by chromosome and start (*slots*), and equal *buckets* of each chromosome that lead there.

    Attributes
    ----------
    first
        int64, (n_chromosomes,). First bucket of each chromosome.
    size
        int64, (n_chromosomes,). End of the last peak of each chromosome; 0 where it has none.
    stop
        int64, (n_chromosomes,). Last slot of each chromosome, plus 1.
    shift
        Position ``p`` lies in bucket ``p >> shift`` of its chromosome.
    start, end
        int64, (n_slots,). Start and end of each peak.
    reach
        int64, (n_slots,). The largest end of this and all earlier peaks of the chromosome. It ascends even
        where peaks overlap.
    column
        int32, (n_slots,). Output column of each peak.
    buckets
        int32. For each bucket, the first slot whose reach lies after the bucket's beginning. Each chromosome
        has one more bucket than it fills, as the end of its last one.
    """

    first: np.ndarray
    size: np.ndarray
    stop: np.ndarray
    shift: int
    start: np.ndarray
    end: np.ndarray
    reach: np.ndarray
    column: np.ndarray
    buckets: np.ndarray

    @property
    def arrays(self) -> tuple[np.ndarray, ...]:
        """Return the arrays that kernels take, in their order."""
        return self.start, self.end, self.reach, self.column, self.buckets


def peak_search(chromosome: np.ndarray, start: np.ndarray, end: np.ndarray, n_chromosomes: int) -> PeakSearch:
    """Sort peaks and lay buckets over them, about two to a peak.

    Parameters
    ----------
    chromosome
        int, (n_features,). The dataset's number of every peak's chromosome; negative: not there.
    start, end
        int64, (n_features,).
    n_chromosomes
        Chromosomes of the dataset.
    """
    column = np.flatnonzero(chromosome >= 0)
    column = column[np.lexsort((end[column], start[column], chromosome[column]))]
    slots = np.searchsorted(chromosome[column], np.arange(n_chromosomes + 1)).tolist()
    reach = end[column].copy()
    size = np.zeros(n_chromosomes, np.int64)
    for c in range(n_chromosomes):
        mine = reach[slots[c] : slots[c + 1]]
        np.maximum.accumulate(mine, out=mine)
        size[c] = mine[-1] if len(mine) else 0
    shift = (int(size.sum()) // max(2 * len(column), 1)).bit_length()
    number = (-(-size >> shift) + 1).tolist()
    parts = [
        slots[c] + np.searchsorted(reach[slots[c] : slots[c + 1]], np.arange(number[c]) << shift, "right")
        for c in range(n_chromosomes)
    ]
    return PeakSearch(
        first=np.cumsum([0, *number[:-1]])[:n_chromosomes].astype(np.int64),
        size=size,
        stop=np.array(slots[1:], np.int64),
        shift=shift,
        start=start[column],
        end=end[column],
        reach=reach,
        column=column.astype(np.int32),
        buckets=np.concatenate([np.empty(0, np.int64), *parts]).astype(np.int32),
    )


def no_peaks(first: np.ndarray, size: np.ndarray) -> PeakSearch:
    """Return tables for bins, which need no search: the first column and the bases of each chromosome."""
    wide, narrow = np.empty(0, np.int64), np.empty(0, np.int32)
    return PeakSearch(first, size, np.zeros(len(size), np.int64), 0, wide, wide, wide, narrow, narrow)
