"""`measured=True`: which zeros of a batch were counted."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from hbx_gpu._loading.make import device_loader
from hbx_gpu._loading.options import LoaderOptions
from hbx_gpu.dataloader import CellDataset, make_loader, sparse_to_dense_collate
from hbx_gpu.testing import N_FEATURES, example_dataset, example_groups
from tests.conformance.datasets import STORED, of_shared
from tests.dali import need_dali
from tests.emulation.backend import EmulatedBackend

ROWS = [[3, 61, 61, 0, 119], [-1, 4]]
WAYS = ["direct", "dali", "device", "workers"]


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> CellDataset:
    return example_dataset(tmp_path_factory.mktemp("arrays"), example_groups())


def load(dataset: Any, way: str, layout: str = "dense", rows: Any = ROWS) -> list[dict[str, Any]]:
    if way == "device":
        options = LoaderOptions(layout=layout, measured=True, num_workers=0)
        return list(device_loader(dataset, rows, EmulatedBackend(), options))
    if way == "dali":
        need_dali()
    executor = "dali" if way == "dali" else "direct"
    workers = int(way == "workers")
    with make_loader(
        dataset, rows, layout=layout, measured=True, executor=executor, num_workers=workers
    ) as loader:
        return list(loader)


@pytest.mark.parametrize("way", WAYS)
def test_the_mask_says_which_genes_the_dataset_of_a_cell_has(dataset: CellDataset, way: str) -> None:
    has = [set(group.remap.tolist()) for group in example_groups()]
    batches = load(dataset, way)
    for rows, batch in zip(ROWS, batches, strict=True):
        mask = batch["measured"]
        assert (mask.dtype, mask.shape) == (torch.bool, (len(rows), N_FEATURES))
        for row, found in zip(rows, mask.numpy(), strict=True):
            assert set(np.flatnonzero(found).tolist()) == has[row % 120 // 60]
        assert not batch["X"][~mask].any()


@pytest.mark.parametrize("way", ["direct", "device"])
def test_beside_sparse_tensors_and_of_subsets(dataset: CellDataset, way: str) -> None:
    (batch,) = load(dataset.subset(np.arange(119, -1, -1)), way, "csr", [[0, 119]])
    assert batch["measured"].sum(1).tolist() == [25, 40]
    assert batch["X"].layout is torch.sparse_csr


@pytest.mark.parametrize("kind", ["fragments", "pairs", "two_layers", "matrix"])
def test_every_kind_with_features(kind: str, shared: Path, tmp_path: Path) -> None:
    dataset = STORED[kind](tmp_path / "arrays") if kind in STORED else of_shared(shared)[kind]()
    rows = [[3, 1, 1, 0], [2]]
    host, device = load(dataset, "direct", rows=rows), load(dataset, "device", rows=rows)
    for chosen, one, other in zip(rows, host, device, strict=True):
        expected = dataset.measured_masks(dataset.groups_np[chosen])
        assert expected.any()
        for batch in (one, other):
            assert np.array_equal(batch["measured"].numpy(), expected)
            assert set(batch) == set(one)


def test_where_there_is_nothing_to_mask(dataset: CellDataset, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"measured=True adds a mask to tensors: pass layout="):
        make_loader(dataset, ROWS, sparse_to_dense_collate, measured=True)
    with pytest.raises(ValueError, match=r"measured=True is for datasets whose columns are features"):
        make_loader(STORED["tiles"](tmp_path / "tiles"), [[0]], layout="dense", measured=True)
    taken = dataset.with_columns({"measured": np.arange(120)})
    with pytest.raises(ValueError, match="metadata column 'measured' would overwrite"):
        make_loader(taken, ROWS, layout="dense", measured=True)
