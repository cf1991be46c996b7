"""Repack puts the elements of each row in the order of the registry, so that no reader has to sort them."""

from __future__ import annotations

import json
import shutil
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import anndata
import numpy as np
import pandas as pd
import pytest
import scipy.sparse as sp
import zarr

from hbx_gpu import cli
from hbx_gpu._engine.host import canonical
from hbx_gpu.atlas import RaggedAtlas, create_or_open_atlas, repack
from hbx_gpu.atlas._catalog.snapshot import Snapshot
from hbx_gpu.atlas._catalog.snapshot_records import read_records
from hbx_gpu.atlas._ingest.parts import MatrixPart
from hbx_gpu.atlas._upkeep import ordered_rows
from hbx_gpu.dataloader import SparseBatch, make_loader
from hbx_gpu.errors import CorruptChunkError
from tests.atlas.dying import die_at, killed

ROWPACK, HOMEOBOX = "hbx_gpu.rowpack", "homeobox.bitpacking"
GENES = "abcdefghijkl"


def shuffled(n: int, seed: int) -> anndata.AnnData:
    """Genes in an order of their own, some cells without any value."""
    rng = np.random.default_rng(seed)
    dense = rng.integers(1, 9, (n, len(GENES))) * (rng.random((n, len(GENES))) < 0.6)
    dense[::7] = 0
    names = rng.permutation(list(GENES))
    obs = pd.DataFrame(index=[f"s{seed}c{i}" for i in range(n)])
    return anndata.AnnData(sp.csr_matrix(dense.astype("f4")), obs=obs, var=pd.DataFrame(index=names))


def add_layer(group: Path) -> None:
    """A second layer, of floats, in the group of a dataset."""
    counts = zarr.open_array(group / "csr/layers/counts", mode="r")
    checked = [zarr.codecs.ZstdCodec(), zarr.codecs.Crc32cCodec()]
    floats: Any = {"dtype": "float32", "chunks": (32,), "shards": (64,), "compressors": checked}
    values = np.asarray(counts[:], "f4") / 2
    zarr.create_array(group / "csr/layers/tpm", shape=counts.shape, **floats)[:] = values


