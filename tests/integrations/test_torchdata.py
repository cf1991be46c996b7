"""torch's DataLoader and torchdata's StatefulDataLoader over our datasets, with our samplers and theirs."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from torch.utils.data import DataLoader

pytest.importorskip("torchdata", reason="torchdata is not installed")

from torchdata.stateful_dataloader import StatefulDataLoader
from torchdata.stateful_dataloader.sampler import RandomSampler

from hbx_gpu.dataloader import CellDataset, sparse_to_dense_collate
from hbx_gpu.sampler import CellSampler
from hbx_gpu.testing import example_dataset

ALL = list(range(120))
N_BATCHES = 8
SPAWNED = pytest.mark.slow


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Any:
    return example_dataset(tmp_path_factory.mktemp("arrays")).with_row_numbers()


def stateful(dataset: CellDataset, workers: int, sampler: str = "cells", **options: Any) -> Any:
    context = {"multiprocessing_context": "spawn"} if workers else {}
    if sampler == "cells":
        order: dict[str, Any] = {"batch_sampler": CellSampler(dataset.groups_np, 16, seed=3)}
    else:
        generator = torch.Generator().manual_seed(7)
        order = {"sampler": RandomSampler(dataset, generator=generator), "batch_size": 16}
    return StatefulDataLoader(
        dataset, collate_fn=sparse_to_dense_collate, num_workers=workers, **order, **context, **options
    )


def rows(batches: Any) -> list[list[int]]:
    return [batch["index"].tolist() for batch in batches]


@pytest.mark.parametrize(
    ("workers", "sampler", "after"),
    [
        (0, "cells", 0),
        (0, "cells", 3),
        (0, "cells", N_BATCHES - 1),
        (0, "torchdata", 3),
        pytest.param(2, "cells", 3, marks=SPAWNED),
    ],
)
def test_a_state_in_the_middle(dataset: CellDataset, workers: int, sampler: str, after: int) -> None:
    loader = stateful(dataset, workers, sampler)
    batches = iter(loader)
    seen = rows(itertools.islice(batches, after))
    state = loader.state_dict()
    rest = rows(batches)
    again = stateful(dataset, workers, sampler)
    again.load_state_dict(state)
    assert rows(again) == rest
    assert sorted(row for batch in seen + rest for row in batch) == ALL


def test_a_state_that_is_taken_every_few_batches(dataset: CellDataset) -> None:
    workers, every = 0, 3
    loader = stateful(dataset, workers, snapshot_every_n_steps=every)
    batches = iter(loader)
    rows(itertools.islice(batches, 4))
    state = loader.state_dict()
    again = stateful(dataset, workers, snapshot_every_n_steps=every)
    again.load_state_dict(state)
    assert rows(again) == rows(batches)


@pytest.mark.parametrize("workers", [0, pytest.param(1, marks=SPAWNED)])
def test_a_state_at_the_end_of_an_epoch(dataset: CellDataset, workers: int) -> None:
    """After the epoch has ended, the next one is whole."""
    loader = stateful(dataset, workers)
    first = rows(loader)
    state = loader.state_dict()
    again = stateful(dataset, workers)
    again.load_state_dict(state)
    assert sorted(row for batch in rows(again) for row in batch) == ALL
    assert len(first) == N_BATCHES


def test_a_plain_dataloader(dataset: CellDataset) -> None:
    sampler = CellSampler(dataset.groups_np, 16, seed=3)
    cells: Any = dataset  # torch knows its own datasets only
    loader: Any = DataLoader(cells, batch_sampler=sampler, collate_fn=sparse_to_dense_collate)
    for epoch in range(2):
        sampler.set_epoch(epoch)
        expected = list(sampler)
        assert rows(loader) == expected
