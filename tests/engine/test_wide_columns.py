"""Columns as sparse tensors want them: int64 straight from the stored bytes, and which rows do not ascend."""

from __future__ import annotations

import itertools
import tempfile
from pathlib import Path

import numpy as np
import pytest
import scipy.sparse as sp
import torch
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st

from hbx_gpu._engine.host import HostEngine, kernels
from hbx_gpu._plan.rows import plan_rows
from hbx_gpu._source import RowIndex, Source
from hbx_gpu._storage.plain import plain_layout
from hbx_gpu.dataloader import CellDataset, sparse_to_csr_collate
from tests.engine.test_engines import Rows
from tests.matrices import CODECS, Group, ragged_groups, write_sources


def check(sources: list[Source], rows: RowIndex, n_features: int, selection: np.ndarray) -> np.ndarray:
    """Compare with int32 columns; returns which rows do not ascend."""
    opened = Rows(HostEngine, sources, rows, n_features)
    plan = plan_rows(opened.table, opened.rows, selection)
    slab = opened.reader.read(opened.directory.extents(plan.chunks))
    narrow, (expected,), offsets = opened.engine.csr(plan, slab)
    falling = np.zeros(len(selection), bool)
    wide, (values,), same = opened.engine.csr(plan, slab, falling=falling)
    opened.reader.close()
    assert wide.dtype == np.int64
    for one, other in ((narrow, wide), (expected, values), (offsets, same)):
        np.testing.assert_array_equal(one, other)
    found = [(np.diff(narrow[a:b]) <= 0).any() for a, b in itertools.pairwise(offsets)]
    assert falling.tolist() == found
    return falling


@given(case=ragged_groups(), seed=st.integers(0, 2**32 - 1), n=st.integers(0, 50))
@settings(max_examples=40, deadline=None, suppress_health_check=list(HealthCheck))
def test_wide_columns_are_the_narrow_ones(case: tuple[list[Group], int], seed: int, n: int) -> None:
    groups, n_features = case
    assume(all((group.remap >= 0).all() for group in groups))
    with tempfile.TemporaryDirectory() as folder:
        sources, rows = write_sources(Path(folder), groups)
        check(sources, rows, n_features, np.random.default_rng(seed).integers(0, len(rows), size=n))


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
    sources, rows = write_sources(tmp_path, [Group(matrix, np.arange(60, dtype=np.int32), codec, chunk)])
    falling = check(sources, rows, 60, rng.permutation(40))
    assert 5 < falling.sum() < 25


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
    arrays = (rng.integers(0, 200, n).astype(columns), rng.integers(0, 200, n).astype(values))
    for name, array in zip(("columns", "values"), arrays, strict=True):
        array.tofile(tmp_path / name)
    index, layer = (
        plain_layout(tmp_path / a, b.dtype, n) for a, b in zip(("columns", "values"), arrays, strict=True)
    )
    source = Source("all", index, {"counts": layer}, np.arange(200, dtype=np.int32), repeats=True)
    start = np.cumsum(lengths, dtype=np.int64) - lengths
    rows = RowIndex(np.zeros(len(lengths), np.int32), start, lengths)
    dataset = CellDataset([source], rows, layer="counts", n_features=200, feature_uids=np.arange(200))
    order = rng.permutation(len(lengths))
    for whole in (dataset[order], dataset.with_wide_columns()[order]):
        assert min(whole.indices.nbytes, whole.values.nbytes) > kernels._FAR
        assert whole.values.dtype == values
        for i, row in enumerate(order.tolist()):
            here, there = slice(*whole.offsets[i : i + 2]), slice(start[row], start[row] + lengths[row])
            assert (whole.indices[here] == arrays[0][there]).all()
            assert (whole.values[here] == arrays[1][there]).all()


@pytest.mark.parametrize("drops", [False, True])
def test_datasets_with_wide_columns(drops: bool, tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    matrix = sp.random(40, 30, 0.4, "csr", random_state=rng, dtype=np.float32)
    remap = np.arange(30, dtype=np.int32)
    if drops:
        remap[::3] = -1
    sources, rows = write_sources(tmp_path, [Group(matrix, remap, "none", 64)])
    narrow = CellDataset(sources, rows, layer="counts", n_features=30, feature_uids=np.arange(30))
    wide = narrow.with_wide_columns()
    batches = [np.array([3, 1, 39]), np.array([], np.int64), [7, -1], np.arange(40) < 5]
    assert wide.batches_nbytes(batches) == [wide.batch_nbytes(rows) for rows in batches]
    for one, other in zip(narrow.read_batches(batches), wide.read_batches(batches), strict=True):
        assert other.indices.dtype == (np.int32 if drops else np.int64)
        assert (one.ascending, other.ascending) == (None, None if drops else True)
        here, there = sparse_to_csr_collate(one)["X"], sparse_to_csr_collate(other)["X"]
        for part in ("crow_indices", "col_indices", "values"):
            assert torch.equal(getattr(here, part)(), getattr(there, part)())
    # A batch that ascends nowhere costs a copy, as ever.
    reverse = CellDataset(
        write_sources(tmp_path / "r", [Group(matrix, remap[::-1].copy(), "none", 64)])[0],
        rows, layer="counts", n_features=30, feature_uids=np.arange(30),
    )  # fmt: skip
    batch = reverse.with_wide_columns()[np.arange(40)]
    assert batch.ascending is (None if drops else False)
    assert torch.equal(
        sparse_to_csr_collate(batch)["X"].to_dense(), sparse_to_csr_collate(reverse[:])["X"].to_dense()
    )
