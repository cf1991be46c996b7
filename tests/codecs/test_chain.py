"""ChunkCodec: what each chain is taken for, and how damaged chunks and unknown codecs are refused."""

from __future__ import annotations

import itertools
import subprocess
import sys
import zlib
from typing import Any

import numcodecs
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hbx_gpu._codecs import encode_bitpacking
from hbx_gpu._codecs.chain import V2_CHAIN, ChunkCodec
from hbx_gpu._source import ArrayLayout, Codec
from hbx_gpu.errors import CorruptChunkError, CorruptDataError, UnsupportedCodecError

LITTLE: Codec = {"name": "bytes", "configuration": {"endian": "little"}}
BIG: Codec = {"name": "bytes", "configuration": {"endian": "big"}}
PACK4: Codec = {"name": "homeobox.bitpacking", "configuration": {"transform": "delta", "element_size": 4}}
PACK8: Codec = {"name": "homeobox.bitpacking", "configuration": {"transform": "none", "element_size": 8}}
ZSTD: Codec = {"name": "zstd", "configuration": {"level": 0, "checksum": False}}
CRC: Codec = {"name": "crc32c", "configuration": {}}
TRANSPOSE: Codec = {"name": "transpose", "configuration": {"order": [1, 0]}}


def layout(*codecs: Codec, dtype: str = "uint32", chunk: tuple[int, ...] = (10,)) -> ArrayLayout:
    return ArrayLayout(
        path="/nowhere",
        name="set0/counts",
        shape=chunk,
        dtype=np.dtype(dtype),
        chunk_shape=chunk,
        shard_shape=chunk,
        codecs=codecs,
    )


def v2(**changes: Any) -> Codec:
    chain = {"dtype": "<u4", "order": "C", "filters": None, "compressor": None}
    return {"name": V2_CHAIN, "configuration": chain | changes}


@pytest.mark.parametrize(
    ("chain", "dtype", "bitpacking", "is_raw"),
    [
        ([LITTLE], "uint32", None, True),
        ([LITTLE, CRC], "uint32", None, True),
        ([LITTLE, ZSTD, CRC], "uint32", None, False),
        ([LITTLE, CRC, PACK4], "uint32", None, False),
        ([{"name": "bytes"}], "uint8", None, True),
        ([BIG], "uint8", None, True),
        ([BIG], "uint32", None, False),
        ([LITTLE, PACK4], "uint32", 4, False),
        ([LITTLE, PACK4], "uint16", 4, False),
        ([LITTLE, PACK4], "int64", 4, False),
        ([LITTLE, PACK8], "int64", 8, False),
        ([BIG, PACK4], "uint32", None, False),
        ([LITTLE, PACK4, CRC], "uint32", 4, False),
        ([LITTLE, ZSTD], "float32", None, False),
        ([v2()], "uint32", None, True),
        ([v2(dtype=">u4")], "uint32", None, False),
        ([v2(compressor={"id": "zlib", "level": 1})], "uint32", None, False),
        ([v2(order="F")], "uint32", None, True),
    ],
)
def test_special_paths(chain: Any, dtype: str, bitpacking: int | None, is_raw: bool) -> None:
    codec = ChunkCodec(layout(*chain, dtype=dtype))
    assert (codec.bitpacking, codec.is_raw) == (bitpacking, is_raw)
    assert codec.tail == (4 if chain[-1] == CRC and (bitpacking or is_raw) else 0)


def test_raw_needs_c_order_in_two_dimensions() -> None:
    assert not ChunkCodec(layout(v2(order="F"), chunk=(5, 2))).is_raw
    assert not ChunkCodec(layout(TRANSPOSE, LITTLE, chunk=(5, 2))).is_raw
    assert ChunkCodec(layout(LITTLE, chunk=(5, 2))).is_raw


