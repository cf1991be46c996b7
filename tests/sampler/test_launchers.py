"""Ranks come from torch.distributed, or from what a launcher put into the environment."""

from __future__ import annotations

import numpy as np
import pytest

from hbx_gpu.sampler import CellSampler
from hbx_gpu.sampler._position import _LAUNCHERS

NAMES = [name for pair in _LAUNCHERS for name in pair]


@pytest.mark.parametrize(
    ("environment", "expected"),
    [
        ({}, (0, 1)),
        ({"RANK": "2", "WORLD_SIZE": "4"}, (2, 4)),
        ({"SLURM_PROCID": "3", "SLURM_STEP_NUM_TASKS": "8"}, (3, 8)),
        ({"RANK": "1", "WORLD_SIZE": "2", "SLURM_PROCID": "0", "SLURM_STEP_NUM_TASKS": "1"}, (1, 2)),
        ({"SLURM_PROCID": "0", "SLURM_NTASKS": "8"}, (0, 1)),  # a batch script without srun
        ({"RANK": "1"}, (0, 1)),
        ({"RANK": "5", "WORLD_SIZE": "4"}, (0, 1)),
        ({"RANK": "", "WORLD_SIZE": "x"}, (0, 1)),
    ],
)
def test_ranks_of_launchers(
    environment: dict[str, str], expected: tuple[int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in NAMES:
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    sampler = CellSampler(np.zeros(100, int), 8, seed=1)
    assert (sampler.rank, sampler.world_size) == expected
    given = CellSampler(np.zeros(100, int), 8, seed=1, rank=0, world_size=1)
    assert (given.rank, given.world_size) == (0, 1), "what is passed counts"
