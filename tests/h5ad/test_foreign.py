"""Files that are no .h5ad, or that cannot be read now: each is named for what it is, with the way to go."""

from __future__ import annotations

import gzip
import subprocess
import sys
from pathlib import Path

import anndata
import h5py
import numpy as np
import pandas as pd
import pytest
import scipy.sparse as sp

from hbx_gpu._h5ad.files import H5adFile
from hbx_gpu.errors import InvalidDataError


def small() -> anndata.AnnData:
    obs = pd.DataFrame({"cell_type": pd.Categorical(["T", "B", None])}, index=["a", "b", "c"])
    return anndata.AnnData(sp.csr_matrix(np.eye(3, dtype=np.float32)), obs=obs)


def refusal(path: Path) -> str:
    with pytest.raises((InvalidDataError, FileNotFoundError)) as caught:
        H5adFile(path)
    return str(caught.value)


def test_other_formats(tmp_path: Path) -> None:
    small().write_h5ad(tmp_path / "a.h5ad")
    packed = tmp_path / "a.h5ad.gz"
    packed.write_bytes(gzip.compress((tmp_path / "a.h5ad").read_bytes()))
    assert "gunzip -k a.h5ad.gz" in refusal(packed)
    pointer = tmp_path / "lfs.h5ad"
    pointer.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n")
    assert "git lfs pull" in refusal(pointer)
    folder = tmp_path / "matrix"
    folder.mkdir()
    (folder / "matrix.mtx.gz").touch()
    assert "read_10x_mtx" in refusal(folder)
    small().write_zarr(tmp_path / "a.zarr")
    assert "Zarr store" in refusal(tmp_path / "a.zarr")
    with h5py.File(tmp_path / "tenx.h5", "w") as file:
        file["matrix/barcodes"] = [1]
    assert "10x Genomics (Cell Ranger 3" in refusal(tmp_path / "tenx.h5")
    with h5py.File(tmp_path / "a.loom", "w") as file:
        for name in ("matrix", "row_attrs", "col_attrs"):
            file.create_group(name)
    assert "Loom" in refusal(tmp_path / "a.loom")
    (tmp_path / "cut.h5ad").write_bytes((tmp_path / "a.h5ad").read_bytes()[:3000])
    assert "truncated or damaged" in refusal(tmp_path / "cut.h5ad")


def test_a_file_that_another_program_has_open_for_writing(tmp_path: Path) -> None:
    path = tmp_path / "a.h5ad"
    small().write_h5ad(path)
    holding = f"import h5py, sys; f = h5py.File({str(path)!r}, 'r+'); print(1, flush=True); sys.stdin.read()"
    with subprocess.Popen(
        [sys.executable, "-c", holding], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as holder:
        assert holder.stdout is not None
        holder.stdout.readline()
        said = refusal(path)
        holder.communicate(b"")
    assert "another program has it open for writing" in said
    assert "damaged" not in said


def test_a_filter_that_is_not_installed_is_named(tmp_path: Path) -> None:
    path = tmp_path / "a.h5ad"
    small().write_h5ad(path)
    with h5py.File(path, "r+") as file:
        values = file["X/data"][:]
        del file["X/data"]
        plan = h5py.h5p.create(h5py.h5p.DATASET_CREATE)
        plan.set_chunk((len(values),))
        plan.set_filter(32099, h5py.h5z.FLAG_OPTIONAL, ())
        space = h5py.h5s.create_simple(values.shape)
        made = h5py.h5d.create(file["X"].id, b"data", h5py.h5t.NATIVE_FLOAT, space, plan)
        made.write_direct_chunk((0,), values.tobytes(), 0)
    with H5adFile(path) as opened, pytest.raises(InvalidDataError, match="pip install hdf5plugin"):
        opened.matrix("X")


def test_attributes_as_fixed_length_strings(tmp_path: Path) -> None:
    path = tmp_path / "julia.h5ad"
    small().write_h5ad(path)
    with h5py.File(path, "r+") as file:

        def change(_: str, node: h5py.Group | h5py.Dataset) -> None:
            for key, value in list(node.attrs.items()):
                if isinstance(value, str):
                    node.attrs.create(key, np.bytes_(value.encode()))

        file.visititems(change)
        change("/", file)
    with H5adFile(path) as opened:
        assert opened.matrix("X").shape == (3, 3)
        assert opened.obs()["cell_type"].isna().tolist() == [False, False, True]
        assert opened.obs_columns() == ["cell_type"]


def test_raw_and_shared_categories_of_old_files(tmp_path: Path) -> None:
    names = np.array([(b"a", 0), (b"b", 2)], [("index", "S4"), ("kind", "i4")])
    with h5py.File(tmp_path / "old.h5ad", "w") as file:
        file["X"], file["obs"] = np.ones((2, 3), np.float32), names
        file["var"] = np.array([(b"g", 0), (b"h", 1), (b"i", 0)], [("index", "S4"), ("kind", "i4")])
        file["uns/kind_categories"] = np.array([b"protein", b"rna"])  # those of var overwrote those of obs
        file["raw.X"], file["raw.var"] = np.ones((2, 1), np.float32), np.array([(b"z",)], [("index", "S4")])
    with H5adFile(tmp_path / "old.h5ad") as opened:
        assert opened.matrices() == ["X", "raw"]
        assert opened.var("raw").index.tolist() == ["z"]
        assert opened.obs()["kind"].tolist() == [0, 2]
        assert opened.var()["kind"].tolist() == ["protein", "rna", "protein"]
