"""Ingest: what goes in comes back, and what does not fit is refused with nothing left behind."""

from __future__ import annotations

import hashlib
import itertools
from pathlib import Path
from typing import Any

import anndata
import numpy as np
import pandas as pd
import pytest
import scipy.sparse as sp
import zarr
from hypothesis import given, settings
from hypothesis import strategies as st

from hbx_gpu import __version__
from hbx_gpu.atlas import (
    DatasetSchema,
    DenseZarrPointer,
    DiscreteSpatialPointer,
    FeatureBaseSchema,
    HoxBaseSchema,
    PointerField,
    RaggedAtlas,
    SparseZarrPointer,
    add_from_anndata,
    add_from_h5ad,
    create_or_open_atlas,
    layout_uid,
)
from hbx_gpu.atlas._ingest.inputs import cell_uids
from hbx_gpu.atlas._writing.arrays import codec_names
from hbx_gpu.errors import AlreadyIngestedError, AtlasError, InvalidDataError, UnknownNameError
from tests.frames import texts


def counts(n: int = 12, m: int = 5, seed: int = 0, density: float = 0.4) -> sp.csr_matrix:
    found = sp.random(n, m, density, "csr", random_state=np.random.default_rng(seed))
    found.data = np.ceil(found.data * 100)
    found.sort_indices()
    return found.astype(np.float32)


def make(x: Any, seed: int = 0, genes: list[str] | None = None, **obs: Any) -> anndata.AnnData:
    n, m = x.shape
    genes = genes or [f"g{i}" for i in range(m)]
    return anndata.AnnData(
        x, obs=pd.DataFrame(obs, index=[f"s{seed}c{i}" for i in range(n)]), var=pd.DataFrame(index=genes)
    )


def contents(root: Path) -> dict[str, Any]:
    """Everything a failed ingest might leave behind."""
    atlas = RaggedAtlas.open(root)
    files = {str(p.relative_to(root)) for p in root.rglob("*") if p.is_file() and "lance_db" not in p.parts}
    return {
        "files": files - {".hbx_gpu/lock"},
        "obs": atlas.catalog.obs("cells").to_arrow().to_pylist(),
        "schema": atlas.catalog.obs("cells").schema,
        "datasets": atlas.catalog.dataset_rows(),
        "registry": atlas.catalog.registry("gene_expression").to_arrow().to_pylist(),
        "layouts": atlas.catalog.layouts().to_arrow().to_pylist(),
    }


def published(atlas: RaggedAtlas) -> RaggedAtlas:
    atlas.optimize()
    atlas.snapshot()
    return RaggedAtlas.checkout_latest(atlas.path)


def in_file_order(found: anndata.AnnData, adata: anndata.AnnData) -> anndata.AnnData:
    by_name = found[found.obs["obs_name"].isin(adata.obs_names)]
    order = by_name.obs.reset_index().set_index("obs_name").loc[list(adata.obs_names), "uid"]
    return by_name[order.tolist(), list(adata.var_names)]


# Round trips


@settings(max_examples=12, deadline=None)
@given(
    layout=st.sampled_from(["csr", "csc", "dense"]),
    where=st.sampled_from(["X", "raw", "spliced"]),
    as_file=st.booleans(),
    codec=st.sampled_from(codec_names()),
    density=st.sampled_from([0.0, 0.3, 1.0]),
    seed=st.integers(0, 99),
)
def test_everything_comes_back(
    tmp_path_factory: pytest.TempPathFactory,
    layout: str,
    where: str,
    as_file: bool,
    codec: str,
    density: float,
    seed: int,
) -> None:
    folder = tmp_path_factory.mktemp("trip")
    rng = np.random.default_rng(seed)
    atlas = create_or_open_atlas(folder / "a", codec=codec)
    given_data = []
    for i in range(2):
        x = counts(9 + i, 6, seed + i, density)
        genes = [f"g{j}" for j in rng.permutation(10)[:6]]
        adata = make(x, i, genes)
        stored = {"csr": x, "csc": x.tocsc(), "dense": x.toarray()}[layout]
        if where == "X":
            adata.X = stored
        elif where == "raw":
            adata.raw = make(stored, i, genes)
            adata.X = sp.csr_matrix(x.shape, dtype=np.float32)
        else:
            adata.layers["spliced"] = stored
            adata.X = sp.csr_matrix(x.shape, dtype=np.float32)
        if as_file:
            adata.write_h5ad(folder / f"{i}.h5ad")
        source = folder / f"{i}.h5ad" if as_file else adata
        assert atlas.add_from_anndata(source, layer=where, chunk_shape=16, shard_shape=64) == x.shape[0]
        given_data.append((adata, x))
    found = published(atlas).query().to_anndata()
    assert found.shape == (19, len(set(given_data[0][0].var_names) | set(given_data[1][0].var_names)))
    for adata, x in given_data:
        part = in_file_order(found, adata)
        np.testing.assert_array_equal(part.X.toarray(), x.toarray())
        assert part.X.dtype == np.uint32


