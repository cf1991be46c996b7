"""Batches of one group go to one worker as far as they can."""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from hbx_gpu.sampler import (
    CellSampler,
)
from hbx_gpu.sampler._lanes import LaneQueues, pack_lanes


def lanes_of(batches: Any, lanes: int) -> list[Any]:
    return [batches[lane::lanes] for lane in range(lanes)]


@settings(deadline=None)
@given(
    counts=st.lists(st.integers(0, 40), min_size=1, max_size=30),
    lanes=st.integers(1, 12),
    seed=st.integers(0, 99),
)
def test_packing_is_a_permutation_that_switches_groups_rarely(
    counts: list[int], lanes: int, seed: int
) -> None:
    n_batches = np.array(counts)
    ranks = np.random.default_rng(seed).permutation(len(counts))
    order = pack_lanes(n_batches, lanes, queue_ranks=ranks)
    assert sorted(order.tolist()) == list(range(sum(counts)))
    queues = LaneQueues.pack(n_batches, lanes, queue_ranks=ranks)
    assert [queues.batch_at(position) for position in range(queues.n_batches)] == order.tolist()
    assert len(queues.batch) <= len(counts) + 3 * lanes, "runs, not batches"
    group_of = np.repeat(np.arange(len(counts)), counts)
    runs = sum(
        1 + int(np.count_nonzero(np.diff(group_of[o[o >= 0]]))) for o in lanes_of(order, lanes) if len(o)
    )
    # Each group is one run on its lane; a lane that would run dry splits at most one run more, twice.
    assert runs <= np.count_nonzero(n_batches) + 2 * lanes


def test_groups_of_equal_size_keep_to_their_lane() -> None:
    groups = np.repeat(np.arange(12), 40)
    s = CellSampler(groups, 10, seed=2, num_workers=4, locality="group")
    for lane in lanes_of(list(s), 4):
        runs = [g for g, _ in itertools.groupby(int(groups[b[0]]) for b in lane)]
        assert len(runs) == 3 == len(set(runs))
        assert all(len(set(groups[list(b)])) == 1 for b in lane)


def test_lanes_of_ranks_and_workers() -> None:
    groups = np.repeat(np.arange(6), 40)
    for rank in range(3):
        s = CellSampler(groups, 10, seed=2, num_workers=2, locality="group", rank=rank, world_size=3)
        for worker in lanes_of(list(s), 2):
            assert len({int(groups[b[0]]) for b in worker}) == 1


def test_largest_first_lowest_lane_on_ties() -> None:
    # Batches per group: 3, 3, 2, 2 -> lanes {0, 2} and {1, 3}.
    order = pack_lanes(np.array([3, 3, 2, 2]), 2, queue_ranks=np.arange(4))
    assert order[0::2].tolist() == [0, 1, 2, 6, 7]
    assert order[1::2].tolist() == [3, 4, 5, 8, 9]


def test_the_lane_with_the_fewest_batches_gets_the_next_group() -> None:
    # Batches, not groups, are counted: 5 on one lane, 2 + 2 + 1 on the other, so that no group is split.
    order = pack_lanes(np.array([5, 2, 2, 1]), 2, queue_ranks=np.arange(4))
    assert [lane.tolist() for lane in lanes_of(order, 2)] == [[0, 1, 2, 3, 4], [5, 6, 7, 8, 9]]


def test_one_huge_group_is_spread_over_all_lanes() -> None:
    order = pack_lanes(np.array([4, 80, 4]), 4, queue_ranks=np.arange(3))
    for lane in lanes_of(order, 4):
        assert len(lane) == 22
        assert np.count_nonzero((lane >= 4) & (lane < 84)) >= 18
