"""The stand-in runtime as Python sees it: what of it the doubles and the tests call."""

from __future__ import annotations

import ctypes
import os
from functools import cache

LIBRARY = "HBX_REHEARSAL_RUNTIME"
"""Environment variable with the path of the stand-in; set by ``python -m tests.rehearsal`` alone."""


def rehearsing() -> bool:
    """Whether this process runs over the stand-in."""
    return LIBRARY in os.environ


@cache
def cudart() -> ctypes.CDLL:
    """The library that torch runs over: the same one, which LD_PRELOAD has loaded."""
    return ctypes.CDLL(os.environ[LIBRARY], mode=ctypes.RTLD_GLOBAL)


def counts() -> dict[str, int]:
    """What the runtime has been asked for so far."""
    five = (ctypes.c_longlong * 5)()
    cudart().standin_counts(five)
    names = ("copies", "pageable copies", "event waits", "launches", "refused launches")
    return dict(zip(names, five, strict=True))


def wait_for(stream: int) -> None:
    """Wait for a stream without torch: its checks for synchronization see nothing of it."""
    status = cudart().cudaStreamSynchronize(ctypes.c_void_p(stream))
    if status:
        raise RuntimeError(f"error {status} of the stand-in runtime: a kernel before this point has failed")
