"""The options ``--workers`` and ``--dask``: where a command lets files be read and packed."""

from __future__ import annotations

import argparse
import contextlib
import os
import signal
import threading
from collections.abc import Iterator
from concurrent.futures import Executor

from hbx_gpu.errors import UnsupportedError

# How much work makes another process worth its start, which takes about two seconds.
_BYTES_PER_WORKER, _TASKS_PER_WORKER = 64 << 20, 64
# How long a Dask scheduler may take to answer.
_DASK_SECONDS = 10.0


def add_executor_options(
    parser: argparse.ArgumentParser,
    work: str = "read and pack",
    default: str = "by default as many as this process has cores, and fewer where there is little to do",
) -> None:
    """Add the options to the parser of a command.

    Parameters
    ----------
    parser
        That of the command.
    work
        What the workers do, for the help.
    default
        What happens without the options, for the help.
    """
    group = parser.add_mutually_exclusive_group()
    group.add_argument(
        "--workers",
        type=positive,
        metavar="N",
        help=f"processes that {work}; {default}",
    )
    group.add_argument(
        "--dask",
        metavar="ADDRESS",
        help=f"let the workers of a Dask cluster {work}: tcp://HOST:8786. They need the same paths as this "
        "process",
    )


def positive(text: str) -> int:
    """A whole number of at least 1, for ``type=`` of argparse."""
    if not text.isdigit() or not int(text):
        raise argparse.ArgumentTypeError(f"expected a whole number of at least 1, got {text!r}")
    return int(text)


@contextlib.contextmanager
def chosen_executor(args: argparse.Namespace, n_tasks: int, n_bytes: int) -> Iterator[Executor | None]:
    """The executor that the options ask for; None where this process does the work itself.

    Parameters
    ----------
    args
        Parsed options.
    n_tasks, n_bytes
        How much there is to do: at most as many processes are started as there are tasks.

    Raises
    ------
    UnsupportedError
        Dask is not installed, or nothing answers at the address.
    """
    if args.dask is not None:
        with _dask(args.dask) as executor:
            yield executor
        return
    from hbx_gpu._devices import cores

    worth = max(n_bytes // _BYTES_PER_WORKER, n_tasks // _TASKS_PER_WORKER)
    wanted = args.workers if args.workers is not None else min(cores(), worth)
    if (n := min(wanted, n_tasks)) <= 1:
        yield None
        return
    from concurrent.futures import ProcessPoolExecutor
    from multiprocessing import get_context

    # Not forked: threads of the database would be missing, and a lock held here would outlive this process.
    pool = ProcessPoolExecutor(n, mp_context=get_context("spawn"), initializer=_follow_parent)
    try:
        yield pool
    except BaseException:
        pool.shutdown(wait=False, cancel_futures=True)
        raise
    pool.shutdown()


def add_threads_or_workers(parser: argparse.ArgumentParser, work: str) -> None:
    """Add the options of a command whose work threads of its own process do by default.

    Parameters
    ----------
    parser
        That of the command.
    work
        What they do, for the help.
    """
    parser.add_argument("--threads", type=int, metavar="N", help="by default the cores of this process")
    add_executor_options(parser, work, "by default threads of this process do, see --threads")


def check_threads(args: argparse.Namespace) -> None:
    """Refuse what `add_threads_or_workers` cannot refuse by itself.

    Raises
    ------
    ValueError
        The number of threads is not positive, or workers are asked for too.
    """
    if args.threads is not None and args.threads < 1:
        raise ValueError(f"--threads must be at least 1, got {args.threads}")
    if args.threads is not None and (args.workers is not None or args.dask is not None):
        raise ValueError("--threads is for this process; leave it out with --workers or --dask")


@contextlib.contextmanager
def workers(args: argparse.Namespace) -> Iterator[Executor | None]:
    """The workers that are asked for; None where threads of this process do the work.

    Raises
    ------
    UnsupportedError
        Dask is not installed, or nothing answers at the address.
    """
    if args.workers is None and args.dask is None:
        yield None
        return
    with chosen_executor(args, args.workers or 1, 0) as executor:
        yield executor


def _follow_parent() -> None:
    """End with the process that started this one, however that ends; leave Ctrl-C to it."""
    from multiprocessing import parent_process

    signal.signal(signal.SIGINT, signal.SIG_IGN)
    parent = parent_process()
    assert parent is not None

    def wait() -> None:
        parent.join()
        os._exit(1)

    threading.Thread(target=wait, daemon=True).start()


@contextlib.contextmanager
def _dask(address: str) -> Iterator[Executor]:
    try:
        from distributed import Client
    except ImportError as error:
        raise UnsupportedError("--dask needs Dask: pip install 'hbx_gpu[dask]'") from error
    try:
        client = Client(address, timeout=_DASK_SECONDS)
    except (OSError, ValueError) as error:
        raise UnsupportedError(
            f"--dask {address}: no Dask scheduler answers there ({error}); start one with dask scheduler, "
            "which says its address"
        ) from error
    with client:
        yield client.get_executor()
