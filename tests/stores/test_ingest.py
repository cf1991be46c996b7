"""Stores that are not .h5ad files, ingested and converted: what was written comes back from the atlas."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import scipy.sparse as sp

import hbx_gpu
from hbx_gpu import RaggedAtlas, cli
from hbx_gpu._stores.source import open_source
from hbx_gpu.errors import UnsupportedError
from hbx_gpu.scdl import SingleCellMemMapDataset
from tests.stores.small import as_dense, small

STORES = [
    ("tenx_v3_gex_adt", "store.h5"),
    ("tenx_v2_one_genome", "store.h5"),
    ("annbatch031_small_shards_zstd", "store.zarr"),
    ("zarr_ad012_v3", "store.zarr"),
    ("zarr_ad013_csc", "store.zarr"),
    ("loom_loompy", "store.loom"),
]


@pytest.mark.parametrize(("name", "store"), STORES)
def test_an_atlas_holds_what_the_store_holds(shared: Path, tmp_path: Path, name: str, store: str) -> None:
    folder = shared / "fixtures" / "inplace" / name
    assert cli.main(["ingest", str(folder / store), "--atlas", str(tmp_path / "atlas")]) == 0
    found = RaggedAtlas.checkout_latest(tmp_path / "atlas").query().to_anndata()
    with np.load(folder / "expected.npz") as expected:
        arrays = [expected[f"X/{part}"] for part in ("data", "indices", "indptr")]
        wanted = sp.csr_matrix(tuple(arrays), shape=tuple(expected["X/shape"]))
        names = expected["var_names"].astype(str)
    assert found.n_obs == wanted.shape[0]
    total = found.X.sum(axis=0)
    by_gene = dict(zip(found.var_names.astype(str), np.asarray(total).ravel(), strict=True))
    sums = np.asarray(wanted.sum(axis=0)).ravel()
    assert {gene: by_gene.get(gene, 0) for gene in names} == dict(zip(names, sums, strict=True))
    assert sorted(np.asarray(found.X.sum(axis=1)).ravel()) == sorted(np.asarray(wanted.sum(axis=1)).ravel())


def test_an_archive_holds_what_the_store_holds(shared: Path, tmp_path: Path) -> None:
    folder = shared / "fixtures" / "inplace" / "tenx_v3_gex_adt"
    assert cli.main(["convert", str(folder / "store.h5"), str(tmp_path / "archive")]) == 0
    archive = SingleCellMemMapDataset(str(tmp_path / "archive"))
    with np.load(folder / "expected.npz") as expected:
        assert archive.number_of_rows() == expected["X/shape"][0]
        assert archive.number_nonzero_values() == len(expected["X/data"])


def test_a_mudata_in_zarr_becomes_modalities(tmp_path: Path) -> None:
    import mudata

    rna, protein = small(), small(n_genes=3)
    mudata.MuData({"rna": rna, "protein": protein}).write_zarr(str(tmp_path / "m.zarr"))
    assert cli.main(["ingest", str(tmp_path / "m.zarr"), "--atlas", str(tmp_path / "atlas")]) == 0
    query = RaggedAtlas.checkout_latest(tmp_path / "atlas").query()
    np.testing.assert_array_equal(as_dense(query.to_cell_dataset("gene_expression")), rna.X.toarray())
    np.testing.assert_array_equal(as_dense(query.to_cell_dataset("protein_abundance")), protein.X.toarray())
    with pytest.raises(UnsupportedError, match="several modalities"), open_source(tmp_path / "m.zarr"):
        pass


@pytest.mark.parametrize("name", ["m.h5mu", "m.zarr"])
def test_one_modality_of_a_mudata_becomes_an_archive(
    tmp_path: Path, name: str, capsys: pytest.CaptureFixture[str]
) -> None:
    import mudata

    parts = {"rna": small(), "protein": small(n_genes=3)}
    path = tmp_path / name
    mdata = mudata.MuData(parts)
    mdata.write(path) if name == "m.h5mu" else mdata.write_zarr(str(path))
    for modality, adata in parts.items():
        target = tmp_path / modality
        assert cli.main(["convert", f"{path}:{modality}", str(target)]) == 0
        archive = SingleCellMemMapDataset(str(target))
        for row in range(adata.n_obs):
            (values, columns), *_ = archive.get_row(row)
            np.testing.assert_array_equal(columns, adata.X[row].indices)
            np.testing.assert_array_equal(values, adata.X[row].data)
    capsys.readouterr()
    assert cli.main(["convert", str(path), str(tmp_path / "all")]) == 1
    assert f"name one of them as {path}:rna" in capsys.readouterr().err.replace("protein", "rna")
    assert cli.main(["convert", f"{path}:atac", str(tmp_path / "all")]) == 1
    assert "has no modality 'atac'" in capsys.readouterr().err
    assert not (tmp_path / "all").exists()


STORES_BY_FORMAT = [
    ("annbatch031_three_datasets", "annbatch collection"),
    ("tenx_v2_one_genome", "10x Genomics HDF5"),
    ("loom_loompy", "loom"),
    ("h5ad_ad06_csr_gzip_raw", "raw: 60 cells x 50 features, csr, 464 values, float32, zlib"),
    ("zarr_ad013_csc", "csc, 722 values, float32, zstd"),
    ("h5mu_mudata041", "MuData HDF5"),
    ("muzarr_mudata041", "MuData zarr"),
]


@pytest.mark.parametrize(("name", "said"), STORES_BY_FORMAT)
def test_info_says_what_a_store_holds(
    shared: Path, capsys: pytest.CaptureFixture[str], name: str, said: str
) -> None:
    folder = shared / "fixtures" / "inplace" / name
    path = next(path for path in folder.iterdir() if path.name.startswith("store"))
    assert cli.main(["info", str(path)]) == 0
    assert said in capsys.readouterr().out


def test_info_of_several_paths(shared: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = shared / "fixtures" / "inplace"
    paths = [folder / "loom_loompy" / "store.loom", folder / "zarr_ad012_v3" / "store.zarr"]
    atlas = shared / "fixtures" / "homeobox" / "ragged_rna" / "atlas"
    assert cli.main(["info", *map(str, [*paths, atlas])]) == 0
    out = capsys.readouterr().out
    assert out.index(f"{paths[0]}: loom") < out.index(f"\n\n{paths[1]}: AnnData") < out.index("snapshot   ")


def test_bench_measures_a_collection(shared: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = shared / "fixtures" / "inplace" / "annbatch031_three_datasets" / "store.zarr"
    options = "--device cpu --seconds 0.05 --repeat 1 --executor direct --layout csr --order random"
    assert cli.main(["bench", str(path), *options.split(), "--train", "none", "--cache", "warm"]) == 0
    assert "all equal" in capsys.readouterr().out


def test_csc_names_the_command_that_turns_it(shared: Path) -> None:
    path = shared / "fixtures" / "inplace" / "zarr_ad013_csc" / "store.zarr"
    with pytest.raises(UnsupportedError, match=f"hbx-gpu ingest {path} --atlas"):
        hbx_gpu.open(path).to_cell_dataset()
