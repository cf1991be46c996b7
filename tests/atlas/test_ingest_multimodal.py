"""Several modalities in one ingest: joined by cell id, read back array by array, all of it or nothing."""

from __future__ import annotations

import contextlib
from pathlib import Path
from typing import Any

import anndata
import h5py
import numpy as np
import pandas as pd
import pytest
import scipy.sparse as sp
import zarr
from hypothesis import given, settings
from hypothesis import strategies as st

from hbx_gpu._h5ad import matrix as matrix_module
from hbx_gpu.atlas import (
    HoxBaseSchema,
    PointerField,
    RaggedAtlas,
    SparseZarrPointer,
    add_multimodal,
    create_or_open_atlas,
)
from hbx_gpu.atlas._ingest.commit import IngestReport
from hbx_gpu.atlas._writing.arrays import codec_names
from hbx_gpu.errors import AlreadyIngestedError, AtlasError, InvalidDataError, UnknownNameError

mudata = pytest.importorskip("mudata")


def counts(n: int, m: int, seed: int) -> sp.csr_matrix:
    found = sp.random(n, m, 0.5, "csr", random_state=np.random.default_rng(seed))
    found.data = np.ceil(found.data * 100)
    found.sort_indices()
    return found.astype(np.float32)


def make(x: Any, ids: list[str], prefix: str = "g", **obs: Any) -> anndata.AnnData:
    names = [f"{prefix}{i}" for i in range(x.shape[1])]
    return anndata.AnnData(x, obs=pd.DataFrame(obs, index=ids), var=pd.DataFrame(index=names))


def rna(ids: str = "abcdef", seed: int = 0, **obs: Any) -> anndata.AnnData:
    return make(counts(len(ids), 5, seed), list(ids), **obs)


def protein(ids: str = "fbdxa", seed: int = 1, **obs: Any) -> anndata.AnnData:
    x = np.random.default_rng(seed).integers(0, 99, (len(ids), 3)).astype(np.float32)
    return make(x, list(ids), "p", **obs)


def stored(atlas: RaggedAtlas) -> pd.DataFrame:
    return atlas.catalog.obs("cells").to_pandas().set_index("obs_name")


def state(root: Path) -> dict[str, Any]:
    """Everything a failed ingest might leave behind."""
    atlas = RaggedAtlas.open(root)
    files = {str(p.relative_to(root)) for p in root.rglob("*") if p.is_file() and "lance_db" not in p.parts}
    return {
        "files": files - {".hbx_gpu/lock"},
        "config": (root / "hbx_gpu.json").read_text(),
        "tables": sorted(p.name for p in (root / "lance_db").iterdir()),
        "obs": atlas.catalog.obs("cells").to_arrow().to_pylist(),
        "schema": atlas.catalog.obs("cells").schema,
        "datasets": atlas.catalog.dataset_rows(),
        "registry": atlas.catalog.registry("gene_expression").to_arrow().to_pylist(),
        "layouts": atlas.catalog.layouts().to_arrow().to_pylist(),
    }


def check_arrays(atlas: RaggedAtlas, first: anndata.AnnData, second: anndata.AnnData) -> None:
    """Every cell's pointers lead to its rows of the two matrices."""
    store: Any = zarr.open_group(atlas.path / "zarr_store", mode="r")
    for name, row in stored(atlas).iterrows():
        pointer = row["gene_expression"]
        if name in first.obs_names:
            group: Any = store[pointer["zarr_group"]]
            part: Any = slice(int(pointer["start"]), int(pointer["end"]))
            dense = np.zeros(first.n_vars)
            dense[group["csr/indices"][part]] = group["csr/layers/counts"][part]
            expected = first[name].X
            expected = expected.toarray() if sp.issparse(expected) else np.asarray(expected)
            np.testing.assert_array_equal(dense, expected.reshape(-1))
        else:
            assert pointer is None
        pointer = row["protein_abundance"]
        if name in second.obs_names:
            found = store[pointer["zarr_group"]]["layers/counts"][int(pointer["position"])]
            expected = second[name].X
            expected = expected.toarray() if sp.issparse(expected) else np.asarray(expected)
            np.testing.assert_array_equal(found, expected.reshape(-1))
        else:
            assert pointer is None


# Joining


