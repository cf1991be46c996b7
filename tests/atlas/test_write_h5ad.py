"""Matrices as row blocks: every layout and every age of .h5ad gives the same rows; damage is named."""

from __future__ import annotations

import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import anndata
import h5py
import numpy as np
import pandas as pd
import pytest
import scipy.sparse as sp
from hypothesis import given, settings
from hypothesis import strategies as st

from hbx_gpu._h5ad import matrix as matrix_room
from hbx_gpu._h5ad.files import H5adFile
from hbx_gpu._h5ad.matrix import CscMatrix, CsrMatrix, DenseMatrix, Matrix
from hbx_gpu.errors import InvalidDataError


def rows_of(matrix: Matrix, scratch: Path) -> sp.csr_matrix:
    """All blocks as one matrix, stored order kept; checks that blocks are consecutive."""
    indices, values, indptr = [np.empty(0, np.int64)], [np.empty(0, matrix.dtype)], [np.zeros(1, np.int64)]
    at = 0
    for block in matrix.blocks(scratch):
        assert block.first_row == at
        assert block.indptr[0] == 0
        assert len(block.indices) == len(block.values) == block.indptr[-1]
        at += len(block.indptr) - 1
        indices.append(block.indices.astype(np.int64))
        values.append(block.values)
        indptr.append(block.indptr[1:] + indptr[-1][-1])
    assert at == matrix.shape[0]
    return sp.csr_matrix(
        (np.concatenate(values), np.concatenate(indices), np.concatenate(indptr)), shape=matrix.shape
    )


def assert_same_rows(found: sp.csr_matrix, expected: sp.csr_matrix) -> None:
    np.testing.assert_array_equal(found.indptr, expected.indptr)
    np.testing.assert_array_equal(found.indices, expected.indices)
    np.testing.assert_array_equal(found.data, expected.data)


def random_csr(n: int, m: int, density: float, seed: int, dtype: Any = np.float32) -> sp.csr_matrix:
    found = sp.random(n, m, density, "csr", random_state=np.random.default_rng(seed))
    found.data = np.ceil(found.data * 9)
    found.sort_indices()
    return found.astype(dtype)


@settings(max_examples=60, deadline=None)
@given(
    n=st.integers(1, 30),
    m=st.integers(1, 20),
    density=st.sampled_from([0.0, 0.1, 0.6, 1.0]),
    block=st.sampled_from([1, 7, 50, 10_000]),
    layout=st.sampled_from(["csr", "csc", "dense"]),
    dtype=st.sampled_from(["float32", "int64", "uint16"]),
    seed=st.integers(0, 999),
)
def test_every_layout_gives_the_same_rows(
    n: int, m: int, density: float, block: int, layout: str, dtype: str, seed: int
) -> None:
    expected = random_csr(n, m, density, seed, dtype)
    matrix: Matrix
    if layout == "dense":
        matrix = DenseMatrix("x", (n, m), expected.toarray())
    else:
        stored = expected if layout == "csr" else expected.tocsc()
        kind = CsrMatrix if layout == "csr" else CscMatrix
        matrix = kind("x", (n, m), stored.indptr, stored.indices, stored.data)
    with tempfile.TemporaryDirectory() as scratch, pytest.MonkeyPatch.context() as patch:
        patch.setattr(matrix_room, "BLOCK_VALUES", block)
        patch.setattr(matrix_room, "_MAX_BLOCK_VALUES", max(block, 64))
        patch.setattr(matrix_room, "_BUCKET_VALUES", block)
        assert_same_rows(rows_of(matrix, Path(scratch)), expected)
        assert not list(Path(scratch).iterdir())  # bucket files are gone


def test_csr_keeps_order_repeats_and_explicit_zeros(tmp_path: Path) -> None:
    indptr, indices, values = np.array([0, 3, 3, 5]), np.array([4, 0, 4, 2, 1]), np.array([1, 0, 2, 3, 0])
    found = rows_of(CsrMatrix("x", (3, 5), indptr, indices, values), tmp_path)
    assert (found.indptr.tolist(), found.indices.tolist(), found.data.tolist()) == (
        indptr.tolist(),
        indices.tolist(),
        values.tolist(),
    )


def test_csc_keeps_explicit_zeros_and_ascending_columns(tmp_path: Path) -> None:
    stored = sp.csc_matrix(
        (np.array([1.0, 0.0, 2.0]), np.array([1, 0, 1]), np.array([0, 1, 2, 3])), shape=(2, 3)
    )
    found = rows_of(CscMatrix("x", (2, 3), stored.indptr, stored.indices, stored.data), tmp_path)
    assert (found.indices.tolist(), found.data.tolist()) == ([1, 0, 2], [0.0, 1.0, 2.0])


