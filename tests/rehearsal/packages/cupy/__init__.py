"""A double of what the project calls of cupy 14, over the stand-in runtime (cupy links CUDA's statically).

Rules are those of cupy's sources: the current device belongs to the thread; kernels and their attributes
belong to the device that is current when they are touched; a stream of torch becomes current through
``Stream.from_external``; arguments of kernels are NumPy scalars of the parameters' types.
"""

from __future__ import annotations

import ctypes
import shutil
import sys
import tempfile
import threading
from functools import cache
from pathlib import Path
from types import ModuleType, SimpleNamespace, TracebackType
from typing import Protocol

import numpy as np

from hbx_gpu._engine.device import sources
from tests.emulation import MAX_SHARED, _Kernel, _Launch
from tests.emulation.build import library as emulated_library
from tests.rehearsal.runtime import cudart

__version__ = "14.2.0+rehearsal"

_DEFAULT_SHARED = 48 << 10
_REPORT_BYTES = 8192
_KINDS = {"p": "u", "P": "u", "u": "u", "i": "i", "f": "f"}  # letters of tests/emulation/shim.h
_lock = threading.Lock()
_report = ctypes.create_string_buffer(_REPORT_BYTES)
loads: list[tuple[int, str]] = []
"""(device, kernel) of each kernel that was loaded."""


class CUDARuntimeError(RuntimeError):
    """An error code of the runtime."""


class CUDADriverError(RuntimeError):
    """An error code of the driver."""


class _External(Protocol):
    def __cuda_stream__(self) -> tuple[int, int]: ...


def _check(status: int) -> None:
    if status:
        raise CUDARuntimeError(f"error {status} of the stand-in runtime")


class runtime:
    """Functions of the runtime."""

    CUDARuntimeError = CUDARuntimeError

    @staticmethod
    def getDevice() -> int:
        device = ctypes.c_int()
        _check(cudart().cudaGetDevice(ctypes.byref(device)))
        return device.value

    @staticmethod
    def setDevice(device: int) -> None:
        _check(cudart().cudaSetDevice(ctypes.c_int(device)))

    @staticmethod
    def getDeviceCount() -> int:
        count = ctypes.c_int()
        _check(cudart().cudaGetDeviceCount(ctypes.byref(count)))
        return count.value

    @staticmethod
    def memcpyAsync(target: int, source: int, nbytes: int, kind: int, stream: int) -> None:
        pointer = ctypes.c_void_p
        _check(
            cudart().cudaMemcpyAsync(
                pointer(int(target)),
                pointer(int(source)),
                ctypes.c_size_t(int(nbytes)),
                kind,
                pointer(stream),
            )
        )

    @staticmethod
    def hostAlloc(nbytes: int, flags: int) -> int:
        address = ctypes.c_void_p()
        _check(cudart().cudaHostAlloc(ctypes.byref(address), ctypes.c_size_t(nbytes), ctypes.c_uint(flags)))
        assert address.value is not None
        return address.value

    @staticmethod
    def freeHost(address: int) -> None:
        _check(cudart().cudaFreeHost(ctypes.c_void_p(address)))

    @staticmethod
    def pointerGetAttributes(address: int) -> SimpleNamespace:
        return SimpleNamespace(devicePointer=address)


class Device:
    """Makes a device the calling thread's current one, and sets the earlier one back at the end."""

    _before = threading.local()

    def __init__(self, device: int) -> None:
        self.id = int(device)
        self.attributes = {"MaxSharedMemoryPerBlockOptin": MAX_SHARED}

    def __enter__(self) -> Device:
        self._before.__dict__.setdefault("stack", []).append(runtime.getDevice())
        if runtime.getDevice() != self.id:
            runtime.setDevice(self.id)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        runtime.setDevice(self._before.stack.pop())


class Stream:
    """A stream of another library, current within ``with``."""

    _current = threading.local()

    def __init__(self, address: int) -> None:
        self._address = address

    @classmethod
    def from_external(cls, stream: _External) -> Stream:
        version, address = stream.__cuda_stream__()
        assert version == 0
        return cls(address)

    def __enter__(self) -> Stream:
        self._current.__dict__.setdefault("stack", []).append(self._address)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._current.stack.pop()

    @classmethod
    def current(cls) -> int:
        stack = cls._current.__dict__.get("stack")
        return int(stack[-1]) if stack else 0


