"""Opening atlases of every generation: versions, stores, groups, registries, remaps, and refusals."""

from __future__ import annotations

import json
import logging
import os
import shutil
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import lancedb
import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.compute as pc
import pytest

from hbx_gpu.atlas._catalog.registry import Registry
from hbx_gpu.atlas._catalog.snapshot import PointerColumn, Snapshot, list_versions
from hbx_gpu.atlas._catalog.snapshot_records import read_records
from hbx_gpu.atlas._model.spaces import (
    FeatureSpace,
    find_layers,
    get_space,
    guess_space,
    known_spaces,
    register_space,
)
from hbx_gpu.errors import AtlasError, UnknownNameError

ATLASES = [
    "all_spaces",
    "cite_multimodal",
    "image_tiles",
    "legacy_0_2_3",
    "missing_shards",
    "ragged_rna",
    "seed_2026_05",
    "single_rna",
    "uid_collision",
]


@pytest.fixture
def copied(homeobox_fixtures: Path, tmp_path: Path) -> Callable[[str], Path]:
    def copy(name: str) -> Path:
        return Path(shutil.copytree(homeobox_fixtures / name / "atlas", tmp_path / "moved here" / name))

    return copy


def rewrite(root: Path, table: str, change: Callable[[pa.Table], pa.Table]) -> None:
    """Replace a table's rows and let all snapshots of the atlas point to the new version."""
    database = lancedb.connect(str(root / "lance_db"))
    new = change(database.open_table(table).to_arrow())
    version = database.create_table(table, new, mode="overwrite").version
    records = database.open_table("atlas_versions").to_arrow().to_pylist()
    for row in records:
        row["registry_table_versions"] = json.dumps(
            {
                space: version if json.loads(row["registry_table_names"])[space] == table else old
                for space, old in json.loads(row["registry_table_versions"]).items()
            }
        )
        if table == "_feature_layouts":
            row["feature_layouts_table_version"] = version
        if table == row["dataset_table_name"]:
            row["dataset_table_version"] = version
    database.create_table("atlas_versions", pa.Table.from_pylist(records), mode="overwrite")


def expected(homeobox_fixtures: Path, name: str) -> dict[str, Any]:
    result: dict[str, Any] = json.loads((homeobox_fixtures / name / "expected.json").read_text())
    return result


@pytest.mark.parametrize("name", ATLASES)
def test_every_snapshot_opens(homeobox_fixtures: Path, name: str) -> None:
    root = homeobox_fixtures / name / "atlas"
    wanted = expected(homeobox_fixtures, name)["versions"]
    assert list_versions(root)["version"].tolist() == [v["version"] for v in wanted]
    assert Snapshot.open(root).version == wanted[-1]["version"]
    for version in wanted:
        snapshot = Snapshot.open(root / "lance_db", version["version"])
        assert snapshot.path == root
        assert snapshot.store_path == root / "zarr_store"
        assert snapshot.obs_tables == sorted(version["tables"])
        for table, content in version["tables"].items():
            pointers = snapshot.pointer_fields(table)
            assert {n: p.feature_space for n, p in pointers.items()} == {
                n: f["feature_space"] for n, f in content["fields"].items()
            }
            for field in content["fields"].values():
                if "features_by_global_index" in field:
                    registry = snapshot.registry(field["feature_space"])
                    assert registry.uids.tolist() == field["features_by_global_index"]
                    assert registry.n_features == field["n_features"]


def test_versions_have_the_same_columns_for_all_generations(homeobox_fixtures: Path) -> None:
    frames = {name: list_versions(homeobox_fixtures / name / "atlas") for name in ATLASES}
    assert {tuple(frame.columns) for frame in frames.values()} == {
        ("version", "created_at", "total_rows", "obs_tables", "feature_spaces")
    }
    assert frames["legacy_0_2_3"].total_rows.tolist() == [32]
    assert frames["ragged_rna"].total_rows.tolist() == [40, 70]
    assert frames["all_spaces"].obs_tables.tolist() == [["cells", "spots"]]
    assert all(pd.Timestamp(t).year == 2026 for frame in frames.values() for t in frame.created_at)


