"""The protocols of a device for the device engine; `cuda` implements them, and the tests do so on the CPU.

Work goes through two queues. The *copy* stream moves staged bytes to an arena, the *decode* stream runs
kernels and writes outputs; a kernel waits for the uploads that were ordered before it, nothing else orders
the two. A consumer has a third stream of its own and is told when to go on by :meth:`Backend.hand_over`.
"""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Protocol, TypeAlias

import numpy as np

if TYPE_CHECKING:
    from torch import Tensor

    from hbx_gpu._storage.kvikio import Sliceable

Argument: TypeAlias = "np.generic | Tensor"
"""Argument of a kernel: a NumPy scalar of its type, or a tensor, which stands for its address."""


class Memory(Protocol):
    """Memory that kernels reach."""

    @property
    def address(self) -> int: ...

    @property
    def nbytes(self) -> int: ...


@dataclass(frozen=True, slots=True)
class Part:
    """A stretch of memory that somebody else owns."""

    address: int
    nbytes: int


class DeviceBuffer(Memory, Protocol):
    """Device memory that one slot or store owns for its life."""

    def array(self, begin: int, nbytes: int) -> Sliceable:
        """Bytes [begin, begin + nbytes) as libraries take device memory (``__cuda_array_interface__``)."""


class NoRoom(Exception):
    """The areas beside the resident chunks are all in use."""


class Areas(Protocol):
    """Parts of an arena, for what is staged beside resident chunks."""

    def take(self, nbytes: int) -> Part:
        """256-byte aligned; raises NoRoom."""

    def give(self, part: Part) -> None:
        """Take back what `take` gave."""


class Event(Protocol):
    """A point on the decode stream."""

    def wait(self) -> None:
        """Block the calling thread until the decode stream has passed the point."""


STREAM_ALIGNMENT = 16
"""Alignment of compressed streams in bytes; their decompressed content may lie anywhere."""


@dataclass(frozen=True, slots=True)
class Streams:
    """Streams of one compressor, described by arrays in device memory.

    Attributes
    ----------
    sources, source_bytes, targets, target_bytes
        Addresses of arrays of uint64: where each stream lies, its bytes, where its content goes, and how
        long that must be.
    actual, states
        Addresses of arrays that are written: uint64, bytes found; int32, 0 where all went well.
    sizes
        int64, (n,). What `target_bytes` holds, for the host.
    """

    sources: int
    source_bytes: int
    targets: int
    target_bytes: int
    actual: int
    states: int
    sizes: np.ndarray


class Decompressor(Protocol):
    """Decompresses many streams at once, on the decode stream."""

    def decompress(self, algorithm: str, streams: Streams) -> None:
        """Order the work; `algorithm` is one of :data:`hbx_gpu._codecs.containers.ALGORITHMS`.

        Its behavior is undefined for damaged streams: the caller must have verified them, unless the user
        chose to go without.
        """


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

    def mapped_buffer(self, nbytes: int) -> tuple[np.ndarray, int]:
        """uint8, (nbytes,): page-locked memory that kernels may read in place, and its address for them."""

    def device_buffer(self, nbytes: int) -> DeviceBuffer:
        """Device memory, 256-byte aligned.

        Work that was ordered on the decode stream earlier may still use it for whoever had it before. Whoever
        reaches it in any other way than on that stream first waits for an :meth:`event`.
        """

    def free_memory(self) -> int:
        """Return the free bytes of device memory."""

    def empty(self, shape: int | tuple[int, ...], dtype: str) -> Tensor:
        """An output: an uninitialized torch tensor, allocated on the decode stream."""

    def upload(self, host: np.ndarray, target: Memory) -> None:
        """Copy to the start of `target` on the copy stream; later launches wait for it."""

    def send(self, host: np.ndarray, target: Tensor) -> None:
        """Copy page-locked host memory to an output tensor of as many bytes, on the decode stream."""

    def download(self, address: int, target: np.ndarray) -> None:
        """Copy from device memory to page-locked host memory, on the decode stream."""

    def move(self, source: int, target: int, nbytes: int) -> None:
        """Copy between two places of device memory, on the decode stream."""

    def launch(
        self, kernel: str, grid: int | tuple[int, ...], block: int, args: Sequence[Argument], shared: int = 0
    ) -> None:
        """Run a kernel of ``kernels/*.cu`` on the decode stream.

        `args` are NumPy scalars of the kernel's types (addresses as uint64) and tensors.
        """

    def decompressor(self) -> Decompressor:
        """Return the decompressor for general codecs; raise DeviceUnavailableError where there is none."""

    def on_decode_stream(self) -> AbstractContextManager[object]:
        """torch operations inside run on the decode stream."""

    def event(self) -> Event:
        """Return the point after everything ordered on the decode stream so far."""

    def hand_over(self, event: Event, tensors: Sequence[Tensor], foreign: Sequence[object] = ()) -> None:
        """Let the caller's current stream use `tensors`, and `foreign` ones, from now on.

        It waits for `event` before its next operation, and memory of the tensors is not given away before
        what that stream did with them is done. `foreign` are tensors over memory of other libraries.
        """


