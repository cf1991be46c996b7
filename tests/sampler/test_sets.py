"""Batches of sets: one size, one combination each, a matched control beside each cell."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from scipy.sparse import csr_matrix

from hbx_gpu import make_loader, tokens
from hbx_gpu.sampler import GroupedCellSampler
from hbx_gpu.testing import example_dataset, example_groups

RNG = np.random.default_rng(0)
N = 230
LABELS = RNG.integers(-1, 5, N)
DONOR = RNG.integers(0, 3, N)
CONTROLS = LABELS == 0
SIZE, PER_BATCH = 16, 3


def sampler(**options: Any) -> GroupedCellSampler:
    chosen: dict[str, Any] = {
        "controls": CONTROLS, "match": DONOR, "set_size": SIZE, "sets_per_batch": PER_BATCH, "paired": True,
        "seed": 4,
    }  # fmt: skip
    return GroupedCellSampler(LABELS, **{**chosen, **options})


def halves(batch: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    n = len(batch) // 2
    return batch[:n], batch[n:]


@pytest.mark.parametrize("shuffle", [True, False])
def test_sets_are_pure_full_and_matched(shuffle: bool) -> None:
    s = sampler(shuffle=shuffle)
    batches = list(s.batches())
    assert len(batches) == len(s)
    assert {len(b) for b in batches[:-1]} == {2 * SIZE * PER_BATCH}
    seen: list[int] = []
    for batch in batches:
        cells, controls = halves(batch)
        assert len(cells) % SIZE == 0
        for one in cells.reshape(-1, SIZE):
            assert len(set(LABELS[one])) == 1
            assert len(set(one.tolist())) == min(SIZE, len(set(one.tolist())))
        assert CONTROLS[controls].all()
        assert (DONOR[controls] == DONOR[cells]).all()
        seen += cells.tolist()
    assert set(seen) == set(np.flatnonzero(LABELS >= 0).tolist())
    counts = np.bincount(LABELS[LABELS >= 0])
    assert len(seen) == SIZE * int((-(-counts // SIZE)).sum())


def test_controls_are_drawn_uniformly() -> None:
    s = sampler()
    drawn = np.zeros(N)
    for epoch in range(60):
        s.set_epoch(epoch)
        for batch in s.batches():
            np.add.at(drawn, halves(batch)[1], 1)
    for donor in range(3):
        mine = drawn[CONTROLS & (DONOR == donor)]
        expected = mine.mean()
        assert ((mine - expected) ** 2 / expected).sum() < 2.5 * len(mine)


def test_epochs_differ_and_repeat() -> None:
    s = sampler()
    first = [b.tolist() for b in s.batches()]
    s.set_epoch(1)
    assert [b.tolist() for b in s.batches()] != first
    s.set_epoch(0)
    assert [b.tolist() for b in s.batches()] == first
    assert [b.tolist() for b in sampler().batches()] == first


def test_ranks_share_whole_batches_and_a_state_goes_on() -> None:
    alone = [tuple(b.tolist()) for b in sampler().batches()]
    ranks = [[tuple(b.tolist()) for b in sampler(rank=r, world_size=2).batches()] for r in range(2)]
    assert len(ranks[0]) == len(ranks[1]) == len(alone) // 2
    dealt = [b for pair in zip(*ranks, strict=True) for b in pair]
    assert dealt == alone[: len(dealt)]
    s = sampler()
    head = [tuple(b.tolist()) for b, _ in zip(s.batches(), range(2), strict=False)]
    state = s.state_dict(delivered=2)
    for world in (1, 2):
        rest = []
        for rank in range(world):
            other = sampler(rank=rank, world_size=world)
            other.load_state_dict(state)
            rest.append([tuple(b.tolist()) for b in other.batches()])
        tail = [b for pair in zip(*rest, strict=True) for b in pair]
        assert head + tail == alone[: 2 + len(tail)]
    with pytest.raises(ValueError, match="set_size"):
        sampler(set_size=8).load_state_dict(state)


def test_the_last_batch() -> None:
    n_sets = sum(len(b) // (2 * SIZE) for b in sampler().batches())
    assert n_sets % PER_BATCH
    dropped = list(sampler(drop_last=True).batches())
    assert len(dropped) == n_sets // PER_BATCH
    plain = list(sampler(controls=None, match=None, paired=False).batches())
    assert {len(b) for b in plain[:-1]} == {SIZE * PER_BATCH}


def test_arguments_that_do_not_fit() -> None:
    for options, message in (
        ({"set_size": None}, "pass set_size="),
        ({"batch_size": 64}, "does not go with set_size"),
        ({"paired": False}, "pass both controls= and paired=True"),
        ({"controls": None, "match": None}, "pass both controls= and paired=True"),
        ({"set_size": 0}, "set_size must be at least 1"),
        ({"sets_per_batch": 0}, "sets_per_batch must be at least 1"),
    ):
        with pytest.raises(ValueError, match=re.escape(message)):
            sampler(**options)


@pytest.mark.parametrize("layout", ["dense", "csr", "tokens"])
def test_loaders_hand_out_cells_and_controls(tmp_path: Path, layout: str) -> None:
    dataset = example_dataset(tmp_path, example_groups())
    labels = np.arange(len(dataset)) % 3
    options: dict[str, Any] = {}
    if layout == "tokens":
        words = {str(uid): i + 4 for i, uid in enumerate(dataset.feature_uids)}
        options["tokens"] = tokens.scgpt({**words, "<pad>": 0, "<cls>": 1}, side="one", length=9)
    order = GroupedCellSampler(
        labels, controls=labels == 0, set_size=4, sets_per_batch=2, paired=True, seed=1
    )
    with make_loader(dataset, order, layout=layout, executor="direct", **options) as loader:
        for batch, rows in zip(loader, order.batches(), strict=True):
            cells, controls = halves(rows)
            assert batch["index"].tolist() == cells.tolist()
            assert batch["control"]["index"].tolist() == controls.tolist()
            name = "input_ids" if layout == "tokens" else "X"
            a, b = batch[name], batch["control"][name]
            assert a.shape == b.shape
            if layout != "tokens":
                a, b = (part.to_dense() if layout == "csr" else part for part in (a, b))
                found = dataset.__getitems__(rows)
                dense = csr_matrix(
                    (found.values, found.indices, found.offsets), (len(rows), found.n_features)
                )
                assert np.array_equal(torch.cat([a, b]).numpy(), dense.toarray())
    if layout == "tokens":
        with (
            make_loader(
                dataset, order, layout=layout, padding="packed", executor="direct", **options
            ) as packed,
            pytest.raises(TypeError, match="not packed"),
        ):
            next(iter(packed))
