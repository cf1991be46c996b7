"""Orders: what is in a batch, who gets it, and that a run continues where it stopped."""

from __future__ import annotations

import itertools
import json
import logging
import pickle
import subprocess
import sys
import warnings
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hbx_gpu.sampler import (
    BalancedCellSampler,
    CellSampler,
    EpochSampler,
    GroupedCellSampler,
    WeightedCellSampler,
)
from hbx_gpu.sampler._cells import LOCALITIES, pack_lanes
from hbx_gpu.sampler._rounds import batch_sizes, cut_rounds

GROUPS = np.random.default_rng(5).permutation(np.repeat([3, 9, 4, 7, 1], [57, 8, 31, 90, 3]))


def content(sampler: EpochSampler) -> set[tuple[int, ...]]:
    return set(map(tuple, sampler))


def rounds(samplers: Sequence[EpochSampler]) -> list[list[int]]:
    """Batches of all ranks in global order; every rank must have as many as it says, and as the others."""
    expected = len(samplers[0]) - samplers[0].n_done
    per_rank = [list(s) for s in samplers]
    assert {len(batches) for batches in per_rank} == {expected}
    return [list(batch) for batch in itertools.chain(*zip(*per_rank, strict=True))]


def joined(batches: Iterable[Iterable[int]]) -> list[int]:
    return list(itertools.chain.from_iterable(batches))


def flat(samplers: Sequence[EpochSampler]) -> list[int]:
    return joined(rounds(samplers))


def world(make: Callable[..., EpochSampler], size: int, **options: Any) -> list[EpochSampler]:
    return [make(rank=rank, world_size=size, **options) for rank in range(size)]


def run_script(code: str) -> None:
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120)


sizes = st.lists(st.integers(0, 30), max_size=8)


@st.composite
def group_ids(draw: st.DrawFn, min_cells: int = 0) -> np.ndarray:
    counts = draw(sizes.filter(lambda s: sum(s) >= min_cells))
    ids = np.repeat(np.array(draw(st.permutations(range(-2, len(counts) - 2))), np.int32), counts)
    return np.random.default_rng(draw(st.integers(0, 9))).permutation(ids)


