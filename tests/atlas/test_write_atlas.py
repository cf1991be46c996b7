"""Making, opening and maintaining an atlas: tables, registries, snapshots that never expire, one writer."""

from __future__ import annotations

import json
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import anndata
import lancedb
import numpy as np
import pandas as pd
import pyarrow as pa
import pytest
import scipy.sparse as sp

from hbx_gpu.atlas import (
    DatasetRecord,
    DatasetSchema,
    FeatureBaseSchema,
    HoxBaseSchema,
    PointerField,
    RaggedAtlas,
    SparseZarrPointer,
    create_or_open_atlas,
)
from hbx_gpu.atlas._catalog import tables
from hbx_gpu.atlas._catalog.session import WriteSession
from hbx_gpu.atlas._model.schema import AtlasVersion, Cell, FeatureLayout, Gene
from hbx_gpu.errors import AtlasError, AtlasLockedError, InvalidDataError, UnknownNameError


class Gene2(FeatureBaseSchema):
    gene_name: str
    chrom: str | None = None


class Donor(HoxBaseSchema):
    gene_expression: SparseZarrPointer | None = PointerField.declare(feature_space="gene_expression")
    donor: str
    age: int | None = None


def adata(genes: list[str], n: int = 4, seed: int = 0, **obs: Any) -> anndata.AnnData:
    rng = np.random.default_rng(seed)
    x = sp.csr_matrix(rng.integers(0, 4, (n, len(genes))).astype(np.float32))
    frame = pd.DataFrame(obs, index=[f"s{seed}c{i}" for i in range(n)])
    return anndata.AnnData(x, obs=frame, var=pd.DataFrame(index=genes))


def schema_of(root: Path, table: str) -> pa.Schema:
    return tables.open_table(root, table).schema


# Making and opening


def test_a_new_atlas_has_the_tables_of_the_format(tmp_path: Path) -> None:
    atlas = create_or_open_atlas(tmp_path / "a")
    assert tables.table_names(tmp_path / "a") == [
        "_feature_layouts",
        "atlas_versions",
        "cells",
        "datasets",
        "gene_registry",
    ]
    for table, declared in (
        ("cells", Cell),
        ("datasets", DatasetSchema),
        ("gene_registry", Gene),
        ("_feature_layouts", FeatureLayout),
        ("atlas_versions", AtlasVersion),
    ):
        assert schema_of(tmp_path / "a", table).equals(declared.to_arrow_schema(), check_metadata=True), table
    assert json.loads((tmp_path / "a" / "zarr_store" / "zarr.json").read_text()) == {
        "attributes": {},
        "zarr_format": 3,
        "node_type": "group",
    }
    assert atlas.db_uri == str(tmp_path / "a" / "lance_db")
    assert atlas.version is None
    assert atlas.obs_tables == ["cells"]
    assert atlas.pointer_fields == {"gene_expression": PointerField("gene_expression", "gene_expression")}


@pytest.mark.parametrize("older", [False, True])
def test_both_ways_of_calling(tmp_path: Path, older: bool) -> None:
    how: dict[str, Any] = (
        {"cell_table_name": "donors", "cell_schema": Donor} if older else {"obs_schemas": {"donors": Donor}}
    )
    for _ in range(2):  # made, then opened
        atlas = create_or_open_atlas(
            str(tmp_path / "a"),
            dataset_table_name="sets",
            dataset_schema=DatasetRecord,
            registry_schemas={"gene_expression": Gene2},
            **how,
        )
        assert atlas.obs_tables == ["donors"]
    assert "gene2_registry" in tables.table_names(tmp_path / "a")
    assert schema_of(tmp_path / "a", "donors").equals(Donor.to_arrow_schema(), check_metadata=True)
    # Names come back without being given, before there is any snapshot.
    again = RaggedAtlas.open(tmp_path / "a" / "lance_db")
    assert again.obs_tables == ["donors"]
    assert again.list_datasets().columns.tolist() == DatasetSchema.to_arrow_schema().names  # type: ignore[no-untyped-call]


