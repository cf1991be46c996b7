"""Processes of a host share what one of them made, whatever happens to the others."""

from __future__ import annotations

import os
import pickle
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from hbx_gpu._datasets import shared as module
from hbx_gpu._datasets.shared import several_ranks_here, shared
from hbx_gpu.atlas import RaggedAtlas
from hbx_gpu.dataloader import CellDataset
from hbx_gpu.testing import example_atlas
from tests.emulation.build import outer_environment

JOB = """
import os, sys, time
import numpy as np
from hbx_gpu._datasets.shared import shared

def make():
    with open(sys.argv[1], "a") as file:
        file.write(f"{os.getpid()}\\n")
    time.sleep(float(sys.argv[3]))
    return {"numbers": np.arange(10_000), "few": np.arange(3)}, ["state"]

arrays, state = shared(sys.argv[2], make)
assert arrays["numbers"].sum() == 49_995_000 and arrays["few"].tolist() == [0, 1, 2] and state == ["state"]
assert isinstance(arrays["numbers"].base, np.memmap)
print("ready", flush=True)
sys.stdin.read()
"""


@pytest.fixture(autouse=True)
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    folder = tmp_path / "temporary"
    folder.mkdir()
    monkeypatch.setenv("TMPDIR", str(folder))
    monkeypatch.setattr(tempfile, "tempdir", None)
    return folder


def started(log: Path, key: str, seconds: float = 0) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-c", JOB, str(log), key, str(seconds)],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
        env={**outer_environment(), "TMPDIR": os.environ["TMPDIR"]},
    )  # fmt: skip


def ready(job: subprocess.Popen[str]) -> None:
    assert job.stdout is not None
    assert job.stdout.readline() == "ready\n"


def ended(job: subprocess.Popen[str]) -> None:
    job.communicate("")
    assert job.returncode == 0


def test_one_of_several_processes_makes_it_and_the_last_one_removes_it(place: Path, tmp_path: Path) -> None:
    log = tmp_path / "log"
    jobs = [started(log, "a1", 0.2) for _ in range(3)]
    for job in jobs:
        ready(job)
    assert len(log.read_text().split()) == 1
    ended(jobs[0])
    assert len(list(place.iterdir())) == 2, "the folder and its lock, while others use it"
    for job in jobs[1:]:
        ended(job)
    assert list(place.iterdir()) == []


def test_a_process_killed_while_it_makes_or_uses_the_folder(place: Path, tmp_path: Path) -> None:
    log = tmp_path / "log"
    maker = started(log, "b1", 60)
    while not log.exists():
        time.sleep(0.01)
    waiting = started(log, "b1")
    time.sleep(0.1)
    maker.send_signal(signal.SIGKILL)
    maker.communicate()
    ready(waiting)
    assert len(log.read_text().split()) == 2, "the one that waited made it"
    waiting.send_signal(signal.SIGKILL)
    waiting.communicate()
    assert len(list(place.iterdir())) == 2, "nobody was left to remove it"
    other = started(log, "c1")
    ready(other)
    assert {path.name.rsplit("-", 1)[1].removesuffix(".lock") for path in place.iterdir()} == {"c1"}
    ended(other)


def test_what_fails_to_be_made_is_made_by_the_next(place: Path) -> None:
    def failing() -> Any:
        raise RuntimeError("no data")

    with pytest.raises(RuntimeError, match="no data"):
        shared("d1", failing)
    arrays, state = shared("d1", lambda: ({"x": np.arange(100)}, 7))
    assert (arrays["x"].sum(), state) == (4950, 7)
    del arrays
    assert list(place.iterdir()) == []


def test_the_folder_that_another_process_removes_is_made_again(monkeypatch: pytest.MonkeyPatch) -> None:
    kept, _ = shared("e1", lambda: ({"x": np.arange(100)}, None))
    # The lock that was opened is on a file that is gone by the time it is held.
    opened = module._open

    def too_late(folder: Path) -> int:
        lock = opened(folder)
        monkeypatch.setattr(module, "_open", opened)
        module._lock_path(folder).unlink()
        return lock

    monkeypatch.setattr(module, "_open", too_late)
    again, _ = shared("e1", lambda: ({"x": np.arange(100)}, None))
    assert np.array_equal(kept["x"], again["x"])


def test_a_system_without_file_locks_shares_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    assert several_ranks_here()
    monkeypatch.setitem(sys.modules, "fcntl", None)
    assert not several_ranks_here()


@pytest.mark.parametrize(
    ("name", "value", "several"),
    [
        ("LOCAL_WORLD_SIZE", "4", True),
        ("LOCAL_WORLD_SIZE", "1", False),
        ("OMPI_COMM_WORLD_LOCAL_SIZE", "2", True),
        ("SLURM_STEP_TASKS_PER_NODE", "4(x2)", True),
        ("SLURM_STEP_TASKS_PER_NODE", "1(x8)", False),
        ("SLURM_STEP_TASKS_PER_NODE", "1", False),
        ("ELSEWHERE", "3", False),
    ],
)
def test_ranks_of_a_host(name: str, value: str, several: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    for known in (*module._COUNTS, "SLURM_STEP_TASKS_PER_NODE"):
        monkeypatch.delenv(known, raising=False)
    monkeypatch.setenv(name, value)
    assert several_ranks_here() == several


def test_ranks_of_a_host_map_one_copy_of_what_a_query_finds(
    place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    atlas = example_atlas(tmp_path / "atlas", 3000)
    names = [name for name in atlas.query().to_pandas().columns if name != "uid"]

    def opened(**options: Any) -> CellDataset:
        query = RaggedAtlas.checkout_latest(tmp_path / "atlas").query()
        found = query.to_cell_dataset(metadata_columns=names, **options)
        assert isinstance(found, CellDataset)
        return found

    alone = opened()
    assert list(place.iterdir()) == []
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    first = opened()
    monkeypatch.setattr("hbx_gpu.atlas._query.obs.scan", None)  # the second one reads no table
    second = opened()
    assert len(list(place.iterdir())) == 2
    for dataset in (first, second):
        lengths = dataset.row_index.arrays()["lengths"]
        assert isinstance(lengths.base, np.memmap)
        assert dataset.identity() == alone.identity()
        for name in names:
            assert np.array_equal(dataset.columns[name], alone.columns[name])
        batch, expected = dataset[np.arange(5, 25)], alone[np.arange(5, 25)]
        assert np.array_equal(batch.values, expected.values)

    # Its pickle links the same files, so that workers of all ranks map them too.
    worker = pickle.loads(pickle.dumps(second))
    files = {path.stat().st_ino for path in place.glob("hbx_gpu-shared-*/rows-lengths.npy")}
    assert {path.stat().st_ino for path in place.glob("hbx_gpu-dataset-*/lengths.npy")} == files
    assert np.array_equal(worker[np.arange(9)].values, alone[np.arange(9)].values)


def test_without_room_for_temporary_files_every_rank_reads_for_itself(
    place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    atlas = example_atlas(tmp_path / "atlas", 100)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")

    def full(folder: str, nbytes: int) -> None:
        raise OSError(f"{folder}: no room for {nbytes} bytes")

    monkeypatch.setattr(module, "check_room", full)
    assert len(atlas.query().to_cell_dataset()) == 200
    assert not any(path.is_dir() for path in place.iterdir())
