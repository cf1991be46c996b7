"""Ranges that are fetched at once: right bytes or a clear error, whatever a store answers; nothing hangs."""

from __future__ import annotations

import random
import threading
import time
from dataclasses import dataclass, field
from types import SimpleNamespace

import numpy as np
import pytest

from hbx_gpu._remote import fetch, stores
from hbx_gpu._remote.fetch import Body, Fetcher, Range
from hbx_gpu._remote.files import RemoteFile
from hbx_gpu._remote.link import Link
from hbx_gpu._remote.places import Place
from hbx_gpu._remote.stores import ObjectInfo
from hbx_gpu.errors import RemoteError, ReplacedError

CONTENT = np.random.default_rng(0).integers(0, 256, 1 << 16, dtype=np.uint8)
INFO = ObjectInfo(len(CONTENT), '"1"')
PLACE = Place("s3://bucket/object")
KINDS = ["error", "short", "long", "late", "refused", "replaced", "gone", "empty"]
FINAL = {"refused", "replaced", "gone"}


@dataclass
class Answer:
    """A body as a store sends it."""

    info: ObjectInfo
    content: bytes
    wait: float = 0.0

    def take(self) -> memoryview:
        time.sleep(self.wait)
        return memoryview(self.content)


@dataclass
class FaultyStore:
    """Answers for one object, of which a share goes wrong in one of several ways."""

    share: float
    seed: int = 0
    kinds: list[str] = field(default_factory=lambda: list(KINDS))
    faults: int = 0
    at_once: int = 0
    most: int = 0

    def __post_init__(self) -> None:
        self._draws, self._lock = random.Random(self.seed), threading.Lock()

    def __call__(self, place: Place, begin: int, end: int, version: str) -> Body:
        assert (place, version) == (PLACE, INFO.version)
        with self._lock:
            self.at_once += 1
            self.most = max(self.most, self.at_once)
            kind = self._draws.choice(self.kinds) if self._draws.random() < self.share else ""
            self.faults += bool(kind)
        try:
            return self._answer(kind, CONTENT[begin:end].tobytes())
        finally:
            with self._lock:
                self.at_once -= 1

    def _answer(self, kind: str, content: bytes) -> Body:
        if kind == "error":
            raise RemoteError("the store is overloaded (503)")
        if kind == "refused":
            error = RemoteError("the store refuses access")
            error.transient = False
            raise error
        if kind == "gone":
            raise FileNotFoundError("no such object")
        if kind == "replaced":
            return Answer(ObjectInfo(len(CONTENT), '"2"'), content)
        changed = {"short": content[:-1], "long": content + b"x", "empty": b""}.get(kind, content)
        return Answer(INFO, changed, 0.001 if kind == "late" else 0.0)


def ranges(seed: int, n: int) -> list[Range]:
    draws = np.random.default_rng(seed)
    begin = draws.integers(0, len(CONTENT) - 200, n)
    nbytes = draws.integers(1, 200, n)
    return [Range(PLACE, int(b), int(b + k), INFO) for b, k in zip(begin, nbytes, strict=True)]


def targets_for(wanted: list[Range]) -> list[np.ndarray]:
    return [np.zeros(one.end - one.begin, np.uint8) for one in wanted]


def at_once(_: float) -> None:
    """No waiting between attempts."""


def test_all_ranges_come() -> None:
    wanted = ranges(0, 300)
    targets = targets_for(wanted)
    moved = Fetcher(FaultyStore(0.0)).into(wanted, targets)
    assert (moved.requests, moved.nbytes) == (300, sum(map(len, targets)))
    for one, target in zip(wanted, targets, strict=True):
        assert np.array_equal(target, CONTENT[one.begin : one.end])


def faults(n: int) -> None:
    """Fetch until so many requests went wrong."""
    seen = right = wrong = seed = 0
    while seen < n:
        seed += 1
        kinds = KINDS if seed % 2 else [kind for kind in KINDS if kind not in FINAL]
        store = FaultyStore(share=random.Random(seed).choice([0.02, 0.1, 0.3]), seed=seed, kinds=list(kinds))
        wanted = ranges(seed, 100)
        targets = targets_for(wanted)
        try:
            Fetcher(store, sleep=at_once).into(wanted, targets)
        except (RemoteError, FileNotFoundError):
            wrong += 1
        else:
            right += 1
            for one, target in zip(wanted, targets, strict=True):
                assert np.array_equal(target, CONTENT[one.begin : one.end])
        assert store.at_once == 0  # nothing goes on after the call
        seen += store.faults
    assert right
    assert wrong


def test_a_thousand_faults() -> None:
    faults(1000)


@pytest.mark.long
@pytest.mark.slow
def test_ten_thousand_faults() -> None:
    faults(10_000)


