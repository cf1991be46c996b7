"""Several modalities of the same cells: one plan, one row per cell everywhere, and the same on every path."""

from __future__ import annotations

import pickle
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from hbx_gpu import RaggedAtlas
from hbx_gpu._collates import ArrayCollate
from hbx_gpu._loading.feeds.multimodal import CopiedFeed
from hbx_gpu._loading.make import device_loader
from hbx_gpu._loading.options import LoaderOptions
from hbx_gpu._storage.chunks import ChunkDirectory
from hbx_gpu.atlas import AtlasQuery
from hbx_gpu.dataloader import (
    DenseBatch,
    MultimodalCellDataset,
    MultimodalCollate,
    RaggedBatch,
    SparseBatch,
    make_loader,
    multimodal_to_dense_collate,
)
from hbx_gpu.errors import CorruptChunkError, CorruptDataError, UnknownNameError
from hbx_gpu.sampler import CellSampler
from hbx_gpu.transforms import normalize_total
from tests import npz
from tests.dense_stores import brought, on_cpu, same
from tests.emulation.backends import BACKENDS, backend_named
from tests.emulation.streams import StreamBackend

SPACES = ["rna", "adt", "image_features", "tiles_a", "crop", "chromatin_accessibility"]
LAYERS = {"chromatin_accessibility": ["starts", "lengths"]}


@pytest.fixture
def cite(homeobox_fixtures: Path) -> AtlasQuery:
    return RaggedAtlas.checkout_latest(homeobox_fixtures / "cite_multimodal" / "atlas").query()


@pytest.fixture
def cells(homeobox_fixtures: Path) -> AtlasQuery:
    return RaggedAtlas.checkout_latest(homeobox_fixtures / "all_spaces" / "atlas").query("cells")


@pytest.fixture
def everything(cells: AtlasQuery) -> MultimodalCellDataset:
    return cells.to_multimodal_dataset(SPACES, LAYERS, ["cell_type"])


@pytest.fixture(params=BACKENDS)
def backend(request: pytest.FixtureRequest) -> Any:
    return backend_named(request.param)


def sampler_for(dataset: Any, **kwargs: Any) -> CellSampler:
    return CellSampler(dataset.groups_np, **{"batch_size": 5, "seed": 3, "num_workers": 0, **kwargs})


def by_single_reads(dataset: MultimodalCellDataset, **settings: Any) -> Callable[[np.ndarray], Any]:
    """The batch of rows, each part read by itself."""
    collate = MultimodalCollate(**settings)

    def batch(rows: np.ndarray) -> Any:
        made = on_cpu(collate(dataset.__getitems__(rows)))
        made["index"] = np.asarray(rows, np.int64)
        return made

    return batch


# What a batch is


def test_every_modality_has_a_row_for_every_cell(cite: AtlasQuery) -> None:
    dataset = cite.to_multimodal_dataset(
        ["gene_expression", "protein_abundance"], metadata_columns=["cell_type"]
    )
    assert dataset.n_cells == len(dataset) == cite.count() == 41
    assert dataset.n_features == {"gene_expression": 40, "protein_abundance": 10}
    batch = dataset[:]
    rna, protein = batch.modalities["gene_expression"], batch.modalities["protein_abundance"]
    assert isinstance(rna, SparseBatch)
    assert isinstance(protein, DenseBatch)
    assert len(batch) == batch.n_cells == len(rna) == len(protein) == 41
    assert rna.metadata is None
    assert protein.metadata is None
    for name, part in batch.modalities.items():
        present = batch.present[name]
        assert present.dtype == bool
        alone = cite.to_cell_dataset(name)
        assert len(alone) == present.sum() < 41
        found = multimodal_to_dense_collate(batch)[name]["X"].numpy()
        assert not found[~present].any(), "a cell without the modality has zeros"
        whole: Any = alone[:]
        expected = whole.data if isinstance(whole, DenseBatch) else alone_dense(whole)
        np.testing.assert_array_equal(found[present], expected)
        assert len(part) == 41
    assert batch.metadata is not None
    assert len(batch.metadata["cell_type"]) == 41


def alone_dense(batch: SparseBatch) -> np.ndarray:
    out = np.zeros((len(batch), batch.n_features), np.float32)
    for row in range(len(batch)):
        part = slice(batch.offsets[row], batch.offsets[row + 1])
        np.add.at(out[row], batch.indices[part], batch.values[part])
    return out


