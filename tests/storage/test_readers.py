"""Readers: coalescing, equality of both kinds, shrinking files, bounded descriptors, threads, lifetimes."""

from __future__ import annotations

import gc
import os
import pickle
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import zarr
from hypothesis import given, settings
from hypothesis import strategies as st
from zarr.codecs import ZstdCodec

from hbx_gpu._source import ArrayLayout
from hbx_gpu._storage import ChunkDirectory, Extents, open_reader, read_layout, readers
from hbx_gpu._storage.maps import FileMap
from hbx_gpu._storage.readers import MmapReader, PreadReader, coalesce
from hbx_gpu.errors import CorruptChunkError
from tests.storage.arrays import plain_array, write_chunks

KINDS = ["mmap", "preadv", "pinned"]


extent_lists = st.lists(
    st.tuples(st.integers(0, 3), st.integers(0, 200), st.integers(-1, 60)), min_size=0, max_size=40
)


def _smallest_head(offset: np.ndarray, nbytes: np.ndarray, runs: readers.Runs, run: int) -> int:
    """Where the first extents of a run end that cannot be separated, as they overlap."""
    reach = int(runs.offset[run])
    for o, n in sorted((int(offset[i]), int(nbytes[i])) for i in np.flatnonzero(runs.run == run)):
        if o >= reach > runs.offset[run]:
            break
        reach = max(reach, o + n)
    return reach


@settings(deadline=None, max_examples=300)
@given(extents=extent_lists, max_gap=st.integers(0, 40), max_size=st.integers(1, 300))
def test_coalesce(extents: list[tuple[int, int, int]], max_gap: int, max_size: int) -> None:
    columns = np.array(extents, np.int64).reshape(-1, 3).T
    file, offset, nbytes = columns[0].astype(np.int32), columns[1], columns[2]
    runs = coalesce(file, offset, nbytes, max_gap=max_gap, max_size=max_size)

    wanted = {(f, b) for f, o, n in extents for b in range(o, o + max(n, 0))}
    read = [
        (f, b)
        for f, o, n in zip(runs.file.tolist(), runs.offset.tolist(), runs.nbytes.tolist(), strict=True)
        for b in range(o, o + n)
    ]
    assert len(read) == len(set(read))  # each byte once
    assert wanted <= set(read)
    ends = runs.offset + runs.nbytes
    for (f, o, n), run in zip(extents, runs.run.tolist(), strict=True):
        assert (run == -1) == (n <= 0)
        if n > 0:
            assert f == runs.file[run]
            assert runs.offset[run] <= o
            assert o + n <= ends[run]
    for run in range(len(runs.file)):
        members = np.flatnonzero(runs.run == run)
        members = members[np.argsort(offset[members], kind="stable")]
        reach = np.maximum.accumulate(offset[members] + nbytes[members])
        gaps = offset[members][1:] - reach[:-1]
        assert (gaps <= max_gap).all()
        # Larger than max_size only while extents overlap: it cannot be cut without reading bytes twice.
        assert runs.nbytes[run] <= max_size or (gaps < 0).all()
    for run in range(1, len(runs.file)):
        if runs.file[run] == runs.file[run - 1]:
            gap = runs.offset[run] - ends[run - 1]
            assert gap >= 0
            assert (
                gap > max_gap or _smallest_head(offset, nbytes, runs, run) > runs.offset[run - 1] + max_size
            )
    assert list(zip(runs.file.tolist(), runs.offset.tolist(), strict=True)) == sorted(
        zip(runs.file.tolist(), runs.offset.tolist(), strict=True)
    )


def test_coalesce_merges_as_much_as_it_may() -> None:
    offset = np.arange(10) * 100
    file, nbytes = np.zeros(10, np.int32), np.full(10, 90)
    assert coalesce(file, offset, nbytes, max_gap=10, max_size=10**6).nbytes.tolist() == [990]
    assert coalesce(file, offset, nbytes, max_gap=9, max_size=10**6).nbytes.tolist() == [90] * 10
    assert coalesce(file, offset, nbytes, max_gap=10, max_size=290).nbytes.tolist() == [290, 290, 290, 90]
    assert coalesce(file, offset, nbytes, max_gap=10, max_size=5).nbytes.tolist() == [90] * 10


