"""Whatever zarr-python writes reads back equal, and read_layout says of it what zarr-python says."""

from __future__ import annotations

import itertools
import tempfile
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numcodecs
import numpy as np
import pytest
import zarr
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from zarr.codecs import (
    BloscCodec,
    BytesCodec,
    Crc32cCodec,
    GzipCodec,
    ShardingCodec,
    TransposeCodec,
    ZstdCodec,
)
from zarr.codecs import numcodecs as zn

from hbx_gpu._codecs.chain import ChunkCodec
from hbx_gpu._codecs.zarr_codec import BitpackingCodec
from hbx_gpu._storage import ChunkDirectory, open_reader, read_layout

DTYPES = ["bool", *(f"{k}{b}" for k in ("int", "uint") for b in (8, 16, 32, 64))]
DTYPES += ["float16", "float32", "float64"]
SHARED_FIXTURE = [HealthCheck.function_scoped_fixture]

pytestmark = pytest.mark.filterwarnings("ignore::zarr.errors.ZarrUserWarning")


def random_values(dtype: np.dtype, shape: tuple[int, ...], seed: int) -> np.ndarray:
    raw = np.random.default_rng(seed).integers(0, 256, (*shape, dtype.itemsize), np.uint8)
    return raw[..., 0] > 127 if dtype.kind == "b" else raw.reshape(-1).view(dtype).reshape(shape)


def bits(array: np.ndarray) -> bytes:
    return np.ascontiguousarray(array).tobytes()


@st.composite
def fill_values(draw: st.DrawFn, dtype: np.dtype) -> Any:
    if dtype.kind == "b":
        return draw(st.booleans())
    if dtype.kind == "f":
        return draw(st.sampled_from([0.0, -0.0, 1.5, float("nan"), float("inf"), float("-inf")]))
    limits = np.iinfo(dtype)
    return draw(st.integers(int(limits.min), int(limits.max)))


@st.composite
def geometries(draw: st.DrawFn) -> tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...]]:
    """(shape, chunk, chunks per shard), edges cut through chunks and shards."""
    ndim = draw(st.integers(0, 3))
    axis = st.tuples(st.integers(0, 9), st.integers(1, 4), st.integers(1, 3))
    axes = draw(st.lists(axis, min_size=ndim, max_size=ndim))
    return tuple(zip(*axes, strict=True)) if axes else ((), (), ())  # type: ignore[return-value]


def same_scalar(a: Any, b: Any) -> bool:
    return np.asarray(a).dtype == np.asarray(b).dtype and bits(np.asarray(a)) == bits(np.asarray(b))


@settings(max_examples=150, deadline=None, suppress_health_check=SHARED_FIXTURE)
@given(geometry=geometries(), dtype_name=st.sampled_from(DTYPES), data=st.data())
def test_v3_arrays(assemble: Any, geometry: Any, dtype_name: str, data: st.DataObject) -> None:
    shape, chunk, per_shard = geometry
    dtype = np.dtype(dtype_name)
    bytes_bytes: list[Any] = [
        None,
        [ZstdCodec(level=1)],
        [GzipCodec(level=1)],
        [BloscCodec()],
        [Crc32cCodec()],
    ]
    if np.prod(chunk, dtype=int) * dtype.itemsize % 4 == 0:
        bytes_bytes += [[BitpackingCodec(transform=t)] for t in ("none", "delta", "delta_zigzag")]
    sharded = bool(shape) and data.draw(st.booleans(), "sharded")
    shard = tuple(c * n for c, n in zip(chunk, per_shard, strict=True))
    index_location = data.draw(st.sampled_from(["start", "end"]), "index_location")
    fill = data.draw(fill_values(dtype), "fill")
    order = data.draw(st.permutations(range(len(shape))), "order")
    shards: Any = {"shape": shard, "index_location": index_location} if sharded else None
    with tempfile.TemporaryDirectory() as path:
        array = zarr.create_array(
            path,
            shape=shape,
            dtype=dtype,
            chunks=chunk,
            shards=shards,
            filters=[TransposeCodec(order=order)] if data.draw(st.booleans(), "transpose") else None,
            serializer=BytesCodec(endian=data.draw(st.sampled_from(["little", "big"]), "endian")),
            compressors=data.draw(st.sampled_from(bytes_bytes), "compressors"),
            fill_value=fill,
            chunk_key_encoding={
                "name": data.draw(st.sampled_from(["default", "v2"]), "keys"),
                "separator": data.draw(st.sampled_from([".", "/"]), "separator"),
            },
        )
        keep = data.draw(st.floats(0, 1), "written share")
        region = tuple(slice(0, round(n * keep)) for n in shape)
        array[region] = random_values(dtype, tuple(s.stop for s in region), 1)
        layout = read_layout(path)
        assert layout.shape == array.shape
        assert layout.dtype == array.dtype
        assert layout.chunk_shape == array.chunks
        assert layout.shard_shape == (array.shards or array.chunks)
        assert layout.sharded == (array.shards is not None)
        assert layout.index_at_end == (not sharded or index_location == "end")
        assert same_scalar(layout.fill_value, array.fill_value)
        check_equal(assemble, path)


