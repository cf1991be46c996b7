"""Memory of other libraries outlives what a stream still does with it."""

from __future__ import annotations

import gc
import threading
import weakref
from typing import Any

from hbx_gpu._streams import Held
from tests.emulation.streams import Stream


class Output:
    """Stands for a tensor whose memory goes back to its owner with the last reference."""


class Event:
    def __init__(self, stream: Stream) -> None:
        self._event = stream.event()

    def query(self) -> bool:
        return self._event.passed.is_set()

    def synchronize(self) -> None:
        self._event.wait()


def recorded(stream: Any) -> Event:
    return Event(stream)


def test_outputs_stay_until_their_stream_has_used_them() -> None:
    stream: Any = Stream()
    held, gate = Held(recorded), threading.Event()
    first, second = Output(), Output()
    alive = weakref.ref(first), weakref.ref(second)
    held.hand_over([first], stream)
    stream.order(gate.wait)  # what the consumer does with the first
    del first
    held.hand_over([second], stream)
    del second
    assert all(ref() is not None for ref in alive)
    held.hand_over([], stream)
    assert all(ref() is not None for ref in alive)
    gate.set()
    stream.synchronize()
    held.hand_over([], stream)
    assert all(ref() is None for ref in alive)


def test_the_end_waits() -> None:
    stream: Any = Stream()
    held, gate = Held(recorded), threading.Event()
    output = Output()
    alive = weakref.ref(output)
    seen: list[bool] = []
    held.hand_over([output], stream)

    def use() -> None:
        gate.wait()
        seen.append(alive() is not None)

    stream.order(use)
    del output
    threading.Timer(0.05, gate.set).start()
    del held
    gc.collect()
    assert seen == [True]
    assert alive() is None