def test_dataset_reads_what_was_written(tmp_path: Path) -> None:
    x, y = counts(30, 8, 1), counts(20, 5, 2)
    first, second = make(x, 0, list("abcdefgh"), kind=["x"] * 30), make(y, 1, list("hbxya"), kind=["y"] * 20)
    atlas = create_or_open_atlas(tmp_path / "a")
    atlas.add_from_anndata(first)
    atlas.add_from_anndata(second)
    dataset = published(atlas).query().to_cell_dataset("gene_expression", metadata_columns=["kind"])
    assert (dataset.n_cells, dataset.n_features) == (50, 10)
    order = {uid: i for i, uid in enumerate(dataset.feature_uids)}
    batch: Any = dataset.__getitems__(list(range(50)))
    dense = sp.csr_matrix((batch.values, batch.indices, batch.offsets), shape=(50, 10)).toarray()
    np.testing.assert_array_equal(dense[:30][:, [order[g] for g in first.var_names]], x.toarray())
    np.testing.assert_array_equal(dense[30:][:, [order[g] for g in second.var_names]], y.toarray())
    assert dataset.categories["kind"][batch.metadata["kind"]].tolist() == ["x"] * 30 + ["y"] * 20


def test_stored_order_repeats_and_zeros_are_kept(tmp_path: Path) -> None:
    parts = np.array([1.0, 0.0, 2.0, 3.0, 0.0], np.float32), np.array([4, 0, 4, 2, 1]), np.array([0, 3, 3, 5])
    adata = make(sp.csr_matrix((3, 5), dtype=np.float32))
    adata.layers["odd"] = sp.csr_matrix(parts, shape=(3, 5))
    atlas = create_or_open_atlas(tmp_path / "a")
    atlas.add_from_anndata(adata, layer="odd")
    group: Any = zarr.open_group(tmp_path / "a" / "zarr_store", mode="r")[
        atlas.list_datasets()["zarr_group"][0]
    ]
    assert group["csr/indices"][:].tolist() == parts[1].tolist()
    assert group["csr/layers/counts"][:].tolist() == parts[0].tolist()
    pointers = atlas.catalog.obs("cells").to_arrow().column("gene_expression").to_pylist()
    assert [(p["start"], p["end"], p["zarr_row"]) for p in pointers] == [(0, 3, 0), (3, 3, 1), (3, 5, 2)]


def test_real_files(tmp_path: Path, real_h5ad: tuple[Path, Path]) -> None:
    atlas = create_or_open_atlas(tmp_path / "a")
    done: list[tuple[int, int]] = []
    for path in real_h5ad:
        add_from_h5ad(atlas, path, progress=lambda *at: done.append(at))
    assert done[-1] == (1107, 1107)
    found = published(atlas).query().to_anndata()
    assert found.shape == (11_107, 1_507)
    rows = sorted(atlas.catalog.dataset_rows(), key=lambda row: -row["n_rows"])
    for row, path, id_column in zip(rows, real_h5ad, ("gene_ids", "index"), strict=True):
        adata = anndata.read_h5ad(path)
        if id_column != "index":
            adata.var = adata.var.set_index(id_column)
        # Barcodes repeat between datasets.
        part = in_file_order(found[found.obs["dataset_uid"] == row["dataset_uid"]], adata)
        assert (part.X != adata.X).nnz == 0
    for row, path, id_column in zip(rows, real_h5ad, ("gene_ids", "index"), strict=True):
        assert row["source_name"] == path.name
        assert row["source_sha256"] == hashlib.sha256(path.read_bytes()).hexdigest()
        assert (row["source_matrix"], row["zarr_layer"], row["codec"]) == (
            "X",
            "counts",
            "hbx_gpu.rowpack",
        )
        assert (row["feature_id_column"], row["software"]) == (id_column, f"hbx_gpu {__version__}")
        assert row["zarr_group"] == f"{row['dataset_uid']}/gene_expression"
    assert [row["n_rows"] for row in rows] == [10_000, 1_107]


