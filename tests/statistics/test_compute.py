"""Statistics against plain NumPy: mixed orders of genes, panels, repeated columns, groups, real data."""

from __future__ import annotations

import pickle
from concurrent.futures import Executor, Future, ProcessPoolExecutor, ThreadPoolExecutor
from multiprocessing import get_context
from pathlib import Path

import numpy as np
import pytest
import scipy.sparse as sp
from hypothesis import given, settings
from hypothesis import strategies as st

import hbx_gpu
from hbx_gpu import tokens
from hbx_gpu._source import RowIndex
from hbx_gpu.dataloader import CellDataset
from hbx_gpu.errors import CorruptDataError, InvalidDataError, ResourceError, UnknownNameError
from hbx_gpu.statistics import Statistics, compute
from hbx_gpu.statistics import _compute as computing
from hbx_gpu.statistics._bins import RELATIVE_ERROR, Bins, binned_medians, counted, edges
from hbx_gpu.statistics._finish import Asked, _folded, finished
from hbx_gpu.statistics._kernels import Sums
from hbx_gpu.statistics._partial import Partial
from hbx_gpu.statistics._tasks import Tasks
from hbx_gpu.testing._examples import example_dataset, example_groups
from hbx_gpu.testing._stored import StoredGroup, expected_dense, write_sources
from hbx_gpu.testing._strategies import stored_groups
from tests.executors import LostWorkers
from tests.statistics.reference import columns_of

EXACT = ("measured", "nonzero", "sum", "median")


def masks(groups: list[StoredGroup], n_features: int) -> np.ndarray:
    """bool, (n_rows, n_features). Which features each row's matrix has."""
    parts = []
    for group in groups:
        has = np.zeros((group.matrix.shape[0], n_features), bool)
        has[:, group.remap[group.remap >= 0]] = True
        parts.append(has)
    return np.concatenate(parts)


def check(found: Statistics, dense: np.ndarray, measured: np.ndarray, target: float | None = 1e4) -> None:
    expected = columns_of(dense, measured, target)
    for name in EXACT:
        np.testing.assert_array_equal(getattr(found, name), expected[name], name)
    np.testing.assert_allclose(found.mean, expected["mean"], rtol=1e-15)
    np.testing.assert_allclose(found.variance, expected["variance"], rtol=1e-14)
    assert found.n_cells == len(dense)


def equal(a: Statistics, b: Statistics) -> bool:
    """Whether two results are the same, bit for bit."""
    names = ("measured", "nonzero", "sum", "mean", "variance", "median", "whole")
    same = all(np.array_equal(getattr(a, n), getattr(b, n), equal_nan=n != "whole") for n in names)
    parts = (
        np.array_equal(getattr(a.histogram, n), getattr(b.histogram, n)) for n in ("cell", "code", "count")
    )
    mine, theirs = a.groups, b.groups
    return same and all(parts) and list(mine) == list(theirs) and all(equal(mine[k], theirs[k]) for k in mine)


@settings(max_examples=15)
@given(groups=stored_groups(("none", "zstd")))
def test_equal_to_numpy_for_any_stored_matrices(
    tmp_path_factory: pytest.TempPathFactory, groups: tuple[list[StoredGroup], int]
) -> None:
    stored, n = groups
    sources, rows = write_sources(tmp_path_factory.mktemp("stored"), stored)
    uids = np.array([f"f{i}" for i in range(n)], dtype=object)
    dataset = CellDataset(sources, rows, layer="counts", n_features=n, feature_uids=uids)
    check(compute(dataset), expected_dense(stored, n), masks(stored, n))


def test_groups_and_cells_without_a_value(tmp_path: Path) -> None:
    groups = example_groups()
    dense, measured = expected_dense(groups, 50), masks(groups, 50)
    dataset = example_dataset(tmp_path)
    found = compute(dataset, "type")
    check(found, dense, measured)
    assert found.by == "type"
    assert list(found.groups) == ["b", "t"]
    for code, name in enumerate(["b", "t"]):
        mine = np.arange(len(dense)) % 3 - 1 == code
        check(found.groups[name], dense[mine], measured[mine])
    frame = found.to_pandas()
    assert len(frame) == 100
    assert frame["type"].unique().tolist() == ["b", "t"]


def test_medians_of_values_as_they_are_and_none(tmp_path: Path) -> None:
    groups = example_groups()
    dataset = example_dataset(tmp_path)
    check(compute(dataset, target_sum=None), expected_dense(groups, 50), masks(groups, 50), None)
    assert compute(dataset, medians=False).medians == {}


