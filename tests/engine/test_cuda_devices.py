"""The CUDA backend on another device than the first: everything it does finds that device current."""

from __future__ import annotations

import gc
import sys
import weakref
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest

from hbx_gpu import _streams
from hbx_gpu._engine.device.cuda import CudaBackend
from tests.emulation.cuda_double import Devices


@pytest.fixture
def devices(monkeypatch: pytest.MonkeyPatch) -> Devices:
    found = Devices(2)
    monkeypatch.setitem(sys.modules, "cupy", found.cupy())
    monkeypatch.setitem(sys.modules, "torch", found.torch())
    monkeypatch.setattr(_streams, "_STREAMS", {})
    return found


def use(backend: CudaBackend) -> None:
    """What the threads of a loader ask of a backend."""
    host, device = backend.host_buffer(1 << 16), backend.device_buffer(1 << 16)
    backend.upload(host, device)
    backend.launch("rowpack_dense_f32", 1, 256, (np.uint64(device.address),), 4 * 20_000)
    backend.download(device.address, host)
    backend.event().wait()
    mapped, _ = backend.mapped_buffer(1 << 16)
    mapped[:] = 1


@pytest.mark.parametrize("device", [0, 1])
def test_wide_panels_on_every_device_and_from_pool_threads(devices: Devices, device: int) -> None:
    """20,000 genes take more shared memory than a kernel has without asking: asked for on its own device."""
    backend = CudaBackend(device)
    with ThreadPoolExecutor(2) as pool:
        for _ in [*pool.map(use, [backend] * 4)]:
            pass
    use(backend)
    assert devices.launches == [(device, "rowpack_dense_f32", 80_000)] * 5


def test_no_context_lands_on_another_device(devices: Devices) -> None:
    backend = CudaBackend(1)
    with ThreadPoolExecutor(2) as pool:
        for _ in [*pool.map(use, [backend] * 4)]:
            pass
    backend.warm_up()
    gc.collect()
    assert devices.contexts == {1}


def test_two_devices_of_one_process(devices: Devices) -> None:
    backends = [CudaBackend(0), CudaBackend(1)]
    with ThreadPoolExecutor(3) as pool:
        for _ in [*pool.map(use, backends * 6)]:
            pass
    assert sorted(device for device, _, _ in devices.launches) == [0] * 6 + [1] * 6


def test_epochs_and_loaders_take_no_streams_of_others(devices: Devices) -> None:
    """torch has 32 streams per device: whoever takes one for each epoch soon has that of the decoder."""
    for _ in range(40):
        CudaBackend(0)
        found = {purpose: _streams.own_stream(0, purpose) for purpose in ("copy", "dali", "images")}
    assert len({stream.cuda_stream for stream in found.values()}) == 3
    assert sum(devices.streams.values()) == 4
    for _ in range(31):  # others take the rest of the pool
        sys.modules["torch"].cuda.Stream(sys.modules["torch"].device("cuda", 0))
    late = _streams.own_stream(0, "late")
    assert late.cuda_stream not in {stream.cuda_stream for stream in found.values()}


class Output:
    """Stands for a tensor in memory of DALI."""


def test_outputs_of_other_libraries_outlive_the_kernels_that_read_them(devices: Devices) -> None:
    backend = CudaBackend(0)
    output = Output()
    alive = weakref.ref(output)
    devices.busy = True
    backend.hand_over(backend.event(), [], [output])
    del output
    backend.hand_over(backend.event(), [])
    assert alive() is not None
    devices.busy = False
    backend.hand_over(backend.event(), [])
    assert alive() is None
