"""The suite in several processes: tests that measure have no company, kernels are compiled by one process."""

from __future__ import annotations

import itertools
import json
import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]

CONFTEST = """
from pathlib import Path
from tests import side_by_side
from tests.side_by_side import pytest_runtest_protocol

# Locks of its own: this test holds those of the suite that it runs in.
side_by_side.DOOR, side_by_side.ROOM = Path(__file__), Path(__file__).with_name("test_it.py")
"""

KERNEL = """
import numba

@numba.njit(cache=True)
def inner(x):
    return x + 1

@numba.njit(cache=True)
def outer(x):
    return inner(x) * 2
"""

TESTS = """
import json, os, pathlib, time
import pytest
import kernel

def record(name, begin):
    line = json.dumps([name, begin, time.monotonic()])
    pathlib.Path(os.environ["RECORD"], f"{os.getpid()}-{name}").write_text(line)

@pytest.mark.parametrize("number", range(8))
def test_shared(number):
    begin = time.monotonic()
    time.sleep(0.05)
    record(f"shared{number}", begin)

@pytest.mark.timing
@pytest.mark.parametrize("number", range(4))
def test_alone(number):
    begin = time.monotonic()
    time.sleep(0.05)
    record(f"alone{number}", begin)

@pytest.mark.parametrize("number", range(2))
def test_compiles(number):
    assert kernel.outer(3) == 8
    compiled = sum(sum(k.stats.cache_misses.values()) for k in (kernel.inner, kernel.outer))
    pathlib.Path(os.environ["RECORD"], f"compiled-{os.getpid()}").write_text(str(compiled))
    time.sleep(0.3)
"""


def test_timing_alone_and_kernels_once(tmp_path: Path) -> None:
    suite, record = tmp_path / "suite", tmp_path / "record"
    for folder in (suite, record):
        folder.mkdir()
    for name, content in (("conftest", CONFTEST), ("kernel", KERNEL), ("test_it", TESTS)):
        (suite / f"{name}.py").write_text(content)
    (suite / "pytest.ini").write_text("[pytest]\nmarkers = timing\n")
    environment = {**os.environ, "PYTHONPATH": f"{ROOT}{os.pathsep}{suite}", "RECORD": str(record)}
    for name in [name for name in environment if name.startswith(("PYTEST_", "NUMBA_"))]:
        del environment[name]
    # One test at a time for each process: neighbors run side by side, and so do the two that compile.
    command = [sys.executable, "-m", "pytest", "-q", "-n", "2", "--dist", "load", "--maxschedchunk", "1"]
    done = subprocess.run(command, cwd=suite, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    spans = [
        json.loads(path.read_text()) for path in record.iterdir() if not path.name.startswith("compiled")
    ]
    assert len(spans) == 12
    overlapping = {
        frozenset((a[0][:5], b[0][:5]))
        for a, b in itertools.combinations(spans, 2)
        if a[1] < b[2] and b[1] < a[2]
    }
    assert overlapping == {frozenset(["share"])}  # the shared ones beside one another, and nothing else
    compiled = [int(path.read_text()) for path in record.glob("compiled-*")]
    assert len(compiled) == 2
    assert sorted(compiled) == [0, 2]
