"""Plain files as arrays: extents by arithmetic, all readers, damage and replacement, through the engines."""

from __future__ import annotations

import os
import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from hbx_gpu._codecs.chain import ChunkCodec
from hbx_gpu._engine.host import HostEngine
from hbx_gpu._engine.reference import ReferenceEngine
from hbx_gpu._plan.rows import plan_rows, source_table
from hbx_gpu._source import ArrayLayout, RowIndex, Source
from hbx_gpu._storage import ChunkDirectory, npy_layout, open_reader, plain_layout, read_layout
from hbx_gpu.dataloader import CellDataset
from hbx_gpu.errors import CorruptChunkError, CorruptDataError

VALUES = ("u1", "u2", "u4", "u8", "f2", "f4", "f8", "i4")


def stored(path: Path, values: np.ndarray, offset: int = 0, **options: Any) -> ArrayLayout:
    path.write_bytes(os.urandom(offset) + values.tobytes() + os.urandom(5))
    return plain_layout(path, values.dtype, len(values), byte_offset=offset, **options)


def chunk(layout: ArrayLayout, number: int, kind: str = "mmap") -> np.ndarray:
    directory = ChunkDirectory([layout])
    with open_reader(kind, directory) as reader:
        slab = reader.read(directory.extents(np.array([number])))
        return ChunkCodec(layout).decode(slab.view(0)).copy()


@pytest.mark.parametrize("kind", ["mmap", "preadv", "pinned"])
@pytest.mark.parametrize("dtype", [*VALUES, ">u4", ">f8"])
def test_chunks_are_stretches_of_the_file(tmp_path: Path, dtype: str, kind: str) -> None:
    values = np.arange(1, 26).astype(dtype)
    layout = stored(tmp_path / "a", values, 7, chunk_elements=10)
    assert layout.dtype == np.dtype(dtype).newbyteorder("=")
    found = [chunk(layout, k, kind) for k in range(3)]
    assert [len(part) for part in found] == [10, 10, 5]
    assert np.concatenate(found).tolist() == values.tolist()


def test_extents_need_no_table(tmp_path: Path) -> None:
    import psutil

    path = tmp_path / "large"
    with open(path, "wb") as file:
        file.truncate(10**11)
    before = psutil.Process().memory_info().rss
    directory = ChunkDirectory([plain_layout(path, "u1", 10**11, chunk_elements=1000)])
    extents = directory.extents(np.array([10**8 - 1, 0, 5]))
    assert extents.offset.tolist() == [10**11 - 1000, 0, 5000]
    assert extents.nbytes.tolist() == [1000] * 3
    assert psutil.Process().memory_info().rss - before < 10 << 20


def test_one_directory_of_plain_files_and_zarr_arrays(tmp_path: Path) -> None:
    import zarr

    array = zarr.create_array(
        str(tmp_path / "z"), shape=(30,), dtype="u4", chunks=(10,), shards=(20,), compressors=None
    )
    array[:] = np.arange(1, 31)
    layout = stored(tmp_path / "p", np.arange(25, dtype="u2"), 4, chunk_elements=10)
    directory = ChunkDirectory([read_layout(tmp_path / "z"), layout, layout])
    assert directory.base.tolist() == [0, 3, 6, 9]
    extents = directory.extents(np.array([5, 2, 6, 0, 8]))
    assert extents.nbytes.tolist() == [10, 40, 20, 40, 10]
    assert extents.offset.tolist()[0] == extents.offset.tolist()[4] == 4 + 2 * 20
    assert directory.locate(8) == (str(tmp_path / "p"), "p", 2)
    error = directory.error_at(int(extents.file[4]), int(extents.offset[4]), 10, "why")
    assert (error.chunk, error.array, error.file) == (2, "p", str(tmp_path / "p"))
    copy = pickle.loads(pickle.dumps(directory))
    assert copy.extents(np.array([8])).offset.tolist() == [44]


def test_npy_files(tmp_path: Path) -> None:
    values = np.arange(100, dtype="f4")
    np.save(tmp_path / "a.npy", values)
    layout = npy_layout(tmp_path / "a.npy", chunk_elements=64)
    assert np.concatenate([chunk(layout, 0), chunk(layout, 1)]).tolist() == values.tolist()
    np.save(tmp_path / "b.npy", values.reshape(10, 10))
    with pytest.raises(CorruptDataError, match=r"one dimension, found float32 in shape \(10, 10\)"):
        npy_layout(tmp_path / "b.npy")
    (tmp_path / "c.npy").write_bytes(b"no header")
    with pytest.raises(CorruptDataError, match=r"c\.npy is not an \.npy file"):
        npy_layout(tmp_path / "c.npy")


