"""Arguments that samplers refuse."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from hbx_gpu.sampler import (
    BalancedCellSampler,
    CellSampler,
    GroupedCellSampler,
    WeightedCellSampler,
)
from tests.sampler.orders import (
    GROUPS,
)


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


def test_weights_that_are_too_large_to_add_up_are_refused() -> None:
    with pytest.raises(ValueError, match="sum of the weights"):
        WeightedCellSampler(np.full(3, 1e308))
    with pytest.raises(ValueError, match="sum of the weights"):
        WeightedCellSampler.by_label(np.arange(3), {0: 1e308, 1: 1e308, 2: 1.0})