@pytest.mark.parametrize("dtype", ["uint16", "int64", "uint32"])
def test_words_of_four_bytes_hold_any_dtype(dtype: str) -> None:
    values = np.arange(-4, 4).astype(dtype)
    found = ChunkCodec(layout(LITTLE, PACK4, dtype=dtype, chunk=(8,))).decode(
        encode_bitpacking(values, "delta")
    )
    assert found.dtype == dtype
    np.testing.assert_array_equal(found, values)


def test_big_endian_comes_back_native() -> None:
    found = ChunkCodec(layout(BIG)).decode(np.arange(10, dtype=">u4").tobytes())
    assert found.dtype.isnative
    np.testing.assert_array_equal(found, np.arange(10))


@pytest.mark.parametrize("order", list(itertools.permutations(range(3))))
def test_transposed_chunks_are_c_contiguous(order: tuple[int, ...]) -> None:
    values = np.arange(24, dtype=np.uint32).reshape(4, 3, 2)
    transpose: Codec = {"name": "transpose", "configuration": {"order": list(order)}}
    stored = values.transpose(order).tobytes()
    found = ChunkCodec(layout(transpose, LITTLE, chunk=(4, 3, 2))).decode(stored)
    np.testing.assert_array_equal(found, values)
    assert found.flags.c_contiguous


@pytest.mark.parametrize("form", [bytes, bytearray, memoryview, lambda b: np.frombuffer(b, np.uint8)])
def test_takes_any_bytes_like(form: Any) -> None:
    values = np.arange(10, dtype=np.uint32)
    packed = numcodecs.Zstd().encode(values.tobytes())
    np.testing.assert_array_equal(ChunkCodec(layout(LITTLE, ZSTD)).decode(form(packed)), values)


@pytest.mark.parametrize(
    ("chain", "data", "reason"),
    [
        ([LITTLE], bytes(39), r"chunk decodes to 39 bytes, 40 expected for shape \(10,\) of uint32"),
        ([LITTLE], b"", "chunk decodes to 0 bytes"),
        ([LITTLE, PACK4], encode_bitpacking(bytes(44)), "decodes to 44 bytes, 40 expected"),
        ([LITTLE, PACK4], b"\x07\0\0\0\0", "unknown bitpacking transform byte 7"),
        ([LITTLE, ZSTD], b"no zstd frame", "there is no zstd frame at byte 0"),
        ([LITTLE, ZSTD], bytes(numcodecs.Zstd().encode(bytes(44))), "decodes to 44 bytes"),
        ([LITTLE, {"name": "gzip"}], b"\x1f\x8b", "the gzip stream is cut short"),
        ([LITTLE, {"name": "blosc"}], bytes(20), "blosc chunk of 20 bytes, its header says 0"),
        ([LITTLE, {"name": "lz4"}], b"\xff\xff\xff\x7f1", "lz4 decodes to 2,147,483,647 bytes, 40 expected"),
        ([LITTLE, {"name": "numcodecs.zlib"}], b"123", "codec 'numcodecs.zlib' cannot decode"),
        ([LITTLE, CRC], bytes(44), "CRC32C is 0x.*, 0x00000000 is stored"),
        ([LITTLE, CRC], bytes(3), "needs 4 bytes of checksum, the chunk has 3"),
        ([v2(compressor={"id": "zlib"})], zlib.compress(bytes(8)), "zlib decodes to 8 bytes, 40 expected"),
        ([v2(compressor={"id": "zlib"})], b"123", "codec 'zlib' cannot decode"),
    ],
)
def test_damaged_chunks(chain: Any, data: bytes, reason: str) -> None:
    with pytest.raises(CorruptChunkError, match=reason) as caught:
        ChunkCodec(layout(*chain)).decode(data)
    assert caught.value.array == "set0/counts"


