"""Cells found by label and number, weights drawn from, and alias tables: each as its plain form says."""

from __future__ import annotations

import dataclasses
import itertools
import json
import tracemalloc
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hbx_gpu.sampler import BalancedCellSampler, WeightedCellSampler
from hbx_gpu.sampler._draws import CellWeights, alias_table, uniform_pairs
from hbx_gpu.sampler._draws_numba import pairs
from hbx_gpu.sampler._permutation import EXACT, Permutation, Permutations
from hbx_gpu.sampler._position import EpochKey
from hbx_gpu.sampler._race import RaceOrder
from hbx_gpu.sampler._selection import LabelTable
from tests.sampler.orders import flat, world


@settings(max_examples=40, deadline=None)
@given(
    n=st.integers(0, 3000),
    n_labels=st.integers(1, 40),
    ordered=st.booleans(),
    wide=st.booleans(),
    seed=st.integers(0, 9),
)
def test_the_kth_cell_of_a_label(n: int, n_labels: int, ordered: bool, wide: bool, seed: int) -> None:
    codes = np.random.default_rng(seed).integers(-1, n_labels, n)
    codes = np.sort(codes) if ordered else codes
    codes = np.where(codes > 0, codes * 10**9, codes) if wide else codes
    table = LabelTable.of(codes)
    labels = np.unique(codes[codes >= 0])
    assert np.array_equal(table.given, labels)
    for number, label in enumerate(labels.tolist()):
        cells = np.flatnonzero(codes == label)
        assert table.counts[number] == len(cells)
        which = np.arange(len(cells))
        assert np.array_equal(table.cells(np.full(len(cells), number), which), cells)
    assert len(table.counts) == len(labels)


def test_a_cell_is_looked_for_in_its_block_only() -> None:
    codes = np.random.default_rng(0).integers(0, 3, 4000)
    table = LabelTable.of(codes)
    begin = 5 * table.block
    seen = dataclasses.replace(table, codes=np.where(np.arange(len(codes)) < begin, -1, codes))
    for label in range(3):
        which = np.arange(table.before[label, 5], table.counts[label])
        expected = begin + np.flatnonzero(codes[begin:] == label)
        assert np.array_equal(seen.cells(np.full(len(which), label), which), expected)


@settings(max_examples=40, deadline=None)
@given(n=st.integers(1, 2000), zeros=st.floats(0, 1), seed=st.integers(0, 9))
def test_weights_are_drawn_where_their_sum_passes_the_target(n: int, zeros: float, seed: int) -> None:
    rng = np.random.default_rng(seed)
    weights = rng.integers(1, 9, n) * (rng.random(n) >= zeros) * 1.0  # sums of whole numbers are exact
    if not weights.any():
        return
    draws = CellWeights.of(weights)
    uniform = np.append(rng.random(200), [0.0, 1 - 2**-53])
    expected = np.searchsorted(np.cumsum(weights), uniform * weights.sum(), side="right")
    expected = np.minimum(expected, np.flatnonzero(weights)[-1])
    assert np.array_equal(draws.cells(uniform, uniform), expected)
    assert draws.n_drawable == np.count_nonzero(weights)


@settings(max_examples=40, deadline=None)
@given(weights=st.lists(st.integers(0, 50), min_size=1, max_size=30).filter(any))
def test_an_alias_table_holds_exactly_the_weights(weights: list[int]) -> None:
    keep, other = alias_table(np.array(weights, float))
    found = keep.copy()
    np.add.at(found, other, 1 - keep)
    np.testing.assert_allclose(found / len(weights), np.array(weights) / sum(weights), atol=1e-12)
    assert not keep[np.array(weights) == 0].any()


LABELS = np.random.default_rng(8).choice([-1, 0, 3, 4], 5000, p=[0.1, 0.6, 0.25, 0.05])


