"""hbx_gpu.rowpack through zarr-python and through ChunkCodec: entry point, configuration, arrays, damage."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import zarr
from zarr.codecs import BytesCodec, Crc32cCodec, ShardingCodec, ZstdCodec
from zarr.registry import get_codec_class
from zarr.storage import MemoryStore

from hbx_gpu._codecs import encode_rowpack
from hbx_gpu._codecs.chain import ChunkCodec
from hbx_gpu._codecs.zarr_codec import RowpackCodec
from hbx_gpu._source import ArrayLayout, Codec
from hbx_gpu.errors import CorruptChunkError, UnsupportedCodecError

LITTLE: Codec = {"name": "bytes", "configuration": {"endian": "little"}}


def rowpack(element_size: int = 4, transform: str = "none") -> Codec:
    configuration = {"transform": transform, "element_size": element_size}
    return {"name": "hbx_gpu.rowpack", "configuration": configuration}


def layout(*codecs: Codec, dtype: str = "uint32", chunk: int = 10) -> ArrayLayout:
    return ArrayLayout(
        path="/nowhere", name="set0/counts", shape=(chunk,), dtype=np.dtype(dtype), chunk_shape=(chunk,),
        shard_shape=(chunk,), codecs=codecs,
    )  # fmt: skip


def test_is_registered_by_entry_point() -> None:
    assert get_codec_class("hbx_gpu.rowpack") is RowpackCodec


@pytest.mark.parametrize("transform", ["none", "gaps"])
@pytest.mark.parametrize(
    ("dtype", "element_size"),
    [("uint8", 1), ("uint16", 2), ("uint32", 4), ("uint64", 8), ("int64", 8), ("float32", 4), ("uint16", 1)],
)
@pytest.mark.parametrize("shards", [None, (1_024,)])
def test_arrays_round_trip(
    tmp_path: Path, transform: str, dtype: str, element_size: int, shards: Any
) -> None:
    """Written and read by zarr; shards and chunks are partly filled at the end."""
    values = np.random.default_rng(0).integers(0, 250, 2_300).astype(dtype)
    codec = RowpackCodec(transform=transform, element_size=element_size)
    zarr.create_array(str(tmp_path / "a"), data=values, chunks=(256,), shards=shards, compressors=[codec])
    array = zarr.open_array(str(tmp_path / "a"), mode="r")
    np.testing.assert_array_equal(array[...], values)
    np.testing.assert_array_equal(array[300:1_500], values[300:1_500])
    assert "hbx_gpu.rowpack" in (tmp_path / "a" / "zarr.json").read_text()


@pytest.mark.parametrize("location", ["start", "end"])
def test_shards_with_their_index_at_either_end(tmp_path: Path, location: str) -> None:
    values = np.random.default_rng(0).integers(0, 99, 4_000).astype(np.uint32)
    codec = RowpackCodec(transform="gaps")
    sharding = ShardingCodec(
        chunk_shape=(256,),
        codecs=[BytesCodec(), codec],
        index_codecs=[BytesCodec(), Crc32cCodec()],
        index_location=location,
    )
    array = zarr.create(
        store=str(tmp_path),
        shape=values.shape,
        dtype="uint32",
        chunks=(1_024,),
        codecs=[sharding],
        zarr_format=3,
    )
    array[...] = values
    np.testing.assert_array_equal(zarr.open_array(str(tmp_path), mode="r")[...], values)


def test_written_again_in_part() -> None:
    """A write to part of a chunk goes through decoding and encoding."""
    array = zarr.create_array(
        MemoryStore(), shape=(100,), dtype="uint16", chunks=(64,), compressors=[RowpackCodec(element_size=2)]
    )
    array[10:80] = np.arange(70)
    np.testing.assert_array_equal(array[...], np.r_[np.zeros(10), np.arange(70), np.zeros(20)])


def test_two_dimensions_and_a_codec_behind() -> None:
    values = np.arange(600, dtype=np.uint64).reshape(20, 30)
    array = zarr.create_array(
        MemoryStore(), data=values, chunks=(7, 11), compressors=[RowpackCodec(element_size=8), ZstdCodec()]
    )
    np.testing.assert_array_equal(array[...], values)


@pytest.mark.parametrize(
    ("configuration", "message"),
    [
        ({"transform": "delta"}, "unknown rowpack transform 'delta'; known: none, gaps"),
        ({"transform": ["none"]}, "unknown rowpack transform"),
        ({"element_size": 3}, "hbx_gpu.rowpack: element_size must be 1, 2, 4 or 8, not 3"),
        ({"element_size": True}, "element_size must be 1, 2, 4 or 8, not True"),
        ({"level": 3}, "hbx_gpu.rowpack: unknown configuration level; it takes transform and element_size"),
    ],
)
def test_configuration_is_checked(configuration: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        RowpackCodec.from_dict({"name": "hbx_gpu.rowpack", "configuration": configuration})


def test_configuration_comes_back() -> None:
    codec = RowpackCodec(transform="gaps", element_size=8)
    assert codec.to_dict() == rowpack(8, "gaps")
    assert RowpackCodec.from_dict(codec.to_dict()) == codec
    assert RowpackCodec.from_dict({"name": "hbx_gpu.rowpack"}) == RowpackCodec()


def test_a_place_in_the_chain_that_cannot_be_checked_is_refused() -> None:
    array = zarr.create_array(
        MemoryStore(), shape=(64,), dtype="uint8", chunks=(64,),
        compressors=[ZstdCodec(), RowpackCodec(element_size=1)],
    )  # fmt: skip
    with pytest.raises(ValueError, match="put the codec directly after 'bytes'"):
        array[:] = 1
    array = zarr.create_array(
        MemoryStore(), shape=(9,), dtype="uint16", chunks=(3,), compressors=[RowpackCodec(element_size=4)]
    )
    with pytest.raises(ValueError, match="6 bytes is not a multiple of element_size 4; choose the array's"):
        array[:] = 1


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda chunk: chunk[:-1], "the header says .* bytes"),
        (lambda chunk: chunk[:70] + bytes([chunk[70] ^ 4]) + chunk[71:], "CRC32C"),
        (lambda _: encode_rowpack(np.arange(63, dtype=np.uint32)), "says 63 values, the metadata demand 64"),
        (lambda _: encode_rowpack(np.arange(64, dtype=np.uint16)), "elements of 2 bytes, the metadata say 4"),
    ],
)
def test_damaged_chunks_raise_through_zarr(tmp_path: Path, damage: Any, message: str) -> None:
    array = zarr.create_array(
        str(tmp_path), shape=(64,), dtype="uint32", chunks=(64,), compressors=[RowpackCodec()]
    )
    array[:] = np.arange(64) * 5
    chunk = tmp_path / "c" / "0"
    chunk.write_bytes(damage(chunk.read_bytes()))
    with pytest.raises(CorruptChunkError, match=message):
        array[:]


@pytest.mark.parametrize(
    ("chain", "dtype", "expected"),
    [
        ([LITTLE, rowpack(4)], "uint32", 4),
        ([LITTLE, rowpack(8)], "int64", 8),
        ([{"name": "bytes"}, rowpack(1)], "uint8", 1),
        ([LITTLE, rowpack(2)], "uint16", 2),
        ([LITTLE, {"name": "hbx_gpu.rowpack"}], "uint32", 4),
        ([{"name": "bytes", "configuration": {"endian": "big"}}, rowpack(4)], "uint32", None),
        ([LITTLE, rowpack(4), {"name": "crc32c"}], "uint32", None),
        ([LITTLE], "uint32", None),
    ],
)
def test_chunk_codec_names_the_pure_chain(chain: Any, dtype: str, expected: int | None) -> None:
    codec = ChunkCodec(layout(*chain, dtype=dtype))
    assert (codec.rowpack, codec.bitpacking) == (expected, None)


def test_chunk_codec_decodes_and_refuses() -> None:
    values = np.arange(10, dtype=np.uint32)
    codec = ChunkCodec(layout(LITTLE, rowpack(4, "gaps")))
    np.testing.assert_array_equal(codec.decode(encode_rowpack(values, "gaps")), values)
    with pytest.raises(CorruptChunkError, match=r"hbx_gpu\.rowpack decodes to 36 bytes, 40 expected"):
        codec.decode(encode_rowpack(values[1:]))
    with pytest.raises(CorruptChunkError, match=r"set0/counts.*elements of 2 bytes"):
        codec.decode(encode_rowpack(np.zeros(20, np.uint16)))
    with pytest.raises(UnsupportedCodecError, match="element_size 3; words of 1, 2, 4 or 8 bytes"):
        ChunkCodec(layout(LITTLE, rowpack(3)))
    big = ChunkCodec(layout({"name": "bytes", "configuration": {"endian": "big"}}, rowpack(4)))
    np.testing.assert_array_equal(big.decode(encode_rowpack(values.byteswap())), values)