def test_raw_has_its_own_features(tmp_path: Path) -> None:
    adata = make(counts(4, 3))
    adata.raw = make(counts(4, 7, 3), genes=[f"w{i}" for i in range(7)])
    atlas = create_or_open_atlas(tmp_path / "a")
    atlas.add_from_anndata(adata, layer="raw")
    assert atlas.feature_registry("gene_expression")["uid"].tolist() == [f"w{i}" for i in range(7)]


def test_backed_anndata(tmp_path: Path) -> None:
    make(counts()).write_h5ad(tmp_path / "b.h5ad")
    backed = anndata.read_h5ad(tmp_path / "b.h5ad", backed="r")
    atlas = create_or_open_atlas(tmp_path / "a")
    with pytest.raises(InvalidDataError, match=r"pass adata\.to_memory"):
        atlas.add_from_anndata(backed[:3])
    assert atlas.add_from_anndata(backed) == 12


# Values


BAD_COUNTS = [
    (2.5, np.float32, r"2\.5"),
    (-1, np.float64, "-1"),
    (-3, np.int32, "-3"),
    (np.nan, np.float32, "nan"),
    (np.inf, np.float64, "inf"),
    (2.0**32, np.float32, r"(4\.29\d+e\+09|4294967300\.0)"),
    (2**32, np.int64, "4294967296"),
    (2**63, np.uint64, "9223372036854775808"),
    (0.5, np.float16, r"0\.5"),
]


@pytest.mark.parametrize(("bad", "dtype", "shown"), BAD_COUNTS)
@pytest.mark.parametrize("layout", ["csr", "csc", "dense"])
def test_values_that_are_no_counts(tmp_path: Path, bad: float, dtype: Any, shown: str, layout: str) -> None:
    x = np.ones((7, 4), dtype)
    x[5, 2] = bad
    x[6, 1] = bad
    stored = {"csr": sp.csr_matrix, "csc": sp.csc_matrix, "dense": np.asarray}[layout](
        x.astype(np.float32) if dtype == np.float16 and layout != "dense" else x
    )
    adata = make(np.ones((7, 4), np.float32))
    adata.layers["bad"] = stored
    adata.write_h5ad(tmp_path / "bad.h5ad")
    atlas = create_or_open_atlas(tmp_path / "a")
    atlas.add_from_anndata(make(counts()))
    before = contents(tmp_path / "a")
    message = (
        rf"bad\.h5ad, matrix 'bad': row 5 \(cell 's0c5'\), column 2 \(feature 'g2'\) holds {shown}.*; counts "
        r"are whole numbers from 0 to 4294967295.*\['X', 'bad'\].*log_normalized.*zarr_layer="
    )
    with pytest.raises(InvalidDataError, match=message):
        atlas.add_from_h5ad(tmp_path / "bad.h5ad", layer="bad")
    assert contents(tmp_path / "a") == before


@pytest.mark.parametrize(
    "dtype", ["bool", "uint8", "int16", "uint32", "int64", "uint64", "float16", "float32", "float64"]
)
def test_integers_of_any_dtype(tmp_path: Path, dtype: str) -> None:
    x = np.array([[0, 1], [1, 0]]).astype(dtype)
    if dtype in ("uint32", "int64", "uint64", "float64"):
        x[0, 1] = 2**32 - 1
    atlas = create_or_open_atlas(tmp_path / "a")
    atlas.add_from_anndata(make(x))
    group: Any = zarr.open_group(tmp_path / "a" / "zarr_store", mode="r")[
        atlas.list_datasets()["zarr_group"][0]
    ]
    assert group["csr/layers/counts"][:].tolist() == x[x != 0].astype(np.uint64).tolist()


