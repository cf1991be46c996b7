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
import time
from collections import Counter
from collections.abc import Collection, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

from tests.fuzzing.targets import share_out, targets

ROOT = Path(__file__).resolve().parents[2]
FAMILIES = ("chunks", "codecs", "archives", "atlas", "stores")
"""Parts of the fuzz that run side by side, each in one process."""
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
        lines = [f"{'target':<30}{'files':<34}" + "".join(f"{outcome:>9}" for outcome in OUTCOMES)]
        for target, kind in rows:
            numbers = "".join(f"{self.counts[target, kind, outcome]:>9}" for outcome in OUTCOMES)
            lines.append(f"{target:<30}{kind:<34}{numbers}")
        return "\n".join(
            [*lines, f"{sum(self.counts.values())} cases, {len(self.faults)} faults", *self.faults[:50]]
        )


def fuzz(
    cases: int, *, seed: int = 0, only: Sequence[str] = (), families: Collection[str] = FAMILIES
) -> Report:
    """Run so many cases, shared out among the targets.

    Parameters
    ----------
    cases
        Cases of all families together, a few more because each kind of file gets the same number.
    seed
        Other damage.
    only
        Targets whose names contain one of these.
    families
        The part of the targets that is run; their cases do not depend on it.
    """
    chosen, report = targets(only), Report()
    counts = share_out(chosen, cases)
    with tempfile.TemporaryDirectory(prefix="hbx_gpu-fuzz-") as folder:
        jobs = {}
        for number, target in enumerate(chosen):
            if target.family in families:
                store = Path(folder) / f"store{number}"
                target.build(store)
                jobs[target.name] = _Job(store, counts[target.name])
        while plan := [(name, str(job.store), job.next, job.last) for name, job in jobs.items() if job.left]:
            _worker(plan, seed, jobs, report)
    return report


class _Job:
    """Cases of one target, as far as they are done."""

    def __init__(self, store: Path, last: int) -> None:
        self.store, self.next, self.last = store, 0, last
        self._whole = {path: path.read_bytes() for path in store.rglob("*") if path.is_file()}

    @property
    def left(self) -> bool:
        return self.next < self.last

    def restore(self) -> None:
        """Undo the damage of a case during which the process ended."""
        for path, content in self._whole.items():
            path.write_bytes(content)


def _worker(plan: list[tuple[str, str, int, int]], seed: int, jobs: dict[str, _Job], report: Report) -> None:
    """One process, as far as it comes."""
    command = [sys.executable, "-m", "tests.fuzzing.worker", str(seed), json.dumps(plan)]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])}
    name, buffer = "", b""
    with subprocess.Popen(command, stdout=subprocess.PIPE, cwd=ROOT, env=environment) as process:
        assert process.stdout is not None
        selector = selectors.DefaultSelector()
        selector.register(process.stdout, selectors.EVENT_READ)
        outcome = "crash"
        while True:
            running = bool(name) and jobs[name].left
            if not _readable(selector, _CASE_SECONDS if running else _START_SECONDS):
                process.kill()
                outcome = "hang"
                break
            piece = os.read(process.stdout.fileno(), 1 << 16)
            if not piece:
                break
            *lines, buffer = (buffer + piece).split(b"\n")
            for line in lines:
                message = json.loads(line)
                if "target" in message:
                    name = message["target"]
                elif "done" in message:
                    report.add(name, message["done"], message)
                    jobs[name].next = message["done"] + 1
        if process.wait() == 0:
            return
    if not name or not jobs[name].left:
        raise RuntimeError(f"a store of {[entry[0] for entry in plan]} cannot be read undamaged")
    report.add(name, jobs[name].next, {"outcome": outcome, "what": f"exit status {process.returncode}"})
    jobs[name].restore()
    jobs[name].next += 1


def _readable(selector: selectors.BaseSelector, seconds: float) -> bool:
    """Whether there is something to read in time; a signal ends a wait early."""
    end = time.monotonic() + seconds
    while not (ready := selector.select(max(end - time.monotonic(), 0))) and time.monotonic() < end:
        pass
    return bool(ready)


def main() -> int:
    """Command line; see the module."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--cases", type=int, default=20_000, help="how many files are damaged in all")
    parser.add_argument("--seed", type=int, default=0, help="other damage")
    parser.add_argument("--only", action="append", default=[], help="targets whose name contains this")
    arguments = parser.parse_args()
    # Each family waits for a process of its own.
    with ThreadPoolExecutor(min(len(FAMILIES), os.cpu_count() or 1)) as pool:
        done = list(pool.map(lambda family: _family(family, arguments), FAMILIES))
    report = Report(sum((part.counts for part in done), Counter()), [f for part in done for f in part.faults])
    print(report)
    return 1 if report.faults else 0


def _family(family: str, arguments: argparse.Namespace) -> Report:
    return fuzz(arguments.cases, seed=arguments.seed, only=arguments.only, families=[family])


if __name__ == "__main__":
    sys.exit(main())
