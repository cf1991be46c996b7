"""Which column identifies features: chosen for all files together, compared with what is there."""

from __future__ import annotations

import warnings
from typing import Any

import anndata
import pandas as pd
import pytest
from hypothesis import given
from hypothesis import strategies as st

from hbx_gpu._advice import from_command, option
from hbx_gpu._identity.choice import FeatureChoice, KnownFeatures, choose
from hbx_gpu._identity.overlap import compare, require
from hbx_gpu._identity.tables import (
    INDEX,
    UNIQUE_NAMES,
    FeatureTable,
    mostly_stable,
    numbered,
    without_versions,
)
from hbx_gpu.errors import InvalidDataError

ENSEMBL = [f"ENSG{i:011d}" for i in range(20)]
SYMBOLS = [f"SYM{i}" for i in range(20)]


def table(index: list[str], **columns: Any) -> FeatureTable:
    return FeatureTable.of_frame(pd.DataFrame(columns, index=index), "file.h5ad, var")


def chosen(*tables: FeatureTable, known: KnownFeatures | None = None) -> list[str]:
    return [choice.column for choice in choose(tables, known)]


def test_ids_of_a_database_go_before_names() -> None:
    a = table(SYMBOLS[:4], gene_ids=ENSEMBL[:4])
    twice = table(["x", "x", "y"], gene_ids=ENSEMBL[:3])
    assert chosen(a) == ["gene_ids"]
    assert chosen(a, twice) == ["gene_ids", "gene_ids"]
    # They may stand in another column of each file, or be the names themselves.
    assert chosen(a, table(ENSEMBL[:4], symbol=SYMBOLS[:4])) == ["gene_ids", INDEX]


def test_names_are_taken_where_not_every_file_has_ids_of_a_database() -> None:
    a, b = table(SYMBOLS[:4], gene_ids=ENSEMBL[:4]), table(SYMBOLS[:3])
    assert chosen(a, b) == [INDEX, INDEX]
    assert chosen(table(SYMBOLS[:3], batch_of_probe=["p", "q", "r"])) == [INDEX]


@pytest.mark.parametrize("column", ["feature_id", "symbol", "my_own"])
def test_positions_are_never_ids_while_a_column_identifies_features(column: str) -> None:
    a = table(["0", "1", "2"], **{column: ["a", "b", "c"]})
    assert chosen(a) == [column]
    assert chosen(a, table(["0", "1"], **{column: ["c", "d"]})) == [column, column]
    assert chosen(table(["0", "1"], length=[5, 6], name=["x", "x"])) == [INDEX]


def test_what_the_collection_uses_decides() -> None:
    file = table(SYMBOLS[:4], gene_ids=ENSEMBL[:4])
    assert chosen(file, known=KnownFeatures(SYMBOLS, (INDEX,))) == [INDEX]
    assert chosen(file, known=KnownFeatures(ENSEMBL, ("other",))) == ["gene_ids"]
    # Nothing is shared: the column of the other files, else ids of a database where those are such.
    assert chosen(file, known=KnownFeatures(["a"], ("gene_ids",))) == ["gene_ids"]
    assert chosen(file, known=KnownFeatures(["ENSG99999999999"], ("other",))) == ["gene_ids"]
    # Numbers meet numbers by chance.
    positions = table(["0", "1", "2"], feature_id=["a", "b", "c"])
    assert chosen(positions, known=KnownFeatures(["0", "1", "2"], (INDEX,))) == ["feature_id"]


def test_what_the_user_names_is_taken_and_checked() -> None:
    twice = table(["a", "a"], gene_ids=["e1", "e2"], same=["x", "x"], nr=[1, 2])
    for column, message in (
        ("same", r"'same' of var names 1 feature\(s\) more than once, for example \['x'\].*\['gene_ids'\]"),
        (INDEX, r"the index of var names 1 feature\(s\) more than once"),
        ("nr", "missing or not strings"),
        ("nope", r"no column 'nope'; it has \['gene_ids', 'same', 'nr'\]"),
    ):
        (choice,) = choose([twice], column=column)
        with pytest.raises(InvalidDataError, match=message):
            choice.ids(twice)
    with pytest.raises(
        InvalidDataError, match=r"no column of var is unique; feature_id_column='unique_names'"
    ):
        FeatureChoice(INDEX).ids(table(["a", "a"]))
    assert chosen(table(["a", "b"], global_feature_uid=["u", "v"], gene_ids=ENSEMBL[:2])) == [
        "global_feature_uid"
    ]


def test_stable_ids_and_versions() -> None:
    assert mostly_stable(["ENSMUSG00000051951.6", "FBgn0000008", "MT-ND1"])
    assert not mostly_stable(["CD3", "CD4", "ENSG00000000003"])
    assert without_versions(["ENSG00000000003.15", "ENSG00000182378.15_PAR_Y", "RP11-34P13.7"]) == [
        "ENSG00000000003",
        "ENSG00000182378_PAR_Y",
        "RP11-34P13.7",
    ]
    both = table(["ENSG00000000003.1", "ENSG00000000003.2"])
    with pytest.raises(InvalidDataError, match=r"without versions.*more than once"):
        FeatureChoice(INDEX, strip_versions=True).ids(both)


