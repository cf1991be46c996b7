"""The device engine's backend on the CPU: kernels through the shim, memory filled with a pattern."""

from __future__ import annotations

import contextlib
import ctypes
from collections.abc import Sequence
from contextlib import AbstractContextManager
from typing import Any

import numpy as np
import torch

from hbx_gpu._engine.device.backend import Decompressor, Event
from hbx_gpu.errors import DeviceUnavailableError
from tests.emulation import EmulatedLauncher
from tests.emulation.decompressor import CpuDecompressor

JUNK = 0xA5
"""What fresh memory holds: nobody may take it for zeros."""


class Arena:
    """Device memory, which is host memory here."""

    def __init__(self, nbytes: int) -> None:
        backing = np.full(nbytes + 256, JUNK, np.uint8)
        begin = -backing.ctypes.data % 256
        self.memory = backing[begin : begin + nbytes]

    @property
    def address(self) -> int:
        return int(self.memory.ctypes.data)

    @property
    def nbytes(self) -> int:
        return len(self.memory)

    def array(self, begin: int, nbytes: int) -> np.ndarray:
        return self.memory[begin : begin + nbytes]


class Passed:
    """A point that was reached when it was made."""

    def wait(self) -> None:
        """Nothing to wait for."""


class EmulatedBackend:
    """Everything happens at once, in the order it is asked for.

    Parameters
    ----------
    order
        Thread order of the launcher.
    max_shared
        Dynamic shared memory per block; a small one makes kernels work tile by tile.

    Attributes
    ----------
    launches
        Names of the kernels launched so far.
    uploaded
        Bytes that crossed to the device so far.
    free
        Bytes of device memory there are.
    no_decompressor
        Why there is no decompressor; empty where there is.
    """

    free = 1 << 30
    no_decompressor = ""

    def __init__(self, order: str = "forward", max_shared: int = 200 << 10) -> None:
        self.max_shared = max_shared
        self.launcher = EmulatedLauncher(order)
        self.launches: list[str] = []
        self.uploaded = 0

    def host_buffer(self, nbytes: int) -> np.ndarray:
        return Arena(nbytes).memory

    def mapped_buffer(self, nbytes: int) -> tuple[np.ndarray, int]:
        arena = Arena(nbytes)
        return arena.memory, arena.address

    def device_buffer(self, nbytes: int) -> Arena:
        return Arena(nbytes)

    def free_memory(self) -> int:
        return self.free

    def empty(self, shape: int | tuple[int, ...], dtype: str) -> Any:
        tensor = torch.empty(shape, dtype=getattr(torch, dtype))
        ctypes.memset(tensor.data_ptr(), JUNK, tensor.numel() * tensor.element_size())
        return tensor

    def upload(self, host: np.ndarray, target: Any) -> None:
        assert len(host) <= target.nbytes
        self.uploaded += len(host)
        ctypes.memmove(target.address, host.ctypes.data, len(host))

    def send(self, host: np.ndarray, target: Any) -> None:
        assert host.nbytes == target.numel() * target.element_size()
        ctypes.memmove(target.data_ptr(), host.ctypes.data, host.nbytes)

    def download(self, address: int, target: np.ndarray) -> None:
        ctypes.memmove(target.ctypes.data, address, target.nbytes)

    def move(self, source: int, target: int, nbytes: int) -> None:
        ctypes.memmove(target, source, nbytes)

    def launch(
        self, kernel: str, grid: int | tuple[int, ...], block: int, args: Sequence[Any], shared: int = 0
    ) -> None:
        assert shared <= self.max_shared
        self.launches.append(kernel)
        self.launcher.launch(kernel, grid, block, args, shared)

    def decompressor(self) -> Decompressor:
        if self.no_decompressor:
            raise DeviceUnavailableError(self.no_decompressor)
        return CpuDecompressor()

    def on_decode_stream(self) -> AbstractContextManager[Any]:
        return contextlib.nullcontext()

    def event(self) -> Event:
        return Passed()

    def hand_over(self, event: Event, tensors: Sequence[Any], foreign: Sequence[Any] = ()) -> None:
        event.wait()
        assert all(tensor.device.type == "cpu" for tensor in (*tensors, *foreign))
