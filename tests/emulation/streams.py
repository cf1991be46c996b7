"""A backend whose copies and kernels run later, on threads that stand for streams: to test ordering with.

Whatever forgets to wait reads junk or bytes of another batch, as it would on a GPU. Work that was ordered
holds addresses and keeps nothing alive; memory that Python lets go of is free for the next taker at once.
"""

from __future__ import annotations

import contextlib
import ctypes
import queue
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from typing import Any

import numpy as np
import torch

from hbx_gpu._buffers import BufferPool
from hbx_gpu._engine.device.backend import Streams
from tests.emulation.backend import JUNK, EmulatedBackend

_ALL = 1 << 40  # bytes a pool keeps: nothing goes back to the system, where late work would crash


class Stream:
    """Work done in the order it was asked for, some time later."""

    def __init__(self) -> None:
        self._work: queue.SimpleQueue[Callable[[], object]] = queue.SimpleQueue()
        self.error: BaseException | None = None
        self.last: StreamEvent | None = None
        threading.Thread(target=self._run, daemon=True).start()

    def _run(self) -> None:
        while True:
            work = self._work.get()
            try:
                work()
            except BaseException as error:
                self.error = self.error or error

    def order(self, work: Callable[[], object]) -> None:
        self._work.put(work)

    def event(self) -> StreamEvent:
        event = self.last = StreamEvent(self)
        self.order(event.passed.set)
        return event

    def wait_for(self, event: StreamEvent) -> None:
        self.order(event.passed.wait)

    def synchronize(self) -> None:
        self.event().wait()

    @property
    def idle(self) -> bool:
        """Whether everything that was ordered up to its last event is done."""
        return self.last is None or self.last.passed.is_set()


class StreamEvent:
    """A point on a stream."""

    def __init__(self, stream: Stream) -> None:
        self.stream, self.passed = stream, threading.Event()

    def wait(self) -> None:
        assert self.passed.wait(60), "the stream stands still"
        if self.stream.error is not None:
            raise self.stream.error


class PooledBuffer:
    """Device memory out of the pool that outputs come from too."""

    def __init__(self, pool: BufferPool, nbytes: int) -> None:
        backing = pool.empty(max(1 << 16, nbytes + 256), np.uint8)
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


