"""Collating batches of tiles: tensors beside metadata, epochs, threads."""

from __future__ import annotations

import pickle
import threading
from typing import Any

import numpy as np
import pytest
import torch

from hbx_gpu.batch import DenseBatch, RaggedBatch
from hbx_gpu.images import ImagePipeline, ImageTransform, TileCollate
from tests.dali import need_dali
from tests.images.files import encode, picture

TRANSFORM = ImageTransform(random_crop=(10, 12), horizontal_flip=0.5, mean=100, std=50)


@pytest.fixture(autouse=True)
def _dali() -> None:
    need_dali()


def batch(cells: np.ndarray) -> DenseBatch:
    tiles = np.stack([picture(20, 24, seed=int(cell)).transpose(2, 0, 1) for cell in cells])
    metadata = {"index": cells, "cell_type": cells % 3, "donor": np.array([f"d{cell}" for cell in cells])}
    return DenseBatch(tiles, 3 * 20 * 24, (3, 20, 24), metadata)


def test_batch_of_tiles() -> None:
    dense = batch(np.array([5, 2, 9]))
    found: Any = TileCollate(TRANSFORM, seed=4, num_threads=1)(dense)
    assert list(found) == ["X", "index", "cell_type", "donor"]
    assert torch.equal(found["X"], ImagePipeline(TRANSFORM, seed=4, num_threads=1)(dense.data, [5, 2, 9]))
    assert torch.equal(found["index"], torch.tensor([5, 2, 9]))
    assert found["donor"].tolist() == ["d5", "d2", "d9"]


def test_ragged_batches() -> None:
    dense = batch(np.array([5, 2, 9]))
    collate: Any = TileCollate(TRANSFORM, num_threads=1)
    tiles = [dense.data[0], np.empty(0, np.uint8), dense.data[2]]
    found: Any = collate(RaggedBatch(tiles, metadata={"index": np.array([5, 2, 9])}))["X"]
    expected = collate(dense)["X"]
    assert torch.equal(found[[0, 2]], expected[[0, 2]])
    assert not found[1].any()
    assert torch.equal(collate(dense, present=np.array([True, False, True]))["X"], found)
    files = [encode(tile.transpose(1, 2, 0), "PNG") if tile.size else tile for tile in tiles]
    assert torch.equal(collate(RaggedBatch(files, metadata={"index": np.array([5, 2, 9])}))["X"], found)


def test_epochs() -> None:
    dense = batch(np.arange(6))
    collate: Any = TileCollate(TRANSFORM, num_threads=1)
    first: Any = collate(dense)["X"]
    collate.set_epoch(1)
    second: Any = collate(dense)["X"]
    assert not torch.equal(first, second)
    assert torch.equal(collate(dense, epoch=0)["X"], first)
    assert torch.equal(pickle.loads(pickle.dumps(collate))(dense)["X"], second)
    collate.set_epoch(0)
    assert torch.equal(collate(dense)["X"], first)
    with pytest.raises(ValueError, match="epoch must be"):
        collate.set_epoch(-1)


def test_threads_at_once() -> None:
    dense = batch(np.arange(12))
    collate: Any = TileCollate(TRANSFORM, num_threads=1)
    expected: Any = collate(dense)["X"]
    found: dict[int, torch.Tensor] = {}

    def call(part: int) -> None:
        rows = slice(3 * part, 3 * part + 3)
        assert dense.metadata is not None
        metadata = {"index": dense.metadata["index"][rows]}
        found[part] = collate(DenseBatch(dense.data[rows], dense.n_features, dense.per_cell_shape, metadata))[
            "X"
        ]

    threads = [threading.Thread(target=call, args=(part,)) for part in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert torch.equal(torch.cat([found[part] for part in range(4)]), expected)


def test_row_numbers_are_needed() -> None:
    dense = batch(np.arange(3))
    dense.metadata = {"donor": np.arange(3)}
    with pytest.raises(ValueError, match=r"metadata\['index'\]; it has 'donor'"):
        TileCollate(TRANSFORM, num_threads=1)(dense)
    dense.metadata = None
    with pytest.raises(ValueError, match="it has no metadata"):
        TileCollate(TRANSFORM, num_threads=1)(dense)
    dense.metadata = {"index": np.arange(3), "X": np.arange(3)}
    with pytest.raises(ValueError, match="'X' would overwrite"):
        TileCollate(TRANSFORM, num_threads=1)(dense)
