"""Batches of cells of like length: the rule, every cell once, and resumed in the middle."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from hbx_gpu import CellDataset, CellSampler, make_loader
from hbx_gpu.testing import example_dataset, example_groups

N = 3_000
LENGTHS = np.random.default_rng(1).integers(1, 2_000, N)


def sampler(**options: Any) -> CellSampler:
    settings: Any = {
        "batch_size": 16,
        "seed": 5,
        "length_group": 10,
        "lengths": LENGTHS,
        "rank": 0,
        "world_size": 1,
    }
    return CellSampler(np.zeros(N, int), **(settings | options))


def test_megabatches_are_sorted() -> None:
    cells = np.concatenate(list(sampler().batches()))
    assert sorted(cells.tolist()) == list(range(N))
    lengths = LENGTHS[cells]
    assert lengths[0] == LENGTHS.max()
    swapped = 0
    for start in range(0, N, 160):
        part = lengths[start : start + 160]
        swapped += int((np.diff(part[1:]) > 0).sum())
    assert swapped <= 1  # where the longest cell was taken from

    # Padding to the longest of a batch costs little, and without sorting much.
    def waste(order: CellSampler) -> float:
        batches = [LENGTHS[batch] for batch in order.batches()]
        result: float = sum(part.max() * len(part) for part in batches) / LENGTHS.sum()
        return result

    plain = CellSampler(np.zeros(N, int), batch_size=16, seed=5, rank=0, world_size=1)
    assert waste(sampler()) < 1.15 < 1.7 < waste(plain)


def test_orders_depend_on_seed_and_epoch() -> None:
    one, again = sampler(), sampler()
    first = [batch.tolist() for batch in one.batches()]
    assert first == [batch.tolist() for batch in again.batches()]
    one.set_epoch(1)
    second = [batch.tolist() for batch in one.batches()]
    assert first != second
    assert first[5] != sorted(first[5])


def test_a_position_is_taken_up_again() -> None:
    whole = [batch.tolist() for batch in sampler().batches()]
    begun = sampler()
    running = begun.batches()
    for _ in range(7):
        next(running)
    state = begun.state_dict(delivered=7)
    resumed = sampler()
    resumed.load_state_dict(state)
    assert [batch.tolist() for batch in resumed.batches()] == whole[7:]
    with pytest.raises(ValueError, match="length_group"):
        sampler(length_group=11).load_state_dict(state)


def test_ranks_share_the_batches() -> None:
    ranks = [list(sampler(rank=rank, world_size=3).batches()) for rank in range(3)]
    assert len({len(batches) for batches in ranks}) == 1
    every = np.concatenate([batch for batches in ranks for batch in batches])
    assert sorted(every.tolist()) == list(range(N))


def test_rows_and_blocks() -> None:
    rows = np.arange(0, N, 3)
    cells = np.concatenate(list(sampler(rows=rows, locality="block").batches()))
    assert sorted(cells.tolist()) == rows.tolist()


def test_a_dataset_knows_its_lengths(tmp_path_factory: pytest.TempPathFactory) -> None:
    dataset: CellDataset = example_dataset(tmp_path_factory.mktemp("lengths"), example_groups())
    batch = dataset.__getitems__(np.arange(len(dataset)))
    assert dataset.row_lengths.tolist() == np.diff(batch.offsets).tolist()


def test_lengths_come_from_the_dataset_of_the_loader(tmp_path: Path) -> None:
    dataset: CellDataset = example_dataset(tmp_path, example_groups())

    def order(**lengths: Any) -> list[list[int]]:
        cells = CellSampler(dataset.groups_np, batch_size=3, seed=5, length_group=2, **lengths)
        with make_loader(dataset, cells, layout="csr", executor="direct") as loader:
            return [batch["index"].tolist() for batch in loader]

    assert order() == order(lengths=dataset.row_lengths)
    alone = CellSampler(dataset.groups_np, batch_size=3, length_group=2)
    with pytest.raises(ValueError, match="length_group needs the lengths"):
        next(alone.batches())
    alone.take_lengths(dataset.row_lengths)
    assert sum(map(len, alone.batches())) == len(dataset)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"lengths": LENGTHS[:5]}, "3000 entries"),
        ({"length_group": None}, "lengths are for length_group"),
        ({"length_group": 0}, "length_group"),
        ({"shuffle": False}, "sorts a shuffled order"),
        ({"locality": "group"}, "sorts a shuffled order"),
    ],
)
def test_settings_that_do_not_fit(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        sampler(**options)