def test_measured_tells_zero_from_not_measured(cite: AtlasQuery) -> None:
    dataset = cite.to_multimodal_dataset(["gene_expression", "protein_abundance"])
    batch = dataset[[0, 40, 5, 40]]
    collated = multimodal_to_dense_collate(batch)
    parts: dict[str, Any] = dict(dataset.datasets)
    for name, part in parts.items():
        mask = batch.measured[name]
        assert mask.dtype == bool
        assert mask.shape == (4, dataset.n_features[name])
        for row, cell in enumerate([0, 40, 5, 40]):
            group = part.groups_np[cell]
            has = (
                set(part.sources[group].remap[part.sources[group].remap >= 0].tolist())
                if group >= 0
                else set()
            )
            assert set(np.flatnonzero(mask[row]).tolist()) == has
        values = collated[name]["X"].numpy()
        assert not values[~mask].any(), "a value that was not measured"
        assert torch.equal(collated["measured"][name], torch.from_numpy(mask))
    # Partial panels: some present cell lacks some feature.
    whole = dataset[:]
    assert any((~whole.measured[n][whole.present[n]]).any() for n in dataset.datasets)
    copy = pickle.loads(pickle.dumps(batch))
    for name in dataset.datasets:
        np.testing.assert_array_equal(copy.measured[name], batch.measured[name])


def test_groups_follow_the_first_space(cite: AtlasQuery) -> None:
    dataset = cite.to_multimodal_dataset(["protein_abundance", "gene_expression"])
    groups = dataset.groups_np
    assert groups.dtype == np.int32
    absent = ~dataset.present["protein_abundance"]
    assert set(groups[absent].tolist()) == {2}
    assert set(groups[~absent].tolist()) == {0, 1}


def test_several_layers_in_one_read(cite: AtlasQuery, cells: AtlasQuery) -> None:
    dataset = cite.where("protein_abundance.zarr_group = 'cite/adt'").to_multimodal_dataset(
        ["gene_expression", "protein_abundance"], {"protein_abundance": ["counts", "dsb_normalized"]}
    )
    part: Any = dataset[:].modalities["protein_abundance"]
    assert list(part.layers) == ["counts", "dsb_normalized"]
    assert part.data is part.layers["counts"]
    assert (part.layers["counts"].dtype, part.layers["dsb_normalized"].dtype) == (np.uint32, np.float32)
    for layer, values in part.layers.items():
        alone: Any = cite.to_cell_dataset("protein_abundance", layer)[:]
        np.testing.assert_array_equal(values, alone.data)
    collated = multimodal_to_dense_collate(dataset[[3, 1]])
    assert torch.equal(collated["protein_abundance"]["X"], collated["protein_abundance"]["layers"]["counts"])

    fragments: Any = cells.to_cell_dataset("chromatin_accessibility", ["starts", "lengths"])[:]
    for layer in ("starts", "lengths"):
        alone = cells.to_cell_dataset("chromatin_accessibility", layer)[:]
        np.testing.assert_array_equal(fragments.layers[layer], alone.values)
        np.testing.assert_array_equal(fragments.indices, alone.indices)


def test_rows_repeat_negate_and_may_be_none(everything: MultimodalCellDataset) -> None:
    rows = [3, 3, -1, 0, 27]
    batch = everything.__getitems__(rows)
    for i, row in enumerate(rows):
        one = on_cpu(multimodal_to_dense_collate(everything[row]))
        many = on_cpu(multimodal_to_dense_collate(batch))
        for name in SPACES:
            np.testing.assert_array_equal(many[name]["X"][i], one[name]["X"][0])
            assert many["present"][name][i] == one["present"][name][0]
    empty = multimodal_to_dense_collate(everything.__getitems__([]))
    assert empty["rna"]["X"].shape == (0, 24)
    assert empty["tiles_a"]["X"].shape == (0, 2, 4, 5)
    assert empty["crop"]["X"] == []
    with pytest.raises(IndexError, match="out of range"):
        everything[28]


def test_large_batches_are_decoded_side_by_side(everything: MultimodalCellDataset) -> None:
    rows = np.random.default_rng(1).integers(-28, 28, 300)
    large = on_cpu(multimodal_to_dense_collate(everything.__getitems__(rows)))
    assert everything._pool is not None
    same(large, on_cpu(multimodal_to_dense_collate(everything.read_batches([rows])[0])))


