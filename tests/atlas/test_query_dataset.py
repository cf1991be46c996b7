"""From a query to measurements: sparse fields of all fixtures, panels, AnnData, other processes."""

from __future__ import annotations

import json
import pickle
import shutil
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

from hbx_gpu.atlas._catalog.snapshot import Snapshot
from hbx_gpu.atlas._query import ahead, opening
from hbx_gpu.atlas._query.query import AtlasQuery
from hbx_gpu.batch import SparseBatch
from hbx_gpu.errors import CorruptChunkError, UnknownNameError
from tests.atlas.cases import TABLES, Case
from tests.frames import texts


def dense(batch: SparseBatch) -> np.ndarray:
    out = np.zeros((len(batch), batch.n_features), batch.values.dtype)
    rows = np.repeat(np.arange(len(batch)), np.diff(batch.offsets))
    np.add.at(out, (rows, batch.indices), batch.values)
    return out


def everything(dataset: Any) -> np.ndarray:
    return dense(dataset[np.arange(len(dataset))])


@pytest.fixture(params=TABLES, ids=lambda p: f"{p[0]}-{p[1]}-{p[2]}")
def case(request: pytest.FixtureRequest, homeobox_fixtures: Path) -> Case:
    atlas, *rest = request.param
    return Case(homeobox_fixtures / atlas, *rest)


@pytest.fixture
def ragged(homeobox_fixtures: Path) -> AtlasQuery:
    return AtlasQuery(Snapshot.open(homeobox_fixtures / "ragged_rna" / "atlas"))


def test_every_layer_equals(case: Case) -> None:
    assert case.matrices()
    for name, layer, field in case.matrices():
        dataset = case.query().to_cell_dataset(field_name=name, layer=layer)
        want = case.arrays[f"{name}/{layer}/dense"]
        got = everything(dataset)
        assert got.dtype == want.dtype
        assert np.array_equal(got, want)
        assert dataset.feature_uids.tolist() == field["features_by_global_index"]
        assert dataset.n_features == field["n_features"]
        assert dataset.n_cells == field["n_present"]
        assert np.array_equal(
            dataset.groups_np, case.arrays[f"{name}/group_ids"][case.arrays[f"{name}/present"]]
        )


def test_every_batch_equals(case: Case) -> None:
    for name, layer, field in case.matrices():
        columns = ["batch", "score"] if f"{name}/b0/meta/batch" in case.arrays else None
        dataset = case.query().to_cell_dataset(field_name=name, layer=layer, metadata_columns=columns)
        for entry in field["batches"]:
            key = entry["key"]
            batch: Any = dataset.__getitems__(entry["rows"])
            if f"{key}/{layer}/dense" in case.arrays:
                assert np.array_equal(dense(batch), case.arrays[f"{key}/{layer}/dense"])
                continue
            values = case.arrays[f"{key}/{layer}" if f"{key}/{layer}" in case.arrays else f"{key}/values"]
            assert np.array_equal(batch.indices, case.arrays[f"{key}/indices"])
            assert np.array_equal(batch.offsets, case.arrays[f"{key}/offsets"])
            assert np.array_equal(batch.values, values)
            for column in columns or ():
                assert np.array_equal(batch.metadata[column], case.arrays[f"{key}/meta/{column}"])


def test_text_metadata_through_categories(case: Case) -> None:
    for name, layer, field in case.matrices():
        key = f"{field['batches'][0]['key']}/meta/cell_type"
        if key not in case.arrays:
            frame = case.query().to_arrow().to_pandas()
            if "cell_type" not in frame:
                continue
            want = texts(frame["cell_type"][case.arrays[f"{name}/present"]])
        else:
            want = case.arrays[key].tolist()
        dataset: Any = case.query().to_cell_dataset(
            field_name=name, layer=layer, metadata_columns=["cell_type"]
        )
        codes = dataset[np.arange(len(dataset))].metadata["cell_type"]
        words = dataset.categories["cell_type"]
        assert [None if c < 0 else words[c] for c in codes] == want


def test_queries_equal(case: Case) -> None:
    for query in case.expected["queries"]:
        if query.get("field") not in case.sparse:
            continue
        asked = case.query().where(query.get("where"))
        if "features" in query:
            space, uids = query["features"]
            asked.features(uids, space)
        (layer,) = query.get("layers", ["counts"])
        dataset = asked.to_cell_dataset(field_name=query["field"], layer=layer, metadata_columns=["uid"])
        batch: Any = dataset[np.arange(len(dataset))]
        assert dataset.categories["uid"][batch.metadata["uid"]].tolist() == query["uids"]
        assert dataset.n_features == query["n_features"]
        key = query["key"]
        values = case.arrays[f"{key}/{layer}" if f"{key}/{layer}" in case.arrays else f"{key}/values"]
        assert np.array_equal(batch.offsets, case.arrays[f"{key}/offsets"])
        assert np.array_equal(batch.values, values)
        # Their panels come in ascending global index, ours in the order asked.
        theirs = np.array(query.get("feature_columns", dataset.feature_uids), dtype=object)
        assert np.array_equal(dataset.feature_uids[batch.indices], theirs[case.arrays[f"{key}/indices"]])
        if "features" in query:
            assert dataset.feature_uids.tolist() == query["features"][1]


