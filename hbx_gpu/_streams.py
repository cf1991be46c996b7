"""CUDA streams of this process, and memory of other libraries that a stream still reads."""

from __future__ import annotations

import contextlib
import threading
from collections import deque
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    import torch

_POOL = 32  # streams that torch keeps per device and priority (c10/cuda/CUDAStream.cpp)
_STREAMS: dict[tuple[int, str], torch.cuda.Stream] = {}
_STREAMS_LOCK = threading.Lock()


def own_stream(device: int, purpose: str, *, urgent: bool = False) -> torch.cuda.Stream:
    """Return the CUDA stream of this process for one purpose on one device; the same at every call.

    torch hands out 32 streams per device and priority in turn. Who takes a new one for each epoch soon shares
    the stream of a decoder, and then waits for its kernels.

    Parameters
    ----------
    device
        Index of the GPU.
    purpose
        What the stream is for, such as ``"decode"``. Two purposes never share a stream.
    urgent
        Whether kernels on the stream go before those on the streams of a model.

    Returns
    -------
    torch.cuda.Stream
        It lives as long as the process, so memory may be recorded on it whenever its user ends.
    """
    import torch

    with _STREAMS_LOCK:
        if (device, purpose) not in _STREAMS:
            taken = {stream.cuda_stream for (other, _), stream in _STREAMS.items() if other == device}
            stream = torch.cuda.Stream(torch.device("cuda", device), priority=-1 if urgent else 0)
            for _ in range(_POOL):
                if stream.cuda_stream not in taken:
                    break
                stream = torch.cuda.Stream(torch.device("cuda", device), priority=-1 if urgent else 0)
            _STREAMS[device, purpose] = stream
        return _STREAMS[device, purpose]


class Passed(Protocol):
    """A point on a stream, as ``torch.cuda.Event``."""

    def query(self) -> bool:
        """Return whether the stream has come to this point."""

    def synchronize(self) -> None:
        """Wait until it has."""


class Stream(Protocol):
    """What :class:`Held` needs of a stream, as ``torch.cuda.Stream`` has it."""

    def record_event(self, event: torch.cuda.Event | None = None) -> object: ...


def _recorded(stream: Stream) -> Passed:
    import torch

    event = torch.cuda.Event(blocking=True)
    stream.record_event(event)
    return event


class Held:
    """Outputs of other libraries, kept until the consumer's stream no longer reads them.

    torch frees its own memory in the order of the streams that used it. Memory that it took over through
    DLPack goes back to its owner as soon as Python lets go of the tensor, whatever kernels still read it.

    Parameters
    ----------
    record
        Makes an event on a stream; a parameter for tests without a GPU.
    """

    def __init__(self, record: Callable[[Stream], Passed] = _recorded) -> None:
        self._record = record
        self._latest: tuple[Sequence[object], Stream] | None = None
        self._before: deque[tuple[Passed, Sequence[object]]] = deque()

    def hand_over(self, outputs: Sequence[object], stream: Stream) -> None:
        """Keep `outputs`, which `stream` uses from now on, and let go of those that it has used.

        What the stream was asked for until now used the outputs of the call before, so those may go when it
        gets to this point.
        """
        self._mark()
        if outputs:
            self._latest = outputs, stream
        while self._before and self._before[0][0].query():
            self._before.popleft()

    def _mark(self) -> None:
        if self._latest is not None:
            outputs, stream = self._latest
            self._before.append((self._record(stream), outputs))
            self._latest = None

    def close(self) -> None:
        """Wait until everything that was handed over has been used, and let go of it."""
        self._mark()
        while self._before:
            self._before[0][0].synchronize()
            self._before.popleft()

    def __del__(self) -> None:
        with contextlib.suppress(Exception):  # at the end of the interpreter CUDA may be gone before
            self.close()
