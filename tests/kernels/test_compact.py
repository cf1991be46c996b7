"""count_kept, scan_kept, compact_rows, csr_ascending: dropping -1 as NumPy's boolean indexing does."""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np
import pytest

from tests.kernels import plain_reference as ref


def rows(seed: int, lengths: list[int], keep: float) -> tuple[np.ndarray, np.ndarray]:
    """(indices with -1 where dropped, offsets)."""
    rng = np.random.default_rng(seed)
    offsets = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64)
    indices = rng.integers(0, 1000, size=int(offsets[-1])).astype(np.int32)
    indices[rng.random(len(indices)) >= keep] = -1
    return indices, offsets


@pytest.mark.parametrize("keep", [0.0, 0.05, 0.5, 0.97, 1.0])
def test_kept_elements_stay_in_order(launcher: Any, keep: float) -> None:
    indices, offsets = rows(1, [0, 1, 31, 32, 33, 0, 64, 200, 5, 0], keep)
    rng = np.random.default_rng(2)
    layers = [rng.integers(0, 256, size=(len(indices), k), dtype=np.uint8) for k in (1, 2, 4, 8)]
    values = [layer.view(f"u{layer.shape[1]}").ravel() for layer in layers]
    found, found_values, found_offsets = ref.compact(launcher, indices, values, offsets)
    kept = indices != -1
    np.testing.assert_array_equal(found, indices[kept])
    for a, b in zip(found_values, values, strict=True):
        np.testing.assert_array_equal(a, b[kept])
    running = np.concatenate([[0], np.cumsum(kept)])
    np.testing.assert_array_equal(found_offsets, running[offsets])


@pytest.mark.parametrize("block", [32, 64, 1024])
@pytest.mark.parametrize("n_rows", [0, 1, 31, 64, 255, 256, 257, 1100])
def test_scan(launcher: Any, n_rows: int, block: int) -> None:
    kept = np.random.default_rng(n_rows).integers(0, 2**40, size=n_rows)
    out = np.full(n_rows + 2, -7, np.int64)
    launcher.run("scan_kept", 1, block, [kept, np.uint32(n_rows), out])
    np.testing.assert_array_equal(out, [0, *np.cumsum(kept), -7])


def test_nothing_is_written_behind_the_capacity(launcher: Any) -> None:
    indices, offsets = rows(3, [40, 40, 40], 1.0)
    values = np.arange(120, dtype=np.float32)
    for limit in (0, 1, 39, 40, 41, 100):
        indices_out, out = np.full(120, -7, np.int32), np.full(120, -7, np.float32)
        launcher.run(
            "compact_rows",
            2,
            64,
            [
                indices,
                offsets,
                np.uint32(3),
                np.uint64(120),
                offsets,
                indices_out,
                values,
                out,
                np.uint32(4),
                np.uint64(limit),
            ],
        )
        np.testing.assert_array_equal(out, [*values[:limit], *[-7] * (120 - limit)])
        np.testing.assert_array_equal(indices_out, [*indices[:limit], *[-7] * (120 - limit)])


@pytest.mark.parametrize("wrong", [[-1, 5, 10], [0, 7, 5], [0, 5, 11], [0, 2**62, 2**63 - 1]])
def test_rows_with_wrong_offsets_count_nothing(launcher: Any, wrong: list[int]) -> None:
    indices, offsets = np.arange(10, dtype=np.int32), np.array(wrong, np.int64)
    kept = np.full(2, -7, np.int64)
    launcher.run("count_kept", 1, 32, [indices, np.uint64(10), offsets, np.uint32(2), kept])
    valid = [0 <= a <= b <= 10 for a, b in itertools.pairwise(wrong)]
    assert kept.tolist() == [
        b - a if ok else 0 for a, b, ok in zip(wrong[:-1], wrong[1:], valid, strict=True)
    ]


@pytest.mark.parametrize(
    ("indices", "expected"),
    [
        ([], 0),
        ([5, 1, 2, 9, 0], 0),
        ([5, 1, 2, 2, 0], 1),
        ([5, 2, 1, 3, 0], 1),
        ([5, 5, 6, 7, 7], 0),
    ],
)
def test_ascending(launcher: Any, indices: list[int], expected: int) -> None:
    """Rows are [0, 1), [1, 4), [4, 5)."""
    offsets = np.array([0, 1, 4, 5] if indices else [0, 0, 0, 0], np.int64)
    unsorted = np.zeros(1, np.uint32)
    array = np.array(indices, np.int32)
    launcher.run("csr_ascending", 1, 64, [array, offsets, np.uint32(3), np.uint64(len(array)), unsorted])
    assert unsorted[0] == expected


@pytest.mark.parametrize("place", [None, 1, 31, 32, 33, 199])
def test_ascending_in_long_rows(launcher: Any, place: int | None) -> None:
    array = np.tile(np.arange(200, dtype=np.int32), 3)
    if place is not None:
        array[400 + place] = array[400 + place - 1]
    unsorted = np.zeros(1, np.uint32)
    offsets = np.array([0, 200, 400, 600], np.int64)
    launcher.run("csr_ascending", 2, 32, [array, offsets, np.uint32(3), np.uint64(600), unsorted])
    assert unsorted[0] == (place is not None)