def test_dense_keeps_nan(tmp_path: Path) -> None:
    found = rows_of(DenseMatrix("x", (1, 3), np.array([[0.0, np.nan, 2.0]])), tmp_path)
    assert found.indices.tolist() == [1, 2]


# Files


def make_anndata(seed: int = 0) -> anndata.AnnData:
    x = random_csr(23, 11, 0.4, seed)
    obs = pd.DataFrame(
        {"kind": pd.Categorical([*("ab" * 11), "a"]), "age": np.arange(23)},
        index=[f"c{i}" for i in range(23)],
    )
    var = pd.DataFrame({"symbol": [f"S{i}" for i in range(11)]}, index=[f"g{i}" for i in range(11)])
    adata = anndata.AnnData(x, obs=obs, var=var)
    wide = anndata.AnnData(random_csr(23, 14, 0.3, seed + 1), obs=obs)
    wide.var_names = [f"w{i}" for i in range(14)]
    adata.raw = wide
    adata.layers["spliced"] = random_csr(23, 11, 0.2, seed + 2).tocsc()
    adata.layers["scaled"] = random_csr(23, 11, 0.9, seed + 3).toarray()
    return adata


@pytest.mark.parametrize("compression", [None, "gzip", "lzf"])
@pytest.mark.parametrize("layout", ["csr", "csc", "dense"])
def test_all_matrices_of_a_file(tmp_path: Path, layout: str, compression: Any) -> None:
    adata = make_anndata()
    # Since anndata 0.13 X is a layer too, named None.
    layers = {name: matrix for name, matrix in adata.layers.items() if name is not None}
    expected = {"X": adata.X, "raw": adata.raw.X, **layers}
    adata.X = {"csr": adata.X, "csc": adata.X.tocsc(), "dense": adata.X.toarray()}[layout]
    adata.write_h5ad(tmp_path / "a.h5ad", compression=compression)
    with H5adFile(tmp_path / "a.h5ad") as file:
        assert file.matrices() == ["X", "raw", "scaled", "spliced"]
        for name, matrix in expected.items():
            assert_same_rows(rows_of(file.matrix(name), tmp_path), sp.csr_matrix(matrix))
        assert list(file.var().index) == list(adata.var_names)
        assert list(file.var("raw").index) == list(adata.raw.var_names)
        assert list(file.obs()["kind"]) == list(adata.obs["kind"])