def test_float_layers(tmp_path: Path) -> None:
    atlas = create_or_open_atlas(tmp_path / "a")
    values = np.array([[0.5, np.nan], [-2.0, 3.0]])
    atlas.add_from_anndata(make(values), zarr_layer="log_normalized")
    found = published(atlas).query().layers("gene_expression", ["log_normalized"]).to_anndata()
    np.testing.assert_array_equal(found.X.toarray(), values.astype(np.float32))

    rough = make(np.array([[0.1, 0.0]]), 1)
    with pytest.raises(
        InvalidDataError, match=r"row 0 .* holds 0\.1; float32 cannot hold it exactly; allow_rounding=True"
    ):
        atlas.add_from_anndata(rough, zarr_layer="log_normalized")
    atlas.add_from_anndata(rough, zarr_layer="log_normalized", allow_rounding=True)
    for huge in (1e300, -1e39):
        with pytest.raises(InvalidDataError, match="float32 cannot hold it"):
            atlas.add_from_anndata(make(np.array([[huge, 0.0]]), 2), zarr_layer="tpm", allow_rounding=True)
    with pytest.raises(InvalidDataError, match="holds 16777217"):
        atlas.add_from_anndata(make(np.array([[2**24 + 1, 0]]), 3), zarr_layer="tpm")


# Features


def test_feature_columns_are_merged(tmp_path: Path) -> None:
    first = make(counts(4, 2), genes=["a", "b"])
    first.var["symbol"] = ["A", "B"]
    second = make(counts(4, 3, 1), 1)
    second.var.index = ["n", "n", "m"]
    second.var["gene_ids"] = ["b", "c", "d"]
    second.var["length"] = [7, 8, 9]
    atlas = create_or_open_atlas(tmp_path / "a")
    atlas.add_from_anndata(first)
    with pytest.warns(UserWarning, match="not unique"):
        atlas.add_from_anndata(second.copy())
    atlas.optimize()
    frame = atlas.feature_registry("gene_expression").set_index("uid")
    assert texts(frame["symbol"]) == ["A", "B", None, None]
    assert texts(frame["feature_name"]) == [None, None, "n", "m"]
    assert frame["length"].fillna(0).tolist() == [0, 0, 8, 9]  # b was known already and stays as it was
    assert atlas.list_datasets()["layout_uid"].tolist() == [
        layout_uid(["a", "b"]),
        layout_uid(["b", "c", "d"]),
    ]


def test_datasets_with_the_same_features_share_a_layout(tmp_path: Path) -> None:
    atlas = create_or_open_atlas(tmp_path / "a")
    for seed in range(3):
        atlas.add_from_anndata(make(counts(seed=seed), seed))
    assert atlas.catalog.layouts().count_rows() == 5


# Cells


def test_obs_columns_are_merged(tmp_path: Path) -> None:
    atlas = create_or_open_atlas(tmp_path / "a")
    columns: dict[str, Any] = {"age": [1, 2], "kind": pd.Categorical(["x", "y"]), "percent.mt": [0.5, 1]}
    atlas.add_from_anndata(make(counts(2, 3), **columns))
    atlas.add_from_anndata(make(counts(2, 3, 1), 1, age=[1.5, np.nan], uid=["mine", "too"], ok=[True, False]))
    atlas.add_from_anndata(make(counts(2, 3, 2), 2, kind=[1, 2]))
    frame = published(atlas).query().to_pandas().reset_index().set_index("obs_name")
    assert frame["age"].tolist()[:3] == [1.0, 2.0, 1.5]
    assert np.isnan(frame["age"].iloc[3])
    assert texts(frame["kind"]) == ["x", "y", None, None, "1", "2"]
    assert frame["percent_mt"].tolist()[:2] == [0.5, 1.0]
    assert frame["ok"].isna().tolist() == [True, True, False, False, True, True]
    assert frame["ok"].tolist()[2:4] == [True, False]
    assert texts(frame["uid_in_file"]) == [None, None, "mine", "too", None, None]