@pytest.mark.parametrize("kind", KINDS)
def test_reads_what_is_there(tmp_path: Path, kind: str) -> None:
    contents = write_chunks(tmp_path, [40, 0, 7, 12345])
    directory = ChunkDirectory([plain_array(tmp_path, 6)])
    with open_reader(kind, directory) as reader:
        ids = [3, 0, 5, 2, 1, 3, 3]
        slab = reader.read(directory.extents(np.array(ids)))
        assert slab.address.dtype == np.uint64
        assert slab.nbytes.dtype == np.int64
        for i, chunk in enumerate(ids):
            if chunk == 5:
                assert (slab.nbytes[i], slab.address[i]) == (-1, 0)
                with pytest.raises(ValueError, match="extent 2 is absent"):
                    slab.view(i)
            else:
                assert slab.view(i).tobytes() == contents[chunk]
                assert not slab.view(i).flags.writeable
        empty = reader.read(directory.extents(np.array([], np.int64)))
        assert len(empty.address) == 0


@settings(deadline=None, max_examples=60)
@given(data=st.data())
def test_both_readers_agree(tmp_path_factory: pytest.TempPathFactory, data: st.DataObject) -> None:
    path = tmp_path_factory.mktemp("files")
    contents = write_chunks(path, [300, 50, 700])
    directory = ChunkDirectory([plain_array(path, 3)])
    directory.extents(np.arange(3))
    order = [directory.paths.index(str(path / "c" / str(i))) for i in range(3)]
    pieces = []
    for _ in range(data.draw(st.integers(0, 20))):
        file = data.draw(st.integers(0, 2))
        start = data.draw(st.integers(0, len(contents[file])))
        pieces.append((file, start, data.draw(st.integers(0, len(contents[file]) - start))))
    columns = np.array(pieces, np.int64).reshape(-1, 3).T
    extents = Extents(np.array(order, np.int32)[columns[0]], columns[1], columns[2])
    small = PreadReader(
        directory, max_gap=data.draw(st.integers(0, 99)), max_size=data.draw(st.integers(1, 99))
    )
    for reader in (MmapReader(directory), PreadReader(directory), small):
        slab = reader.read(extents)
        for i, (file, start, nbytes) in enumerate(pieces):
            assert slab.view(i).tobytes() == contents[file][start : start + nbytes]


@pytest.mark.parametrize("kind", KINDS)
def test_files_that_shrink_vanish_or_change_between_reads(tmp_path: Path, kind: str) -> None:
    contents = write_chunks(tmp_path, [5000, 5000])
    directory = ChunkDirectory([plain_array(tmp_path, 2)])
    extents = directory.extents(np.arange(2))
    reader = open_reader(kind, directory)
    assert reader.read(extents).view(1).tobytes() == contents[1]  # opened, so the next reads reuse it
    os.truncate(tmp_path / "c" / "1", 4999)
    with pytest.raises(
        CorruptChunkError, match=r"array 'set0/counts', chunk 1, file .*c/1\): bytes 0 \+ 5000 .* 4999 now"
    ):
        reader.read(extents)
    (tmp_path / "c" / "1").write_bytes(contents[0] + b"more")
    assert reader.read(extents).view(1).tobytes() == contents[0]
    reader.close()
    os.remove(tmp_path / "c" / "1")
    with pytest.raises(CorruptChunkError, match=r"chunk 1, .*is missing now"):
        reader.read(extents)


@pytest.mark.parametrize("size", [100, 7], ids=["as long", "shorter"])
@pytest.mark.parametrize("kind", KINDS)
def test_a_replaced_file_is_read_on_if_open_and_refused_otherwise(
    tmp_path: Path, kind: str, size: int
) -> None:
    contents = write_chunks(tmp_path, [100, 100])
    directory = ChunkDirectory([plain_array(tmp_path, 2)])
    reader = open_reader(kind, directory)
    first, second = (directory.extents(np.array([i])) for i in (0, 1))
    reader.read(first)
    for i in ("0", "1"):
        (tmp_path / "new").write_bytes(bytes(size))
        os.replace(tmp_path / "new", tmp_path / "c" / i)
    assert reader.read(first).view(0).tobytes() == contents[0]
    with pytest.raises(CorruptChunkError, match=r"chunk 1, file .*c/1\): the array was replaced by another"):
        reader.read(second)
    os.remove(tmp_path / "c" / "0")
    assert reader.read(first).view(0).tobytes() == contents[0]
    reader.close()
    with pytest.raises(CorruptChunkError, match="is missing now"):
        reader.read(first)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("sharded", [True, False])