def test_chunks_wider_than_a_block(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(matrix_room, "BLOCK_VALUES", 20)
    monkeypatch.setattr(matrix_room, "_MAX_BLOCK_VALUES", 60)
    x = random_csr(50, 10, 0.5, 3).toarray()
    for rows in (1, 6, 50):
        anndata.AnnData(x).write_h5ad(tmp_path / "a.h5ad")
        with h5py.File(tmp_path / "a.h5ad", "r+") as file:
            attributes = dict(file["X"].attrs)
            del file["X"]
            file.create_dataset("X", data=x, chunks=(rows, 5), compression="gzip").attrs.update(attributes)
        with H5adFile(tmp_path / "a.h5ad") as file:
            blocks = list(file.matrix().blocks(tmp_path))
            assert max(len(b.indptr) - 1 for b in blocks) <= 6
            assert_same_rows(rows_of(file.matrix(), tmp_path), sp.csr_matrix(x))


def test_files_of_the_first_anndata_releases(tmp_path: Path) -> None:
    x = random_csr(4, 3, 0.7, 1)
    with h5py.File(tmp_path / "old.h5ad", "w") as file:
        group = file.create_group("X")
        group.attrs["h5sparse_format"] = b"csr".decode()
        group.attrs["h5sparse_shape"] = (4, 3)
        for name in ("data", "indices", "indptr"):
            group[name] = getattr(x, name)
        obs = np.array(
            [(b"c0", 0, 1.5), (b"c1", 1, 2.5), (b"c2", 0, 3.5), (b"c3", -1, 4.5)],
            [("index", "S2"), ("kind", "i1"), ("depth", "f4")],
        )
        file["obs"] = obs
        file["var"] = np.array([(b"g0",), (b"g1",), (b"g2",)], [("index", "S2")])
        file["uns/kind_categories"] = np.array([b"B", b"T"])
    with H5adFile(tmp_path / "old.h5ad") as file:
        assert_same_rows(rows_of(file.matrix(), tmp_path), x)
        assert list(file.var().index) == ["g0", "g1", "g2"]
        frame = file.obs()
    assert list(frame.index) == ["c0", "c1", "c2", "c3"]
    assert frame["kind"].tolist()[:3] == ["B", "T", "B"]
    assert frame["kind"].isna().tolist() == [False, False, False, True]


def test_categories_of_anndata_0_7(tmp_path: Path) -> None:
    make_anndata().write_h5ad(tmp_path / "a.h5ad")
    with h5py.File(tmp_path / "a.h5ad", "r+") as file:
        codes, categories = file["obs/kind/codes"][:], file["obs/kind/categories"][:]
        del file["obs/kind"]
        file["obs"].attrs["encoding-version"] = "0.1.0"
        file["obs/__categories/kind"] = categories
        file["obs/kind"] = codes
        file["obs/kind"].attrs["categories"] = file["obs/__categories/kind"].ref
    with H5adFile(tmp_path / "a.h5ad") as file:
        assert file.obs()["kind"].tolist()[:3] == ["a", "b", "a"]


# Damage


def break_file(tmp_path: Path, change: Any, adata: anndata.AnnData | None = None) -> Path:
    path = tmp_path / "broken.h5ad"
    (adata or make_anndata()).write_h5ad(path)
    with h5py.File(path, "r+") as file:
        change(file)
    return path


def replace(file: h5py.File, name: str, data: np.ndarray) -> None:
    del file[name]
    file[name] = data


def test_missing_file_and_folder(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"nothing\.h5ad; it is missing"):
        H5adFile(tmp_path / "nothing.h5ad")
    with pytest.raises(FileNotFoundError, match="it is a directory"):
        H5adFile(tmp_path)


def test_not_hdf5(tmp_path: Path) -> None:
    (tmp_path / "empty.h5ad").write_bytes(b"")
    with pytest.raises(InvalidDataError, match=r"empty\.h5ad is not an HDF5 file.*it is empty"):
        H5adFile(tmp_path / "empty.h5ad")
    (tmp_path / "text.h5ad").write_text("cell,gene,count\n")
    with pytest.raises(InvalidDataError, match="its 16 bytes do not begin"):
        H5adFile(tmp_path / "text.h5ad")


def test_truncated_file(tmp_path: Path) -> None:
    make_anndata().write_h5ad(tmp_path / "a.h5ad")
    raw = (tmp_path / "a.h5ad").read_bytes()
    (tmp_path / "a.h5ad").write_bytes(raw[: len(raw) // 2])
    with pytest.raises(InvalidDataError, match=r"a\.h5ad cannot be opened.*truncated"):
        H5adFile(tmp_path / "a.h5ad")


def test_damaged_chunk(tmp_path: Path) -> None:
    x = sp.csr_matrix(np.arange(1, 40_001, dtype=np.float32).reshape(200, 200))
    anndata.AnnData(x).write_h5ad(tmp_path / "a.h5ad", compression="gzip")
    with h5py.File(tmp_path / "a.h5ad") as file:
        info = file["X/data"].id.get_chunk_info(1)
    with open(tmp_path / "a.h5ad", "r+b") as raw:
        raw.seek(info.byte_offset)
        raw.write(b"\xff" * 50)
    with (
        H5adFile(tmp_path / "a.h5ad") as file,
        pytest.raises(InvalidDataError, match=r"matrix 'X': cannot read elements"),
    ):
        rows_of(file.matrix(), tmp_path)


def test_hdf5_but_no_anndata(tmp_path: Path) -> None:
    with h5py.File(tmp_path / "a.h5ad", "w") as file:
        file["matrix"] = np.zeros(3)
    with pytest.raises(InvalidDataError, match=r"not an AnnData file: expected .*, found \['matrix'\]"):
        H5adFile(tmp_path / "a.h5ad")


def test_missing_matrix_lists_the_others(tmp_path: Path) -> None:
    path = break_file(tmp_path, lambda file: file.__delitem__("X"))
    with H5adFile(path) as file:
        for name in ("X", "unspliced"):
            with pytest.raises(
                InvalidDataError, match=rf"no matrix '{name}'; it holds \['raw', 'scaled', 'spliced'\]"
            ):
                file.matrix(name)


@pytest.mark.parametrize("layout", ["csr", "csc"])
@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda p: np.append(p, p[-1]), "indptr has"),
        (lambda p: np.where(np.arange(len(p)) == 5, p[-1], p), r"indptr decreases at (row|column) 5"),
        (lambda p: p - (np.arange(len(p)) == len(p) - 1), "indptr runs from 0 to"),
        (lambda p: p + (np.arange(len(p)) == 0), "indptr runs from 1 to"),
        (lambda p: p.astype(np.float32), "indices and indptr must be integers"),
    ],
)
def test_contradicting_indptr(tmp_path: Path, layout: str, change: Any, message: str) -> None:
    adata = make_anndata()
    adata.X = adata.X.tocsc() if layout == "csc" else adata.X
    path = break_file(tmp_path, lambda file: replace(file, "X/indptr", change(file["X/indptr"][:])), adata)
    with (
        H5adFile(path) as file,
        pytest.raises(InvalidDataError, match=rf"broken\.h5ad, matrix 'X': {message}"),
    ):
        file.matrix()


