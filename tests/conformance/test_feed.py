"""What makes windows of batches: every feed passes the same suite."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import pytest

from hbx_gpu._loading.feeds.device import DeviceFeed
from hbx_gpu._loading.feeds.host import HostFeed
from hbx_gpu._loading.feeds.multimodal import CopiedFeed, DenseFeed, LayersFeed, MultimodalFeed
from hbx_gpu._loading.feeds.tokens import TokenFeed
from hbx_gpu._loading.make import build_loader, device_loader
from hbx_gpu._loading.options import LoaderOptions
from hbx_gpu._protocols import Feed
from hbx_gpu.scdl._sources.pairs import PairFeed
from hbx_gpu.tokens import ExpressedGenes
from tests.conformance.datasets import STORED, of_shared
from tests.dense_stores import on_cpu, same
from tests.emulation.backend import EmulatedBackend
from tests.emulation.streams import StreamBackend

A, B = np.array([3, 1, 1, 0, 5], np.int64), np.array([2, 4], np.int64)
FEEDS: dict[str, tuple[str, str, type]] = {
    "host": ("sparse", "csr", HostFeed),
    "host, dense": ("matrix", "dense", HostFeed),
    "host, multimodal": ("multimodal", "dense", HostFeed),
    "host, pairs": ("pairs", "dense", HostFeed),
    "device, csr": ("sparse", "csr", DeviceFeed),
    "device, dense": ("sparse", "dense", DeviceFeed),
    "device, layers": ("two_layers", "dense", LayersFeed),
    "device, matrix": ("matrix", "dense", DenseFeed),
    "device, tiles": ("tiles", "dense", DenseFeed),
    "device, copied": ("fragments", "dense", CopiedFeed),
    "device, multimodal": ("multimodal", "dense", MultimodalFeed),
    "device, tokens": ("sparse", "tokens", TokenFeed),
    "device, pairs": ("pairs", "dense", PairFeed),
}


@pytest.fixture(scope="module", params=FEEDS)
def name(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(scope="module")
def dataset(name: str, tmp_path_factory: pytest.TempPathFactory, request: pytest.FixtureRequest) -> Any:
    kind = FEEDS[name][0]
    if kind in STORED:
        return STORED[kind](tmp_path_factory.mktemp(kind) / "arrays")
    return of_shared(request.getfixturevalue("shared"))[kind]()


def options_for(name: str, dataset: Any, **more: Any) -> LoaderOptions:
    """Options of a loader; tokens without draws, which are the same in all epochs."""
    layout = FEEDS[name][1]
    if layout == "tokens":
        words = {str(uid): i for i, uid in enumerate(dataset.feature_uids)}
        more["tokens"] = ExpressedGenes(words, length=20, pad=99)
    return LoaderOptions(layout=layout, num_workers=0, **more)


def made(name: str, dataset: Any, backend: Any = None) -> Any:
    """The feed that a loader makes itself."""
    kind = FEEDS[name][2]
    options = options_for(name, dataset, decode="device")
    if name.startswith("host"):
        loader = build_loader(dataset, [[0]], None, "cpu", options)
    else:
        loader = device_loader(dataset, [[0]], backend or EmulatedBackend(), options)
    feed = loader.feed
    assert isinstance(feed, kind)
    return feed


@pytest.fixture
def feed(name: str, dataset: Any) -> Any:
    return made(name, dataset)


@pytest.fixture(scope="module")
def expected(name: str, dataset: Any) -> list[Any]:
    """Batches A and B as the host makes them one by one."""
    with build_loader(dataset, [A, B], None, "cpu", options_for(name, dataset)) as loader:
        return [on_cpu(batch) for batch in loader]


def test_it_is_one(feed: Any) -> None:
    assert isinstance(feed, Feed)
    assert feed.one_batch_per_window is False


def test_row_numbers_are_checked(feed: Any, dataset: Any) -> None:
    n = len(dataset)
    assert [rows.tolist() for rows in feed.checked([[0, -1], B])] == [[0, n - 1], B.tolist()]
    with pytest.raises(IndexError):
        feed.checked([B, [n]])


def test_bytes_are_told_for_each_batch(feed: Any) -> None:
    sizes = feed.nbytes([A, B, A[:0]])
    assert [type(size) for size in sizes] == [int] * 3
    assert sizes[0] > 0
    assert sizes[2] == 0
    assert feed.nbytes([B]) == [sizes[1]]


def test_batches_of_a_window_are_those_made_alone(feed: Any, expected: list[Any]) -> None:
    found = [on_cpu(feed.deliver(entry)) for entry in feed.make([A, B])]
    same(found, expected)
    alone = [on_cpu(feed.deliver(*feed.make([rows]))) for rows in (A, B)]
    same(alone, expected)


def test_windows_made_on_several_threads_stay_apart(feed: Any, expected: list[Any]) -> None:
    with ThreadPoolExecutor(3) as pool:
        windows = list(pool.map(feed.make, [[A, B], [B], [A, A]]))
    delivered = [[feed.deliver(entry) for entry in window] for window in windows]
    wanted = [[0, 1], [1], [0, 0]]
    for batches, numbers in zip(delivered, wanted, strict=True):  # delivered before any is looked at
        same([on_cpu(batch) for batch in batches], [expected[i] for i in numbers])


def test_windows_that_nobody_takes_disturb_no_others(name: str, dataset: Any, expected: list[Any]) -> None:
    """On streams that lag behind: what the device still reads and writes is nobody else's."""
    backend = StreamBackend(delay=0.003)
    feed = made(name, dataset, backend)
    for _ in range(2):
        first, second = feed.make([A, B])
        kept = feed.make([B, A])
        del first
        delivered = [feed.deliver(entry) for entry in kept]
        backend.consumer.synchronize()  # a hand-over makes the consumer's stream wait, not this thread
        same([on_cpu(batch) for batch in delivered], expected[::-1])
        del second


def test_epochs_may_be_told(feed: Any, expected: list[Any]) -> None:
    for epoch in (0, 7):
        feed.set_epoch(epoch)
        same([on_cpu(feed.deliver(entry)) for entry in feed.make([A, B])], expected)


def test_nothing_made_is_nothing(feed: Any) -> None:
    assert feed.checked([]) == []
    assert feed.nbytes([]) == []