@pytest.mark.parametrize(
    ("index", "columns", "known", "shared", "remedy"),
    [
        (SYMBOLS[:4], {"gene_ids": ENSEMBL[:4]}, ENSEMBL, 0, "feature_id_column='gene_ids'"),
        ([f"{uid}.1" for uid in ENSEMBL[:4]], {}, ENSEMBL, 0, "strip_versions=True"),
        (ENSEMBL[:4], {}, [f"{uid}.1" for uid in ENSEMBL], 0, "begin anew"),
        (["sym1", "sym2", "x"], {}, SYMBOLS, 0, "upper and lower case, 2 are shared"),
        (["SYM1", "a", "b", "c"], {}, SYMBOLS, 1, "name the column that joins them"),
        (SYMBOLS[:4], {}, SYMBOLS, 4, None),
    ],
)
def test_small_overlaps_say_what_would_help(
    index: list[str], columns: dict[str, list[str]], known: list[str], shared: int, remedy: str | None
) -> None:
    found = compare(table(index, **columns), FeatureChoice(INDEX), known)
    assert (found.n_file, found.n_shared, found.is_small) == (len(index), shared, remedy is not None)
    assert remedy is None or remedy in str(found)
    if remedy is None:
        require(found, 1.0)
    else:
        with pytest.raises(InvalidDataError, match=r"require_shared_genes=0\.5 was asked for"):
            require(found, 0.5)
    require(found, None)


def test_a_column_of_the_collection_that_holds_the_ids_is_named() -> None:
    found = compare(table(ENSEMBL[:3]), FeatureChoice(INDEX), SYMBOLS, columns={"gene_ids": ENSEMBL})
    assert "3 are in column 'gene_ids' of the features that are there" in str(found)


def test_options_are_named_where_the_user_is() -> None:
    assert option("feature_id_column", "gene_ids") == "feature_id_column='gene_ids'"
    assert option("layer") == "layer="
    with from_command({"feature_id_column": "--feature-id-column", "layers": "--layer-of {}"}):
        assert option("feature_id_column", "gene_ids") == "--feature-id-column gene_ids"
        assert option("layers", "rna:counts=raw") == "--layer-of rna:counts=raw"
        assert option("unknown", "1") == "unknown=1 in Python"


@given(st.lists(st.sampled_from(["0", "1", "a", "b", "ENSG00000000003"]), min_size=1, max_size=4), st.data())
def test_a_choice_identifies_features_wherever_a_column_does(index: list[str], data: st.DataObject) -> None:
    values = data.draw(
        st.lists(st.sampled_from([*ENSEMBL[:3], "x", "7"]), min_size=len(index), max_size=len(index))
    )
    features = table(index, some=values)
    (choice,) = choose([features])
    if features.candidates():
        assert len(set(choice.ids(features))) == len(index)
        named = [name for name in features.candidates() if not features.names_positions(name)]
        assert not named or not features.names_positions(choice.column)


@given(st.lists(st.sampled_from(["a", "b", "a-1", "a-2", "a-1-1", "b-1"]), max_size=12))
def test_repeated_names_are_numbered_as_anndata_does(names: list[str]) -> None:
    expected = pd.DataFrame(index=pd.Index(names, dtype=object))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # names that look numbered already
        data = anndata.AnnData(var=expected)
        data.var_names_make_unique()
    assert numbered(names) == data.var_names.tolist()


def test_numbered_names_are_taken_where_asked_for_and_where_the_atlas_has_them() -> None:
    twice = table(["a", "b", "a"], symbol=["x", "x", "y"])
    (choice,) = choose([twice], column=UNIQUE_NAMES)
    assert choice.ids(twice) == ["a", "b", "a-1"]
    assert chosen(twice) == [INDEX]
    assert chosen(twice, known=KnownFeatures(["a", "a-1"], (UNIQUE_NAMES,))) == [UNIQUE_NAMES]
    assert chosen(table(["a", "b"]), known=KnownFeatures(["a", "a-1"], (UNIQUE_NAMES,))) == [INDEX]
    # A column of that name is a column.
    (choice,) = choose([table(["a", "a"], unique_names=["p", "q"])], column=UNIQUE_NAMES)
    assert choice.ids(table(["a", "a"], unique_names=["p", "q"])) == ["p", "q"]


def test_numbers_that_meet_by_chance_are_no_remedy() -> None:
    file = table(["0", "1", "2"], gene_ids=ENSEMBL[:3])
    overlap = compare(file, FeatureChoice("gene_ids"), ["0", "1", "2", "3"])
    assert overlap.is_small
    assert overlap.remedies == ()