@pytest.mark.parametrize("name", ["legacy_0_2_3", "ragged_rna"])
def test_moved_read_only_atlas_opens_and_nothing_is_written(copied: Callable[..., Any], name: str) -> None:
    root = copied(name)

    def content() -> list[tuple[str, int, int]]:
        return sorted((str(p), p.stat().st_mtime_ns, p.stat().st_size) for p in root.rglob("*"))

    for path in [root, *root.rglob("*")]:
        path.chmod(0o555 if path.is_dir() else 0o444)
    before = content()
    snapshot = Snapshot.open(root)
    assert snapshot.store_path == root / "zarr_store"
    assert snapshot.obs_table("cells").count_rows() == snapshot.record.total_rows
    snapshot.datasets()
    for group, space in snapshot._group_records():
        snapshot.remap(group, space)
    list_versions(root)
    assert content() == before
    for path in [root, *root.rglob("*")]:
        path.chmod(0o755 if path.is_dir() else 0o644)


def test_datasets_have_normalized_columns(homeobox_fixtures: Path) -> None:
    for name in ATLASES:
        frame = Snapshot.open(homeobox_fixtures / name / "atlas").datasets()
        assert {"dataset_uid", "zarr_group", "feature_space", "layout_uid", "n_rows"} <= set(frame.columns)
        assert "n_cells" not in frame.columns


# The store


def test_store_given_by_path_or_object(copied: Callable[..., Any]) -> None:
    root = copied("single_rna")
    moved = root.parent / "elsewhere"
    (root / "zarr_store").rename(moved)
    for store in (moved, str(moved), f"file://{moved}", SimpleNamespace(root=moved)):
        assert Snapshot.open(root, store=store).store_path == moved
    # As zarr's ObjectStore around an obstore LocalStore.
    wrapped = SimpleNamespace(store=SimpleNamespace(prefix=str(moved)))
    assert Snapshot.open(root, store=wrapped).store_path == moved
    with pytest.raises(FileNotFoundError, match=r"no zarr store .* pass its path as store="):
        Snapshot.open(root)
    with pytest.raises(FileNotFoundError, match="not a directory"):
        Snapshot.open(root, store=root / "nothing")
    with pytest.raises(AtlasError, match="cannot tell where"):
        Snapshot.open(root, store=object())
    with pytest.raises(AtlasError, match="scheme 'ftp'"):
        Snapshot.open(root, store="ftp://server/zarr_store")


def test_recorded_store_is_the_last_resort(copied: Callable[..., Any]) -> None:
    root = copied("legacy_0_2_3")
    moved = root.parent / "recorded store"
    (root / "zarr_store").rename(moved)
    database = lancedb.connect(str(root / "lance_db"))
    database.open_table("atlas_versions").update(values={"zarr_store_uri": moved.as_uri()})
    assert Snapshot.open(root).store_path == moved
    (root / "zarr_store").mkdir()
    assert Snapshot.open(root).store_path == root / "zarr_store"


# Refusals


def test_no_atlas(tmp_path: Path) -> None:
    for path in (tmp_path / "nothing", tmp_path):
        with pytest.raises(FileNotFoundError, match="No atlas found at"):
            Snapshot.open(path)
        with pytest.raises(FileNotFoundError, match="No atlas found at"):
            list_versions(path)
    assert list(tmp_path.iterdir()) == []


def test_no_snapshots(tmp_path: Path, copied: Callable[..., Any]) -> None:
    (tmp_path / "lance_db").mkdir()
    assert list_versions(tmp_path).empty
    with pytest.raises(ValueError, match="No snapshots found"):
        Snapshot.open(tmp_path)
    root = copied("single_rna")
    lancedb.connect(str(root / "lance_db")).open_table("atlas_versions").delete("true")
    with pytest.raises(ValueError, match="No snapshots found"):
        Snapshot.open(root)


