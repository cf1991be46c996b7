"""An .h5ad file of any form becomes the archive that it describes."""

from __future__ import annotations

import tracemalloc
from pathlib import Path
from typing import Any

import anndata as ad
import h5py
import numpy as np
import pandas as pd
import pytest
import scipy.sparse as sp

from hbx_gpu.errors import InvalidDataError
from hbx_gpu.scdl._format.archive import open_archive
from hbx_gpu.scdl._format.values import Tolerance
from hbx_gpu.scdl._writing.convert import ConvertOptions, convert_h5ad, convert_h5ad_files
from tests.scdl.files import adata, content, counts, h5ad, leftovers, matrix


@pytest.mark.parametrize("n_rows", [7, 5])
@pytest.mark.parametrize("form", ["csr", "csc", "dense", "csr_array", "gzip"])
def test_every_form_gives_the_same_archive(tmp_path: Path, form: str, n_rows: int) -> None:
    # Square matrices too: read along the wrong axis they fit just as well.
    x = counts(n_rows, 5)
    given = {"csc": x.tocsc(), "dense": x.toarray(), "csr_array": sp.csr_array(x)}.get(form, x)
    data = adata(given)
    data.write_h5ad(tmp_path / "x.h5ad", compression="gzip" if form == "gzip" else None)
    report = convert_h5ad(tmp_path / "x.h5ad", tmp_path / "a")
    assert (report.n_rows, report.n_vars, report.matrix) == (n_rows, 5, "X")
    assert (matrix(tmp_path / "a") != x).nnz == 0
    assert open_archive(tmp_path / "a").data.dtype == np.float32
    assert not leftovers(tmp_path)


def test_order_repeats_and_zeros_stay(tmp_path: Path) -> None:
    x = sp.csr_matrix((np.array([1.0, 2, 0, 4]), np.array([2, 0, 0, 1]), np.array([0, 3, 4])), shape=(2, 3))
    data = adata(sp.csr_matrix((2, 3)))
    data.write_h5ad(tmp_path / "x.h5ad")
    with h5py.File(tmp_path / "x.h5ad", "r+") as file:
        for name in ("data", "indices", "indptr"):
            del file["X"][name]
            file["X"][name] = getattr(x, name)
    convert_h5ad(tmp_path / "x.h5ad", tmp_path / "a")
    assert content(tmp_path / "a")["rows"] == [([1, 2, 0], [2, 0, 0]), ([4], [1])]


@pytest.mark.parametrize("rows", [1, 2, 3, 100])
@pytest.mark.parametrize("form", ["csr", "csc", "dense"])
def test_paginated_equals_regular(tmp_path: Path, rows: int, form: str) -> None:
    x = counts(11, 6)
    data = adata({"csr": x, "csc": x.tocsc(), "dense": x.toarray()}[form])
    data.obsp["next_cell_ids"] = sp.random(11, 11, 0.3, "csr", random_state=0)
    data.write_h5ad(tmp_path / "x.h5ad")
    key = "next_cell_ids"
    convert_h5ad(tmp_path / "x.h5ad", tmp_path / "regular", options=ConvertOptions(neighbor_key=key))
    paginated = ConvertOptions(paginated_load_cutoff=0, load_block_row_size=rows, neighbor_key=key)
    convert_h5ad(tmp_path / "x.h5ad", tmp_path / "paginated", options=paginated)
    assert _bytes(tmp_path / "regular") == _bytes(tmp_path / "paginated")


