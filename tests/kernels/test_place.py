"""place_columns: what `out[row, remap[c]] = row[c]` of NumPy does to zeros; wrong records are refused."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from tests.kernels import plain_reference as ref

DTYPES = [np.uint8, np.int16, np.float32, np.float64, np.uint64]


def inverse(remap: np.ndarray, n_features: int) -> np.ndarray:
    """Output column -> column of the row."""
    found = np.full(n_features, -1, np.int32)
    found[remap[remap >= 0]] = np.flatnonzero(remap >= 0)
    return found


def run(
    launcher: Any,
    data: np.ndarray,
    offsets: Any,
    row_sources: Any,
    columns: list[np.ndarray],
    n_features: int,
    *,
    records: np.ndarray | None = None,
    n_elements: int | None = None,
    size: int | None = None,
    grid: int = 2,
    block: int = 96,
) -> tuple[np.ndarray, np.ndarray, int]:
    """(rows, status per row, any); memory behind the rows must stay as it is."""
    own = np.arange(n_features)
    made, remap = ref.source_records(columns, [np.array_equal(c, own) for c in columns])
    records = made if records is None else records
    row_sources = np.asarray(row_sources, np.int32)
    n_rows = len(row_sources)
    out = np.full((n_rows + 1) * n_features * data.itemsize, ref.CANARY, np.uint8).view(data.dtype)
    status, flag = np.zeros(n_rows, np.uint32), np.zeros(1, np.uint32)
    args = [
        data,
        np.uint64(len(data) if n_elements is None else n_elements),
        np.asarray(offsets, np.int64),
        row_sources,
        np.uint32(n_rows),
        records,
        np.uint32(len(records)),
        remap,
        np.uint64(len(remap)),
        out,
        np.uint32(n_features),
        np.uint32(data.itemsize if size is None else size),
        status,
        flag,
    ]
    launcher.run("place_columns", grid, block, args)
    assert (out[n_rows * n_features :].view(np.uint8) == ref.CANARY).all()
    return out[: n_rows * n_features].reshape(n_rows, n_features), status, int(flag[0])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("n_features", [1, 31, 33, 128, 300])
def test_columns_are_put_in_place(launcher: Any, dtype: Any, n_features: int) -> None:
    rng = np.random.default_rng(n_features)
    few = rng.permutation(n_features)[: max(1, n_features // 2)].astype(np.int32)
    panel = rng.permutation(n_features + 40).astype(np.int32)
    panel[panel >= n_features] = -1
    remaps = [few, panel, np.arange(n_features, dtype=np.int32), np.full(7, -1, np.int32)]
    row_sources = [0, 1, -1, 2, 3, 1, 0, 99, 2, 2, 1]
    lengths = [len(remaps[s]) if 0 <= s < 4 else 0 for s in row_sources]
    lengths[6] = 0  # of a source, and without elements
    offsets = np.concatenate([[0], np.cumsum(lengths)])
    data = rng.integers(0, 256, int(offsets[-1]) * np.dtype(dtype).itemsize, dtype=np.uint8).view(dtype)
    expected = np.zeros((len(row_sources), n_features), dtype)
    for row, (s, n) in enumerate(zip(row_sources, lengths, strict=True)):
        if n:
            kept = remaps[s] >= 0
            expected[row, remaps[s][kept]] = data[offsets[row] : offsets[row + 1]][kept]
    out, status, flag = run(
        launcher, data, offsets, row_sources, [inverse(r, n_features) for r in remaps], n_features
    )
    assert np.array_equal(out.view(np.uint8), expected.view(np.uint8))
    assert not status.any()
    assert flag == 0


def test_of_columns_with_one_place_the_last_stays(launcher: Any) -> None:
    remap = np.array([2, 0, 2, 0], np.int32)
    data = np.arange(1, 5, dtype=np.float32)
    expected = np.zeros(3, np.float32)
    expected[remap] = data
    out, *_ = run(launcher, data, [0, 4], [0], [inverse(remap, 3)], 3)
    np.testing.assert_array_equal(out[0], expected)


def test_nothing_to_do(launcher: Any) -> None:
    none = np.empty(0, np.float32)
    out, status, flag = run(launcher, none, [0, 0, 0], [-1, -1], [], 5)
    assert not out.any()
    assert not status.any()
    assert flag == 0
    assert run(launcher, none, [0], [], [], 5)[0].shape == (0, 5)


@pytest.mark.parametrize("wrong", ["source", "negative", "width", "remap", "offsets", "elements"])
def test_what_points_outside_is_refused(launcher: Any, wrong: str) -> None:
    """The row is zeros; the rows beside it are what they are."""
    columns = [np.array([1, 0, -1], np.int32), np.array([2, 1, 0], np.int32)]
    data = np.arange(10, 18, dtype=np.uint16)
    offsets, row_sources, n_elements = np.array([0, 3, 6, 8]), [1, 1, 0], 8
    records, _ = ref.source_records(columns, [False, False])
    expected = np.array([[12, 11, 10], [15, 14, 13], [17, 16, 0]], np.uint16)
    bad = 2
    if wrong in ("source", "negative"):
        bad = 1
        row_sources[bad] = 2 if wrong == "source" else -1
    elif wrong == "width":
        records["remap_length"][0] = 4
    elif wrong == "remap":
        records["remap_start"][0] = 4
    elif wrong == "offsets":
        offsets[3] = 5
    else:
        n_elements = 7
    expected[bad] = 0
    out, status, flag = run(
        launcher, data, offsets, row_sources, columns, 3, records=records, n_elements=n_elements
    )
    np.testing.assert_array_equal(out, expected)
    assert status.tolist() == [ref.BAD_PLACE if row == bad else 0 for row in range(3)]
    assert flag == ref.BAD_PLACE


def test_a_column_outside_the_row_is_refused(launcher: Any) -> None:
    columns = [np.array([2, 3, 0], np.int32), np.arange(3, dtype=np.int32)]
    data = np.arange(10, 18, dtype=np.uint16)
    out, status, flag = run(launcher, data, [0, 3, 6, 8], [0, 1, 1], columns, 3)
    np.testing.assert_array_equal(out, [[12, 0, 10], [13, 14, 15], [16, 17, 0]])
    assert status.tolist() == [ref.BAD_PLACE, 0, ref.BAD_PLACE]
    assert flag == ref.BAD_PLACE


@pytest.mark.parametrize("size", [0, 3, 16])
def test_elements_of_no_known_size_are_refused(launcher: Any, size: int) -> None:
    data = np.arange(6, dtype=np.uint8)
    out, status, flag = run(launcher, data, [0, 3, 6], [0, 0], [np.arange(3, dtype=np.int32)], 3, size=size)
    assert (out == ref.CANARY).all()
    assert status.tolist() == [ref.BAD_PLACE] * 2
    assert flag == ref.BAD_PLACE