@pytest.mark.parametrize(
    ("join", "rows", "report"),
    [
        ("outer", "abcdefx", {"n_cells": 7, "n_complete": 4, "left": {}}),
        (
            "inner",
            "abdf",
            {"n_cells": 4, "n_complete": 4, "left": {"gene_expression": 2, "protein_abundance": 1}},
        ),
    ],
)
@pytest.mark.parametrize("as_files", [False, True])
def test_joins(tmp_path: Path, join: str, rows: str, report: dict[str, Any], as_files: bool) -> None:
    first, second = rna(), protein()
    data: dict[str, Any] = {"rna": first, "protein": second}
    if as_files:
        for name, adata in list(data.items()):
            adata.write_h5ad(tmp_path / f"{name}.h5ad")
            data[name] = tmp_path / f"{name}.h5ad"
    atlas = create_or_open_atlas(tmp_path / "a")
    found = add_multimodal(atlas, data, join=join)  # type: ignore[arg-type]
    assert (found.n_cells, found.n_complete) == (report["n_cells"], report["n_complete"])
    assert {name: n for name, n in found.n_left_out.items() if n} == report["left"]
    table = stored(atlas)
    assert list(table.index) == list(rows)
    assert set(table["dataset_uid"]) == {found.dataset_uid}
    check_arrays(atlas, first, second)
    groups = {row["zarr_group"] for row in atlas.catalog.dataset_rows()}
    assert groups == {f"{found.dataset_uid}/gene_expression", f"{found.dataset_uid}/protein_abundance"}
    # Cells that are left out are not stored either.
    protein_group: Any = zarr.open_group(atlas.path / "zarr_store", mode="r")[
        f"{found.dataset_uid}/protein_abundance"
    ]
    assert protein_group["layers/counts"].shape == (4 if join == "inner" else 5, 3)
    atlas.optimize()
    atlas.snapshot()
    dataset = RaggedAtlas.checkout_latest(tmp_path / "a").query().to_cell_dataset("gene_expression")
    assert dataset.n_cells == (6 if join == "outer" else 4)


@settings(max_examples=15, deadline=None)
@given(
    ids=st.lists(st.lists(st.sampled_from("abcdefghij"), unique=True, min_size=1), min_size=2, max_size=2),
    join=st.sampled_from(["inner", "outer", "exact"]),
    seed=st.integers(0, 99),
)
def test_any_overlap(
    tmp_path_factory: pytest.TempPathFactory, ids: list[list[str]], join: str, seed: int
) -> None:
    first, second = rna("".join(ids[0]), seed), protein("".join(ids[1]), seed)
    atlas = create_or_open_atlas(tmp_path_factory.mktemp("join") / "a")
    both = set(ids[0]) & set(ids[1])
    if (join == "exact" and set(ids[0]) != set(ids[1])) or (join == "inner" and not both):
        with pytest.raises(InvalidDataError):
            atlas.add_multimodal({"rna": first, "protein": second}, join=join)
        return
    atlas.add_multimodal({"rna": first, "protein": second}, join=join, chunk_shape=8, shard_shape=16)
    expected = both if join == "inner" else set(ids[0]) | set(ids[1])
    assert sorted(stored(atlas).index) == sorted(expected)
    check_arrays(atlas, first, second)
    atlas.optimize()
    assert atlas.snapshot() == 0


def test_exact_names_what_has_no_partner(tmp_path: Path) -> None:
    atlas = create_or_open_atlas(tmp_path / "a")
    before = state(tmp_path / "a")
    message = r"7 cell id\(s\) of 'rna' .* are not in 'protein' .*, first 5: \['b', 'c', 'd', 'e', 'f'\]"
    with pytest.raises(InvalidDataError, match=message):
        atlas.add_multimodal({"rna": rna("abcdefgh"), "protein": protein("a")}, join="exact")
    with pytest.raises(ValueError, match=r"unknown join 'left'; choose one of \['inner', 'outer', 'exact'\]"):
        atlas.add_multimodal({"rna": rna()}, join="left")
    assert state(tmp_path / "a") == before


def test_repeated_ids_are_named(tmp_path: Path) -> None:
    atlas = create_or_open_atlas(tmp_path / "a")
    with pytest.raises(InvalidDataError, match=r"'protein'.*1 cell id\(s\) occur more than once, .*\['b'\]"):
        atlas.add_multimodal({"rna": rna(), "protein": protein("abb")})