@pytest.fixture(scope="module")
def template(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """As Homeobox would leave it: three datasets, two of one layout, each in the gene order of its file."""
    root = tmp_path_factory.mktemp("template") / "a"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(MatrixPart, "order_features", lambda *_: None)
        made = create_or_open_atlas(root, codec=HOMEOBOX)
        for seed, n in enumerate((50, 40, 30)):
            data = shuffled(n, min(seed, 1))
            data.obs_names = [f"{name}_{seed}" for name in data.obs_names]
            made.add_from_anndata(data, chunk_shape=32, shard_shape=64)
            made.optimize()
            made.snapshot()
    for row in made.catalog.dataset_rows():
        add_layer(root / "zarr_store" / row["zarr_group"])
    return root


@pytest.fixture
def atlas(template: Path, tmp_path: Path) -> Path:
    return shutil.copytree(template, tmp_path / "a")


def rows(root: Path, version: int | None = None, layer: str = "counts") -> tuple[np.ndarray, bool]:
    """The matrix of a snapshot, and whether the columns of every row ascend as they are stored."""
    made = RaggedAtlas.checkout(root, version).query().to_cell_dataset("gene_expression", layer=layer)
    batch = made[np.arange(len(made))]
    assert isinstance(batch, SparseBatch)
    csr = sp.csr_matrix((batch.values, batch.indices, batch.offsets), shape=(len(made), made.n_features))
    return csr.toarray(), bool(csr.has_sorted_indices)


def everything(root: Path) -> list[Any]:
    """What the snapshots say: matrices of both layers, obs and genes."""
    out: list[Any] = []
    for record in read_records(root):
        found = RaggedAtlas.checkout(root, record.version).query().to_anndata()
        matrices = [rows(root, record.version, layer)[0].tolist() for layer in ("counts", "tpm")]
        out.append((matrices, found.obs.to_dict(), list(found.var_names)))
    return out


@pytest.mark.parametrize("codec", [None, ROWPACK, "zstd"])
def test_every_snapshot_reads_the_same_in_order(atlas: Path, codec: str | None) -> None:
    before = everything(atlas)
    assert not rows(atlas)[1]
    report = repack(atlas, codec, order_features=True)
    assert [(group.outcome, group.order) for group in report.groups][1:] == [("repacked", "ordered")] * 2
    assert report.codec == (codec or HOMEOBOX)
    assert everything(atlas) == before
    assert all(rows(atlas, record.version)[1] for record in read_records(atlas))
    again = repack(atlas, codec, order_features=True)
    assert {(group.outcome, group.order) for group in again.groups} == {("unchanged", "in order before")}
    repack(atlas, ROWPACK)  # keeps the order
    assert rows(atlas)[1]
    assert {group.outcome for group in repack(atlas, ROWPACK).groups} == {"unchanged"}
    assert everything(atlas) == before
    assert cli.main(["verify", str(atlas)]) == 0


def test_a_loader_tells_what_sorting_takes(atlas: Path) -> None:
    """The user sees that rows are sorted, and no longer once they are stored in order."""

    def told() -> str:
        dataset = RaggedAtlas.checkout_latest(atlas).query().to_cell_dataset("gene_expression")
        loader = make_loader(dataset, batch_size=16, layout="csr")
        for epoch in range(2):  # the first one warms up
            loader.set_epoch(epoch)
            assert sum(len(batch["X"]) for batch in loader) == 120
        return str(loader.stats())

    assert " sort " in told()
    repack(atlas, order_features=True)
    assert " sort " not in told()


def test_by_default_rows_keep_their_order(atlas: Path) -> None:
    repack(atlas, ROWPACK)
    assert not rows(atlas)[1]
    with pytest.raises(ValueError, match="nothing to do: pass codec="):
        repack(atlas)


def test_what_ingest_ordered_is_not_written_again(tmp_path: Path) -> None:
    made = create_or_open_atlas(tmp_path / "a")
    for seed in range(2):
        made.add_from_anndata(shuffled(20, seed))
    made.optimize()
    made.snapshot()
    made.add_from_anndata(shuffled(20, 2))
    report = repack(tmp_path / "a", order_features=True)
    assert {group.outcome for group in report.groups} == {"unchanged"}
    kept = "order kept: its genes have no numbers before the next snapshot"
    assert sorted(group.order for group in report.groups) == ["in order before"] * 2 + [kept]


def test_rows_of_an_ordered_layout_may_be_unsorted(atlas: Path) -> None:
    """The index then ascends within each row, and is stored as differences like any other."""
    before = everything(atlas)
    made: Any = RaggedAtlas.checkout_latest(atlas).query().to_cell_dataset("gene_expression")
    source, index = made._sources[0], made.row_index
    assert (np.diff(source.remap) > 0).all()
    group = Path(source.index.path).parent
    for path in (group / "indices", group / "layers/counts", group / "layers/tpm"):
        array: Any = zarr.open_array(path, mode="a")
        values = array[:]
        for start, length in zip(index.start[:50], index.length[:50], strict=True):
            values[start : start + length] = values[start : start + length][::-1]
        array[:] = values
    assert everything(atlas) == before
    assert {group.order for group in repack(atlas, order_features=True).groups} == {"ordered"}
    assert everything(atlas) == before
    assert rows(atlas)[1]
    document = json.loads((group / "indices/zarr.json").read_text())
    assert document["attributes"]["hbx_gpu"]["row_order"] == "layout"
    packed = document["codecs"][0]["configuration"]["codecs"][1]
    assert packed == {"name": HOMEOBOX, "configuration": {"transform": "delta", "element_size": 4}}


def _order_and_die(atlas: Path, where: str, when: str, n: int) -> None:
    die_at(where, when, n)
    repack(atlas, order_features=True)


@pytest.mark.parametrize(
    ("where", "when"),
    [
        ("atlas._catalog.swap:replace_group", "after"),
        pytest.param("atlas._upkeep.repack:compare_ordered", "before", marks=pytest.mark.slow),
    ],
)
def test_killed(atlas: Path, where: str, when: str) -> None:
    """One group may be in the new order and the others not; the next run goes on."""
    before = everything(atlas)
    killed(_order_and_die, atlas, where, when, 1)
    assert everything(atlas) == before
    repack(atlas, order_features=True)
    assert everything(atlas) == before
    assert rows(atlas)[1]
    assert not (atlas / "zarr_store" / ".staging").exists()


def test_cells_of_no_snapshot_and_elements_of_no_cell(atlas: Path) -> None:
    """A removed dataset is ordered for the snapshots that have it; what no row points to stays in place."""
    before = everything(atlas)
    opened = RaggedAtlas.open(atlas)
    group = max(row["zarr_group"] for row in opened.catalog.dataset_rows())
    path = atlas / "zarr_store" / group / "csr"
    stray = zarr.open_array(path / "indices", mode="r").shape[0]
    for name in ("indices", "layers/counts", "layers/tpm"):
        array = zarr.open_array(path / name, mode="a")
        array.resize((stray + 70,))
        array[stray:] = np.arange(70) % 7
    opened.remove_dataset(opened.catalog.dataset_rows()[0]["dataset_uid"])
    assert {g.order for g in repack(atlas, order_features=True).groups} <= {"ordered", "in order before"}
    assert everything(atlas)[:3] == before
    assert all(rows(atlas, version)[1] for version in range(3))
    for name in ("indices", "layers/counts", "layers/tpm"):
        assert np.array_equal(zarr.open_array(path / name, mode="r")[stray:], np.arange(70) % 7)


@pytest.mark.parametrize("window", [1, 64])
def test_windows_cut_no_row(atlas: Path, monkeypatch: pytest.MonkeyPatch, window: int) -> None:
    before = everything(atlas)
    monkeypatch.setattr(ordered_rows, "_WINDOW", window)
    repack(atlas, ROWPACK, order_features=True)
    assert everything(atlas) == before
    assert rows(atlas)[1]


def test_processes_order_groups(atlas: Path) -> None:
    before = everything(atlas)
    calls: list[tuple[int, int]] = []
    with ProcessPoolExecutor(1) as executor:
        repack(atlas, order_features=True, executor=executor, progress=lambda *call: calls.append(call))
    assert calls[-1][0] == calls[-1][1] > 0
    assert everything(atlas) == before
    assert rows(atlas)[1]


def test_rows_that_overlap_are_left_as_they_are(atlas: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from hbx_gpu.atlas._upkeep import row_orders

    real = row_orders._extents

    def overlapping(*args: Any) -> dict[str, np.ndarray]:
        return {
            name: np.concatenate([pairs, pairs[:, :1] + 1], axis=1) for name, pairs in real(*args).items()
        }

    before = everything(atlas)
    monkeypatch.setattr(
        row_orders,
        "_extents",
        lambda *args: {
            name: pairs[:, np.argsort(pairs[0], kind="stable")] for name, pairs in overlapping(*args).items()
        },
    )
    report = repack(atlas, order_features=True)
    assert {group.order for group in report.groups} == {"order kept: its rows overlap"}
    assert everything(atlas) == before


def test_a_wrong_permutation_is_noticed(atlas: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = everything(atlas)
    real = canonical.sorting_order

    def wrong(*args: Any) -> np.ndarray:
        order = real(*args)
        order[[0, -1]] = order[[-1, 0]]
        return order

    monkeypatch.setattr(ordered_rows, "sorting_order", wrong)
    with pytest.raises(CorruptChunkError, match="are others than before; the group was left as it was"):
        repack(atlas, order_features=True)
    assert everything(atlas) == before
    assert not (atlas / "zarr_store" / ".staging").exists()


def test_a_reader_of_some_old_files_refuses_the_new_ones(atlas: Path) -> None:
    """Index and values of two orders would make wrong rows, though shapes and codecs agree."""
    repack(atlas, "none")
    made: Any = RaggedAtlas.checkout_latest(atlas).query().to_cell_dataset("gene_expression")
    made._directory.extents(np.arange(made._directory.base[-1] // 2))  # looks at the index arrays alone
    made[np.arange(2)]
    repack(atlas, "none", order_features=True)
    with pytest.raises(CorruptChunkError, match=r"replaced by another one .* open the dataset again"):
        made[np.arange(len(made))]


def test_atlases_of_homeobox(homeobox_fixtures: Path, tmp_path: Path) -> None:
    """Unsorted rows, two layers, a csc copy, two snapshots; also of the generation that we do not write."""
    for name in ("ragged_rna", "legacy_0_2_3"):
        root = tmp_path / name
        shutil.copytree(homeobox_fixtures / name / "atlas", root)
        versions = [record.version for record in read_records(root)]
        before = [rows(root, version)[0].tolist() for version in versions]
        repack(root, order_features=True)
        assert [rows(root, version)[0].tolist() for version in versions] == before
        assert all(rows(root, version)[1] for version in versions)


def test_command(atlas: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["repack", str(atlas), "--order-features"]) == 0
    assert "repacked (ordered)" in capsys.readouterr().out
    assert cli.main(["repack", str(atlas)]) == 1
    assert "pass --codec to change the codec, or --order-features" in capsys.readouterr().err
    arrays = (atlas / "zarr_store").rglob("csr/**/zarr.json")
    marks = [json.loads(path.read_text())["attributes"].get("hbx_gpu") for path in arrays]
    assert {mark["row_order"] for mark in marks if mark} == {"registry"}
    assert Snapshot.open(atlas).version == 2