def test_a_promotion_keeps_earlier_snapshots(tmp_path: Path) -> None:
    atlas = create_or_open_atlas(tmp_path / "a")
    atlas.add_from_anndata(make(counts(2, 3), 0, age=[1, 2]))
    published(atlas)
    atlas.add_from_anndata(make(counts(2, 3, 1), 1, age=[0.5, 1.5]))
    published(atlas)
    old, new = (RaggedAtlas.checkout(tmp_path / "a", v).query().to_pandas()["age"] for v in (0, 1))
    assert (old.dtype, old.tolist()) == (np.int64, [1, 2])
    assert (new.dtype, new.tolist()) == (np.float64, [1.0, 2.0, 0.5, 1.5])
    atlas.add_from_anndata(make(counts(2, 3, 2), 2, big=[2**53 + 1, 0]))
    with pytest.raises(InvalidDataError, match=r"column 'big'.*9007199254740993 is too large"):
        atlas.add_from_anndata(make(counts(2, 3, 3), 3, big=[0.5, 0]))


class Donor(HoxBaseSchema):
    gene_expression: SparseZarrPointer | None = PointerField.declare(feature_space="gene_expression")
    donor: str
    split: str = "train"
    age: int | None = None


class Named(FeatureBaseSchema):
    pass


def test_a_class_decides_what_is_stored(tmp_path: Path) -> None:
    atlas = create_or_open_atlas(
        tmp_path / "a", {"cells": Donor}, registry_schemas={"gene_expression": Named}
    )
    with pytest.raises(
        InvalidDataError, match=r"AnnData object, obs: column 'donor' is missing, but table 'cells' requires"
    ):
        atlas.add_from_anndata(make(counts(2, 3)))
    adata = make(counts(2, 3), 0, donor=["p", "q"], extra=[1, 2], uid=["u1", "u2"])
    adata.var["extra"] = 1
    atlas.add_from_anndata(adata)
    rows = atlas.catalog.obs("cells").to_arrow().to_pylist()
    assert atlas.catalog.obs("cells").schema.equals(Donor.to_arrow_schema(), check_metadata=True)
    assert [(r["uid"], r["donor"], r["split"], r["age"]) for r in rows] == [
        ("u1", "p", "train", None),
        ("u2", "q", "train", None),
    ]
    assert atlas.feature_registry("gene_expression").columns.tolist() == ["uid", "global_index"]
    for uids, message in (
        (["v", "v"], "unique strings"),
        (["u2", "v"], r"1 cell uid\(s\) are in table 'cells' already"),
    ):
        with pytest.raises(InvalidDataError, match=message):
            atlas.add_from_anndata(make(counts(2, 3, 1), 1, donor=["p", "q"], uid=uids))


def test_cell_uids() -> None:
    uids = cell_uids("d", 1000).to_pylist()
    assert uids == cell_uids("d", 1000).to_pylist()
    assert uids[:10] == cell_uids("d", 10).to_pylist()
    assert len(set(uids) | set(cell_uids("e", 1000).to_pylist())) == 2000
    assert all(len(uid) == 16 and int(uid, 16) >= 0 for uid in uids)


# Identity


class Study(DatasetSchema):
    organism: str
    pmid: int | None = None


def test_a_record_identifies_the_dataset(tmp_path: Path) -> None:
    atlas = create_or_open_atlas(tmp_path / "a", dataset_schema=Study)
    record = Study(
        dataset_uid="d1", zarr_group="study/one/rna", feature_space="gene_expression", organism="human"
    )
    assert (
        add_from_anndata(atlas, make(counts()), feature_space="gene_expression", dataset_record=record) == 12
    )
    row = atlas.catalog.dataset_rows()[0]
    assert (row["dataset_uid"], row["zarr_group"], row["organism"]) == ("d1", "study/one/rna", "human")
    assert zarr.open_group(tmp_path / "a" / "zarr_store", mode="r")["study/one"].name == "/study/one"
    with pytest.raises(AlreadyIngestedError, match="group 'study/one/rna'"):
        atlas.add_from_anndata(make(counts(seed=1)), dataset_record=record)
    # The same data under another record are the user's wish; the same cells are not.
    again = record.model_copy(update={"zarr_group": "study/two/rna"})
    with pytest.raises(InvalidDataError, match=r"12 cell uid\(s\) are in table 'cells' already"):
        atlas.add_from_anndata(make(counts()), dataset_record=again)
    other = again.model_copy(update={"dataset_uid": "d2"})
    with pytest.raises(AlreadyIngestedError, match="12 of its 12 cells are in the atlas already"):
        atlas.add_from_anndata(make(counts()), dataset_record=other)
    assert atlas.add_from_anndata(make(counts()), dataset_record=other, accept_duplicates=True) == 12
    for change, message in (
        ({"feature_space": "protein_abundance"}, "dataset_record is for feature space 'protein_abundance'"),
        ({"zarr_group": "../outside"}, "must be a relative path"),
        ({"zarr_group": "study"}, "exists in"),
    ):
        with pytest.raises(AtlasError, match=message):
            atlas.add_from_anndata(make(counts()), dataset_record=other.model_copy(update=change))
    published(atlas)