def test_fragments(homeobox_fixtures: Path) -> None:
    case = Case(homeobox_fixtures / "all_spaces", 0, "cells", "_v0__cells")
    name = "chromatin_accessibility"
    for layer in ("starts", "lengths"):
        dataset = case.query().to_cell_dataset(name, layer)
        batch: Any = dataset[np.arange(len(dataset))]
        assert dataset.feature_uids.tolist() == case.sparse[name]["features_by_global_index"]
        assert np.array_equal(batch.indices, case.arrays[f"{name}/chromosomes"])
        assert np.array_equal(batch.values, case.arrays[f"{name}/{layer}"])
        assert np.array_equal(batch.offsets, case.arrays[f"{name}/offsets"])
    assert case.query().to_cell_dataset(name).layer == "starts"
    with pytest.raises(TypeError, match="not rows of a matrix"):
        case.query().feature_spaces(name).to_anndata()


# Columns


def test_panel_columns_come_in_the_order_asked(ragged: AtlasQuery) -> None:
    whole = ragged.to_cell_dataset()
    full = everything(whole)
    panel = np.random.default_rng(3).permutation(whole.feature_uids)[:9].tolist()
    dataset = ragged.features(panel, "gene_expression").to_cell_dataset()
    position = {uid: i for i, uid in enumerate(whole.feature_uids)}
    assert dataset.feature_uids.tolist() == panel
    assert np.array_equal(everything(dataset), full[:, [position[uid] for uid in panel]])
    back = ragged.features(panel[::-1], "gene_expression").to_cell_dataset()
    assert np.array_equal(everything(back), everything(dataset)[:, ::-1])
    nothing = ragged.features([], "gene_expression").to_cell_dataset()
    assert everything(nothing).shape == (70, 0)


def test_sources_share_what_they_can(ragged: AtlasQuery) -> None:
    snapshot = ragged.selection.snapshot
    sources = ragged.to_cell_dataset()._sources
    assert [s.name for s in sources] == [f"set{i}/gene_expression" for i in range(3)]
    for source in sources:
        assert source.remap is snapshot.remap(source.name, "gene_expression")
        assert set(source.layers) == {"counts"}
        assert source.index is not None
        assert source.index.absent_is_fill
    only = ragged.where("gene_expression.zarr_group = 'set1/gene_expression'").to_cell_dataset()
    assert [s.name for s in only._sources] == ["set1/gene_expression"]
    assert only.n_features == 58
    assert (only.groups_np == 0).all()


def test_a_deleted_feature_never_lands_in_another_column(homeobox_fixtures: Path, tmp_path: Path) -> None:
    root = Path(shutil.copytree(homeobox_fixtures / "single_rna" / "atlas", tmp_path / "atlas"))
    before = AtlasQuery(Snapshot.open(root)).to_cell_dataset()
    full, uids = everything(before), before.feature_uids
    # One that is measured.
    gone = int(Snapshot.open(root).remap("d0/rna", "gene_expression")[0])
    assert full[:, gone].any()
    database = lancedb.connect(str(root / "lance_db"))
    database.open_table("gene_registry").delete(f"uid = '{uids[gone]}'")
    version = database.open_table("gene_registry").version
    database.open_table("atlas_versions").update(
        values={"registry_table_versions": json.dumps({"gene_expression": version})}
    )
    query = AtlasQuery(Snapshot.open(root))
    kept = np.arange(len(uids)) != gone
    after = query.to_cell_dataset()
    assert after.feature_uids[gone] is None
    assert np.array_equal(everything(after), np.where(kept, full, 0))
    panel = [35, 0, 34]
    some = query.features(uids[panel].tolist(), "gene_expression").to_cell_dataset()
    assert np.array_equal(everything(some), full[:, panel])


def test_missing_objects_are_damage_where_we_wrote_them(homeobox_fixtures: Path, tmp_path: Path) -> None:
    root = Path(shutil.copytree(homeobox_fixtures / "single_rna" / "atlas", tmp_path / "atlas"))
    shard = next(p for p in (root / "zarr_store/d0/rna/csr/layers/counts/c").rglob("*") if p.is_file())
    shard.unlink()
    assert (everything(AtlasQuery(Snapshot.open(root)).to_cell_dataset()) == 0).all()

    database = lancedb.connect(str(root / "lance_db"))
    rows = database.open_table("datasets").to_arrow()
    ours = rows.append_column("software", pa.array(["hbx_gpu 0.1.0"] * len(rows)))
    table = database.create_table("datasets", ours, mode="overwrite")
    database.open_table("atlas_versions").update(values={"dataset_table_version": table.version})
    with pytest.raises(CorruptChunkError, match="d0/rna/csr/layers/counts"):
        AtlasQuery(Snapshot.open(root)).to_cell_dataset()