def matrix_dataset(root: Path, matrix: sp.csr_matrix) -> CellDataset:
    group = StoredGroup(matrix, np.arange(matrix.shape[1], dtype=np.int32), codec="none")
    sources, rows = write_sources(root, [group])
    uids = np.array([f"f{i}" for i in range(matrix.shape[1])], dtype=object)
    return CellDataset(sources, rows, layer="counts", n_features=matrix.shape[1], feature_uids=uids)


def test_repeated_columns_are_one_value(tmp_path: Path) -> None:
    indices = np.array([1, 0, 1, 2, 2], np.int32)
    values = np.array([2, 1, 3, 4, 5], np.uint16)
    matrix = sp.csr_matrix((values, indices, np.array([0, 3, 3, 5])), shape=(3, 3))
    found = compute(matrix_dataset(tmp_path, matrix))
    check(found, np.array([[1, 5, 0], [0, 0, 0], [0, 0, 9.0]]), np.ones((3, 3), bool))


def test_large_counts_are_summed_exactly(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    dense = rng.integers(2**31 - 1000, 2**31, (40, 3)).astype(np.float64)
    dense[:, 2] = 2.0**31 + 5  # summed as floats
    matrix = sp.csr_matrix(dense.astype(np.uint32))
    found = compute(matrix_dataset(tmp_path, matrix))
    expected = columns_of(dense, np.ones(dense.shape, bool))
    np.testing.assert_array_equal(found.sum, expected["sum"])
    np.testing.assert_allclose(found.variance, expected["variance"], rtol=1e-12)
    assert found.whole.tolist() == [True, True, False]


def test_squares_of_groups_are_added_with_their_carry() -> None:
    low = np.array([2**32 - 1, 2**32 - 2, 7, 9])  # two features of two groups
    high = np.array([1, 2, 3, 4])
    none, floats = np.zeros(4, np.int64), np.zeros(4)
    found = _folded(Sums(none, none, high, low, none, floats, floats, none), 2)
    squares = (high << 32) + low
    np.testing.assert_array_equal((found.square_high << 32) + found.square_low, squares[::2] + squares[1::2])
    assert found.square_low.max() < 2**32


def test_fractions_negative_numbers_and_nan(tmp_path: Path) -> None:
    rng = np.random.default_rng(1)
    dense = np.round(rng.normal(size=(500, 4)), 3).astype(np.float32)
    dense[rng.random(dense.shape) < 0.5] = 0
    dense[:, 1] = np.abs(np.round(dense[:, 1] * 4))  # counts and zeros
    dense[:, 3] = np.abs(dense[:, 3])
    found = compute(matrix_dataset(tmp_path, sp.csr_matrix(dense)), target_sum=None)
    expected = columns_of(dense.astype(np.float64), np.ones(dense.shape, bool), None)
    np.testing.assert_allclose(found.mean, expected["mean"], rtol=1e-12)
    np.testing.assert_allclose(found.variance, expected["variance"], rtol=1e-12)
    assert found.whole.tolist() == [False, True, False, False]
    # A median of numbers of both signs says nothing.
    assert np.isnan(found.median[[0, 2]]).all()
    np.testing.assert_array_equal(found.median[[1, 3]], expected["median"][[1, 3]])
    with_nan = dense.copy()
    with_nan[0, 3] = np.nan
    found = compute(matrix_dataset(tmp_path / "nan", sp.csr_matrix(with_nan)), target_sum=None)
    assert np.isnan(found.mean[3])
    assert np.isnan(found.median[3])
    assert not np.isnan(found.mean[:3]).any()


@settings(max_examples=20)
@given(st.data())
def test_any_partition_gives_the_same_bits(data: st.DataObject) -> None:
    rng = np.random.default_rng(data.draw(st.integers(0, 2**32 - 1)))
    n, n_features, n_groups = 60, 7, data.draw(st.integers(1, 3))
    dense = rng.integers(0, rng.choice([3, 2000, 2**31]), (n, n_features)) * (
        rng.random((n, n_features)) < 0.6
    )
    group = rng.integers(0, n_groups, n).astype(np.int32)
    exact = data.draw(st.booleans())
    asked = Asked(
        np.array([f"f{i}" for i in range(n_features)], dtype=object),
        None if n_groups == 1 else "g",
        tuple(str(g) for g in range(n_groups - 1)),
        np.bincount(group, minlength=n_groups),
        np.tile(np.bincount(group, minlength=n_groups), (n_features, 1)),
        1e4,
    )

    def of(rows: np.ndarray) -> Partial:
        partial = Partial(n_features, n_groups, 1e4, exact=exact)
        matrix = sp.csr_matrix(dense[rows])
        partial.add(matrix.indices, matrix.data, matrix.indptr.astype(np.int64), group[rows])
        return partial

    whole = finished(of(np.arange(n)), asked)
    cuts = np.sort(rng.integers(0, n, data.draw(st.integers(1, 6))))
    parts = [of(rows) for rows in np.split(rng.permutation(n), cuts)]
    while len(parts) > 1:  # in any order, and some of them from another process
        other = parts.pop(int(rng.integers(len(parts))))
        parts[0 if len(parts) == 1 else int(rng.integers(len(parts)))].merge(
            pickle.loads(pickle.dumps(other))
        )
    assert equal(finished(parts[0], asked), whole)


def test_binned_medians_are_as_close_as_they_say(tmp_path: Path) -> None:
    rng = np.random.default_rng(2)
    dense = rng.poisson(rng.gamma(1, 8, 30), (900, 30)).astype(np.float64)
    dataset = matrix_dataset(tmp_path, sp.csr_matrix(dense.astype(np.uint16)))
    exact, binned = compute(dataset), compute(dataset, exact_medians=0)
    assert exact.median_error == 0
    assert binned.median_error == RELATIVE_ERROR
    error = np.abs(binned.median / exact.median - 1)
    assert 0 < np.nanmax(error) <= RELATIVE_ERROR
    for name in ("measured", "nonzero", "sum", "mean", "variance"):
        np.testing.assert_array_equal(getattr(exact, name), getattr(binned, name))


def test_binned_medians_are_those_of_the_middles_of_bins() -> None:
    for seed in range(20):
        rng = np.random.default_rng(seed)
        cell = np.sort(rng.choice([0, 2, 3, 4], 12))  # cell 1 has no values
        bins = counted(cell, rng.integers(60_000, 66_000, 12), rng.integers(1, 3, 12))
        low, high = edges(bins.code, whole=False)
        values, cells = np.repeat((low + high) / 2, bins.count), np.repeat(bins.cell, bins.count)
        expected = [np.median(values[cells == k]) if k in cells else np.nan for k in range(5)]
        np.testing.assert_array_equal(binned_medians(bins, 5), expected)
    nothing = np.zeros(0, np.int64)
    assert np.isnan(binned_medians(counted(nothing, nothing, nothing), 2)).tolist() == [True, True]


def test_counters_that_would_pass_their_bound_are_an_error() -> None:
    def of(count: int) -> Bins:
        bins = Bins()
        bins.__setstate__({"keys": np.array([7]), "counts": np.full((1, 32), count, np.uint32)})
        return bins

    most = of(2**32 - 2)
    most.add(of(1))
    assert most.counted().count.tolist() == [2**32 - 1] * 32
    with pytest.raises(ResourceError, match="more than 4,294,967,295 cells have the same value"):
        most.add(of(1))


def test_rows_in_any_order_are_read_in_the_order_of_storage(tmp_path: Path) -> None:
    groups = example_groups()
    sources, rows = write_sources(tmp_path, groups)
    order = np.random.default_rng(3).permutation(len(rows))
    mixed = RowIndex(rows.source[order], rows.start[order], rows.length[order])
    uids = np.array([f"f{i}" for i in range(50)], dtype=object)
    dataset = CellDataset(sources, mixed, layer="counts", n_features=50, feature_uids=uids)
    tasks = Tasks(dataset)
    read = np.concatenate(list(tasks.windows(0, len(tasks))))
    np.testing.assert_array_equal(order[read], np.arange(len(rows)))
    check(compute(dataset), expected_dense(groups, 50), masks(groups, 50))


class Counting(Executor):
    """Runs tasks at once; what it is given crosses as between processes."""

    def __init__(self) -> None:
        self.tasks = 0

    def submit(self, fn, /, *args, **kwargs):  # type: ignore[no-untyped-def]
        self.tasks += 1
        future: Future[object] = Future()
        future.set_result(pickle.loads(pickle.dumps(pickle.loads(pickle.dumps(fn))(*args, **kwargs))))
        return future


def test_executors_and_small_tasks_change_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    dataset = example_dataset(tmp_path)
    whole = compute(dataset, "type")
    monkeypatch.setattr(computing, "_LEAST", 100)
    monkeypatch.setattr("hbx_gpu.statistics._tasks._WINDOW", 64)
    monkeypatch.setattr("hbx_gpu.statistics._tasks._BLOCK", 7)
    executor, seen = Counting(), []
    found = compute(
        dataset, "type", executor=executor, progress=lambda done, total: seen.append((done, total))
    )
    assert executor.tasks == len(seen) > 5
    assert seen[-1] == (120, 120)
    assert equal(found, whole)
    with ThreadPoolExecutor(3) as threads:
        assert equal(compute(dataset, "type", executor=threads), whole)
    assert equal(compute(dataset, "type"), whole)


@pytest.mark.slow
def test_processes_need_the_paths_only(tmp_path: Path) -> None:
    dataset = example_dataset(tmp_path)
    with ProcessPoolExecutor(2, get_context("spawn")) as processes:
        assert equal(compute(dataset, "type", executor=processes), compute(dataset, "type"))


@pytest.mark.parametrize("at_once", [False, True])
def test_workers_that_are_gone(tmp_path: Path, at_once: bool) -> None:
    with pytest.raises(ResourceError, match=r"the process that worked on it is gone .* run the same again"):
        compute(example_dataset(tmp_path), executor=LostWorkers(at_once))


def test_saved_and_loaded(tmp_path: Path) -> None:
    found = compute(example_dataset(tmp_path / "data"), "type")
    found.save(tmp_path / "statistics.npz")
    loaded = Statistics.load(tmp_path / "statistics.npz")
    assert equal(loaded, found)
    assert loaded.by == "type"
    assert loaded.feature_uids.tolist() == found.feature_uids.tolist()
    assert loaded.groups["b"].n_cells == found.groups["b"].n_cells
    assert loaded.medians == found.medians
    content = (tmp_path / "statistics.npz").read_bytes()
    for damaged in (content[:100], b"", content[:-200], content.replace(b"format", b"formal")):
        (tmp_path / "damaged.npz").write_bytes(damaged)
        with pytest.raises(CorruptDataError, match="compute them again"):
            Statistics.load(tmp_path / "damaged.npz")


def test_no_cells_and_what_cannot_be_asked(tmp_path: Path) -> None:
    dataset = example_dataset(tmp_path)
    none = compute(dataset.subset(np.arange(0)), "type")
    assert none.n_cells == 0
    assert none.medians == {}
    assert len(none.to_pandas()) == 0
    with pytest.raises(UnknownNameError, match="carries no obs column 'donor'"):
        compute(dataset, "donor")
    with pytest.raises(UnknownNameError, match=r"statistics\(by='type'\)"):
        compute(dataset).highly_variable(3, batch_key="type")


def test_real_counts_opened_in_place(real_h5ad: tuple[Path, Path]) -> None:
    cells = hbx_gpu.open(real_h5ad[1])
    assert not isinstance(cells, hbx_gpu.AtlasQuery)
    found = cells.statistics()
    dense = np.asarray(cells.to_anndata().X.todense(), np.float64)
    check(found, dense, np.ones(dense.shape, bool))


def test_genes_without_a_median_make_no_tokens(tmp_path: Path) -> None:
    dataset = matrix_dataset(tmp_path, sp.csr_matrix(np.array([[1, 0, 2], [3, 0, 4]], np.float32)))
    uids = [str(uid) for uid in dataset.feature_uids]
    words = ["<pad>", "<mask>", "<cls>", "<eos>", *uids]
    vocabulary = {word: number for number, word in enumerate(words)}
    found = compute(dataset)
    recipe = tokens.geneformer_v2(vocabulary, found)
    assert tokens.compile(recipe, uids).report.matched == 2
    assert uids[0] not in repr(recipe)
    for strict in (
        tokens.geneformer_v2(vocabulary, found, missing_medians="error"),
        tokens.geneformer_v2(vocabulary, found.medians),
    ):
        with pytest.raises(InvalidDataError, match=f"a token but no median, such as {uids[1]}"):
            tokens.compile(strict, uids)


def test_dense_matrices(tmp_path: Path) -> None:
    from anndata import AnnData

    dense = np.random.default_rng(4).poisson(0.8, (50, 9)).astype(np.float32)
    AnnData(dense).write_h5ad(tmp_path / "dense.h5ad")
    cells = hbx_gpu.open(tmp_path / "dense.h5ad")
    assert not isinstance(cells, hbx_gpu.AtlasQuery)
    check(cells.statistics(), dense.astype(np.float64), np.ones(dense.shape, bool))
