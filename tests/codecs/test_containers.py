"""Chunks of general codecs taken apart: their streams, decompressed one by one, are what numcodecs makes."""

from __future__ import annotations

import gzip
import io
import struct
import zlib
from typing import Any

import numcodecs
import numcodecs.lz4
import numcodecs.zstd
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hbx_gpu._codecs.checksum import crc32c
from hbx_gpu._codecs.containers import BIT_SHUFFLE, BYTE_SHUFFLE, Compression, Contents, compression_of
from hbx_gpu._source import ArrayLayout, Codec
from hbx_gpu.errors import CorruptChunkError

BLOSC = [f"blosc-{name}-{shuffle}" for name in ("lz4", "lz4hc", "zlib", "zstd") for shuffle in range(3)]
CODECS = ["zstd", "zstd-checksum", "lz4", "gzip", "zlib", *BLOSC]
DTYPES = ["uint8", "uint16", "uint32", "int64", "float32", "float64"]


def codec(name: str, blocksize: int = 0) -> Any:
    kind, _, rest = name.partition("-")
    if kind == "blosc":
        cname, shuffle = rest.split("-")
        return numcodecs.Blosc(cname=cname, shuffle=int(shuffle), clevel=5, blocksize=blocksize)
    return {
        "zstd": lambda: numcodecs.Zstd(checksum=rest == "checksum"),
        "lz4": numcodecs.LZ4,
        "gzip": lambda: numcodecs.GZip(level=1),
        "zlib": numcodecs.Zlib,
    }[kind]()


def inflate(algorithm: str, data: bytes, size: int) -> bytes:
    """One stream, by a decoder that knows nothing of containers."""
    if algorithm == "zstd":
        return bytes(numcodecs.zstd.decompress(data))
    if algorithm == "lz4":
        return bytes(numcodecs.lz4.decompress(struct.pack("<I", size) + data))
    decoder = zlib.decompressobj(-15)
    return decoder.decompress(data) + decoder.flush()


