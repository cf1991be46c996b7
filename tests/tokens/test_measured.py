"""Genes that were not measured are neither shown nor to be guessed, where a recipe says so."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from hbx_gpu import CellDataset, CellSampler, make_loader, tokens
from hbx_gpu._loading.make import device_loader
from hbx_gpu._loading.options import LoaderOptions
from hbx_gpu.testing import example_dataset, example_groups
from tests.emulation.backend import EmulatedBackend

OPTIONS: dict[str, Any] = {"length": 30, "min_umis": 5.0, "prefix": 12}


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> CellDataset:
    return example_dataset(tmp_path_factory.mktemp("measured"), example_groups())


def recipe(dataset: CellDataset, **options: Any) -> tokens.PromptQuery:
    return tokens.cellarium_gpt([str(uid) for uid in dataset.feature_uids], **OPTIONS | options)


@pytest.mark.parametrize("padding", ["longest", "packed"])
@pytest.mark.parametrize("engine", ["host", "reference"])
def test_only_measured_genes_are_shown_or_asked_for(dataset: CellDataset, engine: str, padding: str) -> None:
    rows = np.array([3, 100, 4, 61])  # of two stored matrices, which have 40 and 25 of 50 features
    batch, uids = dataset.__getitems__(rows), dataset.feature_uids
    masks = dataset.measured_masks(dataset.groups_of(rows))
    options: dict[str, Any] = {"cells": rows, "engine": engine, "padding": padding}
    every = tokens.encode(batch, recipe(dataset), uids, 5, **options)
    some = tokens.encode(batch, recipe(dataset, measured_only=True), uids, 5, measured=masks, **options)
    every, some = ({k: v.reshape(4, -1) for k, v in made.items() if v.size == 120} for made in (every, some))
    assert np.array_equal(every["input_ids"], some["input_ids"])
    known = np.take_along_axis(masks, some["input_ids"], axis=1)
    assert 0 < known.sum() < known.size
    assert np.array_equal(some["query_mask"], every["query_mask"] * known)
    assert np.array_equal(some["prompt_mask"], every["prompt_mask"] & known)
    assert np.array_equal(some["values"], every["values"] * known)
    queries = some["query_mask"].sum(1, keepdims=True)
    assert np.allclose(some["label_weights"], some["query_mask"] / queries / 4)


def test_loaders_know_what_was_measured(dataset: CellDataset) -> None:
    asked = recipe(dataset, measured_only=True)
    order = CellSampler(dataset.groups_np, batch_size=16, seed=3)
    host = make_loader(dataset, order, layout="tokens", tokens=asked, token_seed=5, executor="direct")
    options = LoaderOptions.of(layout="tokens", tokens=asked, token_seed=5)
    device = device_loader(dataset, order, EmulatedBackend(), options)
    with host, device:
        for a, b in zip(host, device, strict=True):
            rows = a["index"].numpy()
            masks = dataset.measured_masks(dataset.groups_of(rows))
            made = tokens.encode(
                dataset.__getitems__(rows), asked, dataset.feature_uids, 5, cells=rows, measured=masks
            )
            for name, array in made.items():
                assert np.array_equal(a[name].numpy(), array), name
                assert np.array_equal(b[name].numpy(), array), name


def test_a_gene_of_two_columns_was_measured_where_one_was() -> None:
    genes = [f"g{i}" for i in range(6)]
    asked = tokens.cellarium_gpt(genes[:5], length=5, prefix=0, measured_only=True, mapping={"g5": "g1"})
    masks = np.array([[True, False, False, True, True, True]])
    from scipy.sparse import csr_matrix

    made = tokens.encode(csr_matrix(np.ones((1, 6))), asked, genes, measured=masks)
    assert set(made["input_ids"][made["query_mask"] > 0].tolist()) == {0, 1, 3, 4}


def test_missing_and_wrong_masks_are_refused(dataset: CellDataset) -> None:
    batch, uids = dataset.__getitems__([0, 1]), dataset.feature_uids
    asked = recipe(dataset, measured_only=True)
    with pytest.raises(ValueError, match=r"pass measured=, bool \(n_rows, n_features\)"):
        tokens.encode(batch, asked, uids)
    with pytest.raises(ValueError, match=r"bool of shape \(2, 50\).*got float64 of shape \(2, 3\)"):
        tokens.encode(batch, asked, uids, measured=np.ones((2, 3)))
    with pytest.raises(ValueError, match="measured_only=True, which this one is not"):
        tokens.encode(batch, recipe(dataset), uids, measured=np.ones((2, 50), bool))
