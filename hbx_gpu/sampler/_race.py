"""Weighted draws without replacement, any stretch of which is computed alone.

Let each cell arrive at a random time, exponentially distributed with its weight as the rate: the cells in the
order of arrival are successive draws without replacement. Cells of one label have one rate, so it is enough
to know how many cells of each label arrive in a stretch of time, and these numbers are found by halving: of
the cells that arrive in a stretch, those in its first part are binomially distributed. A position is found by
going down this tree, whose nodes are computed from the key of the epoch when they are needed. Which cells of
a label these are follows from a keyed permutation. Memory grows with the number of labels.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np

from hbx_gpu.sampler._permutation import Permutations
from hbx_gpu.sampler._position import ARRIVALS, CELLS, SPLITS, EpochKey
from hbx_gpu.sampler._runs import ranges
from hbx_gpu.sampler._selection import LabelTable

_LEAF = 4096
"""A stretch with no more arrivals is put in order in memory."""
_STEPS = 60
_LEAST_RATE = 1e-290


@dataclass(frozen=True, slots=True)
class _Stretch:
    """A stretch of time.

    Attributes
    ----------
    path
        How it is reached from the stretch of all time, whose path is 1: twice that of the stretch it is a
        part of, plus 1 for the later part.
    span
        Its duration. When it begins does not matter: exponential times have no memory.
    before, here
        int64 (n_labels,). Cells of each label that arrive before it, and in it.
    """

    path: int
    span: float
    before: np.ndarray
    here: np.ndarray

    @property
    def begin(self) -> int:
        """Position of its first cell."""
        return int(self.before.sum())

    @property
    def end(self) -> int:
        """Position after its last cell."""
        return self.begin + int(self.here.sum())


@dataclass(slots=True)
class RaceOrder:
    """Cells in the order in which they arrive.

    Parameters
    ----------
    table
        Cells of each label.
    weights
        float64 (n_labels,). Weight of each label, which its cells share.
    key
        Source of randomness.
    """

    table: LabelTable
    weights: np.ndarray
    key: EpochKey
    _labels: np.ndarray = field(init=False)
    _rates: np.ndarray = field(init=False)
    _within: Permutations = field(init=False)
    _down: list[_Stretch] = field(init=False)
    _kept: dict[int, np.ndarray] = field(init=False, default_factory=dict)

    def __post_init__(self) -> None:
        self._labels = np.flatnonzero(self.weights)
        counts = self.table.counts[self._labels]
        rates = self.weights[self._labels] / counts
        # None is 0, so that the last cell arrives too.
        self._rates = np.maximum(rates / rates.max(initial=0), _LEAST_RATE)
        keys = [self.key.stream(CELLS, label) for label in self._labels.tolist()]
        self._within = Permutations(counts, keys)
        self._down = [_Stretch(1, np.inf, np.zeros_like(counts), counts)]

    def cells(self, begin: int, end: int) -> np.ndarray:
        """See :class:`~hbx_gpu.sampler._orders.EpochOrder`."""
        parts = [np.empty(0, np.int64)]
        while begin < end:
            leaf = self._leaf(begin)
            parts.append(self._arrived(leaf)[begin - leaf.begin : end - leaf.begin])
            begin = min(leaf.end, end)
        return np.concatenate(parts)

    def _leaf(self, position: int) -> _Stretch:
        """The stretch that is not cut any more in which a position lies."""
        while not self._down[-1].begin <= position < self._down[-1].end:
            self._down.pop()
        while (last := self._down[-1]).end - last.begin > _LEAF:
            earlier, later = self._cut(last)
            self._down.append(earlier if position < earlier.end else later)
        return self._down[-1]

    def _cut(self, whole: _Stretch) -> tuple[_Stretch, _Stretch]:
        """Two parts of a stretch, each with about half of its arrivals."""
        n, active = int(whole.here.sum()), self._rates[whole.here > 0]
        # Bisection between a time when fewer than half of the cells are there and one when more are.
        low, high = 0.25 / (n * active.max()), min(whole.span, 1 / active.min())
        time = high
        for _ in range(_STEPS):
            time = float(np.sqrt(low) * np.sqrt(high))
            there = float((whole.here * self._share(time, whole.span)).sum())
            if abs(there - n / 2) < n / 16:
                break
            low, high = (time, high) if there < n / 2 else (low, time)
        rng = np.random.default_rng(self.key.stream(SPLITS, whole.path))
        here = rng.binomial(whole.here, self._share(time, whole.span))
        return (
            _Stretch(2 * whole.path, time, whole.before, here),
            _Stretch(2 * whole.path + 1, whole.span - time, whole.before + here, whole.here - here),
        )

    def _share(self, time: float, span: float) -> np.ndarray:
        """Chance of each label that a cell which arrives within `span` is there after `time`."""
        early, whole = -np.expm1(-self._rates * time), -np.expm1(-self._rates * span)
        return np.minimum(np.divide(early, whole, out=np.full_like(early, time / span), where=whole > 0), 1)

    def _arrived(self, leaf: _Stretch) -> np.ndarray:
        """Cells of a stretch in the order of their arrival."""
        if leaf.path not in self._kept:
            label = np.repeat(np.arange(len(leaf.here)), leaf.here)
            uniform = np.random.default_rng(self.key.stream(ARRIVALS, leaf.path)).random(len(label))
            rate = self._rates[label]
            at = -np.log1p(uniform * np.expm1(-rate * leaf.span)) / rate
            label = label[np.argsort(at, kind="stable")]
            which = np.empty_like(label)
            which[np.argsort(label, kind="stable")] = ranges(leaf.before, leaf.here)
            cells = self.table.cells(self._labels[label], self._within.at(label, which))
            # A batch mostly lies in one stretch, or in two that follow each other.
            self._kept = dict([*self._kept.items()][-1:]) | {leaf.path: cells}
        return self._kept[leaf.path]
