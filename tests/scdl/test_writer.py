"""Writing archives: layout, dtypes, casts, blocks, and what happens to what was there before."""

from __future__ import annotations

import json
import shutil
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from hbx_gpu import _files
from hbx_gpu.errors import InvalidDataError
from hbx_gpu.scdl._format import values
from hbx_gpu.scdl._format.archive import open_archive
from hbx_gpu.scdl._format.header import read_header
from hbx_gpu.scdl._format.values import DATA_DTYPES, Range, Tolerance
from hbx_gpu.scdl._writing import new_folder as swap
from hbx_gpu.scdl._writing.writer import ArchiveWriter, allocate
from tests.scdl.files import content, leftovers


def fill(
    writer: ArchiveWriter, x: Any = ((1.0, 2.0), (3.0,)), *, genes: int = 3, label: str = "a.h5ad"
) -> None:
    """Rows with the given values in their first columns."""
    lengths = [len(row) for row in x]
    indptr = np.concatenate([[0], np.cumsum(lengths)])
    columns = np.concatenate([np.arange(n) for n in lengths]).astype(np.int64)
    writer.append_rows(indptr, columns, np.concatenate([np.asarray(row) for row in x]))
    writer.append_var(pa.table({"gene": [f"g{i}" for i in range(genes)]}), len(x), label=label)
    writer.append_obs(iter([pa.table({"n": list(range(len(x)))})]), len(x), label=label)


def test_layout_is_that_of_scdl(tmp_path: Path) -> None:
    with ArchiveWriter(tmp_path / "a", n_columns=3) as writer:
        fill(writer)
        writer.append_neighbors(np.array([0, 1]), np.array([1]), np.array([0.5]), first_row=0)
    folder = tmp_path / "a"
    assert np.fromfile(folder / "data.npy", "f4").tolist() == [1, 2, 3]
    assert np.fromfile(folder / "col_ptr.npy", "u1").tolist() == [0, 1, 0]
    assert np.fromfile(folder / "row_ptr.npy", "u1").tolist() == [0, 2, 3]
    assert np.fromfile(folder / "neighbor_indptr.npy", "u8").tolist() == [0, 1, 1]
    assert np.fromfile(folder / "neighbor_indices.npy", "u4").tolist() == [1]
    assert np.fromfile(folder / "neighbor_values.npy", "f4").tolist() == [0.5]
    header = read_header(folder / "header.sch")
    assert [(a.name, a.length, a.dtype) for a in header.arrays] == [
        ("DATA", 3, "float32"),
        ("ROWPTR", 3, "uint8"),
        ("COLPTR", 3, "uint8"),
    ]
    for index in header.features:
        assert index.length == 2
        assert {f"{index.name}/{p.name}" for p in (folder / index.name).iterdir()} == set(index.files)
        assert np.load(folder / index.name / "labels.npy", allow_pickle=False).tolist() == ["a.h5ad"]
        assert np.load(folder / index.name / "cumulative_sum_index.npy").tolist() == [-1, 2]
    assert json.loads((folder / "metadata.json").read_text())["num_rows"] == 2
    assert json.loads((folder / "version.json").read_text()) == "0.1.3"
    assert not leftovers(tmp_path)


@pytest.mark.parametrize(("n_values", "pointer"), [(255, "uint8"), (256, "uint16"), (65536, "uint32")])
@pytest.mark.parametrize(("n_columns", "column"), [(256, "uint8"), (257, "uint16"), (65536, "uint16")])
def test_narrowest_indices(tmp_path: Path, n_values: int, pointer: str, n_columns: int, column: str) -> None:
    with ArchiveWriter(tmp_path / "a", n_columns=n_columns) as writer:
        writer.append_rows(np.array([0, n_values]), np.full(n_values, n_columns - 1), np.ones(n_values))
        writer.append_var(pa.table({"gene": ["x"]}), 1, label="")
    archive = open_archive(tmp_path / "a")
    assert (archive.indptr.dtype.name, archive.indices.dtype.name) == (pointer, column)
    assert archive.nnz == n_values
    assert archive.indices.max() == n_columns - 1


