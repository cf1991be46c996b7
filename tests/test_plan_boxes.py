"""Arrays of several axes: whatever the chunks, boxes come out as slicing gives them."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import zarr
from hypothesis import given, settings
from hypothesis import strategies as st

from hbx_gpu._plan.boxes import box_table, needed_chunks, plan_boxes
from hbx_gpu._source import BoxIndex, RowIndex, Source, rows_by_source
from hbx_gpu._storage.metadata import read_layout
from hbx_gpu.dataloader import DenseBatch, DenseCellDataset, RaggedBatch
from hbx_gpu.errors import CorruptChunkError, CorruptDataError, UnsupportedError

CODECS: dict[str, dict[str, Any]] = {
    "zstd": {"compressors": zarr.codecs.ZstdCodec(checksum=True)},
    "gzip": {"compressors": zarr.codecs.GzipCodec()},
    "blosc": {"compressors": zarr.codecs.BloscCodec(cname="lz4", shuffle="bitshuffle")},
    "crc": {"compressors": [zarr.codecs.ZstdCodec(), zarr.codecs.Crc32cCodec()]},
    "none": {"compressors": None},
    "big": {"compressors": None, "serializer": zarr.codecs.BytesCodec(endian="big")},
    "transpose": {"filters": None, "compressors": zarr.codecs.ZstdCodec()},
}


def store(root: Path, name: str, array: np.ndarray, chunks: tuple[int, ...], **kwargs: Any) -> Source:
    """One array written by zarr, as a Source without columns."""
    written = zarr.create_array(
        root / name / "layers" / "raw", shape=array.shape, dtype=array.dtype, chunks=chunks, **kwargs
    )
    written[...] = array
    layout = read_layout(str(root / name / "layers" / "raw"), f"{name}/layers/raw")
    return Source(name, None, {"raw": layout}, np.empty(0, np.int32))


def open_boxes(
    sources: list[Source], boxes: BoxIndex, *, positions: bool = False, **kwargs: Any
) -> DenseCellDataset:
    return DenseCellDataset(
        sources,
        boxes,
        positions=positions,
        layer="raw",
        n_features=0,
        feature_uids=np.empty(0, object),
        **kwargs,
    )


@st.composite
def arrays_and_boxes(draw: st.DrawFn) -> dict[str, Any]:
    n_axes = draw(st.integers(1, 4))
    shape = tuple(draw(st.integers(1, 9)) for _ in range(n_axes))
    k = draw(st.integers(1, n_axes))
    boxes = []
    for _ in range(draw(st.integers(1, 8))):
        box = []
        for axis in range(k):
            low = draw(st.integers(0, shape[axis]))
            box.append((low, draw(st.sampled_from([-1, draw(st.integers(0, shape[axis] - low))]))))
        boxes.append([(0, -1) if size < 0 else (low, size) for low, size in box])
    return {
        "shape": shape,
        "chunks": tuple(draw(st.integers(1, 5)) for _ in range(n_axes)),
        "per_shard": draw(st.sampled_from([0, 1, 2])),
        "codec": draw(st.sampled_from(sorted(CODECS))),
        "dtype": draw(st.sampled_from(["uint8", "uint16", "float32", "bool", "int64"])),
        "boxes": boxes,
        "rows": draw(st.lists(st.integers(-len(boxes), len(boxes) - 1), max_size=12)),
        "reader": draw(st.sampled_from(["mmap", "preadv"])),
    }


@settings(max_examples=60, deadline=None)
@given(arrays_and_boxes())
def test_boxes_are_slices(case: dict[str, Any]) -> None:
    rng = np.random.default_rng(0)
    array = rng.integers(0, 2 if case["dtype"] == "bool" else 200, case["shape"]).astype(case["dtype"])
    lower = np.array([[low for low, _ in box] for box in case["boxes"]], np.int64)
    size = np.array([[n for _, n in box] for box in case["boxes"]], np.int64)
    with tempfile.TemporaryDirectory() as folder:
        shards = tuple(c * case["per_shard"] for c in case["chunks"]) if case["per_shard"] else None
        source = store(Path(folder), "one", array, case["chunks"], shards=shards, **CODECS[case["codec"]])
        boxes = BoxIndex(np.zeros(len(lower), np.int32), lower, size)
        dataset = open_boxes([source], boxes, reader=case["reader"])
        batch = dataset.__getitems__(case["rows"])
        plan = plan_boxes(box_table([source], ["raw"]), boxes, dataset.row_numbers(case["rows"]))
        needed = needed_chunks(box_table([source], ["raw"]), boxes)
        nbytes = dataset.batch_nbytes(case["rows"])
        dataset.close()
    assert len(set(plan.chunks.tolist())) == len(plan.chunks), "a chunk is read twice"
    assert set(plan.chunks.tolist()) <= set(needed.tolist())
    assert len(batch) == len(case["rows"])
    assert nbytes == sum(array_.nbytes for array_ in batch.data)
    for found, row in zip(batch.data, case["rows"], strict=True):
        where = tuple(
            slice(None) if n < 0 else slice(low, low + n)
            for low, n in zip(lower[row].tolist(), size[row].tolist(), strict=True)
        )
        np.testing.assert_array_equal(found, array[where])
        assert found.dtype == array.dtype


@settings(max_examples=40, deadline=None)
@given(st.data())
def test_rows_of_matrices_are_put_in_place(data: st.DataObject) -> None:
    rng = np.random.default_rng(1)
    width = data.draw(st.integers(1, 9))
    sources, matrices, remaps = [], [], []
    with tempfile.TemporaryDirectory() as folder:
        for i in range(data.draw(st.integers(1, 3))):
            m, n = data.draw(st.integers(1, width)), data.draw(st.integers(1, 12))
            matrix = rng.integers(1, 1000, (n, m)).astype(data.draw(st.sampled_from(["uint32", "float32"])))
            chunks = (data.draw(st.integers(1, 5)), data.draw(st.integers(1, m)))
            source: Any = store(
                Path(folder), f"m{i}", matrix, chunks, **CODECS[data.draw(st.sampled_from(sorted(CODECS)))]
            )
            remap = rng.permutation(width)[:m].astype(np.int32)
            remap[rng.random(m) < 0.3] = -1
            sources.append(Source(source.name, None, source.layers, remap))
            matrices.append(matrix)
            remaps.append(remap)
        places = [(i, p) for i, matrix in enumerate(matrices) for p in range(len(matrix))] + [(-1, 0)]
        rng.shuffle(places)
        where = np.array(places, np.int64)
        rows = RowIndex(where[:, 0].astype(np.int32), where[:, 1], (where[:, 0] >= 0).astype(np.int32))
        dataset = DenseCellDataset(
            sources,
            BoxIndex.of_rows(rows),
            positions=True,
            layer="raw",
            n_features=width,
            feature_uids=np.array([str(i) for i in range(width)], object),
        )
        asked = data.draw(st.lists(st.integers(0, len(places) - 1), max_size=20))
        batch = dataset.__getitems__(asked)
        dataset.close()
    expected = np.zeros((len(asked), width), np.result_type(*matrices))
    for row, place in enumerate(asked):
        source, position = places[place]
        if source >= 0:
            kept = remaps[source] >= 0
            expected[row, remaps[source][kept]] = matrices[source][position, kept]
    assert isinstance(batch, DenseBatch)
    assert batch.per_cell_shape is None
    np.testing.assert_array_equal(batch.data, expected)
    assert batch.data.dtype == expected.dtype


def test_a_chunk_is_decoded_once_per_plan(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from hbx_gpu._codecs.chain import ChunkCodec

    matrix = np.arange(600, dtype=np.uint32).reshape(100, 6)
    source = store(tmp_path, "m", matrix, (10, 6), **CODECS["zstd"])
    rows = RowIndex(np.zeros(100, np.int32), np.arange(100), np.ones(100, np.int32))
    dataset = open_boxes([source], BoxIndex.of_rows(rows), positions=True)
    decoded = []
    decode = ChunkCodec.decode

    def counted(*arguments: Any) -> Any:
        decoded.append(1)
        return decode(*arguments)

    monkeypatch.setattr(ChunkCodec, "decode", counted)
    order = np.random.default_rng(0).permutation(100)
    batches = dataset.read_batches([order[:32], order[32:64], order[64:]])
    assert len(decoded) == 10
    np.testing.assert_array_equal(np.concatenate([batch.data for batch in batches]), matrix[order])


def test_decoded_chunks_are_kept_within_a_budget(tmp_path: Path) -> None:
    from hbx_gpu._engine.host.boxes import BoxEngine
    from hbx_gpu._engine.host.decoded import DecodedChunks

    kept = DecodedChunks(3 * 800)
    chunks = [np.full(100, i, np.int64) for i in range(5)]
    for i, chunk in enumerate(chunks):
        kept.add(i, chunk)
        kept.add(i, chunk)
    assert [kept.get(i) is chunks[i] for i in range(5)].count(True) == 3
    assert kept.get(4) is chunks[4]

    matrix = np.arange(600, dtype=np.uint32).reshape(100, 6)
    rows = RowIndex(np.zeros(100, np.int32), np.arange(100), np.ones(100, np.int32))
    for keep in (0, 1000, 1 << 20):
        for codec in ("zstd", "none"):
            source = store(tmp_path, f"{codec}{keep}", matrix, (10, 6), **CODECS[codec])
            dataset = open_boxes([source], BoxIndex.of_rows(rows), positions=True)
            engine = dataset._arrays
            dataset._arrays = BoxEngine(engine.table, engine.directory, engine.dtypes, keep=keep)
            for seed in range(4):
                order = np.random.default_rng(seed).permutation(100)
                np.testing.assert_array_equal(dataset[order].data, matrix[order])
            assert dataset._arrays._kept._nbytes <= keep
            if codec == "none":
                assert dataset._arrays._kept._nbytes == 0


def test_tiles_of_one_shape_are_one_array_and_others_lists(tmp_path: Path) -> None:
    rng = np.random.default_rng(2)
    small = rng.integers(0, 255, (5, 2, 3, 3)).astype(np.uint8)
    large = rng.integers(0, 9999, (4, 2, 4, 3)).astype(np.uint16)
    sources = [store(tmp_path, "a", small, (2, 2, 3, 3)), store(tmp_path, "b", large, (3, 1, 4, 2))]
    rows = RowIndex(
        np.array([0, 0, -1, 0], np.int32), np.array([4, 0, 0, 2]), np.array([1, 1, 0, 1], np.int32)
    )
    same = open_boxes(sources[:1], BoxIndex.of_rows(rows), positions=True)
    batch = same[:]
    assert isinstance(batch, DenseBatch)
    assert (batch.data.shape, batch.data.dtype.name, batch.n_features) == ((4, 2, 3, 3), "uint8", 18)
    np.testing.assert_array_equal(
        batch.data, np.stack([small[4], small[0], np.zeros_like(small[0]), small[2]])
    )

    rows = RowIndex(np.array([1, 0, -1], np.int32), np.array([3, 0, 0]), np.array([1, 1, 0], np.int32))
    both = open_boxes(sources, BoxIndex.of_rows(rows), positions=True)
    ragged = both[:]
    assert isinstance(ragged, RaggedBatch)
    np.testing.assert_array_equal(ragged.data[0], large[3])
    np.testing.assert_array_equal(ragged.data[1], small[0])
    assert ragged.data[2].size == 0
    assert [x.dtype for x in ragged.data[:2]] == [np.uint16, np.uint8]
    cast = open_boxes(sources, BoxIndex.of_rows(rows), positions=True, dtypes={"raw": "float32"})[:]
    assert {x.dtype for x in cast.data} == {np.dtype(np.float32)}
    with pytest.raises(ValueError, match="cannot hold"):
        open_boxes(sources, BoxIndex.of_rows(rows), positions=True, dtypes={"raw": "bool"})


@given(st.lists(st.integers(-1, 4), max_size=30), st.integers(5, 7))
def test_rows_are_found_by_source(source: list[int], n_sources: int) -> None:
    numbers = np.array(source, np.int32)
    found = rows_by_source(numbers, n_sources)
    assert [rows.tolist() for rows in found] == [
        np.flatnonzero(numbers == i).tolist() for i in range(n_sources)
    ]


def test_sources_without_rows_say_nothing_of_shapes(tmp_path: Path) -> None:
    arrays = [np.ones((2, 3, 3), np.uint8), np.ones((2, 4, 4), np.uint8)]
    sources = [store(tmp_path, str(i), array, array.shape) for i, array in enumerate(arrays)]
    rows = RowIndex(np.ones(2, np.int32), np.arange(2), np.ones(2, np.int32))
    assert open_boxes(sources, BoxIndex.of_rows(rows), positions=True).per_cell_shape == (4, 4)


def test_boxes_outside_and_corrupt_chunks_are_named(tmp_path: Path) -> None:
    image = np.arange(2 * 40 * 30, dtype=np.uint16).reshape(2, 40, 30)
    source = store(tmp_path, "slide", image, (1, 16, 16), **CODECS["crc"])
    one = np.zeros(1, np.int32)
    with pytest.raises(
        CorruptDataError, match=r"row 0 points at elements \[0, 30, 0\] to \[2, 41, 30\].*slide"
    ):
        open_boxes([source], BoxIndex(one, np.array([[0, 30]]), np.array([[-1, 11]])))
    dataset = open_boxes([source], BoxIndex(one, np.array([[0, 30]]), np.array([[-1, 10]])))
    chunk = tmp_path / "slide/layers/raw/c/1/2/0"
    raw = bytearray(chunk.read_bytes())
    raw[len(raw) // 2] ^= 1
    chunk.write_bytes(raw)
    with pytest.raises(CorruptChunkError, match=r"slide/layers/raw.*c/1/2/0"):
        dataset[0]
    sparse = Source("s", source.layers["raw"], source.layers, np.empty(0, np.int32))
    with pytest.raises(UnsupportedError, match="sparse"):
        open_boxes([sparse], BoxIndex(one, np.array([[0]]), np.array([[1]])))