@dataclass
class Slot:
    """Staging memory of one batch in flight: a page-locked buffer, its arena, and when both are free again.

    Copies and kernels know addresses and keep nothing alive, so a slot that is dropped waits for its last use
    before its memory goes, and gives back its parts of the arena of resident chunks.

    Attributes
    ----------
    host, device
        Page-locked buffer with what is staged, and the device memory it is copied to. They never shrink.
    side
        Page-locked memory for what goes straight to an output (metadata), and for what comes back (status).
    busy
        Event after the last use of the slot; None if it is free.
    areas
        Free areas next to the resident chunks; None where no chunk is resident.
    area
        Area in use: it takes chunk bytes staged beside resident chunks, and what is decoded of either.
    borrowed
        Parts of the arena that hold whole chunks for this batch only; given back with its end.
    reads
        Owner of memory beside the slot that kernels read for it; kept as long as the slot.
    """

    backend: Backend
    host: np.ndarray = field(default_factory=lambda: np.empty(0, np.uint8))
    side: np.ndarray = field(default_factory=lambda: np.empty(0, np.uint8))
    device: DeviceBuffer | None = None
    busy: Event | None = None
    areas: Areas | None = None
    area: Part = Part(0, 0)
    borrowed: list[Part] = field(default_factory=list)
    reads: object = None

    def wait(self) -> None:
        """Block until nothing on the device refers to the slot."""
        if self.busy is not None:
            self.busy.wait()
            self.busy = None

    def release(self) -> None:
        """Give back what was borrowed for the batch before."""
        self.wait()
        while self.borrowed:
            assert self.areas is not None
            self.areas.give(self.borrowed.pop())

    def reserve(self, host_bytes: int, device_bytes: int, side_bytes: int = 0, area_bytes: int = 0) -> None:
        """Make room; sizes are powers of two, so that batches of nearly equal size never allocate.

        Raises
        ------
        NoRoom
            There is no area of that size.
        """
        self.wait()
        if self.area.nbytes < area_bytes:
            self._grow_area(area_bytes)
        if len(self.host) < host_bytes:
            self.host = self.backend.host_buffer(_rounded(host_bytes))
        if len(self.side) < side_bytes:
            self.side = self.backend.host_buffer(_rounded(side_bytes))
        if device_bytes and (self.device is None or self.device.nbytes < device_bytes):
            self.device = self.backend.device_buffer(_rounded(device_bytes))
            # Uploads come on another stream than what may still be done with this memory; it is new rarely.
            self.backend.event().wait()

    def _grow_area(self, nbytes: int) -> None:
        if self.areas is None:
            raise NoRoom
        if self.area.nbytes:
            self.areas.give(self.area)
            self.area = Part(0, 0)
        self.area = self.areas.take(_rounded(nbytes))

    def __del__(self) -> None:
        if sys.is_finalizing():  # CUDA may be gone, and memory goes with the process
            return
        with contextlib.suppress(RuntimeError):  # a device that has failed does nothing any more
            self.wait()
        if self.areas is not None:
            for part in (*self.borrowed, self.area):
                if part.nbytes:
                    self.areas.give(part)

    @property
    def nbytes(self) -> int:
        """Host and device memory held."""
        return len(self.host) + len(self.side) + (self.device.nbytes if self.device else 0)


def _rounded(nbytes: int) -> int:
    return max(1 << 16, 1 << (nbytes - 1).bit_length())
