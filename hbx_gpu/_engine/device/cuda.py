"""The CUDA backend: torch owns memory and streams, cupy compiles and launches."""

from __future__ import annotations

import threading
import weakref
from collections.abc import Sequence
from contextlib import AbstractContextManager
from typing import Any

import numpy as np

from hbx_gpu._engine.device.backend import Decompressor, DeviceBuffer, Event, Memory
from hbx_gpu._engine.device.nvcomp import NvcompDecompressor, find_library
from hbx_gpu._engine.device.sources import kernel_names, source

_HOST_TO_DEVICE, _DEVICE_TO_HOST, _DEVICE_TO_DEVICE = 1, 2, 3  # cudaMemcpyKind
_MAPPED = 3  # cudaHostAllocPortable | cudaHostAllocMapped
_STATIC_SHARED = 48 << 10  # more dynamic shared memory than this must be asked for, per kernel


class _Buffer:
    """Device memory of a slot: a torch tensor, so that one allocator sees all memory."""

    def __init__(self, tensor: Any) -> None:
        self._tensor = tensor
        self.address = int(tensor.data_ptr())
        self.nbytes = int(tensor.numel())

    def array(self, begin: int, nbytes: int) -> Any:
        return self._tensor[begin : begin + nbytes]


class _Mapped:
    """Page-locked memory of exactly the size asked for (torch's allocator rounds up to powers of two)."""

    def __init__(self, runtime: Any, nbytes: int) -> None:
        address = int(runtime.hostAlloc(nbytes, _MAPPED))
        weakref.finalize(self, runtime.freeHost, address).atexit = False  # the driver goes first
        self.on_device = int(runtime.pointerGetAttributes(address).devicePointer)
        self.__array_interface__ = {
            "version": 3,
            "data": (address, False),
            "shape": (nbytes,),
            "typestr": "|u1",
        }


class _Event:
    def __init__(self, event: Any) -> None:
        self.event = event

    def wait(self) -> None:
        self.event.synchronize()


