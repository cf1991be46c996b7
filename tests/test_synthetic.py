"""The generated data: right statistics, one content per seed whatever the layout, bounded memory."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import anndata
import h5py
import numpy as np
import pytest
from scipy import sparse

from hbx_gpu import synthetic
from hbx_gpu.synthetic import (
    GammaPoisson,
    Uniform,
    expression_profiles,
    gene_ids,
    write_demo_pair,
    write_h5ad,
)


def counts_of(path: Path) -> np.ndarray:
    x = anndata.read_h5ad(path).X
    result: np.ndarray = x.toarray() if sparse.issparse(x) else x
    return result


@pytest.mark.parametrize("compression", [None, "gzip"])
@pytest.mark.parametrize("layout", ["csr", "csc", "dense"])
def test_every_layout_holds_the_same_counts(
    tmp_path: Path, layout: synthetic.Layout, compression: str | None
) -> None:
    plain = write_h5ad(tmp_path / "plain.h5ad", 2_100, 60, seed=3)
    other = write_h5ad(tmp_path / "other.h5ad", 2_100, 60, seed=3, layout=layout, compression=compression)
    np.testing.assert_array_equal(counts_of(plain), counts_of(other))
    assert anndata.read_h5ad(plain).obs.equals(anndata.read_h5ad(other).obs)
    with h5py.File(other) as file:
        array = file["X"] if layout == "dense" else file["X/data"]
        assert array.compression == compression
        encoding = {"csr": "csr_matrix", "csc": "csc_matrix", "dense": "array"}[layout]
        assert file["X"].attrs["encoding-type"] == encoding


def test_csc_in_many_passes_equals_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = write_h5ad(tmp_path / "whole.h5ad", 1_500, 50, layout="csc")
    monkeypatch.setattr(synthetic, "_CSC_BUDGET", 100)
    rows: list[int] = []
    slabs = write_h5ad(tmp_path / "slabs.h5ad", 1_500, 50, layout="csc", progress=rows.append)
    assert sum(rows) == 1_500
    a, b = anndata.read_h5ad(whole).X, anndata.read_h5ad(slabs).X
    assert (a != b).nnz == 0
    assert b.has_canonical_format


def test_seed_decides_the_content(tmp_path: Path) -> None:
    first = counts_of(write_h5ad(tmp_path / "a.h5ad", 300, 80, seed=1))
    again = counts_of(write_h5ad(tmp_path / "b.h5ad", 300, 80, seed=1))
    other = counts_of(write_h5ad(tmp_path / "c.h5ad", 300, 80, seed=2))
    np.testing.assert_array_equal(first, again)
    assert (first != other).any()


def test_counts_are_overdispersed_around_the_profile() -> None:
    profiles = expression_profiles(1, 200, seed=5)
    n, depth = 20_000, 800.0
    block = GammaPoisson(profiles, dispersion=0.3).draw(
        np.random.default_rng(0), np.zeros(n, np.int64), np.full(n, depth)
    )
    matrix = sparse.csr_matrix((block.counts, block.indices, block.indptr), (n, 200)).toarray()
    mean = profiles[0] * depth
    often = mean > 2
    assert often.sum() > 20
    np.testing.assert_allclose(matrix.mean(axis=0)[often], mean[often], rtol=0.05)
    # Variance of a gamma-Poisson mixture: mean + dispersion * mean^2; a plain Poisson has the mean alone.
    np.testing.assert_allclose(matrix.var(axis=0)[often], (mean + 0.3 * mean**2)[often], rtol=0.15)


def test_data_look_like_cells(tmp_path: Path) -> None:
    adata = anndata.read_h5ad(write_h5ad(tmp_path / "a.h5ad", 3_000, 1_000))
    density = adata.X.nnz / np.prod(adata.shape)
    assert 0.07 < density < 0.14
    assert adata.X.data.min() >= 1
    np.testing.assert_array_equal(adata.obs["n_counts"], np.asarray(adata.X.sum(axis=1)).ravel())
    # Depth is log-normal with sigma 0.45: its logarithm is symmetric, and wide.
    log_depth = np.log(adata.obs["n_counts"])
    assert 0.35 < log_depth.std() < 0.6
    # Gene means span orders of magnitude.
    means = np.asarray(adata.X.mean(axis=0)).ravel()
    assert np.quantile(means, 0.95) > 50 * np.quantile(means, 0.1)


def test_marker_genes_tell_cell_types_apart(tmp_path: Path) -> None:
    adata = anndata.read_h5ad(write_h5ad(tmp_path / "a.h5ad", 2_000, 500, seed=9))
    x = adata.X.toarray()
    x = np.log1p(x / x.sum(axis=1, keepdims=True) * 1e3)
    codes = adata.obs["cell_type"].cat.codes.to_numpy()
    train, test = np.arange(2_000) % 2 == 0, np.arange(2_000) % 2 == 1
    centroids = np.stack([x[train & (codes == k)].mean(axis=0) for k in range(8)])
    nearest = ((x[test][:, None] - centroids) ** 2).sum(axis=2).argmin(axis=1)
    assert (nearest == codes[test]).mean() > 0.9
    assert (codes == np.bincount(codes).argmax()).mean() < 0.4


def test_uniform_has_the_density_and_distribution_asked_for(tmp_path: Path) -> None:
    path = write_h5ad(tmp_path / "a.h5ad", 1_500, 2_000, model=Uniform(2_000, density=0.07), compression=None)
    x = anndata.read_h5ad(path).X
    assert (np.diff(x.indptr) == 140).all()
    assert x.has_canonical_format  # ascending and distinct
    assert x.data.min() == 1
    assert x.data.mean() == pytest.approx(1 / 0.3, rel=0.02)
    per_gene = np.bincount(x.indices, minlength=2_000)
    assert abs(np.corrcoef(per_gene, np.arange(2_000))[0, 1]) < 0.1


def test_demo_pair_is_ragged(tmp_path: Path) -> None:
    paths = write_demo_pair(tmp_path / "new" / "folder", n_obs=(900, 700), n_vars=400)
    a, b = map(anndata.read_h5ad, paths)
    assert a.shape == (900, 400)
    assert b.shape == (700, 400)
    shared = a.var_names.intersection(b.var_names)
    assert 240 <= len(shared) < 400
    assert list(shared) != [gene for gene in b.var_names if gene in set(shared)], "the same order in both"
    assert set(b.obs.columns) - set(a.obs.columns) == {"tissue"}
    # The same gene marks the same type in both: type profiles over shared genes agree across files.
    profiles = []
    for adata in (a, b):
        x = adata[:, shared].X.toarray()
        means = np.stack(
            [x[adata.obs["cell_type"] == t].mean(axis=0) for t in a.obs["cell_type"].cat.categories]
        )
        profiles.append(np.log(means + 0.05) - np.log(means + 0.05).mean(axis=0))
    match = np.corrcoef(np.concatenate(profiles))[:8, 8:]
    assert (match.argmax(axis=1) == np.arange(8)).all()


def test_gene_ids_and_extra_columns_are_kept(tmp_path: Path) -> None:
    genes = np.array(["x", "ENSG7", "y"], dtype=object)
    path = write_h5ad(tmp_path / "a.h5ad", 5, 3, genes=genes, extra_obs={"age": np.arange(5.0)})
    adata = anndata.read_h5ad(path)
    assert list(adata.var_names) == list(genes)
    assert list(adata.var["gene_symbol"]) == ["x", "G7", "y"]
    assert adata.obs["age"].tolist() == [0, 1, 2, 3, 4]


@pytest.mark.parametrize("layout", ["csr", "csc", "dense"])
def test_no_cells(tmp_path: Path, layout: synthetic.Layout) -> None:
    assert anndata.read_h5ad(write_h5ad(tmp_path / "a.h5ad", 0, 4, layout=layout)).shape == (0, 4)


def test_lengths_that_disagree_are_named(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="genes must have n_vars = 4 genes, found 3"):
        write_h5ad(tmp_path / "a.h5ad", 5, 4, genes=gene_ids(3))
    with pytest.raises(ValueError, match="model must have n_vars = 4 genes, found 9"):
        write_h5ad(tmp_path / "a.h5ad", 5, 4, model=Uniform(9))
    assert not list(tmp_path.iterdir())


def test_a_failure_leaves_the_old_file(tmp_path: Path) -> None:
    path = write_h5ad(tmp_path / "a.h5ad", 5, 4)
    before = path.read_bytes()
    with pytest.raises(ValueError, match="length"):
        write_h5ad(path, 5, 4, extra_obs={"bad": np.arange(3)})
    assert path.read_bytes() == before
    assert [p.name for p in tmp_path.iterdir()] == ["a.h5ad"]


PEAK_GROWTH = """
import resource, sys
from hbx_gpu import synthetic

def peak():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)

def write(n_obs):
    model = synthetic.Uniform(4_000, density=0.25)
    synthetic.write_h5ad(sys.argv[1], n_obs, 4_000, model=model, layout=sys.argv[2], compression=None)

synthetic._CSC_BUDGET = 4_000_000
write(4_096)
small = peak()
write(16_384)
print(peak() - small)
"""


@pytest.mark.slow
@pytest.mark.parametrize("layout", ["csr", "csc"])
def test_memory_does_not_grow_with_the_file(tmp_path: Path, layout: str) -> None:
    command = [sys.executable, "-c", PEAK_GROWTH, str(tmp_path / "a.h5ad"), layout]
    grown = int(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
    # The larger file holds 12,288 x 1,000 more values of 8 bytes: 98 MB.
    assert grown < 30e6
