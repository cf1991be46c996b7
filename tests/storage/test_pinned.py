"""The reader that fills staging memory: ranges of slabs, by explicit reads, each to its place."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hbx_gpu._engine.device.staging_kernels import RANGE
from hbx_gpu._storage import ChunkDirectory, Extents, open_reader, readers
from hbx_gpu.errors import CorruptChunkError
from tests.storage.arrays import plain_array, write_chunks

SIZES = [300, 50, 20_000]


def opened(path: Path) -> tuple[ChunkDirectory, list[bytes]]:
    contents = write_chunks(path, SIZES)
    return ChunkDirectory([plain_array(path, len(SIZES))]), contents


@settings(deadline=None, max_examples=60)
@given(data=st.data())
def test_ranges_reach_their_places(tmp_path_factory: pytest.TempPathFactory, data: st.DataObject) -> None:
    directory, contents = opened(tmp_path_factory.mktemp("files"))
    chunks = np.array(data.draw(st.lists(st.integers(0, 2), min_size=1, max_size=6)))
    with open_reader("pinned", directory) as reader:
        slab = reader.read(directory.extents(chunks))
        assert slab.copy is not None
        ranges, expected, at = [], [], 0
        for _ in range(data.draw(st.integers(0, 12))):
            k = data.draw(st.integers(0, len(chunks) - 1))
            begin = data.draw(st.integers(0, SIZES[chunks[k]] - 1))
            nbytes = data.draw(st.integers(1, SIZES[chunks[k]] - begin))
            ranges.append((int(slab.address[k]) + begin, at, nbytes))
            expected.append((at, contents[chunks[k]][begin : begin + nbytes]))
            at += nbytes + data.draw(st.integers(0, 9))
        order = data.draw(st.permutations(range(len(ranges))))
        target = np.full(at, 0xEE, np.uint8)
        slab.copy(np.array([ranges[i] for i in order], RANGE), target)
    filled = np.zeros(at, bool)
    for begin, content in expected:
        assert target[begin : begin + len(content)].tobytes() == content
        filled[begin : begin + len(content)] = True
    assert (target[~filled] == 0xEE).all()


def test_the_bytes_come_from_reads_not_from_the_map(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    directory, contents = opened(tmp_path)
    calls: list[int] = []
    plain = readers._Descriptor.read

    def counted(self: readers._Descriptor, targets: list[memoryview], offset: int) -> bool:
        calls.append(len(targets))
        return plain(self, targets, offset)

    monkeypatch.setattr(readers._Descriptor, "read", counted)
    with open_reader("pinned", directory) as reader:
        slab = reader.read(directory.extents(np.array([2])))
        begins = np.arange(0, 20_000, 20)
        ranges = np.zeros(1_000, RANGE)
        ranges["source"], ranges["nbytes"] = slab.address[0] + begins.astype(np.uint64), 10
        ranges["target"] = np.arange(1_000) * 10
        target = np.zeros(10_000, np.uint8)
        assert slab.copy is not None
        slab.copy(ranges, target)
    assert target.tobytes() == b"".join(contents[2][b : b + 10] for b in begins.tolist())
    assert len(calls) == 2  # neighbors at once, as many as a call takes
    assert max(calls) <= 1_024


def test_a_file_that_was_cut_short_is_named(tmp_path: Path) -> None:
    directory, _ = opened(tmp_path)
    with open_reader("pinned", directory) as reader:
        extents: Extents = directory.extents(np.array([2]))
        slab = reader.read(extents)
        (tmp_path / "c/2").write_bytes(b"short")
        ranges = np.array([(int(slab.address[0]) + 15_000, 0, 10)], RANGE)
        assert slab.copy is not None
        with pytest.raises(CorruptChunkError, match="beyond the end"):
            slab.copy(ranges, np.zeros(10, np.uint8))
