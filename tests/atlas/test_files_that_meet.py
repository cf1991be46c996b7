"""Files of one atlas that disagree: about genes, about obs columns, about being the same cells."""

from __future__ import annotations

import itertools
import logging
from pathlib import Path
from typing import Any

import anndata
import numpy as np
import pandas as pd
import pytest
import scipy.sparse as sp

from hbx_gpu import cli
from hbx_gpu.atlas import RaggedAtlas, create_or_open_atlas
from hbx_gpu.errors import AlreadyIngestedError, HbxError, InvalidDataError

ENSEMBL = np.array([f"ENSG{i:011d}" for i in range(30)])


def make(
    genes: list[str], seed: int = 0, n: int = 6, var: dict[str, Any] | None = None, **obs: Any
) -> anndata.AnnData:
    rng = np.random.default_rng(seed)
    x = sp.csr_matrix(rng.poisson(1.5, (n, len(genes))).astype(np.float32))
    index = [f"s{seed}c{i}" for i in range(n)]
    return anndata.AnnData(x, obs=pd.DataFrame(obs, index=index), var=pd.DataFrame(var or {}, index=genes))


def published(atlas: RaggedAtlas) -> RaggedAtlas:
    atlas.optimize()
    atlas.snapshot()
    return RaggedAtlas.checkout_latest(atlas.path)


def frame_of(atlas: RaggedAtlas) -> pd.DataFrame:
    return published(atlas).query().to_pandas()


def run(*args: Any) -> int:
    return cli.main([str(arg) for arg in args])


# Which gene is which