@settings(max_examples=100, deadline=None, suppress_health_check=SHARED_FIXTURE)
@given(geometry=geometries(), dtype_name=st.sampled_from(DTYPES), data=st.data())
def test_v2_arrays(assemble: Any, geometry: Any, dtype_name: str, data: st.DataObject) -> None:
    shape, chunk, _ = geometry
    dtype = np.dtype(dtype_name).newbyteorder(data.draw(st.sampled_from("<>"), "endian"))
    filters: list[Any] = [None]
    if dtype.kind in "iu":
        filters.append([numcodecs.Delta(dtype=dtype.str)])
    filters.append([numcodecs.Shuffle(dtype.itemsize)])
    compressors = [None, numcodecs.Zlib(1), numcodecs.LZ4(), numcodecs.Blosc(), numcodecs.Zstd(1)]
    compressors += [numcodecs.GZip(1), numcodecs.BZ2(1), numcodecs.LZMA(preset=1), numcodecs.CRC32()]
    with tempfile.TemporaryDirectory() as path:
        array = zarr.create_array(
            path,
            zarr_format=2,
            shape=shape,
            dtype=dtype,
            chunks=chunk,
            order=data.draw(st.sampled_from("CF"), "order"),
            filters=data.draw(st.sampled_from(filters), "filters"),
            compressors=data.draw(st.sampled_from(compressors), "compressor"),
            fill_value=data.draw(fill_values(dtype), "fill"),
            chunk_key_encoding={"name": "v2", "separator": data.draw(st.sampled_from("./"), "separator")},
        )
        keep = data.draw(st.floats(0, 1), "written share")
        region = tuple(slice(0, round(n * keep)) for n in shape)
        array[region] = random_values(dtype, tuple(s.stop for s in region), 2)
        layout = read_layout(path)
        assert (layout.shape, layout.chunk_shape, layout.shard_shape) == (array.shape, chunk, chunk)
        assert layout.dtype == array.dtype.newbyteorder("=")
        assert layout.dtype.isnative
        assert same_scalar(layout.fill_value, np.asarray(array.fill_value).astype(layout.dtype))
        check_equal(assemble, path)


def check_equal(assemble: Any, path: str) -> None:
    expected = np.asarray(zarr.open_array(path, mode="r")[...])
    directory = ChunkDirectory([read_layout(path)])
    for kind in ("mmap", "preadv"):
        with open_reader(kind, directory) as reader:
            found = assemble(directory, 0, reader)
        assert found.shape == expected.shape
        assert bits(found) == bits(expected.astype(found.dtype))


# Made when used: zarr-python warns about each that it makes.
NUMCODECS: dict[str, Callable[[], Any]] = {
    "blosc": lambda: zn.Blosc(cname="lz4", clevel=3),
    "lz4": lambda: zn.LZ4(),
    "zstd": lambda: zn.Zstd(level=1),
    "zlib": lambda: zn.Zlib(level=1),
    "gzip": lambda: zn.GZip(level=1),
    "bz2": lambda: zn.BZ2(level=1),
    "lzma": lambda: zn.LZMA(),
    "shuffle": lambda: zn.Shuffle(),
    "crc32": lambda: zn.CRC32(),
    "crc32c": lambda: zn.CRC32C(),
    "adler32": lambda: zn.Adler32(),
    "fletcher32": lambda: zn.Fletcher32(),
    "jenkins_lookup3": lambda: zn.JenkinsLookup3(),
}