def _bytes(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def _with_raw(path: Path, *, x: bool = True, raw: bool = True) -> tuple[Path, Any, Any]:
    whole, part = counts(6, 9, seed=1), counts(6, 4, seed=2)
    data = adata(part, genes="x")
    if raw:
        data.raw = adata(whole, genes="raw")
    if not x:
        data.X = None
    data.layers["spliced"] = part * 2
    data.write_h5ad(path)
    return path, whole, part


def test_each_matrix_comes_with_its_own_genes(tmp_path: Path) -> None:
    file, whole, part = _with_raw(tmp_path / "x.h5ad")
    for name, options, expected, genes in (
        ("default", ConvertOptions(), whole, "raw"),
        ("raw", ConvertOptions(matrix="raw"), whole, "raw"),
        ("X", ConvertOptions(use_X_not_raw=True), part, "x"),
        ("X2", ConvertOptions(matrix="X"), part, "x"),
        ("layer", ConvertOptions(matrix="spliced"), part * 2, "x"),
    ):
        convert_h5ad(file, tmp_path / name, options=options)
        assert (matrix(tmp_path / name) != expected).nnz == 0
        found = content(tmp_path / name)
        assert found["var"] == [{"feature_id": [f"{genes}{i}" for i in range(expected.shape[1])]}]
        assert found["genes"] == [[f"n{genes}{i}" for i in range(expected.shape[1])]]


def test_missing_matrices(tmp_path: Path) -> None:
    file, _, part = _with_raw(tmp_path / "no_raw.h5ad", raw=False)
    assert convert_h5ad(file, tmp_path / "a").matrix == "X"
    assert (matrix(tmp_path / "a") != part).nnz == 0
    file, whole, _ = _with_raw(tmp_path / "no_x.h5ad", x=False)
    convert_h5ad(file, tmp_path / "b")
    assert (matrix(tmp_path / "b") != whole).nnz == 0
    with pytest.raises(ValueError, match="use_X_not_raw=False"):
        convert_h5ad(file, tmp_path / "c", options=ConvertOptions(use_X_not_raw=True))
    with pytest.raises(InvalidDataError, match=r"no matrix 'nope'.*spliced"):
        convert_h5ad(file, tmp_path / "c", options=ConvertOptions(matrix="nope"))
    file, *_ = _with_raw(tmp_path / "neither.h5ad", x=False, raw=False)
    with pytest.raises(ValueError, match="neither"):
        convert_h5ad(file, tmp_path / "c")
    assert not (tmp_path / "c").exists()


def test_tables_and_names(tmp_path: Path) -> None:
    data = adata(counts(4, 3))
    data.obs["ordered"] = pd.Categorical([3, 1, 3, 1])
    data.obs["maybe"] = pd.array([1, None, 3, 4], dtype="Int64")
    data.obs["flag"] = [True, False, True, True]
    data.obs["gappy"] = pd.Categorical(["b", None, "a", "b"], categories=["b", "a", "unused"])
    data.write_h5ad(tmp_path / "x.h5ad")
    convert_h5ad(tmp_path / "x.h5ad", tmp_path / "a")
    found = content(tmp_path / "a")
    (obs,) = found["obs"]
    assert list(obs) == list(data.obs.columns)
    assert obs["ordered"] == [3, 1, 3, 1]
    assert obs["maybe"] == [1, None, 3, 4]
    assert obs["flag"] == [True, False, True, True]
    assert obs["kind"] == data.obs["kind"].tolist()
    assert obs["gappy"] == ["b", None, "a", "b"]
    assert obs["text"] == data.obs["text"].tolist()
    np.testing.assert_array_equal(np.array(obs["score"], float), data.obs["score"])
    assert found["cells"] == data.obs_names.tolist()
    assert found["genes"] == [data.var_names.tolist()]
    assert found["labels"] == [str(tmp_path / "x.h5ad")]
    table = open_archive(tmp_path / "a").obs
    assert table is not None
    # Categories keep their order, the unused one too.
    assert table.frames[0].arrow("kind").chunk(0).dictionary.to_pylist() == ["b", "a", "unused"]
    # Unless values are missing: SCDL reads the code of a missing value as the last category.
    assert table.frames[0].arrow("gappy").type == "string"


def test_frames_without_columns_store_their_names(tmp_path: Path) -> None:
    data = ad.AnnData(counts(3, 2), obs=pd.DataFrame(index=list("abc")), var=pd.DataFrame(index=["p", "q"]))
    data.write_h5ad(tmp_path / "x.h5ad")
    convert_h5ad(tmp_path / "x.h5ad", tmp_path / "a")
    options = ConvertOptions(var_feature_index_name="gene", obs_feature_index_name="cell")
    convert_h5ad(tmp_path / "x.h5ad", tmp_path / "b", options=options)
    assert content(tmp_path / "a")["obs"] == [{"obs_feature_id": ["a", "b", "c"]}]
    assert content(tmp_path / "a")["var"] == [{"var_feature_id": ["p", "q"]}]
    assert content(tmp_path / "b")["obs"] == [{"cell": ["a", "b", "c"]}]
    assert content(tmp_path / "b")["var"] == [{"gene": ["p", "q"]}]


@pytest.mark.parametrize("form", ["csr", "csc"])
def test_neighbors(tmp_path: Path, form: str) -> None:
    links = sp.random(8, 8, 0.3, form, random_state=3, dtype=np.float64)
    data = adata(counts(8, 3))
    data.obsp["near"] = links
    data.write_h5ad(tmp_path / "x.h5ad")
    report = convert_h5ad(tmp_path / "x.h5ad", tmp_path / "a", options=ConvertOptions(neighbor_key="near"))
    assert report.has_neighbors
    table = open_archive(tmp_path / "a").neighbors
    assert table is not None
    stored = sp.csr_matrix((table.weights, table.indices, table.indptr.astype(int)), shape=(8, 8))
    np.testing.assert_array_equal(stored.toarray(), links.toarray().astype(np.float32))


def test_neighbors_that_cannot_be_had(tmp_path: Path) -> None:
    data = adata(counts(5, 3))
    data.obsp["dense"] = np.ones((5, 5))
    data.write_h5ad(tmp_path / "x.h5ad")
    with pytest.warns(UserWarning, match=r"'next_cell_ids' not found in AnnData.obsp.*dense"):
        convert_h5ad(
            tmp_path / "x.h5ad", tmp_path / "a", options=ConvertOptions(neighbor_key="next_cell_ids")
        )
    assert open_archive(tmp_path / "a").neighbors is None
    with pytest.raises(ValueError, match="is not a sparse matrix"):
        convert_h5ad(tmp_path / "x.h5ad", tmp_path / "b", options=ConvertOptions(neighbor_key="dense"))
    assert not (tmp_path / "b").exists()


@pytest.mark.parametrize("shape", [(4, 3), (0, 3)])
def test_nothing_to_store(tmp_path: Path, shape: tuple[int, int]) -> None:
    h5ad(tmp_path / "x.h5ad", sp.csr_matrix(shape, dtype="f4"))
    convert_h5ad(tmp_path / "x.h5ad", tmp_path / "a")
    assert content(tmp_path / "a")["rows"] == [([], [])] * shape[0]


@pytest.mark.parametrize(
    ("high", "source", "dtype"),
    [(255, "f4", "uint8"), (60000, "i8", "uint16"), (70000, "f8", "uint32"), (255, "u1", "uint8")],
)
def test_auto_dtype(tmp_path: Path, high: int, source: str, dtype: str) -> None:
    x = counts(20, 10, dtype=source)
    x.data[-1] = high
    h5ad(tmp_path / "x.h5ad", x)
    convert_h5ad(tmp_path / "x.h5ad", tmp_path / "a", data_dtype="auto")
    assert (matrix(tmp_path / "a") != x).nnz == 0
    assert open_archive(tmp_path / "a").data.dtype == dtype


@pytest.mark.filterwarnings("ignore:.* X holds counts with fractions")
def test_loss_raises_unless_accepted(tmp_path: Path) -> None:
    x = counts(5, 4)
    x.data[2] = 300.5
    h5ad(tmp_path / "x.h5ad", x)
    with pytest.raises(InvalidDataError, match=r"rows 0 to 4: 300.5 as uint8 is 255.*allow_loss"):
        convert_h5ad(tmp_path / "x.h5ad", tmp_path / "a", data_dtype="uint8")
    assert [p.name for p in tmp_path.iterdir()] == ["x.h5ad"]
    with pytest.warns(UserWarning, match="not close to original values"):
        convert_h5ad(
            tmp_path / "x.h5ad", tmp_path / "a", data_dtype="uint8", tolerance=Tolerance(allow_loss=True)
        )
    convert_h5ad(tmp_path / "x.h5ad", tmp_path / "b", data_dtype="uint16", tolerance=Tolerance(1.0))
    assert matrix(tmp_path / "b").data[2] == 300


def test_refusals(tmp_path: Path) -> None:
    file = h5ad(tmp_path / "x.h5ad", counts(3, 2))
    with pytest.raises(FileNotFoundError, match="could not find h5ad path"):
        convert_h5ad(tmp_path / "y.h5ad", tmp_path / "a")
    with pytest.raises(ValueError, match="Invalid data_dtype 'int32'"):
        convert_h5ad(file, tmp_path / "a", data_dtype="int32")
    (tmp_path / "junk.h5ad").write_bytes(b"junk")
    with pytest.raises(InvalidDataError, match="not an HDF5"):
        convert_h5ad(tmp_path / "junk.h5ad", tmp_path / "a")
    with pytest.raises(ValueError, match="load_block_row_size"):
        ConvertOptions(load_block_row_size=0)
    assert not (tmp_path / "a").exists()
    convert_h5ad(file, tmp_path / "a")
    with pytest.raises(FileExistsError):
        convert_h5ad(file, tmp_path / "a")
    convert_h5ad(file, tmp_path / "a", overwrite=True)


def test_several_files_in_one_pass(tmp_path: Path) -> None:
    same, other = counts(4, 3, seed=1), counts(3, 300, seed=2)
    files = []
    for i, x in enumerate((same, same, other)):
        data = adata(x, seed=i, cells=f"f{i}_")
        if i != 1:
            data.obsp["near"] = sp.random(
                x.shape[0], x.shape[0], 0.5, "csr", random_state=i, dtype=np.float32
            )
        data.write_h5ad(tmp_path / f"{i}.h5ad")
        files.append(tmp_path / f"{i}.h5ad")
    shown: list[tuple[int, int]] = []
    with pytest.warns(UserWarning, match="not found in AnnData.obsp"):
        convert_h5ad_files(
            files,
            tmp_path / "a",
            options=ConvertOptions(neighbor_key="near"),
            progress=lambda done, total: shown.append((done, total)),
        )
    assert shown == [(4, 11), (8, 11), (11, 11)]
    found = content(tmp_path / "a")
    assert found["bounds"] == [0, 8, 11]
    assert found["labels"] == [str(files[0]), str(files[2])]
    assert found["dtypes"][1] == "uint16"
    expected = [(r.data.tolist(), r.indices.tolist()) for x in (same, same, other) for r in x]
    assert found["rows"] == expected
    assert found["neighbors"][4:8] == [([], [])] * 4
    last = ad.read_h5ad(files[2]).obsp["near"]
    assert [n for n, _ in found["neighbors"][8:]] == [(row.indices + 8).tolist() for row in last]
    assert found["cells"] == [f"f{i}_{j}" for i, n in enumerate((4, 4, 3)) for j in range(n)]
    sources: Any = open_archive(tmp_path / "a").metadata["sources"]
    assert [(s["file"], s["rows"], s["matrix"]) for s in sources] == [
        (str(file), n, "X") for file, n in zip(files, (4, 4, 3), strict=True)
    ]


def test_a_bad_file_is_found_before_anything_is_written(tmp_path: Path) -> None:
    good, bad = h5ad(tmp_path / "good.h5ad", counts(3, 2)), tmp_path / "bad.h5ad"
    bad.write_bytes(b"junk")
    with pytest.raises(InvalidDataError, match=r"bad\.h5ad"):
        convert_h5ad_files([good, bad], tmp_path / "a")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["bad.h5ad", "good.h5ad"]


@pytest.mark.parametrize("form", ["csr", "dense"])
def test_memory_is_bounded_by_the_block(tmp_path: Path, form: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("hbx_gpu._h5ad.matrix.BLOCK_VALUES", 1 << 14)
    n_rows, n_cols = 40_000, 40
    rng = np.random.default_rng(0)
    x: Any = rng.integers(0, 9, (n_rows, n_cols)).astype("f4")
    data = ad.AnnData(sp.csr_matrix(x) if form == "csr" else x)
    data.write_h5ad(tmp_path / "x.h5ad")
    convert_h5ad(tmp_path / "x.h5ad", tmp_path / "warm")
    tracemalloc.start()
    convert_h5ad(tmp_path / "x.h5ad", tmp_path / "a")
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert (tmp_path / "a" / "data.npy").stat().st_size > 5_000_000
    # Names of cells and row pointers are per row; the matrix itself is not held.
    assert peak < 200 * n_rows + (2 << 20) < n_rows * n_cols * 8