def test_more_than_nine_blocks_leave_no_other_table(tmp_path: Path) -> None:
    with ArchiveWriter(tmp_path / "a", n_columns=20) as writer:
        for i in range(12):
            fill(writer, [[i]], genes=i + 1, label=f"{i}.h5ad")
    files = sorted(p.name for p in (tmp_path / "a" / "var_features").glob("*.parquet"))
    assert files == [f"dataframe_{i:02d}.parquet" for i in range(12)]
    assert open_archive(tmp_path / "a").n_vars == list(range(1, 13))
    # Cells of all files have one column: one block.
    assert content(tmp_path / "a")["obs"] == [{"n": [0] * 12}]


def test_cells_join_where_their_columns_can(tmp_path: Path) -> None:
    tables = [
        pa.table({"a": [1, 2], "s": pa.array(["x", None]).dictionary_encode()}),
        pa.table({"s": pa.array(["y", "x"]).dictionary_encode(), "a": [0.5, None]}),
        pa.table({"s": ["z", "z"], "a": pa.array([True, False])}),
        pa.table({"s": ["z", "z"], "a": ["text", "text"]}),
        pa.table({"s": ["z", "z"], "b": [1, 2]}),
    ]
    with ArchiveWriter(tmp_path / "a", n_columns=1) as writer:
        for table in tables:
            writer.append_rows(np.zeros(3, int), np.empty(0, int), np.empty(0))
            writer.append_obs(iter([table]), 2, label="")
        writer.append_var(pa.table({"gene": ["x"]}), 10, label="")
    assert content(tmp_path / "a")["obs"] == [
        {"s": ["x", None, "y", "x", "z", "z"], "a": [1, 2, 0.5, None, 1, 0]},
        # Text does not join numbers: SCDL fails here, after it has grown the arrays.
        {"s": ["z", "z"], "a": ["text", "text"]},
        {"s": ["z", "z"], "b": [1, 2]},
    ]


def test_genes_join_only_if_they_are_the_same(tmp_path: Path) -> None:
    one = pa.table({"x": [1.0, None, float("nan")], "y": ["a", "b", "c"]})
    turned = one.select(["y", "x"])
    other = pa.table({"x": [1.0, 2.0, None], "y": ["a", "b", "c"]})
    names = ["p", "q", "r"]
    with ArchiveWriter(tmp_path / "a", n_columns=3) as writer:
        writer.append_rows(np.zeros(7, int), np.empty(0, int), np.empty(0))
        for table, known in ((one, names), (turned, None), (turned, names), (one, ["p", "q", "s"])):
            writer.append_var(table, 1, label="", gene_names=known)
        writer.append_var(other, 2, label="")
    found = content(tmp_path / "a")
    assert found["bounds"] == [0, 3, 4, 6]
    assert found["genes"] == [names, ["p", "q", "s"], None]