@settings(deadline=None)
@given(
    groups=group_ids(),
    batch_size=st.integers(1, 12),
    locality=st.sampled_from(LOCALITIES),
    shuffle=st.booleans(),
    drop_last=st.booleans(),
    seed=st.integers(0, 2**40),
    workers=st.integers(0, 5),
    block=st.integers(1, 9),
    window=st.integers(1, 4),
)
def test_every_cell_once_in_full_batches(
    groups: np.ndarray,
    batch_size: int,
    locality: str,
    shuffle: bool,
    drop_last: bool,
    seed: int,
    workers: int,
    block: int,
    window: int,
) -> None:
    s = CellSampler(
        groups,
        batch_size,
        shuffle,
        seed,
        drop_last,
        workers,
        locality=locality,
        block_size=block,
        blocks_per_window=window,
    )
    batches = list(s)
    n = len(groups)
    assert len(batches) == len(s) == (n // batch_size if drop_last else -(-n // batch_size))
    assert all(len(b) == batch_size for b in batches[:-1])
    cells = [c for b in batches for c in b]
    assert all(type(c) is int for c in cells)
    assert len(set(cells)) == len(cells)
    assert set(cells) <= set(range(n))
    assert len(cells) == n - s.n_dropped
    assert s.n_dropped == (n % batch_size if drop_last else 0)
    assert batches == list(s), "the same epoch again"
    assert all(type(b) is list for b in batches), "as torch's own batch samplers yield"
    assert batches == [b.tolist() for b in s.batches()]


@settings(deadline=None)
@given(groups=group_ids(), batch_size=st.integers(1, 12), workers=st.integers(1, 5))
def test_group_batches_are_pure_but_for_the_pooled_tails(
    groups: np.ndarray, batch_size: int, workers: int
) -> None:
    s = CellSampler(groups, batch_size, seed=3, num_workers=workers, locality="group")
    pure = [len(set(groups[list(b)])) == 1 and len(b) == batch_size for b in s]
    assert sum(pure) >= sum(np.unique(groups, return_counts=True)[1] // batch_size)


@pytest.mark.parametrize("locality", LOCALITIES)
def test_content_does_not_depend_on_workers(locality: str) -> None:
    plans = [content(CellSampler(GROUPS, 8, seed=1, locality=locality, num_workers=w)) for w in (0, 1, 3, 8)]
    assert all(plan == plans[0] for plan in plans)


@pytest.mark.parametrize("locality", LOCALITIES)
@pytest.mark.parametrize("size", [2, 3, 5])
def test_content_does_not_depend_on_ranks_before_the_last_round(locality: str, size: int) -> None:
    alone = content(CellSampler(GROUPS, 8, seed=1, locality=locality))
    shared_out = rounds(world(lambda **o: CellSampler(GROUPS, 8, seed=1, locality=locality, **o), size))
    assert {tuple(b) for b in shared_out[:-size]} <= alone
    if locality != "group":  # no lanes: not even the order in time depends on ranks
        assert joined(shared_out) == flat([CellSampler(GROUPS, 8, seed=1, locality=locality)])


def test_a_multiple_of_ranks_changes_no_batch_at_all() -> None:
    alone = content(CellSampler(GROUPS[:184], 8, seed=1))
    assert len(alone) == 23
    shared_out = rounds(world(lambda **o: CellSampler(GROUPS[:184], 8, seed=1, **o), 23))
    assert {tuple(b) for b in shared_out} == alone


@pytest.mark.parametrize("locality", LOCALITIES)
def test_epochs_and_seeds_differ_in_order_not_in_cells(locality: str) -> None:
    s = CellSampler(GROUPS, 8, seed=1, locality=locality)
    first = list(s)
    s.set_epoch(1)
    second = list(s)
    assert first != second
    assert sorted(joined(first)) == sorted(joined(second))
    assert list(CellSampler(GROUPS, 8, seed=2, locality=locality)) != first
    s.set_epoch(0)
    assert list(s) == first


@pytest.mark.parametrize("locality", LOCALITIES)
def test_shuffle_moves_cells_of_one_group_apart(locality: str) -> None:
    one = np.zeros(4000, np.int32)
    s = CellSampler(one, 50, seed=1, locality=locality, block_size=10, blocks_per_window=40)
    order = np.concatenate(list(s.batches()))
    assert np.abs(np.diff(order)).mean() > 40
    if locality == "block":  # a window of 400 cells comes from 40 stretches of 10
        assert len(np.unique(order[:400] // 10)) == 40
        assert len(np.unique(order[:50] // 10)) > 20
        assert np.ptp(order[:400]) > 2000, "stretches from all over the group"


def test_pooled_tails_are_shuffled_together() -> None:
    s = CellSampler(np.repeat(np.arange(500), 3), 50, seed=1, locality="group")
    order = np.concatenate(list(s.batches()))
    assert np.abs(np.diff(order)).mean() > 300


def test_the_documented_generator() -> None:
    s = CellSampler(GROUPS, 8, seed=3, locality="none")
    s.set_epoch(2)
    expected = np.random.default_rng(np.random.SeedSequence([3, 2])).permutation(len(GROUPS))
    assert flat([s]) == expected.tolist()


def test_uniform_order_is_uniform() -> None:
    s = CellSampler(np.zeros(6, np.int32), 6, seed=0, locality="none")
    counts = np.zeros((6, 6))
    for epoch in range(3000):
        s.set_epoch(epoch)
        counts[next(iter(s)), range(6)] += 1
    assert np.abs(counts - 500).max() < 110  # over five standard deviations of a binomial(3000, 1/6)


@pytest.mark.parametrize("locality", LOCALITIES)
def test_without_shuffle_the_order_is_that_of_the_dataset(locality: str) -> None:
    groups = np.array([1, 0, 1, 0, 1, 0, 1])
    assert list(CellSampler(groups, 2, False, locality=locality)) == [[0, 1], [2, 3], [4, 5], [6]]


def test_the_default_order_is_uniform_and_asks_for_no_worker() -> None:
    s = CellSampler(GROUPS, 8, seed=1)
    assert list(s) == list(CellSampler(GROUPS, 8, seed=1, locality="none"))
    makers = (CellSampler, BalancedCellSampler, GroupedCellSampler, WeightedCellSampler)
    assert [make(np.zeros(9, int) + 1).num_workers for make in makers] == [0] * 4


@settings(deadline=None)
@given(
    rows=st.lists(st.integers(0, 188), unique=True),
    locality=st.sampled_from(LOCALITIES),
    shuffle=st.booleans(),
    seed=st.integers(0, 99),
)
def test_a_sampler_over_some_rows(rows: list[int], locality: str, shuffle: bool, seed: int) -> None:
    s = CellSampler(GROUPS, 8, shuffle, seed, locality=locality, rows=rows)
    got = joined(s)
    assert sorted(got) == sorted(rows)
    assert shuffle or got == rows
    mask = np.zeros(len(GROUPS), bool)
    mask[rows] = True
    assert sorted(joined(CellSampler(GROUPS, 8, seed=seed, rows=mask))) == sorted(rows)


def test_rows_that_a_sampler_refuses() -> None:
    assert joined(CellSampler(GROUPS, 8, False, rows=[-1, 0])) == [188, 0]
    for rows, message in (
        ([189], "row 189 is out of range for a dataset of 189 cells"),
        ([-190], "row -190 is out of range"),
        ([4, 9, 4], "row 4 is in rows 2 times"),
        ([188, -1], "row 188 is in rows 2 times"),
    ):
        with pytest.raises(IndexError, match=message):
            CellSampler(GROUPS, 8, rows=rows)
    state = CellSampler(GROUPS, 8, rows=range(100)).state_dict()
    with pytest.raises(ValueError, match="rows"):
        CellSampler(GROUPS, 8, rows=range(1, 101)).load_state_dict(state)


def test_no_seed_means_a_new_order_each_time_that_a_state_still_finds_again() -> None:
    s = CellSampler(GROUPS, 8)
    assert list(s) != list(s)
    it = s.batches()
    head = [next(it) for _ in range(4)]
    other = CellSampler(GROUPS, 8)
    other.load_state_dict(s.state_dict())
    tail = list(other.batches())
    assert all(np.array_equal(a, b) for a, b in zip(it, tail, strict=True))
    assert sorted(np.concatenate(head + tail)) == list(range(len(GROUPS)))


def test_an_unread_state_is_the_state_of_what_comes() -> None:
    s = CellSampler(GROUPS, 8)
    state = s.state_dict()
    t = CellSampler(GROUPS, 8)
    t.load_state_dict(state)
    assert list(s) == list(t)


def test_empty() -> None:
    for groups in ([], np.empty(0, np.int32)):
        for locality in LOCALITIES:
            s = CellSampler(groups, 4, locality=locality, seed=0)
            assert (len(s), list(s), s.n_dropped) == (0, [], 0)
    assert list(CellSampler([], seed=0, rank=1, world_size=3)) == []
    assert list(WeightedCellSampler([])) == []
    assert list(BalancedCellSampler([])) == []
    assert list(GroupedCellSampler([])) == []
    assert list(GroupedCellSampler([0, 1], controls=[True, True])) == []


def lanes_of(batches: list[Any], lanes: int) -> list[list[Any]]:
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
    group_of = np.repeat(np.arange(len(counts)), counts)
    runs = sum(1 + np.count_nonzero(np.diff(group_of[o[o >= 0]])) for o in lanes_of(order, lanes) if len(o))
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


def make_cell(**options: Any) -> EpochSampler:
    return CellSampler(GROUPS, **{"batch_size": 8, "seed": 4, "locality": "group", **options})


def make_weighted(**options: Any) -> EpochSampler:
    weights = np.random.default_rng(1).random(150).round(1)
    return WeightedCellSampler(weights, **{"batch_size": 8, "seed": 4, **options})


def make_balanced(**options: Any) -> EpochSampler:
    return BalancedCellSampler(np.tile([0, 1, 1, 2, -1], 31), **{"batch_size": 8, "seed": 4, **options})


def make_grouped(**options: Any) -> EpochSampler:
    labels = np.tile([0, 1, 1, 2, -1, 3], 31)
    return GroupedCellSampler(labels, controls=labels == 3, **{"batch_size": 8, "seed": 4, **options})


MAKERS = {"cell": make_cell, "weighted": make_weighted, "balanced": make_balanced, "grouped": make_grouped}


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
    batches = batch_sizes(n_cells, batch_size, drop_last=False)
    cuts = cut_rounds(batches, start=0, world_size=before, drop_last=False)
    start = int(cuts[min(stopped * before, len(cuts) - 1)])  # where a run on other ranks may have stopped
    left = n_cells - start
    got = np.diff(cut_rounds(batches, start=start, world_size=size, drop_last=False))
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
        if batches.min() >= 4:
            assert not mixed.any(), "large batches are only cut"
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
    if make is make_grouped:  # counts labelled cells; see its own test
        assert size > 1 or samplers[0].n_dropped == 31 % 4 + 62 % 4 + 31 % 4
    else:
        n = 124 if make is make_balanced else len(flat([make()]))
        assert samplers[0].n_dropped == n - sum(map(len, batches))
    assert str(samplers[0].n_dropped) in caplog.text


def test_nothing_dropped_nothing_said(caplog: pytest.LogCaptureFixture) -> None:
    assert all(s.n_dropped == 0 for s in world(make_cell, 5))
    assert not caplog.records


def test_rank_from_torch_distributed(tmp_path: Path) -> None:
    pytest.importorskip("torch")
    code = f"""
import numpy as np, torch.distributed as dist
from hbx_gpu.sampler import CellSampler
groups = np.zeros(20, np.int32)
before = CellSampler(groups, 4)
assert (before.rank, before.world_size, len(before)) == (0, 1, 5)
started = before.batches()
dist.init_process_group("gloo", init_method="file://{tmp_path}/store", rank=0, world_size=1)
dist.get_rank, dist.get_world_size = lambda: 1, lambda: 2
assert sum(map(len, started)) == 20, "an iteration keeps the ranks that it began with"
assert (before.rank, before.world_size, len(before)) == (1, 2, 3), "ranks are those there are when it begins"
mine = list(before)
assert [len(batch) for batch in mine] == [4, 4, 2] and before.seed == 0, mine
other = list(CellSampler(groups, 4, rank=0, world_size=2))
assert sorted(sum(mine + other, [])) == list(range(20)), "without a seed all ranks take the same"
s = CellSampler(groups, 4, seed=0, rank=0, world_size=1)
assert (s.rank, s.world_size, len(s)) == (0, 1, 5)
dist.get_world_size = lambda: 11
try:
    before.batches()
except ValueError as error:
    assert "20 cells cannot be shared among 11 ranks" in str(error)
else:
    raise AssertionError
dist.destroy_process_group()
"""
    run_script(code)


options_of = {
    "cell": st.fixed_dictionaries(
        {"locality": st.sampled_from(LOCALITIES), "shuffle": st.booleans(), "batch_size": st.integers(1, 20)}
    ),
    "weighted": st.fixed_dictionaries({"batch_size": st.integers(1, 20), "replacement": st.booleans()}),
    "balanced": st.fixed_dictionaries({"batch_size": st.integers(1, 20), "shuffle": st.booleans()}),
    "grouped": st.fixed_dictionaries({"batch_size": st.integers(2, 20), "shuffle": st.booleans()}),
}


@settings(max_examples=200, deadline=None)
@given(data=st.data())
def test_what_remains_is_the_same_on_any_ranks_and_workers(data: st.DataObject) -> None:
    kind = data.draw(st.sampled_from(sorted(MAKERS)))
    options = data.draw(options_of[kind]) | {"seed": data.draw(st.integers(0, 2**33))}
    epoch = data.draw(st.integers(0, 5))
    expected: list[int] | None = None
    state: dict[str, Any] | None = None
    for _ in range(data.draw(st.integers(2, 4))):  # a run, its resumption, the resumption of that, ...
        size, workers = data.draw(st.integers(1, 9)), data.draw(st.integers(0, 4))
        samplers = world(MAKERS[kind], size, num_workers=workers, **options)
        for s in samplers:
            if state is not None:
                s.load_state_dict(json.loads(json.dumps(state)))
            s.set_epoch(epoch)
        got = rounds(samplers)
        cells = joined(got)
        alone = MAKERS[kind](rank=0, world_size=1, **options)
        least = 2 if size > 1 and max(map(len, alone)) > 1 else 1
        if expected is not None and len(expected) < least * size:
            assert cells == []
            assert samplers[0].n_dropped >= len(expected)
            return
        assert expected is None or cells == expected
        assert min(map(len, got), default=least) >= least or size == 1
        step = data.draw(st.integers(0, len(got) // size))
        state = samplers[data.draw(st.integers(0, size - 1))].state_dict(delivered=step)
        expected = joined(got[step * size :])
        if not expected:
            epoch, expected = epoch + 1, None


@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_resuming_with_drop_last_goes_through_the_same_batches(data: st.DataObject) -> None:
    kind = data.draw(st.sampled_from(sorted(MAKERS)))
    before, after = data.draw(st.integers(1, 9)), data.draw(st.integers(1, 9))
    alone = rounds([MAKERS[kind](drop_last=True, num_workers=before)])  # as many lanes
    samplers = world(MAKERS[kind], before, drop_last=True)
    step = data.draw(st.integers(0, len(samplers[0])))
    list(samplers[0])
    state = samplers[0].state_dict(delivered=step)
    resumed = world(MAKERS[kind], after, drop_last=True)
    for s in resumed:
        s.load_state_dict(state)
    if step == len(samplers[0]):
        assert {(s.epoch, s.n_done) for s in resumed} == {(1, 0)}
        assert len(rounds(resumed)) == len(rounds(world(MAKERS[kind], after, drop_last=True)))
    else:
        left = alone[step * before :]
        assert rounds(resumed) == left[: len(left) // after * after]


def test_state_counts_what_was_yielded_or_delivered() -> None:
    s = make_cell()
    everything = list(s)
    s.set_epoch(0)
    it = iter(s)
    for _ in range(7):
        next(it)
    t = make_cell()
    t.load_state_dict(s.state_dict())
    assert (len(t), t.n_done) == (len(everything), 7)
    assert list(t) == everything[7:]
    t.load_state_dict(s.state_dict(delivered=5))
    assert list(t) == everything[5:]
    with pytest.raises(ValueError, match="delivered=8, but this iteration has yielded 7"):
        s.state_dict(delivered=8)
    with pytest.raises(ValueError, match="delivered=-1"):
        s.state_dict(delivered=-1)
    s.set_epoch(1)  # what a loader counted belongs to the iteration before
    assert (s.state_dict(delivered=7)["epoch"], s.state_dict(delivered=7)["cells"]) == (1, 0)


def test_after_the_remainder_epochs_are_whole_again() -> None:
    s = make_cell(num_workers=3)
    everything = list(s)
    state = s.state_dict(delivered=20)
    t = make_cell(num_workers=3)
    t.load_state_dict(state)
    t.set_epoch(0)  # as training loops do, and must not lose the place
    assert (len(t), t.n_done) == (len(everything), 20), "of the whole epoch, as frameworks count"
    it = iter(t)
    assert [next(it)] == everything[20:21]
    assert len(t) == len(everything)
    assert list(it) == everything[21:]
    assert (len(t), t.resumed) == (len(everything), False)
    assert list(t) == everything
    t.load_state_dict(state)
    with pytest.warns(UserWarning, match="drops the position"):
        t.set_epoch(1)
    s.set_epoch(1)
    assert list(t) == list(s)


def test_the_length_of_a_resumed_epoch_counts_what_other_ranks_did() -> None:
    s = make_cell()  # 24 batches
    list(s)
    t = make_cell(rank=1, world_size=2)
    t.load_state_dict(s.state_dict(delivered=10))
    assert (len(t), t.n_done) == (17, 10)
    assert len(list(t)) == 7
    assert len(t) == 12
    list(t)
    u = make_cell()
    u.load_state_dict(t.state_dict(delivered=4))
    assert (len(u), u.n_done) == (4 + 16, 4)


@pytest.mark.parametrize("place", ["after the last batch", "after the iteration has ended"])
@pytest.mark.parametrize("make", MAKERS.values(), ids=MAKERS)
def test_the_state_at_the_end_of_an_epoch_continues_with_the_next(
    make: Callable[..., EpochSampler], place: str
) -> None:
    s = make()
    it = iter(s)
    for _ in range(len(s)):
        next(it)
    if place == "after the iteration has ended":
        assert list(it) == []
    t = make(rank=0, world_size=1)
    t.load_state_dict(s.state_dict())
    assert (t.epoch, t.n_done) == (1, 0)
    s.set_epoch(1)
    assert list(t) == list(s)


def test_the_state_at_the_end_knows_the_seed_that_will_be_drawn() -> None:
    s = CellSampler(GROUPS, 8)
    list(s)
    t = CellSampler(GROUPS, 8)
    t.load_state_dict(s.state_dict())
    s.set_epoch(1)
    assert list(t) == list(s)


def test_a_loaded_position_is_not_dropped_silently() -> None:
    s = make_cell()
    s.set_epoch(1)
    list(s)
    state = s.state_dict(delivered=3)
    t = make_cell()
    t.load_state_dict(state)
    assert (t.epoch, t.resumed) == (1, True)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        t.set_epoch(1)
        assert len(list(t)) == len(s) - 3
        t.set_epoch(0)  # used by now
    t.load_state_dict(state)
    with pytest.warns(UserWarning, match=r"set_epoch\(0\) drops .* epoch 1, after 24 cells") as told:
        t.set_epoch(0)
    assert "for epoch in range(loader.epoch, n_epochs)" in str(told[0].message)
    assert told[0].filename == __file__
    assert len(list(t)) == len(s)


def test_states_of_ranks_are_equal_and_small() -> None:
    samplers = world(make_cell, 3)
    for s in samplers:
        it = iter(s)
        next(it), next(it)
    states = [json.dumps(s.state_dict()) for s in samplers]
    assert len(set(states)) == 1
    assert len(states[0]) < 500


def test_resuming_takes_the_seed_of_the_state() -> None:
    s = make_cell(seed=99)
    everything = list(s)
    t = make_cell(seed=1)
    t.load_state_dict(s.state_dict(delivered=3))
    assert t.seed == 99
    assert list(t) == everything[3:]


@pytest.mark.parametrize(
    ("make", "other", "name"),
    [
        (make_cell, lambda: make_cell(batch_size=9), "batch_size .saved 8, here 9"),
        (make_cell, lambda: make_cell(locality="none"), "locality .saved group, here none"),
        (make_cell, lambda: make_cell(shuffle=False), "shuffle"),
        (make_cell, lambda: make_cell(drop_last=True), "drop_last"),
        (make_cell, lambda: CellSampler(GROUPS[:-1], 8, seed=4), "groups .*; n_cells .saved 189, here 188"),
        (make_cell, lambda: CellSampler(GROUPS[::-1], 8, seed=4), "Different: groups .saved [0-9a-f]+, here"),
        (make_cell, make_weighted, "sampler .saved CellSampler, here WeightedCellSampler"),
        (make_weighted, lambda: make_weighted(n_samples=9), "n_samples"),
        (make_weighted, lambda: WeightedCellSampler(np.ones(146), 8, seed=4), "weights"),
        (make_grouped, lambda: make_grouped(control_fraction=0.2), "controls_per_batch .saved 4, here 2"),
    ],
)
def test_state_of_another_order_names_the_differences(
    make: Callable[..., EpochSampler], other: Callable[..., EpochSampler], name: str
) -> None:
    with pytest.raises(ValueError, match=f"belongs to another order.*{name}"):
        other().load_state_dict(make().state_dict())


def test_block_sizes_matter_only_to_block_order() -> None:
    make_cell(locality="none", block_size=3).load_state_dict(make_cell(locality="none").state_dict())
    with pytest.raises(ValueError, match="block_size"):
        make_cell(locality="block", block_size=3).load_state_dict(make_cell(locality="block").state_dict())


def test_a_broken_state() -> None:
    state = make_cell().state_dict()
    with pytest.raises(ValueError, match="it lacks seed, cells"):
        make_cell().load_state_dict({k: v for k, v in state.items() if k not in ("seed", "cells")})
    with pytest.raises(ValueError, match="has version 99, and this release of hbx_gpu continues version 2"):
        make_cell().load_state_dict(state | {"version": 99})
    with pytest.raises(ValueError, match="consumed 200 cells, 11 more than the epoch has"):
        make_cell().load_state_dict(state | {"cells": 200})


def test_too_few_cells_left_for_more_ranks_are_reported(caplog: pytest.LogCaptureFixture) -> None:
    s = make_cell(batch_size=6)  # 189 cells: 31 batches and 3 cells
    list(s)
    t = make_cell(batch_size=6, rank=0, world_size=4)
    t.load_state_dict(s.state_dict(delivered=31))
    assert (len(t) - t.n_done, t.n_dropped) == (0, 3)
    assert "3 cells remain of epoch 0, too few for 4 ranks" in caplog.text


def test_samplers_travel_by_pickle() -> None:
    s = make_cell()
    it = iter(s)
    next(it)
    assert list(pickle.loads(pickle.dumps(s))) == list(make_cell())


def test_torch_dataloader_with_workers_resumes_and_keeps_groups_to_workers() -> None:
    pytest.importorskip("torch")
    # In a process of its own: forking this one would copy whatever threads other tests have left.
    run_script("""
import numpy as np
from torch.utils.data import DataLoader, Sampler, get_worker_info
from hbx_gpu.sampler import CellSampler

class Cells:
    def __len__(self):
        return 160
    def __getitems__(self, cells):
        return list(cells), get_worker_info().id

def make():
    return CellSampler(np.repeat(np.arange(4), 40), 8, seed=3, num_workers=2, locality="group")

def loader(sampler):
    return DataLoader(Cells(), batch_sampler=sampler, num_workers=2, collate_fn=lambda b: b,
                      multiprocessing_context="fork")

s = make()
assert isinstance(s, Sampler)
plan = [list(b) for b in s]
got = list(loader(s))
assert [cells for cells, _ in got] == plan
assert [worker for _, worker in got] == [0, 1] * 10
for worker in (0, 1):
    assert len({cell // 40 for cells, w in got if w == worker for cell in cells}) == 2
t = make()
t.load_state_dict(s.state_dict(delivered=5))
resumed = loader(t)
assert len(resumed) == 20
assert [cells for cells, _ in resumed] == plan[5:]
assert [cells for cells, _ in resumed] == plan
""")


def test_importing_needs_no_torch() -> None:
    code = """
import sys
sys.modules["torch"] = None
from hbx_gpu.sampler import CellSampler
assert list(CellSampler([0, 0, 1], 2, False)) == [[0, 1], [2]]
"""
    run_script(code)


def test_same_cells_as_homeobox(homeobox_fixtures: Path) -> None:
    plans = json.loads((homeobox_fixtures / "sampler_plans.json").read_text())
    for plan in plans["cell_sampler"]:
        theirs = [tuple(b) for b in plan["batches"]]
        names = ("batch_size", "shuffle", "seed", "drop_last", "num_workers")
        s = CellSampler(plan["groups"], **{name: plan[name] for name in names})
        s.set_epoch(plan["epoch"])
        ours = list(s)
        # Theirs has up to one partial batch per worker; ours one in all, so it never loses more.
        assert sum(map(len, ours)) >= sum(map(len, theirs))
        if plan["num_workers"] <= 1:
            assert len(ours) == len(theirs) == plan["len"]
        if not plan["drop_last"]:
            assert len(ours) <= plan["len"]
            assert sorted(joined(ours)) == sorted(joined(theirs))
    for plan in plans["balanced_cell_sampler"]:
        names = ("balance_values", "batch_size", "shuffle", "seed", "drop_last", "num_workers")
        b = BalancedCellSampler(**{name: plan[name] for name in names})
        b.set_epoch(plan["epoch"])
        assert len(b) == plan["len"]
        values = np.array(plan["balance_values"])
        for mine, other in zip(b, plan["batches"], strict=True):
            counts, theirs = (np.unique(values[list(x)], return_counts=True)[1] for x in (mine, other))
            assert len(set(counts)) == 1
            # Theirs lets larger categories go on in the last batch; ours stays balanced.
            assert counts[0] == theirs.min()


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
        first += np.count_nonzero(cells[:1] < 50)
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
    with pytest.raises(ValueError, match=r"1 labelled cells have no control .* 1 of the match combinations"):
        GroupedCellSampler(labels, 4, controls=controls, match=donors, seed=0)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: CellSampler(GROUPS, 0), "batch_size must be at least 1, got 0"),
        (lambda: CellSampler(GROUPS, num_workers=-1), "num_workers must be at least 0"),
        (lambda: CellSampler(GROUPS, seed=-1), "seed must be at least 0"),
        (lambda: CellSampler(GROUPS).set_epoch(-1), "epoch must be at least 0"),
        (lambda: CellSampler(GROUPS, locality="chunk"), "'chunk'; choose one of 'group', 'block', 'none'"),
        (lambda: CellSampler(GROUPS, block_size=0), "block_size must be at least 1"),
        (lambda: CellSampler(GROUPS.reshape(-1, 1)), r"groups_np must be one-dimensional.*\(189, 1\)"),
        (lambda: CellSampler(GROUPS * 1.0), "groups_np must be integer codes, got dtype float64"),
        (lambda: CellSampler(GROUPS, seed=1, rank=2, world_size=2), r"rank must lie in 0 \.\. 1 .*got 2"),
        (lambda: CellSampler(GROUPS, seed=1, rank=1), "both rank and world_size"),
        (
            lambda: CellSampler([0] * 5, 4, rank=0, world_size=3),
            "5 cells cannot be shared among 3.* 2",
        ),
        (
            lambda: CellSampler([0] * 2, 1, rank=0, world_size=3),
            "2 cells cannot be shared among 3.* 1",
        ),
        (lambda: WeightedCellSampler([1.0, -0.5]), "1 of 2 are not, the first is -0.5 at position 1"),
        (lambda: WeightedCellSampler([1.0, np.nan]), "finite"),
        (lambda: WeightedCellSampler([[1.0]]), "one-dimensional"),
        (lambda: WeightedCellSampler([0.0, 0.0]), "all 2 weights are 0"),
        (lambda: WeightedCellSampler([1.0, 0.0], 1, 2, False), "n_samples=2 without replacement, but 1"),
        (lambda: WeightedCellSampler.balanced([0, -2]), "labels must be codes, -1 .missing. or above"),
        (lambda: BalancedCellSampler([0.5]), "balance_values must be integer"),
        (lambda: GroupedCellSampler([0, 1], controls=[0, 1]), "boolean mask of 2 cells"),
        (lambda: GroupedCellSampler([0, 1], match=[0, 1]), "there are no controls"),
        (lambda: GroupedCellSampler([0, 1], 1, controls=[True, False]), "at least 2"),
        (lambda: GroupedCellSampler([0, 1], controls=[True, False], control_fraction=1), "between 0 and 1"),
        (lambda: GroupedCellSampler([0, 1], controls=[True, False], match=[0]), "match holds 1 cells"),
        (lambda: GroupedCellSampler([[0, 1], [0]]), "equal length"),
        (lambda: GroupedCellSampler([0, 1], controls=[False, False]), "no control to go with them"),
    ],
)
def test_errors_say_what_was_found(call: Callable[[], Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call()


def test_sizes_must_be_integers() -> None:
    with pytest.raises(TypeError, match=r"batch_size must be an integer, got 2\.5"):
        CellSampler(GROUPS, 2.5)  # type: ignore[arg-type]
