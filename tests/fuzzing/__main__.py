"""Fuzz: `python -m tests.fuzzing --cases 20000`. Exits with 1 where something happened that never may.

Counts, per target and kind of file: cases refused with an error of ours, read as before, wrong
numbers, foreign exceptions, crashes (the process ended) and hangs. Foreign exceptions, crashes and hangs are
faults everywhere; wrong numbers are where a checksum covers the file.
"""

from __future__ import annotations

import argparse
import json
import os
import selectors
import subprocess
import sys
import tempfile
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

from tests.fuzzing.targets import Target, targets

ROOT = Path(__file__).resolve().parents[2]
OUTCOMES = ("refused", "same", "wrong", "foreign", "crash", "hang")
_START_SECONDS, _CASE_SECONDS = 180.0, 30.0


@dataclass
class Report:
    """What happened.

    Attributes
    ----------
    counts
        (target, kind of file, outcome) -> cases.
    faults
        Cases that never may be, as text.
    """

    counts: Counter[tuple[str, str, str]] = field(default_factory=Counter)
    faults: list[str] = field(default_factory=list)

    def add(self, target: str, case: int, message: dict[str, object]) -> None:
        """Count one case."""
        outcome, kind = str(message["outcome"]), str(message.get("kind", "?"))
        self.counts[target, kind, outcome] += 1
        if outcome in ("foreign", "crash", "hang") or (outcome == "wrong" and message.get("checked")):
            self.faults.append(
                f"{target}, case {case}, {message.get('file', '?')}: {outcome} {message.get('what', '')}"
            )

    def __str__(self) -> str:
        rows = sorted({key[:2] for key in self.counts})
        lines = [f"{'target':<32}{'files':<26}" + "".join(f"{outcome:>9}" for outcome in OUTCOMES)]
        for target, kind in rows:
            numbers = "".join(f"{self.counts[target, kind, outcome]:>9}" for outcome in OUTCOMES)
            lines.append(f"{target:<32}{kind:<26}{numbers}")
        return "\n".join(
            [*lines, f"{sum(self.counts.values())} cases, {len(self.faults)} faults", *self.faults[:50]]
        )


def fuzz(cases: int, *, seed: int = 0, only: tuple[str, ...] = ()) -> Report:
    """Run so many cases, shared out among the targets."""
    chosen, report = targets(only), Report()
    total = sum(target.share for target in chosen)
    with tempfile.TemporaryDirectory(prefix="hbx_gpu-fuzz-") as folder:
        for number, target in enumerate(chosen):
            store = Path(folder) / f"store{number}"
            target.build(store)
            _run(target, store, seed, max(1, round(cases * target.share / total)), report)
    return report


def _run(target: Target, store: Path, seed: int, cases: int, report: Report) -> None:
    first = 0
    whole = {path: path.read_bytes() for path in store.rglob("*") if path.is_file()}
    while first < cases:
        first = _worker(target, store, seed, first, cases, report)
        if first < cases:  # it died with a damaged file in place
            for path, content in whole.items():
                path.write_bytes(content)


def _worker(target: Target, store: Path, seed: int, first: int, last: int, report: Report) -> int:
    """One process, as far as it comes; returns the next case."""
    command = [
        sys.executable,
        "-m",
        "tests.fuzzing.worker",
        target.name,
        str(store),
        str(seed),
        str(first),
        str(last),
    ]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])}
    current, started, buffer = first, False, b""
    with subprocess.Popen(command, stdout=subprocess.PIPE, cwd=ROOT, env=environment) as process:
        assert process.stdout is not None
        selector = selectors.DefaultSelector()
        selector.register(process.stdout, selectors.EVENT_READ)
        while True:
            if not selector.select(_CASE_SECONDS if started else _START_SECONDS):
                process.kill()
                report.add(target.name, current, {"outcome": "hang"})
                return current + 1
            piece = os.read(process.stdout.fileno(), 1 << 16)
            if not piece:
                break
            *lines, buffer = (buffer + piece).split(b"\n")
            for line in lines:
                message = json.loads(line)
                started = True
                if "case" in message:
                    current = message["case"]
                else:
                    report.add(target.name, message["done"], message)
                    current = message["done"] + 1
        if process.wait() == 0 and current >= last:
            return last
    if not started:
        raise RuntimeError(f"the store of {target.name!r} cannot be read undamaged, see the error above")
    report.add(target.name, current, {"outcome": "crash", "what": f"exit status {process.returncode}"})
    return current + 1


def main() -> int:
    """Command line; see the module."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--cases", type=int, default=20_000, help="how many files are damaged in all")
    parser.add_argument("--seed", type=int, default=0, help="other damage")
    parser.add_argument("--only", action="append", default=[], help="targets whose name contains this")
    arguments = parser.parse_args()
    report = fuzz(arguments.cases, seed=arguments.seed, only=tuple(arguments.only))
    print(report)
    return 1 if report.faults else 0


if __name__ == "__main__":
    sys.exit(main())
