"""Two workers of Ray Train take their ranks from its process group."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

from hbx_gpu.dataloader import CellDataset

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.slow
@pytest.mark.timeout(300)
@pytest.mark.skipif(
    importlib.util.find_spec("ray") is None,
    reason="Ray is not installed; pip install 'ray[train]' to test Ray Train",
)
def test_two_workers_of_ray_train_share_one_order(atlas: Path, dataset: CellDataset) -> None:
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "RAY_USAGE_STATS_ENABLED": "0"}
    # A short path, because Ray puts sockets below it.
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as out:
        command = [sys.executable, str(ROOT / "tests/system/ray_job.py"), str(atlas), out]
        done = subprocess.run(
            command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=280, check=False
        )
        assert done.returncode == 0, done.stderr[-8000:]
        ranks = [json.loads(Path(out, f"rank{rank}.json").read_text()) for rank in range(2)]
    assert [step["total"] for step in ranks[0]] == [step["total"] for step in ranks[1]]
    rows = [row for rank in ranks for step in rank for row in step["rows"]]
    assert sorted(rows) == list(range(len(dataset)))
    assert min(len(rank) for rank in ranks) > 1