def written(tmp_path: Path, **options: Any) -> np.ndarray:
    values = np.arange(35, dtype=np.int32).reshape(5, 7) * 1000003
    array = zarr.create_array(str(tmp_path), shape=values.shape, dtype=values.dtype, chunks=(2, 3), **options)
    array[...] = values
    return values


@pytest.mark.parametrize("name", NUMCODECS)
def test_numcodecs_compressors_in_v3(tmp_path: Path, assemble: Any, name: str) -> None:
    written(tmp_path, compressors=[NUMCODECS[name]()])
    check_equal(assemble, str(tmp_path))


@pytest.mark.parametrize("name", ["lz4", "zlib", "bz2", "lzma"])
def test_community_codec_names(tmp_path: Path, assemble: Any, name: str) -> None:
    """The same bytes under the name without prefix, which this zarr-python does not know."""
    values = written(tmp_path, compressors=[NUMCODECS[name]()])
    metadata = tmp_path / "zarr.json"
    metadata.write_text(metadata.read_text().replace(f'"numcodecs.{name}"', f'"{name}"'))
    directory = ChunkDirectory([read_layout(tmp_path)])
    np.testing.assert_array_equal(assemble(directory, 0, open_reader("mmap", directory)), values)


FILTERS: dict[str, Callable[[], list[Any]]] = {
    "delta": lambda: [zn.Delta(dtype="int32")],
    "widening delta": lambda: [zn.Delta(dtype="int32", astype="int64")],
    "astype": lambda: [zn.AsType(encode_dtype="int64", decode_dtype="int32")],
    "scale": lambda: [zn.FixedScaleOffset(dtype="int32", scale=1, offset=5, astype="int64")],
    "transpose, delta": lambda: [TransposeCodec(order=(1, 0)), zn.Delta(dtype="int32", astype="int64")],
}


@pytest.mark.parametrize("name", FILTERS)
def test_numcodecs_filters_in_v3(tmp_path: Path, assemble: Any, name: str) -> None:
    written(tmp_path, filters=FILTERS[name](), compressors=[ZstdCodec()])
    check_equal(assemble, str(tmp_path))


def test_chains_of_several_steps(tmp_path: Path, assemble: Any) -> None:
    written(tmp_path, compressors=[BitpackingCodec(transform="delta"), ZstdCodec(), Crc32cCodec()])
    check_equal(assemble, str(tmp_path))
    codec = ChunkCodec(read_layout(tmp_path))
    assert codec.bitpacking is None
    assert not codec.is_raw


@pytest.mark.parametrize(
    ("index_codecs", "crc"), [([BytesCodec(), Crc32cCodec()], True), ([BytesCodec(endian="big")], False)]
)
def test_shard_index_codecs(tmp_path: Path, assemble: Any, index_codecs: Any, crc: bool) -> None:
    sharding = ShardingCodec(chunk_shape=(2, 3), index_codecs=index_codecs, codecs=[BytesCodec()])
    values = np.arange(35, dtype=np.int32).reshape(5, 7)
    array = zarr.create_array(
        str(tmp_path), shape=(5, 7), dtype=np.int32, chunks=(4, 6), serializer=sharding, compressors=None
    )
    array[...] = values
    assert ("crc32c" in str(read_layout(tmp_path).index_codecs)) == crc
    check_equal(assemble, str(tmp_path))


def test_chunks_are_numbered_in_c_order_over_the_whole_grid(tmp_path: Path) -> None:
    values = np.arange(11 * 13).reshape(11, 13)
    array = zarr.create_array(
        str(tmp_path), shape=(11, 13), dtype=values.dtype, chunks=(2, 3), shards=(4, 6), compressors=None
    )
    array[...] = values
    layout = read_layout(tmp_path)
    directory = ChunkDirectory([layout])
    slab = open_reader("preadv", directory).read(directory.extents(np.arange(6 * 5)))
    for number, (row, column) in enumerate(itertools.product(range(6), range(5))):
        chunk = ChunkCodec(layout).decode(slab.view(number))
        assert chunk[0, 0] == values[2 * row, 3 * column]


def test_warnings_of_zarr_are_not_ours(tmp_path: Path) -> None:
    written(tmp_path, compressors=[NUMCODECS["lz4"]()])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        ChunkCodec(read_layout(tmp_path))
