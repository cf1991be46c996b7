"""ChunkDirectory: numbering, lazy indexes, damage to shards, threads and pickles."""

from __future__ import annotations

import os
import pickle
import struct
import threading
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import google_crc32c
import numpy as np
import pytest
import zarr

from hbx_gpu._source import ArrayLayout, ChunkTable, Codec
from hbx_gpu._storage import ChunkDirectory, open_reader, read_layout
from hbx_gpu._storage.plain import plain_layout
from hbx_gpu.errors import CorruptChunkError, UnsupportedCodecError


def layout_of(path: Path, **changes: Any) -> ArrayLayout:
    defaults: Any = {
        "path": str(path),
        "name": f"set0/{path.name}",
        "shape": (1000,),
        "dtype": np.dtype(np.uint32),
        "chunk_shape": (10,),
        "shard_shape": (10,),
        "codecs": ({"name": "bytes", "configuration": {"endian": "little"}},),
    }
    return ArrayLayout(**(defaults | changes))


@pytest.fixture
def sharded(tmp_path: Path) -> ArrayLayout:
    """100 values in shards of 40 = 4 chunks of 10; the third shard is never written."""
    array = zarr.create_array(
        str(tmp_path), shape=(100,), dtype=np.uint32, chunks=(10,), shards=(40,), compressors=None
    )
    array[:80] = np.arange(1, 81)
    return read_layout(tmp_path, "set0/counts")


def rewrite_index(shard: Path, entries: list[tuple[int, int]], *, crc: int | None = None) -> None:
    raw = shard.read_bytes()
    index = b"".join(struct.pack("<QQ", *entry) for entry in entries)
    crc = google_crc32c.value(index) if crc is None else crc
    shard.write_bytes(raw[: len(raw) - len(index) - 4] + index + struct.pack("<I", crc))


def test_numbers_and_extents(sharded: ArrayLayout, tmp_path: Path) -> None:
    plain = layout_of(tmp_path / "none", shape=(25, 7), chunk_shape=(10, 4), shard_shape=(10, 4))
    directory = ChunkDirectory([plain, sharded, plain])
    assert directory.base.tolist() == [0, 6, 16, 22]
    assert directory.base.dtype == np.int64
    extents = directory.extents(np.array([6 + 9, 6, 7, 6, 0]))
    assert extents.nbytes.tolist() == [-1, 40, 40, 40, -1]
    assert extents.file.tolist() == [-1, 0, 0, 0, -1]
    assert extents.file.dtype == np.int32
    assert extents.offset.dtype == extents.nbytes.dtype == np.int64
    assert directory.paths == [str(Path(sharded.path, "c/0"))]
    assert len(directory.extents(np.array([], np.int64))) == 0


def test_locate_and_error_name_file_array_and_chunk(sharded: ArrayLayout) -> None:
    directory = ChunkDirectory([sharded])
    assert directory.locate(7) == (str(Path(sharded.path, "c/1")), "set0/counts", 7)
    error = directory.error(7, "is broken")
    assert (error.array, error.chunk, error.reason) == ("set0/counts", 7, "is broken")
    assert error.file.endswith("c/1")
    for wrong in (-1, 10):
        with pytest.raises(IndexError, match=rf"in 0\.\.9, found {wrong}"):
            directory.locate(wrong)
        with pytest.raises(IndexError, match=r"in 0\.\.9"):
            directory.extents(np.array([0, wrong]))


def test_absent_objects(sharded: ArrayLayout) -> None:
    os.remove(Path(sharded.path, "c/1"))
    assert ChunkDirectory([sharded]).extents(np.arange(10)).nbytes.tolist() == [40] * 4 + [-1] * 6
    strict = ChunkDirectory([replace(sharded, absent_is_fill=False)])
    assert strict.extents(np.arange(4)).nbytes.tolist() == [40] * 4
    with pytest.raises(
        CorruptChunkError, match=r"array 'set0/counts', file .*c/1\): shard 1: the object is m"
    ):
        strict.extents(np.arange(10))


def test_absent_plain_chunk(tmp_path: Path) -> None:
    plain = layout_of(tmp_path, name="set0/counts", key_prefix="", key_separator=".")
    (tmp_path / "3").write_bytes(bytes(12))
    extents = ChunkDirectory([plain]).extents(np.array([3, 4]))
    assert extents.nbytes.tolist() == [12, -1]
    with pytest.raises(CorruptChunkError, match=r"chunk 4: the object is missing"):
        ChunkDirectory([replace(plain, absent_is_fill=False)]).extents(np.array([3, 4]))