def test_labels_are_drawn_in_proportion_to_their_weights() -> None:
    sampler = WeightedCellSampler.by_label(LABELS, {0: 1.0, 4: 3.0}, 500, n_samples=40_000, seed=2)
    drawn = np.array(flat([sampler]))
    share = np.bincount(LABELS[drawn], minlength=5) / len(drawn)
    np.testing.assert_allclose(share, [0.25, 0, 0, 0, 0.75], atol=0.012)
    within = np.bincount(drawn[LABELS[drawn] == 4], minlength=5000)[LABELS == 4]
    expected = within.sum() / len(within)
    statistic = ((within - expected) ** 2 / expected).sum()
    assert abs(statistic - len(within)) < 5 * (2 * len(within)) ** 0.5, "cells of a label are equally likely"
    assert len(flat([WeightedCellSampler.by_label(LABELS, {3: 1}, seed=0)])) == np.count_nonzero(LABELS == 3)


def test_draws_without_replacement_by_label() -> None:
    sampler = WeightedCellSampler.by_label(LABELS, {3: 9.0, 4: 1.0}, 100, replacement=False, seed=0)
    drawn = np.array(flat([sampler]))
    assert np.array_equal(np.sort(drawn), np.flatnonzero(LABELS >= 3))
    assert (LABELS[drawn[:100]] == 3).mean() > 0.75


def test_label_weights_that_are_refused() -> None:
    for weights, message in (
        ({0: -1.0}, "that of label 0 is -1.0"),
        ({0: float("nan")}, "that of label 0 is nan"),
        ({0: 1.0, 2: 1.0}, "label 2 has a weight, but no cell has this code"),
        ({0: 0.0}, "all 1 weights are 0"),
        ({}, "all 0 weights are 0"),
    ):
        with pytest.raises(ValueError, match=message):
            WeightedCellSampler.by_label(LABELS, weights)


@pytest.mark.parametrize("make", ["cells", "balanced", "by_label", "balanced batches"])
def test_draws_of_ranks_together_are_those_of_one(make: str) -> None:
    def sampler(**options: Any) -> WeightedCellSampler | BalancedCellSampler:
        if make == "cells":
            return WeightedCellSampler((LABELS + 1.0).astype(np.float32), 60, seed=6, **options)
        if make == "balanced":
            return WeightedCellSampler.balanced(LABELS, 60, seed=6, **options)
        if make == "by_label":
            return WeightedCellSampler.by_label(LABELS, {0: 2.0, 3: 1.0}, 60, seed=6, **options)
        return BalancedCellSampler(LABELS, 60, seed=6, **options)

    alone = sampler()
    whole = flat([alone])
    assert flat(world(sampler, 4)) == whole
    state = json.loads(json.dumps(alone.state_dict(delivered=3)))
    resumed = sampler(rank=0, world_size=1)
    resumed.load_state_dict(state)
    assert flat([resumed]) == whole[180:]


def test_labels_of_many_cells_take_little_memory() -> None:
    codes = np.random.default_rng(0).integers(-1, 50, 2_000_000).astype(np.int8)
    LabelTable.of(codes[:100])  # compiles
    tracemalloc.start()
    balanced = BalancedCellSampler(codes, 500, seed=1)
    weighted = WeightedCellSampler.balanced(codes, 500, seed=1)
    first = next(balanced.batches())
    drawn = next(weighted.batches())
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert set(np.bincount(codes[first])) == {10}
    assert len(np.unique(codes[drawn])) == 50
    assert peak < 13 * 2**20, f"{peak} bytes, and sorted row numbers alone would take 16 million"


@pytest.mark.parametrize("begin", [0, 2**32 - 2, 2**40])
def test_uniform_numbers_in_compiled_code(begin: int) -> None:
    for low, high in ((0, 0), (2**32 - 1, 12345)):
        plain = uniform_pairs(begin, begin + 5, (low, high))
        for fast, expected in zip(pairs(begin, begin + 5, low, high), plain, strict=True):
            assert np.array_equal(fast, expected)