@pytest.mark.parametrize(
    ("kind", "error", "tried"),
    [
        ("error", RemoteError, 6), ("short", RemoteError, 6), ("refused", RemoteError, 1),
        ("replaced", ReplacedError, 1), ("gone", FileNotFoundError, 1),
    ],
)  # fmt: skip
def test_what_cannot_get_better_is_not_tried_again(kind: str, error: type[Exception], tried: int) -> None:
    store = FaultyStore(1.0, kinds=[kind])
    with pytest.raises(error):
        Fetcher(store, sleep=at_once).into(ranges(0, 1), targets_for(ranges(0, 1)))
    assert store.faults == tried


def test_waits_grow_and_have_a_bound() -> None:
    waited: list[float] = []
    with pytest.raises(RemoteError, match="tried 6 times"):
        Fetcher(FaultyStore(1.0, kinds=["error"]), sleep=waited.append).into(
            ranges(0, 1), targets_for(ranges(0, 1))
        )
    assert len(waited) == 5
    assert waited[-1] > 3 * waited[0]
    assert max(waited) <= 5


def test_nothing_is_tried_again_after_two_minutes(monkeypatch: pytest.MonkeyPatch) -> None:
    now = 0.0

    def wait(_: float) -> None:
        nonlocal now
        now += 50.0

    monkeypatch.setattr(fetch, "time", SimpleNamespace(monotonic=lambda: now))
    with pytest.raises(RemoteError, match="tried 4 times"):
        Fetcher(FaultyStore(1.0, kinds=["error"]), sleep=wait).into(ranges(0, 1), targets_for(ranges(0, 1)))


def test_one_range_that_fails_for_good_ends_the_attempts_of_the_others() -> None:
    waits, tried = threading.Event(), 0

    def ask(place: Place, begin: int, end: int, version: str) -> Body:
        nonlocal tried
        del place, end, version
        if begin == 0:
            waits.wait()
            raise FileNotFoundError("no such object")
        tried += 1
        raise RemoteError("the store is overloaded (503)")

    def wait(_: float) -> None:
        waits.set()
        time.sleep(0.1)

    wanted = [Range(PLACE, begin, begin + 10, INFO) for begin in (0, 10)]
    with pytest.raises(FileNotFoundError):
        Fetcher(ask, sleep=wait).into(wanted, targets_for(wanted))
    assert tried < 6


def test_bytes_under_way_have_a_bound() -> None:
    held: list[int] = []
    lock = threading.Lock()
    now = 0

    def ask(place: Place, begin: int, end: int, version: str) -> Body:
        nonlocal now
        del place, version
        with lock:
            now += end - begin
            held.append(now)
        time.sleep(0.002)
        with lock:
            now -= end - begin
        return Answer(INFO, CONTENT[begin:end].tobytes())

    wanted = [Range(PLACE, k, k + 1000, INFO) for k in range(0, 40_000, 1000)]
    Fetcher(ask, held=4000).into(wanted, targets_for(wanted))
    assert max(held) <= 4000
    big = [Range(PLACE, 0, 20_000, INFO)]  # more than the bound: alone
    Fetcher(ask, held=4000).into(big, targets_for(big))


def _times(latency: float, bandwidth: float, n: int = 200, nbytes: int = 100_000) -> Link:
    """A link on which requests run one after the other."""
    now = 0.0
    link = Link(clock=lambda: now)
    for _ in range(n):
        begin = link.began()
        now += latency
        first = now
        now += nbytes / bandwidth
        link.ended(begin, first, nbytes)
    return link


def test_gaps_follow_from_what_requests_cost() -> None:
    assert Link().gap() == 1 << 20
    assert Link().size(10**9) == 16 << 20
    slow, fast = _times(0.03, 100e6), _times(0.03, 1e9)
    cost = slow.cost()
    assert cost is not None
    assert cost.latency == pytest.approx(0.03)
    assert slow.gap() <= fast.gap() < 1 << 20
    # 64 requests share a latency of 30 ms, each has 0.3 ms of work, and 10 MB take 130 ms.
    request = 0.03 / 64 + 0.3e-3
    assert _times(0.03, 100e6, nbytes=10**7).gap() == pytest.approx(request * 10**7 / 0.13, rel=1e-3)
    # Half of the requests that may be under way at a time, within bounds.
    assert slow.size(64 << 20) == 2 << 20
    assert (slow.size(1), slow.size(1 << 40)) == (1 << 20, 16 << 20)


def test_nothing_is_known_before_there_are_requests() -> None:
    assert Link().cost() is None
    failed = Link()
    for _ in range(50):
        failed.ended(failed.began(), None, 0)
    assert failed.cost() is None
    assert _times(0.03, 1e9, n=15).cost() is None
    assert _times(0.03, 1e9, n=16).cost() is not None


def test_a_file_of_the_same_size_that_was_replaced_while_it_is_read(monkeypatch: pytest.MonkeyPatch) -> None:
    place = Place("s3://bucket/a.h5ad")
    monkeypatch.setattr(stores, "head", lambda _: ObjectInfo(4, "one"))
    monkeypatch.setattr(stores, "get", lambda *_: (b"abcd", ObjectInfo(4, "two")))
    with pytest.raises(ReplacedError, match="while it was read"):
        RemoteFile(place).read(4)