def test_short_missing_and_replaced_files(tmp_path: Path) -> None:
    path = tmp_path / "a"
    values = np.arange(100, dtype="u4")
    layout = stored(path, values)
    with pytest.raises(CorruptDataError, match=r"holds 405 bytes; .* needs 480"):
        plain_layout(path, "u4", 120)
    os.replace(path, tmp_path / "aside")
    with pytest.raises(CorruptChunkError, match="missing"):
        ChunkDirectory([layout]).extents(np.array([0]))
    path.write_bytes(values.tobytes())
    with pytest.raises(CorruptChunkError, match="replaced by another one"):
        ChunkDirectory([layout]).extents(np.array([0]))
    directory = ChunkDirectory([plain_layout(path, "u4", 100)])
    os.truncate(path, 399)
    for kind in ("mmap", "preadv"):
        with open_reader(kind, directory) as reader, pytest.raises(CorruptChunkError, match="has 399 now"):
            reader.read(directory.extents(np.array([0])))


@given(data=st.data())
@settings(max_examples=25, deadline=None, suppress_health_check=list(HealthCheck))
def test_engines_give_the_rows(data: st.DataObject, tmp_path_factory: pytest.TempPathFactory) -> None:
    """Any dtype, offset and chunk length, rows across chunks: as NumPy slices them."""
    seed = data.draw(st.integers(0, 2**32 - 1))
    dtypes = data.draw(st.lists(st.sampled_from(("u1", "f2", "f4", "u8")), min_size=1, max_size=3))
    step = data.draw(st.integers(1, 40))
    reader = data.draw(st.sampled_from(["mmap", "preadv"]))
    rng = np.random.default_rng(seed)
    folder = tmp_path_factory.mktemp("plain")
    sources, parts, truth = [], [], []
    for k, dtype in enumerate(dtypes):
        lengths = rng.integers(0, 30, 12)
        values = rng.integers(0, 100, lengths.sum()).astype(dtype)
        columns = rng.integers(0, 200, len(values)).astype(rng.choice(["u1", "u2", "u8"]))
        remap = rng.permutation(200).astype(np.int32)
        offset = int(rng.integers(0, 9))
        index = stored(folder / f"c{k}", columns, offset, chunk_elements=step)
        layer = stored(folder / f"v{k}", values, int(rng.integers(0, 9)), chunk_elements=step + k)
        sources.append(Source(f"s{k}", index, {"X": layer}, remap, repeats=True))
        start = np.cumsum(lengths) - lengths
        parts.append(RowIndex(np.full(12, k, np.int32), start.astype(np.int64), lengths.astype(np.int32)))
        truth += [(remap[columns[a : a + n]], values[a : a + n]) for a, n in zip(start, lengths, strict=True)]
    rows = RowIndex(*(np.concatenate([getattr(p, f) for p in parts]) for f in ("source", "start", "length")))
    selection = rng.integers(0, len(rows), 20)
    common = np.result_type(*(s.layers["X"].dtype for s in sources))
    table = source_table(sources, ["X"], 200)
    directory = ChunkDirectory([la for s in sources if s.index for la in (s.index, s.layers["X"])])
    plan = plan_rows(table, rows, selection)
    engines: list[Any] = [HostEngine, ReferenceEngine]
    for engine in engines:
        with open_reader(reader, directory) as opened:
            slab = opened.read(directory.extents(plan.chunks))
            indices, (values,), offsets = engine(table, directory, [common]).csr(plan, slab)
        assert values.dtype == common
        for i, row in enumerate(selection):
            part = slice(offsets[i], offsets[i + 1])
            assert indices[part].tolist() == truth[row][0].tolist()
            assert values[part].tolist() == truth[row][1].tolist()


def test_a_column_beyond_the_features_names_its_file(tmp_path: Path) -> None:
    columns = stored(tmp_path / "columns", np.array([0, 9, 3], "u2"))
    values = stored(tmp_path / "values", np.ones(3, "f4"))
    dataset = CellDataset(
        [Source("s", columns, {"X": values}, np.arange(5, dtype=np.int32))],
        RowIndex(np.zeros(2, np.int32), np.array([0, 1]), np.array([1, 2], np.int32)),
        layer="X",
        n_features=5,
        feature_uids=np.arange(5),
    )
    assert dataset[[0]].indices.tolist() == [0]
    with pytest.raises(CorruptChunkError, match=r"columns.*outside \[0, 5\)"):
        dataset[[1]]