@pytest.mark.parametrize("position", range(0, 68, 7))
def test_flipped_bit_in_the_shard_index(sharded: ArrayLayout, position: int) -> None:
    shard = Path(sharded.path, "c/0")
    raw = bytearray(shard.read_bytes())
    raw[len(raw) - 68 + position] ^= 0x10
    shard.write_bytes(raw)
    directory = ChunkDirectory([sharded])
    for _ in range(2):  # a bad shard is not remembered as good
        with pytest.raises(CorruptChunkError, match=r"'set0/counts', file .*c/0\): shard 0: .*CRC32C"):
            directory.extents(np.array([0]))
    assert directory.extents(np.array([4])).nbytes.tolist() == [40]


@pytest.mark.parametrize("size", [0, 3, 67])
def test_shard_shorter_than_its_index(sharded: ArrayLayout, size: int) -> None:
    os.truncate(Path(sharded.path, "c/0"), size)
    with pytest.raises(CorruptChunkError, match=f"holds {size} bytes, its shard index alone takes 68"):
        ChunkDirectory([sharded]).extents(np.array([0]))


@pytest.mark.parametrize("cut", [1, 40, 100])
def test_truncated_shard_fails_its_checksum(sharded: ArrayLayout, cut: int) -> None:
    shard = Path(sharded.path, "c/0")
    os.truncate(shard, shard.stat().st_size - cut)
    with pytest.raises(CorruptChunkError, match="CRC32C"):
        ChunkDirectory([sharded]).extents(np.array([0]))


@pytest.mark.parametrize(
    "entry", [(229, 0), (200, 29), (0, 229), (2**64 - 1, 5), (5, 2**64 - 1), (2**63, 2**63), (2**64 - 8, 16)]
)
def test_index_entries_beyond_the_file(sharded: ArrayLayout, entry: tuple[int, int]) -> None:
    rewrite_index(Path(sharded.path, "c/0"), [(0, 40), (40, 40), entry, (120, 40)])
    with pytest.raises(CorruptChunkError, match=r"entry 2 of the shard index points to bytes .* holds 228"):
        ChunkDirectory([sharded]).extents(np.array([0]))


@pytest.mark.parametrize("entry", [(-1, 5), (96, 5), (101, 0)])
def test_chunks_that_a_file_lists_beyond_its_end(tmp_path: Path, entry: tuple[int, int]) -> None:
    path = tmp_path / "all.h5"
    path.write_bytes(bytes(100))
    for third in ((95, 5), (1 << 40, -1), entry):  # up to the end; never written; too far
        offset, nbytes = np.array([(0, 40), (40, 40), third], np.int64).T
        directory = ChunkDirectory([layout_of(path, shape=(30,), table=ChunkTable(offset, nbytes))])
        if third != entry:
            assert directory.extents(np.arange(3)).nbytes.tolist() == nbytes.tolist()
        else:
            with pytest.raises(CorruptChunkError, match=r"chunk 2, .*holds 100; the file was cut short"):
                directory.extents(np.arange(3))


def test_absent_inner_chunks(sharded: ArrayLayout) -> None:
    absent = (2**64 - 1, 2**64 - 1)
    rewrite_index(Path(sharded.path, "c/0"), [(0, 40), absent, (80, 40), absent])
    assert ChunkDirectory([sharded]).extents(np.arange(4)).nbytes.tolist() == [40, -1, 40, -1]


def test_unreadable_index_codecs(sharded: ArrayLayout) -> None:
    zstd: tuple[Codec, ...] = ({"name": "bytes", "configuration": {"endian": "little"}}, {"name": "zstd"})
    with pytest.raises(UnsupportedCodecError, match=r"array 'set0/counts': shard index codecs .*zstd"):
        ChunkDirectory([replace(sharded, index_codecs=zstd)])


def test_only_touched_shards_are_loaded_and_once(
    sharded: ArrayLayout, monkeypatch: pytest.MonkeyPatch
) -> None:
    directory = ChunkDirectory([sharded])
    opened: list[str] = []
    real = ChunkDirectory._read_index

    def noted(self: ChunkDirectory, *arguments: Any) -> Any:
        opened.append(arguments[1])
        return real(self, *arguments)

    monkeypatch.setattr(ChunkDirectory, "_read_index", noted)
    for ids in ([5], [5, 6], [4, 5, 6, 7, 7]):
        directory.extents(np.array(ids))
    assert opened == [str(Path(sharded.path, "c/1"))]


