"""A loader goes on where another one was, with any sampler; through DALI and without it."""

from __future__ import annotations

import itertools
import pickle
from typing import Any

import pytest
import torch
from torch.utils.data import BatchSampler, RandomSampler, SequentialSampler

from hbx_gpu._loading.loader import CellLoader
from hbx_gpu.dataloader import CellDataset, make_loader
from hbx_gpu.testing import example_dataset, example_groups
from tests.dali import need_dali
from tests.loading import Executor, sampler_for


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> CellDataset:
    return example_dataset(tmp_path_factory.mktemp("arrays"), example_groups())


@pytest.fixture(params=["direct", "dali"])
def load(request: pytest.FixtureRequest) -> Executor:
    if request.param == "dali":
        need_dali()
    return Executor(request.param)


def ids(loader: object) -> list[list[float]]:
    return [batch["score"].tolist() for batch in loader]  # type: ignore[attr-defined]


@pytest.mark.parametrize(("step", "workers"), [(0, 0), (1, 0), (5, 0), (8, 0), (3, 2)])
def test_resume_in_mid_epoch(load: Executor, dataset: CellDataset, step: int, workers: int) -> None:
    """Saved after `step` batches (read ahead or not), a new loader gives the rest and then whole epochs.

    The state of worker processes goes on in a loader of either executor.
    """
    full = load(dataset, sampler_for(dataset))
    full.set_epoch(4)
    whole = ids(full)
    full.set_epoch(5)
    following = ids(full)

    saved = {"num_workers": workers, "executor": "direct"} if workers else {}
    with load(dataset, sampler_for(dataset), **saved) as first:
        first.set_epoch(4)
        batches = iter(first)
        head = [next(batches)["score"].tolist() for _ in range(step)]
        state = pickle.loads(pickle.dumps(first.state_dict()))
        del batches
    assert head == whole[:step]

    second = load(dataset, sampler_for(dataset))
    second.load_state_dict(state)
    if step < len(whole):
        second.set_epoch(4)  # as training loops do; the position stays
        assert ids(second) == whole[step:]
    second.set_epoch(5)
    assert ids(second) == following


def test_resume_of_a_resume(load: Executor, dataset: CellDataset) -> None:
    loader = load(dataset, sampler_for(dataset))
    whole = ids(loader)
    got: list[list[float]] = []
    state = None
    while len(got) < len(whole):
        again = load(dataset, sampler_for(dataset))
        if state is not None:
            again.load_state_dict(state)
        batches = iter(again)
        got += [b["score"].tolist() for b in itertools.islice(batches, 3)]
        state = again.state_dict()
    assert got == whole


def test_resume_with_a_plain_torch_sampler(load: Executor, dataset: CellDataset) -> None:
    def make() -> CellLoader:
        return load(dataset, BatchSampler(SequentialSampler(range(120)), 16, False))

    whole = ids(make())
    first = make()
    batches = iter(first)
    next(batches), next(batches)
    second = make()
    second.load_state_dict(first.state_dict())
    assert second._order.resumed  # frameworks that skip batches by themselves are told
    assert ids(second) == whole[2:]
    assert not second._order.resumed
    assert ids(second) == whole
    # A resumed run is stopped and resumed again: the position counts from the beginning of the epoch.
    third, fourth = make(), make()
    third.load_state_dict(first.state_dict())
    batches = iter(third)
    next(batches)
    fourth.load_state_dict(third.state_dict())
    assert ids(fourth) == whole[3:]
    with pytest.raises(ValueError, match="same kind of sampler"):
        second.load_state_dict(load(dataset, sampler_for(dataset)).state_dict())
    with pytest.raises(ValueError, match="same kind of sampler"):
        load(dataset, sampler_for(dataset)).load_state_dict(first.state_dict())