class CudaBackend:
    """One GPU, with a copy and a decode stream of its own.

    Safe to use from several threads, as long as what must stay in order on a stream is ordered by the caller.

    Parameters
    ----------
    device
        Index of the GPU.
    """

    def __init__(self, device: int = 0) -> None:
        import cupy
        import torch

        self._cupy, self._torch = cupy, torch
        self.device = torch.device("cuda", device)
        self._gpu = cupy.cuda.Device(device)
        # torch's streams do not wait for the legacy default stream.
        self._copy = torch.cuda.Stream(self.device)
        self._decode = torch.cuda.Stream(self.device)
        # Static shared memory of a kernel comes out of the same budget as what a launch asks for.
        self.max_shared = int(self._gpu.attributes["MaxSharedMemoryPerBlockOptin"]) - (16 << 10)
        self._kernels: dict[str, Any] = {}
        self._decompressor: NvcompDecompressor | None = None
        self._lock = threading.Lock()

    def host_buffer(self, nbytes: int) -> np.ndarray:
        """See :class:`~hbx_gpu._engine.device.backend.Backend`."""
        buffer: np.ndarray = self._torch.empty(nbytes, dtype=self._torch.uint8, pin_memory=True).numpy()
        return buffer

    def mapped_buffer(self, nbytes: int) -> tuple[np.ndarray, int]:
        """See :class:`~hbx_gpu._engine.device.backend.Backend`."""
        with self._gpu:
            memory = _Mapped(self._cupy.cuda.runtime, nbytes)
        return np.asarray(memory), memory.on_device

    def free_memory(self) -> int:
        """See :class:`~hbx_gpu._engine.device.backend.Backend`."""
        return int(self._torch.cuda.mem_get_info(self.device)[0])

    def device_buffer(self, nbytes: int) -> DeviceBuffer:
        """See :class:`~hbx_gpu._engine.device.backend.Backend`."""
        return _Buffer(self.empty(nbytes, "uint8"))

    def empty(self, shape: int | tuple[int, ...], dtype: str) -> Any:
        """See :class:`~hbx_gpu._engine.device.backend.Backend`."""
        with self.on_decode_stream():
            return self._torch.empty(shape, dtype=getattr(self._torch, dtype), device=self.device)

    def upload(self, host: np.ndarray, target: Memory) -> None:
        """See :class:`~hbx_gpu._engine.device.backend.Backend`."""
        self._move(target.address, host.ctypes.data, host.nbytes, _HOST_TO_DEVICE, self._copy)
        arrived = self._torch.cuda.Event()
        arrived.record(self._copy)
        self._decode.wait_event(arrived)

    def send(self, host: np.ndarray, target: Any) -> None:
        """See :class:`~hbx_gpu._engine.device.backend.Backend`."""
        self._move(target.data_ptr(), host.ctypes.data, host.nbytes, _HOST_TO_DEVICE, self._decode)

    def download(self, address: int, target: np.ndarray) -> None:
        """See :class:`~hbx_gpu._engine.device.backend.Backend`."""
        self._move(target.ctypes.data, address, target.nbytes, _DEVICE_TO_HOST, self._decode)

    def move(self, source: int, target: int, nbytes: int) -> None:
        """See :class:`~hbx_gpu._engine.device.backend.Backend`."""
        self._move(target, source, nbytes, _DEVICE_TO_DEVICE, self._decode)

    def launch(
        self, kernel: str, grid: int | tuple[int, ...], block: int, args: Sequence[Any], shared: int = 0
    ) -> None:
        """See :class:`~hbx_gpu._engine.device.backend.Backend`."""
        function = self._function(kernel, shared)
        dims = (grid,) if isinstance(grid, int) else grid
        values = tuple(arg if isinstance(arg, np.generic) else np.uint64(arg.data_ptr()) for arg in args)
        # cupy's current device and stream belong to the thread.
        with self._gpu, self._cupy.cuda.ExternalStream(self._decode.cuda_stream, self.device.index):
            function(dims, (block,), values, shared_mem=shared)

    def decompressor(self) -> Decompressor:
        """See :class:`~hbx_gpu._engine.device.backend.Backend`: nvCOMP."""
        with self._lock:
            if self._decompressor is None:
                self._decompressor = NvcompDecompressor(
                    find_library(),
                    self.device_buffer,
                    self._decode.synchronize,
                    self._decode.cuda_stream,
                    lambda: self._gpu,
                )
            return self._decompressor

    def on_decode_stream(self) -> AbstractContextManager[Any]:
        """See :class:`~hbx_gpu._engine.device.backend.Backend`."""
        stream: AbstractContextManager[Any] = self._torch.cuda.stream(self._decode)
        return stream

    def event(self) -> Event:
        """See :class:`~hbx_gpu._engine.device.backend.Backend`."""
        event = self._torch.cuda.Event()
        event.record(self._decode)
        return _Event(event)

    def hand_over(self, event: Event, tensors: Sequence[Any]) -> None:
        """See :class:`~hbx_gpu._engine.device.backend.Backend`."""
        assert isinstance(event, _Event)
        current = self._torch.cuda.current_stream(self.device)
        current.wait_event(event.event)
        for tensor in tensors:
            tensor.record_stream(current)

    def warm_up(self) -> None:
        """Compile every kernel now (cupy keeps the result on disk) instead of at its first launch."""
        for kernel in kernel_names():
            self._function(kernel, 0)

    def _function(self, kernel: str, shared: int) -> Any:
        with self._lock:
            function = self._kernels.get(kernel)
            if function is None:
                with self._gpu:
                    # Flattened text: cupy's cache would not notice a changed include.
                    module = self._cupy.RawModule(
                        code=source(kernel_names()[kernel]), options=("--std=c++17",), backend="nvrtc"
                    )
                    names = [name for name, file in kernel_names().items() if file == kernel_names()[kernel]]
                    self._kernels.update({name: module.get_function(name) for name in names})
                function = self._kernels[kernel]
            if shared > _STATIC_SHARED and function.max_dynamic_shared_size_bytes < shared:
                function.max_dynamic_shared_size_bytes = shared
            return function

    def _move(self, target: int, origin: int, nbytes: int, kind: int, stream: Any) -> None:
        if nbytes:
            with self._gpu:
                self._cupy.cuda.runtime.memcpyAsync(target, origin, nbytes, kind, stream.cuda_stream)