def test_pickles_its_layouts_only(sharded: ArrayLayout) -> None:
    directory = ChunkDirectory([sharded])
    directory.extents(np.arange(10))
    copy = pickle.loads(pickle.dumps(directory))
    assert copy.layouts == directory.layouts
    assert copy.paths == []
    assert copy.extents(np.arange(10)).nbytes.tolist() == directory.extents(np.arange(10)).nbytes.tolist()
    large = ChunkDirectory([replace(sharded, shape=(10**8,))])
    assert len(pickle.dumps(large)) < 2000


def test_ten_million_chunks_cost_nothing_until_touched(tmp_path: Path) -> None:
    import psutil

    before = psutil.Process().memory_info().rss
    directory = ChunkDirectory([layout_of(tmp_path, shape=(10**8,))])
    assert directory.extents(np.array([0, 10**7 - 1])).nbytes.tolist() == [-1, -1]
    assert psutil.Process().memory_info().rss - before < 20 << 20


def test_threads_agree(sharded: ArrayLayout) -> None:
    expected = ChunkDirectory([sharded]).extents(np.arange(10)).nbytes
    for _ in range(20):
        directory = ChunkDirectory([sharded])
        found: list[np.ndarray] = []
        start = threading.Barrier(8)

        def look_up(directory: Any = directory, found: Any = found, start: Any = start) -> None:
            start.wait()
            found.append(directory.extents(np.arange(10)).nbytes)

        threads = [threading.Thread(target=look_up) for _ in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert len(found) == 8
        assert all((nbytes == expected).all() for nbytes in found)
        assert len(directory.paths) == 2


@pytest.mark.timing
def test_planning_speed(sharded: ArrayLayout) -> None:
    """Hundreds of arrays, indexes loaded: aim 0.5 ms per 1,000 ids; four times that fails."""
    directory = ChunkDirectory([sharded] * 300)
    ids = np.random.default_rng(0).integers(0, directory.base[-1], 1000)
    directory.extents(ids)
    best = min(_seconds(lambda: directory.extents(ids)) for _ in range(20))
    assert best < 2e-3


def _seconds(call: Any) -> float:
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


def test_error_at_finds_the_chunk_of_an_extent(sharded: ArrayLayout) -> None:
    directory = ChunkDirectory([sharded])
    extents = directory.extents(np.array([6]))
    error = directory.error_at(int(extents.file[0]), int(extents.offset[0]), int(extents.nbytes[0]), "why")
    assert (error.chunk, error.array) == (6, "set0/counts")
    assert error.file.endswith("c/1")


def test_both_readers_name_a_chunk_cut_off_later(sharded: ArrayLayout) -> None:
    directory = ChunkDirectory([sharded])
    extents = directory.extents(np.arange(8))
    os.truncate(Path(sharded.path, "c/1"), 70)
    for kind in ("mmap", "preadv"):
        with (
            open_reader(kind, directory) as reader,
            pytest.raises(
                CorruptChunkError, match=r"'set0/counts', chunk 5, .*c/1.*bytes 40 \+ 40 are beyond"
            ),
        ):
            reader.read(extents)


def test_chunks_within_byte_ranges(sharded: ArrayLayout, tmp_path: Path) -> None:
    """As looking at the place of every chunk says, in shards and in plain files."""
    values = np.arange(1_000, dtype="<u4")
    (tmp_path / "plain").write_bytes(bytes(12) + values.tobytes())
    plain = plain_layout(
        tmp_path / "plain", values.dtype, len(values), name="plain", byte_offset=12, chunk_elements=64
    )
    directory = ChunkDirectory([sharded, plain])
    ids = np.arange(directory.base[-1])
    extents = directory.extents(ids)
    for seed in range(20):
        draws = np.random.default_rng(seed)
        file = np.repeat(np.arange(len(directory.paths)), 2)
        ends = np.concatenate([np.sort(draws.integers(0, 5_000, 4)) for _ in directory.paths])
        begin, end = ends[::2], ends[1::2]
        inside = np.zeros(len(ids), bool)
        for number, first, last in zip(file.tolist(), begin.tolist(), end.tolist(), strict=True):
            here = (extents.file == number) & (extents.nbytes > 0) & (extents.offset >= first)
            inside |= here & (extents.offset + extents.nbytes <= last)
        assert directory.within(file, begin, end).tolist() == ids[inside].tolist()
    assert directory.within(file[:0], begin[:0], end[:0]).tolist() == []
