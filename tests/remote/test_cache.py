"""The cache of chunks on the local disk: what it holds is right, whoever writes, dies or removes."""

from __future__ import annotations

import ctypes
import os
import shutil
import subprocess
import sys
import threading
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from hbx_gpu._storage import cache as cache_module
from hbx_gpu._storage.cache import ChunkCache
from hbx_gpu.errors import ResourceError
from tests.emulation.build import outer_environment


class Chunks:
    """Random chunks of one object, and the arrays that a cache takes."""

    def __init__(self, n: int = 50, seed: int = 0, url: str = "s3://b/object") -> None:
        draws = np.random.default_rng(seed)
        self.url = url
        self.nbytes = draws.integers(1, 3000, n)
        self.offset = np.cumsum(self.nbytes + 7)
        self.memory = [draws.integers(0, 256, size, dtype=np.uint8) for size in self.nbytes]
        self.address = np.array([part.ctypes.data for part in self.memory], np.uint64)

    def objects(self, cache: ChunkCache, version: str = '"1"') -> np.ndarray:
        return np.full(len(self.nbytes), cache.object_number(self.url, version, 10**6))

    def put(self, cache: ChunkCache) -> None:
        cache.add(self.objects(cache), self.offset, self.nbytes, self.address, self.memory)

    def found(self, cache: ChunkCache, version: str = '"1"') -> np.ndarray:
        """Which chunks the cache has; those that it has are compared."""
        address, owners = cache.find(self.objects(cache, version), self.offset, self.nbytes)
        for at, nbytes, memory in zip(address.tolist(), self.nbytes.tolist(), self.memory, strict=True):
            if at:
                assert ctypes.string_at(at, nbytes) == memory.tobytes()
        del owners
        return address > 0


def test_chunks_are_found_before_and_after_they_are_written(tmp_path: Path) -> None:
    cache, chunks = ChunkCache(tmp_path, 1 << 24), Chunks()
    assert not chunks.found(cache).any()
    chunks.put(cache)
    assert chunks.found(cache).all()
    cache.flush()
    assert chunks.found(cache).all()
    assert len(list(tmp_path.glob("*.chunks"))) == 1
    assert not chunks.found(cache, version='"2"').any()


