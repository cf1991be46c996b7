"""A run continues where it stopped, on other ranks and workers too."""

from __future__ import annotations

import json
import pickle
import warnings
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hbx_gpu.sampler import (
    CellSampler,
    EpochSampler,
    WeightedCellSampler,
)
from hbx_gpu.sampler._cells import LOCALITIES
from tests.sampler.orders import (
    GROUPS,
    MAKERS,
    joined,
    make_cell,
    make_grouped,
    make_weighted,
    rounds,
    world,
)


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
    drawn: Any = data.draw(options_of[kind])
    options = drawn | {"seed": data.draw(st.integers(0, 2**33))}
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


def test_the_length_of_a_resumed_epoch_is_that_of_a_whole_one_whatever_the_ranks() -> None:
    s = make_cell()  # 24 batches
    list(s)
    t = make_cell(rank=1, world_size=2)
    t.load_state_dict(s.state_dict(delivered=10))
    assert (len(t), t.n_done) == (12, 5)
    assert t.state_dict()["batches"] == 5
    assert len(list(t)) == 7
    assert len(t) == 12
    list(t)
    u = make_cell()
    u.load_state_dict(t.state_dict(delivered=4))
    assert (len(u), u.n_done) == (24, 8)
    begun = u.batches()
    next(begun)
    assert u.state_dict()["batches"] == 9
    again = make_cell()
    again.load_state_dict(u.state_dict())
    assert (len(again), again.n_done, len(list(again))) == (24, 9, 15)


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
    with pytest.raises(ValueError, match="has version 99, and this release of hbx_gpu continues version 3"):
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