def test_files_with_positions_as_names_meet_by_their_ids(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    genes = ([0, 3, 5, 8], [1, 3, 8, 9, 12])
    files = []
    for seed, chosen in enumerate(genes):
        ids = {"feature_id": ENSEMBL[chosen], "feature_name": [f"SYM{g}" for g in chosen]}
        data = make([str(i) for i in range(len(chosen))], seed, var=ids)
        files.append((tmp_path / f"{seed}.h5ad", data))
        data.write_h5ad(files[-1][0])
    assert run("ingest", *(path for path, _ in files), "--atlas", tmp_path / "a") == 0
    said = capsys.readouterr().out
    assert "features by var['feature_id'] (ids of a database)" in said
    assert "matrix X: counts" in said
    whole = RaggedAtlas.checkout_latest(tmp_path / "a").query().to_anndata()
    assert sorted(whole.var_names) == sorted(ENSEMBL[sorted({*genes[0], *genes[1]})])
    for _, data in files:
        rows = whole.obs["obs_name"].isin(data.obs_names)
        part = whole[rows.to_numpy(), list(data.var["feature_id"])].X
        assert (part.astype(np.float32) != data.X).nnz == 0
    assert run("info", tmp_path / "a") == 0
    assert "feature_id" in capsys.readouterr().out


def test_all_files_are_looked_at_before_the_first_is_added(tmp_path: Path) -> None:
    # Alone, the first file would be known by its ids; the second one has only names.
    names = ["A", "B", "C"]
    make(names, 0, var={"gene_ids": ENSEMBL[:3]}).write_h5ad(tmp_path / "0.h5ad")
    make(names, 1).write_h5ad(tmp_path / "1.h5ad")
    assert run("ingest", tmp_path / "0.h5ad", tmp_path / "1.h5ad", "--atlas", tmp_path / "a") == 0
    assert sorted(RaggedAtlas.checkout_latest(tmp_path / "a").query().to_anndata().var_names) == names


@pytest.mark.parametrize(
    ("genes", "var", "remedy"),
    [
        (["X1", "X2", "X3", "X4"], {}, "none of its 4 features"),
        ([f"{uid}.2" for uid in ENSEMBL[:4]], {}, "strip_versions=True"),
        ([uid.lower() for uid in ENSEMBL[:4]], {}, "upper and lower case"),
    ],
)
def test_few_shared_features_are_said_and_can_be_refused(
    tmp_path: Path, genes: list[str], var: dict[str, Any], remedy: str, caplog: pytest.LogCaptureFixture
) -> None:
    atlas = create_or_open_atlas(tmp_path / "a")
    atlas.add_from_anndata(make(list(ENSEMBL[:6])))
    other = make(genes, 1, var=var)
    with pytest.raises(InvalidDataError, match=r"require_shared_genes=0\.5") as caught:
        atlas.add_from_anndata(other, require_shared_genes=0.5)
    assert remedy in str(caught.value)
    with caplog.at_level(logging.WARNING):
        atlas.add_from_anndata(other)
    assert remedy in caplog.text


def test_versions_are_dropped_on_request(tmp_path: Path) -> None:
    atlas = create_or_open_atlas(tmp_path / "a")
    atlas.add_from_anndata(make(list(ENSEMBL[:4])))
    atlas.add_from_anndata(make([f"{uid}.7" for uid in ENSEMBL[:4]], 1), strip_versions=True)
    assert len(published(atlas).query().to_anndata().var_names) == 4
    assert published(atlas).list_datasets()["feature_id_versions"].tolist() == ["", "stripped"]


@pytest.mark.filterwarnings("ignore:Variable names are not unique:UserWarning")
def test_repeated_names_are_numbered_on_request_and_then_by_default(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The advice of the refusal, followed; from a file, and from an archive made of it."""
    files = [make(["a", "b", "a"], 1), make(["c", "a", "b", "b"], 2)]
    for i, data in enumerate(files):
        data.write_h5ad(tmp_path / f"{i}.h5ad")
    assert run("ingest", tmp_path / "0.h5ad", "--atlas", tmp_path / "a") == 1
    advice = "--feature-id-column unique_names"
    assert advice in capsys.readouterr().err
    assert run("ingest", tmp_path / "0.h5ad", "--atlas", tmp_path / "a", *advice.split()) == 0
    assert run("ingest", tmp_path / "1.h5ad", "--atlas", tmp_path / "a") == 0
    assert "repeated names numbered (as in the atlas)" in capsys.readouterr().out
    adata = RaggedAtlas.checkout_latest(tmp_path / "a").query().to_anndata()
    for data in files:
        data.var_names_make_unique()
        mine = adata[adata.obs["obs_name"].isin(data.obs_names), data.var_names]
        assert np.array_equal(mine.X.toarray(), data.X.toarray())
    assert adata.var.loc["a-1", "feature_name"] == "a"

    assert run("convert", tmp_path / "1.h5ad", tmp_path / "s") == 0
    assert run("convert", tmp_path / "s", tmp_path / "b") == 1
    assert advice in capsys.readouterr().err
    assert run("convert", tmp_path / "s", tmp_path / "b", *advice.split()) == 0
    again = RaggedAtlas.checkout_latest(tmp_path / "b").query().to_anndata()
    assert np.array_equal(again[:, files[1].var_names].X.toarray(), files[1].X.toarray())


def test_columns_of_var_that_nobody_stores_cannot_stop_an_ingest(tmp_path: Path) -> None:
    atlas = create_or_open_atlas(tmp_path / "a")
    atlas.add_from_anndata(make(["A", "B"], 0, var={"hv": [True, False], "length": [1, 2]}))
    odd: dict[str, list[Any]] = {"hv": ["yes", "no"], "length": [1 + 2j, 0], "mixed": [{"a": 1}, {"b": 2}]}
    atlas.add_from_anndata(make(["A", "B"], 1, var=odd))
    # Of a new gene they are stored as far as they can be.
    atlas.add_from_anndata(make(["A", "B", "C"], 2, var={k: [*v, v[0]] for k, v in odd.items()}))
    registry = published(atlas).feature_registry("gene_expression").set_index("uid")
    assert registry.loc["C", "hv"] == "yes"
    assert registry.loc["A", "hv"] == "True"
    assert "mixed" not in registry


# Obs columns

KINDS: dict[str, Any] = {
    "int": [1, 2, 3, 2**62, 5, 6],
    "small": [1, 2, 3, 4, 5, 6],
    "gaps": pd.array([1, None, 3, 4, 5, 6], "Int64"),
    "whole": [1.0, np.nan, 3.0, 4.0, 5.0, 6.0],
    "float": [0.5, 1.0, np.nan, 1e-7, 2.0, 1e20],
    "bool": [True, False, True, True, False, False],
    "maybe": pd.array([True, None, False, True, False, None], "boolean"),
    "text": ["a", "b", "1", "True", "0.5", ""],
    "category": pd.Categorical(["a", None, "b", "a", "b", "a"]),
    "time": pd.to_datetime(
        ["2024-01-02", None, "2024-01-02 03:04:05.5", *["2020-02-29"] * 3], format="ISO8601"
    ),
    "empty": [np.nan] * 6,
    "none": [None] * 6,
}
LOSES = {frozenset(("int", "float"))}


def plain(values: Any) -> list[Any]:
    """Values as Python has them, None where they are missing."""
    return [None if missing else value for value, missing in zip(values, pd.isna(values), strict=True)]


def same(found: Any, expected: Any) -> bool:
    if expected is None or found is None or pd.isna(found):
        return expected is None and (found is None or pd.isna(found))
    if isinstance(found, str) and not isinstance(expected, str):
        if isinstance(expected, pd.Timestamp):
            result: bool = pd.Timestamp(found) == expected
            return result
        kind = type(expected)
        return found == str(expected) if isinstance(expected, bool | np.bool_) else kind(found) == expected
    return bool(found == expected)


def test_every_pair_of_types_is_joined_without_loss_or_refused(tmp_path: Path) -> None:
    """One atlas for the first file of each kind, columns named after the pair; 132 ordered pairs."""
    atlas = create_or_open_atlas(tmp_path / "a")
    pairs = list(itertools.permutations(KINDS, 2))
    first = {f"{a}_{b}": KINDS[a] for a, b in pairs}
    atlas.add_from_anndata(make(["A"], 0, **first))
    refused = set()
    second: dict[str, Any] = {}
    for a, b in pairs:
        if frozenset((a, b)) in LOSES:
            refused.add((a, b))
            with pytest.raises(InvalidDataError, match=r"too large to be exact.*obs_types="):
                atlas.add_from_anndata(make(["A"], 1, **{f"{a}_{b}": KINDS[b]}))
            second[f"{a}_{b}"] = [str(v) for v in KINDS[b]]
        else:
            second[f"{a}_{b}"] = KINDS[b]
    assert len(refused) == 2
    atlas.add_from_anndata(make(["A"], 1, **second))
    frame = frame_of(atlas).set_index("obs_name")
    for a, b in pairs:
        if (a, b) in refused:
            continue
        name = f"{a}_{b}"
        expected = [*plain(KINDS[a]), *plain(KINDS[b])]
        if all(value is None for value in expected):
            continue
        found = frame[name].tolist()
        assert all(same(x, y) for x, y in zip(found, expected, strict=True)), (name, found, expected)


def test_integers_with_gaps_are_exact_and_of_one_dtype(tmp_path: Path) -> None:
    atlas = create_or_open_atlas(tmp_path / "a")
    numbers = pd.array([2**62 + 1, None, 3, 4, 5, 6], "Int64")
    atlas.add_from_anndata(make(["A"], 0, nr=numbers, donor=["x"] * 3 + ["y"] * 3))
    snapshot = published(atlas)
    for chosen in (snapshot.query(), snapshot.query().where("donor = 'y'")):
        assert chosen.to_pandas()["nr"].dtype == "Int64"
        assert chosen.to_anndata().obs["nr"].dtype == "Int64"
        column = chosen.to_cell_dataset("gene_expression", metadata_columns=["nr"]).columns["nr"]
        assert column.dtype == np.int64
    query = snapshot.query()
    assert query.to_pandas()["nr"].iloc[0] == 2**62 + 1
    column = query.to_cell_dataset("gene_expression", metadata_columns=["nr"]).columns["nr"]
    assert column.tolist()[:3] == [2**62 + 1, np.iinfo(np.int64).min, 3]


@pytest.mark.parametrize("order", [("percent.mt", "percent_mt"), ("percent_mt", "percent.mt")])
def test_renamed_columns_never_meet_by_accident(tmp_path: Path, order: tuple[str, str]) -> None:
    atlas = create_or_open_atlas(tmp_path / "a")
    for seed, name in enumerate((*order, *order)):
        column: dict[str, Any] = {name: [float(seed)]}
        atlas.add_from_anndata(make(["A"], seed, n=1, **column))
    frame = frame_of(atlas).set_index("obs_name")
    first, second = ("percent_mt", "percent_mt_")
    assert frame[first].dropna().to_dict() == {"s0c0": 0.0, "s2c0": 2.0}
    assert frame[second].dropna().to_dict() == {"s1c0": 1.0, "s3c0": 3.0}


def test_obs_columns_can_be_changed_on_the_way(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    make(["A"], 0, nr=[2**60] * 6, odd=["1"] * 6, old=["x"] * 6).write_h5ad(tmp_path / "0.h5ad")
    make(["A"], 1, nr=[0.5] * 6).write_h5ad(tmp_path / "1.h5ad")
    common = [tmp_path / "0.h5ad", tmp_path / "1.h5ad", "--atlas", tmp_path / "a"]
    assert run("ingest", *common, "--drop-obs", "nothing") == 1
    assert "--drop-obs names ['nothing']" in capsys.readouterr().err
    assert not (tmp_path / "a").exists()
    changes = ["--obs-type", "nr=str", "--drop-obs", "odd", "--rename-obs", "old=new"]
    assert run("ingest", *common, *changes) == 0
    frame = RaggedAtlas.checkout_latest(tmp_path / "a").query().to_pandas()
    assert sorted(frame["nr"].unique()) == ["0.5", str(2**60)]
    assert frame["new"].dropna().tolist() == ["x"] * 6
    assert not {"odd", "old"} & set(frame.columns)


@pytest.mark.parametrize(
    ("values", "message"),
    [([1 + 2j] * 6, "complex numbers cannot be stored"), (np.array([2**63] * 6, np.uint64), "64-bit signed")],
)
def test_what_no_column_holds_gets_the_right_words(tmp_path: Path, values: Any, message: str) -> None:
    atlas = create_or_open_atlas(tmp_path / "a")
    with pytest.raises(InvalidDataError, match=f"{message}.*drop_obs="):
        atlas.add_from_anndata(make(["A"], 0, odd=values))
    atlas.add_from_anndata(make(["A"], 0, odd=values), obs_types={"odd": "str"})
    assert frame_of(atlas)["odd"].tolist() == [str(v) for v in values]


def test_backed_data_are_stored_as_they_are_in_memory(tmp_path: Path) -> None:
    make(["A", "B"], 0, kind=["?"] * 6).write_h5ad(tmp_path / "f.h5ad")
    backed = anndata.read_h5ad(tmp_path / "f.h5ad", backed="r")
    backed.obs["kind"] = ["T", "B"] * 3
    atlas = create_or_open_atlas(tmp_path / "a")
    atlas.add_from_anndata(backed)
    assert frame_of(atlas)["kind"].tolist() == ["T", "B"] * 3
    with pytest.raises(AlreadyIngestedError):  # other data than the file's, but the same cells
        atlas.add_from_anndata(tmp_path / "f.h5ad")


# The same cells, and ways back


def test_the_same_cells_in_another_file_are_refused_unless_accepted(tmp_path: Path) -> None:
    atlas = create_or_open_atlas(tmp_path / "a")
    data = make(["A", "B", "C"], 0, n=40)
    atlas.add_from_anndata(data)
    again = data[5:].copy()
    with pytest.raises(AlreadyIngestedError, match=r"35 of its 35 cells.*accept_duplicates=True"):
        atlas.add_from_anndata(again)
    named_alike = make(["A", "B", "C"], 0, n=40)
    named_alike.X = make(["A", "B", "C"], 7, n=40).X  # the same names, other counts: other cells
    atlas.add_from_anndata(named_alike)
    atlas.add_from_anndata(again, accept_duplicates=True)
    assert published(atlas).query().count() == 115


def test_a_corrected_file_without_replace_is_said(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, capsys: pytest.CaptureFixture[str]
) -> None:
    """The same names of cells in a file of the same name, and other counts."""
    data, path = make(["A", "B", "C"], 0, n=20), tmp_path / "f.h5ad"
    data.write_h5ad(path)
    assert run("ingest", path, "--atlas", tmp_path / "a") == 0
    assert "same name" not in caplog.text
    data.X = data.X * 2
    data.write_h5ad(path)
    assert run("ingest", path, "--atlas", tmp_path / "a") == 0
    said = next(r.getMessage() for r in caplog.records if "from a file of the same name" in r.getMessage())
    uid = said.rsplit(" ", 1)[1]
    assert run("remove", tmp_path / "a", uid) == 0
    adata = RaggedAtlas.checkout_latest(tmp_path / "a").query().to_anndata()
    assert np.array_equal(adata.X.toarray(), data.X.toarray())
    capsys.readouterr()
    assert run("ingest", f"{path}:raw", "--atlas", tmp_path / "b") == 1
    assert "has no matrix 'raw'; it holds ['X']" in capsys.readouterr().err


def test_a_wrong_choice_is_replaced_and_old_snapshots_keep_what_they_had(tmp_path: Path) -> None:
    path, atlas = tmp_path / "f.h5ad", tmp_path / "a"
    data = make(["A", "B", "C"], 0, var={"gene_ids": ENSEMBL[:3]})
    data.write_h5ad(path)
    assert run("ingest", path, "--atlas", atlas, "--feature-id-column", "index") == 0
    assert run("ingest", path, "--atlas", atlas, "--feature-id-column", "gene_ids") == 1
    assert run("ingest", path, "--atlas", atlas, "--feature-id-column", "gene_ids", "--replace") == 0
    old, new = (RaggedAtlas.checkout(atlas, version).query().to_anndata() for version in (0, 1))
    assert (sorted(old.var_names), sorted(new.var_names)) == (["A", "B", "C"], sorted(ENSEMBL[:3]))
    assert old.X.sum() == new.X.sum() == data.X.sum()
    # A corrected file of the same name.
    data.obs["kind"] = "T"
    data.write_h5ad(path)
    assert run("ingest", path, "--atlas", atlas, "--replace") == 0
    newest = RaggedAtlas.checkout_latest(atlas)
    assert newest.query().to_pandas()["kind"].tolist() == ["T"] * 6
    assert len(newest.list_datasets()) == 1


def test_a_dataset_is_removed_and_can_come_back(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    atlas = tmp_path / "a"
    for seed, genes in enumerate((["A", "B"], ["B", "C"])):
        make(genes, seed).write_h5ad(tmp_path / f"{seed}.h5ad")
    files = [tmp_path / "0.h5ad", tmp_path / "1.h5ad"]
    assert run("ingest", *files, "--atlas", atlas) == 0
    assert run("remove", atlas, "nothing.h5ad") == 1
    assert "0.h5ad" in capsys.readouterr().err
    assert run("remove", atlas, "0.h5ad") == 0
    assert "6 cells and 1 features removed; snapshot 1" in capsys.readouterr().out
    assert RaggedAtlas.checkout_latest(atlas).query().to_anndata().shape == (6, 2)
    assert RaggedAtlas.checkout(atlas, 0).query().to_anndata().shape == (12, 3)
    assert run("ingest", *files, "--atlas", atlas) == 0
    back = RaggedAtlas.checkout_latest(atlas).query()
    assert back.to_anndata().shape == (12, 3)
    first = anndata.read_h5ad(files[0])
    found = back.to_anndata()
    rows = found.obs["obs_name"].isin(first.obs_names).to_numpy()
    assert (found[rows, list(first.var_names)].X.astype(np.float32) != first.X).nnz == 0


def test_addresses_without_credentials_are_refused_in_words(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("obstore", reason="needs obstore, of the extra hbx_gpu[cloud]")
    monkeypatch.chdir(tmp_path)
    make(["A"]).write_h5ad("f.h5ad")
    for args in (
        ["ingest", "f.h5ad", "--atlas", "s3://bucket/a"],
        ["repack", "s3://b/a", "--codec", "zstd"],
    ):
        assert run(*args) == 1
        assert "there are no credentials; pass storage options" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        run("ingest", "s3://bucket/f.h5ad", "--atlas", "a")
    assert "copy the data to a local disk first" in capsys.readouterr().err
    for path in ("s3://bucket/a", Path("s3://bucket/a")):
        with pytest.raises(HbxError, match="there are no credentials"):
            create_or_open_atlas(path)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["f.h5ad"]


def test_peaks_of_a_multiome_are_a_space_of_their_own(tmp_path: Path) -> None:
    peaks = make([f"chr1:{i}-{i + 500}" for i in range(0, 5000, 1000)], 0)
    peaks.write_h5ad(tmp_path / "peaks.h5ad")
    given = f"atac={tmp_path / 'peaks.h5ad'}"
    assert run("ingest", "--modality", given, "--atlas", tmp_path / "a") == 0
    found = RaggedAtlas.checkout_latest(tmp_path / "a").query().to_anndata()
    assert (found[:, list(peaks.var_names)].X.astype(np.float32) != peaks.X).nnz == 0
    mudata = pytest.importorskip("mudata")
    rna = make(["A", "B"], 0)
    both = mudata.MuData({"rna": rna, "atac": peaks})
    atlas = create_or_open_atlas(tmp_path / "b")
    atlas.add_multimodal(both)
    assert set(published(atlas).pointer_fields) == {"gene_expression", "chromatin_peaks"}
