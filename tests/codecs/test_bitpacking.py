"""homeobox.bitpacking: real vectors, round trips, and kernels equal to the NumPy reference."""

from __future__ import annotations

import contextlib
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numba import njit

from hbx_gpu._codecs import bitpacking_format as fmt
from hbx_gpu._codecs import (
    decode_bitpacking,
    decode_bitpacking_reference,
    encode_bitpacking,
    encode_bitpacking_reference,
)
from hbx_gpu._codecs.bitpacking_numba import decode_into, describe_status, encode_into, max_encoded_size
from hbx_gpu.errors import CorruptChunkError

TRANSFORMS = ["none", "delta", "delta_zigzag"]
DECODERS = [decode_bitpacking, decode_bitpacking_reference]
ENCODERS = [encode_bitpacking, encode_bitpacking_reference]


class Vector(NamedTuple):
    name: str
    transform: str
    element_size: int
    encoded: bytes
    decoded: np.ndarray


@pytest.fixture(scope="session")
def vectors(shared: Path) -> list[Vector]:
    with np.load(shared / "fixtures" / "bitpacking_vectors.npz") as z:
        arrays = dict(z)
    found = []
    for i, name in enumerate(arrays["name"]):
        size = int(arrays["element_size"][i])
        encoded = arrays["encoded"][slice(*arrays["encoded_offsets"][i : i + 2])]
        decoded = arrays["decoded"][slice(*arrays["decoded_offsets"][i : i + 2])]
        transform = TRANSFORMS[arrays["transform"][i]]
        found.append(Vector(str(name), transform, size, encoded.tobytes(), decoded.astype(f"u{size}")))
    assert len(found) == 208
    return found


@st.composite
def words(draw: st.DrawFn, max_size: int = 700) -> np.ndarray:
    """Words of 4 or 8 bytes whose bit widths change from block to block, wrap-arounds included."""
    size = draw(st.sampled_from([4, 8]))
    n = draw(st.one_of(st.sampled_from([0, 1, 127, 128, 129, 255, 256, 257]), st.integers(0, max_size)))
    rng = np.random.default_rng(draw(st.integers(0, 2**32)))
    widths = rng.integers(0, 8 * size + 1, -(-n // 128) + 1)
    bits = np.repeat(widths, 128)[:n].astype(np.uint64)
    values = rng.integers(0, 2**64, n, dtype=np.uint64, endpoint=False)
    values = np.where(bits == 0, 0, values >> (np.uint64(64) - np.maximum(bits, 1)))
    if draw(st.booleans()):
        values = np.cumsum(values, dtype=np.uint64)
    return values.astype(f"u{size}")


@pytest.mark.parametrize("decode", DECODERS)
def test_decodes_every_real_vector(vectors: list[Vector], decode: Any) -> None:
    for v in vectors:
        found = decode(v.encoded, v.element_size)
        assert found.dtype == v.decoded.dtype, v.name
        np.testing.assert_array_equal(found, v.decoded, err_msg=v.name)


@pytest.mark.parametrize("encode", ENCODERS)
def test_encodes_every_real_vector_to_the_same_bytes(vectors: list[Vector], encode: Any) -> None:
    for v in vectors:
        assert encode(v.decoded, v.transform, v.element_size) == v.encoded, v.name
        assert encode(v.decoded.tobytes(), v.transform, v.element_size) == v.encoded, v.name


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("empty_input", "header needs 5 bytes, the chunk holds 0"),
        ("short_header", "header needs 5 bytes, the chunk holds 4"),
        ("bad_transform", "unknown bitpacking transform byte 3 at offset 0"),
        ("missing_width", "end at offset 5, where a block's width byte is due"),
        ("missing_payload", "width byte at offset 5 reaches beyond the end"),
        ("truncated_payload", "width byte at offset 5 reaches beyond the end"),
        ("second_block_missing", "end at offset 6, where a block's width byte is due"),
        ("u64_high_stream_missing", "end at offset 86, where a block's width byte is due"),
    ],
)
@pytest.mark.parametrize("decode", DECODERS)
def test_refuses_every_malformed_vector(shared: Path, decode: Any, name: str, reason: str) -> None:
    with np.load(shared / "fixtures" / "bitpacking_vectors.npz") as z:
        i = list(z["bad_name"]).index(name)
        data = z["bad_encoded"][slice(*z["bad_encoded_offsets"][i : i + 2])].tobytes()
        element_size = int(z["bad_element_size"][i])
    with pytest.raises(CorruptChunkError, match=reason):
        decode(data, element_size)


@pytest.mark.parametrize("decode", DECODERS)
@pytest.mark.parametrize("width", [33, 200, 255])
def test_refuses_width_above_32(decode: Any, width: int) -> None:
    data = bytes([0]) + (128).to_bytes(4, "little") + bytes([width]) + bytes(16 * width)
    with pytest.raises(CorruptChunkError, match="width byte at offset 5 is above 32"):
        decode(data)


