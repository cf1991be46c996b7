"""Chunks from object storage stay in memory for later windows: the same batches, and none of them stale."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from hbx_gpu._datasets.cells import CellDataset
from hbx_gpu._loading.loader import CellLoader
from hbx_gpu._remote import stores
from hbx_gpu._remote.fetch import Body, Fetcher, from_store
from hbx_gpu._remote.link import Link
from hbx_gpu._remote.places import Place
from hbx_gpu._storage import remote
from hbx_gpu._storage.cache import ChunkCache
from hbx_gpu._storage.chunks import Extents
from hbx_gpu._storage.held import HeldChunks, default_most
from hbx_gpu._storage.readers import MmapReader
from hbx_gpu.atlas import RaggedAtlas
from hbx_gpu.dataloader import make_loader
from hbx_gpu.errors import CorruptChunkError
from tests.remote.range_server import RangeServer
from tests.remote.test_writing import fill, h5ad

Make = Callable[..., RangeServer]


def chunks(first: int, n: int, nbytes: int = 10) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Chunks of object 0: objects, offsets, sizes, and a buffer that holds them one after the other."""
    at = np.arange(first, first + n)
    return np.zeros(n, np.int64), at * nbytes, np.full(n, nbytes), np.repeat(at, nbytes).astype(np.uint8)


def add(held: HeldChunks, first: int, n: int) -> None:
    objects, offset, nbytes, buffer = chunks(first, n)
    held.add(
        objects,
        offset,
        nbytes,
        np.uint64(buffer.ctypes.data) + np.arange(n, dtype=np.uint64) * np.uint64(10),
        buffer,
    )


def there(held: HeldChunks, first: int, n: int) -> list[bool]:
    objects, offset, nbytes, _ = chunks(first, n)
    address, owners = held.find(objects, offset, nbytes)
    found: list[bool] = (address > 0).tolist()
    assert found == held.has(objects, offset).tolist()
    buffers = [np.asarray(owner) for owner in owners]
    for at, where in zip(range(first, first + n), address.tolist(), strict=True):
        if where:
            owner = next(one for one in buffers if 0 <= where - one.ctypes.data < one.nbytes)
            inside = where - owner.ctypes.data
            assert owner[inside : inside + 10].tolist() == [at] * 10
    return found


def test_what_was_used_longest_ago_goes_first() -> None:
    held = HeldChunks(most=100)
    add(held, 0, 4)
    add(held, 4, 4)
    assert there(held, 0, 9) == [True] * 8 + [False]
    there(held, 0, 1)
    add(held, 8, 4)
    assert held.nbytes == 80
    assert there(held, 0, 12) == [True] * 4 + [False] * 4 + [True] * 4
    add(held, 20, 11)  # larger than the bound
    assert there(held, 20, 11) == [False] * 11
    objects, offset, nbytes, _ = chunks(0, 1)
    assert held.find(objects, offset, nbytes + 1)[0].tolist() == [0]
    assert held.find(objects + 1, offset, nbytes)[0].tolist() == [0]


def test_the_bound_is_a_part_of_the_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    assert 0 < default_most() <= 1 << 30
    monkeypatch.setattr("os.sysconf", lambda _: 1 << 12, raising=False)
    assert default_most() == 1 << 20


@pytest.fixture
def server(range_server: Make, tmp_path: Path) -> RangeServer:
    """A server of an atlas of 300 cells in several chunks."""
    made = range_server()
    files = [h5ad(tmp_path / f"{seed}.h5ad", seed, 100) for seed in range(3)]
    fill(made.root / "bucket" / "atlas", *files)
    return made


def loader(server: RangeServer) -> CellLoader:
    atlas = RaggedAtlas.checkout_latest("s3://bucket/atlas", storage_options=server.s3_options)
    return make_loader(
        atlas.query().to_cell_dataset(), batch_size=20, layout="dense", shuffle=True, seed=1, window=2
    )


