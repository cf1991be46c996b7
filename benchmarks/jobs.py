"""A measurement in a process of its own, under any interpreter: needs Python 3.10 and nothing else."""

from __future__ import annotations

import contextlib
import importlib
import json
import os
import resource
import subprocess
import sys
from pathlib import Path
from typing import Any

_LAST_WORDS = 4_000  # characters of stderr that an error repeats


def in_process(function: str, job: dict[str, Any], *, python: str = sys.executable) -> dict[str, Any]:
    """What ``function(**job)`` returns in a new process.

    A process of its own per measurement: its peak memory is that of the one thing measured, and no cache of
    an earlier measurement helps it.

    Parameters
    ----------
    function
        ``module:name``; arguments and result are plain values for JSON.
    python
        Interpreter.

    Raises
    ------
    RuntimeError
        The process failed; the message holds the end of what it wrote.
    """
    root = str(Path(__file__).parents[1])
    # Another interpreter gets no packages that were meant for this one.
    own = os.environ.get("PYTHONPATH", "") if python == sys.executable else ""
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, (root, own)))}
    command = [python, "-m", "benchmarks.jobs", function, json.dumps(job)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"{function} failed on {job}:\n{(done.stderr or done.stdout)[-_LAST_WORDS:]}")
    result: dict[str, Any] = json.loads(done.stdout.strip().splitlines()[-1])
    return result


def answer(function: str, job: str) -> None:
    """Call ``module:name`` with the arguments of a JSON object, and print its result as the last line."""
    module, _, name = function.partition(":")
    with contextlib.redirect_stdout(sys.stderr):
        result = getattr(importlib.import_module(module), name)(**json.loads(job))
    print(json.dumps(result))
    sys.stdout.flush()
    sys.stderr.flush()
    # Daemon threads of whatever was measured may not turn a good answer into a crash on the way out.
    os._exit(0)


def peak_rss() -> int:
    """Peak resident bytes of this process so far, pages of memory maps included."""
    status = Path("/proc/self/status")
    if status.exists():
        # Not ru_maxrss: on Linux that begins with the peak of the process that started this one.
        line = next(line for line in status.read_text().splitlines() if line.startswith("VmHWM:"))
        return int(line.split()[1]) * 1024
    kib = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return kib if sys.platform == "darwin" else kib * 1024


if __name__ == "__main__":
    answer(*sys.argv[1:])
