"""Doubles of cupy and of torch's CUDA side on several devices: which device each call finds current.

Rules are those of CUDA 13, cupy 14 and torch 2.14 as this project understands them; no GPU has confirmed
them yet. The current device belongs to the thread and is 0 to begin with; setting a device gives it a
context, even when that only sets it back; functions, their attributes and streams belong to one device; torch
sets a device back only where it has a context. Kernels do not run.
"""

from __future__ import annotations

import contextlib
import ctypes
import threading
from collections import defaultdict
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch

_DEFAULT_SHARED = 48 << 10


class Devices:
    """The driver: current device of each thread, and which devices have a context.

    Attributes
    ----------
    contexts
        Devices that have one.
    launches
        (device, kernel, dynamic shared memory) of each launch.
    streams
        How many streams torch handed out, per device and priority.
    busy
        Whether kernels of the consumer still run.
    """

    def __init__(self, n: int = 2) -> None:
        self.n = n
        self.contexts: set[int] = set()
        self.launches: list[tuple[int, str, int]] = []
        self.streams: dict[tuple[int, int], int] = defaultdict(int)
        self.busy = False
        self._thread = threading.local()
        self._memory: dict[int, Any] = {}

    @property
    def current(self) -> int:
        return int(getattr(self._thread, "device", 0))

    def set(self, device: int) -> None:
        assert 0 <= device < self.n
        self._thread.device = device
        self.contexts.add(device)

    def touch(self) -> int:
        """Any call that needs a context makes one on the current device."""
        self.contexts.add(self.current)
        return self.current

    # -- what the backend imports --------------------------------------------------------------------

    def cupy(self) -> Any:
        devices = self

        class Device:
            def __init__(self, device: int) -> None:
                self.id = device
                self.attributes = {"MaxSharedMemoryPerBlockOptin": 232_448}
                self._before = threading.local()

            def __enter__(self) -> Device:
                self._before.__dict__.setdefault("stack", []).append(devices.current)
                if devices.current != self.id:
                    devices.set(self.id)
                return self

            def __exit__(self, *error: object) -> None:
                devices.set(self._before.stack.pop())

        class Stream:
            @classmethod
            @contextlib.contextmanager
            def from_external(cls, stream: Any) -> Iterator[None]:
                version, handle = stream.__cuda_stream__()
                assert (version, handle % devices.n) == (0, devices.current), "a stream of another device"
                yield

        def host_alloc(nbytes: int, _flags: int) -> int:
            devices.touch()
            memory = np.zeros(nbytes, np.uint8)
            devices._memory[int(memory.ctypes.data)] = memory
            return int(memory.ctypes.data)

        def free_host(address: int) -> None:
            devices.touch()
            del devices._memory[address]

        def memcpy(target: int, source: int, nbytes: int, _kind: int, stream: int) -> None:
            assert devices.touch() == stream % devices.n, "a copy on a stream of another device"
            ctypes.memmove(int(target), int(source), int(nbytes))

        runtime = SimpleNamespace(
            hostAlloc=host_alloc,
            freeHost=free_host,
            memcpyAsync=memcpy,
            pointerGetAttributes=lambda address: SimpleNamespace(devicePointer=address),
        )
        cuda = SimpleNamespace(Device=Device, Stream=Stream, runtime=runtime)
        return SimpleNamespace(cuda=cuda, RawModule=lambda **_: _Module(devices))

    def torch(self) -> Any:
        devices = self

        class Stream:
            def __init__(self, device: Any, priority: int = 0) -> None:
                assert priority in (0, -1)
                self.device = device
                # The handle: one of a pool of 32 per device and priority, in turn.
                taken = devices.streams[device.index, priority]
                devices.streams[device.index, priority] += 1
                self.cuda_stream = device.index + devices.n * (taken % 32 - 32 * priority)

            def wait_event(self, event: Any) -> None:
                """Everything happens at once."""

            synchronize = record_event = wait_event

        class Guard:
            def __init__(self, device: Any) -> None:
                self.device = int(getattr(device, "index", device))

            def __enter__(self) -> None:
                self.before = devices.current
                if self.before != self.device:
                    devices.set(self.device)

            def __exit__(self, *error: object) -> None:
                if self.before in devices.contexts:
                    devices.set(self.before)

        class Event:
            def __init__(self, blocking: bool = False) -> None:
                """Whether a wait leaves the core to others makes no difference here."""

            def record(self, stream: Any) -> None:
                """Passed already."""

            def synchronize(self) -> None:
                """Passed already."""

            def query(self) -> bool:
                return not devices.busy

        def empty(shape: Any, *, dtype: Any, device: Any = None, pin_memory: bool = False) -> Any:
            if pin_memory:
                assert devices.contexts, "page-locked memory would make a context on device 0"
            elif device is not None:
                assert device.index == devices.current
            return torch.empty(shape, dtype=dtype)

        cuda = SimpleNamespace(
            Stream=Stream,
            Event=Event,
            device=Guard,
            stream=lambda stream: Guard(stream.device),
            current_stream=lambda device: Stream(device),
            mem_get_info=lambda _device: (1 << 30, 1 << 30),
        )
        return SimpleNamespace(cuda=cuda, device=torch.device, empty=empty, uint8=torch.uint8)


class _Module:
    def __init__(self, devices: Devices) -> None:
        self._devices = devices
        devices.touch()

    def get_function(self, name: str) -> _Function:
        return _Function(self._devices, name)


class _Function:
    """A kernel, which cupy loads on whatever device is current, attributes and all."""

    def __init__(self, devices: Devices, name: str) -> None:
        self._devices, self._name = devices, name
        self._shared: dict[int, int] = defaultdict(lambda: _DEFAULT_SHARED)

    @property
    def max_dynamic_shared_size_bytes(self) -> int:
        return self._shared[self._devices.touch()]

    @max_dynamic_shared_size_bytes.setter
    def max_dynamic_shared_size_bytes(self, nbytes: int) -> None:
        self._shared[self._devices.touch()] = nbytes

    def __call__(self, *_args: Any, shared_mem: int) -> None:
        device = self._devices.touch()
        assert shared_mem <= self._shared[device], "CUDA_ERROR_INVALID_VALUE: too much dynamic shared memory"
        self._devices.launches.append((device, self._name, shared_mem))
