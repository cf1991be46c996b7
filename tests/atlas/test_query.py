"""What a query selects: filters, paging, balance, counts, tables, and names that do not exist."""

from __future__ import annotations

import builtins
import json
import pickle
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hbx_gpu.atlas._catalog.snapshot import Snapshot
from hbx_gpu.atlas._query.balance import balanced_rows
from hbx_gpu.atlas._query.query import AtlasQuery
from hbx_gpu.errors import UnknownNameError


@cache
def opened(root: Path, version: int | None = None) -> Snapshot:
    return Snapshot.open(root, version)


@pytest.fixture
def ragged(homeobox_fixtures: Path) -> AtlasQuery:
    return AtlasQuery(opened(homeobox_fixtures / "ragged_rna" / "atlas"))


@pytest.fixture
def cite(homeobox_fixtures: Path) -> AtlasQuery:
    return AtlasQuery(opened(homeobox_fixtures / "cite_multimodal" / "atlas"))


@pytest.fixture
def spaces(homeobox_fixtures: Path) -> AtlasQuery:
    return AtlasQuery(opened(homeobox_fixtures / "all_spaces" / "atlas"), "cells")


def uids(query: AtlasQuery) -> list[str]:
    result: list[str] = query.to_pandas()["uid"].tolist()
    return result


# Against what the real package selects


def fixture_queries() -> list[Any]:
    """(atlas, version, table, query id); read at collection, so that each query is a test of its own."""
    import os

    shared = Path(os.environ.get("HBX_SHARED", Path(__file__).resolve().parents[2] / ".." / "shared"))
    return [
        pytest.param(
            path.parent.name,
            version["version"],
            table,
            query["id"],
            id=f"{path.parent.name}-{query['id']}-{version['version']}",
        )
        for path in sorted((shared / "fixtures" / "homeobox").glob("*/expected.json"))
        for version in json.loads(path.read_text())["versions"]
        for table, content in version["tables"].items()
        for query in content["queries"]
    ]


def fixture_query(root: Path, version: int, table: str, name: str) -> tuple[dict[str, Any], AtlasQuery]:
    expected = json.loads((root / "expected.json").read_text())
    (snapshot,) = (v for v in expected["versions"] if v["version"] == version)
    (wanted,) = (q for q in snapshot["tables"][table]["queries"] if q["id"] == name)
    query = AtlasQuery(opened(root / "atlas", version), table).where(wanted.get("where"))
    query.limit(wanted.get("limit")).offset(wanted.get("offset", 0))
    return wanted, query


@pytest.mark.parametrize(("atlas", "version", "table", "name"), fixture_queries())
def test_same_rows_as_homeobox(
    homeobox_fixtures: Path, atlas: str, version: int, table: str, name: str
) -> None:
    wanted, query = fixture_query(homeobox_fixtures / atlas, version, table, name)
    if "field" in wanted:
        found = (
            query.to_cell_dataset(field_name=wanted["field"], metadata_columns=["uid"])
            if (query.selection.pointers[wanted["field"]].kind == "sparse")
            else None
        )
        if found is not None:
            assert found.categories["uid"][found.columns["uid"]].tolist() == wanted["uids"]
        rows = query.selection.read_rows(query.selection.pointers[wanted["field"]], ["uid"]).obs
        assert rows.categories["uid"][rows.columns["uid"]].tolist() == wanted["uids"]
    else:
        assert uids(query) == wanted["uids"]
        assert query.count() == wanted["count"]


# Steps


def test_conditions_add_up(ragged: AtlasQuery) -> None:
    frame = ragged.to_pandas()
    wanted = frame[(frame.batch == 1) & ((frame.donor == "P2") | (frame.donor == "P1"))]
    # An OR, and a comment at the end, stay inside their own condition.
    ragged.where("batch = 1 -- the first").where("donor = 'P1' OR donor = 'P2'")
    assert 0 < len(wanted) < len(frame)
    assert uids(ragged) == wanted.uid.tolist()
    assert ragged.count() == len(wanted)
    assert len(ragged.where("donor = 'P1'").where("donor = 'P2'").to_pandas()) == 0
    assert ragged.where(None).count() == len(frame)


def test_other_steps_return_the_query_and_replace_each_other(ragged: AtlasQuery) -> None:
    assert ragged.where("batch = 1") is ragged
    ragged.where(None)
    assert len(ragged.limit(2).limit(3).to_pandas()) == 3
    assert ragged.select(["donor"]).select(["age", "uid"]).to_pandas().columns.tolist() == ["age", "uid"]
    everything = ragged.where(None).limit(None).select(None)
    assert everything.count() == 70
    assert everything.offset(68).offset(0).count() == 70


