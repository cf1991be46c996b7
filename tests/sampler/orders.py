"""Samplers that the tests of this folder share, and how batches of several ranks are read."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import numpy as np

from hbx_gpu.sampler import (
    BalancedCellSampler,
    CellSampler,
    EpochSampler,
    GroupedCellSampler,
    WeightedCellSampler,
)

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