@pytest.mark.parametrize("bad", [-1, 100])
def test_column_out_of_range(tmp_path: Path, bad: int) -> None:
    adata = make_anndata()
    row = int(np.searchsorted(adata.X.indptr, 30, side="right")) - 1

    def change(file: h5py.File) -> None:
        file["X/indices"][30] = bad

    path = break_file(tmp_path, change)
    message = rf"matrix 'X': row {row} names column {bad}, but the matrix has 11 columns"
    with H5adFile(path) as file, pytest.raises(InvalidDataError, match=message):
        rows_of(file.matrix(), tmp_path)


def test_row_out_of_range_in_csc(tmp_path: Path) -> None:
    adata = make_anndata()
    adata.X = adata.X.tocsc()

    def change(file: h5py.File) -> None:
        file["X/indices"][0] = 23

    with (
        H5adFile(break_file(tmp_path, change, adata)) as file,
        pytest.raises(InvalidDataError, match="column 0 names row 23"),
    ):
        rows_of(file.matrix(), tmp_path)


# Not ru_maxrss: that includes the memory of the process which started this one.
_MEASURE = """
import sys
from pathlib import Path
from hbx_gpu.atlas import create_or_open_atlas
create_or_open_atlas(sys.argv[2]).add_from_h5ad(sys.argv[1])
print(*(line.split()[1] for line in Path("/proc/self/status").read_text().splitlines() if "VmHWM" in line))
"""


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
@pytest.mark.parametrize("layout", ["csr", "csc", "dense"])
def test_memory_does_not_grow_with_the_file(tmp_path: Path, layout: str) -> None:
    """Four times the rows need less than the counts that they add, and never 1.5 GB."""
    # A dense file of the same size has fewer columns: zeros cost as much as other values. Turning a CSC file
    # has buffers that only larger files fill.
    n_genes, per_row, sizes, more = {
        "csr": (20_000, 1_400, (2_000, 8_000), 50e6),
        "csc": (20_000, 1_400, (4_000, 16_000), 100e6),
        "dense": (2_000, 140, (3_000, 12_000), 50e6),
    }[layout]
    peaks = []
    for n in sizes:
        path = tmp_path / f"{n}.h5ad"
        rng = np.random.default_rng(0)
        columns = np.cumsum(rng.integers(1, 15, (n, per_row)), axis=1).reshape(-1)
        parts = rng.geometric(0.3, columns.size).astype(np.float32), columns, np.arange(n + 1) * per_row
        x = sp.csr_matrix(parts, shape=(n, n_genes))
        if layout == "dense":
            anndata.AnnData(x[:1]).write_h5ad(path)
            with h5py.File(path, "r+") as file:
                for name in ("X", "obs"):
                    del file[name]
                data = file.create_dataset("X", (n, n_genes), "f4", chunks=(500, 1000), compression="lzf")
                data.attrs.update({"encoding-type": "array", "encoding-version": "0.2.0"})
                for i in range(0, n, 500):
                    data[i : i + 500] = x[i : i + 500].toarray()
                anndata.io.write_elem(file, "obs", pd.DataFrame(index=[f"c{i}" for i in range(n)]))
        else:
            anndata.AnnData(x if layout == "csr" else x.tocsc()).write_h5ad(path)
        del x, parts, columns
        run = subprocess.run(
            [sys.executable, "-c", _MEASURE, str(path), str(tmp_path / f"atlas{n}")],
            capture_output=True,
            text=True,
            check=True,
        )
        peak = 1024 * int(run.stdout)
        assert peak < 1.5e9
        peaks.append(peak)
        path.unlink()
    print(f"peak {peaks[0] / 1e6:.0f} and {peaks[1] / 1e6:.0f} MB")
    assert peaks[1] < peaks[0] + more, peaks
