"""Calls as users of Homeobox write them: where stores lie, positional arguments, spaces of features()."""

from __future__ import annotations

import re
import shutil
from pathlib import Path
from typing import Any

import anndata
import lancedb
import numpy as np
import pandas as pd
import pytest
import scipy.sparse as sp
import zarr.storage

from hbx_gpu.atlas import (
    AtlasQuery,
    DatasetSchema,
    FeatureBaseSchema,
    HoxBaseSchema,
    PointerField,
    RaggedAtlas,
    SparseZarrPointer,
    create_or_open_atlas,
)
from hbx_gpu.errors import AtlasError, UnknownNameError, UnsupportedError


class Cells(HoxBaseSchema):
    gene_expression: SparseZarrPointer | None = PointerField.declare(feature_space="gene_expression")


def simple() -> anndata.AnnData:
    x = sp.random(5, 4, 0.5, "csr", dtype=np.float32, random_state=0)
    x.data = np.ceil(9 * x.data)
    return anndata.AnnData(x, obs=pd.DataFrame(index=list("abcde")), var=pd.DataFrame(index=list("wxyz")))


@pytest.fixture(scope="module")
def multimodal(homeobox_fixtures: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return shutil.copytree(
        homeobox_fixtures / "cite_multimodal" / "atlas", tmp_path_factory.mktemp("cite") / "atlas"
    )


def test_an_atlas_with_its_store_elsewhere(tmp_path: Path) -> None:
    store = tmp_path / "elsewhere" / "arrays"
    RaggedAtlas.create(tmp_path / "a", {"cells": Cells}, "groups", store=store)
    assert not (tmp_path / "a" / "zarr_store").exists()
    with pytest.raises(FileNotFoundError, match="pass its path as store="):
        RaggedAtlas.open(tmp_path / "a")
    atlas = RaggedAtlas.open(tmp_path / "a", "cells", Cells, "groups", store=zarr.storage.LocalStore(store))
    atlas.add_from_anndata(simple())
    atlas.optimize()
    atlas.snapshot()
    read = RaggedAtlas.checkout_latest(tmp_path / "a", None, store).query().to_anndata()
    np.testing.assert_array_equal(read.X.toarray().sum(1), simple().X.toarray().sum(1))
    with pytest.raises(AtlasError, match="pass a path, a zarr LocalStore or an obstore LocalStore"):
        RaggedAtlas.open(tmp_path / "a", store=zarr.storage.MemoryStore())


def test_open_as_every_release_of_homeobox_is_called(multimodal: Path) -> None:
    store = multimodal / "zarr_store"
    calls: list[tuple[Any, ...]] = [
        (),
        ("cells",),
        ("cells", None, "datasets"),
        (["cells"], {"cells": None}, "datasets"),
        (None, {"cells": None}),
        ({"cells": None},),
    ]
    for arguments in calls:
        assert RaggedAtlas.open(str(multimodal / "lance_db"), *arguments, store=store).obs_tables == ["cells"]
    tables = {"gene_expression": RaggedAtlas.open(multimodal).catalog.names.registries["gene_expression"]}
    assert RaggedAtlas.open(multimodal, registry_tables=tables, store_kwargs={}).obs_tables == ["cells"]
    with pytest.raises(UnknownNameError, match=r"no obs table 'kells' in this atlas; it has \['cells'\]"):
        RaggedAtlas.open(multimodal, "kells")
    with pytest.raises(UnknownNameError, match="it is called 'datasets'"):
        RaggedAtlas.open(multimodal, "cells", None, "sets")
    with pytest.raises(UnknownNameError, match="are not in table 'genes'"):
        RaggedAtlas.open(multimodal, registry_tables={"gene_expression": "genes"})
    with pytest.raises(ValueError, match="once"):
        RaggedAtlas.open(multimodal, {"cells": None}, {"cells": None})


class Study(DatasetSchema):
    lab: str | None = None


@pytest.mark.parametrize("make", [RaggedAtlas.create, create_or_open_atlas])
def test_an_atlas_is_made_as_every_release_of_homeobox_makes_it(tmp_path: Path, make: Any) -> None:
    before = make(tmp_path / "a", "donors", Cells, "groups", Study, registry_schemas={})
    now = make(tmp_path / "b", {"donors": Cells}, "groups", Study, {"gene_expression": FeatureBaseSchema})
    by_name = make(tmp_path / "c", cell_table_name="donors", cell_schema=Cells, dataset_table_name="groups")
    for atlas in (before, now, by_name):
        assert atlas.obs_tables == ["donors"]
        assert atlas.obs_schema("donors") is Cells
        assert atlas.catalog.names.dataset_table == "groups"
    assert "lab" in before.list_datasets().columns
    assert "lab" in now.list_datasets().columns
    calls: list[tuple[tuple[Any, ...], dict[str, Any], str]] = [
        (("donors", Cells, "groups", Study, {}), {}, "at most cell_table_name, cell_schema"),
        (
            ({"donors": Cells},),
            {"obs_schemas": {"donors": Cells}},
            "obs_schemas is given by position and by name",
        ),
        (({"donors": Cells},), {"cell_schema": Cells}, "pass one of them"),
        (("donors", Study), {}, "cell_schema must be a class derived from HoxBaseSchema"),
        ((Cells,), {}, "obs_schemas must be {table: class or None}"),
    ]
    for given, named, message in calls:
        with pytest.raises(TypeError, match=re.escape(message)):
            make(tmp_path / "d", *given, **named)
    assert not (tmp_path / "d").exists()


def query(path: Path) -> AtlasQuery:
    return RaggedAtlas.checkout_latest(path).query()


def test_features_choose_the_space_of_results_in_memory(multimodal: Path) -> None:
    atlas = RaggedAtlas.checkout_latest(multimodal)
    proteins = atlas.feature_registry("protein_abundance").uid.tolist()[:2]
    genes = atlas.feature_registry("gene_expression").uid.tolist()[:3]
    asked = query(multimodal).features(proteins, "protein_abundance")
    adata = asked.to_anndata()
    assert adata.var_names.tolist() == proteins
    chosen = query(multimodal).feature_spaces("protein_abundance").features(proteins, "protein_abundance")
    np.testing.assert_array_equal(adata.X, chosen.to_anndata().X)
    assert next(iter(asked.to_batches(4))).var_names.tolist() == proteins
    assert list(asked.to_multimodal().mod) == ["protein_abundance"]
    assert asked.to_cell_dataset().feature_uids.tolist() == proteins
    # A dataset of several modalities has them all: a panel only narrows one of them.
    assert list(asked.to_multimodal_dataset().datasets) == ["gene_expression", "protein_abundance"]
    both = asked.features(genes, "gene_expression")
    mods: Any = both.to_multimodal().mod
    assert {name: mod.n_vars for name, mod in mods.items()} == {
        "gene_expression": 3,
        "protein_abundance": 2,
    }
    with pytest.raises(ValueError, match="exactly one AnnData-capable pointer field"):
        both.to_anndata()
    assert both.feature_spaces("gene_expression").to_anndata().var_names.tolist() == genes
    other = query(multimodal).features(proteins, "protein_abundance").feature_spaces("gene_expression")
    with pytest.raises(ValueError, match=r"features\(\) was given for \['protein_abundance'\]"):
        other.to_anndata()


def test_a_search_goes_to_lancedb_and_its_answer_to_where(multimodal: Path) -> None:
    with pytest.raises(UnsupportedError, match=r"queries of hbx_gpu have no search\(\)") as error:
        query(multimodal).search("T cell", query_type="fts")
    steps = str(error.value)
    assert f"lancedb.connect({str(multimodal / 'lance_db')!r}).open_table('cells')" in steps
    table = lancedb.connect(multimodal / "lance_db").open_table("cells")
    uids = table.search().limit(3).to_pandas()["uid"]
    assert query(multimodal).where(f"uid IN ({str(list(uids))[1:-1]})").count() == 3


def test_an_unknown_space_is_named_with_the_call_that_registers_it(tmp_path: Path) -> None:
    with pytest.raises(
        UnknownNameError, match=r"hbx_gpu\.atlas\.register_space\(hbx_gpu\.atlas\.FeatureSpace"
    ):
        RaggedAtlas.create(tmp_path / "a", pointer_fields={"x": "my_space"})
