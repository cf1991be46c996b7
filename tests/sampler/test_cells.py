"""CellSampler: every cell once, in an order that seed and epoch decide."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hbx_gpu.sampler import (
    BalancedCellSampler,
    CellSampler,
    GroupedCellSampler,
    WeightedCellSampler,
)
from hbx_gpu.sampler._cells import LOCALITIES
from tests.sampler.orders import (
    GROUPS,
    content,
    flat,
    joined,
    rounds,
    world,
)

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


def test_empty() -> None:
    none: list[Any] = [[], np.empty(0, np.int32)]
    for groups in none:
        for locality in LOCALITIES:
            s = CellSampler(groups, 4, locality=locality, seed=0)
            assert (len(s), list(s), s.n_dropped) == (0, [], 0)
    assert list(CellSampler([], seed=0, rank=1, world_size=3)) == []
    assert list(WeightedCellSampler([])) == []
    assert list(BalancedCellSampler([])) == []
    assert list(GroupedCellSampler([])) == []
    assert list(GroupedCellSampler([0, 1], controls=[True, True])) == []


def test_same_cells_as_homeobox(homeobox_fixtures: Path) -> None:
    plans = json.loads((homeobox_fixtures / "sampler_plans.json").read_text())
    for plan in plans["cell_sampler"]:
        theirs: Any = [tuple(b) for b in plan["batches"]]
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
        of_balanced = (
            "balance_values",
            "batch_size",
            "shuffle",
            "seed",
            "drop_last",
            "num_workers",
        )
        b = BalancedCellSampler(**{name: plan[name] for name in of_balanced})
        b.set_epoch(plan["epoch"])
        assert len(b) == plan["len"]
        values = np.array(plan["balance_values"])
        for mine, other in zip(b, plan["batches"], strict=True):
            counts, theirs = (np.unique(values[list(x)], return_counts=True)[1] for x in (mine, other))
            assert len(set(counts)) == 1
            # Theirs lets larger categories go on in the last batch; ours stays balanced.
            assert counts[0] == theirs.min()
