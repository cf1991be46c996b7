"""hbx_gpu.rowpack: round trips, kernels equal to the reference, any range alone, no damage passes."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numba import njit

from hbx_gpu._codecs import (
    decode_rowpack,
    decode_rowpack_reference,
    encode_rowpack,
    encode_rowpack_reference,
    rowpack,
    rowpack_format,
)
from hbx_gpu._codecs import rowpack_numba as kernels
from hbx_gpu.errors import CorruptChunkError
from tests.codecs.rowpack_cases import DTYPES, SHAPES, VECTORS, damaged, fuzz, make_vectors, seal, varied

DECODERS = [decode_rowpack, decode_rowpack_reference]
TRANSFORMS = ["none", "gaps"]
LENGTHS = st.one_of(
    st.sampled_from([0, 1, 2, 127, 128, 129, 1_023, 1_024, 1_025, 1_152]), st.integers(0, 1_500)
)


@st.composite
def arrays(draw: st.DrawFn) -> np.ndarray:
    rng = np.random.default_rng(draw(st.integers(0, 2**32)))
    return varied(rng, draw(LENGTHS), draw(st.sampled_from(DTYPES)), draw(st.sampled_from(SHAPES)))


def check_round_trip(values: np.ndarray, transform: str) -> bytes:
    """Both encoders make the same bytes, of which both decoders make the values; returns the bytes."""
    chunk = encode_rowpack(values, transform)
    assert chunk == encode_rowpack_reference(values, transform)
    for decode in DECODERS:
        found = decode(chunk)
        assert found.dtype == values.dtype
        np.testing.assert_array_equal(found, values)
    return chunk


@settings(deadline=None, max_examples=60)
@given(values=arrays(), transform=st.sampled_from(TRANSFORMS))
def test_round_trip_and_reference_agree(values: np.ndarray, transform: str) -> None:
    check_round_trip(values, transform)


@pytest.mark.parametrize("transform", TRANSFORMS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_every_width(dtype: str, transform: str) -> None:
    rng = np.random.default_rng(0)
    bits = 8 * np.dtype(dtype).itemsize
    for width in range(bits + 1):
        steps = (
            rng.integers(0, 2**64, 150, dtype=np.uint64) >> np.uint64(64 - width) if width else np.zeros(150)
        )
        values = steps.astype(dtype) if transform == "none" else np.cumsum(steps.astype(dtype), dtype=dtype)
        chunk = check_round_trip(values, transform)
        if width < 32 and transform == "none":
            assert width - 2 <= chunk[40] <= width


@pytest.mark.parametrize("transform", TRANSFORMS)
@pytest.mark.parametrize("extra", range(1, 41))
@pytest.mark.parametrize("dtype", ["u4", "u8"])
def test_exceptions_of_every_width(dtype: str, extra: int, transform: str) -> None:
    """One to many values wider by `extra` bits: patched where the high part is of at most 32 bits."""
    for width in (0, 3, 20):
        if width + extra > 8 * np.dtype(dtype).itemsize:
            continue
        stored = np.full(128, (1 << width) - 1, np.uint64)
        for n in (1, 5, 31, 32, 128):
            stored[:n] = (1 << (width + extra)) - 1
            values = np.cumsum(stored, dtype=dtype) if transform == "gaps" else stored.astype(dtype)
            if transform == "none":
                values[-1] = 0  # a minimum of 0: the widths above are those stored
            chunk = check_round_trip(values, transform)
            exceptions = chunk[48] & 31
            assert exceptions <= n
            if n == 1 and width == 3 and 2 <= extra <= 32 and transform == "none":
                assert (chunk[40], exceptions) == (3, 1)
                assert rowpack_format.PATCH_BITS[chunk[48] >> 5] >= extra


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("transform", TRANSFORMS)
def test_largest_values(dtype: str, transform: str) -> None:
    top = np.iinfo(dtype).max
    for values in ([top], [0, top], [top, 0], [top] * 300, [0, top] * 300, [top, top - 1] * 100):
        check_round_trip(np.array(values, dtype), transform)


def test_all_values_equal_cost_a_directory_and_no_payload() -> None:
    for transform in TRANSFORMS:
        chunk = check_round_trip(np.full(40_960, 123_456, np.uint32), transform)
        assert len(chunk) == 40 + 40 * rowpack_format.record_bytes(
            rowpack_format.TRANSFORMS[transform], 4 * (transform == "gaps")
        )


def test_a_reset_at_every_value() -> None:
    check_round_trip(np.arange(1_000, 0, -1).astype(np.uint16), "gaps")


def test_layout_is_aligned_and_any_byte_form_decodes() -> None:
    values = np.arange(5_000, dtype=np.uint32) * 7
    chunk = encode_rowpack(values, "gaps")
    assert rowpack_format.read_header(chunk).payload_start % 16 == 0
    for shift in range(4):
        moved = np.frombuffer(bytes(shift) + chunk, np.uint8)[shift:]
        for form in (moved, moved.tobytes(), bytearray(moved), memoryview(moved.tobytes())):
            np.testing.assert_array_equal(decode_rowpack(form), values)


@settings(deadline=None)
@given(
    values=arrays(), transform=st.sampled_from(TRANSFORMS), cut=st.tuples(st.floats(0, 1), st.floats(0, 1))
)
def test_a_range_equals_the_slice_and_touches_its_blocks_only(values: Any, transform: Any, cut: Any) -> None:
    n, size = len(values), values.itemsize
    first, last = sorted(round(c * n) for c in cut)
    src = np.frombuffer(encode_rowpack(values, transform), np.uint8)
    out = np.full(-(-n // 128) * 128, 0xA5, np.uint64 if size == 8 else np.uint32)
    assert kernels.decode_rowpack_into(src, size, n, first, last, out) == kernels.OK
    np.testing.assert_array_equal(out[first:last], values[first:last])
    untouched = np.ones(len(out), bool)
    if first < last:
        untouched[first // 128 * 128 : -(-last // 128) * 128] = False
    assert (out[untouched] == 0xA5).all()

    geometry = kernels.parse_header(src, size, n)
    b0, b1 = first // 128, -(-last // 128)
    compact = np.zeros((b1 - b0 + 1) * 128 + 5, out.dtype)
    assert kernels.decode_blocks_at(src, geometry, b0, b1, compact, 5) == kernels.OK
    np.testing.assert_array_equal(compact[5 + first - b0 * 128 :][: last - first], values[first:last])


def test_blocks_decode_without_their_neighbors() -> None:
    """Whatever other blocks hold, a block comes out right: nothing is carried from one to the next."""
    values = np.cumsum(np.random.default_rng(1).integers(0, 50, 4_000)).astype(np.uint32)
    chunk = np.frombuffer(encode_rowpack(values, "gaps"), np.uint8)
    header = rowpack_format.read_header(chunk)
    entry = rowpack.look_up(chunk, header, 13)
    alone = chunk.copy()
    alone[header.payload_start : header.patch_end] = 0xFF
    for at, size in ((entry.payload_at, 16 * entry.width), (entry.patch_at, entry.patch_bytes)):
        alone[at : at + size] = chunk[at : at + size]
    out = np.zeros(4_096, np.uint32)
    alone.flags.writeable = False
    assert kernels.decode_rowpack_into(alone, 4, 4_000, 13 * 128, 14 * 128, out) == kernels.OK
    np.testing.assert_array_equal(out[13 * 128 : 14 * 128], values[13 * 128 : 14 * 128])


def test_callable_from_other_kernels_without_the_gil() -> None:
    @njit(nogil=True)
    def decode_all(slab, starts, out):  # type: ignore[no-untyped-def]
        worst = 0
        for i in range(len(starts) - 1):
            src = slab[starts[i] : starts[i + 1]]
            geometry = kernels.parse_header(src, 4, 300)
            worst = max(worst, geometry[0], kernels.decode_blocks(src, geometry, 0, 3, out[i]))
        return worst

    chunks = [np.arange(i, i + 300, dtype=np.uint32) for i in range(5)]
    encoded = [encode_rowpack(c, "gaps") for c in chunks]
    out = np.zeros((5, 384), np.uint32)
    slab = np.frombuffer(b"".join(encoded), np.uint8)
    assert decode_all(slab, np.cumsum([0, *map(len, encoded)]), out) == kernels.OK
    np.testing.assert_array_equal(out[:, :300], chunks)


# -- vectors and the page that they belong to ---------------------------------------------------------


def test_the_published_vectors_are_what_the_code_makes() -> None:
    assert json.loads(VECTORS.read_text()) == make_vectors(), "run: python -m tests.codecs.rowpack_cases"


@pytest.mark.parametrize("decode", DECODERS)
def test_published_vectors(decode: Any) -> None:
    vectors = json.loads(VECTORS.read_text())
    assert len(vectors["good"]) >= 10
    for vector in vectors["good"]:
        values = np.array(vector["values"], vector["dtype"])
        found = decode(bytes.fromhex(vector["chunk"]))
        assert found.dtype == values.dtype, vector["name"]
        np.testing.assert_array_equal(found, values, err_msg=vector["name"])
        assert encode_rowpack(values, vector["transform"]).hex() == vector["chunk"], vector["name"]
    assert len(vectors["malformed"]) >= 30
    for vector in vectors["malformed"]:
        try:
            decode(bytes.fromhex(vector["chunk"]))
        except CorruptChunkError:
            continue
        pytest.fail(f"decoded in spite of: {vector['reason']}")


def test_the_worked_example_of_the_page() -> None:
    page = (Path(__file__).parents[2] / "docs" / "format.md").read_text()
    example = page.split("## Worked example")[1]
    found = re.search(r"^values: ([\d ]+)$", example, re.MULTILINE)
    assert found is not None
    values = [int(v) for v in found[1].split()]
    rows = re.findall(r"^\| (\d+) \| `([0-9a-f ]+)` \|", example, re.MULTILINE)
    chunk = b""
    for offset, hexed in rows:
        assert int(offset) == len(chunk)
        chunk += bytes.fromhex(hexed)
    assert chunk == encode_rowpack(np.array(values, np.uint16), "gaps")
    vector = next(v for v in make_vectors()["good"] if v["name"] == "worked example")
    assert (vector["values"], vector["chunk"]) == (values, chunk.hex())


# -- damage ---------------------------------------------------------------------------------------------


@settings(deadline=None, max_examples=40)
@given(values=arrays(), transform=st.sampled_from(TRANSFORMS), data=st.data())
def test_any_altered_bit_or_length_is_refused(values: Any, transform: Any, data: st.DataObject) -> None:
    chunk = encode_rowpack(values, transform)
    bit = data.draw(st.integers(0, 8 * len(chunk) - 1))
    flipped = bytearray(chunk)
    flipped[bit // 8] ^= 1 << bit % 8
    cut = data.draw(st.integers(0, len(chunk) - 1))
    for decode in DECODERS:
        for bad in (bytes(flipped), chunk[:cut], chunk + bytes(1)):
            with pytest.raises(CorruptChunkError):
                decode(bad)


@settings(deadline=None)
@given(chunk=st.binary(max_size=400), header=st.booleans())
def test_random_bytes_are_refused(chunk: bytes, header: bool) -> None:
    if header:
        chunk = seal(b"HBRP\x01" + chunk)
    for decode in DECODERS:
        for check in (True, False):
            try:
                decode(chunk, check=check)
            except CorruptChunkError:
                continue
            assert header


def test_damaged_chunks_decode_alike_or_are_refused_by_both() -> None:
    decoded, refused = fuzz(seed=0, n=4_000)
    assert min(decoded, refused) > 500  # both happen, or nothing was tested


@pytest.mark.slow
def test_damaged_chunks_under_bounds_checking(tmp_path: Path) -> None:
    """No load or store leaves its array, whatever the bytes: numba and the intrinsics' callers look."""
    # A cache of its own: numba's does not know whether code was compiled with bounds checking.
    environment = {**os.environ, "NUMBA_BOUNDSCHECK": "1", "NUMBA_CACHE_DIR": str(tmp_path)}
    root = Path(__file__).parents[2]
    command = [sys.executable, "-m", "tests.codecs.rowpack_cases", "--fuzz", "2000"]
    done = subprocess.run(command, env=environment, cwd=root, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert sum(map(int, done.stdout.split())) == 2_000


def test_ranges_of_damaged_chunks_stay_inside() -> None:
    """Range decoding sees less than a whole decode does: it refuses, or writes its blocks and no others."""
    rng = np.random.default_rng(3)
    seen = set()
    for _, chunk in zip(range(2_000), damaged(rng), strict=False):
        if len(chunk) < 40 or chunk[5] not in (1, 2, 4, 8):
            continue
        size, n = chunk[5], int.from_bytes(chunk[8:12], "little")
        if n > 4_000:
            continue
        first, last = sorted(rng.integers(0, n + 1, 2).tolist())
        out = np.full(-(-n // 128) * 128 + 1, 7, np.uint64 if size == 8 else np.uint32)
        status = kernels.decode_rowpack_into(np.frombuffer(chunk, np.uint8), size, n, first, last, out)
        seen.add(status & 0xFF)
        assert (out[: first // 128 * 128] == 7).all()
        assert (out[-(-last // 128) * 128 :] == 7).all()
        assert size > 2 or status or out[first:last].max(initial=0) < 1 << 8 * size
    assert {
        kernels.OK,
        kernels.BAD_HEADER,
        kernels.BAD_GEOMETRY,
        kernels.BAD_BLOCK,
        kernels.BAD_POSITIONS,
    } <= seen


_SEEN_BY_WHOLE_DECODES = {
    "a payload bit flipped, checksum left",
    "payload shorter than its area",
    "unused place of a record",
    "unused base",
    "bytes before the checksum",
    "padding behind the directory",
}


def test_ranges_see_all_that_would_leave_an_area_or_a_block() -> None:
    """Rows are read without looking at the rest of the directory, and without the checksum."""
    for vector in json.loads(VECTORS.read_text())["malformed"]:
        src = np.frombuffer(bytes.fromhex(vector["chunk"]), np.uint8)
        size, n = (int(src[5]), int(src[8])) if len(src) > 8 else (2, 34)
        out = np.zeros(256, np.uint64 if size == 8 else np.uint32)
        status = kernels.decode_rowpack_into(src, size, n, 0, n, out)
        assert (status == kernels.OK) == (vector["reason"] in _SEEN_BY_WHOLE_DECODES), vector["reason"]
        if vector["reason"] in ("an exception too many", "a reset too many"):
            assert status & 0xFF == kernels.BAD_BLOCK  # before a byte behind the patches is taken for one


@pytest.mark.parametrize("dtype", ["u1", "u2", "u4"])
def test_sums_that_overflow_the_element_wrap_in_kernels_too(dtype: str) -> None:
    """No encoder writes such a chunk; rows, whole chunks and the reference agree on it all the same."""
    bits = 8 * np.dtype(dtype).itemsize
    values = np.arange(128).astype(dtype) + np.array(2**bits - 128, dtype)
    values[0] = 0
    chunk = bytearray(encode_rowpack(values))
    chunk[16] = 5
    sealed = seal(chunk)
    expected = values + np.array(5, dtype)
    for decode in DECODERS:
        np.testing.assert_array_equal(decode(sealed), expected)
    out = np.zeros(128, np.uint32)
    src = np.frombuffer(chunk, np.uint8)
    assert kernels.decode_rowpack_into(src, bits // 8, 128, 0, 128, out) == kernels.OK
    np.testing.assert_array_equal(out, expected)


def test_a_promise_of_many_values_allocates_nothing() -> None:
    import tracemalloc

    chunk = bytearray(encode_rowpack(np.zeros(128, np.uint32)))
    chunk[8:12] = (rowpack_format.MAX_VALUES).to_bytes(4, "little")
    tracemalloc.start()
    for decode in DECODERS:
        with pytest.raises(CorruptChunkError, match="268435456 values have a directory up to"):
            decode(seal(chunk))
    assert tracemalloc.get_traced_memory()[1] < 1 << 20
    tracemalloc.stop()


@pytest.mark.parametrize(
    ("request_", "code"),
    [
        ((4, 100, 0, 100), kernels.OK),
        ((4, 100, 100, 100), kernels.OK),
        ((4, 101, 0, 101), kernels.WRONG_COUNT),
        ((4, 99, 0, 99), kernels.WRONG_COUNT),
        ((2, 100, 0, 100), kernels.BAD_HEADER),
        ((8, 100, 0, 100), kernels.BAD_REQUEST),
        ((3, 100, 0, 100), kernels.BAD_HEADER),
        ((4, 100, -1, 100), kernels.BAD_REQUEST),
        ((4, 100, 60, 50), kernels.BAD_REQUEST),
        ((4, 100, 0, 101), kernels.BAD_REQUEST),
        ((4, 129, 0, 129), kernels.BAD_REQUEST),
    ],
)
def test_requests_are_checked(request_: tuple[int, int, int, int], code: int) -> None:
    src = np.frombuffer(encode_rowpack(np.arange(100, dtype=np.uint32)), np.uint8)
    status = kernels.decode_rowpack_into(src, *request_, np.zeros(128, np.uint32))
    assert status & 0xFF == code
    assert "unknown" not in kernels.describe_status(status)


def test_never_reads_behind_its_source() -> None:
    """A truncated chunk in the middle of a slab must be refused although bytes follow it in memory."""
    chunk = encode_rowpack(np.arange(1_000, dtype=np.uint32), "gaps")
    slab = np.frombuffer(chunk + chunk, np.uint8)
    out = np.zeros(1_024, np.uint32)
    for end in range(2 * len(chunk)):
        status = kernels.decode_rowpack_into(slab[:end], 4, 1_000, 0, 1_000, out)
        assert (status == kernels.OK) == (end == len(chunk)), end


def test_metadata_must_agree() -> None:
    chunk = encode_rowpack(np.arange(100, dtype=np.uint16))
    with pytest.raises(CorruptChunkError, match="elements of 2 bytes, the metadata say 4"):
        decode_rowpack(chunk, element_size=4)
    with pytest.raises(CorruptChunkError, match="the header says 100 values, the metadata demand 99"):
        decode_rowpack(chunk, n=99)
    np.testing.assert_array_equal(decode_rowpack(chunk, element_size=2, n=100), np.arange(100))


@pytest.mark.parametrize("encode", [encode_rowpack, encode_rowpack_reference])
def test_encoder_input_is_checked(encode: Any) -> None:
    with pytest.raises(ValueError, match="unknown rowpack transform 'delta'; known: none, gaps"):
        encode(np.zeros(3, np.uint8), "delta")
    for values in (np.zeros(3, np.int32), np.zeros(3, np.float32), np.zeros((2, 2), np.uint8)):
        with pytest.raises(TypeError, match="one-dimensional unsigned integers"):
            encode(values)
    huge = np.broadcast_to(np.uint8(0), rowpack_format.MAX_VALUES + 1)
    with pytest.raises(ValueError, match=r"a rowpack chunk holds 268435456\. Choose smaller chunks"):
        encode(huge)


def test_offsets_fit_32_bits_at_the_largest_chunk() -> None:
    """The worst block times the most blocks: no offset of such a chunk overflows its field."""
    blocks = rowpack_format.MAX_VALUES // 128
    directory = 40 + blocks // 8 * rowpack_format.record_bytes(1, 8)
    assert directory + blocks * (128 * 8 + 31 + 127 + 31 * 4) < 2**32


def test_foreign_byte_order_and_strides() -> None:
    values = np.arange(600, dtype=">u4")[::2]
    assert encode_rowpack(values, "gaps") == encode_rowpack(values.astype("<u4"), "gaps")