def test_later_windows_ask_for_nothing_that_came_before(
    server: RangeServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(remote, "_LOOK", 1e9)
    mine = loader(server)
    here = RaggedAtlas.checkout_latest(server.root / "bucket" / "atlas").query().to_cell_dataset()
    expected = make_loader(here, batch_size=20, layout="dense", shuffle=True, seed=1)
    for epoch in range(2):
        for got, wanted in zip(mine, expected, strict=True):
            assert (got["X"] == wanted["X"]).all()
        stats = mine.stats()
        if epoch == 0:
            assert 0 < 4 * stats.bytes_moved < stats.bytes_wanted
    assert (stats.requests, stats.bytes_moved) == (0, 0)
    assert stats.cache_hits > 0
    # A single read, outside of a loader, keeps nothing.
    server.log.clear()
    assert isinstance(mine.dataset, CellDataset)
    mine.dataset.__getitems__(np.arange(4))
    assert server.requests("GET", "/c/")


def test_a_piece_is_kept_while_others_are_on_their_way(
    server: RangeServer, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    atlas = RaggedAtlas.checkout_latest("s3://bucket/atlas", storage_options=server.s3_options)
    dataset = atlas.query().to_cell_dataset()
    assert isinstance(dataset, CellDataset)
    directory = dataset.directory
    extents = directory.extents(np.arange(directory.base[-1]))
    monkeypatch.setattr(remote, "_PIECE", 1)
    cache = ChunkCache(tmp_path / "cache")
    last = max(directory.paths)
    first = next(path for path in directory.paths if path != last)

    def fetch(place: Place, begin: int, end: int, version: str) -> Body:
        until = time.monotonic() + 10
        while str(place) == last and not cache.has(*of_first).all():
            assert time.monotonic() < until, "the first piece waits for the last one"
            time.sleep(0.01)
        return from_store(place, begin, end, version)

    with remote.RemoteReader(directory, fetcher=Fetcher(fetch), cache=cache) as reader:
        number = directory.paths.index(first)
        version, size = directory.identities[number]
        mine = extents.file == number
        of_first = (
            np.full(mine.sum(), cache.object_number(first, str(version), size)),
            extents.offset[mine],
        )
        slab = reader.read(extents)
    local = RaggedAtlas.checkout_latest(server.root / "bucket" / "atlas").query().to_cell_dataset()
    assert isinstance(local, CellDataset)
    with MmapReader(local.directory) as here:
        expected = here.read(local.directory.extents(np.arange(directory.base[-1])))
        for i in range(len(extents)):
            assert np.array_equal(slab.view(i), expected.view(i))


@pytest.mark.parametrize("change", ["replaced", "removed"])
def test_an_object_that_changes_is_an_error_though_its_chunks_are_held(
    server: RangeServer, monkeypatch: pytest.MonkeyPatch, change: str
) -> None:
    monkeypatch.setattr(remote, "_LOOK", 0.0)
    mine = loader(server)
    assert sum(len(batch["index"]) for batch in mine) == 300
    one = next(path for path in (server.root / "bucket/atlas/zarr_store").rglob("c/*") if path.is_file())
    if change == "replaced":
        one.write_bytes(one.read_bytes()[::-1])
    else:
        one.unlink()
    with pytest.raises(CorruptChunkError, match=r"changed|missing"):
        list(mine)


def test_a_store_that_is_away_for_a_moment_does_not_matter(
    server: RangeServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(remote, "_LOOK", 0.0)
    mine = loader(server)
    list(mine)
    monkeypatch.setattr(stores, "head", lambda place: stores.fail(place, OSError("timed out")))
    assert sum(len(batch["index"]) for batch in mine) == 300


def test_gaps_are_read_over_where_what_lies_between_is_kept(
    server: RangeServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """However little a request costs, small gaps are not worth one: a later window needs what is there."""
    monkeypatch.setattr(Link, "gap", lambda _: 0)
    dataset = loader(server).dataset
    assert isinstance(dataset, CellDataset)
    dataset.__getitems__(np.arange(4))
    apart = Extents(np.zeros(2, np.int32), np.array([0, 50_000]), np.array([10, 10]))
    reader = remote.RemoteReader(dataset.directory)
    assert len(reader._runs(apart, 0).nbytes) == 2
    assert reader._runs(apart, remote._KEPT_GAP).nbytes.tolist() == [50_010]
