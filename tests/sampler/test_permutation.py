"""The keyed permutation: a bijection, as its reference says, and as random as a shuffle."""

from __future__ import annotations

import time
import tracemalloc

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hbx_gpu.sampler import CellSampler
from hbx_gpu.sampler._permutation import EXACT, Permutation, Permutations, network, sides

BILLION = 10**9
N = 40_009  # a prime, so that neither half divides it


def keyed(n: int, *key: int) -> Permutation:
    return Permutation(n, np.random.SeedSequence(key or (1, 2)))


@settings(max_examples=30, deadline=None)
@given(n=st.integers(1, 6000), seed=st.integers(0, 2**70), epoch=st.integers(0, 9))
def test_every_position_once_forth_and_back(n: int, seed: int, epoch: int) -> None:
    permutation = keyed(n, seed, epoch)
    whole = permutation.span(0, n)
    assert whole.dtype == np.int64
    assert np.array_equal(np.sort(whole), np.arange(n))
    assert np.array_equal(permutation.find(whole), np.arange(n))
    assert np.array_equal(permutation.span(n // 3, n // 2), whole[n // 3 : n // 2])


@settings(max_examples=40, deadline=None)
@given(n=st.integers(EXACT + 1, 2**45), seed=st.integers(0, 99), data=st.data())
def test_the_compiled_network_equals_its_reference(n: int, seed: int, data: st.DataObject) -> None:
    permutation = keyed(n, seed)
    positions = np.array(data.draw(st.lists(st.integers(0, n - 1), max_size=50)), np.int64)
    keys, (a, b) = permutation._keys, permutation._sides
    assert n <= a * b < n + a
    found = permutation.at(positions)
    assert np.array_equal(found, network(positions, keys, a, b, n, inverse=False))
    assert np.array_equal(network(found, keys, a, b, n, inverse=True), positions)
    assert np.array_equal(permutation.find(found), positions)


@pytest.mark.parametrize("n", [EXACT + 1, 2**16, N, 10**6])
def test_values_that_leave_the_range_walk_on(n: int) -> None:
    a, b = sides(n)
    whole = keyed(n).span(0, n)
    assert np.array_equal(np.sort(whole), np.arange(n)), f"{a * b - n} values lie outside"


@pytest.mark.parametrize(
    ("n", "expected"),
    [
        (2000, [1792, 1611, 81, 945]),
        (BILLION, [699397125, 290335008, 343677794, 609680431]),
        (2**45 + 1, [32276724203013, 21479810156989, 8124658292963, 22311335199928]),
    ],
)
def test_orders_stay_what_they_are(n: int, expected: list[int]) -> None:
    """A run that another release saved goes on with the cells that it has not seen."""
    assert keyed(n, 1, 2).span(0, 4).tolist() == expected


def test_several_orders_at_once_are_each_that_of_its_key() -> None:
    sizes = np.array([5, 64 * 63, EXACT + 1, 10**6, 0, BILLION])  # 64 and 63 differ in their number of bits
    seeds = [np.random.SeedSequence((3, k)) for k in range(len(sizes))]
    rng = np.random.default_rng(0)
    which = rng.choice([0, 1, 2, 3, 5], 500)
    positions = rng.integers(0, sizes[which])
    found = Permutations(sizes, seeds).at(which, positions)
    for k in np.unique(which).tolist():
        assert np.array_equal(found[which == k], keyed(int(sizes[k]), 3, k).at(positions[which == k]))


def test_orders_that_are_too_long_are_refused() -> None:
    with pytest.raises(ValueError, match=r"0 .. 2\*\*52 positions"):
        keyed(2**52 + 1)


def chi_square(counts: np.ndarray) -> float:
    """How many standard deviations the statistic of equally likely counts lies from its mean."""
    expected = counts.sum() / counts.size
    degrees = counts.size - 1
    statistic = ((counts - expected) ** 2 / expected).sum()
    return float((statistic - degrees) / (2 * degrees) ** 0.5)


def test_positions_are_uniform_over_keys() -> None:
    # Where cells of 16 stretches come, over 600 epochs: each stretch is equally likely everywhere.
    counts = np.zeros((16, 16))
    at = np.linspace(0, N - 1, 64).astype(int)
    for epoch in range(600):
        values = keyed(N, 7, epoch).at(at)
        np.add.at(counts, (at * 16 // N, values * 16 // N), 1)
    assert all(abs(chi_square(row)) < 5 for row in counts)
    assert abs(chi_square(counts.ravel())) < 5


@pytest.mark.parametrize("n", [2000, N, BILLION])
def test_neighbors_have_nothing_to_do_with_each_other(n: int) -> None:
    values = keyed(n).span(0, min(n, 30_000)) / n
    for lag in (1, 2, 3, 64, sides(n)[0]):
        if lag < len(values) // 2:
            correlation = np.corrcoef(values[:-lag], values[lag:])[0, 1]
            assert abs(correlation) < 5 / len(values) ** 0.5, f"lag {lag}"
    # Pairs of successive values fill the square evenly, and steps are as often up as down.
    pairs = np.histogram2d(values[:-1], values[1:], bins=8)[0]
    assert abs(chi_square(pairs)) < 5
    assert abs(np.mean(np.diff(values) > 0) - 0.5) < 0.02


def test_keys_that_differ_by_one_give_unrelated_orders() -> None:
    one = keyed(N, 3, 5).span(0, N)
    for key in ((3, 6), (4, 5), (5, 3)):
        other = keyed(N, *key).span(0, N)
        assert abs(np.corrcoef(one, other)[0, 1]) < 5 / N**0.5
        assert np.count_nonzero(one == other) < 10, "as many fixed points as a random pair: one on average"


def entropies(order: np.ndarray, labels: np.ndarray, size: int) -> np.ndarray:
    """Entropy of the labels in each batch, in bits."""
    batches = labels[order[: len(order) // size * size]].reshape(-1, size)
    counts = np.stack([np.bincount(batch, minlength=labels.max() + 1) for batch in batches]) / size
    found: np.ndarray = -(counts * np.log2(np.where(counts > 0, counts, 1))).sum(axis=1)
    return found


def test_labels_of_batches_are_as_mixed_as_in_a_uniform_draw() -> None:
    labels = np.repeat(np.arange(12), np.diff(np.linspace(0, N**0.5, 13).astype(int) ** 2))  # sorted
    labels = np.append(labels, np.full(N - len(labels), 11))
    ours = entropies(np.concatenate(list(CellSampler(labels, 256, seed=5).batches())), labels, 256)
    uniform = entropies(np.random.default_rng(0).permutation(N), labels, 256)
    spread = (ours.std() ** 2 + uniform.std() ** 2) ** 0.5 / len(ours) ** 0.5
    assert abs(ours.mean() - uniform.mean()) < 5 * spread
    assert 0.7 < ours.std() / uniform.std() < 1.4


def test_a_billion_cells_cost_nothing_to_begin_with() -> None:
    groups = np.broadcast_to(np.int32(0), BILLION)
    CellSampler(np.zeros(5000, int), 64, seed=0).state_dict()  # compiles
    next(CellSampler(np.zeros(5000, int), 64, seed=0).batches())
    tracemalloc.start()
    began = time.process_time()
    samplers = [CellSampler(groups, 1024, seed=3, rank=rank, world_size=8) for rank in range(8)]
    first = [next(sampler.batches()) for sampler in samplers]
    seconds, peak = time.process_time() - began, tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert np.array_equal(np.concatenate(first), next(CellSampler(groups, 8192, seed=3).batches()))
    assert len(samplers[0]) == -(-BILLION // 8192)
    assert seconds < 8 * 0.1
    assert peak < 8 * 2**20, f"{peak} bytes"

    state = samplers[0].state_dict() | {"cells": 1024 * 900_000, "batches": 112_500}
    resumed = CellSampler(groups, 1024, seed=0, rank=1, world_size=2)
    resumed.load_state_dict(state)
    began = time.process_time()
    batch = next(resumed.batches())
    assert time.process_time() - began < 0.1, "as quick in the middle as at the beginning"
    place = 1024 * 900_001
    assert np.array_equal(batch, keyed(BILLION, 3, 0).span(place, place + 1024))


def test_an_order_over_some_rows_needs_no_more_than_them() -> None:
    rows = np.flatnonzero(np.arange(N) % 3 == 1)
    sampler = CellSampler(np.zeros(N, int), 100, seed=1, rows=rows)
    order = np.concatenate(list(sampler.batches()))
    assert np.array_equal(np.sort(order), rows)
    assert np.array_equal(order, rows[keyed(len(rows), 1, 0).span(0, len(rows))])