def unshuffled(data: np.ndarray, shuffle: int, typesize: int) -> np.ndarray:
    """One block in its old order."""
    n = len(data) // typesize
    if shuffle == BYTE_SHUFFLE:
        whole = data[: n * typesize].reshape(typesize, n).T
    elif shuffle == BIT_SHUFFLE and n % 8 == 0:
        bits = np.unpackbits(data[: n * typesize].reshape(typesize, 8, n // 8), axis=2, bitorder="little")
        whole = np.packbits(bits, axis=1, bitorder="little")[:, 0].T
    else:
        return data
    return np.concatenate([whole.ravel(), data[n * typesize :]])


def put_together(contents: Contents, raw: np.ndarray, nbytes: int) -> np.ndarray:
    """The chunk that was taken apart."""
    out, written = np.zeros(nbytes, np.uint8), np.zeros(nbytes, np.uint8)
    for stream in contents.streams:
        begin, n, target, size, stored = stream.tolist()
        assert 0 <= begin
        assert begin + n <= len(raw)
        data = raw[begin : begin + n].tobytes()
        out[target : target + size] = np.frombuffer(
            data if stored else inflate(contents.algorithm, data, size), np.uint8
        )
        written[target : target + size] += 1
    assert (written == 1).all()
    if contents.shuffle:
        steps = range(0, nbytes, contents.block)
        blocks = [out[a : a + contents.block] for a in steps]
        out = np.concatenate([unshuffled(b, contents.shuffle, contents.typesize) for b in blocks])
    return out


def values(rng: np.random.Generator, kind: str, dtype: str, n: int) -> np.ndarray:
    """Counts, noise (which does not compress) or both in turn, so that some streams are stored."""
    counts = rng.geometric(0.3, size=n).astype(dtype)
    noise = rng.integers(0, 256, size=(n, counts.itemsize), dtype=np.uint8)
    if kind == "noise":
        return noise.view(dtype).ravel()
    if kind == "mixed":  # the lower half of every element is noise
        raw = counts.view(np.uint8).reshape(n, -1)
        raw[:, : max(1, counts.itemsize // 2)] = noise[:, : max(1, counts.itemsize // 2)]
    return counts


@given(
    name=st.sampled_from(CODECS),
    dtype=st.sampled_from(DTYPES),
    kind=st.sampled_from(["counts", "noise", "mixed"]),
    n=st.one_of(st.integers(1, 70), st.sampled_from([128, 1000, 4096, 5003, 40_960])),
    blocksize=st.sampled_from([0, 256, 1024, 4096]),
    seed=st.integers(0, 99),
)
@settings(max_examples=300, deadline=None)
def test_streams_are_what_numcodecs_decodes(
    name: str, dtype: str, kind: str, n: int, blocksize: int, seed: int
) -> None:
    data = values(np.random.default_rng(seed), kind, dtype, n)
    raw = np.frombuffer(codec(name, blocksize).encode(data), np.uint8)
    contents = Compression(name.partition("-")[0], False, data.nbytes).open(raw)
    assert contents is not None
    assert np.array_equal(put_together(contents, raw, data.nbytes), data.view(np.uint8))


@pytest.mark.parametrize("name", BLOSC)
def test_blosc_with_several_blocks_and_what_is_stored(name: str) -> None:
    """A million bytes: several blocks, the last one short; half of every element cannot be compressed."""
    rng = np.random.default_rng(0)
    for kind in ("counts", "mixed"):
        data = values(rng, kind, "uint32", 400_001)
        raw = np.frombuffer(codec(name).encode(data), np.uint8)
        contents: Any = Compression("blosc", False, data.nbytes).open(raw)
        assert contents is not None
        assert kind == "mixed" or len(contents.streams) > 1
        assert np.array_equal(put_together(contents, raw, data.nbytes), data.view(np.uint8))
    if name == "blosc-lz4-1":
        assert contents.streams["stored"].any()
        assert not contents.streams["stored"].all()


DATA = np.random.default_rng(5).geometric(0.2, size=3000).astype(np.uint32)


@pytest.mark.parametrize("name", ["zstd", "lz4", "gzip", "blosc-zstd-1"])
def test_the_checksum_comes_first(name: str) -> None:
    stored = bytes(codec(name).encode(DATA))
    good = stored + struct.pack("<I", crc32c(stored))
    compression = Compression(name.partition("-")[0], True, DATA.nbytes)
    contents = compression.open(np.frombuffer(good, np.uint8))
    assert contents is not None
    raw = np.frombuffer(stored, np.uint8)
    assert np.array_equal(put_together(contents, raw, DATA.nbytes), DATA.view(np.uint8))
    for at in (0, 5, len(good) // 2, len(good) - 1):
        bad = np.frombuffer(good, np.uint8).copy()
        bad[at] ^= 4
        with pytest.raises(CorruptChunkError, match="CRC32C"):
            compression.open(bad)
    for n in range(4):
        with pytest.raises(CorruptChunkError, match="checksum"):
            compression.open(np.zeros(n, np.uint8))


@pytest.mark.parametrize("name", ["zstd", "lz4", "blosc-lz4-1", "blosc-zstd-2"])
def test_another_length_than_the_metadata_demand(name: str) -> None:
    raw = np.frombuffer(codec(name).encode(DATA), np.uint8)
    with pytest.raises(CorruptChunkError, match=r"12000 (decoded )?bytes.*11996"):
        Compression(name.partition("-")[0], False, DATA.nbytes - 4).open(raw)


@pytest.mark.parametrize("name", CODECS)
def test_every_length_of_a_truncated_chunk(name: str) -> None:
    """An error where the length can be told; else left to the decoder, or streams that lie inside."""
    raw = np.frombuffer(codec(name, 4096).encode(DATA), np.uint8)
    compression = Compression(name.partition("-")[0], False, DATA.nbytes)
    for n in [*range(60), *range(60, len(raw), 97)]:
        try:
            contents = compression.open(raw[:n])
        except CorruptChunkError:
            continue
        assert not name.startswith("blosc")
        assert not name.startswith("zstd") or n < 4
        if contents is not None:
            assert name in ("lz4", "zlib")  # whose headers say nothing of their own length
            inside(contents, n, DATA.nbytes)


def inside(contents: Contents, length: int, nbytes: int) -> None:
    """No stream reads or writes anywhere else."""
    streams = contents.streams
    assert (streams["begin"] >= 0).all()
    assert (streams["nbytes"] > 0).all()
    assert (streams["begin"] + streams["nbytes"] <= length).all()
    assert (streams["target"] >= 0).all()
    assert (streams["target"] + streams["size"] <= nbytes).all()
    assert streams["size"].sum() == nbytes
    assert (streams["size"] == streams["nbytes"])[streams["stored"]].all()
    if contents.shuffle:
        assert contents.typesize >= 1
        assert 0 < contents.block <= nbytes


@given(
    name=st.sampled_from(CODECS),
    kind=st.sampled_from(["counts", "noise", "mixed"]),
    changes=st.lists(st.tuples(st.integers(0, 60), st.integers(0, 255)), min_size=1, max_size=4),
    far=st.booleans(),
    cut=st.integers(0, 40),
    seed=st.integers(0, 99),
)
@settings(max_examples=500, deadline=None)
def test_damaged_chunks_never_point_outside(
    name: str, kind: str, changes: list[tuple[int, int]], far: bool, cut: int, seed: int
) -> None:
    rng = np.random.default_rng(seed)
    data = values(rng, kind, "uint32", 700)
    raw = np.frombuffer(codec(name, 1024).encode(data), np.uint8).copy()
    for at, value in changes:
        raw[at if not far else int(rng.integers(len(raw)))] = value
    if seed % 3 == 0:
        raw = raw[: len(raw) - cut]
    try:
        contents = Compression(name.partition("-")[0], False, data.nbytes).open(raw)
    except CorruptChunkError:
        return
    if contents is not None:
        inside(contents, len(raw), data.nbytes)


def test_blocks_of_zstd_have_at_most_128_kib() -> None:
    for nbytes in (128 << 10, (128 << 10) + 1):
        frame = struct.pack("<IBI", 0xFD2FB528, 0xA0, nbytes) + (nbytes << 3 | 1).to_bytes(3, "little")
        raw = np.frombuffer(frame + bytes(nbytes), np.uint8)
        compression = Compression("zstd", False, nbytes)
        if nbytes == 128 << 10:
            contents = compression.open(raw)
            assert contents is not None
            assert not put_together(contents, raw, nbytes).any()
        else:
            with pytest.raises(CorruptChunkError, match="has type 0 and 131073 bytes"):
                compression.open(raw)


def test_blosc_lengths_that_lie() -> None:
    data = np.tile(DATA, 13)
    raw = np.frombuffer(codec("blosc-lz4-1", 4096).encode(data), np.uint8)
    assert struct.unpack_from("<I", raw.data, 8) == (65_536,)  # the least of blosc where it splits
    start, _, last = struct.unpack_from("<3i", raw.data, 16)
    for at, value, reason in (
        (4, 12, "12 decoded bytes, 156000 expected"),
        (8, 0, "blocks of 0"),
        (8, 1 << 20, "blocks of 1048576"),
        (12, 99, "its header says 99"),
        (16, 4, "stream at byte 4"),
        (16, len(raw) - 2, "stream at byte"),
        (16, 0xFFFFFFFF, "stream at byte -1"),
        (start, 0, "stream of 0 bytes"),
        (start, 17_000, "stream of 17000 bytes"),
        (start, 0x80000000, "stream of 2147483648 bytes"),
        (last, len(raw) - last - 3, "stream of"),
    ):
        bad = raw.copy()
        bad[at : at + 4] = np.frombuffer(struct.pack("<I", value), np.uint8)
        with pytest.raises(CorruptChunkError, match=reason):
            Compression("blosc", False, data.nbytes).open(bad)
    odd = np.concatenate([np.zeros(1, np.uint8), raw])[1:]  # block starts that are not aligned
    assert Compression("blosc", False, data.nbytes).open(odd) is not None


def test_short_blocks_are_whole_whatever_the_flag_says() -> None:
    """Writers before the flag "don't split" were understood by the length of their blocks alone."""
    raw = np.frombuffer(codec("blosc-zstd-1", 256).encode(DATA), np.uint8).copy()
    assert struct.unpack_from("<I", raw.data, 8) == (256,)
    assert raw[2] & 16
    raw[2] &= ~np.uint8(16)
    assert codec("blosc-zstd-1").decode(raw) == DATA.tobytes()
    contents = Compression("blosc", False, DATA.nbytes).open(raw)
    assert contents is not None
    assert np.array_equal(put_together(contents, raw, DATA.nbytes), DATA.view(np.uint8))


def test_forms_that_are_left_to_the_decoder() -> None:
    """What is sound but of another form: no error, and nothing to send."""
    plain = DATA.tobytes()
    half = len(plain) // 2
    zstd, gz = numcodecs.Zstd(), numcodecs.GZip()
    frame = bytes(zstd.encode(plain))
    unknown = bytearray(frame)
    unknown[4] &= 0x1F  # no content size
    skippable = b"\x50\x2a\x4d\x18" + struct.pack("<I", 3) + b"abc"
    cases = [
        ("zstd", bytes(zstd.encode(plain)) + skippable),
        ("zstd", skippable + frame),
        ("zstd", bytes(unknown)),
        ("gzip", bytes(gz.encode(plain[:half])) + bytes(gz.encode(plain[half:-4]))),
        ("gzip", b"\x1f\x8b\x07" + bytes(gz.encode(plain))[3:]),
        ("blosc", bytes(numcodecs.Blosc(cname="blosclz").encode(DATA))),
    ]
    for container, data in cases:
        assert Compression(container, False, len(plain)).open(np.frombuffer(data, np.uint8)) is None, data[:8]


@pytest.mark.parametrize("extra", [b"", b"\x03\x00abc"])
def test_gzip_headers_with_all_their_fields(extra: bytes) -> None:
    buffer = io.BytesIO()
    with gzip.GzipFile("name.bin", "wb", fileobj=buffer, mtime=1) as file:
        file.write(DATA.tobytes())
    named = buffer.getvalue()
    assert named[3] == 8
    fields = bytes([named[3] | 4 | 16 | 2]) if extra else named[3:4]
    head, body = named[:3] + fields + named[4:10] + extra, named[10:]
    if extra:
        end = body.index(b"\0") + 1
        body = body[:end] + b"a comment\0" + b"\x12\x34" + body[end:]
    raw = np.frombuffer(head + body, np.uint8)
    contents = Compression("gzip", False, DATA.nbytes).open(raw)
    assert contents is not None
    assert np.array_equal(put_together(contents, raw, DATA.nbytes), DATA.view(np.uint8))
    with pytest.raises(CorruptChunkError, match="does not end"):
        Compression("gzip", False, DATA.nbytes).open(raw[:12] if not extra else raw[:17])


def layout(codecs: list[Codec], dtype: str = "uint32", shape: tuple[int, ...] = (100,)) -> ArrayLayout:
    return ArrayLayout(
        path="/nowhere", name="a", shape=shape, dtype=np.dtype(dtype), chunk_shape=shape, shard_shape=shape,
        codecs=tuple(codecs), fill_value=0, key_prefix="c/", key_separator="/",
    )  # fmt: skip


BYTES: Codec = {"name": "bytes", "configuration": {"endian": "little"}}
BIG: Codec = {"name": "bytes", "configuration": {"endian": "big"}}


def v2(compressor: dict[str, Any] | None, **more: Any) -> list[Codec]:
    chain = {"dtype": "<u4", "order": "C", "filters": None, "compressor": compressor} | more
    return [{"name": "zarr.v2", "configuration": chain}]


@pytest.mark.parametrize(
    ("codecs", "expected"),
    [
        ([BYTES, {"name": "zstd"}], ("zstd", False)),
        ([BYTES, {"name": "numcodecs.zstd"}, {"name": "crc32c"}], ("zstd", True)),
        ([BYTES, {"name": "gzip"}, {"name": "crc32c"}], ("gzip", True)),
        ([BYTES, {"name": "numcodecs.lz4"}], ("lz4", False)),
        ([BYTES, {"name": "blosc"}], ("blosc", False)),
        (v2({"id": "zlib"}), ("zlib", False)),
        (v2({"id": "blosc"}, filters=[]), ("blosc", False)),
        ([BYTES], None),
        ([BYTES, {"name": "crc32c"}], None),
        ([BYTES, {"name": "crc32c"}, {"name": "zstd"}], None),
        ([BYTES, {"name": "zstd"}, {"name": "numcodecs.crc32c"}], None),
        ([BYTES, {"name": "numcodecs.shuffle"}, {"name": "zstd"}], None),
        ([{"name": "numcodecs.delta"}, BYTES, {"name": "zstd"}], None),
        ([BYTES, {"name": "numcodecs.bz2"}], None),
        ([BIG, {"name": "zstd"}], None),
        (v2({"id": "zstd"}, dtype=">u4"), None),
        (v2({"id": "zstd"}, filters=[{"id": "delta"}]), None),
        (v2({"id": "lzma"}), None),
        (v2(None), None),
    ],
)
def test_which_chains_are_one_compressor(codecs: list[Codec], expected: tuple[str, bool] | None) -> None:
    found = compression_of(layout(codecs))
    assert (found and (found.container, found.checksummed)) == expected
    assert found is None or found.nbytes == 400


def test_order_matters_for_more_axes_than_one() -> None:
    chain = v2({"id": "zstd"}, order="F")
    assert compression_of(layout(chain)) is not None
    assert compression_of(layout(chain, shape=(10, 10))) is None
    found = compression_of(layout([BYTES, {"name": "zstd"}], shape=(10, 7)))
    assert found is not None
    assert found.nbytes == 280