@pytest.mark.parametrize("decode", DECODERS)
@pytest.mark.parametrize("element_size", [4, 8])
def test_a_promise_of_billions_of_words_allocates_nothing(decode: Any, element_size: int) -> None:
    import tracemalloc

    data = bytes([1]) + (2**32 - 1).to_bytes(4, "little") + bytes(1000)
    tracemalloc.start()
    with pytest.raises(CorruptChunkError, match="end at offset 1005"):
        decode(data, element_size)
    assert tracemalloc.get_traced_memory()[1] < 4 << 20
    tracemalloc.stop()


def test_width_zero_blocks_and_trailing_bytes() -> None:
    data = bytes([0]) + (300).to_bytes(4, "little") + bytes(3)
    for decode in DECODERS:
        np.testing.assert_array_equal(decode(data), np.zeros(300, np.uint32))
        np.testing.assert_array_equal(decode(data + b"\xff" * 40), np.zeros(300, np.uint32))


@settings(deadline=None)
@given(values=words(), transform=st.sampled_from(TRANSFORMS))
def test_round_trip_and_reference_agree(values: np.ndarray, transform: str) -> None:
    size = values.itemsize
    encoded = encode_bitpacking(values, transform, size)
    assert encoded == encode_bitpacking_reference(values, transform, size)
    for decode in DECODERS:
        for form in (encoded, bytearray(encoded), memoryview(encoded), np.frombuffer(encoded, np.uint8)):
            np.testing.assert_array_equal(decode(form, size), values)


@pytest.mark.parametrize("transform", TRANSFORMS)
@pytest.mark.parametrize("width", range(33))
def test_every_width_at_every_alignment(width: int, transform: str) -> None:
    rng = np.random.default_rng(width)
    values = (rng.integers(0, 2**32, 333, dtype=np.uint64) >> np.uint64(32 - width)).astype(np.uint32)
    encoded = encode_bitpacking_reference(values, transform)
    for shift in range(4):
        padded = np.frombuffer(bytes(shift) + encoded, np.uint8)
        np.testing.assert_array_equal(decode_bitpacking(padded[shift:]), values)


def check_range(values: np.ndarray, transform: str, first: int, last: int) -> None:
    n, size = len(values), values.itemsize
    src = np.frombuffer(encode_bitpacking(values, transform, size), np.uint8)
    out = np.full(n + 7, 0xA5, values.dtype)
    assert decode_into(src, size, n, first, last, out) == fmt.OK
    np.testing.assert_array_equal(out[first:last], values[first:last])
    assert (out[:first] == 0xA5).all()
    assert (out[last:] == 0xA5).all()


@settings(deadline=None)
@given(values=words(), transform=st.sampled_from(TRANSFORMS), data=st.data())
def test_partial_ranges_write_their_range_and_nothing_else(
    values: Any, transform: Any, data: st.DataObject
) -> None:
    first = data.draw(st.integers(0, len(values)))
    check_range(values, transform, first, data.draw(st.integers(first, len(values))))


@pytest.mark.parametrize("size", [4, 8])
@pytest.mark.parametrize("transform", TRANSFORMS)
@pytest.mark.parametrize(
    "bounds", [(0, 700), (0, 0), (130, 131), (128, 256), (300, 650), (640, 700), (699, 700), (700, 700)]
)
def test_partial_ranges_at_block_borders(bounds: tuple[int, int], transform: str, size: int) -> None:
    values = np.random.default_rng(0).integers(0, 2**32, 700, np.uint64).astype(f"u{size}")
    check_range(values, transform, *bounds)


@settings(max_examples=300, deadline=None)
@given(values=words(400), transform=st.sampled_from(TRANSFORMS), data=st.data())
def test_mutated_streams_decode_or_raise_alike(values: Any, transform: Any, data: st.DataObject) -> None:
    """Two implementations must agree on altered bytes too: same values or the same message."""
    size = values.itemsize
    stream = bytearray(encode_bitpacking(values, transform, size))
    for _ in range(data.draw(st.integers(0, 3))):
        stream[data.draw(st.integers(0, len(stream) - 1))] = data.draw(st.integers(0, 255))
    stream = stream[: data.draw(st.integers(0, len(stream)))] if data.draw(st.booleans()) else stream
    outcomes = []
    for decode in DECODERS:
        try:
            outcomes.append(decode(bytes(stream), size).tolist())
        except CorruptChunkError as error:
            outcomes.append(str(error))
    assert outcomes[0] == outcomes[1]


@settings(deadline=None)
@given(stream=st.binary(max_size=600), size=st.sampled_from([4, 8]))
def test_random_bytes_never_crash(stream: bytes, size: int) -> None:
    for decode in DECODERS:
        with contextlib.suppress(CorruptChunkError):
            assert decode(stream, size).itemsize == size


