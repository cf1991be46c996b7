"""A device that does nothing, so that only the work of the host is left to measure.

Memory is host memory that nobody writes; copies and launches return at once, and report that all went well.
"""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from contextlib import AbstractContextManager
from typing import TYPE_CHECKING

import numpy as np
import torch

from hbx_gpu.errors import DeviceUnavailableError

if TYPE_CHECKING:
    from hbx_gpu._engine.device.backend import Decompressor, Event, Memory

_ALIGNMENT = 256


class NullMemory:
    """Memory of the device, which is never touched and so takes up none."""

    def __init__(self, nbytes: int) -> None:
        backing = np.empty(nbytes + _ALIGNMENT, np.uint8)
        begin = -backing.ctypes.data % _ALIGNMENT
        self._memory = backing[begin : begin + nbytes]
        self.address, self.nbytes = int(self._memory.ctypes.data), nbytes

    def array(self, begin: int, nbytes: int) -> np.ndarray:
        """See :class:`~hbx_gpu._engine.device.backend.DeviceBuffer`."""
        return self._memory[begin : begin + nbytes]


class _Passed:
    """A point that was passed when it was made."""

    def wait(self) -> None:
        """Return at once."""


class NullBackend:
    """See :class:`~hbx_gpu._engine.device.backend.Backend`.

    Parameters
    ----------
    free
        Bytes of device memory that it says are free.

    Attributes
    ----------
    launches, copies
        Number of kernels and of copies that were asked for.
    """

    max_shared = 200 << 10

    def __init__(self, free: int = 64 << 30) -> None:
        self._free = free
        self.launches = self.copies = 0

    def host_buffer(self, nbytes: int) -> np.ndarray:
        """Host memory, all zeros, so that status words say that all went well."""
        return np.zeros(nbytes + _ALIGNMENT, np.uint8)[:nbytes]

    def mapped_buffer(self, nbytes: int) -> tuple[np.ndarray, int]:
        """Host memory and its address."""
        memory = NullMemory(nbytes)
        return memory.array(0, nbytes), memory.address

    def device_buffer(self, nbytes: int) -> NullMemory:
        """Memory that is never touched."""
        return NullMemory(nbytes)

    def free_memory(self) -> int:
        """Return what the constructor was given."""
        return self._free

    def empty(self, shape: int | tuple[int, ...], dtype: str) -> torch.Tensor:
        """A tensor without memory, on which torch's own operations do nothing either."""
        return torch.empty(shape, dtype=getattr(torch, dtype), device="meta")

    def upload(self, host: np.ndarray, target: Memory) -> None:  # noqa: ARG002
        """Count a copy."""
        self.copies += 1

    def send(self, host: np.ndarray, target: object) -> None:  # noqa: ARG002
        """Count a copy."""
        self.copies += 1

    def download(self, address: int, target: np.ndarray) -> None:  # noqa: ARG002
        """Count a copy."""
        self.copies += 1

    def move(self, source: int, target: int, nbytes: int) -> None:  # noqa: ARG002
        """Count a copy."""
        self.copies += 1

    def launch(
        self,
        kernel: str,  # noqa: ARG002
        grid: int | tuple[int, ...],  # noqa: ARG002
        block: int,  # noqa: ARG002
        args: Sequence[object],  # noqa: ARG002
        shared: int = 0,  # noqa: ARG002
    ) -> None:
        """Count a launch."""
        self.launches += 1

    def decompressor(self) -> Decompressor:
        """There is none."""
        raise DeviceUnavailableError("the null backend decompresses nothing")

    def on_decode_stream(self) -> AbstractContextManager[object]:
        """Change nothing."""
        return contextlib.nullcontext()

    def event(self) -> Event:
        """A point that was passed."""
        return _Passed()

    def hand_over(self, event: Event, tensors: Sequence[object], foreign: Sequence[object] = ()) -> None:
        """Order nothing."""