class StreamBackend(EmulatedBackend):
    """Copy, decode and consumer streams as on a GPU; memory is used again at once, of outputs and of slots.

    Parameters
    ----------
    delay
        Seconds that every upload and every launch waits before it begins.

    waits, records
        Whether a hand-over makes the consumer wait, and keeps memory until the consumer is done with it.
        Without them it is wrong, which tests must notice.

    Attributes
    ----------
    consumer
        The stream that tensors are handed over to.
    """

    def __init__(
        self, delay: float = 0.0, *, waits: bool = True, records: bool = True, **kwargs: Any
    ) -> None:
        super().__init__(**kwargs)
        self.delay, self.waits, self.records = delay, waits, records
        self.copy, self.decode, self.consumer = Stream(), Stream(), Stream()
        # As torch's allocator: what Python lets go of is free for the next output on the decode stream.
        self.pool = BufferPool(max_bytes=_ALL)
        # As torch's allocator of page-locked memory, which knows nothing of copies that it did not order.
        self.host_pool = BufferPool(max_bytes=_ALL)
        self._recorded: list[tuple[StreamEvent, Sequence[Any]]] = []
        self._handed_over: list[Any] = []

    def empty(self, shape: int | tuple[int, ...], dtype: str) -> Any:
        wanted = torch.empty(0, dtype=getattr(torch, dtype)).element_size()
        nbytes = int(np.prod(shape, dtype=np.int64)) * wanted
        memory = self.pool.empty(max(1 << 16, nbytes), np.uint8)
        self._recorded = [kept for kept in self._recorded if not kept[0].passed.is_set()]
        return torch.from_numpy(memory)[:nbytes].view(getattr(torch, dtype)).view(shape)

    def host_buffer(self, nbytes: int) -> np.ndarray:
        memory = self.host_pool.empty(max(1 << 16, nbytes), np.uint8)[:nbytes]
        memory[:] = JUNK
        return memory

    def mapped_buffer(self, nbytes: int) -> tuple[np.ndarray, int]:
        memory = PooledBuffer(self.host_pool, nbytes).memory
        memory[:] = JUNK
        return memory, int(memory.ctypes.data)

    def device_buffer(self, nbytes: int) -> Any:
        return PooledBuffer(self.pool, nbytes)

    def upload(self, host: np.ndarray, target: Any) -> None:
        assert len(host) <= target.nbytes
        self.uploaded += len(host)
        self._copy_bytes(self.copy, host.ctypes.data, target.address, host.nbytes, self.delay)
        self.decode.wait_for(self.copy.event())

    def send(self, host: np.ndarray, target: Any) -> None:
        assert host.nbytes == target.numel() * target.element_size()
        self._copy_bytes(self.decode, host.ctypes.data, target.data_ptr(), host.nbytes)

    def download(self, address: int, target: np.ndarray) -> None:
        self._copy_bytes(self.decode, address, target.ctypes.data, target.nbytes)

    def move(self, source: int, target: int, nbytes: int) -> None:
        self._copy_bytes(self.decode, source, target, nbytes)

    def _copy_bytes(self, stream: Stream, source: int, target: int, nbytes: int, delay: float = 0.0) -> None:
        source, target = int(source), int(target)

        def copy(_device: StreamBackend = self) -> None:  # the pools stay, whoever has their blocks by now
            time.sleep(delay)
            ctypes.memmove(target, source, nbytes)

        stream.order(copy)

    def launch(
        self, kernel: str, grid: int | tuple[int, ...], block: int, args: Sequence[Any], shared: int = 0
    ) -> None:
        # As on a GPU, a launch knows addresses and keeps nothing alive.
        fixed = [arg if isinstance(arg, np.generic) else np.uint64(arg.data_ptr()) for arg in args]

        def late() -> None:
            time.sleep(self.delay)
            EmulatedBackend.launch(self, kernel, grid, block, fixed, shared)

        self.decode.order(late)

    def decompressor(self) -> _OnStream:
        return _OnStream(self)

    @contextlib.contextmanager
    def _torch_on_decode(self) -> Iterator[None]:
        # torch's CPU operations run on the calling thread: let the stream come to this point first.
        self.decode.synchronize()
        yield

    def on_decode_stream(self) -> AbstractContextManager[Any]:
        return self._torch_on_decode()

    def event(self) -> StreamEvent:
        return self.decode.event()

    def hand_over(self, event: Any, tensors: Sequence[Any], foreign: Sequence[Any] = ()) -> None:
        if self.waits:
            self.consumer.wait_for(event)
        if self.records:
            # What the consumer has ordered by now used the tensors before these: behind it they may go.
            self._recorded.append((self.consumer.event(), self._handed_over))
            self._handed_over = [*tensors, *foreign]


class _OnStream:
    """The CPU's decompressor, some time later."""

    def __init__(self, backend: StreamBackend) -> None:
        self._backend = backend

    def decompress(self, algorithm: str, streams: Streams) -> None:
        backend = self._backend
        at_once = EmulatedBackend.decompressor(backend)

        def late() -> None:
            time.sleep(backend.delay)
            at_once.decompress(algorithm, streams)

        backend.decode.order(late)


def read_later(backend: StreamBackend, tensor: Any, into: list[np.ndarray], delay: float = 0.0) -> None:
    """Order a copy of a tensor on the consumer's stream without keeping the tensor."""
    address, shape, dtype = int(tensor.data_ptr()), tuple(tensor.shape), tensor.numpy().dtype
    nbytes = tensor.numel() * tensor.element_size()

    def copy() -> None:
        time.sleep(delay)
        into.append(np.frombuffer(ctypes.string_at(address, nbytes), dtype).reshape(shape))

    backend.consumer.order(copy)


__all__ = ["JUNK", "Stream", "StreamBackend", "StreamEvent", "read_later"]