def test_refuses_what_is_there(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    with pytest.raises(FileExistsError, match="overwrite"):
        ArchiveWriter(tmp_path / "a", n_columns=1)
    (tmp_path / "a" / "thesis.tex").write_text("")
    with pytest.raises(FileExistsError, match=r"thesis\.tex"):
        ArchiveWriter(tmp_path / "a", n_columns=1, overwrite=True)
    (tmp_path / "file").write_text("")
    with pytest.raises(FileExistsError, match="file"):
        ArchiveWriter(tmp_path / "file", n_columns=1, overwrite=True)
    assert not leftovers(tmp_path)


@pytest.mark.parametrize("exchange", [True, False])
def test_replaces_in_one_step_and_readers_keep_what_they_have(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, exchange: bool
) -> None:
    if not exchange:
        # As on file systems that cannot exchange two names.
        monkeypatch.setattr(_files, "exchange", lambda a, b: False)  # noqa: ARG005
    with ArchiveWriter(tmp_path / "a", n_columns=3) as writer:
        fill(writer)
    before = open_archive(tmp_path / "a")
    with ArchiveWriter(tmp_path / "a", n_columns=3, overwrite=True) as writer:
        fill(writer, [[9.0]])
        assert open_archive(tmp_path / "a").n_rows == 2
    assert open_archive(tmp_path / "a").data.tolist() == [9]
    assert before.data.tolist() == [1, 2, 3]
    assert not leftovers(tmp_path)


def test_what_was_replaced_is_never_put_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _write(tmp_path / "a")
    with monkeypatch.context() as patch:
        patch.setattr(_files, "exchange", lambda a, b: False)  # noqa: ARG005
        # As if killed while sweeping up.
        patch.setattr(shutil, "rmtree", lambda *a, **k: None)  # noqa: ARG005
        _write(tmp_path / "a", overwrite=True)
    assert len(leftovers(tmp_path)) == 1
    shutil.rmtree(tmp_path / "a")
    assert swap.recover(tmp_path / "a") is False
    assert list(tmp_path.iterdir()) == []


def test_an_error_leaves_the_old_archive(tmp_path: Path) -> None:
    with ArchiveWriter(tmp_path / "a", n_columns=3) as writer:
        fill(writer)
    old = content(tmp_path / "a")
    for error in (RuntimeError, KeyboardInterrupt):
        with pytest.raises(error):
            _write(tmp_path / "a", error=error, overwrite=True)
    assert content(tmp_path / "a") == old
    assert not leftovers(tmp_path)


def _write(
    path: Path,
    *,
    error: type[BaseException] | None = None,
    var_rows: int = 0,
    n_columns: int = 3,
    overwrite: bool = False,
) -> None:
    with ArchiveWriter(path, n_columns=n_columns, overwrite=overwrite) as writer:
        fill(writer, [[9.0, 9.0]])
        writer.append_var(pa.table({"gene": ["z"]}), var_rows, label="")
        if error is not None:
            raise error


def test_parts_must_agree(tmp_path: Path) -> None:
    with pytest.raises(InvalidDataError, match=r"expected 1 rows in all parts, found \{'var': 4\}"):
        _write(tmp_path / "a", var_rows=3)
    with pytest.raises(InvalidDataError, match="columns 0 to 1, expected 0 to 0"):
        _write(tmp_path / "a", n_columns=1)
    assert list(tmp_path.iterdir()) == []


def test_nothing_stored_can_be_mapped(tmp_path: Path) -> None:
    with ArchiveWriter(tmp_path / "a", n_columns=3, data_dtype="uint16") as writer:
        writer.append_rows(np.zeros(3, int), np.empty(0, int), np.empty(0))
        writer.append_var(pa.table({"gene": ["z"]}), 2, label="")
        writer.append_neighbors(np.zeros(3, int), np.empty(0, int), np.empty(0), first_row=0)
    sizes = {p.name: p.stat().st_size for p in (tmp_path / "a").glob("*.npy")}
    assert sizes["data.npy"] == 2
    assert sizes["neighbor_indices.npy"] == 4
    found = content(tmp_path / "a")
    assert found["rows"] == [([], []), ([], [])]
    assert found["neighbors"] == [([], []), ([], [])]


def test_allocate(tmp_path: Path) -> None:
    allocate(tmp_path / "a", n_rows=2, n_elements=10)
    assert np.fromfile(tmp_path / "a" / "data.npy", "f4").tolist() == [0] * 10
    assert np.fromfile(tmp_path / "a" / "row_ptr.npy", "u8").tolist() == [0] * 3
    with pytest.raises(FileExistsError):
        allocate(tmp_path / "a", n_rows=2, n_elements=10)


blocks = st.lists(
    st.one_of(
        hnp.arrays(
            st.sampled_from(["u1", "i2", "i8", "u8", "f4", "f8", "?"]),
            st.integers(1, 4),
            elements={"allow_subnormal": False},
        )
        | hnp.arrays("f8", 3, elements=st.integers(0, 70000).map(float))
        | hnp.arrays("i8", 2, elements=st.integers(0, 2**33))
    ),
    min_size=1,
    max_size=4,
)


@given(blocks)
@settings(deadline=None)
def test_auto_is_exact_and_smallest(
    tmp_path_factory: pytest.TempPathFactory, arrays: list[np.ndarray]
) -> None:
    target = tmp_path_factory.mktemp("auto") / "a"
    plain = [v.item() for array in arrays for v in array]
    try:
        with ArchiveWriter(target, n_columns=5, data_dtype="auto") as writer:
            for array in arrays:
                writer.append_rows(np.array([0, len(array)]), np.arange(len(array)), array)
            writer.append_var(pa.table({"gene": ["z"]}), len(arrays), label="")
    except InvalidDataError:
        # No dtype of SCDL holds all of them.
        assert any(isinstance(v, int) and float(v) != v for v in plain)
        return
    header = read_header(target / "header.sch").dtype("DATA")
    assert header is not None
    stored = np.fromfile(target / "data.npy", header)
    assert all(a == b or (a != a and b != b) for a, b in zip(stored.tolist(), plain, strict=True))
    if all(v == v and abs(v) != float("inf") and v == int(v) and v >= 0 for v in plain):
        if max(plain) < 2**64:
            assert header == values.smallest_unsigned(int(max(plain)))
    elif header.itemsize == 8:
        with np.errstate(over="ignore"):
            assert any(float(np.float32(v)) != v and v == v for v in plain)


@given(
    hnp.arrays(st.sampled_from(["i4", "i8", "u8", "f4", "f8"]), st.integers(1, 5)),
    st.sampled_from(DATA_DTYPES),
    st.sampled_from([0.0, 1e-8, 0.5, 1.0, 300.0]),
)
def test_casts_keep_within_the_tolerance_or_raise(array: np.ndarray, dtype: str, tolerance: float) -> None:
    try:
        cast = Tolerance(tolerance).cast(array, np.dtype(dtype), "here")
    except InvalidDataError:
        cast = None
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        lossy = Tolerance(tolerance, allow_loss=True).cast(array, np.dtype(dtype), "here")
    assert ["here" in str(w.message) for w in caught] == ([True] if cast is None else [])
    assert lossy.dtype == dtype
    errors = [_difference(a, b) for a, b in zip(array.tolist(), lossy.tolist(), strict=True)]
    assert (max(errors) <= tolerance) == (cast is not None)


def _difference(a: float, b: float) -> float:
    if a == b or (a != a and b != b):
        return 0.0
    if not (np.isfinite(a) and np.isfinite(b)):
        return float("inf")
    # Integers are compared as such: floats beyond 2**53 have gaps.
    return abs(float(int(a) - int(b))) if isinstance(a, int) else abs(a - b)


@pytest.mark.parametrize(
    ("value", "dtype", "stored"),
    [(70000, "uint16", 65535), (-3, "uint16", 0), (1.9, "uint8", 1), (float("nan"), "uint8", 0)],
)
def test_accepted_loss_takes_the_nearest(value: float, dtype: str, stored: int) -> None:
    array = np.array([value])
    with pytest.warns(UserWarning, match="not close to original values"):
        assert Tolerance(allow_loss=True).cast(array, np.dtype(dtype), "x").tolist() == [stored]


def test_range_knows_when_float32_is_enough() -> None:
    found = Range()
    found.add(np.array([2**24], np.int64))
    found.add(np.array([0.5]))
    assert found.dtype() == np.float32
    found.add(np.array([2**24 + 1], np.int64))
    assert found.dtype() == np.float64