def test_permutations_that_are_looked_up_together() -> None:
    key, rng = EpochKey(4, 2), np.random.default_rng(0)
    sizes = np.array([5, EXACT, EXACT + 1, 40_000, 0, 1])
    together = Permutations(sizes, [key.stream(i) for i in range(len(sizes))])
    which = rng.choice([0, 1, 2, 3, 5], 500)
    positions = (rng.random(500) * sizes[which]).astype(np.int64)
    expected = [
        Permutation(int(sizes[k]), key.stream(k)).at(np.array([p]))[0]
        for k, p in zip(which.tolist(), positions.tolist(), strict=True)
    ]
    assert np.array_equal(together.at(which, positions), expected)


def once(counts: list[int], weights: list[float], epoch: int) -> RaceOrder:
    codes = np.random.default_rng(1).permutation(np.repeat(np.arange(len(counts)), counts))
    return RaceOrder(LabelTable.of(codes), np.array(weights), EpochKey(3, epoch))


@pytest.mark.parametrize("weights", [[1.0, 1.0, 0.0], [1e-250, 1e200, 1.0], [5.0, 1.0, 2.0]])
@pytest.mark.parametrize("counts", [[3, 2, 4], [9_000, 40, 20_000]])
def test_a_race_has_each_cell_once_and_any_stretch_alone(counts: list[int], weights: list[float]) -> None:
    n = sum(count for count, weight in zip(counts, weights, strict=True) if weight)
    order = once(counts, weights, 0)
    whole = order.cells(0, n)
    codes = order.table.codes
    assert np.array_equal(np.sort(whole), np.flatnonzero(np.array(weights)[codes] > 0))
    for begin in (n - 1, 0, n // 2, n // 3, n // 3 + 5):
        end = min(n, begin + 5_000)
        assert np.array_equal(once(counts, weights, 0).cells(begin, end), whole[begin:end])
        assert np.array_equal(order.cells(begin, end), whole[begin:end])
    assert not np.array_equal(once(counts, weights, 1).cells(0, n), whole)


def test_a_race_draws_as_exponential_arrivals_do() -> None:
    """Where each label's cells come, beside the times of all cells in memory."""
    counts, weights = [6_000, 3_000, 1_000], [1.0, 2.0, 2.0]
    rates = np.repeat(np.array(weights) / counts, counts)
    labels = np.repeat(np.arange(3), counts)
    rng = np.random.default_rng(0)
    shares: dict[str, list[np.ndarray]] = {"plain": [], "race": []}
    places = [0, 500, 2_000, 5_000, 8_000, 9_500, 10_000]
    for epoch in range(60):
        plain = labels[np.argsort(rng.standard_exponential(len(rates)) / rates)]
        order = once(counts, weights, epoch)
        for name, drawn in (("plain", plain), ("race", order.table.codes[order.cells(0, len(rates))])):
            parts = [drawn[a:b] for a, b in itertools.pairwise(places)]
            shares[name].append(np.array([np.bincount(part, minlength=3) for part in parts]))
    expected, found = (np.array(shares[name]) for name in ("plain", "race"))
    error = (expected.std(axis=0) + 1e-9) * (2 / len(found)) ** 0.5
    assert (np.abs(found.mean(axis=0) - expected.mean(axis=0)) < 4.5 * error).all()
    np.testing.assert_allclose(found.std(axis=0), expected.std(axis=0), rtol=0.5)


def test_a_race_takes_little_memory() -> None:
    codes = np.random.default_rng(0).integers(0, 50, 2_000_000).astype(np.int8)
    weights = {label: float(label) for label in range(50)}
    tracemalloc.start()
    sampler = WeightedCellSampler.by_label(codes, weights, 500, replacement=False, seed=1)
    first = next(sampler.batches())
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert len(np.unique(first)) == 500
    assert peak < 8 * 2**20, f"{peak} bytes, and the times of arrival alone would take 16 million"