def test_unknown_version(homeobox_fixtures: Path) -> None:
    with pytest.raises(ValueError, match=r"version 99 not found .*available: \[0, 1\]"):
        Snapshot.open(homeobox_fixtures / "ragged_rna" / "atlas", 99)


def test_address_of_an_unknown_scheme() -> None:
    with pytest.raises(AtlasError, match="scheme 'ftp'"):
        Snapshot.open("ftp://server/atlas")


@pytest.mark.filterwarnings("ignore:optimize.cleanup_older_than=0")
def test_cleaned_up_table_version_is_named(copied: Callable[..., Any]) -> None:
    root = copied("ragged_rna")
    database = lancedb.connect(str(root / "lance_db"))
    database.open_table("gene_registry").optimize(cleanup_older_than=timedelta(0), delete_unverified=True)
    with pytest.raises(AtlasError, match=r"snapshot 0 .* version 4 of table 'gene_registry'"):
        Snapshot.open(root, 0)


def test_missing_table_is_named(copied: Callable[..., Any]) -> None:
    root = copied("single_rna")
    shutil.rmtree(root / "lance_db" / "gene_registry.lance")
    with pytest.raises(AtlasError, match="'gene_registry'"):
        Snapshot.open(root)


def test_record_of_unknown_generation(copied: Callable[..., Any]) -> None:
    root = copied("single_rna")
    database = lancedb.connect(str(root / "lance_db"))
    database.create_table("atlas_versions", pa.table({"version": [0], "what": ["x"]}), mode="overwrite")
    with pytest.raises(
        AtlasError, match=r"not a snapshot record of a known generation.*\['version', 'what'\]"
    ):
        Snapshot.open(root)


def test_which_obs_table(homeobox_fixtures: Path) -> None:
    snapshot = Snapshot.open(homeobox_fixtures / "all_spaces" / "atlas")
    with pytest.raises(ValueError, match=r"multiple obs tables \(\['cells', 'spots'\]\)"):
        snapshot.obs_table()
    with pytest.raises(UnknownNameError, match=r"no obs table 'beads'.*\['cells', 'spots'\]"):
        snapshot.obs_table("beads")
    assert snapshot.pointer_fields("spots") == {"rna": PointerColumn("rna", "gene_expression", "sparse")}


def test_unknown_space_and_group(homeobox_fixtures: Path) -> None:
    snapshot = Snapshot.open(homeobox_fixtures / "single_rna" / "atlas")
    with pytest.raises(UnknownNameError, match=r"'protein_abundance' has no registry.*\['gene_expression'\]"):
        snapshot.registry("protein_abundance")
    with pytest.raises(AtlasError, match="lists no group 'd9/rna'"):
        snapshot.remap("d9/rna", "gene_expression")


def test_records_name_all_pinned_versions(homeobox_fixtures: Path) -> None:
    first, second = read_records(homeobox_fixtures / "ragged_rna" / "atlas")
    assert first.pinned == {"cells": {5}, "datasets": {5}, "gene_registry": {4}, "_feature_layouts": {9}}
    assert second.pinned == {"cells": {8}, "datasets": {8}, "gene_registry": {9}, "_feature_layouts": {16}}


# Remaps and registries


@pytest.mark.parametrize("name", ATLASES)
def test_remaps_agree_with_uids(homeobox_fixtures: Path, name: str) -> None:
    snapshot = Snapshot.open(homeobox_fixtures / name / "atlas")
    layouts = snapshot._open_table("_feature_layouts", snapshot.record.layouts_version).to_arrow()
    for row in snapshot.datasets().itertuples():
        remap = snapshot.remap(row.zarr_group, row.feature_space)
        assert remap.dtype == np.int32
        if not row.layout_uid:
            assert remap.size == 0
            continue
        mine = layouts.filter(pc.equal(layouts["layout_uid"], row.layout_uid)).sort_by("local_index")
        uids = snapshot.registry(row.feature_space).uids
        assert uids[remap].tolist() == mine["feature_uid"].to_pylist()