def test_an_order_that_is_another_one_every_time_is_not_continued(dataset: CellDataset) -> None:
    def make(seed: int) -> CellLoader:
        generator = torch.Generator().manual_seed(seed)
        return make_loader(dataset, BatchSampler(RandomSampler(range(120), generator=generator), 16, False))

    first = make(1)
    batches = iter(first)
    done = [next(batches).metadata["score"].tolist() for _ in range(3)]
    state = first.state_dict()
    assert (state["epoch"], state["sampler"]["batches"]) == (0, 3)
    second = make(1)
    second.load_state_dict(state)
    assert sorted(itertools.chain(*done, *(b.metadata["score"].tolist() for b in second))) == sorted(
        dataset.columns["score"].tolist()
    )
    third = make(2)
    third.load_state_dict(state)
    with pytest.raises(ValueError, match=r"after 3 batches, but .* hold other rows now\. Use .*CellSampler"):
        next(iter(third))
    list(batches)
    assert first.state_dict()["epoch"] == 1


@pytest.mark.parametrize("place", ["after the last batch", "after the loop"])
def test_a_state_from_the_end_of_an_epoch_continues_with_the_next(
    load: Executor, dataset: CellDataset, place: str
) -> None:
    loader = load(dataset, sampler_for(dataset))
    loader.set_epoch(1)
    batches = iter(loader)
    for _ in range(len(loader)):
        next(batches)
    if place == "after the loop":
        assert list(batches) == []
    state = loader.state_dict()
    assert (state["version"], state["epoch"]) == (2, 2)
    del batches
    again = load(dataset, sampler_for(dataset))
    again.load_state_dict(state)
    assert again.epoch == 2
    loader.set_epoch(2)
    assert ids(again) == ids(loader)


def test_a_loop_over_epochs_goes_on_where_it_was(load: Executor, dataset: CellDataset) -> None:
    def train(loader: CellLoader, stop_after: int | None = None) -> list[list[float]]:
        seen: list[list[float]] = []
        for epoch in range(loader.epoch, 3):
            loader.set_epoch(epoch)
            for batch in loader:
                seen.append(batch["score"].tolist())
                if len(seen) == stop_after:
                    return seen
        return seen

    whole = train(load(dataset, sampler_for(dataset)))
    first = load(dataset, sampler_for(dataset))
    head = train(first, stop_after=11)  # of 8 batches an epoch
    second = load(dataset, sampler_for(dataset))
    second.load_state_dict(first.state_dict())
    assert (second.epoch, len(second)) == (1, 8)
    assert head + train(second) == whole
    third = load(dataset, sampler_for(dataset))
    third.load_state_dict(first.state_dict())
    with pytest.warns(UserWarning, match=r"set_epoch\(0\) drops .* range\(loader.epoch") as told:
        third.set_epoch(0)
    assert told[0].filename == __file__


@pytest.mark.parametrize("workers", [0, 1])
def test_a_state_is_not_loaded_while_an_iteration_runs(dataset: CellDataset, workers: int) -> None:
    options: dict[str, Any] = {"layout": "dense", "executor": "direct", "num_workers": workers}
    with make_loader(dataset, sampler_for(dataset), **options) as loader:
        whole = ids(loader)
        batches = iter(loader)
        next(batches), next(batches)
        state = loader.state_dict()
        with pytest.raises(RuntimeError, match=r"while an iteration .* loader.close\(\) first"):
            loader.load_state_dict(state)
        assert next(batches)["score"].tolist() == whole[2], "and it goes on"
        assert loader.state_dict()["sampler"]["batches"] == 3
        loader.close()
        loader.load_state_dict(state)
        assert list(batches) == []
        fresh = iter(loader)  # nothing begins before the first batch is asked for
        loader.load_state_dict(state | {"sampler": state["sampler"] | {"cells": 16, "batches": 1}})
        assert [batch["score"].tolist() for batch in fresh] == whole[1:]


def test_states_that_cannot_be_continued(load: Executor, dataset: CellDataset) -> None:
    loader = load(dataset, sampler_for(dataset))
    for state, found in (
        ({"sampler": {}}, "none, only ..sampler.."),
        ({"delivered": 3}, "none, only ..delivered.."),
        (loader.state_dict() | {"version": 9}, "version 9"),
    ):
        with pytest.raises(ValueError, match=f"continues loader states of version 2, .* has {found}"):
            loader.load_state_dict(state)
