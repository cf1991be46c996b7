"""A forked program is what a new interpreter would be: its end, its streams, its place among processes."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import psutil
import pytest

from tests import fresh

SAID = """
import os, sys, threading
print([*sys.argv, os.getcwd(), os.environ["MINE"], __name__, threading.active_count(), sys.stdin.readline()])
print("a note", file=sys.stderr)
print("hbx_gpu.dataloader" in sys.modules)
"""


def test_arguments_environment_folder_and_streams(tmp_path: Path) -> None:
    with fresh.popen(
        [sys.executable, "-c", SAID, "a", tmp_path],
        cwd=tmp_path,
        env={"MINE": "yes"},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    ) as process:
        assert psutil.Process(process.pid).ppid() == os.getpid()
        out, err = process.communicate("given\n")
    said = ["-c", "a", str(tmp_path), str(tmp_path), "yes", "__main__", 1, "given\n"]
    assert (process.returncode, out, err) == (0, f"{said}\nTrue\n", "a note\n")


@pytest.mark.parametrize(
    ("code", "status", "message"),
    [
        ("import sys; sys.exit(3)", 3, ""),
        ("raise KeyError('x')", 1, "KeyError: 'x'\n"),
        ("raise KeyboardInterrupt", -signal.SIGINT, "KeyboardInterrupt\n"),
        ("import os, signal; os.kill(os.getpid(), signal.SIGKILL)", -signal.SIGKILL, ""),
        # What an interpreter does at its end: it waits for threads, calls handlers, and frees modules.
        ("import atexit, sys; atexit.register(lambda: print('end', file=sys.stderr))", 0, "end\n"),
        ("import threading, time; threading.Timer(0.1, lambda: print('x')).start()", 0, ""),
    ],
)
def test_the_end(code: str, status: int, message: str) -> None:
    done = fresh.run([sys.executable, "-c", code])
    assert done.returncode == status
    assert done.stderr.endswith(message)
    assert bool(done.stderr) == bool(message)
    assert done.stdout == ("x\n" if "Timer" in code else "")


def test_modules_and_files_and_what_goes_wrong(tmp_path: Path) -> None:
    (tmp_path / "beside.py").write_text("name = 'beside'")
    (tmp_path / "program.py").write_text("import beside, sys; print(beside.name, sys.argv[1], __name__)")
    done = fresh.run([sys.executable, tmp_path / "program.py", "x"], check=True)
    assert done.stdout == "beside x __main__\n"
    done = fresh.run([sys.executable, "-m", "program", "y"], cwd=tmp_path, check=True)
    assert done.stdout == "beside y __main__\n"
    with pytest.raises(subprocess.CalledProcessError):
        fresh.run([sys.executable, tmp_path / "missing.py"], check=True)
    with pytest.raises(subprocess.TimeoutExpired):
        fresh.run([sys.executable, "-c", "import time; time.sleep(60)"], timeout=0.1)


def test_a_process_that_is_told_to_end() -> None:
    command = [sys.executable, "-c", "import time; print(flush=True); time.sleep(60)"]
    with fresh.popen(command, stdout=subprocess.PIPE, start_new_session=True) as process:
        assert process.stdout is not None
        process.stdout.readline()
        assert os.getsid(process.pid) == process.pid
        process.send_signal(signal.SIGTERM)
        assert process.wait(timeout=30) == -signal.SIGTERM