def test_order_of_steps_does_not_matter(ragged: AtlasQuery) -> None:
    a = uids(ragged.limit(7).where("batch = 1").offset(2))
    b = uids(AtlasQuery(ragged.selection.snapshot).offset(2).where("batch = 1").limit(7))
    assert a == b
    assert len(a) == 7


def test_a_dataset_without_cells_says_so(ragged: AtlasQuery, cite: AtlasQuery) -> None:
    with pytest.warns(UserWarning, match=r"no cells of the 70 in table .*where: donor = 'nobody'") as told:
        assert len(ragged.where("donor = 'nobody'").to_cell_dataset()) == 0
    assert told[0].filename == __file__
    with pytest.warns(UserWarning, match=r"selects no cells .*limit: 0"):
        cite.limit(0).to_multimodal_dataset()


@pytest.mark.filterwarnings("ignore:this query selects no cells")
def test_limit_zero_gives_no_rows(ragged: AtlasQuery) -> None:
    ragged.limit(0)
    assert ragged.count() == 0
    assert ragged.to_pandas().shape[0] == 0
    assert ragged.to_arrow().num_rows == 0
    assert len(ragged.to_cell_dataset()) == 0
    assert ragged.count("donor").empty


def test_modality_counts_before_limit(cite: AtlasQuery) -> None:
    with_protein = uids(cite.where("protein_abundance.zarr_group IS NOT NULL"))
    without = [u for u in uids(cite.where(None)) if u not in with_protein]
    assert without
    rows = (
        cite.limit(5)
        .offset(19)
        .selection.read_rows(cite.selection.pointers["protein_abundance"], ["uid"])
        .obs
    )
    assert rows.categories["uid"][rows.columns["uid"]].tolist() == with_protein[19:24]


def test_select_and_pointers(ragged: AtlasQuery) -> None:
    assert "gene_expression" not in ragged.to_pandas().columns
    assert "gene_expression" in ragged.to_arrow().column_names
    assert ragged.select(["gene_expression", "age"]).to_arrow().column_names == ["gene_expression", "age"]
    assert ragged.to_pandas().columns.tolist() == ["age"]
    with pytest.raises(ValueError, match="Columns must be a list"):
        ragged.select("age")  # type: ignore[arg-type]
    with pytest.raises(UnknownNameError, match=r"\['wrong'\].*'donor'"):
        ragged.select(["age", "wrong"])


def test_pandas_keeps_missing_values(ragged: AtlasQuery) -> None:
    frame = ragged.to_pandas()
    assert frame.is_doublet.dtype == pd.BooleanDtype()
    assert frame.is_doublet.isna().any()
    assert frame.age.dtype == pd.Int64Dtype()
    assert frame.age.isna().any()
    assert frame.quality.dtype == "category"
    assert frame.collected.dtype.kind == "M"


def test_polars_is_optional(ragged: AtlasQuery, monkeypatch: pytest.MonkeyPatch) -> None:
    real = builtins.__import__

    def without_polars(name: str, *args: object, **kwargs: object) -> object:
        if name == "polars":
            raise ImportError(name)
        return real(name, *args, **kwargs)  # type: ignore[arg-type]

    monkeypatch.setattr(builtins, "__import__", without_polars)
    with pytest.raises(ImportError, match="pip install polars, or use to_pandas"):
        ragged.to_polars()


# Counts


def test_count_by_columns(ragged: AtlasQuery) -> None:
    frame = ragged.to_pandas()
    got: Any = ragged.count(group_by="donor")
    assert got.columns.tolist() == ["donor", "count"]
    assert dict(zip(got.donor, got["count"], strict=True)) == frame.donor.value_counts().to_dict()
    assert got.donor.tolist() == sorted(got.donor)

    got = ragged.count(group_by=["quality", "is_doublet"])
    assert got["count"].sum() == 70
    keys = [(str(q), str(d)) for q, d in zip(got.quality, got.is_doublet, strict=True)]
    assert len(set(keys)) == len(keys)
    assert got.quality.isna().any()
    assert ragged.where("batch = 1").count("batch")["count"].tolist() == [ragged.count()]
    assert ragged.where("batch = 12345").count("quality").columns.tolist() == ["quality", "count"]


def test_counts_respect_limits(ragged: AtlasQuery) -> None:
    assert ragged.limit(9).offset(4).count() == 9
    assert ragged.count("dataset_uid")["count"].sum() == 9
    assert ragged.offset(68).count() == 2
    assert ragged.offset(500).count() == 0


# Balance


