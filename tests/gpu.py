"""Whether tests can run on a GPU here."""

from __future__ import annotations

import importlib.util
import os
from functools import cache


@cache
def gpu_missing() -> str:
    """Why kernels cannot run on a GPU here; empty if they can."""
    if importlib.util.find_spec("cupy") is None:
        return "cupy is not installed (the extra hbx_gpu[gpu] has it)"
    import cupy

    try:
        count = cupy.cuda.runtime.getDeviceCount()
    except (cupy.cuda.runtime.CUDARuntimeError, ImportError, OSError) as error:
        return f"cupy finds no GPU: {error}"
    return "" if count else "cupy finds no GPU"


def allocate_plainly() -> None:
    """Let cupy and torch ask CUDA for every block, so that compute-sanitizer knows where blocks end.

    Their pools cut blocks out of larger ones, and what is written beyond a block is inside the larger one.
    Before the first allocation of either.
    """
    os.environ["PYTORCH_NO_CUDA_MEMORY_CACHING"] = "1"
    if importlib.util.find_spec("cupy") is not None:
        import cupy

        cupy.cuda.set_allocator(None)
        cupy.cuda.set_pinned_memory_allocator(None)