def test_an_array_that_was_rewritten_is_refused(tmp_path: Path, kind: str, sharded: bool) -> None:
    """Whatever was looked up, opened or neither: no byte of the new files is taken for one of the old."""
    path = tmp_path / "a"
    shape: Any = {"shape": (40,), "chunks": (10,), "dtype": "uint32", "shards": (20,) if sharded else None}
    zarr.create_array(path, compressors=None, **shape)[:] = np.arange(40)

    directories = [ChunkDirectory([read_layout(path)]) for _ in range(3)]
    opened, looked_up, neither = (open_reader(kind, directory) for directory in directories)
    ids = np.array([0, 3])
    expected = opened.read(directories[0].extents(ids)).view(1).tobytes()
    extents = directories[1].extents(ids)
    fresh = pickle.loads(pickle.dumps(neither))

    zarr.create_array(tmp_path / "b", compressors=[ZstdCodec()], **shape)[:] = np.arange(40)
    path.rename(tmp_path / "old")
    for missing in (True, False):  # between the two renames, and after them
        if not missing:
            (tmp_path / "b").rename(path)
        assert opened.read(directories[0].extents(ids)).view(1).tobytes() == expected
        with pytest.raises(CorruptChunkError, match="missing now" if missing else "replaced by another"):
            looked_up.read(extents)
        for reader in (neither, fresh):
            with pytest.raises(CorruptChunkError, match="the array was replaced by another one"):
                reader.read(reader.directory.extents(ids))


@pytest.mark.parametrize("kind", KINDS)
def test_a_replaced_shard_is_refused(tmp_path: Path, kind: str) -> None:
    """Only the shard is another one: the metadata, and the places of its chunks, are those of before."""
    shape: Any = {"shape": (40,), "chunks": (10,), "dtype": "uint32", "shards": (20,), "compressors": None}
    zarr.create_array(tmp_path / "a", **shape)[:] = 1
    zarr.create_array(tmp_path / "b", **shape)[:] = 2
    directory = ChunkDirectory([read_layout(tmp_path / "a")])
    extents = directory.extents(np.array([0, 3]))
    os.replace(tmp_path / "b" / "c" / "1", tmp_path / "a" / "c" / "1")
    with (
        open_reader(kind, directory) as reader,
        pytest.raises(CorruptChunkError, match=r"chunk 3.*replaced by another"),
    ):
        reader.read(extents)


def test_a_reused_inode_does_not_deceive(tmp_path: Path) -> None:
    """The new file has the old one's inode, here because it is written over it."""
    zarr.create_array(tmp_path, shape=(10,), chunks=(10,), dtype="uint32", compressors=None)[:] = 1
    directory = ChunkDirectory([read_layout(tmp_path)])
    extents = directory.extents(np.array([0]))
    metadata = tmp_path / "zarr.json"
    metadata.write_text(metadata.read_text().replace("uint32", "float32"))
    with pytest.raises(CorruptChunkError, match="the array was replaced by another one"):
        MmapReader(directory).read(extents)


@pytest.mark.parametrize("kind", KINDS)
def test_slabs_outlive_their_reader(tmp_path: Path, kind: str) -> None:
    contents = write_chunks(tmp_path, [100_000])
    directory = ChunkDirectory([plain_array(tmp_path, 1)])
    reader = open_reader(kind, directory)
    view = reader.read(directory.extents(np.array([0]))).view(0)
    reader.close()
    del reader
    gc.collect()
    assert view.tobytes() == contents[0]


def _open_descriptors() -> int:
    return len(os.listdir("/proc/self/fd"))


def _maps_below(path: Path) -> int:
    return Path("/proc/self/maps").read_text().count(str(path))