@pytest.mark.parametrize("compressor", ["zstd", "gzip", "blosc", "lz4", "zlib", "bz2", "lzma"])
@settings(deadline=None, max_examples=40)
@given(data=st.data())
def test_mutated_compressed_chunks_with_checksum_are_always_found(
    compressor: str, data: st.DataObject
) -> None:
    values = np.arange(10, dtype=np.uint32)
    codec = ChunkCodec(layout(LITTLE, CRC, {"name": compressor}))
    checked = numcodecs.CRC32C(location="end").encode(values.tobytes())
    packed = bytearray(numcodecs.get_codec({"id": compressor}).encode(np.asarray(checked)))
    np.testing.assert_array_equal(codec.decode(bytes(packed)), values)
    position = data.draw(st.integers(0, len(packed) - 1))
    packed[position] ^= data.draw(st.integers(1, 255))
    try:
        found = codec.decode(bytes(packed))
    except CorruptChunkError:
        return
    np.testing.assert_array_equal(found, values)  # header bytes that decoders do not read


@pytest.mark.parametrize(
    ("chain", "error", "message"),
    [
        (
            [LITTLE, {"name": "homeless.codec"}],
            UnsupportedCodecError,
            "'set0/counts': codec 'homeless.codec'",
        ),
        (
            [{"name": "vlen-utf8"}],
            UnsupportedCodecError,
            "codec 'vlen-utf8' cannot be decoded; known codecs: ",
        ),
        ([{"name": "sharding_indexed"}], UnsupportedCodecError, "codec 'sharding_indexed'"),
        ([LITTLE, {"name": "numcodecs.pickle"}], UnsupportedCodecError, "codec 'numcodecs.pickle'"),
        ([v2(filters=[{"id": "pickle"}])], UnsupportedCodecError, "codec 'pickle'"),
        ([v2(compressor={"id": "imagecodecs_jpeg"})], UnsupportedCodecError, "codec 'imagecodecs_jpeg'"),
        (
            [LITTLE, {"name": "lz4", "configuration": {"speed": 9}}],
            UnsupportedCodecError,
            "codec 'lz4' with configuration .*speed",
        ),
        (
            [LITTLE, {**PACK4, "configuration": {"element_size": 2}}],
            UnsupportedCodecError,
            "element_size 2; words of 4 or 8",
        ),
        ([ZSTD], CorruptDataError, "has no 'bytes' step"),
        ([{"name": "bytes"}], CorruptDataError, "needs endian little or big, found None"),
        ([TRANSPOSE, LITTLE], CorruptDataError, r"transpose order \[1, 0\] is not a permutation of 1 axes"),
        ([LITTLE, TRANSPOSE], CorruptDataError, "codec 'transpose' works on arrays, not on bytes"),
        ([LITTLE, ZSTD, {"name": "numcodecs.delta"}], CorruptDataError, "works on arrays"),
    ],
)
def test_chains_that_cannot_be_set_up(chain: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        ChunkCodec(layout(*chain))


@pytest.mark.parametrize("skipped", range(4))
def test_filters_that_an_hdf5_writer_left_out(skipped: int) -> None:
    filters = [{"id": "shuffle", "elementsize": 4}, {"id": "zlib", "level": 1}]
    codec = ChunkCodec(layout(v2(filters=filters[:1], compressor=filters[1])))
    values = np.arange(10, dtype=np.uint32) * 1_000_003
    data: Any = values
    for i, one in enumerate(filters):
        if not skipped >> i & 1:
            data = numcodecs.get_codec(one).encode(data)
    assert np.array_equal(codec.decode(np.frombuffer(bytes(data), np.uint8), skipped), values)


def test_imports_stay_light() -> None:
    """Planning and storage must not pull in zarr, numba or a compressor that no array uses."""
    code = (
        "import sys, hbx_gpu._codecs, hbx_gpu._codecs.chain, hbx_gpu._storage;"
        "print([m for m in ('zarr', 'numba', 'numcodecs', 'torch', 'pandas', 'lancedb') if m in sys.modules])"
    )
    assert subprocess.check_output([sys.executable, "-c", code], text=True).strip() == "[]"
