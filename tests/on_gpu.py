"""Everything that only a machine with an NVIDIA GPU can show, in one command: ``python -m tests.on_gpu``.

Needs numpy, cupy, torch and pytest; what needs more packages or tools is skipped, and the summary says so.
"""

from __future__ import annotations

import argparse
import importlib.util
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
# What the rooms around the kernels import: an atlas is written, opened and loaded.
_ATLAS = ("zarr", "lancedb", "h5py", "anndata", "hypothesis", "google_crc32c", "scipy")


_LOADING = tuple(
    f"tests/test_{name}.py"
    for name in (
        "device_loader",
        "device_decode",
        "dense_device",
        "multimodal",
        "residency",
        "executors",
        "pipeline",
    )
)


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


def steps(out: Path, sanitize_only: str, pythons: Sequence[str]) -> list[tuple[str, list[str], str]]:
    """(title, command, why it is skipped or "") of each step."""
    peers = [part for python in pythons for part in ("--python", python)]
    python = [sys.executable, "-m"]
    pytest = [*python, "pytest", "-q", "-m", "gpu", "-p", "no:cacheprovider"]
    absent = _absent(_ATLAS)
    atlas = f"packages missing: {', '.join(absent)}" if absent else ""
    lacking = absent or _absent(("nvidia.dali",))
    images = f"packages missing: {', '.join(lacking)}" if lacking else ""
    tool = _sanitizer()
    none = "" if tool else "compute-sanitizer is neither on PATH nor below CUDA_HOME"
    check = [tool or "compute-sanitizer", "--target-processes", "all", "--error-exitcode", "9"]
    few = [*pytest, "tests/kernels", "-k", sanitize_only]
    return [
        ("kernels", [*pytest, "tests/kernels"], ""),
        ("engine and loader", [*pytest, "tests/engine", *_LOADING], atlas),
        ("images", [*pytest, "tests/images"], images),
        ("soak and faults", [*pytest, "tests/system"], atlas),
        ("memcheck", [*check, "--tool", "memcheck", *few], none),
        ("racecheck", [*check, "--tool", "racecheck", *few], none),
        ("kernel benchmark", [*python, "benchmarks.kernels", "--out", str(out)], ""),
        ("loader on the device", [*python, "benchmarks.device", "--out", str(out)], atlas),
        ("decompression", [*python, "benchmarks.decompression", "--out", str(out)], atlas),
        ("end to end", [*python, "benchmarks.end_to_end", "--out", str(out), *peers], atlas),
    ]


def main(argv: Sequence[str] | None = None) -> int:
    """Run the steps, print a summary; returns 1 if one failed."""
    parser = argparse.ArgumentParser(prog="python -m tests.on_gpu", description=__doc__)
    parser.add_argument("--out", type=Path, default=Path("demo/gpu"), help="where benchmark results go")
    parser.add_argument("--only", nargs="+", default=[], help="steps, by title")
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
    missing = _absent(("numpy", "cupy", "torch", "numba", "pytest"))
    if missing:
        print(f"packages missing: {', '.join(missing)}; install them beside a driver and run this again")
        return 2
    environment = {**os.environ, "HBX_REQUIRE_GPU": "1"}
    summary, failed = [], False
    for title, command, skip in steps(options.out, options.sanitize, options.python):
        if options.only and title not in options.only:
            continue
        if skip:
            summary.append(f"{title}: skipped ({skip})")
            continue
        print(f"== {title}: {' '.join(command)}", flush=True)
        clock = time.perf_counter()
        status = subprocess.run(command, cwd=ROOT, env=environment, check=False).returncode
        failed |= status != 0
        summary.append(
            f"{title}: {'ok' if status == 0 else f'FAILED ({status})'}, {time.perf_counter() - clock:.0f} s"
        )
    print("\n".join(["== summary", *summary]))
    return int(failed)


if __name__ == "__main__":
    raise SystemExit(main())