@pytest.mark.skipif(not Path("/proc/self/fd").exists(), reason="counts descriptors in /proc")
def test_descriptors_and_maps_are_bounded_and_released(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(readers, "_MAX_OPEN", 16)
    monkeypatch.setattr(readers, "_MAX_MAPS", 16)
    write_chunks(tmp_path, [100] * 60)
    directory = ChunkDirectory([plain_array(tmp_path, 60)])
    extents = directory.extents(np.arange(60))
    before = _open_descriptors()
    pread, mapped = open_reader("preadv", directory), open_reader("mmap", directory)
    pread.read(extents)
    assert _open_descriptors() - before == 16
    slab = mapped.read(extents)
    assert _open_descriptors() - before == 16
    assert _maps_below(tmp_path) == 60
    del slab
    assert _maps_below(tmp_path) == 16
    pread.close()
    mapped.close()
    assert _open_descriptors() == before
    assert _maps_below(tmp_path) == 0


@pytest.mark.parametrize("kind", KINDS)
def test_many_threads_few_descriptors(tmp_path: Path, kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Files are evicted while other threads read them; nobody may see another file's bytes."""
    monkeypatch.setattr(readers, "_MAX_OPEN", 3)
    monkeypatch.setattr(readers, "_MAX_MAPS", 3)
    contents = write_chunks(tmp_path, [200 + i for i in range(40)])
    directory = ChunkDirectory([plain_array(tmp_path, 40)])
    reader = open_reader(kind, directory)

    def work(seed: int) -> bool:
        rng = np.random.default_rng(seed)
        for _ in range(30):
            ids = rng.integers(0, 40, 9)
            slab = reader.read(directory.extents(ids))
            if any(slab.view(i).tobytes() != contents[c] for i, c in enumerate(ids)):
                return False
        return True

    with ThreadPoolExecutor(8) as pool:
        assert all(pool.map(work, range(16)))


@pytest.mark.parametrize("kind", KINDS)
def test_pickle_drops_what_is_open(tmp_path: Path, kind: str) -> None:
    contents = write_chunks(tmp_path, [100])
    directory = ChunkDirectory([plain_array(tmp_path, 1)])
    reader = open_reader(kind, directory)
    reader.read(directory.extents(np.array([0])))
    copy = pickle.loads(pickle.dumps(reader))
    assert type(copy) is type(reader)
    slab = copy.read(copy.directory.extents(np.array([0])))
    assert slab.view(0).tobytes() == contents[0]


def test_unknown_kind() -> None:
    with pytest.raises(ValueError, match="unknown reader 'fast'; there are mmap, preadv"):
        open_reader("fast", ChunkDirectory([]))


def one_chunk_of_zeros(folder: Path, size: int) -> ArrayLayout:
    """An array of bytes that is one chunk in one file."""
    (folder / "c").mkdir()
    (folder / "c/0").write_bytes(bytes(size))
    return ArrayLayout(
        path=str(folder),
        name="a",
        shape=(size,),
        dtype=np.dtype(np.uint8),
        chunk_shape=(size,),
        shard_shape=(size,),
        codecs=({"name": "bytes"},),
    )


def test_mapped_pages_are_handed_back(tmp_path: Path) -> None:
    """What a long run has looked at does not stay in this process's memory."""
    size = 32 << 20
    layout = one_chunk_of_zeros(tmp_path, size)

    def resident_file_pages() -> int:
        status = Path("/proc/self/status").read_text()
        return int(status.split("RssFile:")[1].split()[0]) << 10

    for bound, kept in ((1 << 20, False), (1 << 40, True)):
        directory = ChunkDirectory([layout])
        reader = MmapReader(directory, resident_bytes=bound)
        before = resident_file_pages()
        slab = reader.read(directory.extents(np.array([0])))
        assert not slab.view(0).any()  # touches every page
        assert resident_file_pages() - before > size // 2
        again = reader.read(directory.extents(np.array([0])))
        assert (resident_file_pages() - before > size // 2) is kept
        assert not again.view(0).any()  # and the map still works
        reader.close()
        del slab, again  # the last references to the map


def test_bytes_that_are_not_looked_at_do_not_count_as_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Random rows look at a small part of their chunks: the pages they touched stay mapped for longer."""
    size = 1 << 20
    layout = one_chunk_of_zeros(tmp_path, size)
    handed_back: list[FileMap] = []
    monkeypatch.setattr(FileMap, "hand_back", lambda entry: handed_back.append(entry))
    directory = ChunkDirectory([layout])
    for share, kept in ((1.0, 0), (1 / 64, 31)):
        handed_back.clear()
        with MmapReader(directory, resident_bytes=size // 2) as reader:
            extents = replace(directory.extents(np.array([0])), share=share)
            for _ in range(kept):
                reader.read(extents)
            assert not handed_back
            for _ in range(2):  # what was looked at adds up
                reader.read(extents)
            assert handed_back