def test_shared_uids_resolve_in_their_own_space(
    homeobox_fixtures: Path, caplog: pytest.LogCaptureFixture
) -> None:
    snapshot = Snapshot.open(homeobox_fixtures / "uid_collision" / "atlas")
    with caplog.at_level(logging.WARNING):
        remap = snapshot.remap("g/adt", "protein_abundance")
    assert sorted(remap) == [0, 1, 2, 3]
    assert "the global indices stored in '_feature_layouts' differ" in caplog.text
    caplog.clear()
    snapshot.remap("g/rna", "gene_expression")
    assert not caplog.records


def test_groups_of_one_layout_share_the_array(copied: Callable[..., Any]) -> None:
    root = copied("ragged_rna")

    def same_layout(table: pa.Table) -> pa.Table:
        uid = table["layout_uid"][0].as_py()
        return table.set_column(
            table.schema.get_field_index("layout_uid"), table.schema.field("layout_uid"), [[uid] * len(table)]
        )

    rewrite(root, "datasets", same_layout)
    snapshot = Snapshot.open(root)
    first, second = (snapshot.remap(f"set{i}/gene_expression", "gene_expression") for i in (0, 1))
    assert first is second
    with pytest.raises(ValueError, match="read-only"):
        first[0] = 3


def test_later_features_do_not_change_an_earlier_snapshot(homeobox_fixtures: Path) -> None:
    root = homeobox_fixtures / "ragged_rna" / "atlas"
    old, new = Snapshot.open(root, 0), Snapshot.open(root, 1)
    assert (old.registry("gene_expression").n_features, new.registry("gene_expression").n_features) == (
        50,
        58,
    )
    for group in ("set0/gene_expression", "set1/gene_expression"):
        assert np.array_equal(old.remap(group, "gene_expression"), new.remap(group, "gene_expression"))


def test_deleted_features_leave_a_hole(copied: Callable[..., Any], caplog: pytest.LogCaptureFixture) -> None:
    root = copied("single_rna")
    before = Snapshot.open(root)
    gone, local = before.registry("gene_expression").uids[2], before.remap("d0/rna", "gene_expression")
    rewrite(root, "gene_registry", lambda t: t.filter(pc.not_equal(t["uid"], gone)))
    after = Snapshot.open(root)
    registry = after.registry("gene_expression")
    assert registry.n_features == 36
    assert registry.uids[2] is None
    assert len(registry.frame) == 35
    with caplog.at_level(logging.WARNING):
        remap = after.remap("d0/rna", "gene_expression")
    assert np.array_equal(remap, np.where(local == 2, -1, local))
    assert gone in caplog.text
    assert registry.resolve([registry.uids[35], registry.uids[0]]).tolist() == [35, 0]
    with pytest.raises(ValueError, match=rf"2 UID\(s\) not found in registry. First 5: \['{gone}', 'nope'\]"):
        registry.resolve([gone, "nope", registry.uids[0]])


def test_incomplete_layout(copied: Callable[..., Any]) -> None:
    root = copied("single_rna")
    rewrite(root, "_feature_layouts", lambda t: t.filter(pc.not_equal(t["local_index"], 4)))
    with pytest.raises(AtlasError, match=r"group 'd0/rna'.*expected local indices 0 \.\. m-1.*29 rows"):
        Snapshot.open(root).remap("d0/rna", "gene_expression")
    rewrite(root, "_feature_layouts", lambda t: t.slice(0, 0))
    with pytest.raises(AtlasError, match="found 0 rows"):
        Snapshot.open(root).remap("d0/rna", "gene_expression")