class RawModule:
    """A kernel file; it is compiled for the CPU when one of its kernels is launched."""

    def __init__(self, *, code: str, options: tuple[str, ...], backend: str) -> None:
        assert isinstance(code, str)
        assert isinstance(options, tuple)
        assert backend == "nvrtc"

    def get_function(self, name: str) -> RawKernel:
        return RawKernel(name)


class RawKernel:
    """A kernel, which is loaded on whatever device is current when it is used."""

    def __init__(self, name: str) -> None:
        self.name = name
        self._shared: dict[int, int] = {}
        self._load()

    def _load(self) -> int:
        device = runtime.getDevice()
        if device not in self._shared:
            self._shared[device] = _DEFAULT_SHARED
            loads.append((device, self.name))
        return device

    @property
    def max_dynamic_shared_size_bytes(self) -> int:
        return self._shared[self._load()]

    @max_dynamic_shared_size_bytes.setter
    def max_dynamic_shared_size_bytes(self, nbytes: int) -> None:
        self._shared[self._load()] = nbytes

    def __call__(
        self,
        grid: tuple[int, ...],
        block: tuple[int, ...],
        args: tuple[np.generic, ...],
        *,
        shared_mem: int = 0,
    ) -> None:
        device = self._load()
        if shared_mem > self._shared[device]:
            raise CUDADriverError(
                f"CUDA_ERROR_INVALID_VALUE: {self.name} takes {shared_mem} bytes of dynamic shared memory on "
                f"device {device}, where it may take {self._shared[device]}"
            )
        kernel = _kernel(self.name)
        _match(kernel, args)
        launch = _Launch(
            grid=_three(grid), block=_three(block), shared=shared_mem, report_bytes=_REPORT_BYTES
        )
        launch.report = ctypes.cast(_report, ctypes.c_char_p)
        status = cudart().standin_launch(
            ctypes.c_void_p(Stream.current()),
            ctypes.cast(kernel.entry, ctypes.c_void_p),
            ctypes.byref(launch),
            ctypes.sizeof(launch),
            b"".join(arg.tobytes() for arg in args),
            (ctypes.c_uint * len(args))(*(arg.dtype.itemsize for arg in args)),
            len(args),
            _report,
        )
        if status:
            raise CUDADriverError(f"CUDA_ERROR_INVALID_HANDLE: {self.name} on a stream of another device")


def _match(kernel: _Kernel, args: tuple[np.generic, ...]) -> None:
    """cupy copies the bytes of a scalar as they are: one of another size would shift all after it."""
    assert len(args) == len(kernel.parameters), f"{kernel.name} takes {len(kernel.parameters)} arguments"
    for number, (arg, (letter, size)) in enumerate(zip(args, kernel.parameters, strict=True)):
        nbytes = 8 if letter in "pP" else size
        found = (arg.dtype.kind, arg.dtype.itemsize)
        assert found == (_KINDS[letter], nbytes), f"{kernel.name}, argument {number}: {arg.dtype}"


def _three(sizes: tuple[int, ...]) -> ctypes.Array[ctypes.c_uint32]:
    return (ctypes.c_uint32 * 3)(*(*sizes, 1, 1)[:3])


_copies = tempfile.TemporaryDirectory(prefix="hbx_gpu_rehearsal_", ignore_cleanup_errors=True)


@cache
def _load_copy(path: Path) -> ctypes.CDLL:
    """A library of kernels of our own: the other one's fibers serve emulated devices meanwhile."""
    return ctypes.CDLL(shutil.copy(path, _copies.name))


def _kernel(name: str) -> _Kernel:
    with _lock:
        return _loaded(name)


@cache
def _loaded(name: str) -> _Kernel:
    path = sources.kernels_folder() / sources.kernel_names()[name]
    return _Kernel(_load_copy(emulated_library(path)), name)


class ndarray:
    """No array is one of cupy's here; libraries that know cupy ask."""


cuda = ModuleType("cupy.cuda")
vars(cuda).update(Device=Device, Stream=Stream, runtime=runtime)
sys.modules["cupy.cuda"] = cuda
