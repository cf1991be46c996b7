"""The CUDA backend: torch owns memory and streams, cupy compiles and launches."""

from __future__ import annotations

import contextlib
import threading
import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from typing import TYPE_CHECKING, Protocol

import numpy as np

from hbx_gpu._engine.device.backend import Argument, Decompressor, DeviceBuffer, Event, Memory
from hbx_gpu._engine.device.nvcomp import NvcompDecompressor, find_library
from hbx_gpu._engine.device.sources import kernel_names, source
from hbx_gpu._streams import Held, own_stream

if TYPE_CHECKING:
    import torch
    from torch import Tensor

_HOST_TO_DEVICE, _DEVICE_TO_HOST, _DEVICE_TO_DEVICE = 1, 2, 3  # cudaMemcpyKind
_MAPPED = 3  # cudaHostAllocPortable | cudaHostAllocMapped
_STATIC_SHARED = 48 << 10  # more dynamic shared memory than this must be asked for, per kernel


class _Buffer:
    """Device memory of a slot: a torch tensor, so that one allocator sees all memory."""

    def __init__(self, tensor: Tensor) -> None:
        self._tensor = tensor
        self.address = int(tensor.data_ptr())
        self.nbytes = int(tensor.numel())

    def array(self, begin: int, nbytes: int) -> Tensor:
        return self._tensor[begin : begin + nbytes]


class _Pointer(Protocol):
    devicePointer: int  # cupy's name


class _Runtime(Protocol):
    """What page-locked memory takes of ``cupy.cuda.runtime``."""

    def hostAlloc(self, size: int, flags: int, /) -> int: ...

    def freeHost(self, address: int, /) -> None: ...

    def pointerGetAttributes(self, address: int, /) -> _Pointer: ...


class _Kernel(Protocol):
    """A compiled kernel, as cupy returns it."""

    max_dynamic_shared_size_bytes: int

    def __call__(
        self,
        grid: tuple[int, ...],
        block: tuple[int, ...],
        args: tuple[np.generic, ...],
        /,
        *,
        shared_mem: int,
    ) -> None: ...


class _Mapped:
    """Page-locked memory of exactly the size asked for (torch's allocator rounds up to powers of two)."""

    def __init__(
        self, runtime: _Runtime, nbytes: int, on_device: Callable[[], AbstractContextManager[object]]
    ) -> None:
        def free(address: int) -> None:
            with on_device():
                runtime.freeHost(address)

        address = int(runtime.hostAlloc(nbytes, _MAPPED))
        weakref.finalize(self, free, address).atexit = False  # the driver goes first
        self.on_device = int(runtime.pointerGetAttributes(address).devicePointer)
        self.__array_interface__ = {
            "version": 3,
            "data": (address, False),
            "shape": (nbytes,),
            "typestr": "|u1",
        }


class _Event:
    def __init__(self, event: torch.cuda.Event) -> None:
        self.event = event

    def wait(self) -> None:
        self.event.synchronize()


