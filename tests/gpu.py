"""Whether tests can run on a GPU here."""

from __future__ import annotations

import importlib.util
from functools import cache
from pathlib import Path


@cache
def gpu_missing() -> str:
    """Why kernels cannot run on a GPU here; empty if they can."""
    # The device files of the driver on Linux and under Windows: a look that does not cost an import of cupy.
    if not any(Path(device).exists() for device in ("/dev/nvidiactl", "/dev/dxg")):
        return "there is no NVIDIA driver"
    if importlib.util.find_spec("cupy") is None:
        return "cupy is not installed (the extra hbx_gpu[gpu] has it)"
    import cupy

    try:
        count = cupy.cuda.runtime.getDeviceCount()
    except (cupy.cuda.runtime.CUDARuntimeError, ImportError, OSError) as error:
        return f"cupy finds no GPU: {error}"
    return "" if count else "cupy finds no GPU"
