"""Everything that only a machine with an NVIDIA GPU can show, in one command: ``python -m tests.on_gpu``.

Each step is skipped where a package or tool that it needs is missing, and says so. Kernels need numpy, cupy,
torch, numba and pytest; engine, loader and residency zarr, numcodecs, google-crc32c and donfig besides.
``--only STEP`` runs some. After each step its result is in ``steps.json`` of the output folder, and all of it
is printed at the end.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
LIMIT = 600
"""Seconds that a step may take."""
_KERNELS = ("numpy", "cupy", "torch", "numba", "pytest")
# What opens stored arrays: the engine and the loader.
_ARRAYS = (*_KERNELS, "zarr", "numcodecs", "google_crc32c", "donfig")
# What writes, opens and queries an atlas besides.
_ATLAS = (*_ARRAYS, "lancedb", "h5py", "anndata", "hypothesis", "scipy")
_DALI = (*_ATLAS, "nvidia.dali")


@dataclass(frozen=True, slots=True)
class Step:
    """A command that takes less than `LIMIT` seconds on a GPU.

    Attributes
    ----------
    name
        What ``--only`` calls it.
    command
        Program and arguments.
    needs
        Modules without which it is skipped.
    tool
        Whether it runs under compute-sanitizer.
    """

    name: str
    command: list[str]
    needs: tuple[str, ...] = _KERNELS
    tool: bool = False

    def lacks(self) -> str:
        """Why it is skipped here; empty where it is not."""
        absent = _absent(self.needs)
        if absent:
            return f"packages missing: {', '.join(absent)}"
        if self.tool and _sanitizer() is None:
            return "compute-sanitizer is neither on PATH nor below CUDA_HOME"
        return ""


def _absent(modules: Sequence[str]) -> list[str]:
    return [name for name in modules if not _there(name)]


def _there(module: str) -> bool:
    try:
        return importlib.util.find_spec(module) is not None
    except ModuleNotFoundError:  # the package that it would be part of
        return False


def _sanitizer() -> str | None:
    home = os.environ.get("CUDA_HOME", "/usr/local/cuda")
    return shutil.which("compute-sanitizer") or shutil.which("compute-sanitizer", path=f"{home}/bin")


def steps(out: Path, sanitize_only: str, pythons: Sequence[str]) -> list[Step]:
    """All steps, in the order that they run in: what everything else stands on first."""
    peers = [part for python in pythons for part in ("--python", python)]
    python = [sys.executable, "-m"]
    pytest = [*python, "pytest", "-q", "-m", "gpu", "-p", "no:cacheprovider"]
    few = [*pytest, "tests/kernels", "-k", sanitize_only]
    check = [_sanitizer() or "compute-sanitizer", "--target-processes", "all", "--error-exitcode", "9"]
    tests = [f"tests/test_{name}.py" for name in ("device_loader", "device_decode", "dense_device")]
    return [
        Step("kernels", [*pytest, "tests/kernels"]),
        Step("engine", [*pytest, "tests/engine"], _ARRAYS),
        Step("loader", [*pytest, *tests], _ARRAYS),
        Step("residency", [*pytest, "tests/test_residency.py", "tests/test_planned.py"], _ARRAYS),
        Step("multimodal", [*pytest, "tests/test_multimodal.py", "tests/test_multimodal_images.py"], _ATLAS),
        Step("dali", [*pytest, "tests/test_executors.py", "tests/test_pipeline.py"], _DALI),
        Step("images", [*pytest, "tests/images"], _DALI),
        Step("system", [*pytest, "tests/system"], _ATLAS),
        *(
            Step(tool, [*check, "--tool", tool, *few], tool=True)
            for tool in ("memcheck", "racecheck", "initcheck", "synccheck")
        ),
        Step("kernel-benchmark", [*python, "benchmarks.kernels", "--out", str(out)]),
        Step("loader-benchmark", [*python, "benchmarks.device", "--out", str(out)], _ATLAS),
        Step("decompression", [*python, "benchmarks.decompression", "--out", str(out)], _ATLAS),
        Step("end-to-end", [*python, "benchmarks.end_to_end", "--out", str(out), *peers], _ATLAS),
    ]


def run(step: Step) -> dict[str, Any]:
    """Carry a step out, or say why not; its line of the summary."""
    found: dict[str, Any] = {"step": step.name, "result": "skipped", "reason": step.lacks()}
    if found["reason"]:
        return found
    print(f"== {step.name}: {' '.join(step.command)}", flush=True)
    environment = {**os.environ, "HBX_REQUIRE_GPU": "1"}
    if step.tool:
        environment["HBX_PLAIN_MEMORY"] = "1"  # pools hide where a block ends
    clock = time.perf_counter()
    try:
        status = subprocess.run(
            step.command, cwd=ROOT, env=environment, check=False, timeout=LIMIT
        ).returncode
        reason = "" if status == 0 else f"exit status {status}"
    except subprocess.TimeoutExpired:
        reason = f"not done within {LIMIT} s"
    seconds = round(time.perf_counter() - clock, 1)
    return {"step": step.name, "result": "failed" if reason else "ok", "reason": reason, "seconds": seconds}


def main(argv: Sequence[str] | None = None) -> int:
    """Run the steps and write results as they come; returns 1 if one failed, 2 if there is no such step."""
    parser = argparse.ArgumentParser(prog="python -m tests.on_gpu", description=__doc__)
    parser.add_argument("--out", type=Path, default=Path("demo/gpu"), help="where results go")
    parser.add_argument("--only", nargs="+", default=[], metavar="STEP", help="steps, by name")
    parser.add_argument(
        "--sanitize", default="not large", help="pytest -k of the kernel tests under compute-sanitizer"
    )
    parser.add_argument(
        "--python",
        action="append",
        default=[],
        metavar="NAME=PATH",
        help="interpreter of a peer, with a CUDA build of torch",
    )
    options = parser.parse_args(argv)
    known = {step.name: step for step in steps(options.out, options.sanitize, options.python)}
    if unknown := [name for name in options.only if name not in known]:
        print(f"there is no step {', '.join(unknown)}; the steps are {', '.join(known)}")
        return 2
    options.out.mkdir(parents=True, exist_ok=True)
    results: list[dict[str, Any]] = []
    for name in options.only or known:
        results.append(run(known[name]))
        text = json.dumps({"steps": results}, indent=1)
        (options.out / "steps.json").write_text(text + "\n", encoding="utf-8")
        print(f"== {json.dumps(results[-1])}", flush=True)
    print(text)
    return int(any(result["result"] == "failed" for result in results))


if __name__ == "__main__":
    raise SystemExit(main())
