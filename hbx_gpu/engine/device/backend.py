"""What the device engine asks of a device. CUDA answers in `cuda`; the tests answer on the CPU.

Work goes through two queues. The *copy* stream moves staged bytes to an arena, the *decode* stream runs
kernels and writes outputs; a kernel waits for the uploads that were ordered before it, nothing else orders
the two. A consumer has a third stream of its own and is told when to go on by :meth:`Backend.hand_over`.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np


class DeviceBuffer(Protocol):
    """Device memory that one slot owns for its life."""

    @property
    def address(self) -> int: ...

    @property
    def nbytes(self) -> int: ...


class Event(Protocol):
    """A point on the decode stream."""

    def wait(self) -> None:
        """Block the calling thread until the decode stream has passed the point."""


class Backend(Protocol):
    """Memory, copies, launches and ordering on one device.

    Attributes
    ----------
    max_shared
        Bytes of dynamic shared memory that a block may ask for.
    """

    max_shared: int

    def host_buffer(self, nbytes: int) -> np.ndarray:
        """uint8, (nbytes,): host memory that the device copies from, page-locked where that matters."""

    def device_buffer(self, nbytes: int) -> DeviceBuffer:
        """Device memory, 256-byte aligned."""

    def empty(self, shape: int | tuple[int, ...], dtype: str) -> Any:
        """An output: an uninitialised torch tensor, allocated on the decode stream."""

    def upload(self, host: np.ndarray, target: DeviceBuffer) -> None:
        """Copy to the start of `target` on the copy stream; later launches wait for it."""

    def send(self, host: np.ndarray, target: Any) -> None:
        """Copy page-locked host memory to an output tensor of as many bytes, on the decode stream."""

    def download(self, address: int, target: np.ndarray) -> None:
        """Copy from device memory to page-locked host memory, on the decode stream."""

    def launch(
        self, kernel: str, grid: int | tuple[int, ...], block: int, args: Sequence[Any], shared: int = 0
    ) -> None:
        """Run a kernel of ``kernels/*.cu`` on the decode stream.

        `args` are NumPy scalars of the kernel's types (addresses as uint64) and tensors.
        """

    def on_decode_stream(self) -> AbstractContextManager[Any]:
        """torch operations inside run on the decode stream."""

    def event(self) -> Event:
        """A point behind everything ordered on the decode stream so far."""

    def hand_over(self, event: Event, tensors: Sequence[Any]) -> None:
        """Let the caller's current stream use `tensors` from now on.

        It waits for `event` before its next operation, and memory of the tensors is not given away before
        what that stream did with them is done.
        """


@dataclass
class Slot:
    """Staging memory of one batch in flight: a page-locked buffer, its arena, and when both are free again.

    Attributes
    ----------
    host, device
        What is staged, and where it is copied to. They grow, never shrink.
    side
        Page-locked memory for what goes straight to an output (metadata), and for what comes back (status).
    busy
        Behind the last use; None: free.
    """

    backend: Backend
    host: np.ndarray = field(default_factory=lambda: np.empty(0, np.uint8))
    side: np.ndarray = field(default_factory=lambda: np.empty(0, np.uint8))
    device: DeviceBuffer | None = None
    busy: Event | None = None

    def wait(self) -> None:
        """Block until nothing on the device refers to the slot."""
        if self.busy is not None:
            self.busy.wait()
            self.busy = None

    def reserve(self, host_bytes: int, device_bytes: int, side_bytes: int = 0) -> None:
        """Make room; sizes are powers of two, so that batches of nearly equal size never allocate."""
        self.wait()
        if len(self.host) < host_bytes:
            self.host = self.backend.host_buffer(_rounded(host_bytes))
        if len(self.side) < side_bytes:
            self.side = self.backend.host_buffer(_rounded(side_bytes))
        if self.device is None or self.device.nbytes < device_bytes:
            self.device = self.backend.device_buffer(_rounded(device_bytes))

    @property
    def nbytes(self) -> int:
        """Host and device memory held."""
        return len(self.host) + len(self.side) + (self.device.nbytes if self.device else 0)


def _rounded(nbytes: int) -> int:
    return max(1 << 16, 1 << (nbytes - 1).bit_length())
