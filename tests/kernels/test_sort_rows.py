"""sort_rows: rows by ascending column, dropped elements left out, as NumPy sorts them."""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np
import pytest

from tests.kernels import plain_reference as ref


def rows(seed: int, lengths: list[int], n_features: int, keep: float = 1.0) -> tuple[np.ndarray, np.ndarray]:
    """(indices, offsets): columns in no order, each once within its row; -1 where dropped."""
    rng = np.random.default_rng(seed)
    lines = [rng.permutation(np.unique(rng.integers(0, n_features, n))) for n in lengths]
    indices = np.concatenate([*lines, np.empty(0)]).astype(np.int32)
    indices[rng.random(len(indices)) >= keep] = -1
    return indices, np.cumsum([0, *map(len, lines)]).astype(np.int64)


def expected(
    indices: np.ndarray, values: np.ndarray, offsets: np.ndarray
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    columns, moved, ends = [], [], [0]
    for a, b in itertools.pairwise(offsets):
        kept = indices[a:b] != -1
        order = np.argsort(indices[a:b][kept], kind="stable")
        columns.append(indices[a:b][kept][order])
        moved.append(values[a:b][kept][order])
        ends.append(ends[-1] + int(kept.sum()))
    return np.concatenate([*columns, []]), np.concatenate([*moved, []]), np.array(ends)


@pytest.mark.parametrize("keep", [0.0, 0.3, 1.0])
@pytest.mark.parametrize(("n_features", "tile_words"), [(1, 1), (33, 2), (1000, 32), (1000, 3), (5000, 157)])
def test_rows_are_sorted(launcher: Any, n_features: int, tile_words: int, keep: float) -> None:
    indices, offsets = rows(1, [0, 1, 31, 32, 33, 0, 64, 200, 5, 0], n_features, keep)
    rng = np.random.default_rng(2)
    for dtype in (np.uint8, np.uint16, np.float32, np.float64):
        values = rng.integers(0, 200, len(indices)).astype(dtype)
        found, moved, ends, unsorted = ref.sort_rows(
            launcher, indices, values, offsets, n_features, tile_words
        )
        for one, other in zip((found, moved, ends), expected(indices, values, offsets), strict=True):
            np.testing.assert_array_equal(one, other)
        assert not unsorted


def test_rows_with_repeats_keep_their_order_and_are_reported(launcher: Any) -> None:
    """Whoever made the rows sums them; the other rows are sorted all the same."""
    indices = np.array([5, 2, 9, 7, -1, 2, 7, 3, 8, 1], np.int32)
    offsets, values = np.array([0, 3, 7, 10], np.int64), np.arange(10, dtype=np.float32)
    found, moved, ends, unsorted = ref.sort_rows(launcher, indices, values, offsets, 10, 1)
    assert found.tolist() == [2, 5, 9, 7, 2, 7, 1, 3, 8]
    assert moved.tolist() == [1, 0, 2, 3, 5, 6, 9, 7, 8]
    assert (ends.tolist(), unsorted) == ([0, 3, 6, 9], 1)


@pytest.mark.parametrize("wrong", [[-1, 5, 10], [0, 7, 5], [0, 5, 11], [0, 2**62, 2**63 - 1]])
def test_rows_with_wrong_offsets_write_nothing(launcher: Any, wrong: list[int]) -> None:
    indices, offsets = np.arange(10, dtype=np.int32)[::-1].copy(), np.array(wrong, np.int64)
    values, out = np.arange(10, dtype=np.float32), np.full(10, -7, np.float32)
    columns, unsorted = np.full(10, -7, np.int64), np.zeros(1, np.uint32)
    launcher.run(
        "sort_rows", 2, 64,
        [indices, offsets, np.uint32(2), np.uint64(10), offsets, columns, values, out, np.uint32(4),
         np.uint64(10), np.uint32(10), np.uint32(1), unsorted],
        8,
    )  # fmt: skip
    for a, b in itertools.pairwise(wrong):
        if not 0 <= a <= b <= 10:
            continue
        assert columns[a:b].tolist() == sorted(indices[a:b].tolist())
        columns[a:b], out[a:b] = -7, -7
    assert (columns == -7).all()
    assert (out == -7).all()


def test_nothing_is_written_beyond_the_capacity(launcher: Any) -> None:
    indices, offsets = rows(3, [40, 40, 40], 64)
    values = np.arange(len(indices), dtype=np.float32)
    columns, moved, _ = expected(indices, values, offsets)
    for limit in (0, 1, int(offsets[1]), int(offsets[1]) + 5, len(indices)):
        found, out = np.full(len(indices), -7, np.int64), np.full(len(indices), -7, np.float32)
        launcher.run(
            "sort_rows", 2, 64,
            [indices, offsets, np.uint32(3), np.uint64(len(indices)), offsets, found, values, out,
             np.uint32(4), np.uint64(limit), np.uint32(64), np.uint32(2), np.zeros(1, np.uint32)],
            16,
        )  # fmt: skip
        np.testing.assert_array_equal(found, [*columns[:limit], *[-7] * (len(indices) - limit)])
        np.testing.assert_array_equal(out, [*moved[:limit], *[-7] * (len(indices) - limit)])