def test_balanced_limit(ragged: AtlasQuery) -> None:
    everything = ragged.to_pandas().set_index("uid")
    available = everything.quality.value_counts()
    wanted = 3 * int(available.min()) + 2
    got = ragged.balanced_limit(wanted, "quality").to_pandas()
    assert len(got) == wanted
    assert got.quality.notna().all()
    assert got.quality.value_counts()[available.idxmin()] == available.min()
    assert got.uid.tolist() == [u for u in everything.index if u in set(got.uid)]
    assert ragged.count() == wanted
    assert ragged.to_cell_dataset().n_cells == wanted
    assert ragged.balanced_limit(1000, "quality").count() == int(available.sum())
    assert ragged.balanced_limit(0, "quality").count() == 0


def test_balance_over_numbers_and_bools(ragged: AtlasQuery) -> None:
    frame = ragged.to_pandas()
    for column in ("age", "is_doublet", "batch", "collected"):
        got = ragged.balanced_limit(12, column).to_pandas()[column]
        assert len(got) == 12
        assert got.notna().all()
        taken, have = got.value_counts().to_dict(), frame[column].value_counts().to_dict()
        for value, available in have.items():
            assert taken.get(value, 0) >= min(available, max(taken.values()) - 1)


def test_balance_refusals(ragged: AtlasQuery, homeobox_fixtures: Path) -> None:
    with pytest.raises(ValueError, match="cannot be combined"):
        ragged.balanced_limit(4, "donor").limit(3)
    ragged = AtlasQuery(opened(homeobox_fixtures / "ragged_rna" / "atlas"))
    with pytest.raises(ValueError, match="cannot be combined"):
        ragged.limit(3).balanced_limit(4, "donor")
    ragged.limit(None)
    with pytest.raises(UnknownNameError, match="wrong"):
        ragged.balanced_limit(4, "wrong")
    with pytest.raises(ValueError, match="plain values; 'tags'"):
        ragged.balanced_limit(4, "tags").count()


@given(
    codes=st.lists(st.integers(-1, 4), max_size=60).map(lambda c: np.array(c, dtype=np.int64)),
    n=st.integers(0, 70),
)
def test_balanced_rows(codes: np.ndarray, n: int) -> None:
    rows = balanced_rows(codes, n)
    assert (np.diff(rows) > 0).all()
    assert len(rows) == min(n, np.count_nonzero(codes >= 0))
    assert (codes[rows] >= 0).all()
    taken = np.bincount(codes[rows], minlength=5)
    have = np.bincount(codes[codes >= 0], minlength=5)
    full = taken == have
    # A value gives fewer rows than another only where it has no more, or where it sorts later by one row.
    for value in np.flatnonzero(~full):
        assert taken[value] >= taken.max() - 1
        assert (taken[:value][~full[:value]] >= taken[value]).all()
    for value in np.unique(codes[codes >= 0]):
        first = np.flatnonzero(codes == value)[: taken[value]]
        assert np.array_equal(rows[codes[rows] == value], first)


@settings(deadline=None, max_examples=30)
@given(page=st.integers(1, 80), clause=st.sampled_from([None, "batch = 1", "age IS NULL", "batch = 777"]))
def test_pages_partition_the_result(homeobox_fixtures: Path, page: int, clause: str | None) -> None:
    query = AtlasQuery(opened(homeobox_fixtures / "ragged_rna" / "atlas")).where(clause).select(["uid"])
    whole, pages, at = uids(query), [], 0
    while at <= len(whole):
        part = uids(query.limit(page).offset(at))
        assert len(part) == min(page, len(whole) - at)
        pages += part
        at += page
    assert pages == whole


# Refusals


@pytest.mark.parametrize(
    "clause",
    ["split =", "nope = 1", "lower(", "", "age + 1", "cast(split as int) = 3"],
)
def test_malformed_filter_is_shown(ragged: AtlasQuery, clause: str) -> None:
    ragged.where(clause)
    for read in (ragged.count, ragged.to_pandas, ragged.limit(3).to_arrow, ragged.to_cell_dataset):
        with pytest.raises(ValueError, match="is not a valid filter: ") as caught:
            read()
        assert repr(clause) in str(caught.value)
        assert ".rs" not in str(caught.value)


