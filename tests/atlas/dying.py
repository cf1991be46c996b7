"""A process that kills itself in the middle of its work, for the crash tests."""

from __future__ import annotations

import multiprocessing
import os
import pkgutil
import signal
from collections.abc import Callable
from typing import Any, ParamSpec

P = ParamSpec("P")


def die_at(where: str, when: str, n: int) -> None:
    """Replace a function by one that kills this process at its n-th call, before or after it.

    Parameters
    ----------
    where
        ``module:name`` or ``module:class.name``, below ``hbx_gpu``.
    when, n
        ``before`` or ``after`` the n-th call.
    """
    module, _, names = where.partition(":")
    owner_name, _, name = names.rpartition(".")
    owner = pkgutil.resolve_name(f"hbx_gpu.{module}:{owner_name}" if owner_name else f"hbx_gpu.{module}")
    real, left = getattr(owner, name), n

    def dying(*args: Any, **kwargs: Any) -> Any:
        nonlocal left
        left -= 1
        if not left and when == "before":
            os.kill(os.getpid(), signal.SIGKILL)
        result = real(*args, **kwargs)
        if not left:
            os.kill(os.getpid(), signal.SIGKILL)
        return result

    setattr(owner, name, dying)


def killed(run: Callable[P, object], *args: P.args, **kwargs: P.kwargs) -> None:
    """Run something that kills its process in a fork of one that has everything imported.

    What that is stands in ``tests/spawning.py``.

    Parameters
    ----------
    run
        The work, a function of a module; it calls :func:`die_at`.
    *args, **kwargs
        What it is called with.
    """
    context = multiprocessing.get_context("forkserver")
    process = context.Process(target=run, args=args, kwargs=kwargs)
    process.start()
    process.join(240)
    if process.is_alive():
        process.kill()
        raise AssertionError("the work did not end")
    assert process.exitcode == -signal.SIGKILL
