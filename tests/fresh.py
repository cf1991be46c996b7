"""Python programs that tests start are forks of one process that has everything imported.

A new interpreter imports torch, pandas and the library once more, for three seconds of processor time. A fork
of a process that has done so is as fresh: it has one thread, its own arguments, environment, folder and
files, runs the program as ``__main__``, and ends as any interpreter does, by itself or by a signal. It is a
child of the process that asks for it, as with `subprocess`. A test about imports, hash seeds or warnings
takes that.

Started as a module, this file is the process that forks: ``python -m tests.fresh SOCKET``.
"""

from __future__ import annotations

import atexit
import contextlib
import ctypes
import gc
import importlib
import json
import os
import runpy
import signal
import socket
import subprocess
import sys
import types
from collections.abc import Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import IO

ROOT = Path(__file__).resolve().parents[1]
_PRELOADED = [
    "anndata",
    "torch.distributed",
    "torch.utils.data",
    "hbx_gpu.dataloader",
    "hbx_gpu.scdl",
    "hbx_gpu.testing",
    # What LanceDB imports. It has a thread of its own once it is imported, which a fork would lose.
    "pyarrow.dataset",
    "pydantic",
    "zarr",
    # Processes of one run of the tests compile a kernel once.
    "tests.side_by_side",
]
_MOST_BYTES = 1 << 17
_PR_SET_CHILD_SUBREAPER = 36
Stream = int | IO[str] | None