def test_create_refuses_an_existing_atlas_and_open_a_missing_one(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="No atlas found at"):
        RaggedAtlas.open(tmp_path / "a")
    RaggedAtlas.create(tmp_path / "a")
    with pytest.raises(FileExistsError, match="open it with"):
        RaggedAtlas.create(tmp_path / "a")


def test_an_interrupted_creation_is_repeated(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(WriteSession, "ensure_tables", lambda _self: None)
    RaggedAtlas.create(tmp_path / "a")
    monkeypatch.undo()
    assert "cells" not in tables.table_names(tmp_path / "a")
    create_or_open_atlas(tmp_path / "a")
    assert RaggedAtlas.open(tmp_path / "a").obs_tables == ["cells"]


def test_tables_of_another_program_are_left_alone(tmp_path: Path) -> None:
    lancedb.connect(str(tmp_path / "a" / "lance_db")).create_table("cells", pa.table({"uid": ["a"]}))
    with pytest.raises(AtlasError, match=r"nothing says which of its tables \['cells'\]"):
        RaggedAtlas.open(tmp_path / "a")
    with pytest.raises(FileExistsError, match="no snapshot and was not made by hbx_gpu"):
        create_or_open_atlas(tmp_path / "a")


def test_a_class_that_disagrees_is_refused(tmp_path: Path) -> None:
    create_or_open_atlas(tmp_path / "a")
    with pytest.raises(
        AtlasError, match="Donor declares column 'donor', which table 'cells' of the atlas lacks"
    ):
        create_or_open_atlas(tmp_path / "a", obs_schemas={"cells": Donor})
    with pytest.raises(AtlasError, match="Gene2 declares column 'gene_name'"):
        create_or_open_atlas(tmp_path / "a", registry_schemas={"gene_expression": Gene2})


def test_tables_can_be_added_later(tmp_path: Path) -> None:
    create_or_open_atlas(tmp_path / "a").add_from_anndata(adata(["a", "b"]))
    atlas = create_or_open_atlas(tmp_path / "a", obs_schemas={"donors": Donor})
    assert atlas.obs_tables == ["cells", "donors"]
    with pytest.raises(ValueError, match=r"several obs tables.*obs_table="):
        atlas.add_from_anndata(adata(["a"], donor=list("xyzx")))
    atlas.add_from_anndata(adata(["a"], donor=list("xyzx"), seed=1), obs_table="donors")
    atlas.optimize()
    assert atlas.snapshot() == 0
    checked = RaggedAtlas.checkout_latest(tmp_path / "a")
    with pytest.raises(ValueError, match="multiple obs tables"):
        checked.query()
    assert checked.query("donors").count() == 4


def test_older_generations_are_for_reading_only(homeobox_fixtures: Path) -> None:
    for name in ("legacy_0_2_3", "seed_2026_05"):
        with pytest.raises(AtlasError, match=r"before 0\.2\.4: it can be read"):
            RaggedAtlas.open(homeobox_fixtures / name / "atlas")


# Reading through a checkout


def test_checkout_checks_the_class(homeobox_fixtures: Path) -> None:
    root = homeobox_fixtures / "ragged_rna" / "atlas"
    for schema in (None, Donor, {"cells": Donor}, {"cells": None}):
        assert RaggedAtlas.checkout_latest(root, schema, root / "zarr_store").version == 1
    assert RaggedAtlas.checkout(db_uri=str(root / "lance_db"), version=0, cell_schema=Donor).version == 0

    class Wrong(Donor):
        tissue: str | None = None

    with pytest.raises(AtlasError, match="'tissue'"):
        RaggedAtlas.checkout(root, 1, {"cells": Wrong})
    with pytest.raises(UnknownNameError, match="no obs table 'spots'"):
        RaggedAtlas.checkout(root, 1, {"spots": Donor})


def test_checkout_is_read_only(homeobox_fixtures: Path) -> None:
    atlas = RaggedAtlas.checkout(homeobox_fixtures / "ragged_rna" / "atlas", 0)
    assert atlas.query().count() == 40
    assert len(atlas.list_datasets()) == 2
    assert atlas.feature_registry("gene_expression")["global_index"].tolist() == list(range(50))
    assert list(atlas.pointer_fields) == ["gene_expression"]
    for write in (atlas.optimize, atlas.snapshot, lambda: atlas.add_from_anndata(adata(["a"]))):
        with pytest.raises(AtlasError, match="checked out at snapshot 0 and read-only"):
            write()


def test_queries_need_a_snapshot(tmp_path: Path) -> None:
    atlas = create_or_open_atlas(tmp_path / "a")
    with pytest.raises(RuntimeError, match=r"call snapshot\(\), then RaggedAtlas\.checkout_latest"):
        atlas.query()


def test_list_versions(homeobox_fixtures: Path, tmp_path: Path) -> None:
    assert RaggedAtlas.list_versions(homeobox_fixtures / "ragged_rna" / "atlas")["version"].tolist() == [0, 1]
    create_or_open_atlas(tmp_path / "a")
    assert len(RaggedAtlas.list_versions(tmp_path / "a")) == 0
    with pytest.raises(ValueError, match="No snapshots found"):
        RaggedAtlas.checkout_latest(tmp_path / "a")


# Registries


def test_indices_are_given_once_in_order_of_uid(tmp_path: Path) -> None:
    atlas = create_or_open_atlas(tmp_path / "a")
    assert atlas.register_features("gene_expression", [Gene(uid=u) for u in ("m", "c", "m", "x")]) == 3
    atlas.optimize()
    assert atlas.register_features("gene_expression", pd.DataFrame({"uid": ["z", "a", "c"]})) == 2
    atlas.optimize()
    frame = atlas.feature_registry("gene_expression")
    assert dict(zip(frame["uid"], frame["global_index"], strict=True)) == {
        "c": 0,
        "m": 1,
        "x": 2,
        "a": 3,
        "z": 4,
    }
    atlas.optimize()
    pd.testing.assert_frame_equal(atlas.feature_registry("gene_expression"), frame)


def test_registry_class_is_enforced(tmp_path: Path) -> None:
    atlas = create_or_open_atlas(tmp_path / "a", registry_schemas={"gene_expression": Gene2})
    with pytest.raises(InvalidDataError, match="column 'gene_name' is missing"):
        atlas.register_features("gene_expression", pd.DataFrame({"uid": ["a"]}))
    atlas.register_features("gene_expression", [Gene2(uid="a", gene_name="A")])
    with pytest.raises(
        InvalidDataError, match=r"column 'gene_name' is missing.*'gene2_registry' requires it"
    ):
        atlas.add_from_anndata(adata(["a", "b"]))
    assert atlas.feature_registry("gene_expression")["uid"].tolist() == ["a"]
    # Registered ones need no columns in the file.
    assert atlas.add_from_anndata(adata(["a"])) == 4
    with pytest.raises(UnknownNameError, match=r"'protein_abundance' has no registry.*\['gene_expression'\]"):
        atlas.register_features("protein_abundance", [Gene(uid="a")])


def test_repeated_rows_of_other_writers_are_removed(tmp_path: Path) -> None:
    atlas = create_or_open_atlas(tmp_path / "a")
    atlas.add_from_anndata(adata(["b", "a"]))
    registry = atlas.catalog.registry("gene_expression")
    registry.add(pa.table({"uid": ["a", "q", "q"]}))
    layouts = atlas.catalog.layouts()
    layouts.add(layouts.to_arrow())
    assert any("run optimize()" in problem for problem in atlas.validate())
    atlas.optimize()
    assert atlas.validate() == []
    assert atlas.feature_registry("gene_expression")["uid"].tolist() == ["b", "a", "q"]
    rows = atlas.catalog.layouts().to_arrow().sort_by("local_index").to_pylist()
    assert [(r["feature_uid"], r["local_index"], r["global_index"]) for r in rows] == [
        ("b", 0, 0),
        ("a", 1, 1),
    ]


def test_layouts_take_indices_from_their_own_space(tmp_path: Path) -> None:
    class Two(HoxBaseSchema):
        gene_expression: SparseZarrPointer | None = PointerField.declare(feature_space="gene_expression")

    class Protein(FeatureBaseSchema):
        pass

    atlas = create_or_open_atlas(
        tmp_path / "a",
        {"cells": Two},
        registry_schemas={"protein_abundance": Protein, "gene_expression": Gene},
    )
    # The same uids, in the other order and with others before them.
    atlas.register_features("protein_abundance", [Protein(uid=u) for u in ("A", "B", "CD3E", "CD8A")])
    atlas.optimize()
    atlas.add_from_anndata(adata(["CD8A", "CD3E"]))
    atlas.optimize()
    rows = atlas.catalog.layouts().to_arrow().to_pylist()
    assert {r["feature_uid"]: r["global_index"] for r in rows} == {"CD8A": 0, "CD3E": 1}
    assert atlas.snapshot() == 0


# Snapshots


def test_snapshots_count_and_stay(tmp_path: Path) -> None:
    atlas = create_or_open_atlas(tmp_path / "a")
    assert atlas.snapshot() == 0  # nothing in it, nothing wrong with it
    atlas.add_from_anndata(adata(["a", "b"]))
    with pytest.raises(AtlasError, match=r"2 feature\(s\) have no global_index yet; run optimize\(\)"):
        atlas.snapshot()
    atlas.optimize()
    assert atlas.snapshot() == 1
    before = RaggedAtlas.checkout(tmp_path / "a", 1).query().to_anndata()
    atlas.add_from_anndata(adata(["c", "b", "0"], seed=1, n=3))
    atlas.optimize()
    assert atlas.snapshot() == 2
    assert RaggedAtlas.list_versions(tmp_path / "a")["total_rows"].tolist() == [0, 4, 7]
    after = RaggedAtlas.checkout(tmp_path / "a", 1).query().to_anndata()
    assert (before.X != after.X).nnz == 0
    pd.testing.assert_frame_equal(before.obs, after.obs)
    pd.testing.assert_frame_equal(before.var, after.var)
    with pytest.raises(ValueError, match="version 99 not found"):
        RaggedAtlas.checkout(tmp_path / "a", 99)


def table_versions(root: Path) -> dict[str, list[int]]:
    return {
        name: [v["version"] for v in tables.open_table(root, name).list_versions()]
        for name in tables.table_names(root)
    }


@pytest.mark.filterwarnings("ignore:optimize.cleanup_older_than=0")
def test_no_version_is_ever_removed(tmp_path: Path) -> None:
    atlas = create_or_open_atlas(tmp_path / "a")
    seen: dict[str, list[int]] = {}
    for seed in range(12):
        atlas.add_from_anndata(adata([f"g{seed}", "b"], seed=seed))
        atlas.optimize()
        atlas.snapshot()
        now = table_versions(tmp_path / "a")
        assert all(set(versions) <= set(now[name]) for name, versions in seen.items())
        seen = now
    assert max(len(v) for v in seen.values()) > 24
    # Nothing is configured to clean up by itself either.
    for manifest in (tmp_path / "a" / "lance_db").rglob("*.manifest"):
        assert b"auto_cleanup" not in manifest.read_bytes()
    # This test can fail: optimizing as LanceDB would, given no age at all, removes them.
    for name in tables.table_names(tmp_path / "a"):
        tables.open_table(tmp_path / "a", name).optimize(cleanup_older_than=pd.Timedelta(0).to_pytimedelta())
    with pytest.raises(AtlasError, match="cleaned up"):
        RaggedAtlas.checkout(tmp_path / "a", 0)


def test_compaction_asks_to_keep_everything(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    atlas = create_or_open_atlas(tmp_path / "a")
    asked = []
    table_class = type(tables.connect(tmp_path / "a").open_table("cells"))
    monkeypatch.setattr(table_class, "optimize", lambda _self, **options: asked.append(options))
    atlas.optimize()
    assert len(asked) == 4
    assert all(options["cleanup_older_than"].days > 36_000 for options in asked)


def break_pointer(atlas: RaggedAtlas) -> None:
    rows = atlas.catalog.obs("cells").to_arrow().to_pylist()
    rows[0]["gene_expression"]["end"] = 10_000
    table = atlas.catalog.obs("cells")
    table.delete("true")
    table.add(pa.Table.from_pylist(rows, schema=table.schema))


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda a: a.catalog.datasets().delete("true"), "which the dataset table does not list"),
        (lambda a: a.catalog.layouts().delete("local_index = 1"), "does not number its 2 features"),
        (lambda a: a.catalog.layouts().delete("true"), "its feature list '.*' is not stored"),
        (lambda a: next((a.path / "zarr_store").rglob("counts/zarr.json")).unlink(), "holds layers"),
        (lambda a: next((a.path / "zarr_store").rglob("indices/zarr.json")).unlink(), "cannot be opened"),
        (break_pointer, "points to element 10000"),
    ],
)
def test_snapshot_refuses_damage(tmp_path: Path, damage: Any, message: str) -> None:
    atlas = create_or_open_atlas(tmp_path / "a")
    atlas.add_from_anndata(adata(["a", "b", "c"]))
    atlas.add_from_anndata(adata(["a", "b"], seed=1))
    atlas.optimize()
    assert atlas.snapshot() == 0
    damage(atlas)
    with pytest.raises(AtlasError, match=message):
        atlas.snapshot()


