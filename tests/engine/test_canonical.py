"""Rows as sparse tensors want them: int64 columns that ascend, in whatever order they are stored."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import scipy.sparse as sp
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from hbx_gpu._engine.host import HostEngine, canonical, kernels
from hbx_gpu._engine.reference import ReferenceEngine
from hbx_gpu._plan.rows import plan_rows
from hbx_gpu._source import RowIndex, Source
from hbx_gpu._storage.plain import plain_layout
from hbx_gpu.batch import SparseBatch
from hbx_gpu.dataloader import CellDataset, sparse_to_csr_collate
from hbx_gpu.testing import CODECS, StoredGroup, stored_groups, write_sources
from tests.engine.suite import Rows


def both(sources: list[Source], rows: RowIndex, n_features: int, selection: np.ndarray) -> list[Any]:
    """Rows of both engines, checked to be equal: ``[columns, values, offsets]``."""
    found = []
    for engine in (HostEngine, ReferenceEngine):
        opened = Rows(engine, sources, rows, n_features)
        plan = plan_rows(opened.table, opened.rows, selection)
        slab = opened.reader.read(opened.directory.extents(plan.chunks))
        columns, (values,), offsets = opened.engine.canonical(plan, slab)
        opened.reader.close()
        found.append([columns, values, offsets])
    for one, other in zip(*found, strict=True):
        assert one.dtype == other.dtype
        np.testing.assert_array_equal(one, other)
    return found[0]


@given(case=stored_groups(), seed=st.integers(0, 2**32 - 1), n=st.integers(0, 50))
@settings(max_examples=25, deadline=None, suppress_health_check=list(HealthCheck))
def test_rows_equal_the_reference(case: tuple[list[StoredGroup], int], seed: int, n: int) -> None:
    """Of any codec, with columns in any order, dropped or not."""
    groups, n_features = case
    with tempfile.TemporaryDirectory() as folder:
        sources, rows = write_sources(Path(folder), groups)
        both(sources, rows, n_features, np.random.default_rng(seed).integers(0, len(rows), size=n))


@given(
    seed=st.integers(0, 2**32 - 1),
    n_features=st.sampled_from([1, 63, 64, 65, 256, 257, 5_000, 70_000, 20_000_000]),
    lengths=st.lists(st.integers(0, 400), max_size=8),
    repeats=st.sampled_from([0.0, 0.02, 0.9]),
    dtype=st.sampled_from(["f4", "u4", "u1", "i8", "f2"]),
)
@settings(max_examples=80, deadline=None)
def test_the_sort_equals_scipy(
    seed: int, n_features: int, lengths: list[int], repeats: float, dtype: str
) -> None:
    """Rows of any length in matrices of any width: by rank, by radix, with repeated columns."""
    rng = np.random.default_rng(seed)
    lines = []
    for length in lengths:
        line = np.unique(rng.integers(0, n_features, length))
        rng.shuffle(line)
        again = rng.random(len(line)) < repeats
        line[again] = rng.choice(line, again.sum()) if len(line) else line[again]
        lines.append(line if rng.random() < 0.7 else np.sort(line))
    offsets = np.cumsum([0, *map(len, lines)]).astype(np.int64)
    columns = np.concatenate([*lines, np.empty(0)]).astype(np.int32)
    values = rng.integers(0, 100, len(columns)).astype(dtype)
    batch = SparseBatch(columns, values, offsets, n_features)
    before = columns.copy(), values.copy()
    x = sparse_to_csr_collate(batch)["X"]
    shape = len(lines), n_features
    matrix = sp.csr_matrix((values.astype(np.float32), columns.copy(), offsets.copy()), shape=shape)
    matrix.sum_duplicates()
    np.testing.assert_array_equal(x.crow_indices().numpy(), matrix.indptr)
    np.testing.assert_array_equal(x.col_indices().numpy(), matrix.indices)
    np.testing.assert_array_equal(x.values().numpy(), matrix.data)
    assert all(
        (a == b).all() for a, b in zip(before, (columns, values), strict=True)
    )  # the batch is as it was


def test_repeats_are_summed_in_stored_order() -> None:
    """In float32, so that the sum is the same on every run: 2**24 + 1 + 1 loses both."""
    for values, total in (([2**24, 1, 1], 2**24), ([1, 1, 2**24], 2**24 + 2)):
        columns, layer = np.array([9, 3, 9, 9]), np.array([values[0], 5, *values[1:]], np.float32)
        offsets, columns, (layer,) = canonical.sort_rows(
            np.array([0, 4]), columns, [layer], 10, np.ones(1, bool)
        )
        assert (offsets.tolist(), columns.tolist(), layer.tolist()) == ([0, 2], [3, 9], [5, total])


@pytest.mark.parametrize("column", [-1, 6])
def test_a_column_outside_the_matrix_is_refused(column: int) -> None:
    batch = SparseBatch(np.array([3, column], np.int32), np.ones(2, np.float32), np.array([0, 2]), 6)
    with pytest.raises(ValueError, match=rf"column {column}, outside \[0, 6\)"):
        sparse_to_csr_collate(batch)


@pytest.mark.parametrize("codec", CODECS)
@pytest.mark.parametrize("chunk", [7, 64])
def test_where_rows_stop_ascending(codec: str, chunk: int, tmp_path: Path) -> None:
    """Within a chunk, at its border, by a repeat; and rows that do ascend."""
    rng = np.random.default_rng(3)
    lines = [np.sort(rng.choice(60, size, replace=False)) for size in rng.integers(0, 25, 40)]
    for at, line in enumerate(lines):
        if at % 2 and len(line) > 1:
            place = int(rng.integers(1, len(line)))
            line[place] = line[place - 1] - (at % 4 == 1 and line[place - 1] > 0)
    indptr = np.concatenate([[0], np.cumsum([len(line) for line in lines])])
    indices = np.concatenate(lines).astype(np.int32)
    matrix = sp.csr_matrix((np.ones(len(indices), np.uint32), indices, indptr), (40, 60))
    sources, rows = write_sources(
        tmp_path, [StoredGroup(matrix, np.arange(60, dtype=np.int32), codec, chunk)]
    )
    columns, values, _ = both(sources, rows, 60, rng.permutation(40))
    assert len(columns) < len(indices)
    assert values.max() == 2


def test_several_layers_move_together(tmp_path: Path) -> None:
    rng = np.random.default_rng(5)
    matrix = sp.random(30, 50, 0.4, "csr", random_state=rng, dtype=np.float32)
    doubled = matrix.copy()
    doubled.data = doubled.data * 2
    remap = rng.permutation(50).astype(np.int32)
    remap[:3] = 7  # three genes that count as one
    first, rows = write_sources(tmp_path / "a", [StoredGroup(matrix, remap, "none", 64)])
    second, _ = write_sources(tmp_path / "b", [StoredGroup(doubled, remap, "none", 64)], layer="doubled")
    sources = [Source("both", first[0].index, first[0].layers | second[0].layers, remap)]
    dataset = CellDataset(
        sources, rows, layer=["counts", "doubled"], n_features=50, feature_uids=np.arange(50)
    )
    batch = dataset.with_wide_columns()[np.arange(30)]
    assert batch.ascending
    assert batch.values is batch.layers["counts"] or (batch.values == batch.layers["counts"]).all()
    np.testing.assert_array_equal(batch.layers["doubled"], 2 * batch.layers["counts"])


@pytest.mark.parametrize(
    ("columns", "values"),
    [("u1", "f2"), ("u2", "f4"), ("u4", "u1"), ("i4", "u2"), ("u8", "f8"), ("i8", "i4"), ("u2", "u8")],
)
def test_large_outputs_are_those_of_small_ones(columns: str, values: str, tmp_path: Path) -> None:
    """Beyond some megabytes they are written past the caches, 32 aligned bytes at once; rows lie anywhere."""
    rng = np.random.default_rng(1)
    n = 9 * kernels._FAR // 8 // min(4, np.dtype(values).itemsize)
    lengths = rng.integers(0, 4000, n // 1000)
    lengths = lengths[: np.searchsorted(np.cumsum(lengths), n)].astype(np.int32)
    width = 4000 if np.dtype(columns).itemsize > 1 else 200
    arrays = (rng.integers(0, 200, n).astype(columns), rng.integers(0, 200, n).astype(values))
    start = np.cumsum(lengths, dtype=np.int64) - lengths
    if width > 200:  # rows that ascend: sparse tensors are then made of what was decoded as it stands
        for first, length in zip(start.tolist(), lengths.tolist(), strict=True):
            arrays[0][first : first + length] = np.arange(length)
    for name, array in zip(("columns", "values"), arrays, strict=True):
        array.tofile(tmp_path / name)
    index, layer = (
        plain_layout(tmp_path / a, b.dtype, n) for a, b in zip(("columns", "values"), arrays, strict=True)
    )
    source = Source("all", index, {"counts": layer}, np.arange(width, dtype=np.int32), repeats=True)
    rows = RowIndex(np.zeros(len(lengths), np.int32), start, lengths)
    dataset = CellDataset([source], rows, layer="counts", n_features=width, feature_uids=np.arange(width))
    order = rng.permutation(len(lengths))
    forms = [(dataset, values)] + [(dataset.with_wide_columns(), "f4")] * (width > 200)
    for form, dtype in forms:
        whole = form[order]
        assert min(whole.indices.nbytes, whole.values.nbytes) > kernels._FAR
        assert whole.values.dtype == dtype
        for i, row in enumerate(order.tolist()):
            here, there = slice(*whole.offsets[i : i + 2]), slice(start[row], start[row] + lengths[row])
            assert (whole.indices[here] == arrays[0][there]).all()
            assert (whole.values[here] == arrays[1][there]).all()


@pytest.mark.parametrize("order", ["upward", "turned", "dropped"])
def test_large_outputs_through_a_remap(order: str, tmp_path: Path) -> None:
    """Looked up line by line: rows shorter and longer than a line, ascending or not, also across lines."""
    rng = np.random.default_rng(2)
    width, lengths = 6000, rng.integers(0, 6000, 1600).astype(np.int32)
    assert lengths.sum() * 4 > kernels._FAR
    start = np.cumsum(lengths, dtype=np.int64) - lengths
    columns = np.concatenate([np.arange(length, dtype=np.uint16) for length in lengths])
    values = rng.integers(0, 200, len(columns)).astype(np.uint8)
    remap = np.arange(width, dtype=np.int32) + 7
    if order == "turned":  # one fall, just where a line ends
        remap[kernels._LINE :] -= kernels._LINE
        remap[: kernels._LINE] += width - kernels._LINE
    if order == "dropped":
        remap[::5] = -1
    for name, array in (("columns", columns), ("values", values)):
        array.tofile(tmp_path / name)
    index, layer = (
        plain_layout(tmp_path / name, array.dtype, len(array))
        for name, array in (("columns", columns), ("values", values))
    )
    rows = RowIndex(np.zeros(len(lengths), np.int32), start, lengths)
    dataset = CellDataset(
        [Source("all", index, {"counts": layer}, remap)],
        rows, layer="counts", n_features=width + 7, feature_uids=np.arange(width + 7),
    )  # fmt: skip
    mapped = remap[columns]
    expected = sp.csr_matrix(
        (values[mapped >= 0].astype(np.float32), mapped[mapped >= 0],
         np.concatenate([[0], np.cumsum(mapped >= 0)])[np.append(start, len(columns))]),
        shape=(len(lengths), width + 7),
    )  # fmt: skip
    narrow = dataset[:]
    np.testing.assert_array_equal(narrow.indices, expected.indices)
    batch = dataset.with_wide_columns()[:]
    expected.sort_indices()
    np.testing.assert_array_equal(batch.indices, expected.indices)
    np.testing.assert_array_equal(batch.values, expected.data)


@pytest.mark.parametrize("drops", [False, True])
def test_datasets_for_sparse_tensors(drops: bool, tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    matrix = sp.random(40, 30, 0.4, "csr", random_state=rng, dtype=np.float32)
    remap = np.arange(30, dtype=np.int32)
    if drops:
        remap[::3] = -1
    for name, order in (("same", remap), ("turned", remap[::-1].copy())):
        sources, rows = write_sources(tmp_path / name, [StoredGroup(matrix, order, "none", 64)])
        narrow = CellDataset(sources, rows, layer="counts", n_features=30, feature_uids=np.arange(30))
        wide = narrow.with_wide_columns()
        batches: list[Any] = [np.array([3, 1, 39]), np.array([], np.int64), [7, -1], np.arange(40) < 5]
        assert wide.rows_nbytes(wide.checked(batches)) == [wide.batch_nbytes(rows) for rows in batches]
        for one, other in zip(narrow.read_batches(batches), wide.read_batches(batches), strict=True):
            assert [one.indices.dtype, other.indices.dtype] == [np.dtype(np.int32), np.dtype(np.int64)]
            assert (one.ascending, other.ascending) == (False, True)
            here, there = sparse_to_csr_collate(one)["X"], sparse_to_csr_collate(other)["X"]
            for part in ("crow_indices", "col_indices", "values"):
                assert torch.equal(getattr(here, part)(), getattr(there, part)())
            # No copy on the way.
            assert not len(other.values) or there.values().data_ptr() == other.values.ctypes.data