class _Handle:
    """A stream as the CUDA stream protocol of Python libraries has it, which not every torch knows yet."""

    def __init__(self, address: int) -> None:
        self._address = address

    def __cuda_stream__(self) -> tuple[int, int]:
        return 0, self._address


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
        # Page-locked memory is made in whatever context there is; without one it would make one on device 0.
        with self._on_device():
            torch.empty(1, dtype=torch.uint8, device=self.device)
        # torch's streams do not wait for the legacy default stream.
        self._copy = own_stream(device, "copy")
        self._decode = own_stream(device, "decode", urgent=True)
        # Static shared memory of a kernel comes out of the same budget as what a launch asks for.
        self.max_shared = int(self._gpu.attributes["MaxSharedMemoryPerBlockOptin"]) - (16 << 10)
        self._kernels: dict[str, _Kernel] = {}
        self._decompressor: NvcompDecompressor | None = None
        self._lock = threading.Lock()
        self._held = Held()

    def host_buffer(self, nbytes: int) -> np.ndarray:
        """See :class:`~hbx_gpu._engine.device.backend.Backend`."""
        buffer: np.ndarray = self._torch.empty(nbytes, dtype=self._torch.uint8, pin_memory=True).numpy()
        return buffer

    def mapped_buffer(self, nbytes: int) -> tuple[np.ndarray, int]:
        """See :class:`~hbx_gpu._engine.device.backend.Backend`."""
        with self._on_device():
            memory = _Mapped(self._cupy.cuda.runtime, nbytes, self._on_device)
        return np.asarray(memory), memory.on_device

    def free_memory(self) -> int:
        """See :class:`~hbx_gpu._engine.device.backend.Backend`."""
        return int(self._torch.cuda.mem_get_info(self.device)[0])

    def device_buffer(self, nbytes: int) -> DeviceBuffer:
        """See :class:`~hbx_gpu._engine.device.backend.Backend`."""
        return _Buffer(self.empty(nbytes, "uint8"))

    def empty(self, shape: int | tuple[int, ...], dtype: str) -> Tensor:
        """See :class:`~hbx_gpu._engine.device.backend.Backend`."""
        with self.on_decode_stream():
            return self._torch.empty(shape, dtype=getattr(self._torch, dtype), device=self.device)

    def upload(self, host: np.ndarray, target: Memory) -> None:
        """See :class:`~hbx_gpu._engine.device.backend.Backend`."""
        self._move(target.address, host.ctypes.data, host.nbytes, _HOST_TO_DEVICE, self._copy)
        arrived = self._torch.cuda.Event()
        arrived.record(self._copy)
        self._decode.wait_event(arrived)

    def send(self, host: np.ndarray, target: Tensor) -> None:
        """See :class:`~hbx_gpu._engine.device.backend.Backend`."""
        self._move(target.data_ptr(), host.ctypes.data, host.nbytes, _HOST_TO_DEVICE, self._decode)

    def download(self, address: int, target: np.ndarray) -> None:
        """See :class:`~hbx_gpu._engine.device.backend.Backend`."""
        self._move(target.ctypes.data, address, target.nbytes, _DEVICE_TO_HOST, self._decode)

    def move(self, source: int, target: int, nbytes: int) -> None:
        """See :class:`~hbx_gpu._engine.device.backend.Backend`."""
        self._move(target, source, nbytes, _DEVICE_TO_DEVICE, self._decode)

    def launch(
        self, kernel: str, grid: int | tuple[int, ...], block: int, args: Sequence[Argument], shared: int = 0
    ) -> None:
        """See :class:`~hbx_gpu._engine.device.backend.Backend`."""
        dims = (grid,) if isinstance(grid, int) else grid
        values = tuple(arg if isinstance(arg, np.generic) else np.uint64(arg.data_ptr()) for arg in args)
        with self._on_device(), self._as_cupy(self._decode):
            self._function(kernel, shared)(dims, (block,), values, shared_mem=shared)

    def decompressor(self) -> Decompressor:
        """See :class:`~hbx_gpu._engine.device.backend.Backend`: nvCOMP."""
        with self._lock:
            if self._decompressor is None:
                self._decompressor = NvcompDecompressor(
                    find_library(),
                    self.device_buffer,
                    self._decode.synchronize,
                    self._decode.cuda_stream,
                    self._on_device,
                )
            return self._decompressor

    def on_decode_stream(self) -> AbstractContextManager[object]:
        """See :class:`~hbx_gpu._engine.device.backend.Backend`."""
        stream: AbstractContextManager[object] = self._torch.cuda.stream(self._decode)
        return stream

    def event(self) -> Event:
        """See :class:`~hbx_gpu._engine.device.backend.Backend`."""
        event = self._torch.cuda.Event(blocking=True)  # who waits for it leaves the core to others
        event.record(self._decode)
        return _Event(event)

    def hand_over(self, event: Event, tensors: Sequence[Tensor], foreign: Sequence[object] = ()) -> None:
        """See :class:`~hbx_gpu._engine.device.backend.Backend`."""
        assert isinstance(event, _Event)
        current = self._torch.cuda.current_stream(self.device)
        current.wait_event(event.event)
        for tensor in tensors:
            tensor.record_stream(current)
        self._held.hand_over(foreign, current)

    def warm_up(self) -> None:
        """Compile every kernel now (cupy keeps the result on disk) instead of at its first launch."""
        with self._on_device():
            for kernel in kernel_names():
                self._function(kernel, 0)

    @contextlib.contextmanager
    def _on_device(self) -> Iterator[None]:
        """Make this GPU the calling thread's current one, as it must be for whatever cupy is asked.

        A thread begins with device 0. cupy sets that back at the end, which would give it a context; torch,
        outside, does so only where there is one.
        """
        with self._torch.cuda.device(self.device), self._gpu:
            yield

    def _as_cupy(self, stream: torch.cuda.Stream) -> AbstractContextManager[object]:
        """Make a stream of torch cupy's current one."""
        cuda = self._cupy.cuda
        if hasattr(cuda.Stream, "from_external"):  # cupy 14, where ExternalStream is deprecated
            made: AbstractContextManager[object] = cuda.Stream.from_external(_Handle(stream.cuda_stream))
        else:
            made = cuda.ExternalStream(stream.cuda_stream, self.device.index)
        return made

    def _function(self, kernel: str, shared: int) -> _Kernel:
        """A kernel that may take so much dynamic shared memory; call it with the device current."""
        with self._lock:
            function = self._kernels.get(kernel)
            if function is None:
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

    def _move(self, target: int, origin: int, nbytes: int, kind: int, stream: torch.cuda.Stream) -> None:
        if nbytes:
            with self._on_device():
                self._cupy.cuda.runtime.memcpyAsync(target, origin, nbytes, kind, stream.cuda_stream)
