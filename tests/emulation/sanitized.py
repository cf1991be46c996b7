"""Runs kernel tests under AddressSanitizer and UBSan: `python -m tests.emulation.sanitized [pytest options]`.

Starts pytest in a process with libasan preloaded, in which emulated kernels are the sanitized builds. Without
arguments: all of tests/kernels in one thread order. With HBX_FUZZ_SECONDS: the property tests again and again
for that long, with other seeds and thread orders. The exit status is pytest's; an invalid access ends the run
with its report.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from tests.emulation import cases
from tests.emulation.build import compiler_library, outer_environment

ROOT = Path(__file__).resolve().parents[2]
_PYTEST = ["-v", "-m", "not gpu and not slow", "-p", "no:cacheprovider"]
# Without the tests that launch nothing.
KERNEL_TESTS = ["tests/kernels", "--ignore-glob=*test_compile.py", "--ignore-glob=*test_flush_model.py"]


def environment(*, reports: Path | None = None) -> dict[str, str]:
    """Environment of a process that can load sanitized kernels; report files are named `reports`.PID."""
    # The sanitizer must be loaded first, and knows C++ exceptions only if their library came with it.
    libraries = [compiler_library("libasan.so"), compiler_library("libstdc++.so")]
    log = f":log_path={reports}" if reports else ""
    return {
        **outer_environment(),
        "LD_PRELOAD": " ".join(libraries),
        # Python frees little at its exit: leaks mean nothing here. A limit of memory ends the process with a
        # report, before the system ends it without one.
        "ASAN_OPTIONS": f"detect_leaks=0:allocator_may_return_null=1:hard_rss_limit_mb=6000{log}",
        "UBSAN_OPTIONS": f"print_stacktrace=1:halt_on_error=1{log}",
        "HBX_EMULATED_WATCH": "accesses",
        "HBX_EMULATED_ORDERS": os.environ.get("HBX_EMULATED_ORDERS", "forward"),
        "PYTHONPATH": os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH", "")])),
        # What a test was doing is lost in a buffer when the sanitizer ends the process.
        "PYTHONUNBUFFERED": "1",
    }


def run(
    arguments: list[str], *, capture: bool = False, more: dict[str, str] | None = None
) -> tuple[int, str]:
    """Exit status of pytest, and its output (if captured) with the sanitizers' reports.

    `more` are environment variables on top of `environment`.
    """
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-m", "pytest", *_PYTEST, *arguments]
        done = subprocess.run(
            command,
            cwd=ROOT,
            env={**environment(reports=Path(folder) / "report"), **(more or {})},
            stdout=subprocess.PIPE if capture else None,
            stderr=subprocess.STDOUT if capture else None,
            text=True,
            check=False,
        )
        reports = [file.read_text(errors="replace") for file in sorted(Path(folder).iterdir())]
    if done.returncode < 0:
        reports.append(f"pytest was ended by signal {-done.returncode}\n")
    return (done.returncode or int(bool(reports))), "\n".join([done.stdout or "", *reports])


def fuzz(seconds: float, arguments: list[str]) -> int:
    """Property tests with one seed after another; prints how many cases passed. Stops at a failure."""
    files = arguments or [
        str(path) for path in sorted((ROOT / "tests" / "kernels").glob("test_*_properties.py"))
    ]
    if not files:
        print("there are no property tests in tests/kernels")
        return 1
    begin = time.monotonic()
    seed = int(os.environ.get("HBX_FUZZ_SEED", "0")) or int(time.time())
    rounds = tests = cases = 0
    while rounds == 0 or time.monotonic() - begin < seconds:
        settings = round_settings(seed + rounds)
        # Not the profile that hypothesis takes in CI, which draws the same cases every time.
        options = ["--hypothesis-profile=default", "--hypothesis-show-statistics"]
        options.append(f"--hypothesis-seed={seed + rounds}")
        status, output = run([*options, *files], capture=True, more=settings)
        if status != 0:
            print(output)
            same = f"HBX_FUZZ_SECONDS=1 HBX_FUZZ_SEED={seed + rounds}"
            print(f"failed after {cases} cases that passed; the same round again: {same} and this command")
            return status
        rounds += 1
        tests += sum(int(n) for n in re.findall(r"(\d+) passed", output))
        cases += sum(int(n) for n in re.findall(r"(\d+) passing", output))
        elapsed = time.monotonic() - begin
        print(f"{rounds} rounds, {tests} tests, {cases} cases, {elapsed:.0f} s: all passed", flush=True)
    return 0


def round_settings(seed: int) -> dict[str, str]:
    """Environment of one round: its thread order and cases per test, both by its seed."""
    orders = ("forward", "reverse", f"random:{seed}")
    return {
        **cases.ALL,
        "HBX_EMULATED_ORDERS": orders[seed % 3],
        "HBX_FUZZ_EXAMPLES": os.environ.get("HBX_FUZZ_EXAMPLES", "400"),
    }


def main(arguments: list[str]) -> int:
    """Entry of the command."""
    seconds = float(os.environ.get("HBX_FUZZ_SECONDS", "0"))
    if seconds > 0:
        return fuzz(seconds, arguments)
    status, reports = run(arguments or KERNEL_TESTS, more=cases.ALL)
    if reports.strip():
        print(reports)
    return status


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
