"""Ways of storing that are sound and rare: each gives the rows that were written."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

import anndata
import h5py
import numpy as np
import pandas as pd
import pytest
import scipy.sparse as sp
import zarr

import hbx_gpu
from hbx_gpu._inplace.cells import Cells
from hbx_gpu.errors import CorruptChunkError, InvalidDataError, UnknownNameError, UnsafePathError
from tests.stores.small import as_dense, put, rows_of, small, written


def n_cells(*paths: Any) -> int:
    opened = hbx_gpu.open(*paths)
    assert isinstance(opened, Cells)
    return opened.n_cells


def test_raw_has_features_of_its_own(tmp_path: Path) -> None:
    data = small()
    data.raw = data
    part = data[:, :4].copy()
    part.write_h5ad(tmp_path / "a.h5ad")
    part.write_zarr(tmp_path / "a.zarr")
    for path in (tmp_path / "a.h5ad", tmp_path / "a.zarr"):
        dataset = hbx_gpu.open(path).to_cell_dataset(layer="raw")
        np.testing.assert_array_equal(as_dense(dataset), data.X.toarray())
        assert dataset.feature_uids.tolist() == data.var_names.tolist()
        np.testing.assert_array_equal(rows_of(path), part.X.toarray())


def test_raw_and_tables_of_anndata_before_0_7(tmp_path: Path) -> None:
    data = small()
    data.write_h5ad(tmp_path / "a.h5ad")
    with h5py.File(tmp_path / "a.h5ad", "a") as file:
        file.copy("X", "raw.X")
        del file["obs"], file["var"]
        obs = [(f"c{i}".encode(), i % 2) for i in range(12)]
        file["obs"] = np.array(obs, dtype=[("index", "S5"), ("t", "i1")])
        file["uns/t_categories"] = np.array([b"A", b"B"])
        for name, letter in (("var", "g"), ("raw.var", "r")):
            file[name] = np.array([(f"{letter}{i}".encode(),) for i in range(7)], dtype=[("index", "S5")])
    dataset = hbx_gpu.open(tmp_path / "a.h5ad").to_cell_dataset(layer="raw")
    np.testing.assert_array_equal(as_dense(dataset), data.X.toarray())
    assert dataset.feature_uids[0] == "r0"
    assert hbx_gpu.open(tmp_path / "a.h5ad").to_pandas()["t"].astype(str).tolist()[:3] == ["A", "B", "A"]


def test_a_store_of_obsm_alone_answers_for_its_cells(tmp_path: Path) -> None:
    data = anndata.AnnData(obs=pd.DataFrame({"k": [1, 2, 3]}, index=list("abc")), obsm={"e": np.ones((3, 2))})
    data.write_zarr(tmp_path / "a.zarr")
    cells = hbx_gpu.open(tmp_path / "a.zarr")
    assert cells.where("k > 1").count() == 2
    with pytest.raises(UnknownNameError, match="holds no matrix at all"):
        cells.to_cell_dataset()


def test_names_with_slashes_and_letters_of_any_alphabet(tmp_path: Path) -> None:
    data = small()
    data.layers["größe µ"] = data.X * 2
    data.write_h5ad(tmp_path / "a.h5ad")
    root = written(tmp_path / "a.zarr", data)
    with h5py.File(tmp_path / "a.h5ad", "a") as file:
        file.copy("X", "layers/deep/er")
    root["layers"].create_group("deep")
    shutil.copytree(tmp_path / "a.zarr" / "X", tmp_path / "a.zarr" / "layers" / "deep" / "er")
    for path in (tmp_path / "a.h5ad", tmp_path / "a.zarr"):
        np.testing.assert_array_equal(rows_of(path, "größe µ"), data.X.toarray() * 2)
        np.testing.assert_array_equal(rows_of(path, "deep/er"), data.X.toarray())


def test_a_layer_that_cannot_be_read_does_not_hide_the_others(tmp_path: Path) -> None:
    data = small()
    data.write_h5ad(tmp_path / "a.h5ad")
    with h5py.File(tmp_path / "a.h5ad", "a") as file:
        file["layers/complex"] = np.zeros((12, 7), dtype="c8")
        file["layers/cube"] = np.zeros((12, 7, 2))
        file["layers/text"] = np.array([b"a"] * 12)
    np.testing.assert_array_equal(rows_of(tmp_path / "a.h5ad"), data.X.toarray())
    for layer in ("complex", "cube", "text"):
        with pytest.raises(ValueError, match=layer):
            rows_of(tmp_path / "a.h5ad", layer)


@pytest.mark.parametrize("zarr_format", [2, 3])
def test_fill_values_other_than_zero(tmp_path: Path, zarr_format: int) -> None:
    data = small()
    root = written(tmp_path / "a.zarr", data, zarr_format)
    data.X.data[5:10] = 7
    put(root, "X/data", data.X.data, chunks=(5,), fill_value=7.0, config={"write_empty_chunks": False})
    found = [path.name for path in (tmp_path / "a.zarr" / "X" / "data").rglob("[0-9]")]
    assert "1" not in found
    assert "0" in found
    np.testing.assert_array_equal(rows_of(tmp_path / "a.zarr"), data.X.toarray())
    data.write_h5ad(tmp_path / "a.h5ad")
    with h5py.File(tmp_path / "a.h5ad", "a") as file:
        del file["X/data"]
        values = file.create_dataset("X/data", shape=data.X.data.shape, dtype="f4", chunks=(5,), fillvalue=7)
        values[:5], values[10:] = data.X.data[:5], data.X.data[10:]
    np.testing.assert_array_equal(rows_of(tmp_path / "a.h5ad"), data.X.toarray())


@pytest.mark.parametrize(
    ("zarr_format", "encoding"), [(2, "v2/"), (2, "v2."), (3, "default/"), (3, "default."), (3, "v2.")]
)
def test_separators_of_chunk_keys(tmp_path: Path, zarr_format: int, encoding: str) -> None:
    data = small()
    keys = {"name": encoding[:-1], "separator": encoding[-1]}
    root = written(tmp_path / "a.zarr", data, zarr_format)
    put(root, "X", data.X.toarray(), chunks=(5, 3), chunk_key_encoding=keys)
    np.testing.assert_array_equal(rows_of(tmp_path / "a.zarr"), data.X.toarray())


def test_orders_of_axes_and_shards_with_absent_chunks(tmp_path: Path) -> None:
    x = small().X.toarray()
    x[:6] = 0
    root = written(tmp_path / "f.zarr", small(), 2)
    put(root, "X", x, chunks=(5, 3), order="F")
    root = written(tmp_path / "t.zarr", small())
    put(root, "X", x, chunks=(5, 3), filters=[zarr.codecs.TransposeCodec(order=(1, 0))])
    root = written(tmp_path / "s.zarr", small())
    put(root, "X", x, chunks=(3, 7), shards=(6, 7), config={"write_empty_chunks": False})
    for name in ("f.zarr", "t.zarr", "s.zarr"):
        np.testing.assert_array_equal(rows_of(tmp_path / name), x)


@pytest.mark.parametrize("dense", [False, True])
@pytest.mark.parametrize(("n_cells", "n_genes"), [(0, 7), (12, 0), (0, 0)])
def test_empty_matrices(tmp_path: Path, n_cells: int, n_genes: int, dense: bool) -> None:
    empty = np.zeros((n_cells, n_genes), np.float32)
    data = anndata.AnnData(empty if dense else sp.csr_matrix(empty))
    data.write_h5ad(tmp_path / "a.h5ad")
    data.write_zarr(tmp_path / "a.zarr")
    for path in (tmp_path / "a.h5ad", tmp_path / "a.zarr"):
        dataset = hbx_gpu.open(path).to_cell_dataset()
        assert (len(dataset), dataset.n_features) == (n_cells, n_genes)


def test_chunks_of_no_elements(tmp_path: Path) -> None:
    """zarr-python 2 wrote them for arrays without elements."""
    written(tmp_path / "a.zarr", anndata.AnnData(sp.csr_matrix((4, 3), dtype=np.float32)), 2)
    for name in ("data", "indices"):
        path = tmp_path / "a.zarr" / "X" / name / ".zarray"
        path.write_text(json.dumps(json.loads(path.read_text()) | {"chunks": [0]}))
    assert rows_of(tmp_path / "a.zarr").shape == (4, 3)


def test_sparse_booleans(tmp_path: Path) -> None:
    data = small()
    data.X = data.X.astype(bool)
    data.write_h5ad(tmp_path / "a.h5ad")
    dataset = hbx_gpu.open(tmp_path / "a.h5ad").to_cell_dataset()
    assert dataset.dtype == bool
    np.testing.assert_array_equal(as_dense(dataset), data.X.toarray().astype(float))


def test_a_folder_and_a_group_of_stores(tmp_path: Path) -> None:
    folder = tmp_path / "many"
    folder.mkdir()
    small().write_zarr(folder / "a.zarr")
    small().write_h5ad(folder / "b.h5ad")
    (folder / "readme.txt").write_text("no store")
    (folder / ".hidden").mkdir()
    assert n_cells(folder) == 24
    zarr.open_group(str(tmp_path / "root.zarr"), mode="w")
    for name in ("one", "two"):
        small().write_zarr(tmp_path / "root.zarr" / name)
    assert n_cells(tmp_path / "root.zarr") == 24
    small().write_h5ad(tmp_path / "we[1]rd.h5ad")
    assert n_cells(tmp_path / "we[1]rd.h5ad") == 12
    with pytest.raises(InvalidDataError, match="no path was given"):
        hbx_gpu.open([])


def test_names_say_nothing(tmp_path: Path) -> None:
    small().write_h5ad(tmp_path / "a.zarr")
    small().write_zarr(tmp_path / "b.h5ad")
    assert n_cells(tmp_path / "a.zarr", tmp_path / "b.h5ad") == 24


def test_links(tmp_path: Path) -> None:
    """A store may be reached by a link; links inside that lead out of it must be allowed."""
    data = small()
    data.write_zarr(tmp_path / "a.zarr")
    os.symlink(tmp_path / "a.zarr", tmp_path / "b.zarr")
    np.testing.assert_array_equal(rows_of(tmp_path / "b.zarr"), data.X.toarray())
    (tmp_path / "annex").mkdir()
    for number, file in enumerate(sorted(p for p in (tmp_path / "a.zarr").rglob("*") if p.is_file())):
        shutil.move(file, tmp_path / "annex" / str(number))
        os.symlink(tmp_path / "annex" / str(number), file)
    with pytest.raises(UnsafePathError, match="allow_links=True"):
        rows_of(tmp_path / "a.zarr")
    dataset: Any = hbx_gpu.open(tmp_path / "a.zarr", allow_links=True).to_cell_dataset()
    np.testing.assert_array_equal(as_dense(dataset), data.X.toarray())
    np.testing.assert_array_equal(as_dense(dataset._recipe.rebuild()), data.X.toarray())
    data.write_h5ad(tmp_path / "a.h5ad")
    with h5py.File(tmp_path / "a.h5ad", "a") as file:
        file["layers/soft"], file["layers/hard"] = h5py.SoftLink("/X"), file["X"]
    for layer in ("soft", "hard"):
        np.testing.assert_array_equal(rows_of(tmp_path / "a.h5ad", layer), data.X.toarray())


def kinds_of_columns() -> dict[str, Any]:
    return {
        "ordered": pd.Categorical(["lo", "hi", None] * 4, categories=["lo", "mid", "hi"], ordered=True),
        "numbers": pd.Categorical([3, 1, 2] * 4),
        "flags": pd.Categorical([True, False] * 6),
        "fractions": pd.Categorical([0.5, 1.5, np.nan] * 4),
        "integers": pd.array([2**60 + 1, None, 3] * 4, dtype="Int64"),
        "small": pd.array([200, None, 3] * 4, dtype="UInt8"),
        "booleans": pd.array([True, None, False] * 4, dtype="boolean"),
        "floats": [1.0, np.nan, np.inf] * 4,
        "text": [f"µ{i}" for i in range(12)],
        "empty": "",
        "a/b": np.arange(12),
    }


@pytest.mark.parametrize("name", ["a.h5ad", "a2.zarr", "a3.zarr"])
def test_columns_of_every_kind(tmp_path: Path, name: str) -> None:
    data = small()
    columns = kinds_of_columns()
    for column, values in columns.items():
        if name.endswith("h5ad") or column != "a/b":
            data.obs[column] = values
    if name.endswith("h5ad"):
        data.write_h5ad(tmp_path / name)
    else:
        written(tmp_path / name, data, int(name[1]))
    cells = hbx_gpu.open(tmp_path / name)
    found = cells.to_pandas()
    for column, values in data.obs.items():
        there = ~values.isna().to_numpy()
        assert (found[column].isna().to_numpy() == ~there).all(), column
        assert list(map(str, found[column][there])) == list(map(str, values[there])), column
    assert cells.where("booleans IS NULL").count() == 4
    assert cells.where("numbers = 3").count() == 4
    dataset = cells.to_cell_dataset(metadata_columns=list(data.obs.columns))
    assert len(dataset[[0, 1]].metadata or ()) == len(data.obs.columns)


def test_text_of_fixed_width(tmp_path: Path) -> None:
    root = written(tmp_path / "a.zarr", small(), 2)
    for name, values in (("U", [f"ü{i}" for i in range(12)]), ("S", [b"x%d" % i for i in range(12)])):
        array = put(root, f"obs/{name}", np.array(values), chunks=(12,))
        array.attrs.update({"encoding-type": "string-array", "encoding-version": "0.2.0"})
    root["obs"].attrs["column-order"] = ["k", "U", "S"]
    found = hbx_gpu.open(tmp_path / "a.zarr").to_pandas()
    assert (found["U"].iloc[1], found["S"].iloc[1]) == ("ü1", "x1")


def test_metadata_that_were_consolidated_before_a_change(tmp_path: Path) -> None:
    data = small()
    root = written(tmp_path / "a.zarr", data)
    zarr.consolidate_metadata(str(tmp_path / "a.zarr"))
    put(root, "X", data.X.toarray() + 1, chunks=(4, 7))
    np.testing.assert_array_equal(rows_of(tmp_path / "a.zarr"), data.X.toarray() + 1)


def test_pointers_beyond_two_to_the_31(tmp_path: Path) -> None:
    """Chunks that were never written take no room, so a file of 2^31 values is small."""
    n = 2**31 + 4_000
    small().write_h5ad(tmp_path / "a.h5ad")
    with h5py.File(tmp_path / "a.h5ad", "a") as file:
        for name, dtype, first in (("data", "f4", 1), ("indices", "i4", 0)):
            del file[f"X/{name}"]
            array = file["X"].create_dataset(
                name, shape=(n,), dtype=dtype, chunks=(1 << 20,), compression="gzip"
            )
            array[n - 6 :] = np.arange(6) + first
        del file["X/indptr"]
        file["X/indptr"] = np.array([0] * 5 + [2**30] * 3 + [n - 6] * 3 + [n - 3, n])
    batch: Any = hbx_gpu.open(tmp_path / "a.h5ad").to_cell_dataset()[[10, 11]]
    assert (batch.indices.tolist(), batch.values.tolist()) == ([0, 1, 2, 3, 4, 5], [1, 2, 3, 4, 5, 6])


def test_decoded_chunks_are_kept_within_a_bound(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from hbx_gpu._codecs.chain import ChunkCodec

    data = small()
    data.write_h5ad(tmp_path / "a.h5ad", compression="gzip")
    dataset = hbx_gpu.open(tmp_path / "a.h5ad").to_cell_dataset()
    decoded: list[int] = []
    decode = ChunkCodec.decode

    def counted(self: ChunkCodec, *arguments: Any) -> Any:
        decoded.append(1)
        return decode(self, *arguments)

    monkeypatch.setattr(ChunkCodec, "decode", counted)
    for kept, times in (
        (dataset, 2),
        (dataset.with_decoded_cache(0), 6),
        (dataset.with_decoded_cache(1 << 20), 2),
    ):
        decoded.clear()
        for rows in ([0, 1], [1, 2], [0, 5]):
            kept[rows]
        assert len(decoded) == times
        np.testing.assert_array_equal(as_dense(kept), data.X.toarray())
    with pytest.raises(ValueError, match="0 bytes or more"):
        dataset.with_decoded_cache(-1)


@pytest.mark.parametrize("name", ["Zstd", "Blosc"])
def test_filters_of_hdf5plugin(tmp_path: Path, name: str) -> None:
    """Written by the plug-ins themselves, and decoded on our threads, which know nothing of them."""
    hdf5plugin = pytest.importorskip("hdf5plugin")
    data = small()
    data.write_h5ad(tmp_path / "a.h5ad")
    with h5py.File(tmp_path / "a.h5ad", "a") as file:
        for part in ("data", "indices", "indptr"):
            values = file[f"X/{part}"][:]
            del file[f"X/{part}"]
            file.create_dataset(f"X/{part}", data=values, chunks=(8,), **getattr(hdf5plugin, name)())
    np.testing.assert_array_equal(rows_of(tmp_path / "a.h5ad"), data.X.toarray())


def test_ten_million_cells_open_without_a_look_at_their_values(tmp_path: Path) -> None:
    """Row pointers are read, and nothing else: chunks that nobody can decode are found when rows are read.

    Seconds would measure the machine, which may take ten times as long to touch memory as another.
    """
    n, chunk = 10_000_000, 1 << 20
    small(1, 3).write_h5ad(tmp_path / "a.h5ad")
    with h5py.File(tmp_path / "a.h5ad", "a") as file:
        del file["X/indptr"], file["X/data"], file["X/indices"], file["obs"]
        file["X"].attrs["shape"] = [n, 3]
        file["X/indptr"] = np.arange(n + 1, dtype=np.int64)
        for name, dtype in (("data", "f4"), ("indices", "i4")):
            array = file.create_dataset(
                f"X/{name}", shape=(n,), dtype=dtype, chunks=(chunk,), compression="gzip"
            )
            for first in range(0, n, chunk):
                array.id.write_direct_chunk((first,), b"no gzip")
        obs = file.create_group("obs")
        obs.attrs.update({"_index": "_index", "encoding-type": "dataframe", "encoding-version": "0.2.0"})
        obs.attrs["column-order"] = np.zeros(0, dtype=h5py.string_dtype())
        obs.create_dataset("_index", shape=(n,), dtype="S8", chunks=(chunk,), compression="gzip")
    dataset: Any = hbx_gpu.open(tmp_path / "a.h5ad").to_cell_dataset()
    assert len(dataset) == n
    with pytest.raises(CorruptChunkError):
        dataset[[n - 1]]