def test_the_same_data_are_added_once(tmp_path: Path) -> None:
    adata = make(counts(), twin=range(12))
    adata.layers["spliced"] = counts(seed=5)
    adata.var["gene_ids"] = [f"e{i}" for i in range(5)]
    adata.write_h5ad(tmp_path / "a.h5ad")
    (tmp_path / "copy.h5ad").write_bytes((tmp_path / "a.h5ad").read_bytes())
    atlas = create_or_open_atlas(tmp_path / "a", obs_schemas={"cells": None, "more": None})
    for source, copy in ((tmp_path / "a.h5ad", tmp_path / "copy.h5ad"), (adata, adata.copy())):
        # The object holds the cells of the file, which is accepted when it is said.
        assert atlas.add_from_anndata(source, obs_table="cells", accept_duplicates=True) == 12
        before = atlas.catalog.obs("cells").count_rows()
        with pytest.raises(
            AlreadyIngestedError, match=r"is in the atlas already as dataset '.*nothing was added"
        ):
            atlas.add_from_anndata(copy, obs_table="cells")
        assert atlas.add_from_anndata(copy, obs_table="cells", exist_ok=True) == 0
        for change, message in (
            ({"zarr_layer": "tpm"}, "zarr_layer was 'counts', is 'tpm'"),
            ({"codec": "zstd"}, "codec was 'hbx_gpu.rowpack', is 'zstd'"),
            ({"feature_id_column": "gene_ids"}, "feature_id_column was 'index', is 'gene_ids'"),
            ({"obs_table": "more"}, "another obs table than 'more'"),
        ):
            with pytest.raises(AlreadyIngestedError, match=f"ingested differently: .*{message}"):
                atlas.add_from_anndata(copy, **{"obs_table": "cells", "exist_ok": True, **change})
        assert atlas.catalog.obs("cells").count_rows() == before
    # A file is known as a whole, an AnnData in memory by the matrix that is read.
    with pytest.raises(AlreadyIngestedError, match="source_matrix was 'X', is 'spliced'"):
        atlas.add_from_h5ad(tmp_path / "a.h5ad", layer="spliced", obs_table="cells")


# Everything else that is refused


@pytest.mark.parametrize("shape", [(0, 3), (3, 0)])
def test_nothing_to_ingest(tmp_path: Path, shape: tuple[int, int]) -> None:
    atlas = create_or_open_atlas(tmp_path / "a")
    with pytest.raises(InvalidDataError, match=r"has no (cells|features) .*nothing to ingest"):
        atlas.add_from_anndata(make(sp.csr_matrix(shape, dtype=np.float32)))


