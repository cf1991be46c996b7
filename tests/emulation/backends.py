"""The backends that tests of loaders run on: two emulated ones, and a GPU where there is one."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from tests.emulation.backend import EmulatedBackend
from tests.emulation.streams import StreamBackend
from tests.kernels.conftest import on_gpu

if TYPE_CHECKING:
    from hbx_gpu._engine.device.backend import Backend

BACKENDS = ["emulated", "streams", pytest.param("cuda", marks=pytest.mark.gpu)]


def backend_named(name: str) -> Backend:
    """The backend of one of `BACKENDS`; skips where there is no GPU."""
    if name == "emulated":
        return EmulatedBackend()
    if name == "streams":
        return StreamBackend(delay=0.001)
    on_gpu()
    from hbx_gpu._engine.device.cuda import CudaBackend

    return CudaBackend(0)
