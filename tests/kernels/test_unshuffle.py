"""unshuffle_blocks and check_streams: blocks in order again, reports of decompressors as status words."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from hbx_gpu._engine.device import status
from tests.kernels.unshuffle_reference import BITS, BYTES, NONE, block, shuffled, unshuffle

SIZES = [1, 7, 8, 16, 63, 64, 257, 1000, 1003, 4099]


def laid_out(parts: list[np.ndarray], skip: int = 0) -> tuple[np.ndarray, list[int], list[int]]:
    """An arena of junk with the parts in it, and where results may go: (arena, from, to)."""
    begin, end = [], [4096]
    for part in parts:
        end.append(end[-1] + -(-(len(part) + skip) // 16) * 16)
    arena = np.full(2 * end[-1], 0xA5, np.uint8)
    for part, at in zip(parts, end, strict=False):
        begin.append(at + skip)
        arena[at + skip : at + skip + len(part)] = part
    return arena, begin, [at + end[-1] for at in end[:-1]]


@pytest.mark.parametrize("slices", [1, 5])
@pytest.mark.parametrize("skip", [0, 1], ids=["aligned", "odd"])
@pytest.mark.parametrize("shuffle", [NONE, BYTES, BITS])
@pytest.mark.parametrize("typesize", [1, 2, 3, 4, 8, 17])
def test_blocks_are_put_back_in_order(
    launcher: Any, typesize: int, shuffle: int, skip: int, slices: int
) -> None:
    rng = np.random.default_rng(typesize)
    data = [rng.integers(0, 256, n, dtype=np.uint8) for n in SIZES]
    arena, begin, end = laid_out([shuffled(d, typesize, shuffle) for d in data], skip)
    blocks = np.concatenate(
        [block(a, b + skip, len(d), typesize, shuffle) for a, b, d in zip(begin, end, data, strict=True)]
    )
    before = arena.copy()
    found, any_ = unshuffle(launcher, arena, blocks, slices=slices)
    assert not any_
    assert not found.any()
    for part, to in zip(data, end, strict=True):
        assert np.array_equal(arena[to + skip : to + skip + len(part)], part)
        before[to + skip : to + skip + len(part)] = part
    assert np.array_equal(arena, before)  # nothing else was written


@pytest.mark.parametrize("shuffle", [BYTES, BITS])
@pytest.mark.parametrize("typesize", [2, 4, 8])
def test_a_block_in_many_slices(launcher: Any, typesize: int, shuffle: int) -> None:
    data = np.random.default_rng(0).integers(0, 256, 40 * 1024, dtype=np.uint8)
    arena, (begin,), (end,) = laid_out([shuffled(data, typesize, shuffle)])
    unshuffle(launcher, arena, block(begin, end, len(data), typesize, shuffle), slices=7, grid=4, threads=96)
    assert np.array_equal(arena[end : end + len(data)], data)


@pytest.mark.parametrize(
    "wrong",
    [
        block(8000, 100, 193),
        block(100, 8000, 193),
        block(1 << 63, 0, 8),
        block(0, (1 << 64) - 4, 8),
        block(0, 100, 101),
        block(100, 0, 101),
        block(0, 4096, 64, 0, BYTES),
        block(0, 4096, 64, 4, 3),
    ],
)
def test_places_outside_are_refused(launcher: Any, wrong: np.ndarray) -> None:
    arena = np.arange(8192, dtype=np.int64).astype(np.uint8)
    before = arena.copy()
    found, any_ = unshuffle(launcher, arena, np.concatenate([wrong, block(0, 100, 100)]), slices=3)
    assert found.tolist() == [status.BAD_PLACE, 0]
    assert any_ == status.BAD_PLACE
    before[100:200] = before[:100]
    assert np.array_equal(arena, before)


def test_streams_are_compared_with_what_was_expected(launcher: Any) -> None:
    states = np.array([0, 0, 12, 0, -1, 0], np.int32)
    expected = np.array([5, 0, 7, 1 << 40, 9, 4], np.uint64)
    actual = np.array([5, 0, 7, 1 << 40, 9, 3], np.uint64)
    found, any_ = np.zeros(6, np.uint32), np.zeros(1, np.uint32)
    args = [states, actual, expected, np.uint32(6), found, any_]
    launcher.run("check_streams", 1, 4, args)
    bad = status.BAD_STREAM
    assert found.tolist() == [0, 0, bad, 0, bad, bad]
    assert any_[0] == bad
