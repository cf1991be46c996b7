"""Files by other writers, ingested with default options and compared value by value."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from pathlib import Path
from typing import Any

import anndata
import mudata
import numpy as np
import pandas as pd
import pytest
import scipy.sparse as sp

from hbx_gpu import cli
from hbx_gpu.atlas import RaggedAtlas, create_or_open_atlas

# .h5ad files of anndata 0.6 to 0.13, of h5py alone, and one of mudata.
STORES = (
    "h5ad_ad010_dense_lzf", "h5ad_ad012_csc_gzip", "h5ad_ad012_odd_chunks", "h5ad_ad013_gzip_raw_layers",
    "h5ad_ad013_none_min_idx", "h5ad_ad06_csr_gzip_raw", "h5ad_ad078_csr_gzip_raw", "h5ad_ad08_csr_lzf",
    "h5ad_big_endian", "h5ad_dense_contiguous", "h5ad_duplicates_unsorted", "h5ad_fixed_length_strings",
    "h5ad_fletcher32", "h5ad_hdf5plugin_zstd", "h5ad_libver_latest", "h5ad_lzf_incompressible",
    "h5ad_structured_obs_h5py", "h5ad_userblock",
)  # fmt: skip
# Values that an ingest of counts refuses by default, and what its message says.
REFUSED = {"h5ad_lzf_incompressible": "--target-layer", "h5ad_zero_rows": "no cells"}
if importlib.util.find_spec("hdf5plugin") is None:
    REFUSED["h5ad_hdf5plugin_zstd"] = "pip install hdf5plugin"


def missing(value: Any) -> bool:
    return value is None or value is pd.NaT or value is pd.NA or value != value


def expected_obs(expected: Any, name: str) -> list[Any]:
    values = expected[f"obs/{name}/values"].tolist()
    key = f"obs/{name}/missing"
    mask = expected[key] if key in expected else np.zeros(len(values), bool)
    values = [value.decode() if isinstance(value, bytes) else value for value in values]
    return [None if gone or missing(value) else value for value, gone in zip(values, mask, strict=True)]


def same_columns(obs: pd.DataFrame, wanted: dict[str, list[Any]]) -> None:
    for name, values in wanted.items():
        if name not in obs:
            assert all(value is None for value in values), name
            continue
        got = [None if missing(value) else value for value in obs[name].tolist()]
        assert got == values, name


@pytest.mark.parametrize("name", [*STORES, "h5ad_zero_rows"])
def test_fixtures(shared: Path, tmp_path: Path, name: str, capsys: pytest.CaptureFixture[str]) -> None:
    folder = shared / "fixtures" / "inplace" / name
    status = cli.main(["ingest", str(folder / "store.h5ad"), "--atlas", str(tmp_path / "A")])
    said = "".join(capsys.readouterr())
    if name in REFUSED:
        assert status == 1
        assert REFUSED[name] in said
        return
    assert status == 0, said
    atlas = RaggedAtlas.checkout_latest(tmp_path / "A")
    (row,) = atlas.list_datasets().to_dict("records")
    adata = atlas.query().to_anndata()
    matrix = row["source_matrix"]
    with np.load(folder / "expected.npz") as expected:
        prefix = {"X": "X", "raw": "raw/X"}.get(matrix, f"layers/{matrix}")
        parts = [expected[f"{prefix}/{part}"] for part in ("data", "indices", "indptr")]
        wanted = sp.csr_matrix(tuple(parts), shape=tuple(expected[f"{prefix}/shape"])).toarray()
        var = expected["raw/var_names" if matrix == "raw" else "var_names"].astype(str).tolist()
        cells = expected["obs_names"].astype(str).tolist()
        columns = {str(key): expected_obs(expected, str(key)) for key in expected["obs_columns"]}
    assert adata.obs["obs_name"].tolist() == cells
    ids = var if row["feature_id_column"] == "index" else None
    dense = adata.X.toarray()
    if ids is not None:
        dense = pd.DataFrame(dense, columns=adata.var_names)[ids].to_numpy()
        assert np.array_equal(dense, wanted)
    else:
        assert np.array_equal(np.sort(dense, axis=1), np.sort(wanted, axis=1))
    renamed = {key: key.replace(".", "_") for key in columns}
    same_columns(adata.obs, {renamed[key]: values for key, values in columns.items()})


def everything(form: Callable[[Any], Any], dtype: str) -> anndata.AnnData:
    """Columns of every type that anndata writes, among layers, graphs and nested tables."""
    rng = np.random.default_rng(3)
    n, m = 11, 7
    obs: dict[str, Any] = {
        "category": pd.Categorical(list("abcab" * 2 + "d"), categories=list("dcbaz")),
        "ordered": pd.Categorical(["low", None, "high"] * 3 + ["low", "low"], ["low", "high"], ordered=True),
        "numbers as categories": pd.Categorical([3, 1, 2] * 3 + [1, 1]),
        "text": [f"t{i % 3}" for i in range(n)],
        "bool": rng.random(n) < 0.5,
        "gaps": pd.array([None, *range(10)], dtype="Int32"),
        "truth": pd.array([None, *[True, False] * 5], dtype="boolean"),
        "nothing": np.full(n, np.nan),
        "nan": np.where(np.arange(n) == 4, np.nan, rng.random(n)),
        "large": np.full(n, 2**62) + np.arange(n),
        "dotted.name": np.arange(n),
        **{kind: np.arange(n).astype(kind) for kind in ("int8", "int16", "int32", "int64")},
        **{kind: np.arange(n).astype(kind) for kind in ("uint8", "uint16", "uint32", "float32")},
    }
    counts = rng.integers(0, 9, (n, m)).astype(dtype)
    index = [f"cell{i}" for i in range(n)]
    var = pd.DataFrame({"length": np.arange(m)}, index=[f"gene {i}" for i in range(m)])
    adata = anndata.AnnData(form(counts), obs=pd.DataFrame(obs, index=index), var=var)
    adata.layers["log"] = sp.csr_matrix(np.log1p(counts.astype(np.float32)))
    adata.obsm["X_pca"] = rng.random((n, 3))
    adata.obsm["table"] = pd.DataFrame({"x": np.arange(n)}, index=index)
    adata.varm["loadings"] = rng.random((m, 2))
    adata.obsp["graph"] = sp.random(n, n, 0.3, "csr", rng=rng)
    adata.uns["nested"] = {"a": {"b": np.arange(3)}, "names": np.array(["x", "y"]), "frame": var.copy()}
    adata.raw = adata
    return adata


@pytest.mark.parametrize(
    ("form", "dtype"),
    [
        (sp.csr_matrix, "float32"),
        (sp.csc_matrix, "int64"),
        (sp.csr_array, "uint16"),
        (np.asarray, "float64"),
        (np.asarray, "int8"),
    ],
)
def test_every_type_that_anndata_writes(form: Any, dtype: str, tmp_path: Path) -> None:
    everything(form, dtype).write_h5ad(tmp_path / "a.h5ad", compression="gzip")
    kept = anndata.read_h5ad(tmp_path / "a.h5ad")
    assert cli.main(["ingest", str(tmp_path / "a.h5ad"), "--atlas", str(tmp_path / "A")]) == 0
    adata = RaggedAtlas.checkout_latest(tmp_path / "A").query().to_anndata()
    assert adata.obs["obs_name"].tolist() == kept.obs_names.tolist()
    dense = kept.X.toarray() if sp.issparse(kept.X) else kept.X
    found = pd.DataFrame(adata.X.toarray(), columns=adata.var_names)
    assert np.array_equal(found[kept.var_names].to_numpy(), dense)
    assert adata.var.loc[kept.var_names, "length"].tolist() == kept.var["length"].tolist()
    same_columns(
        adata.obs,
        {
            name.replace(".", "_"): [None if missing(value) else value for value in kept.obs[name].tolist()]
            for name in kept.obs
        },
    )


@pytest.mark.parametrize("x", [None, np.zeros((4, 0), np.float32)])
def test_modalities_without_a_matrix_are_left_out_aloud(
    x: np.ndarray | None, tmp_path: Path, capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    """As packages for receptors write them: tables of chains beside a matrix of genes."""
    cells = [f"c{i}" for i in range(4)]
    rna = anndata.AnnData(
        sp.csr_matrix(np.arange(12, dtype=np.float32).reshape(4, 3)),
        obs=pd.DataFrame(index=cells),
        var=pd.DataFrame(index=["a", "b", "c"]),
    )
    airr = anndata.AnnData(x, obs=pd.DataFrame({"clone": [1, 2, 1, 2]}, index=cells))
    mdata = mudata.MuData({"gex": rna, "airr": airr})
    mdata.write_h5mu(tmp_path / "m.h5mu")
    assert cli.main(["ingest", str(tmp_path / "m.h5mu"), "--atlas", str(tmp_path / "A")]) == 0
    assert "airr holds no matrix and is left out" in caplog.text
    create_or_open_atlas(tmp_path / "B").add_multimodal(mdata)
    for name in "AB":
        atlas = RaggedAtlas.open(tmp_path / name)
        atlas.optimize()
        atlas.snapshot()
        adata = RaggedAtlas.checkout_latest(tmp_path / name).query().to_anndata()
        assert np.array_equal(adata.X.toarray(), rna.X.toarray())
    with pytest.raises(SystemExit):
        cli.main(["ingest", str(tmp_path / "m.h5mu:gex"), "--atlas", str(tmp_path / "C")])
    asked = f"--modality gex={tmp_path / 'm.h5mu'}:gex"
    assert asked in capsys.readouterr().err
    assert cli.main(["ingest", *asked.split(), "--atlas", str(tmp_path / "C")]) == 0
    mudata.MuData({"airr": airr}).write_h5mu(tmp_path / "n.h5mu")
    assert cli.main(["ingest", str(tmp_path / "n.h5mu"), "--atlas", str(tmp_path / "D")]) == 1
    assert "no modality with a matrix" in capsys.readouterr().err
    assert not (tmp_path / "D").exists()
