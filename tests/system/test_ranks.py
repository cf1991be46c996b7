"""Two ranks under torchrun: one global order, as many steps on each, whatever hands the batches over."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from hbx_gpu.dataloader import CellDataset
from hbx_gpu.sampler import CellSampler
from tests.system.conftest import HAS_DALI, needs_dali

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def out(atlas: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What each of two ranks saw, with every executor of this machine."""
    out = tmp_path_factory.mktemp("ranks")
    executors = ["direct", "dali"] if HAS_DALI else ["direct"]
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2",
               str(ROOT / "tests/system/rank_job.py"), str(atlas), str(out), *executors]  # fmt: skip
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    return out


@pytest.mark.slow
@pytest.mark.timeout(200)
@pytest.mark.parametrize("executor", ["direct", pytest.param("dali", marks=needs_dali)])
def test_two_ranks_share_one_order(dataset: CellDataset, out: Path, executor: str) -> None:
    ranks: list[list[dict[str, Any]]] = [
        json.loads((out / f"{executor}{rank}.json").read_text()) for rank in range(2)
    ]
    assert len(ranks[0]) == len(ranks[1])  # equal steps
    assert [step["total"] for step in ranks[0]] == [step["total"] for step in ranks[1]]
    x = dataset[:]
    for epoch in range(2):
        steps = [[step["rows"] for step in rank if step["epoch"] == epoch] for rank in ranks]
        together = [rows for pair in zip(*steps, strict=True) for rows in pair]
        assert sorted(row for rows in together for row in rows) == list(range(len(dataset)))
        alone = CellSampler(dataset.groups_np, batch_size=48, seed=9, num_workers=0, locality="none",
                            rank=0, world_size=1)  # fmt: skip
        alone.set_epoch(epoch)
        order = [list(rows) for rows in alone]
        whole = len(order) // 2 * 2 - 2  # the last round is cut so that both ranks have a batch
        assert together[:whole] == order[:whole]
    for epoch in range(2):
        total = sum(step["total"] for step in ranks[0] if step["epoch"] == epoch)
        assert total == float(x.values.sum())
