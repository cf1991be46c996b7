"""Weighted, balanced and grouped batches."""

from __future__ import annotations

import numpy as np
import pytest

from hbx_gpu.sampler import (
    BalancedCellSampler,
    GroupedCellSampler,
    WeightedCellSampler,
)
from tests.sampler.orders import (
    flat,
    joined,
    rounds,
    world,
)


def test_weighted_draws_follow_the_weights() -> None:
    weights = np.array([0.0, 1.0, 2.0, 0.0, 5.0])
    s = WeightedCellSampler(weights, 100, n_samples=40_000, seed=1)
    drawn = np.concatenate(list(s.batches()))
    counts = np.bincount(drawn, minlength=5)
    assert len(s) == 400
    assert counts[0] == counts[3] == 0
    np.testing.assert_allclose(counts[[1, 2, 4]] / 40_000, [1 / 8, 2 / 8, 5 / 8], atol=0.012)
    firsts = drawn[:-1][drawn[1:] == 4]  # draws are independent: the one before a 4 is like any other
    np.testing.assert_allclose(np.mean(firsts == 4), 5 / 8, atol=0.015)


def test_weighted_without_replacement_takes_the_heavy_first_and_none_twice() -> None:
    weights = np.r_[np.full(50, 9.0), np.full(50, 1.0), np.zeros(5)]
    s = WeightedCellSampler(weights, 10, replacement=False, seed=1)
    first = 0
    for epoch in range(300):
        s.set_epoch(epoch)
        cells = np.concatenate(list(s.batches()))
        assert sorted(cells) == list(range(100))
        first += int(np.count_nonzero(cells[:1] < 50))
    assert 0.82 < first / 300 < 0.97  # nine tenths
    assert len(WeightedCellSampler(weights, 10, 30, False, seed=1)) == 3


def test_balanced_draws_and_missing_labels() -> None:
    labels = np.r_[np.zeros(900, int), np.full(90, 5), np.full(10, 2), np.full(100, -1)]
    drawn = np.concatenate(list(WeightedCellSampler.balanced(labels, 64, n_samples=30_000, seed=0).batches()))
    share = np.bincount(labels[drawn], minlength=6) / 30_000
    np.testing.assert_allclose(share[[0, 2, 5]], 1 / 3, atol=0.015)
    assert len(flat([WeightedCellSampler.balanced(labels, 64, seed=0)])) == 1000


@pytest.mark.parametrize("drop_last", [False, True])
def test_balanced_batches_hold_equal_numbers(drop_last: bool) -> None:
    labels = np.random.default_rng(0).permutation(np.repeat([-1, 0, 4, 7], [9, 22, 60, 35]))
    s = BalancedCellSampler(labels, 13, seed=1, drop_last=drop_last)
    batches = list(s)
    assert [len(b) for b in batches] == [12] * 5 + [6] * (not drop_last)
    for batch in batches:
        assert set(np.unique(labels[list(batch)], return_counts=True)[1]) == {len(batch) // 3}
    cells = joined(batches)
    assert len(set(cells)) == len(cells)
    assert s.n_dropped == 117 - len(cells)


LABELS = np.random.default_rng(3).integers(-1, 6, 700)


DONORS = np.random.default_rng(4).integers(0, 4, 700)


CONTROLS = LABELS == 5


@pytest.mark.parametrize("size", [1, 3, 4, 5, 7])
def test_grouped_batches_hold_one_combination_and_matched_controls(size: int) -> None:
    samplers = world(
        lambda **o: GroupedCellSampler(
            LABELS, 16, controls=CONTROLS, match=DONORS, control_fraction=0.25, seed=2, **o
        ),
        size,
    )
    batches = rounds(samplers)
    targets = []
    for batch in map(np.array, batches):
        assert len(batch) <= 16
        target, control = batch[~CONTROLS[batch]], batch[CONTROLS[batch]]
        assert len(np.unique(LABELS[target])) == 1
        strays = ~np.isin(DONORS[control], DONORS[target])
        # A batch cut smaller for the last round may begin with the control of the part before.
        assert not strays.any() or (size > 1 and CONTROLS[batch[0]] and strays.sum() == strays[0])
        assert len(set(control)) == len(control), "the pool is not scarce"
        assert abs(len(control) - 0.25 * len(batch)) <= 1
        targets.extend(target.tolist())
    assert sorted(targets) == np.flatnonzero((LABELS >= 0) & ~CONTROLS).tolist()


def test_grouped_controls_follow_the_donors_of_the_batch() -> None:
    s = GroupedCellSampler(LABELS, 40, controls=CONTROLS, match=DONORS, seed=2)
    for batch in s.batches():
        target, control = batch[~CONTROLS[batch]], batch[CONTROLS[batch]]
        a, b = (np.bincount(DONORS[x], minlength=4) for x in (target, control))
        np.testing.assert_array_equal(a, b)  # one control for each target


def test_grouped_scarce_controls_repeat_evenly() -> None:
    labels = np.r_[np.zeros(60, int), [1, 1, 1]]
    s = GroupedCellSampler(labels, 20, controls=labels == 1, seed=0)
    drawn = np.concatenate(list(s.batches()))
    assert set(np.bincount(drawn)[60:]) == {20}
    assert set(np.bincount(drawn)[:60]) == {1}


def test_grouped_without_controls_and_with_combinations() -> None:
    for labels in (np.stack([LABELS, DONORS], 1), [LABELS, DONORS], (LABELS.tolist(), DONORS.tolist())):
        s = GroupedCellSampler(labels, 7, seed=0)
        batches = [np.array(b) for b in s]
        for batch in batches:
            assert len(np.unique(LABELS[batch] * 10 + DONORS[batch])) == 1
        assert sorted(np.concatenate(batches)) == np.flatnonzero(LABELS >= 0).tolist()
        sizes_by_label: dict[int, set[int]] = {}
        for batch in batches:
            sizes_by_label.setdefault(int(LABELS[batch[0]] * 10 + DONORS[batch[0]]), set()).add(len(batch))
        assert all(max(v) - min(v) <= 1 for v in sizes_by_label.values())


def test_grouped_drop_last_keeps_full_batches_of_changing_cells() -> None:
    s = GroupedCellSampler(LABELS, 16, controls=CONTROLS, seed=2, drop_last=True)
    seen = set()
    for epoch in range(6):
        s.set_epoch(epoch)
        batches = list(s)
        assert {len(b) for b in batches} == {16}
        assert {len(np.unique(LABELS[list(b)])) for b in batches} == {2}, "one label and the controls'"
        seen.update(joined(batches))
    n_targets = np.bincount(LABELS[(LABELS >= 0) & ~CONTROLS])
    assert len(batches) == (n_targets // 8).sum()
    assert s.n_dropped == (n_targets % 8).sum()
    assert seen == set(np.flatnonzero(LABELS >= 0))


def test_grouped_missing_codes_and_unmatched_cells() -> None:
    labels, donors = np.array([0, 0, -1, 1, 1, 9, -1]), np.array([0, 0, 0, 0, -1, 0, 0])
    controls = np.array([0, 0, 0, 0, 0, 1, 1], bool)
    s = GroupedCellSampler(labels, 4, controls=controls, match=donors, seed=0)
    assert set(flat([s])) == {0, 1, 3, 5, 6}, "no label: 2; no donor: 4; controls need no label: 6"
    donors[0] = 8
    with pytest.raises(ValueError, match=r"1 labeled cells have no control .* 1 of the match combinations"):
        GroupedCellSampler(labels, 4, controls=controls, match=donors, seed=0)
