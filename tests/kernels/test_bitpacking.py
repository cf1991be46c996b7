"""bitpacking_decode_u32 and _u64: equal to the NumPy reference, and every damage is a status bit."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from hbx_gpu._codecs.bitpacking import decode_bitpacking_reference, encode_bitpacking_reference
from hbx_gpu._codecs.bitpacking_format import TRANSFORMS
from tests.kernels import plain_reference as ref

SIZES = (4, 8)


def random_words(rng: np.random.Generator, n: int, element_size: int) -> np.ndarray:
    """Words whose bit lengths differ from block to block."""
    top = rng.integers(0, 8 * element_size + 1, size=-(-n // 128)).repeat(128)[:n].astype(np.uint64)
    words = rng.integers(0, 2**64, size=n, dtype=np.uint64)
    shift = np.minimum(np.uint64(64) - top, np.uint64(63))
    return np.where(top == 0, 0, words >> shift).astype(f"<u{element_size}")


def check_all(launcher: Any, chunks: list[bytes], element_size: int, **options: Any) -> None:
    """Decode chunks in one launch; compare all memory with the reference between canaries."""
    layout = {key: options.pop(key) for key in ("offset", "tail") if key in options}
    words = [int.from_bytes(chunk[1:5], "little") for chunk in chunks]
    arena, jobs = ref.pack_arena(chunks, words, element_size, **layout)
    expected = arena.copy()
    for job, chunk in zip(jobs, chunks, strict=True):
        decoded = decode_bitpacking_reference(chunk, element_size).view(np.uint8)
        expected[int(job["out"]) :][: decoded.nbytes] = decoded
    status, flag = ref.decode_packed(launcher, arena, jobs, element_size, **options)
    assert status.tolist() == [0] * len(jobs)
    assert flag == 0
    np.testing.assert_array_equal(arena, expected)


@pytest.mark.parametrize("element_size", SIZES)
@pytest.mark.parametrize("transform", TRANSFORMS)
def test_chunks_of_all_lengths_equal_the_reference(launcher: Any, transform: str, element_size: int) -> None:
    rng = np.random.default_rng(1)
    lengths = (0, 1, 3, 4, 127, 128, 129, 255, 256, 1000, 4500)
    chunks = [
        encode_bitpacking_reference(random_words(rng, n, element_size), transform, element_size)
        for n in lengths
    ]
    check_all(launcher, chunks, element_size, grid=4, block=256)


@pytest.mark.parametrize("element_size", SIZES)
def test_every_width_is_unpacked(launcher: Any, element_size: int) -> None:
    rng = np.random.default_rng(2)
    high = rng.integers(0, 2**32, size=(33, 128), dtype=np.uint64)
    blocks = [row >> np.uint64(32 - w) if w else row * np.uint64(0) for w, row in enumerate(high)]
    words = np.concatenate(blocks)
    if element_size == 8:  # other widths in the high halves
        words = words | words[::-1] << np.uint64(32)
    chunk = encode_bitpacking_reference(words.astype(f"<u{element_size}"), "none", element_size)
    check_all(launcher, [chunk], element_size)


@pytest.mark.parametrize("stage_bytes", [0, 1 << 14])
@pytest.mark.parametrize("offset", range(16))
def test_any_alignment_in_an_arena_that_ends_with_the_chunk(
    launcher: Any, offset: int, stage_bytes: int
) -> None:
    rng = np.random.default_rng(offset)
    chunk = encode_bitpacking_reference(random_words(rng, 300, 4), "delta", 4)
    check_all(launcher, [chunk], 4, offset=offset, tail=0, stage_bytes=stage_bytes)


def test_staged_and_unstaged_chunks_in_one_launch(launcher: Any) -> None:
    rng = np.random.default_rng(3)
    chunks = [encode_bitpacking_reference(random_words(rng, n, 4), "delta_zigzag", 4) for n in (50, 2000, 90)]
    sizes = sorted(len(chunk) for chunk in chunks)
    check_all(launcher, chunks, 4, stage_bytes=sizes[1] + 1, grid=1, offset=1)


@pytest.mark.parametrize("block", [32, 96, 256])
def test_blocks_of_any_size_and_fewer_blocks_than_jobs(launcher: Any, block: int) -> None:
    rng = np.random.default_rng(4)
    chunks = [
        encode_bitpacking_reference(random_words(rng, n, 8), "delta", 8) for n in (700, 300, 1, 900, 128)
    ]
    check_all(launcher, chunks, 8, grid=2, block=block)


@pytest.mark.parametrize("element_size", SIZES)
@pytest.mark.parametrize("transform", TRANSFORMS)
@pytest.mark.parametrize(
    ("first", "last"), [(0, 0), (0, 1), (5, 6), (127, 129), (130, 900), (896, 1000), (1000, 1000)]
)
def test_only_wanted_words_are_written(
    launcher: Any, transform: str, element_size: int, first: int, last: int
) -> None:
    words = random_words(np.random.default_rng(5), 1000, element_size)
    chunk = encode_bitpacking_reference(words, transform, element_size)
    arena, jobs = ref.pack_arena([chunk], [1000], element_size)
    jobs["first_word"], jobs["last_word"] = first, last
    expected = arena.copy()
    out = int(jobs["out"][0])
    wanted = slice(out + first * element_size, out + last * element_size)
    expected[wanted] = words[first:last].view(np.uint8)
    status, flag = ref.decode_packed(launcher, arena, jobs, element_size)
    assert status.tolist() == [0]
    assert flag == 0
    np.testing.assert_array_equal(arena, expected)


def test_carries_wrap_around(launcher: Any) -> None:
    words = np.array([2**32 - 1, 0, 2**31, 5, 2**32 - 2] * 60, np.uint32)
    wide = np.array([2**64 - 1, 0, 2**63, 5, 2**32] * 60, np.uint64)
    for transform in ("delta", "delta_zigzag"):
        check_all(launcher, [encode_bitpacking_reference(words, transform, 4)], 4)
        check_all(launcher, [encode_bitpacking_reference(wide, transform, 8)], 8)


def damaged(name: str) -> tuple[bytes, int]:
    """A damaged chunk of 300 words of 4 bytes, and its status bit."""
    words = np.arange(300, dtype=np.uint32) * 3
    chunk = bytearray(encode_bitpacking_reference(words, "delta", 4))
    widths = [5, 5 + 1 + 16 * chunk[5]]
    if name == "header cut":
        return bytes(chunk[:4]), ref.BAD_HEADER
    if name == "no bytes":
        return b"", ref.BAD_HEADER
    if name == "transform":
        chunk[0] = 3
        return bytes(chunk), ref.BAD_HEADER
    if name == "count":
        chunk[1] ^= 1
        return bytes(chunk), ref.BAD_HEADER
    if name == "width":
        chunk[widths[1]] = 33
        return bytes(chunk), ref.BAD_WIDTH
    if name == "ends before a width byte":
        return bytes(chunk[: widths[1]]), ref.TRUNCATED
    if name == "ends in a block":
        return bytes(chunk[:-1]), ref.TRUNCATED
    chunk[widths[1]] = 32
    return bytes(chunk), ref.TRUNCATED


@pytest.mark.parametrize("stage_bytes", [0, 4096])
@pytest.mark.parametrize(
    "name",
    [
        "header cut",
        "no bytes",
        "transform",
        "count",
        "width",
        "ends before a width byte",
        "ends in a block",
        "reaches over",
    ],
)
def test_damage_is_named_and_the_other_chunks_decode(launcher: Any, name: str, stage_bytes: int) -> None:
    bad, bit = damaged(name)
    good = encode_bitpacking_reference(np.arange(300, dtype=np.uint32), "delta", 4)
    arena, jobs = ref.pack_arena([good, bad, good], [300] * 3, 4)
    expected = arena.copy()
    for k in (0, 2):
        expected[int(jobs["out"][k]) :][:1200] = np.arange(300, dtype=np.uint32).view(np.uint8)
    status, flag = ref.decode_packed(launcher, arena, jobs, 4, grid=1, stage_bytes=stage_bytes)
    assert status.tolist() == [0, bit, 0]
    assert flag == bit
    np.testing.assert_array_equal(arena, expected)


@pytest.mark.parametrize(
    ("field", "value", "bit"),
    [
        ("data", 2**40, ref.BAD_RECORD),
        ("data", 2**64 - 8, ref.BAD_RECORD),
        ("nbytes", 2**32 - 1, ref.BAD_RECORD),
        ("n_words", 301, ref.BAD_HEADER),
        ("n_words", 2**32 - 1, ref.BAD_PLACE),
        ("out", 12, ref.BAD_PLACE),
        ("out", 2**64 - 8, ref.BAD_PLACE),
        ("out", 2**20, ref.BAD_PLACE),
        ("first_word", 301, ref.BAD_PLACE),
        ("last_word", 301, ref.BAD_PLACE),
    ],
)
def test_records_that_point_outside_are_refused(launcher: Any, field: str, value: int, bit: int) -> None:
    chunk = encode_bitpacking_reference(np.arange(300, dtype=np.uint32), "none", 4)
    arena, jobs = ref.pack_arena([chunk], [300], 4)
    jobs[field] = value
    before = arena.copy()
    status, flag = ref.decode_packed(launcher, arena, jobs, 4, max_blocks=3)
    assert status.tolist() == [bit]
    assert flag == bit
    np.testing.assert_array_equal(arena, before)


@pytest.mark.parametrize("element_size", SIZES)
def test_more_blocks_than_shared_memory_was_asked_for(launcher: Any, element_size: int) -> None:
    chunk = encode_bitpacking_reference(np.zeros(300, f"<u{element_size}"), "none", element_size)
    arena, jobs = ref.pack_arena([chunk], [300], element_size)
    enough = ref.packed_blocks(300, element_size)
    assert ref.decode_packed(launcher, arena, jobs, element_size, max_blocks=enough - 1)[1] == ref.BAD_PLACE
    assert ref.decode_packed(launcher, arena, jobs, element_size, max_blocks=enough)[1] == 0


def test_bytes_behind_the_last_block_are_ignored(launcher: Any) -> None:
    chunk = encode_bitpacking_reference(np.arange(130, dtype=np.uint32), "none", 4) + b"\xff" * 9
    check_all(launcher, [chunk], 4)
