"""Executors whose workers behave as those of engines sometimes do."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import BrokenExecutor, Executor, Future
from typing import ParamSpec, TypeVar

P = ParamSpec("P")
R = TypeVar("R")


class Twice(Executor):
    """Runs each task twice, as engines do that take a slow worker for a dead one."""

    def submit(self, fn: Callable[P, R], /, *args: P.args, **kwargs: P.kwargs) -> Future[R]:
        future: Future[R] = Future()
        try:
            fn(*args, **kwargs)
            future.set_result(fn(*args, **kwargs))
        except Exception as error:
            future.set_exception(error)
        return future


class LostWorkers(Executor):
    """Has lost its workers: says so when it is given a task (`at_once`), or when it is asked for a result."""

    def __init__(self, at_once: bool) -> None:
        self.at_once = at_once

    def submit(self, *_: object, **__: object) -> Future[object]:  # type: ignore[override]
        if self.at_once:
            raise BrokenExecutor("killed")
        future: Future[object] = Future()
        future.set_exception(BrokenExecutor("killed"))
        return future