def test_tiles_and_boxes(everything: MultimodalCellDataset) -> None:
    batch = everything[:]
    tiles, crops = batch.modalities["tiles_a"], batch.modalities["crop"]
    assert isinstance(tiles, DenseBatch)
    assert tiles.data.shape == (28, 2, 4, 5)
    assert isinstance(crops, RaggedBatch)
    assert len({crop.shape for crop in crops.data}) > 2
    assert all(
        (crop.size > 0) == there for crop, there in zip(crops.data, batch.present["crop"], strict=True)
    )
    assert "tiles_a" not in batch.measured, "tiles have no features"


# One plan


def test_chunks_of_all_spaces_are_looked_up_and_read_once(
    everything: MultimodalCellDataset, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = []
    extents = ChunkDirectory.extents

    def noted(self: ChunkDirectory, chunks: np.ndarray) -> Any:
        asked.append(chunks)
        return extents(self, chunks)

    monkeypatch.setattr(ChunkDirectory, "extents", noted)
    everything.read_batches([[0, 1], [2, 3, 27], [0, 5]])
    assert len(asked) == 1
    assert len(asked[0]) == len(set(asked[0].tolist()))


def test_parts_equal_datasets_of_one_space(everything: MultimodalCellDataset, cells: AtlasQuery) -> None:
    rows = np.random.default_rng(0).permutation(28)
    batch = on_cpu(multimodal_to_dense_collate(everything.__getitems__(rows)))
    for name, part in everything.datasets.items():
        alone = cells.to_cell_dataset(name, LAYERS.get(name))
        place = np.cumsum(part.present) - 1
        there = part.present[rows]
        found = alone.__getitems__(place[rows[there]])
        if isinstance(found, SparseBatch):
            expected: Any = alone_dense(found)
        else:
            expected = found.data
        values = batch[name]["X"]
        values = [values[i] for i in np.flatnonzero(there)]
        for got, want in zip(values, expected, strict=True):
            np.testing.assert_array_equal(got, want)


def test_crossing_to_another_process(everything: MultimodalCellDataset) -> None:
    before = on_cpu(multimodal_to_dense_collate(everything[:]))
    data = pickle.dumps(everything)
    assert len(data) < 20_000
    copy = pickle.loads(data)
    same(on_cpu(multimodal_to_dense_collate(copy[:])), before)
    # Parts made again by their queries, where the folder with their arrays has gone.
    parts: list[Any] = list(everything.datasets.values())
    recipes = [part._recipe for part in parts]
    again = MultimodalCellDataset(
        {name: recipe.rebuild() for name, recipe in zip(everything.datasets, recipes, strict=True) if recipe}
    )
    same(on_cpu(multimodal_to_dense_collate(again[:])), before)


# Through loaders


@pytest.mark.parametrize("executor", ["direct", "dali"])
def test_loader_gives_what_single_reads_give(everything: MultimodalCellDataset, executor: str) -> None:
    if executor == "dali":
        pytest.importorskip("nvidia.dali")
    expected = by_single_reads(everything, layout={"rna": "csr"})
    loader = make_loader(
        everything, sampler_for(everything), layout={"rna": "csr"}, executor=executor, num_workers=0
    )
    for epoch in range(2):
        loader.set_epoch(epoch)
        seen = []
        for batch in loader:
            assert batch["rna"]["X"].layout is torch.sparse_csr
            found = on_cpu(batch)
            want = expected(found["index"])
            same(found, want)
            seen.append(found["index"])
        assert sorted(np.concatenate(seen).tolist()) == list(range(28))
    loader.close()


def test_worker_processes(everything: MultimodalCellDataset) -> None:
    expected = by_single_reads(everything)
    sampler = sampler_for(everything, num_workers=2)
    loader = make_loader(everything, sampler, multimodal_to_dense_collate)
    order = [np.array(rows) for rows in sampler_for(everything, num_workers=2)]
    found = brought(loader)
    assert len(found) == len(order)
    for batch, rows in zip(found, order, strict=True):
        want = expected(rows)
        want.pop("index")
        same(batch, want)


def test_a_dense_space_may_come_first(cells: AtlasQuery, backend: Any) -> None:
    """Labels and masks then cross with a part that the host decodes."""
    dataset = cells.to_multimodal_dataset(["adt", "rna"], metadata_columns=["cell_type"])
    host = brought(make_loader(dataset, sampler_for(dataset), layout="dense", executor="direct"))
    same(
        brought(
            device_loader(dataset, sampler_for(dataset), backend, LoaderOptions(layout="dense")), backend
        ),
        host,
    )
    assert set(host[0]) == {"adt", "rna", "present", "measured", "index", "metadata"}


@pytest.mark.parametrize("layout", ["dense", "csr"])
def test_device_gives_what_the_host_gives(
    everything: MultimodalCellDataset, backend: Any, layout: str
) -> None:
    transform = {"rna": normalize_total(1e4)} if layout == "dense" else None
    settings: dict[str, Any] = {"layout": layout, "transform": transform}
    host = make_loader(everything, sampler_for(everything), executor="direct", **settings)
    device = device_loader(everything, sampler_for(everything), backend, LoaderOptions.of(**settings))
    n = 0
    for expected, found in zip(brought(host), brought(device, backend), strict=True):
        if layout == "dense":
            x, y = found["rna"].pop("X"), expected["rna"].pop("X")
            np.testing.assert_allclose(x, y, rtol=5e-6, atol=0)
        same(found, expected)
        n += 1
    assert n > 3


def test_one_dense_space_on_every_path(cells: AtlasQuery, backend: Any) -> None:
    for name in ("adt", "tiles_b", "crop"):
        dataset = cells.to_cell_dataset(name, metadata_columns=["cell_type"])
        host = brought(make_loader(dataset, sampler_for(dataset), layout="dense", executor="direct"))
        device = brought(
            device_loader(dataset, sampler_for(dataset), backend, LoaderOptions(layout="dense")), backend
        )
        same(device, host)
        assert sorted(host[0]) == ["X", "cell_type", "index"]


def test_staging_memory_is_not_used_again_before_it_was_copied(cells: AtlasQuery) -> None:
    dataset: Any = cells.to_cell_dataset("adt")
    backend = StreamBackend()
    feed = CopiedFeed(dataset, ArrayCollate(), backend)
    backend.decode.order(lambda: time.sleep(0.3))  # copies wait behind this
    windows = [np.array([i, i + 1]) for i in range(4)]
    made = [feed.make([rows])[0] for rows in windows]
    found = [feed.deliver(entry)["X"] for entry in made]
    backend.consumer.synchronize()
    for x, rows in zip(found, windows, strict=True):
        np.testing.assert_array_equal(x.numpy(), dataset[rows].data)


@pytest.mark.parametrize("residency", ["none", "host"])
@pytest.mark.parametrize("io", [None, "pinned"])
def test_residency_and_io(everything: MultimodalCellDataset, residency: str, io: str | None) -> None:
    plain = list(brought(make_loader(everything, sampler_for(everything), layout="dense", executor="direct")))
    other = make_loader(
        everything, sampler_for(everything), layout="dense", residency=residency, io=io, executor="direct"
    )
    same(brought(other), plain)


# What is refused, and what is not


def test_a_modality_that_no_cell_has(cite: AtlasQuery) -> None:
    dataset = cite.where("protein_abundance.zarr_group IS NULL").to_multimodal_dataset(
        ["gene_expression", "protein_abundance"]
    )
    batch = multimodal_to_dense_collate(dataset[:])
    assert not batch["present"]["protein_abundance"].any()
    assert batch["protein_abundance"]["X"].shape == (len(dataset), 10)
    assert not batch["protein_abundance"]["X"].any()
    assert not batch["measured"]["protein_abundance"].any()


def test_tiles_that_no_cell_has_are_empty_arrays(cells: AtlasQuery) -> None:
    dataset = cells.where("tiles_a.zarr_group IS NULL").to_multimodal_dataset(["rna", "tiles_a"])
    tiles = dataset[:].modalities["tiles_a"]
    assert isinstance(tiles, RaggedBatch)
    assert [tile.size for tile in tiles.data] == [0] * len(dataset)


def test_bad_requests_say_what_exists(cite: AtlasQuery, everything: MultimodalCellDataset) -> None:
    with pytest.raises(UnknownNameError, match=r"no feature space or field 'atac'.*gene_expression"):
        cite.to_multimodal_dataset(["gene_expression", "atac"])
    with pytest.raises(UnknownNameError, match=r"no layer 'raw'; its layers: \['counts'"):
        cite.to_multimodal_dataset(["protein_abundance"], {"protein_abundance": "raw"})
    with pytest.raises(UnknownNameError, match=r"layers were given for \['protein_abundance'\]"):
        cite.to_multimodal_dataset(["gene_expression"], {"protein_abundance": "counts"})
    with pytest.raises(ValueError, match="once"):
        cite.to_multimodal_dataset(["gene_expression", "gene_expression"])
    with pytest.raises(ValueError, match="must be a list"):
        cite.to_multimodal_dataset("gene_expression")
    with pytest.raises(ValueError, match="at least one"):
        cite.to_multimodal_dataset([])
    with pytest.raises(ValueError, match=r"name the space to transform, of \['rna'"):
        make_loader(everything, sampler_for(everything), layout="dense", transform=normalize_total(1e4))
    with pytest.raises(ValueError, match=r"layout was given for \['adt'\]"):
        make_loader(everything, sampler_for(everything), layout={"adt": "csr"})
    dense = cite.to_cell_dataset("protein_abundance")
    with pytest.raises(ValueError, match="dense space"):
        make_loader(dense, sampler_for(dense), layout="csr")


def test_a_box_outside_its_image_names_the_cell(
    homeobox_fixtures: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from dataclasses import replace

    from hbx_gpu._storage.metadata import read_layout as real
    from hbx_gpu.atlas._query import opening as reading

    def smaller(path: str, name: str, **kwargs: Any) -> Any:
        layout = real(path, name, **kwargs)
        return replace(layout, shape=(*layout.shape[:-1], 9)) if "mix/image" in name else layout

    monkeypatch.setattr(reading, "read_layout", smaller)
    cells = RaggedAtlas.checkout_latest(homeobox_fixtures / "all_spaces" / "atlas").query("cells")
    with pytest.raises(
        CorruptDataError, match=r"row '.+' claims the box from .* of array 'mix/image/layers/raw'"
    ):
        cells.to_cell_dataset("crop")


def test_a_corrupt_chunk_of_one_space_is_named(homeobox_fixtures: Path, tmp_path: Path) -> None:
    import shutil

    root = tmp_path / "atlas"
    shutil.copytree(homeobox_fixtures / "cite_multimodal" / "atlas", root)
    query = RaggedAtlas.checkout_latest(root).query()
    for shard in (root / "zarr_store/cite/adt/layers/counts/c").rglob("*"):
        if shard.is_file():
            shard.write_bytes(b"\0" * 10 + shard.read_bytes()[10:])
    dataset = query.to_multimodal_dataset(["gene_expression", "protein_abundance"])
    with pytest.raises(CorruptChunkError, match="cite/adt/layers/counts"):
        dataset[:]


# In memory


def test_to_multimodal_and_its_kin(cells: AtlasQuery, homeobox_fixtures: Path) -> None:
    expected = npz.load(homeobox_fixtures / "all_spaces" / "expected_v0__cells.npz")
    result = cells.to_multimodal()
    assert result.n_rows == 28
    assert set(result.mod) == {
        "rna",
        "adt",
        "image_features",
        "tiles_a",
        "tiles_b",
        "crop",
        "chromatin_accessibility",
    }
    for name in result.mod:
        np.testing.assert_array_equal(result.present[name], expected[f"{name}/present"])
        assert name in repr(result)
    names = cells.to_cell_dataset("adt").feature_uids
    adt: Any = result["adt"]
    columns = [list(names).index(uid) for uid in adt.var_names]
    np.testing.assert_array_equal(adt.X, expected["adt/counts/dense"][:, columns])
    np.testing.assert_array_equal(adt.obs_names, result.obs.index[result.present["adt"]])
    fragments = result["chromatin_accessibility"]
    for key in ("starts", "lengths", "offsets", "chromosomes"):
        np.testing.assert_array_equal(getattr(fragments, key), expected[f"chromatin_accessibility/{key}"])
    for i, crop in enumerate(cells.to_array("crop")):
        np.testing.assert_array_equal(crop, expected[f"crop/raw/row{i}"])
    tiles = cells.to_array("tiles_a")
    assert isinstance(tiles, np.ndarray)
    assert tiles.shape == (14, 2, 4, 5)
    with pytest.raises(TypeError, match="is sparse"):
        cells.to_array("rna")
    with pytest.raises(TypeError, match="holds no fragments"):
        cells.to_fragments("rna")
    assert cells.to_fragments().to_frame().columns.tolist() == ["uid", "chrom", "start", "end"]


def test_to_mudata(cells: AtlasQuery) -> None:
    pytest.importorskip("mudata")
    with pytest.warns(UserWarning, match="hold no matrices"):
        mudata = cells.to_mudata()
    assert set(mudata.mod) == {"rna", "adt", "image_features"}
    assert mudata["rna"].n_obs == 14
