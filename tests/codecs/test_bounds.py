"""Decompression bombs: a few bytes that claim, or make, gigabytes end in an error in little memory."""

from __future__ import annotations

import bz2
import gzip
import lzma
import struct
import zlib
from typing import Any

import numcodecs
import numpy as np
import pytest

from hbx_gpu._codecs.bounds import Room, zstd_size
from hbx_gpu._codecs.chain import ChunkCodec
from hbx_gpu._source import ArrayLayout, Codec
from hbx_gpu.errors import CorruptChunkError

LITTLE: Codec = {"name": "bytes", "configuration": {"endian": "little"}}
N = 1000
VALUES = np.arange(N, dtype="<u4")
HUGE = 8 << 20
NAMES = ["zstd", "gzip", "zlib", "bz2", "lzma", "lz4", "blosc"]


def codec(*names: str) -> ChunkCodec:
    others: list[Codec] = [{"name": name, "configuration": {}} for name in names]
    chain = (LITTLE, *others)
    return ChunkCodec(ArrayLayout("p", "a", (N,), np.dtype("u4"), (N,), (N,), chain))


def zstd_frame(pieces: list[int], *, size: int | None = None) -> bytes:
    """A frame of repeated bytes, 4 bytes per block, which says its size or not."""
    header = b"\x28\xb5\x2f\xfd" + (b"\x00\x58" if size is None else b"\xe0" + struct.pack("<Q", size))
    blocks = [
        struct.pack("<I", n << 3 | 1 << 1 | (i == len(pieces) - 1))[:3] + b"a" for i, n in enumerate(pieces)
    ]
    return header + b"".join(blocks)


def encoded(name: str, raw: bytes) -> bytes:
    return bytes(numcodecs.get_codec({"id": name}).encode(np.frombuffer(raw, np.uint8)))


def bombs(name: str) -> list[bytes]:
    """Chunks that decode, or claim to decode, to `HUGE` bytes or more."""
    found = [encoded(name, bytes(HUGE))]
    if name == "zstd":
        found += [zstd_frame([1 << 17] * 64), zstd_frame([1 << 17], size=1 << 50), found[0] * 3]
        found.append(b"\x50\x2a\x4d\x18\x04\0\0\0abcd" + found[0])
    if name == "gzip":
        found += [gzip.compress(bytes(HUGE // 2)) * 2, gzip.compress(bytes(4 * N)) * 9000]
    if name == "lz4":
        found.append(struct.pack("<I", 0x7FFFFFFF) + found[0][4:])
    if name == "blosc":
        small = bytearray(encoded(name, VALUES.tobytes()))
        small[4:8] = struct.pack("<I", 0x7FFFFF00)
        found.append(bytes(small))
    return found


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("outer", [(), ("crc32c",), ("gzip",), ("zstd",)], ids=str)
def test_honest_chunks_decode(name: str, outer: tuple[str, ...]) -> None:
    data = encoded(name, VALUES.tobytes())
    for other in outer:
        data = encoded(other, data)
    np.testing.assert_array_equal(codec(name, *outer).decode(data), VALUES)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("outer", [(), ("gzip",)], ids=str)
def test_bombs_end_in_an_error(name: str, outer: tuple[str, ...]) -> None:
    for bomb in bombs(name):
        data = bomb
        for other in outer:
            data = encoded(other, data)
        # Our own words: nothing was decompressed beyond what the metadata demand.
        with pytest.raises(CorruptChunkError, match=r"expected$|expected to decompress|too small"):
            codec(name, *outer).decode(data)


def test_a_bomb_as_the_outer_codec() -> None:
    """What a compressor is fed is bounded too, by what it can have made of a chunk."""
    for name in ("gzip", "bz2", "lz4", "zstd"):
        with pytest.raises(CorruptChunkError, match="at most"):
            codec("zstd", name).decode(encoded(name, bytes(HUGE)))


@pytest.mark.parametrize("name", NAMES)
def test_chunks_of_another_length(name: str) -> None:
    for n in (0, N - 1, N + 1):
        with pytest.raises(CorruptChunkError):
            codec(name).decode(encoded(name, np.arange(n, dtype="<u4").tobytes()))


@pytest.mark.parametrize(
    ("name", "compress"),
    [("gzip", gzip.compress), ("zlib", zlib.compress), ("bz2", bz2.compress), ("lzma", lzma.compress)],
)
def test_streams_that_are_cut_short_or_follow_each_other(name: str, compress: Any) -> None:
    raw = VALUES.tobytes()
    with pytest.raises(CorruptChunkError):
        codec(name).decode(compress(raw)[:-9])
    if name != "zlib":
        data = compress(raw[:1000]) + compress(raw[1000:])
        np.testing.assert_array_equal(codec(name).decode(data), VALUES)


def test_zstd_frames_that_do_not_say_their_size() -> None:
    ones = np.full(N, 0x61616161, "<u4")
    np.testing.assert_array_equal(codec("zstd").decode(zstd_frame([3000, 1000])), ones)
    for pieces in ([3999], [4001], [1 << 17] * 500):
        with pytest.raises(CorruptChunkError):
            codec("zstd").decode(zstd_frame(pieces))


@pytest.mark.parametrize("n", [0, 1, 255, 256, 65_791, 65_792, 1 << 20])
def test_size_of_zstd_frames(n: int) -> None:
    for level, checksum in ((0, False), (19, True)):
        data = numcodecs.Zstd(level, checksum).encode(np.random.default_rng(n).bytes(n))
        assert zstd_size(np.frombuffer(data, np.uint8)) == n
        assert zstd_size(np.frombuffer(data * 2, np.uint8)) == 2 * n


@pytest.mark.parametrize("name", ["hbx_gpu.rowpack", "homeobox.bitpacking"])
def test_packed_chunks_of_another_length(name: str) -> None:
    from hbx_gpu._codecs import encode_bitpacking, encode_rowpack

    encode = encode_rowpack if "rowpack" in name else encode_bitpacking
    np.testing.assert_array_equal(codec(name).decode(encode(VALUES)), VALUES)
    for values in (np.zeros(10 * N, "u4"), VALUES[:-1]):
        with pytest.raises(CorruptChunkError, match="4,000 expected"):
            codec(name).decode(encode(values))


def test_filters_of_zarr_2_have_room() -> None:
    filters = [{"id": "delta", "dtype": "<u4", "astype": "<i8"}, {"id": "zlib", "level": 1}]
    setting: dict[str, Any] = {
        "dtype": "<u4",
        "order": "C",
        "filters": filters,
        "compressor": {"id": "gzip", "level": 1},
    }
    chain: tuple[Codec] = ({"name": "zarr.v2", "configuration": setting},)
    opened = ChunkCodec(ArrayLayout("p", "a", (N,), np.dtype("u4"), (N,), (N,), chain))
    data: Any = VALUES
    for config in [*filters, setting["compressor"]]:
        data = numcodecs.get_codec(dict(config)).encode(data)
    np.testing.assert_array_equal(opened.decode(data), VALUES)


def test_room() -> None:
    Room(5).check(4, "x")
    with pytest.raises(CorruptChunkError, match="x decodes to 6 bytes, at most 5 expected"):
        Room(5).check(6, "x")
    with pytest.raises(CorruptChunkError, match="x decodes to 4 bytes, 5 expected"):
        Room(5, exact=True).check(4, "x")
