"""Tasks on any executor: handed out a bounded number at a time, and taken back in order."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import BrokenExecutor, CancelledError, Executor, Future
from typing import ParamSpec, TypeVar

from hbx_gpu.errors import ResourceError

P = ParamSpec("P")
T = TypeVar("T")
R = TypeVar("R")

# Tasks that are handed out before the first of them is back; enough for a cluster of hundreds of cores.
_WINDOW = 512


class Here(Executor):
    """Runs tasks at once, in the thread that submits them."""

    def submit(self, fn: Callable[P, R], /, *args: P.args, **kwargs: P.kwargs) -> Future[R]:
        """See ``concurrent.futures.Executor``."""
        future: Future[R] = Future()
        try:
            future.set_result(fn(*args, **kwargs))
        except Exception as error:
            future.set_exception(error)
        return future


def in_turn(
    executor: Executor,
    function: Callable[..., R],
    tasks: Iterable[tuple[T, tuple[object, ...] | Future[R]]],
    *,
    window: int = _WINDOW,
) -> Iterator[tuple[T, Future[R]]]:
    """Hand out tasks and give their futures in order; those that are not asked for are canceled at the end.

    Parameters
    ----------
    executor
        Where they run.
    function
        What they call.
    tasks
        A key, and the arguments of the function or, where nothing has to run, a future that is done.
    window
        Most tasks that are handed out at a time; an executor that runs them at once gets one.
    """
    window = 1 if isinstance(executor, Here) else window
    waiting: deque[tuple[T, Future[R]]] = deque()
    try:
        for key, task in tasks:
            waiting.append((key, task if isinstance(task, Future) else handed_out(executor, function, task)))
            if len(waiting) >= window:
                yield waiting.popleft()
        while waiting:
            yield waiting.popleft()
    finally:
        for _, future in waiting:
            future.cancel()


def handed_out(executor: Executor, function: Callable[..., R], arguments: tuple[object, ...]) -> Future[R]:
    """The future of a task; an executor whose workers are gone gives one that says so."""
    try:
        return executor.submit(function, *arguments)
    except BrokenExecutor as error:
        future: Future[R] = Future()
        future.set_exception(error)
        return future


def result_of(future: Future[R], source: str, *, goes_on: bool = True) -> R:
    """The result of a task.

    Parameters
    ----------
    future
        From :func:`in_turn` or :func:`handed_out`.
    source
        What the task works on, for the message.
    goes_on
        Whether the same call, made again, goes on from where this one ended.

    Raises
    ------
    ResourceError
        The process, or the cluster, that worked on it is gone.
    """
    try:
        return future.result()
    except (BrokenExecutor, CancelledError) as error:
        raise _gone(source, error, goes_on) from error
    except Exception as error:
        if type(error).__module__.partition(".")[0] == "distributed":
            raise _gone(source, error, goes_on) from error
        raise


def _gone(source: str, error: BaseException, goes_on: bool) -> ResourceError:
    remedy = (
        "What was finished before it is whole, and the rest was not begun: run the same again, and it goes "
        "on from there"
        if goes_on
        else "Nothing was changed: run the same again"
    )
    return ResourceError(
        f"{source}: the process that worked on it is gone ({type(error).__name__}: {error}); it was killed, "
        f"or there was too little memory. {remedy}"
    )