def test_nobody_waits_for_the_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Chunks are found while a thread writes them; with too many of them, adding waits for the disk."""
    cache, begun, go_on = ChunkCache(tmp_path, 1 << 20), threading.Event(), threading.Event()
    write = cache._write

    def slow(*arguments: Any) -> Any:
        begun.set()
        assert go_on.wait(60)
        return write(*arguments)

    monkeypatch.setattr(cache, "_write", slow)
    chunks = Chunks(200)
    assert int(chunks.nbytes.sum()) > cache._segment
    chunks.put(cache)
    assert begun.wait(60)
    assert chunks.found(cache).all()
    assert not list(tmp_path.glob("*.chunks"))
    go_on.set()
    cache.flush()
    assert len(list(tmp_path.glob("*.chunks"))) >= 1
    monkeypatch.setattr(cache_module, "_MOST_WAITING", 0)
    more = Chunks(200, url="s3://b/other")
    more.put(cache)
    assert not cache._pending
    assert more.found(cache).all()


def test_another_process_finds_what_was_written(tmp_path: Path) -> None:
    code = (
        "import sys; from pathlib import Path; from hbx_gpu._storage.cache import cache_at; "
        "from tests.remote.test_cache import Chunks; Chunks().put(cache_at(sys.argv[1], 1 << 24))"
    )
    mine = ChunkCache(tmp_path, 1 << 24)
    # It is not told to write: what waits is written when a process ends.
    subprocess.run(
        [sys.executable, "-c", code, str(tmp_path)], env=outer_environment(), check=True, timeout=60
    )
    mine._looked_at = 0.0
    assert Chunks().found(mine).all()
    assert Chunks().found(ChunkCache(tmp_path, 1 << 24)).all()


@pytest.mark.parametrize("place", [0, 5000, -1, -20, -60])
def test_a_damaged_segment_is_dropped(tmp_path: Path, place: int) -> None:
    first = ChunkCache(tmp_path, 1 << 24)
    Chunks().put(first)
    first.flush()
    segment = next(tmp_path.glob("*.chunks"))
    content = bytearray(segment.read_bytes())
    content[place] ^= 1
    segment.write_bytes(content)
    other = ChunkCache(tmp_path, 1 << 24)
    assert not Chunks().found(other).any()
    Chunks().put(other)
    other.flush()
    assert Chunks().found(ChunkCache(tmp_path, 1 << 24)).all()


@pytest.mark.parametrize("left", [0, 10, 40, 20_000])
def test_a_segment_cut_short_is_dropped(tmp_path: Path, left: int) -> None:
    first = ChunkCache(tmp_path, 1 << 24)
    Chunks().put(first)
    first.flush()
    segment = next(tmp_path.glob("*.chunks"))
    segment.write_bytes(segment.read_bytes()[:left])
    assert not Chunks().found(ChunkCache(tmp_path, 1 << 24)).any()


def test_what_is_removed_stays_readable_and_is_missing_afterwards(tmp_path: Path) -> None:
    cache, chunks = ChunkCache(tmp_path, 1 << 24), Chunks()
    chunks.put(cache)
    cache.flush()
    address, owners = cache.find(chunks.objects(cache), chunks.offset, chunks.nbytes)
    for segment in tmp_path.glob("*.chunks"):
        segment.unlink()
    assert chunks.found(cache).all()  # still mapped
    assert not chunks.found(ChunkCache(tmp_path, 1 << 24)).any()
    del address, owners


def test_the_bound_is_kept_and_the_oldest_goes_first(tmp_path: Path) -> None:
    cache = ChunkCache(tmp_path, 1 << 20)
    all_chunks = [Chunks(n=100, seed=seed, url=f"s3://b/{seed}") for seed in range(12)]
    for chunks in all_chunks:
        chunks.put(cache)
        cache.flush()
        assert sum(path.stat().st_size for path in tmp_path.iterdir()) <= 1 << 20
    fresh = ChunkCache(tmp_path, 1 << 20)
    assert all_chunks[-1].found(fresh).all()
    assert not all_chunks[0].found(fresh).any()


def test_a_cache_that_cannot_be_written_is_no_error(tmp_path: Path) -> None:
    cache, chunks = ChunkCache(tmp_path / "cache", 1 << 24), Chunks()
    (tmp_path / "cache").rmdir()
    (tmp_path / "cache").write_bytes(b"in the way")
    chunks.put(cache)
    assert chunks.found(cache).all()  # not written yet
    cache.flush()
    assert not chunks.found(cache).any()
    assert [path.name for path in tmp_path.iterdir()] == ["cache"]


def test_a_cache_takes_half_of_the_disk_and_needs_some_room(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "there.chunks").write_bytes(bytes(1000))
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=5 << 20))
    assert ChunkCache(tmp_path).most == ((5 << 20) + 1000) // 2
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=3 << 20))
    with pytest.raises(ResourceError, match="3,145,728 bytes are free"):
        ChunkCache(tmp_path)


def test_what_is_used_goes_last(tmp_path: Path) -> None:
    cache = ChunkCache(tmp_path, 1 << 20)
    all_chunks = [Chunks(n=100, seed=seed, url=f"s3://b/{seed}") for seed in range(12)]
    for i, chunks in enumerate(all_chunks):
        chunks.put(cache)
        cache.flush()
        for path in tmp_path.iterdir():
            os.utime(path, (i, i))
        cache._touched.clear()  # as after a minute
        assert all_chunks[0].found(cache).all()
    fresh = ChunkCache(tmp_path, 1 << 20)
    assert all_chunks[0].found(fresh).all()
    assert not all_chunks[1].found(fresh).any()


def test_chunks_of_another_size_are_others(tmp_path: Path) -> None:
    cache, chunks = ChunkCache(tmp_path, 1 << 24), Chunks()
    chunks.put(cache)
    objects = chunks.objects(cache)
    for _ in range(2):
        assert not cache.find(objects, chunks.offset, chunks.nbytes + 1)[0].any()
        assert cache.find(objects, chunks.offset, chunks.nbytes)[0].all()
        cache.flush()
    assert cache.object_number(chunks.url, '"1"', 10**6 + 1) != objects[0]


def test_few_segments_are_mapped_and_few_of_their_pages_held(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cache_module, "_MOST_MAPS", 2)
    monkeypatch.setattr(cache_module, "_MAPPED", 0)
    cache = ChunkCache(tmp_path, 1 << 24)
    all_chunks = [Chunks(seed=seed, url=f"s3://b/{seed}") for seed in range(4)]
    for chunks in all_chunks:
        chunks.put(cache)
        cache.flush()
    for chunks in all_chunks:
        address, owners = cache.find(chunks.objects(cache), chunks.offset, chunks.nbytes)
        assert resident(tmp_path) == 0
        assert chunks.found(cache).all()
        del address, owners
    assert len(cache._maps) == 2


def resident(folder: Path) -> int:
    """Kilobytes of the maps of files in a folder that are in the memory of this process."""
    total, mine = 0, False
    for line in Path("/proc/self/smaps").read_text().splitlines():
        if "-" in line.partition(" ")[0]:
            mine = str(folder) in line
        elif mine and line.startswith("Rss:"):
            total += int(line.split()[1])
    return total


def test_unfinished_files_do_not_count_and_are_removed_in_the_end(tmp_path: Path) -> None:
    old, new = tmp_path / ".old.new", tmp_path / ".new.new"
    for path in (old, new):
        path.write_bytes(b"half")
    os.utime(old, (0, 0))
    cache = ChunkCache(tmp_path, 1 << 24)
    Chunks().put(cache)
    cache.flush()
    assert new.exists()
    assert not old.exists()
    assert Chunks().found(cache).all()


def test_two_threads_bring_a_chunk_once(tmp_path: Path) -> None:
    cache, chunks = ChunkCache(tmp_path, 1 << 24), Chunks()
    objects = chunks.objects(cache)
    first, claim, others = cache.claims.claim(objects[:30], chunks.offset[:30])
    assert first.all()
    assert not others
    mine, second, others = cache.claims.claim(objects[20:], chunks.offset[20:])
    assert mine.tolist() == [False] * 10 + [True] * 20
    assert others == [claim]
    assert not claim.done.is_set()
    cache.claims.release(claim)
    assert claim.done.is_set()
    cache.claims.release(second)
    assert cache.claims.claim(objects, chunks.offset)[0].all()


def test_a_folder_that_is_removed_is_made_again(tmp_path: Path) -> None:
    cache, chunks = ChunkCache(tmp_path / "cache", 1 << 24), Chunks()
    (tmp_path / "cache").rmdir()
    cache._looked_at = -10.0
    assert not chunks.found(cache).any()
    chunks.put(cache)
    cache.flush()
    assert chunks.found(ChunkCache(tmp_path / "cache", 1 << 24)).all()
