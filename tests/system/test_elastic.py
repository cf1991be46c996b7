"""A job loses ranks in the middle of an epoch and goes on with those that are left."""

from __future__ import annotations

import importlib.util
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from hbx_gpu.dataloader import CellDataset
from tests import fresh
from tests.emulation.build import outer_environment

ROOT = Path(__file__).resolve().parents[2]
JOB = str(ROOT / "tests/system/elastic_job.py")


def started(world_size: int, *arguments: str) -> tuple[subprocess.Popen[str], list[int]]:
    """A launcher of so many ranks, and the process ids of them."""
    shared = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(fresh.free_port()), "RANKS": str(world_size)}
    launcher = fresh.popen(
        [sys.executable, JOB, *arguments],
        cwd=ROOT,
        env={**outer_environment(), **shared, "PYTHONPATH": str(ROOT)},
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
    )
    assert launcher.stdout is not None
    with launcher.stdout:
        return launcher, [int(child) for child in launcher.stdout.readline().split()]


def delivered(out: Path, done: int, ranks: int) -> list[list[int]]:
    """Rows of each step of a run, all ranks together."""
    lines = [(out / f"{done}-{rank}.txt").read_text().splitlines() for rank in range(ranks)]
    steps = [[json.loads(line) for line in step] for step in zip(*lines, strict=False)]
    return [[row for rows in step for row in rows] for step in steps]


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_four_ranks_of_which_two_are_killed_then_three(
    atlas: Path, dataset: CellDataset, tmp_path: Path
) -> None:
    launcher, ranks = started(4, str(atlas), str(tmp_path), "5")
    assert len(ranks) == 4
    deadline = time.monotonic() + 200
    while not (tmp_path / "0-3.txt").exists() or len(delivered(tmp_path, 0, 4)) < 5:
        assert time.monotonic() < deadline
        assert launcher.poll() is None
        time.sleep(0.1)
    for rank in ranks[1:3]:
        os.kill(rank, signal.SIGKILL)
    for rank in (ranks[0], ranks[3]):  # as a launcher does with those that are left
        os.kill(rank, signal.SIGKILL)
    assert launcher.wait(timeout=200) == signal.SIGKILL
    done = json.loads((tmp_path / "state.json").read_text())["sampler"]["cells"]
    before = [row for step in delivered(tmp_path, 0, 4)[:3] for row in step]
    assert done == len(before) == 3 * 4 * 16

    launcher, ranks = started(3, str(atlas), str(tmp_path))
    assert len(ranks) == 3
    assert launcher.wait(timeout=200) == 0
    after = [row for step in delivered(tmp_path, done, 3) for row in step]
    assert sorted(before + after) == list(range(len(dataset))), "every cell once over both runs"


@pytest.mark.timeout(200)
def test_two_ranks(atlas: Path, dataset: CellDataset, tmp_path: Path) -> None:
    launcher, ranks = started(2, str(atlas), str(tmp_path))
    assert len(ranks) == 2
    assert launcher.wait(timeout=180) == 0
    steps = delivered(tmp_path, 0, 2)
    assert sorted(row for step in steps for row in step) == list(range(len(dataset)))


def ray_rank(config: dict[str, str]) -> None:
    """What each worker of Ray Train runs."""
    sys.path.insert(0, config["root"])
    from hbx_gpu.atlas import RaggedAtlas
    from hbx_gpu.sampler import CellSampler

    data = RaggedAtlas.checkout_latest(config["atlas"]).query().to_cell_dataset()
    sampler = CellSampler(data.group_runs, batch_size=16, seed=9)
    rows = [row for batch in sampler for row in batch]
    Path(config["out"], f"{sampler.rank}-{sampler.world_size}.json").write_text(json.dumps(rows))


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("ray") is None, reason="Ray is not installed: pip install ray")
def test_ray_train_with_two_workers(atlas: Path, dataset: CellDataset, tmp_path: Path) -> None:
    from ray.train import ScalingConfig
    from ray.train.torch import TorchTrainer

    config = {"atlas": str(atlas), "out": str(tmp_path), "root": str(ROOT)}
    TorchTrainer(
        ray_rank, train_loop_config=config, scaling_config=ScalingConfig(num_workers=2, use_gpu=False)
    ).fit()
    found = [json.loads((tmp_path / f"{rank}-2.json").read_text()) for rank in range(2)]
    assert sorted(found[0] + found[1]) == list(range(len(dataset)))
    assert os.environ.get("RANK") is None
