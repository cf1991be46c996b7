"""Stores that are not .h5ad files, ingested and converted: what was written comes back from the atlas."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import scipy.sparse as sp

from hbx_gpu import RaggedAtlas, cli
from hbx_gpu.scdl import SingleCellMemMapDataset

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
