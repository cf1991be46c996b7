"""Images as one of several modalities: augmented alike on every path, decoded on the way."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from hbx_gpu import RaggedAtlas
from hbx_gpu._loading.make import device_loader
from hbx_gpu._loading.options import LoaderOptions
from hbx_gpu.atlas import AtlasQuery
from hbx_gpu.dataloader import (
    MultimodalCellDataset,
    RaggedBatch,
    make_loader,
    multimodal_to_dense_collate,
)
from hbx_gpu.sampler import CellSampler
from tests.dense_stores import brought
from tests.emulation.backends import BACKENDS, backend_named

SPACES = ["rna", "adt", "image_features", "tiles_a", "crop", "chromatin_accessibility"]
LAYERS = {"chromatin_accessibility": ["starts", "lengths"]}


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


def augmented(
    dataset: Any, *, batch_size: int, epoch: int = 0, make: Any = make_loader, **kwargs: Any
) -> Any:
    """Cell -> its tile, and the last batch, of one epoch."""
    sampler = sampler_for(dataset, batch_size=batch_size)
    if make is make_loader:
        loader = make_loader(dataset, sampler, layout="dense", **{"executor": "direct", **kwargs})
    else:
        loader = device_loader(dataset, sampler, make, LoaderOptions.of(layout="dense", **kwargs))
    loader.set_epoch(epoch)
    tiles = {}
    for batch in brought(loader, None if make is make_loader else make):
        part = batch.get("tiles_a", batch)
        for cell, tile in zip(batch["index"].tolist(), part["X"], strict=True):
            tiles[cell] = tile
    return tiles


def test_images_depend_on_seed_epoch_and_cell_alone(everything: MultimodalCellDataset) -> None:
    pytest.importorskip("nvidia.dali")
    from hbx_gpu.images import ImageTransform

    steps = ImageTransform(random_crop=(3, 4), horizontal_flip=0.5, vertical_flip=0.5, mean=100.0, std=50.0)
    first = augmented(everything, batch_size=5, images={"tiles_a": steps})
    assert {tile.shape for tile in first.values()} == {(2, 3, 4)}
    assert all(tile.dtype == np.float32 for tile in first.values())
    present = everything.present["tiles_a"]
    for cell, tile in first.items():
        assert bool(np.any(tile)) == present[cell], "zeros where there is no tile, also behind normalization"
    for kwargs in ({"batch_size": 7}, {"batch_size": 28, "window": 1}, {"batch_size": 5, "executor": "dali"}):
        again = augmented(everything, images={"tiles_a": steps}, **kwargs)
        for cell in first:
            np.testing.assert_array_equal(again[cell], first[cell])
    for kwargs in ({"epoch": 1}, {"image_seed": 8}):
        other = augmented(everything, batch_size=5, images={"tiles_a": steps}, **kwargs)
        assert any(not np.array_equal(other[cell], first[cell]) for cell in first)


def test_images_beside_a_device(everything: MultimodalCellDataset, backend: Any) -> None:
    pytest.importorskip("nvidia.dali")
    from hbx_gpu.images import ImageTransform, TileCollate

    steps = ImageTransform(random_crop=(3, 4), horizontal_flip=0.5)
    host = augmented(everything, batch_size=5, epoch=2, images={"tiles_a": steps})
    collates = {"tiles_a": TileCollate(steps, seed=3, num_threads=1)}
    device = augmented(everything, batch_size=6, epoch=2, make=backend, images=collates)
    for cell in host:
        np.testing.assert_array_equal(device[cell], host[cell])


def test_images_of_one_space_and_of_boxes(cells: AtlasQuery) -> None:
    pytest.importorskip("nvidia.dali")
    from hbx_gpu.images import ImageTransform

    crops = cells.to_cell_dataset("crop")
    same_size = augmented(crops, batch_size=4, images=ImageTransform(resize=(6, 6)))
    assert {tile.shape for tile in same_size.values()} == {(2, 6, 6)}
    tiles: Any = cells.to_cell_dataset("tiles_b")
    flipped = augmented(tiles, batch_size=4, images=ImageTransform(horizontal_flip=1.0))
    for cell, tile in flipped.items():
        np.testing.assert_array_equal(tile, tiles[cell].data[0, :, :, ::-1])


def test_images_in_the_wrong_place_are_refused(everything: MultimodalCellDataset, cells: AtlasQuery) -> None:
    from hbx_gpu.images import ImageTransform

    steps = ImageTransform()
    sampler = sampler_for(everything)
    with pytest.raises(
        ValueError, match=r"images were given for 'rna'.*spaces with images: \['tiles_a', 'crop'\]"
    ):
        make_loader(everything, sampler, layout="dense", images={"rna": steps})
    with pytest.raises(ValueError, match="by space"):
        make_loader(everything, sampler, layout="dense", images=steps)
    with pytest.raises(ValueError, match="instead of a collate_fn"):
        make_loader(everything, sampler, multimodal_to_dense_collate, images={"tiles_a": steps})
    with pytest.raises(ValueError, match="worker processes"):
        make_loader(everything, sampler, layout="dense", images={"tiles_a": steps}, num_workers=2)
    protein = cells.to_cell_dataset("adt")
    with pytest.raises(ValueError, match="holds none"):
        make_loader(protein, sampler_for(protein), layout="dense", images=steps)


def test_encoded_pictures_from_ingest_to_batch(tmp_path: Path) -> None:
    """Files as they are in the atlas, decoded by DALI on the way; cells without one are zeros."""
    pytest.importorskip("nvidia.dali")
    image = pytest.importorskip("PIL.Image")
    import pandas as pd
    from anndata import AnnData

    from hbx_gpu.atlas import ImageInput, create_or_open_atlas
    from hbx_gpu.images import ImageTransform

    rng = np.random.default_rng(4)
    names = [f"cell{i}" for i in range(12)]
    pictures = {name: rng.integers(0, 255, (20, 24, 3), dtype=np.uint8) for name in names[2:11]}
    for i, (name, picture) in enumerate(pictures.items()):
        suffix = ("png", "tiff")[i % 2]
        image.fromarray(picture).save(tmp_path / f"{name}.{suffix}")
    files = pd.DataFrame(
        {"cell_id": list(pictures), "file": [f"{n}.{('png', 'tiff')[i % 2]}" for i, n in enumerate(pictures)]}
    )
    rna = AnnData(rng.poisson(1.0, (12, 7)).astype(np.float32), obs=pd.DataFrame(index=names))
    rna.var_names = [f"G{i}" for i in range(7)]
    atlas = create_or_open_atlas(tmp_path / "atlas")
    atlas.add_multimodal({"rna": rna, "encoded": ImageInput(tmp_path, files)})
    atlas.optimize()
    atlas.snapshot()
    query = RaggedAtlas.checkout_latest(tmp_path / "atlas").query()
    order = query.to_pandas()["obs_name"].tolist()
    dataset = query.to_multimodal_dataset(["gene_expression", "encoded_images"])
    raw = dataset[:].modalities["encoded_images"]
    assert isinstance(raw, RaggedBatch)
    for name, found in zip(order, raw.data, strict=True):
        file = next(tmp_path.glob(f"{name}.*"), None)
        assert found.tobytes() == (file.read_bytes() if file else b"")

    steps = ImageTransform(center_crop=(16, 20))
    loader = make_loader(dataset, sampler_for(dataset), layout="dense", images={"encoded_images": steps})
    seen = {}
    for batch in brought(loader):
        for cell, picture in zip(batch["index"].tolist(), batch["encoded_images"]["X"], strict=True):
            seen[order[cell]] = picture
    assert set(seen) == set(names)
    for name, picture in seen.items():
        expected = pictures.get(name, np.zeros((20, 24, 3), np.uint8))[2:18, 2:22].transpose(2, 0, 1)
        np.testing.assert_array_equal(picture, expected)
