"""Folders that a killed job leaves go with the next one; those of living, other or unknown processes stay."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from hbx_gpu._datasets import state

SPILL = """
import sys, time, numpy as np
from hbx_gpu._datasets.state import spill
class Owner: pass
owner = Owner()
print(spill(owner, {"a": np.arange(10)}, 1), flush=True)
time.sleep(100)
"""


class Owner:
    """What a folder lives as long as."""


@pytest.fixture(autouse=True)
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The temporary folder."""
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    return tmp_path


def job(place: Path) -> tuple[subprocess.Popen[str], Path]:
    process = subprocess.Popen(
        [sys.executable, "-c", SPILL],
        stdout=subprocess.PIPE,
        text=True,
        env=os.environ | {"TMPDIR": str(place)},
    )
    assert process.stdout is not None
    return process, Path(process.stdout.readline().strip())


def test_a_killed_job_leaves_nothing_for_good(place: Path) -> None:
    process, folder = job(place)
    owner = Owner()
    mine = Path(state.spill(owner, {"a": np.arange(3)}, None))
    assert folder.is_dir()  # it lives
    process.send_signal(signal.SIGKILL)
    process.communicate()
    assert folder.is_dir()
    other = Owner()
    second = Path(state.spill(other, {"a": np.arange(3)}, None))
    assert not folder.exists()
    assert mine.is_dir()
    del owner, other
    assert not mine.exists()
    assert not second.exists()


def test_a_number_that_is_used_again(place: Path) -> None:
    name = f"hbx_gpu-dataset-{state.machine()}-{os.getpid()}-1-x"
    (place / name).mkdir()
    assert state.sweep(str(place)) == [str(place / name)]


def test_what_stays(place: Path, tmp_path_factory: pytest.TempPathFactory) -> None:
    canary = tmp_path_factory.mktemp("elsewhere") / "canary"
    canary.write_text("alive")
    dead = f"hbx_gpu-dataset-{state.machine()}-999999999-1-"
    (place / f"{dead}link").symlink_to(canary.parent)
    (place / f"{dead}file").write_text("x")
    (place / "hbx_gpu-dataset-00000000-999999999-1-another-machine").mkdir()
    (place / "hbx_gpu-dataset-old").mkdir()
    (place / "mine").mkdir()
    before = sorted(place.iterdir())
    assert state.sweep(str(place)) == []
    assert sorted(place.iterdir()) == before
    assert canary.read_text() == "alive"


def test_too_little_room_is_said_first(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("shutil.disk_usage", lambda _: SimpleNamespace(free=100))
    with pytest.raises(OSError, match=r"bytes of temporary files, and 100 are free; .*TMPDIR"):
        state.spill(Owner(), {"a": np.arange(10)}, None)
    assert not list(place.iterdir())


def test_a_folder_of_another_user_is_not_run(monkeypatch: pytest.MonkeyPatch) -> None:
    owner = Owner()
    folder = state.spill(owner, {"a": np.arange(10)}, "state")
    arrays, found = state.unspill(folder)
    assert found == "state"
    np.testing.assert_array_equal(arrays["a"], np.arange(10))
    monkeypatch.setattr(state, "_owner_of", lambda _: 54321)
    with pytest.raises(PermissionError, match="belongs to another user"):
        state.unspill(folder)