# One writer


_HOLD = """
import sys, time
from hbx_gpu.atlas import RaggedAtlas
atlas = RaggedAtlas.open(sys.argv[1])
with atlas.session.writing():
    print("held", flush=True)
    sys.stdin.read()
"""


def test_second_process_is_refused_until_the_first_dies(tmp_path: Path) -> None:
    atlas = create_or_open_atlas(tmp_path / "a")
    with subprocess.Popen(
        [sys.executable, "-c", _HOLD, str(tmp_path / "a")],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    ) as other:
        assert other.stdout is not None
        assert other.stdout.readline() == "held\n"
        for write in (atlas.optimize, atlas.snapshot, lambda: atlas.add_from_anndata(adata(["a"]))):
            with pytest.raises(
                AtlasLockedError, match=rf"another writer holds.*process {other.pid} on .*try again"
            ):
                write()
        RaggedAtlas.open(tmp_path / "a")  # opening needs no lock
        with pytest.raises(AtlasLockedError):
            create_or_open_atlas(tmp_path / "a", obs_schemas={"donors": Donor})  # making a table does
        other.kill()
        other.wait()
        atlas.add_from_anndata(adata(["a"]))


def test_second_handle_and_second_thread_are_refused(tmp_path: Path) -> None:
    atlas = create_or_open_atlas(tmp_path / "a")
    seen: list[Exception] = []

    def write() -> None:
        try:
            atlas.optimize()
        except AtlasLockedError as error:
            seen.append(error)

    with atlas.session.writing():
        with pytest.raises(AtlasLockedError):
            RaggedAtlas.open(tmp_path / "a").optimize()
        thread = threading.Thread(target=write)
        thread.start()
        thread.join()
        atlas.optimize()  # the holder may go on
    assert len(seen) == 1
    RaggedAtlas.open(tmp_path / "a").optimize()


def test_the_first_dataset_keeps_its_columns_in_place(tmp_path: Path) -> None:
    """Global indices follow the stored feature lists, so translating the first one changes nothing."""
    atlas = create_or_open_atlas(tmp_path / "atlas")
    rng = np.random.default_rng(0)
    for names in (["g9", "g10", "a", "g1"], ["z", "g1", "b", "g9"]):
        counts = sp.csr_matrix(rng.integers(0, 5, size=(6, 4)).astype(np.float32))
        atlas.add_from_anndata(anndata.AnnData(counts, var=pd.DataFrame(index=names)))
    atlas.optimize()
    atlas.snapshot()
    registry = atlas.feature_registry("gene_expression")
    assert registry["uid"].tolist() == ["g9", "g10", "a", "g1", "z", "b"]