def test_unknown_names_list_what_exists(ragged: AtlasQuery, spaces: AtlasQuery) -> None:
    with pytest.raises(UnknownNameError, match=r"no feature space 'protein'.*\['gene_expression'\]"):
        ragged.features(["a"], "protein")
    with pytest.raises(UnknownNameError, match=r"unknown feature space\(s\) \['x'\].*'gene_expression'"):
        ragged.feature_spaces("gene_expression", "x")
    with pytest.raises(UnknownNameError, match=r"unknown pointer field\(s\) \['x'\].*'tiles_b'"):
        spaces.select_fields("x")
    with pytest.raises(UnknownNameError, match=r"no pointer field 'x'.*'tiles_b': 'image_tiles'"):
        spaces.to_cell_dataset(field_name="x")
    with pytest.raises(UnknownNameError, match=r"no feature space or field 'x'.*'rna': 'gene_expression'"):
        spaces.to_cell_dataset("x")
    with pytest.raises(UnknownNameError, match=r"\['wrong'\].*'donor'"):
        ragged.count("wrong")
    with pytest.raises(UnknownNameError, match=r"\['wrong'\].*'donor'"):
        ragged.to_cell_dataset(metadata_columns=["donor", "wrong"])
    with pytest.raises(
        UnknownNameError, match=r"'set0/gene_expression' has no layer 'tpm'; .*'log_normalized'"
    ):
        ragged.to_cell_dataset(layer="tpm")
    with pytest.raises(UnknownNameError, match="no obs table 'x'"):
        AtlasQuery(ragged.selection.snapshot, "x")
    with pytest.raises(ValueError, match=r"multiple obs tables \(\['cells', 'spots'\]\)"):
        AtlasQuery(spaces.selection.snapshot)


def test_unknown_features(ragged: AtlasQuery) -> None:
    ragged.features(["ENSG54134", "no1", "no2"], "gene_expression")
    for read in (ragged.to_cell_dataset, ragged.to_anndata):
        with pytest.raises(ValueError, match=r"2 UID\(s\) not found in registry. First 5: \['no1', 'no2'\]"):
            read()


def test_refused_arguments(ragged: AtlasQuery) -> None:
    with pytest.raises(ValueError, match=r"repeated: \['b'\]"):
        ragged.features(["a", "b", "c", "b"], "gene_expression")
    with pytest.raises(ValueError, match="needs a list of uids"):
        ragged.features("abc", "gene_expression")
    with pytest.raises(ValueError, match="'union' or 'intersection'"):
        ragged.feature_join("outer")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="must not be negative"):
        ragged.limit(-1)
    with pytest.raises(ValueError, match="must not be negative"):
        ragged.offset(-1)
    with pytest.raises(TypeError):
        ragged.limit(2.5)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="list of at least one layer"):
        ragged.layers("gene_expression", "counts")
    with pytest.raises(ValueError, match="batch_size must be positive"):
        ragged.to_batches(0)
    with pytest.raises(ValueError, match="metadata_columns must be a list"):
        ragged.to_cell_dataset(metadata_columns="donor")  # type: ignore[call-overload]
    with pytest.raises(ValueError, match="are pointer columns"):
        ragged.to_cell_dataset(metadata_columns=["gene_expression"])


# Which field is meant


def test_fields_of_one_space_are_told_apart(spaces: AtlasQuery) -> None:
    with pytest.raises(ValueError, match=r"several pointer fields: \['tiles_a', 'tiles_b'\].*field_name="):
        spaces.to_cell_dataset("image_tiles")
    with pytest.raises(ValueError, match=r"several pointer fields: \['rna', 'chromatin_accessibility'\]"):
        spaces.to_cell_dataset()
    assert spaces.selection.fields.one("image_tiles", "tiles_b").name == "tiles_b"
    assert spaces.selection.fields.one("tiles_a", None).name == "tiles_a"
    assert spaces.selection.fields.one("gene_expression", None).name == "rna"
    assert spaces.selection.fields.one("rna", None).name == "rna"
    assert spaces.to_cell_dataset("rna").feature_space == "gene_expression"
    assert spaces.select_fields("tiles_b").selection.fields.one("image_tiles", None).name == "tiles_b"
    assert spaces.select_fields("rna").selection.fields.one(None, None).name == "rna"
    with pytest.raises(ValueError, match="holds 'image_tiles', not 'gene_expression'"):
        spaces.to_cell_dataset("gene_expression", field_name="tiles_a")
    assert spaces.to_cell_dataset("discrete_image").feature_space == "discrete_image"


def test_features_of_another_space_are_refused(spaces: AtlasQuery) -> None:
    spaces.features(["AB03430"], "adt")
    with pytest.raises(ValueError, match=r"features\(\) was given for \['protein_abundance'\]"):
        spaces.to_cell_dataset("rna")


def test_recipe_is_small_plain_data(ragged: AtlasQuery) -> None:
    ragged.where("batch = 1").limit(20).features(["ENSG54134", "ENSG15281"], "gene_expression")
    recipe = ragged.to_cell_dataset(metadata_columns=["donor"])._recipe
    assert len(pickle.dumps(recipe)) < 1000
    with pytest.raises(AttributeError):
        recipe.version = 0  # type: ignore[union-attr]