class Mixed(HoxBaseSchema):
    rna: SparseZarrPointer | None = PointerField.declare(feature_space="gene_expression")
    nuclear: SparseZarrPointer | None = PointerField.declare(feature_space="gene_expression")
    adt: DenseZarrPointer | None = PointerField.declare(feature_space="protein_abundance")
    crop: DiscreteSpatialPointer | None = PointerField.declare(feature_space="discrete_image")


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"layer": "velocity"}, InvalidDataError, r"no matrix 'velocity'; it holds \['X'\]"),
        (
            {"zarr_layer": "raw", "field_name": "rna"},
            UnknownNameError,
            r"no layer 'raw'; it has \['corrected_counts', 'counts', 'log",
        ),
        (
            {"field_name": "rma"},
            UnknownNameError,
            r"no pointer column 'rma'; it has \['adt', 'crop', 'nuclear', 'rna'\]",
        ),
        (
            {},
            UnknownNameError,
            r"2 pointer columns of feature space 'gene_expression' \(\['rna', 'nuclear'\]\)",
        ),
        (
            {"field_name": "rna", "feature_space": "protein_abundance"},
            UnknownNameError,
            "is of feature space",
        ),
        ({"field_name": "adt", "zarr_layer": "tpm"}, UnknownNameError, r"no layer 'tpm'; it has \['clr_norm"),
        ({"field_name": "crop"}, AtlasError, "'discrete_image', which holds images, no cells x features"),
        ({"obs_table": "spots"}, UnknownNameError, r"no obs table 'spots'.*\['cells'\]"),
        ({"field_name": "rna", "codec": "lzma"}, ValueError, "unknown codec 'lzma'"),
        (
            {"field_name": "rna", "chunk_shape": 10, "shard_shape": 25},
            ValueError,
            "must be a multiple of chunk shape 10",
        ),
    ],
)
def test_options_are_checked(tmp_path: Path, options: Any, error: type[Exception], message: str) -> None:
    atlas = create_or_open_atlas(tmp_path / "a", {"cells": Mixed})
    before = contents(tmp_path / "a")
    with pytest.raises(error, match=message):
        atlas.add_from_anndata(
            make(counts()), **({"field_name": "rna"} if "layer" in options else {}), **options
        )
    assert contents(tmp_path / "a") == before


def test_fields_of_one_space_keep_apart(tmp_path: Path) -> None:
    atlas = create_or_open_atlas(tmp_path / "a", {"cells": Mixed})
    atlas.add_from_anndata(make(counts()), field_name="rna")
    atlas.add_from_anndata(make(counts(seed=1), 1), field_name="nuclear")
    query = published(atlas).query()
    assert (
        query.to_cell_dataset(field_name="rna").n_cells
        == query.to_cell_dataset(field_name="nuclear").n_cells
        == 12
    )


def test_shapes_that_contradict(tmp_path: Path) -> None:
    import h5py

    make(counts()).write_h5ad(tmp_path / "bad.h5ad")
    with h5py.File(tmp_path / "bad.h5ad", "r+") as file:
        file["X"].attrs["shape"] = (12, 6)
    atlas = create_or_open_atlas(tmp_path / "a")
    with pytest.raises(
        InvalidDataError, match=r"bad\.h5ad, matrix 'X' is 12 x 6, but .* 12 rows in obs and 5 in var"
    ):
        atlas.add_from_h5ad(tmp_path / "bad.h5ad")


@pytest.mark.parametrize("optimized", [False, True])
def test_genes_are_stored_in_the_order_of_the_registry(optimized: bool, tmp_path: Path) -> None:
    """Files with the same genes in another order, one of their own, and elements in no order."""
    rng = np.random.default_rng(0)
    atlas = create_or_open_atlas(tmp_path / "atlas")
    names = [f"g{i}" for i in range(30)]
    wanted = []
    for number, genes in enumerate((names, [*rng.permutation(names)[:20], "own"], names[::-1])):
        adata = make(counts(12, len(genes), number), number, list(genes))
        wanted.append(adata.to_df())
        for a, b in itertools.pairwise(adata.X.indptr if number else [0]):
            order = rng.permutation(b - a)
            adata.X.data[a:b], adata.X.indices[a:b] = adata.X.data[a:b][order], adata.X.indices[a:b][order]
        add_from_anndata(atlas, adata)
        if optimized:
            atlas.optimize()
    query = published(atlas).query()
    dataset = query.to_cell_dataset()
    assert [bool((np.diff(source.remap) > 0).all()) for source in dataset.sources] == [True] * 3
    batch: Any = dataset[np.arange(36)]
    assert all((np.diff(batch.indices[a:b]) > 0).all() for a, b in itertools.pairwise(batch.offsets))
    found = query.to_anndata()
    expected = pd.concat(wanted).fillna(0)
    rows = found.obs["obs_name"].tolist()
    np.testing.assert_array_equal(found.X.toarray(), expected.loc[rows, found.var_names.tolist()].to_numpy())