def test_ids_that_never_match(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    atlas = create_or_open_atlas(tmp_path / "a")
    with pytest.raises(
        InvalidDataError, match=r"no cell id is in all files: 'rna' has \['a', 'b'\]; 'protein'"
    ):
        atlas.add_multimodal({"rna": rna("abc"), "protein": protein("xyz")}, join="inner")
    assert atlas.add_multimodal({"rna": rna("abc"), "protein": protein("xyz")}).n_complete == 0
    assert "are their ids alike?" in caplog.text


# Columns of obs


def test_obs_columns_merge(tmp_path: Path) -> None:
    first = rna("abc", kind=["k", "l", None], n=[1, 2, 3], own=[True, False, True])
    second = protein("cax", kind=["m", "k", "x"], n=[3.0, np.nan, 0.5], other=[7, 8, 9])
    atlas = create_or_open_atlas(tmp_path / "a")
    atlas.add_multimodal({"rna": first, "protein": second})
    rows = atlas.catalog.obs("cells").to_arrow().to_pylist()
    found = {row["obs_name"]: (row["kind"], row["n"], row["own"], row["other"]) for row in rows}
    assert found == {
        "a": ("k", 1.0, True, 8),
        "b": ("l", 2.0, False, None),
        "c": ("m", 3.0, True, 7),
        "x": ("x", 0.5, None, 9),
    }


def test_differing_obs_columns(tmp_path: Path) -> None:
    first, second = rna("abc", n=[1, 2, 3], t=["1", "2", "3"]), protein("cbx", n=[3, 5, 9])
    atlas = create_or_open_atlas(tmp_path / "a")
    before = state(tmp_path / "a")
    message = (
        r"column 'n' differs between 'rna' and 'protein' for 1 cell\(s\), first 'b': 2 and 5; .*obs_from="
    )
    with pytest.raises(InvalidDataError, match=message):
        atlas.add_multimodal({"rna": first, "protein": second})
    third = protein("abc", t=[1, 2, 4])  # joined as text, where 1 and "1" are the same
    with pytest.raises(InvalidDataError, match=r"column 't' differs .* first 'c': '3' and '4'"):
        atlas.add_multimodal({"rna": first, "protein": third})
    with pytest.raises(
        UnknownNameError, match=r"obs_from= names \['prot'\], but the modalities are \['rna', 'pr"
    ):
        atlas.add_multimodal({"rna": first, "protein": second}, obs_from="prot")
    assert state(tmp_path / "a") == before
    atlas.add_multimodal({"rna": first, "protein": second}, obs_from="protein")
    assert stored(atlas)["n"].to_dict() == {"a": 1, "b": 5, "c": 3, "x": 9}


# Names, columns and registries


def test_a_new_atlas_has_the_columns_it_was_made_with(tmp_path: Path) -> None:
    fields = {"adt": "protein_abundance", "crop": "discrete_image"}
    atlas = create_or_open_atlas(tmp_path / "a", pointer_fields=fields)
    assert {name: field.feature_space for name, field in atlas.pointer_fields.items()} == fields
    atlas.add_multimodal({"protein": protein()})
    assert set(stored(atlas)["adt"].map(lambda p: p["zarr_group"])) == {
        f"{atlas.catalog.dataset_rows()[0]['dataset_uid']}/adt"
    }
    assert set(atlas.catalog.names.registries) == {"protein_abundance"}


def test_an_atlas_is_extended(tmp_path: Path) -> None:
    atlas = create_or_open_atlas(tmp_path / "a")
    atlas.add_from_anndata(rna("mno"))
    atlas.optimize()
    atlas.snapshot()
    atlas.add_multimodal({"GEX": rna(), "adt": protein()})
    assert atlas.pointer_fields.keys() == {"gene_expression", "protein_abundance"}
    atlas.add_pointer_field("nuclear", "gene_expression")
    atlas.add_pointer_field("nuclear", "gene_expression")
    atlas.add_multimodal({"nuclear": rna("uvw", 7), "rna": rna("uvw", 8)}, join="exact")
    atlas.optimize()
    atlas.snapshot()
    query = RaggedAtlas.checkout_latest(tmp_path / "a").query()
    assert query.to_cell_dataset(field_name="gene_expression").n_cells == 12
    assert query.to_cell_dataset(field_name="nuclear").n_cells == 3
    old = RaggedAtlas.checkout(tmp_path / "a", 0)
    assert old.query().to_cell_dataset("gene_expression").n_cells == 3
    assert set(old.pointer_fields) == {"gene_expression"}


class Own(HoxBaseSchema):
    rna: SparseZarrPointer | None = PointerField.declare(feature_space="gene_expression")


def test_what_cannot_be_extended(tmp_path: Path) -> None:
    atlas = create_or_open_atlas(tmp_path / "a", {"cells": Own})
    with pytest.raises(
        AtlasError, match=r"Own, the class of .*'cells', declares no pointer columns \['protein_ab"
    ):
        atlas.add_multimodal({"rna": rna(), "protein": protein()})
    with pytest.raises(AtlasError, match="'rna' which points into 'gene_expression': a pointer column into"):
        atlas.add_pointer_field("rna", "protein_abundance")
    other = create_or_open_atlas(tmp_path / "b")
    other.add_from_anndata(rna(protein_abundance=list(range(6))))
    with pytest.raises(AtlasError, match="has a column 'protein_abundance' which is int64"):
        other.add_multimodal({"protein": protein()})


@pytest.mark.parametrize(
    ("data", "error", "message"),
    [
        (
            {"velocity": rna()},
            UnknownNameError,
            r"unknown modality 'velocity'.*taken with \{name: 'file\.h5mu:modality'\}",
        ),
        (
            {"rna": rna(), "gex": rna("xyz")},
            AtlasError,
            "'rna' and 'gex' both mean pointer column 'gene_express",
        ),
        (
            {"tiles": rna()},
            InvalidDataError,
            r"need a table that maps cells to them: ImageInput\(image, table\)",
        ),
        (
            {"rna": "nothing.h5ad"},
            FileNotFoundError,
            r"expected an \.h5ad file at nothing\.h5ad; it is missing",
        ),
        ({"rna": 3}, TypeError, "expected an AnnData or the path"),
        ({}, TypeError, "expected {modality: data}"),
    ],
)
def test_refused(tmp_path: Path, data: Any, error: type[Exception], message: str) -> None:
    atlas = create_or_open_atlas(tmp_path / "a")
    before = state(tmp_path / "a")
    with pytest.raises(error, match=message):
        atlas.add_multimodal(data)
    assert state(tmp_path / "a") == before


def test_bad_values_leave_no_new_column(tmp_path: Path) -> None:
    """The pointer column and the registry that were made for it are taken back too."""
    atlas = create_or_open_atlas(tmp_path / "a")
    atlas.add_from_anndata(rna("mno"))
    bad = protein()
    bad.X[3, 1] = 2.5
    before = state(tmp_path / "a")
    with pytest.raises(
        InvalidDataError, match=r"row 3 \(cell 'x'\), column 1 \(feature 'p1'\) holds 2\.5; counts"
    ):
        atlas.add_multimodal({"rna": rna(), "protein": bad})
    assert state(tmp_path / "a") == before
    with pytest.raises(UnknownNameError, match=r"no layer 'dsb'; it has \['clr_norm"):
        atlas.add_multimodal({"protein": protein()}, layers={"protein": {"dsb": "X"}})
    assert state(tmp_path / "a") == before
    bad.X[3, 1] = 2
    assert atlas.add_multimodal({"rna": rna(), "protein": bad}).n_cells == 7


# Layers


@settings(max_examples=15, deadline=None)
@given(
    layout=st.sampled_from(["csr", "csc", "dense"]),
    codec=st.sampled_from(codec_names()),
    chunk=st.sampled_from([1, 7, 64, 40_960]),
    n=st.integers(1, 40),
    as_file=st.booleans(),
)
def test_dense_layers_come_back(
    tmp_path_factory: pytest.TempPathFactory, layout: str, codec: str, chunk: int, n: int, as_file: bool
) -> None:
    folder = tmp_path_factory.mktemp("dense")
    adata = make(counts(n, 6, n), [f"c{i}" for i in range(n)], "p")
    whole = adata.X.toarray()
    adata.layers["dsb"] = whole / 3 - 1
    if layout != "csr":
        adata.X = adata.X.tocsc() if layout == "csc" else whole
    if as_file:
        adata.write_h5ad(folder / "p.h5ad")
    atlas = create_or_open_atlas(folder / "a", codec=codec)
    source = folder / "p.h5ad" if as_file else adata
    layers = {"adt": {"counts": "X", "dsb_normalized": "layers/dsb"}}
    with pytest.MonkeyPatch.context() as patch:
        # Several blocks, which end at other rows in each layer.
        patch.setattr(matrix_module, "BLOCK_VALUES", 20)
        report = atlas.add_multimodal(
            {"adt": source}, layers=layers, chunk_shape=chunk, shard_shape=4 * chunk, allow_rounding=True
        )
    group: Any = zarr.open_group(atlas.path / "zarr_store", mode="r")[
        f"{report.dataset_uid}/protein_abundance"
    ]
    np.testing.assert_array_equal(group["layers/counts"][:], whole)
    np.testing.assert_array_equal(group["layers/dsb_normalized"][:], (whole / 3 - 1).astype(np.float32))
    assert group["layers/counts"].dtype == np.uint32
    rows = max(1, chunk // 6)
    assert group["layers/counts"].chunks == (rows, 6)
    assert group["layers/counts"].shards == (max(1, 4 * chunk // 6 // rows) * rows, 6)
    row = atlas.catalog.dataset_rows()[0]
    assert row["zarr_layer"] == "counts,dsb_normalized"
    assert row["codec"] == ("zstd" if "." in codec else codec)


def test_sparse_layers_share_their_structure(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    adata = rna()
    adata.layers["log"] = adata.X.copy()
    adata.layers["log"].data = np.log1p(adata.layers["log"].data)
    adata.layers["other"] = adata.layers["log"].copy()
    adata.layers["other"][3, adata.X.indices[adata.X.indptr[3]]] = 0
    adata.layers["other"].eliminate_zeros()
    monkeypatch.setattr(matrix_module, "BLOCK_VALUES", 4)
    atlas = create_or_open_atlas(tmp_path / "a")
    with pytest.raises(
        InvalidDataError, match=r"'counts' and 'log_normalized' must store .* cell 'd' \(row 3\)"
    ):
        atlas.add_multimodal({"rna": adata}, layers={"rna": {"counts": "X", "log_normalized": "other"}})
    layers = {"rna": {"log_normalized": "log", "counts": "X"}}
    report = atlas.add_multimodal({"rna": adata}, layers=layers)
    group: Any = zarr.open_group(atlas.path / "zarr_store", mode="r")[
        f"{report.dataset_uid}/gene_expression/csr"
    ]
    np.testing.assert_array_equal(group["layers/counts"][:], adata.X.data)
    np.testing.assert_array_equal(group["layers/log_normalized"][:], adata.layers["log"].data)
    np.testing.assert_array_equal(group["indices"][:], adata.X.indices)


def test_raw_cannot_lie_beside_a_layer(tmp_path: Path) -> None:
    adata = protein()
    adata.raw = make(adata.X[:, :2], list("fbdxa"), "p")
    atlas = create_or_open_atlas(tmp_path / "a")
    with pytest.raises(InvalidDataError, match="'X' and 'raw' have different features"):
        atlas.add_multimodal({"protein": adata}, layers={"protein": {"counts": "X", "dsb_normalized": "raw"}})


def test_image_features_take_floats(tmp_path: Path) -> None:
    x = np.random.default_rng(0).random((5, 4), np.float32)
    atlas = create_or_open_atlas(tmp_path / "a")
    report = atlas.add_multimodal({"image_features": make(x, list("abcde"), "f")})
    group: Any = zarr.open_group(atlas.path / "zarr_store", mode="r")[f"{report.dataset_uid}/image_features"]
    np.testing.assert_array_equal(group["layers/ctrl_standardized"][:], x)


def test_one_matrix_of_a_dense_space(tmp_path: Path) -> None:
    atlas = create_or_open_atlas(tmp_path / "a", pointer_fields={"adt": "protein_abundance"})
    adata = protein()
    assert atlas.add_from_anndata(adata, field_name="adt") == 5
    store: Any = zarr.open_group(atlas.path / "zarr_store", mode="r")
    pointers = stored(atlas)["adt"]
    for i, name in enumerate(adata.obs_names):
        found = store[pointers[name]["zarr_group"]]["layers/counts"][int(pointers[name]["position"])]
        np.testing.assert_array_equal(found, adata.X[i])
    # The same data by either way of calling are the same data.
    with pytest.raises(AlreadyIngestedError, match="nothing was added"):
        atlas.add_multimodal({"protein": adata})


# The same data again


def test_the_same_data_are_added_once(tmp_path: Path) -> None:
    atlas = create_or_open_atlas(tmp_path / "a")
    first, second = rna(), protein()
    atlas.add_multimodal({"rna": first, "protein": second})
    before = state(tmp_path / "a")
    with pytest.raises(AlreadyIngestedError, match="nothing was added"):
        atlas.add_multimodal({"protein": second, "rna": first})
    assert atlas.add_multimodal({"rna": first, "protein": second}, exist_ok=True) == IngestReport("", 0)
    with pytest.raises(AlreadyIngestedError, match="modality_join was 'outer', is 'inner'"):
        atlas.add_multimodal({"rna": first, "protein": second}, join="inner", exist_ok=True)
    with pytest.raises(AlreadyIngestedError, match="protein: it was added without this one"):
        atlas.add_multimodal({"rna": first, "protein": protein(seed=5)}, exist_ok=True)
    with pytest.raises(AlreadyIngestedError, match="nothing was added"):
        atlas.add_from_anndata(first)
    assert state(tmp_path / "a") == before


def test_progress_counts_all_modalities(tmp_path: Path) -> None:
    atlas = create_or_open_atlas(tmp_path / "a")
    seen: list[tuple[int, int]] = []
    atlas.add_multimodal({"rna": rna(), "protein": protein()}, progress=lambda *at: seen.append(at))
    assert seen == [(6, 11), (11, 11)]


# MuData


@pytest.fixture
def mdata() -> Any:
    # mudata 0.4 pulls no columns by itself and has no options any more.
    options = getattr(mudata, "set_options", None)
    with options(pull_on_update=False) if options else contextlib.nullcontext():
        made = mudata.MuData({"rna": rna(n=range(6)), "prot": protein(n=[5, 1, 3, 9, 0])})
        made.obs["donor"] = [f"d{i}" for i in range(made.n_obs)]
    return made


@pytest.mark.parametrize("how", ["file", "object", "named", "pulled"])
def test_mudata(tmp_path: Path, mdata: Any, how: str) -> None:
    path = tmp_path / "m.h5mu"
    if how == "pulled":
        mdata.pull_obs()
    mdata.write(path)
    atlas = create_or_open_atlas(tmp_path / "a")
    data = {
        "file": path,
        "pulled": path,
        "object": mdata,
        "named": {"rna": f"{path}:rna", "adt": f"{path}:prot"},
    }
    report = atlas.add_multimodal(data[how])
    assert report.n_cells == 7
    check_arrays(atlas, mdata["rna"], mdata["prot"])
    table = stored(atlas)
    assert table["donor"].to_dict() == mdata.obs["donor"].to_dict()
    assert table["n"].to_dict() == dict(zip("abcdefx", [0, 1, 2, 3, 4, 5, 9], strict=True))
    assert not [name for name in table.columns if ":" in name]
    rows = atlas.catalog.dataset_rows()
    if how != "object":
        assert {row["source_matrix"] for row in rows} == {"mod/rna/X", "mod/prot/X"}
        assert len({row["source_sha256"] for row in rows}) == 1


def test_h5mu_needs_no_mudata(tmp_path: Path, mdata: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    mdata.write(tmp_path / "m.h5mu")
    monkeypatch.setitem(__import__("sys").modules, "mudata", None)
    assert create_or_open_atlas(tmp_path / "a").add_multimodal(tmp_path / "m.h5mu").n_cells == 7


def test_bad_mudata(tmp_path: Path, mdata: Any) -> None:
    path = tmp_path / "m.h5mu"
    mdata.write(path)
    atlas = create_or_open_atlas(tmp_path / "a")
    with pytest.raises(InvalidDataError, match=r"holds several modalities, \['rna', 'prot'\]; name one as"):
        atlas.add_multimodal({"rna": path})
    with pytest.raises(InvalidDataError, match=r"has no modality 'x'; it has \['rna', 'prot'\]"):
        atlas.add_multimodal({"rna": f"{path}:x"})
    with h5py.File(path, "r+") as file:
        file["mod"].move("prot", "velocity")
        file["mod"].attrs["mod-order"] = ["rna", "velocity"]
    with pytest.raises(
        UnknownNameError, match=r"unknown modality .*taken with \{name: 'file\.h5mu:modality'\}"
    ):
        atlas.add_multimodal(path)
    with h5py.File(path, "r+") as file:
        file.attrs["axis"] = 1
    with pytest.raises(InvalidDataError, match="share features, not cells"):
        atlas.add_multimodal(path)
    rna().write_h5ad(tmp_path / "r.h5ad")
    with pytest.raises(
        InvalidDataError, match=r"not a MuData file: expected mod and obs, found \['X', 'layers', 'obs'"
    ):
        atlas.add_multimodal(tmp_path / "r.h5ad")
    path.write_bytes(b"MuData, but no HDF5")
    with pytest.raises(InvalidDataError, match=r"is not an HDF5 file, so not an \.h5mu"):
        atlas.add_multimodal(path)
