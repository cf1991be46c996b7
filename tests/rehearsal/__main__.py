"""Run the GPU-marked suites over the stand-in: ``python -m tests.rehearsal [SUITE ...]``."""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
import xml.etree.ElementTree as ElementTree
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from tests.emulation.build import outer_environment
from tests.rehearsal.build import HERE, PackageMissing, folder
from tests.rehearsal.runtime import LIBRARY

ROOT = HERE.parents[1]
SUITES = {
    "stand-in": ["tests/rehearsal"],
    "engine": ["tests/engine"],
    "loader": ["tests/test_device_loader.py", "tests/test_device_decode.py", "tests/test_dense_device.py"],
    "residency": ["tests/test_residency.py", "tests/test_planned.py"],
    "pipeline": [
        "tests/test_pipeline.py",
        "tests/test_executors.py",
        "tests/test_multimodal.py",
        "tests/test_multimodal_images.py",
    ],
}
OUTCOMES = ("passed", "failed", "skipped")


def environment() -> dict[str, str]:
    """Environment of a Python over the stand-in.

    Raises
    ------
    PackageMissing
        See `tests.rehearsal.build.folder`.
    """
    libraries = folder()
    runtime = str(libraries / "libcudart.so.13")
    inherited = outer_environment()
    return {
        **inherited,
        "LD_PRELOAD": runtime,
        "LD_LIBRARY_PATH": f"{libraries}:{inherited.get('LD_LIBRARY_PATH', '')}".rstrip(":"),
        LIBRARY: runtime,
        "PYTHONPATH": os.pathsep.join([str(HERE / "packages"), str(ROOT)]),
        "HBX_REQUIRE_GPU": "1",
        # Copies are later than the kernels that must wait for them. All are done with in minutes.
        "HBX_REHEARSAL_COPY_US": inherited.get("HBX_REHEARSAL_COPY_US", "1000"),
        "HBX_REHEARSAL_KERNEL_US": inherited.get("HBX_REHEARSAL_KERNEL_US", "200"),
    }


def run(paths: Sequence[str], more: Sequence[str], environ: dict[str, str]) -> Counter[str]:
    """Tests of a suite by outcome; a run that broke off counts as a failure."""
    with tempfile.TemporaryDirectory() as scratch:
        report = Path(scratch) / "report.xml"
        command = [sys.executable, "-m", "pytest", "-q", "-rs", "-m", "gpu", "-p", "tests.rehearsal.plugin"]
        command += ["-p", "no:cacheprovider", f"--junitxml={report}", *paths, *more]
        status = subprocess.run(command, cwd=ROOT, env=environ, check=False).returncode
        found = _outcomes(report) if report.exists() else Counter[str]()
    if status not in (0, 5) and not found["failed"]:
        found["failed"] = 1
    return found


def _outcomes(report: Path) -> Counter[str]:
    cases = ElementTree.parse(report).iter("testcase")
    return Counter(
        "failed"
        if case.find("failure") is not None or case.find("error") is not None
        else "skipped"
        if case.find("skipped") is not None
        else "passed"
        for case in cases
    )


def main(argv: Sequence[str] | None = None) -> int:
    """Run suites and print one line at the end; 1 if a test failed or none ran, 2 if nothing can run."""
    parser = argparse.ArgumentParser(prog="python -m tests.rehearsal", description=__doc__)
    parser.add_argument("suites", nargs="*", metavar="SUITE", help=", ".join(SUITES))
    parser.add_argument("-k", default="", metavar="EXPRESSION", help="passed on to pytest")
    options = parser.parse_args(argv)
    if unknown := [name for name in options.suites if name not in SUITES]:
        print(f"there is no suite {', '.join(unknown)}; the suites are {', '.join(SUITES)}")
        return 2
    try:
        environ = environment()
    except PackageMissing as missing:
        print(missing)
        return 2
    more = ["-k", options.k] if options.k else []
    found = {name: run(SUITES[name], more, environ) for name in options.suites or SUITES}
    total = sum(found.values(), Counter[str]())
    parts = [f"{name} {'/'.join(str(counts[kind]) for kind in OUTCOMES)}" for name, counts in found.items()]
    words = ", ".join(f"{total[kind]} {kind}" for kind in OUTCOMES)
    print(f"rehearsal: {words} ({'/'.join(OUTCOMES)} by suite: {', '.join(parts)})")
    return int(total["failed"] > 0 or total["passed"] == 0)


if __name__ == "__main__":
    raise SystemExit(main())
