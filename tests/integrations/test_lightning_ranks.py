"""Lightning on two devices, started from a script: uneven data, resume after SIGKILL, predictions."""

from __future__ import annotations

import contextlib
import json
import os
import pickle
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("lightning", reason="Lightning is not installed")

from lightning.pytorch import Trainer

from tests import fresh
from tests.emulation.build import outer_environment
from tests.integrations.recording import BATCH, N_ROWS, Recorder, new_dataset, new_loader

ROOT = Path(__file__).resolve().parents[2]
ALL = list(range(N_ROWS))
pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]


def job(folder: Path, *arguments: object) -> subprocess.CompletedProcess[str]:
    """Run ddp_job.py in a session of its own, which ends with it."""
    environment = outer_environment() | {"PYTHONPATH": str(ROOT), "MASTER_ADDR": "127.0.0.1"}
    command = [sys.executable, "-m", "tests.integrations.ddp_job", str(folder), *map(str, arguments)]
    process = fresh.popen(
        command,
        cwd=ROOT,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        start_new_session=True,
    )
    try:
        output, _ = process.communicate(timeout=400)
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
    return subprocess.CompletedProcess(command, process.returncode, output)


def flat(batches: list[Any]) -> list[int]:
    return [row for rows in batches for row in rows]


def test_killed_in_mid_epoch_and_resumed_on_two_devices(tmp_path: Path) -> None:
    """Every cell once per epoch, whatever the number of devices; the process group comes after the loader."""
    dataset = new_dataset(tmp_path / "arrays")
    (tmp_path / "dataset.pickle").write_bytes(pickle.dumps(dataset))
    killed = job(tmp_path, "kill", 1)
    assert killed.returncode == -signal.SIGKILL, killed.stdout
    before = [json.loads(line) for line in (tmp_path / "killed.jsonl").read_text().splitlines()]
    assert [epoch for epoch, _ in before] == [0] * 8 + [1] * 3

    resumed = job(tmp_path, "all", 2, tmp_path / "last.ckpt")
    assert resumed.returncode == 0, resumed.stdout
    ranks = [json.loads((tmp_path / f"rank{rank}.json").read_text()) for rank in range(2)]

    def rows(what: str, epoch: int) -> list[int]:
        return flat([seen for rank in ranks for at, seen in rank[what] if at == epoch])

    assert sorted(rows("fit", 1) + flat([seen for at, seen in before if at == 1])) == ALL
    assert sorted(rows("fit", 2)) == ALL
    assert len({len(rank["fit"]) for rank in ranks}) == 1
    last = [[len(seen) for at, seen in rank["fit"] if at == 2] for rank in ranks]
    assert max(abs(a - b) for a, b in zip(*last, strict=True)) <= 1

    # Two of four batches of the third epoch were done on each device; now one device has the rest.
    done = flat([seen for rank in ranks for at, seen in rank["fit"] if at == 2][:2])
    done += flat([seen for at, seen in ranks[1]["fit"] if at == 2][:2])
    alone = Recorder()
    one = Trainer(
        accelerator="cpu",
        devices=1,
        max_epochs=4,
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        enable_checkpointing=False,
    )
    one.fit(alone, new_loader(dataset), ckpt_path=tmp_path / "two.ckpt")
    assert sorted(done + alone.rows(2)) == sorted(alone.rows(3)) == ALL

    epochs = len([seen for _, seen in ranks[0]["val"]]) // 4
    held = flat([seen for rank in ranks for _, seen in rank["val"]])
    assert sorted(held) == sorted(ALL * epochs)
    assert sorted(flat([seen for rank in ranks for seen in rank["predict"]])) == ALL
    assert [ranks[rank]["overfit"] for rank in range(2)] == [
        [[epoch, ALL[BATCH * rank : BATCH * (rank + 1)]] for epoch in range(2)] for rank in range(2)
    ]
    for epoch in range(2):
        assert sorted(rows("torch", epoch)) == ALL
