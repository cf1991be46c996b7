"""Ranks share an epoch evenly, and drop_last says what it drops."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from hbx_gpu.sampler import (
    CellSampler,
    EpochSampler,
    GroupedCellSampler,
)
from hbx_gpu.sampler._rounds import batch_sizes, cut, cut_rounds
from tests.sampler.orders import (
    MAKERS,
    flat,
    joined,
    make_balanced,
    make_cell,
    make_grouped,
    rounds,
    world,
)


@pytest.mark.parametrize("make", MAKERS.values(), ids=MAKERS)
@pytest.mark.parametrize("size", [1, 2, 3, 4, 7, 16, 40])
def test_ranks_share_the_epoch_evenly_and_lose_nothing(make: Callable[..., EpochSampler], size: int) -> None:
    batches = rounds(world(make, size))
    assert all(batches)
    cells = joined(batches)
    alone = make()
    assert sorted(cells) == sorted(flat([alone]))
    assert max(map(len, batches)) <= 8
    if make is not make_grouped:  # which cuts single batches
        last = [len(b) for b in batches[-size:]]
        assert max(last) - min(last) <= 1 or len(alone) % size == 0


@pytest.mark.parametrize(("n", "size"), [(10, 4), (9, 8), (8, 8), (17, 8), (33, 16), (12, 5)])
def test_batches_of_one_cell(n: int, size: int) -> None:
    batches = rounds(world(lambda **o: CellSampler(np.zeros(n, int), 1, seed=0, **o), size))
    assert sorted(joined(batches)) == list(range(n))
    assert max(map(len, batches)) <= 2


@settings(max_examples=300, deadline=None)
@given(
    n_cells=st.integers(1, 200),
    batch_size=st.integers(1, 12),
    size=st.integers(2, 9),
    stopped=st.integers(0, 200),
    before=st.integers(1, 9),
)
def test_the_last_round_is_even_and_no_rank_gets_a_single_cell(
    n_cells: int, batch_size: int, size: int, stopped: int, before: int
) -> None:
    even = batch_sizes(n_cells, batch_size, drop_last=False)
    batches = even.listed()
    cuts = cut_rounds(batches, start=0, world_size=before, drop_last=False)
    start = int(cuts[min(stopped * before, len(cuts) - 1)])  # where a run on other ranks may have stopped
    left = n_cells - start
    edges = cut_rounds(batches, start=start, world_size=size, drop_last=False)
    for drop_last, expected in ((False, edges), (True, None)):
        if expected is None:
            expected = cut_rounds(batches, start=start, world_size=size, drop_last=True)
        short = cut(even, start=start, world_size=size, drop_last=drop_last)
        assert [short[i] for i in range(len(short))] == expected.tolist()
        assert short[-1] == expected[-1]
    got = np.diff(edges)
    least = 1 if batches.max() == 1 else 2
    if left < least * size:
        assert len(got) == 0, "too few for the ranks"
        return
    assert len(got) % size == 0
    assert got.sum() == left
    assert got.min() >= least
    assert np.ptp(got[-size:]) <= 1
    room = batches.max() if left >= 3 * size * batches.max() or left % size == 0 else batches.max() + 2
    assert got.max() <= max(room, batches.max() + 1)
    whole = np.flatnonzero(got != batch_size)
    assert len(whole) == 0 or whole[0] >= len(got) - 3 * size, "only the last rounds are cut anew"


@settings(max_examples=300, deadline=None)
@given(
    natural=st.lists(st.integers(1, 8), min_size=1, max_size=40),
    size=st.integers(2, 9),
    stopped=st.integers(0, 40),
    before=st.integers(1, 9),
)
@example(natural=[5, 5], size=5, stopped=0, before=1)  # ten cells make five pairs, but not of one label each
def test_batches_of_one_label_are_cut_into_two_cells_or_more(
    natural: list[int], size: int, stopped: int, before: int
) -> None:
    batches = np.array(natural)
    cuts = cut_rounds(batches, start=0, world_size=before, drop_last=False, inside=True)
    start = int(cuts[min(stopped * before, len(cuts) - 1)])
    left = int(batches.sum()) - start
    edges = cut_rounds(batches, start=start, world_size=size, drop_last=False, inside=True)
    got = np.diff(edges)
    least = 1 if batches.max() == 1 else 2
    if left < least * size:
        assert len(got) == 0, "too few for the ranks"
        return
    assert len(got) % size == 0
    assert got.sum() == left
    assert got.min() >= least
    assert got.max() <= max(batches.max() + 1, 3)
    if start == 0 and batches.min() >= 2:
        ends = np.cumsum(batches)
        mixed = np.searchsorted(ends, edges[:-1], side="right") != np.searchsorted(ends, edges[1:])
        if (batches // 2).sum() >= -(-len(batches) // size) * size:
            assert not mixed.any(), "batches are only cut where that gives enough pieces of two cells"
        whole = np.isin(edges, np.append(0, ends))
        n_kept = len(whole) if whole.all() else int(np.argmin(whole))
        assert not mixed[: max(n_kept - 1, 0)].any()


@settings(max_examples=60, deadline=None)
@given(
    counts=st.lists(st.integers(1, 30), min_size=1, max_size=12),
    batch_size=st.integers(1, 9),
    size=st.integers(2, 6),
    with_controls=st.booleans(),
    seed=st.integers(0, 99),
)
def test_no_rank_gets_a_single_cell_whatever_the_labels(
    counts: list[int], batch_size: int, size: int, with_controls: bool, seed: int
) -> None:
    labels = np.repeat(np.arange(len(counts) + 1), [*counts, 20])
    options: dict[str, Any] = {"batch_size": batch_size, "seed": seed}
    if with_controls:
        options |= {"controls": labels == len(counts), "batch_size": batch_size + 1}
    alone = [len(batch) for batch in GroupedCellSampler(labels, **options)]
    least = 1 if max(alone) == 1 else 2
    if sum(alone) < least * size:
        return
    batches = rounds(world(lambda **o: GroupedCellSampler(labels, **options, **o), size))
    assert min(map(len, batches)) >= least
    targets = [c for c in joined(batches) if not (with_controls and labels[c] == len(counts))]
    assert sorted(targets) == list(range(sum(counts) + (0 if with_controls else 20)))


def test_labels_of_one_cell_are_named_on_several_ranks(caplog: pytest.LogCaptureFixture) -> None:
    labels = np.array([0] * 6 + [1] + [2] * 7 + [3])
    with caplog.at_level(logging.WARNING, "hbx_gpu.sampler"):
        assert [1] in [sorted(labels[b].tolist()) for b in GroupedCellSampler(labels, 4, seed=0)]
        assert not caplog.records
        samplers = world(lambda **o: GroupedCellSampler(labels, 4, seed=0, **o), 2)
    assert [
        r.message.startswith("2 batches of GroupedCellSampler hold a single") for r in caplog.records
    ] == [True]
    assert min(map(len, rounds(samplers))) >= 2


def test_fewer_cells_than_ranks_in_the_last_round_take_from_the_round_before() -> None:
    # 26 cells in batches of 4 on 6 ranks: one round of 24, and 2 cells for 6 ranks.
    batches = rounds(world(lambda **o: CellSampler(np.zeros(26, int), 4, seed=0, **o), 6))
    assert sorted(map(len, batches)) == [2] * 10 + [3] * 2


@pytest.mark.parametrize("make", MAKERS.values(), ids=MAKERS)
@pytest.mark.parametrize("size", [1, 3, 5])
def test_drop_last_counts_what_it_drops_and_says_so_once(
    make: Callable[..., EpochSampler], size: int, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING, "hbx_gpu.sampler"):
        samplers = world(make, size, drop_last=True)
        batches = rounds(samplers)
        samplers[0].set_epoch(1)
        list(samplers[0])
    assert len(caplog.records) == 1
    assert samplers[0].n_dropped > 0
    assert {len(b) for b in batches} == {6 if make is make_balanced else 8}
    if make is make_grouped:  # counts labeled cells; see its own test
        assert size > 1 or samplers[0].n_dropped == 31 % 4 + 62 % 4 + 31 % 4
    else:
        n = 124 if make is make_balanced else len(flat([make()]))
        assert samplers[0].n_dropped == n - sum(map(len, batches))
    assert str(samplers[0].n_dropped) in caplog.text


def test_nothing_dropped_nothing_said(caplog: pytest.LogCaptureFixture) -> None:
    assert all(s.n_dropped == 0 for s in world(make_cell, 5))
    assert not caplog.records
