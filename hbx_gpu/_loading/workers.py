"""Explain errors at the start of worker processes."""

from __future__ import annotations

import multiprocessing.process
from collections.abc import Iterator
from contextlib import contextmanager

_GUARD = (
    "worker processes are started by running the script again, up to what "
    '`if __name__ == "__main__":` guards. Put the training loop into a function, call it under that guard, '
    "or use num_workers=0 (the default), where threads read ahead"
)


def refuse_in_workers() -> None:
    """Refuse to start workers while this process, a worker itself, is still importing the script.

    Raises
    ------
    RuntimeError
        The script lacks a guard, which the message names.
    """
    # multiprocessing makes the same check, with a longer message.
    if getattr(multiprocessing.process.current_process(), "_inheriting", False):
        raise RuntimeError(f"this script starts worker processes without a __main__ guard: {_GUARD}")


@contextmanager
def explained() -> Iterator[None]:
    """Add likely reasons to the error of a worker that died."""
    try:
        yield
    except (RuntimeError, BrokenPipeError, EOFError) as error:
        if isinstance(error, RuntimeError) and "exited unexpectedly" not in str(error):
            raise
        raise RuntimeError(
            f"a worker process ended before it gave a batch ({error}). If its own message above names "
            f"__main__: {_GUARD}. Otherwise it was killed, most often for want of memory: fewer workers, or "
            "num_workers=0, take less"
        ) from error