def run(
    command: Sequence[object],
    *,
    cwd: Path | None = None,
    env: Mapping[str, str] | None = None,
    timeout: float | None = None,
    check: bool = False,
) -> subprocess.CompletedProcess[str]:
    """Run a program to its end; what it prints is captured. See `popen`.

    Raises
    ------
    subprocess.TimeoutExpired
        It ran for longer than `timeout` seconds, and was killed.
    subprocess.CalledProcessError
        `check` is set and it failed.
    """
    with popen(command, cwd=cwd, env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        try:
            out, err = process.communicate(timeout=timeout)
        except BaseException:
            process.kill()
            raise
    done = subprocess.CompletedProcess([*map(str, command)], process.returncode, out, err)
    if check:
        done.check_returncode()
    return done


def popen(
    command: Sequence[object],
    *,
    cwd: Path | None = None,
    env: Mapping[str, str] | None = None,
    stdin: Stream = None,
    stdout: Stream = None,
    stderr: Stream = None,
    start_new_session: bool = False,
) -> subprocess.Popen[str]:
    """Start a program, as `subprocess.Popen` with ``text=True`` does.

    Parameters
    ----------
    command
        ``[sys.executable, "-c", code, ...]``, ``[sys.executable, "-m", module, ...]``, or the path of a file
        in their place.
    cwd, env, stdin, stdout, stderr, start_new_session
        As for `subprocess.Popen`.
    """
    kind = _Forked if sys.platform == "linux" else subprocess.Popen[str]
    return kind(
        [*map(str, command)],
        cwd=cwd,
        env=env,
        stdin=stdin,
        stdout=stdout,
        stderr=stderr,
        start_new_session=start_new_session,
        text=True,
    )


def free_port() -> int:
    """A port of this machine that nobody listens on, for processes that meet there."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        number: int = free.getsockname()[1]
        return number


class _Forked(subprocess.Popen[str]):
    """A process that the server started in our name."""

    def _execute_child(self, args, executable, preexec_fn, close_fds, pass_fds, cwd, env, *others):  # type: ignore[no-untyped-def] # noqa: ARG002
        *_, p2cread, p2cwrite, c2pread, c2pwrite, errread, errwrite = others[:9]
        own = [p2cread, c2pwrite, errwrite]
        streams = [number if stream == -1 else stream for number, stream in enumerate(own)]
        request = {
            "command": list(args)[1:],
            "cwd": os.fspath(cwd or Path.cwd()),
            "env": dict(os.environ if env is None else env),
            "session": bool(others[-2]),
        }
        self.pid = _server().start(request, streams)
        self._child_created = True
        self._close_pipe_fds(p2cread, p2cwrite, c2pread, c2pwrite, errread, errwrite)  # type: ignore[attr-defined]


class _Server:
    """The process that forks, and the way to it."""

    def __init__(self) -> None:
        self._socket, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        with theirs:
            # It ends when this socket is closed, with this process at the latest.
            self._process = subprocess.Popen(
                [sys.executable, "-m", "tests.fresh", str(theirs.fileno())],
                cwd=ROOT,
                pass_fds=[theirs.fileno()],
                env={**os.environ, "PYTHONPATH": "", "OMP_NUM_THREADS": "1"},
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
            )

    def start(self, request: Mapping[str, object], streams: Sequence[int]) -> int:
        """Process id of a fork that does what is asked, a child of this process."""
        # The parent of the fork ends at once, and an orphan goes to the next reaper above it: this process.
        _reap_orphans(True)
        try:
            socket.send_fds(self._socket, [json.dumps(request).encode()], streams)
            answer = self._socket.recv(100)
        finally:
            _reap_orphans(False)
        if not answer:
            raise RuntimeError(f"the process that forks ended with status {self._process.wait()}")
        return int(answer)

    def close(self) -> None:
        """Let it end, and wait until it has."""
        self._socket.close()
        self._process.wait()


@cache
def _server() -> _Server:
    server = _Server()
    atexit.register(server.close)
    return server


def _reap_orphans(on: bool) -> None:
    """Whether orphans below this process become its children; Linux only."""
    if ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_CHILD_SUBREAPER, int(on), 0, 0, 0):
        raise OSError(ctypes.get_errno(), "prctl(PR_SET_CHILD_SUBREAPER)")


def _next_request(way: socket.socket) -> dict[str, object]:
    """Fork for each request; returns in the forks only."""
    while True:
        message, streams, _, _ = socket.recv_fds(way, _MOST_BYTES, 3)
        if not message:
            os._exit(0)
        reading, writing = os.pipe()
        between = os.fork()
        if between == 0:
            child = os.fork()
            if child:
                os.write(writing, str(child).encode())
                os._exit(0)
            way.close()
            os.close(reading)
            os.close(writing)
            for number, stream in enumerate(streams):
                os.dup2(stream, number)
                os.close(stream)
            request: dict[str, object] = json.loads(message)
            return request
        os.close(writing)
        pid = os.read(reading, 100)
        os.close(reading)
        for stream in streams:
            os.close(stream)
        os.waitpid(between, 0)
        way.send(pid)


def _become(request: dict[str, object]) -> None:
    """Run the program, as ``python`` with its arguments does."""
    if request["session"]:
        os.setsid()
    signal.signal(signal.SIGINT, signal.default_int_handler)
    os.chdir(str(request["cwd"]))
    environment, command = request["env"], request["command"]
    assert isinstance(environment, dict)
    assert isinstance(command, list)
    os.environ.clear()
    os.environ.update(environment)
    program, *arguments = command
    paths = [path for path in environment.get("PYTHONPATH", "").split(os.pathsep) if path]
    first = {"-c": "", "-m": os.getcwd()}.get(program, str(Path(program).resolve().parent))
    sys.path[:1] = [first, *paths]
    if program == "-c":
        sys.argv = ["-c", *arguments[1:]]
        main = types.ModuleType("__main__")
        sys.modules["__main__"] = main
        exec(compile(arguments[0], "<string>", "exec"), main.__dict__)
    elif program == "-m":
        sys.argv = arguments
        runpy.run_module(arguments[0], run_name="__main__", alter_sys=True)
    else:
        sys.argv = [program, *arguments]
        runpy.run_path(program, run_name="__main__")


if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # for the programs, and for whoever asked for them
    for name in _PRELOADED:
        with contextlib.suppress(ImportError):  # an environment without torch
            importlib.import_module(name)
    gc.collect()
    gc.freeze()
    _become(_next_request(socket.socket(fileno=int(sys.argv[1]))))
