"""Any stretch of an order is what the whole order has there, and groups given as runs are the same groups."""

from __future__ import annotations

import tracemalloc
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hbx_gpu._source import GroupRuns
from hbx_gpu.sampler import CellSampler
from hbx_gpu.sampler._cells import LOCALITIES
from hbx_gpu.sampler._groups import GroupTable, group_runs
from hbx_gpu.sampler._position import EpochKey
from tests.sampler.orders import GROUPS, MAKERS, flat, joined


@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_any_stretch_is_that_of_the_whole(data: st.DataObject) -> None:
    kind = data.draw(st.sampled_from(sorted(MAKERS)))
    options: dict[str, Any] = {"batch_size": data.draw(st.integers(2, 20))}
    if kind == "cell":
        options |= {
            "locality": data.draw(st.sampled_from(LOCALITIES)),
            "block_size": 7,
            "blocks_per_window": 3,
        }
        if options["locality"] != "group":
            lengths = np.random.default_rng(0).integers(0, 30, len(GROUPS))
            options |= {"length_group": 3, "lengths": lengths} if data.draw(st.booleans()) else {}
        options |= {"rows": np.arange(5, 150)} if data.draw(st.booleans()) else {}
    key, lanes = EpochKey(data.draw(st.integers(0, 99)), 1), data.draw(st.integers(1, 5))
    sampler = MAKERS[kind](**options)
    n = sampler._n_epoch - sampler.n_dropped
    whole = sampler._order(key, lanes).cells(0, n)
    order = sampler._order(key, lanes)
    for _ in range(6):
        begin, end = sorted((data.draw(st.integers(0, n)), data.draw(st.integers(0, n))))
        assert order.cells(begin, end).tolist() == whole[begin:end].tolist()


@pytest.mark.parametrize("locality", LOCALITIES)
def test_groups_as_runs_and_as_an_array(locality: str) -> None:
    runs = group_runs(GROUPS)
    assert np.array_equal(np.asarray(runs), GROUPS)
    assert np.array_equal(runs[np.array([5, 0, 188])], GROUPS[[5, 0, 188]])
    assert np.array_equal(runs[3:40], GROUPS[3:40])
    made: list[CellSampler] = []
    for groups in (runs, GROUPS):
        for rows in (None, np.arange(7, 90)):
            made.append(CellSampler(groups, 8, seed=2, locality=locality, rows=rows, block_size=5))
    assert [flat([s]) for s in made[:2]] == [flat([s]) for s in made[2:]]
    assert made[0].state_dict() == made[2].state_dict()


def test_the_table_of_groups_lists_cells_by_group() -> None:
    table = GroupTable.of(group_runs(GROUPS))
    places = np.arange(len(GROUPS))
    assert np.array_equal(table.cells(places), np.argsort(GROUPS, kind="stable"))
    assert [table.place_of(int(cell)) for cell in table.cells(places)] == places.tolist()
    assert table.sizes.tolist() == np.unique(GROUPS, return_counts=True)[1].tolist()


@pytest.mark.parametrize("locality", ["block", "group"])
def test_a_hundred_million_cells_in_a_thousand_groups(locality: str) -> None:
    ends = np.sort(np.random.default_rng(2).choice(10**8, 999, replace=False))
    runs = GroupRuns(np.random.default_rng(3).permutation(1000), np.concatenate([[0], ends, [10**8]]))
    next(CellSampler(GROUPS.repeat(99), 512, seed=4, locality=locality, num_workers=4).batches())  # compiles
    tracemalloc.start()
    sampler = CellSampler(runs, 512, seed=4, locality=locality, num_workers=4, rank=1, world_size=3)
    batches = sampler.batches()
    first = [next(batches) for _ in range(20)]
    state = sampler.state_dict()
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 16 * 2**20, f"{peak} bytes"
    assert all(len(np.unique(batch)) == 512 for batch in first)
    if locality == "group":
        assert all(len(np.unique(runs[batch])) == 1 for batch in first)
    resumed = CellSampler(runs, 512, seed=4, locality=locality, num_workers=4, rank=1, world_size=3)
    resumed.load_state_dict(state)
    assert np.array_equal(next(resumed.batches()), next(batches))


def test_blocks_keep_together_and_their_cells_are_mixed() -> None:
    sampler = CellSampler(
        np.repeat([1, 0], 5000), 100, seed=1, locality="block", block_size=50, blocks_per_window=10
    )
    order = np.array(joined(sampler))
    windows = order.reshape(-1, 500)
    assert all(len(np.unique(window // 50)) == 10 for window in windows)
    assert len({tuple(np.unique(w // 50)) for w in windows}) == 20
    positions = np.argsort(order)
    # Within windows, neighbors of the dataset are as far apart as any two cells.
    apart = np.abs(np.diff(positions.reshape(-1, 50), axis=1)).mean()
    assert 120 < apart < 215  # a third of 500 on average