def test_never_reads_behind_its_source() -> None:
    """A truncated chunk in the middle of a slab must be refused although bytes follow it in memory."""
    encoded = encode_bitpacking(np.arange(1000, dtype=np.uint32), "delta")
    slab = np.frombuffer(encoded + encoded, np.uint8)
    out = np.zeros(1000, np.uint32)
    for end in range(len(encoded)):
        status = decode_into(slab[:end], 4, 1000, 0, 1000, out)
        assert status & 0xFF in (
            fmt.SHORT_HEADER,
            fmt.MISSING_WIDTH,
            fmt.TRUNCATED_BLOCK,
        ), end
    assert decode_into(slab[: len(encoded)], 4, 1000, 0, 1000, out) == fmt.OK


@pytest.mark.parametrize(
    ("request_", "code"),
    [
        ((4, 100, 0, 100), fmt.OK),
        ((4, 101, 0, 101), fmt.WRONG_COUNT),
        ((4, 99, 0, 99), fmt.WRONG_COUNT),
        ((8, 100, 0, 100), fmt.BAD_REQUEST),
        ((4, 100, -1, 100), fmt.BAD_REQUEST),
        ((4, 100, 60, 50), fmt.BAD_REQUEST),
        ((4, 100, 0, 101), fmt.BAD_REQUEST),
        ((4, 1000, 0, 100), fmt.BAD_REQUEST),
    ],
)
def test_requests_are_checked(request_: tuple[int, int, int, int], code: int) -> None:
    src = np.frombuffer(encode_bitpacking(np.arange(100, dtype=np.uint32)), np.uint8)
    status = decode_into(src, *request_, np.zeros(200, np.uint32))
    assert status & 0xFF == code
    assert describe_status(status)
    if code == fmt.WRONG_COUNT:
        assert "promises 100 words" in describe_status(status)


def test_callable_from_other_kernels_without_the_gil() -> None:
    @njit(nogil=True)
    def decode_all(slab, starts, out):  # type: ignore[no-untyped-def]
        worst = 0
        for i in range(len(starts) - 1):
            worst = max(worst, decode_into(slab[starts[i] : starts[i + 1]], 4, 300, 0, 300, out[i]))
        return worst

    chunks = [np.arange(i, i + 300, dtype=np.uint32) for i in range(5)]
    encoded = [encode_bitpacking(c, "delta") for c in chunks]
    starts = np.cumsum([0, *map(len, encoded)])
    out = np.zeros((5, 300), np.uint32)
    assert decode_all(np.frombuffer(b"".join(encoded), np.uint8), starts, out) == 0
    np.testing.assert_array_equal(out, chunks)


def test_every_byte_of_the_number_of_words_counts() -> None:
    values = np.arange(70_000, dtype=np.uint32)
    stored = np.frombuffer(bytes(encode_bitpacking(values)), np.uint8)
    assert np.array_equal(decode_bitpacking(stored), values)
    out = np.empty(len(values), np.uint32)
    for byte in range(4):
        wrong = stored.copy()
        wrong[1 + byte] ^= 1
        status = int(decode_into(wrong, 4, len(values), 0, len(values), out))
        assert (status & 0xFF, status >> 8) == (fmt.WRONG_COUNT, len(values) ^ 1 << 8 * byte)


def test_encoder_fits_the_size_it_announces() -> None:
    for size in (4, 8):
        values = np.full(257, 2 ** (8 * size) - 1, f"u{size}")
        out = np.empty(max_encoded_size(257, size), np.uint8)
        assert encode_into(values, 0, out) == len(out)


def test_encoder_input_is_checked() -> None:
    with pytest.raises(ValueError, match=r"words of 4 bytes, the input has 510 bytes"):
        encode_bitpacking(bytes(510))
    with pytest.raises(ValueError, match="unknown bitpacking transform 'zigzag'; known: none, delta"):
        encode_bitpacking(b"", "zigzag")
    with pytest.raises(ValueError, match="element_size must be 4 or 8, not 2"):
        encode_bitpacking(b"", element_size=2)
    with pytest.raises(ValueError, match="element_size must be 4 or 8, not 5"):
        decode_bitpacking(bytes(5), 5)
    with pytest.raises(TypeError, match="float32"):
        encode_bitpacking(np.zeros(4, np.float32))


def test_integer_arrays_count_as_their_little_endian_bytes() -> None:
    pairs = np.array([1, 2, 3, 4], np.uint16)
    np.testing.assert_array_equal(decode_bitpacking(encode_bitpacking(pairs)), [1 | 2 << 16, 3 | 4 << 16])
    signed = np.array([-1, 5], np.int64)
    words_ = decode_bitpacking(encode_bitpacking(signed.astype(">i8")))
    np.testing.assert_array_equal(words_.view(np.int64), signed)
    matrix = np.arange(12, dtype=np.uint32).reshape(3, 4)
    assert encode_bitpacking(matrix.T) == encode_bitpacking(np.ascontiguousarray(matrix.T))