@pytest.mark.parametrize(
    ("uids", "index", "reason"),
    [
        (["a", "b"], [0, None], "1 feature.s. without a global_index"),
        (["a", "b"], [1, 1], "repeated values"),
        (["a", "b"], [-1, 0], "negative"),
        (["a", "a"], [0, 1], "more than once"),
    ],
)
def test_contradictory_registry(uids: list[Any], index: list[Any], reason: str) -> None:
    table = pa.table({"uid": uids, "global_index": pa.array(index, pa.int64())})
    with pytest.raises(AtlasError, match=reason):
        Registry.from_table("s", table, name="s_registry")


def test_registry_is_sorted_by_index_not_by_uid_or_row() -> None:
    table = pa.table({"uid": ["c", "a", "b"], "global_index": [2, 1, 0], "name": ["C", "A", "B"]})
    registry = Registry.from_table("s", table, name="s_registry")
    assert registry.uids.tolist() == ["b", "a", "c"]
    assert registry.frame["name"].tolist() == ["B", "A", "C"]
    assert registry.find(pa.array(["a", "x", None, "c"])).tolist() == [1, -1, -1, 2]


# Feature spaces


def test_layers_that_groups_hold(homeobox_fixtures: Path) -> None:
    tiles, fragments = get_space("image_tiles"), get_space("chromatin_accessibility")
    store = homeobox_fixtures / "legacy_0_2_3" / "atlas" / "zarr_store"
    assert find_layers(store / "one" / "tiles", tiles) == {"raw": "data"}
    store = homeobox_fixtures / "all_spaces" / "atlas" / "zarr_store"
    assert find_layers(store / "mix" / "tiles_a", tiles) == {"raw": "layers/raw"}
    assert find_layers(store / "atac" / "frag", fragments) == {
        "starts": "cell_sorted/layers/starts",
        "lengths": "cell_sorted/layers/lengths",
    }
    assert find_layers(store / "nothing", tiles) == {}


def test_fragments_of_early_releases(tmp_path: Path) -> None:
    for name in ("chromosomes", "starts", "lengths"):
        (tmp_path / "cell_sorted" / name).mkdir(parents=True)
        (tmp_path / "cell_sorted" / name / "zarr.json").write_text("{}")
    assert find_layers(tmp_path, get_space("chromatin_accessibility")) == {
        "starts": "cell_sorted/starts",
        "lengths": "cell_sorted/lengths",
    }


def test_unknown_space_is_guessed_from_its_group(homeobox_fixtures: Path, tmp_path: Path) -> None:
    store = homeobox_fixtures / "cite_multimodal" / "atlas" / "zarr_store"
    sparse = guess_space("mine", store / "cite" / "rna")
    assert (sparse.pointer, sparse.index_array) == ("sparse", "csr/indices")
    assert find_layers(store / "cite" / "rna", sparse) == {"counts": "csr/layers/counts"}
    assert guess_space("mine", store / "cite" / "adt").pointer == "dense"
    with pytest.raises(AtlasError, match="neither csr/indices nor layers"):
        guess_space("mine", tmp_path)


def test_registering_spaces(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("hbx_gpu.atlas._model.spaces._SPACES", {})
    assert known_spaces() == []
    with pytest.raises(UnknownNameError, match="unknown feature space 'mine'"):
        get_space("mine")
    space = FeatureSpace("mine", "dense", None, "layers")
    register_space(space)
    register_space(FeatureSpace("mine", "dense", None, "layers"))
    assert get_space("mine") is space
    with pytest.raises(ValueError, match="already registered"):
        register_space(FeatureSpace("mine", "sparse", "csr/indices", "csr/layers"))
    with pytest.raises(ValueError, match="needs index_array"):
        FeatureSpace("other", "sparse", None, "layers")


def test_relative_path_is_kept_absolute(homeobox_fixtures: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(homeobox_fixtures / "single_rna")
    assert Snapshot.open("atlas").path == Path(os.getcwd()) / "atlas"