def test_a_layer_that_one_group_lacks(homeobox_fixtures: Path, tmp_path: Path) -> None:
    root = Path(shutil.copytree(homeobox_fixtures / "ragged_rna" / "atlas", tmp_path / "atlas"))
    shutil.rmtree(root / "zarr_store/set1/gene_expression/csr/layers/log_normalized")
    query = AtlasQuery(Snapshot.open(root))
    with pytest.raises(
        KeyError,
        match=r"group 'set1/gene_expression' has no layer 'log_normalized'; its layers: \['counts'\]",
    ):
        query.to_cell_dataset(layer="log_normalized")
    there = query.where("gene_expression.zarr_group <> 'set1/gene_expression'")
    assert len(there.to_cell_dataset(layer="log_normalized")) == 53


def test_groups_are_opened_while_rows_are_read(
    homeobox_fixtures: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    root = Path(shutil.copytree(homeobox_fixtures / "ragged_rna" / "atlas", tmp_path / "atlas"))
    plain = AtlasQuery(Snapshot.open(root)).to_cell_dataset()
    opened: list[tuple[bool, str]] = []
    real = opening.arrays_of

    def note(snapshot: Any, group: Any, *rest: Any) -> Any:
        opened.append((threading.current_thread() is threading.main_thread(), group.name))
        return real(snapshot, group, *rest)

    monkeypatch.setattr(ahead, "_WORTH_A_THREAD", 1)
    for module in (ahead, opening):
        monkeypatch.setattr(module, "arrays_of", note)
    query = AtlasQuery(Snapshot.open(root))
    found = query.to_cell_dataset()
    assert [main for main, _ in opened] == [False] * len(plain.sources)
    assert found.identity() == plain.identity()
    assert np.array_equal(everything(found), everything(plain))

    # A group that no cell of the query needs may be damaged.
    shutil.rmtree(root / "zarr_store/set1/gene_expression/csr/layers/counts")
    with pytest.raises(UnknownNameError, match="group 'set1/gene_expression' has no layer 'counts'"):
        AtlasQuery(Snapshot.open(root)).to_cell_dataset()
    opened.clear()
    there = query.where("gene_expression.zarr_group <> 'set1/gene_expression'")
    assert len(there.to_cell_dataset()) == 53
    assert all(main for main, _ in opened)


# Other processes


def test_recipe_gives_the_same_rows(ragged: AtlasQuery) -> None:
    panel = ["ENSG54134", "ENSG15281", "AAA22282"]
    ragged.where("batch < 5").features(panel, "gene_expression").balanced_limit(17, "donor")
    dataset = ragged.to_cell_dataset(layer="log_normalized", metadata_columns=["uid", "age", "quality"])
    again = pickle.loads(pickle.dumps(dataset._recipe)).rebuild()
    ragged.where(None).limit(None)  # changing the query later changes neither
    assert again.feature_uids.tolist() == panel
    a: Any = dataset[np.arange(17)]
    b: Any = again[np.arange(17)]
    assert np.array_equal(a.values, b.values)
    assert np.array_equal(a.indices, b.indices)
    for name in ("uid", "age", "quality"):
        assert np.array_equal(a.metadata[name], b.metadata[name], equal_nan=True)
    assert again._recipe == dataset._recipe


def test_recipe_is_pinned_to_its_snapshot(homeobox_fixtures: Path) -> None:
    old: Any = AtlasQuery(Snapshot.open(homeobox_fixtures / "ragged_rna" / "atlas", 0)).to_cell_dataset()
    again = old._recipe.rebuild()
    assert (again.n_cells, again.n_features) == (40, 50)


# AnnData


def by_uid(adata: anndata.AnnData, layer: str | None = None) -> pd.DataFrame:
    matrix = adata.X if layer is None else adata.layers[layer]
    return pd.DataFrame(matrix.toarray(), adata.obs_names, adata.var_names)


def test_anndata_equals(case: Case) -> None:
    for name, layer, field in case.matrices():
        space = field["feature_space"]
        adata = case.query().select_fields(name).layers(space, [layer]).to_anndata()
        here = case.arrays[f"{name}/present"]
        assert adata.obs_names.tolist() == case.arrays["uid"][here].tolist()
        want = pd.DataFrame(
            case.arrays[f"{name}/{layer}/dense"], adata.obs_names, field["features_by_global_index"]
        )
        assert isinstance(adata.X, sp.csr_matrix)
        assert adata.X.dtype == want.to_numpy().dtype
        measured = {int(i) for group in field["groups"] for i in case.snapshot.remap(group, space)}
        columns = [uid for i, uid in enumerate(field["features_by_global_index"]) if i in measured]
        assert adata.var_names.tolist() == columns
        assert np.array_equal(by_uid(adata), want[columns])
        assert not want.drop(columns=columns).to_numpy().any()
        assert "uid" not in adata.obs
        assert not set(case.snapshot.pointer_fields(case.table)) & set(adata.obs.columns)
        assert "global_index" in adata.var


def test_anndata_columns(ragged: AtlasQuery) -> None:
    groups = [
        set(ragged.selection.snapshot.remap(f"set{i}/gene_expression", "gene_expression").tolist())
        for i in range(3)
    ]
    names = ragged.selection.snapshot.registry("gene_expression").uids
    union = ragged.to_anndata()
    both = ragged.feature_join("intersection").to_anndata()
    assert union.var_names.tolist() == names[sorted(set.union(*groups))].tolist()
    assert both.var_names.tolist() == names[sorted(set.intersection(*groups))].tolist()
    assert 0 < both.n_vars < union.n_vars
    assert np.array_equal(by_uid(both), by_uid(union)[both.var_names])
    one = ragged.where("gene_expression.zarr_group = 'set2/gene_expression'").to_anndata()
    assert one.var_names.tolist() == names[sorted(groups[2])].tolist()
    panel = ["ENSG54134", "AAA22282", "ENSG15281"]
    chosen = ragged.where(None).features(panel, "gene_expression").to_anndata()
    assert chosen.var_names.tolist() == panel
    assert chosen.var["global_index"].tolist() == [names.tolist().index(uid) for uid in panel]


def test_anndata_layers_and_obs(ragged: AtlasQuery, tmp_path: Path) -> None:
    adata = ragged.layers("gene_expression", ["log_normalized", "counts"]).limit(30).to_anndata()
    assert [name for name in adata.layers if name is not None] == ["counts"]  # None: X, since anndata 0.13
    assert adata.X.dtype == np.float32
    assert adata.layers["counts"].dtype == np.uint32
    assert np.array_equal((by_uid(adata) != 0), (by_uid(adata, "counts") != 0))
    picked = ragged.select(["donor", "uid"]).to_anndata()
    assert picked.obs.columns.tolist() == ["donor"]
    assert picked.obs.donor.tolist() == adata.obs.donor.tolist()
    frame = ragged.select(["donor", "is_doublet", "quality", "age", "cell_type"]).to_anndata()
    frame.write_h5ad(tmp_path / "a.h5ad")
    back = anndata.read_h5ad(tmp_path / "a.h5ad")
    assert back.obs_names.tolist() == frame.obs_names.tolist()
    assert np.array_equal(back.X.toarray(), frame.X.toarray())


def test_batches_are_slices_of_the_whole(ragged: AtlasQuery, monkeypatch: pytest.MonkeyPatch) -> None:
    ragged.where("donor = 'P1'")
    whole = ragged.to_anndata()
    pieces = list(ragged.to_batches(10))
    assert [len(piece) for piece in pieces] == [10, 10, 8]
    assert all(piece.var_names.equals(whole.var_names) for piece in pieces)
    together = anndata.concat(pieces)
    assert together.obs_names.tolist() == whole.obs_names.tolist()
    assert np.array_equal(together.X.toarray(), whole.X.toarray())
    # Reading in small blocks changes nothing.
    monkeypatch.setattr("hbx_gpu.atlas._query.matrices._BLOCK_ELEMENTS", 3 * whole.n_vars)
    assert (ragged.to_anndata().X != whole.X).nnz == 0


@pytest.mark.filterwarnings("ignore:this query selects no cells")
def test_empty_results(ragged: AtlasQuery) -> None:
    ragged.where("donor = 'nobody'")
    assert len(ragged.to_cell_dataset(metadata_columns=["donor"])) == 0
    assert ragged.to_anndata().shape == (0, 0)
    assert ragged.features(["ENSG54134"], "gene_expression").to_anndata().shape == (0, 1)
    assert list(ragged.to_batches()) == []


def test_anndata_refusals(homeobox_fixtures: Path) -> None:
    tiles = AtlasQuery(Snapshot.open(homeobox_fixtures / "image_tiles" / "atlas"))
    with pytest.raises(TypeError, match=r"to_cell_dataset\(field_name="):
        tiles.to_anndata()
    spaces = AtlasQuery(Snapshot.open(homeobox_fixtures / "all_spaces" / "atlas"), "cells")
    with pytest.raises(ValueError, match="exactly one AnnData-capable pointer field"):
        spaces.to_anndata()
    assert spaces.feature_spaces("gene_expression").to_anndata().shape == (14, 16)
