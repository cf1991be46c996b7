"""The steps of ``make gpu``: gated one by one, written as they come."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from tests import on_gpu


def test_a_step_is_skipped_for_what_it_needs_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """A machine with little else than cupy and torch runs kernels; with zarr and its parts the loader too."""
    few = {"numpy", "cupy", "torch", "numba", "pytest"}
    monkeypatch.setattr(on_gpu, "_sanitizer", lambda: None)
    for there, runs in (
        (few, {"kernels", "kernel-benchmark"}),
        (
            few | {"zarr", "numcodecs", "google_crc32c", "donfig"},
            {"kernels", "kernel-benchmark", "engine", "loader", "residency"},
        ),
    ):
        monkeypatch.setattr(on_gpu, "_there", there.__contains__)
        steps = on_gpu.steps(Path("out"), "x", [])
        assert {step.name for step in steps if not step.lacks()} == runs
    tools = {step.name: step.lacks() for step in steps if step.tool}
    assert list(tools) == ["memcheck", "racecheck", "initcheck", "synccheck"]
    assert all("compute-sanitizer" in reason for reason in tools.values())


def test_results_are_written_as_they_come(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    python = [sys.executable, "-c"]
    made = [
        on_gpu.Step("good", [*python, "pass"], ()),
        on_gpu.Step("bad", [*python, "raise SystemExit(3)"], ()),
        on_gpu.Step("absent", [*python, "pass"], ("no_such_module",)),
        on_gpu.Step("slow", [*python, "import time; time.sleep(60)"], ()),
    ]
    monkeypatch.setattr(on_gpu, "steps", lambda *_: made)
    monkeypatch.setattr(on_gpu, "LIMIT", 1)
    assert on_gpu.main(["--out", str(tmp_path)]) == 1
    found = json.loads((tmp_path / "steps.json").read_text())["steps"]
    assert [(step["step"], step["result"]) for step in found] == [
        ("good", "ok"), ("bad", "failed"), ("absent", "skipped"), ("slow", "failed"),
    ]  # fmt: skip
    assert on_gpu.main(["--out", str(tmp_path), "--only", "good"]) == 0
    assert on_gpu.main(["--out", str(tmp_path), "--only", "kernel"]) == 2
    assert "the steps are good, bad" in capsys.readouterr().out


def test_memory_is_plain_where_it_is_asked_for() -> None:
    """Under compute-sanitizer torch and cupy ask CUDA for each block."""
    code = (
        "import os, sys, types; calls = []; cupy = types.ModuleType('cupy'); cupy.__spec__ = object();"
        "call = calls.append;"
        "cupy.cuda = types.SimpleNamespace(set_allocator=call, set_pinned_memory_allocator=call);"
        "sys.modules['cupy'] = cupy; from tests.gpu import allocate_plainly; allocate_plainly();"
        "print(calls, os.environ['PYTORCH_NO_CUDA_MEMORY_CACHING'])"
    )
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert found.stdout.strip() == "[None, None] 1"
