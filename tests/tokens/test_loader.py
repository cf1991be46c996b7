"""Tokens through loaders: the batches of `encode`, however they travel."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from hbx_gpu import CellDataset, CellSampler, RaggedAtlas, make_loader, tokens
from hbx_gpu._loading.make import device_loader
from hbx_gpu._loading.options import LoaderOptions
from hbx_gpu.errors import InvalidDataError
from hbx_gpu.testing import example_dataset, example_groups
from tests.dali import need_dali
from tests.emulation.backend import EmulatedBackend


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> CellDataset:
    return example_dataset(tmp_path_factory.mktemp("tokens"), example_groups())


@pytest.fixture(scope="module")
def recipe(dataset: CellDataset) -> tokens.QuantileBins:
    words = {str(uid): i + 4 for i, uid in enumerate(dataset.feature_uids)}
    return tokens.scgpt({**words, "<pad>": 0, "<cls>": 1}, side="both", length=12, mask=0.3)


def sampler(dataset: CellDataset, **options: Any) -> CellSampler:
    return CellSampler(dataset.groups_np, batch_size=16, seed=3, **options)


def expected(
    dataset: CellDataset, recipe: tokens.Recipe, rows: np.ndarray, epoch: int, **options: Any
) -> dict[str, Any]:
    batch = dataset.with_row_numbers().__getitems__(rows)
    return tokens.encode(batch, recipe, dataset.feature_uids, 7, epoch, engine="reference", **options)


def check(batch: dict[str, Any], made: dict[str, np.ndarray]) -> None:
    for name, array in made.items():
        found = batch[name]
        assert torch.is_tensor(found), name
        assert found.numpy().dtype == array.dtype, name
        assert np.array_equal(found.numpy(), array), name


@pytest.mark.parametrize("executor", ["direct", "dali"])
def test_batches_are_those_of_encode(dataset: CellDataset, recipe: tokens.Recipe, executor: str) -> None:
    if executor == "dali":
        need_dali()
    loader = make_loader(
        dataset, sampler(dataset), layout="tokens", tokens=recipe, token_seed=7, executor=executor
    )
    draws = []
    with loader:
        for epoch in (0, 1):
            loader.set_epoch(epoch)
            rows = []
            for batch in loader:
                index = batch["index"].numpy()
                rows.append(index)
                check(batch, expected(dataset, recipe, index, epoch))
            assert sorted(np.concatenate(rows).tolist()) == list(range(len(dataset)))
            draws.append(batch["input_ids"].tolist())
    assert draws[0] != draws[1]


def test_workers_know_the_epoch(dataset: CellDataset, recipe: tokens.Recipe) -> None:
    loader = make_loader(
        dataset, sampler(dataset), layout="tokens", tokens=recipe, token_seed=7, num_workers=1,
        padding="max_length", pad_to_multiple_of=8, ids_dtype="int32",
    )  # fmt: skip
    options = {"padding": "max_length", "pad_to_multiple_of": 8, "ids_dtype": "int32"}
    with loader:
        for epoch in (0, 1):
            loader.set_epoch(epoch)
            for batch in loader:
                check(batch, expected(dataset, recipe, batch["index"].numpy(), epoch, **options))


def test_packed(dataset: CellDataset, recipe: tokens.Recipe) -> None:
    loader = make_loader(
        dataset, sampler(dataset), layout="tokens", tokens=recipe, padding="packed", executor="direct"
    )
    with loader:
        for batch in loader:
            n = len(batch["index"])
            assert batch["cu_seqlens"].shape == (n + 1,)
            assert int(batch["cu_seqlens"][-1]) == len(batch["input_ids"]) == len(batch["values"])
            nested = tokens.nested(batch, "values")
            assert [len(row) for row in nested.unbind()] == batch["lengths"].tolist()


@pytest.mark.parametrize("residency", ["none", "device"])
@pytest.mark.parametrize("padding", ["longest", "packed"])
def test_a_device_makes_the_same(
    dataset: CellDataset, recipe: tokens.Recipe, padding: str, residency: str
) -> None:
    backend = EmulatedBackend()
    options = LoaderOptions.of(
        layout="tokens", tokens=recipe, token_seed=7, padding=padding, residency=residency
    )
    with device_loader(dataset, sampler(dataset), backend, options) as loader:
        loader.set_epoch(2)
        for batch in loader:
            index = batch["index"].numpy()
            made = expected(dataset, recipe, index, 2, padding=padding)
            if padding == "packed":
                assert batch["max_seqlen"] == made.pop("max_seqlen")
            check(batch, made)
            more = {"max_seqlen"} if padding == "packed" else set()
            assert set(batch) == {*made, "index", *dataset.columns} | more
    assert "token_sequences" in backend.launches


def test_a_device_says_what_it_found(tmp_path: Path) -> None:
    """Fractions are refused when their batch is asked for."""
    groups = example_groups()
    for group in groups:
        group.matrix = group.matrix.astype(np.float32) * 0.5
        group.codec = "zstd"
    odd = example_dataset(tmp_path, groups)
    words = {str(uid): i + 4 for i, uid in enumerate(odd.feature_uids)}
    recipe = tokens.ExpressedGenes(words, length=5, pad=0)
    options = LoaderOptions.of(layout="tokens", tokens=recipe)
    with (
        device_loader(odd, sampler(odd), EmulatedBackend(), options) as loader,
        pytest.raises(InvalidDataError, match="tokens are made of counts"),
    ):
        next(iter(loader))


def test_obs_columns_become_ids(dataset: CellDataset) -> None:
    words = {str(uid): i + 4 for i, uid in enumerate(dataset.feature_uids)}
    labeled = dataset.with_columns({"label": np.arange(len(dataset)) % 3})
    recipe = tokens.ExpressedGenes(
        words, length=5, pad=0, aux={"labels_of_mine": tokens.ObsTokens("label", {0: 5, 1: 6}, unknown=0)}
    )
    loader = make_loader(labeled, sampler(dataset), layout="tokens", tokens=recipe, executor="direct")
    with loader:
        for batch in loader:
            wanted = np.array([5, 6, 0])[batch["index"].numpy() % 3]
            assert batch["labels_of_mine"].tolist() == wanted.tolist()
            assert batch["label"].tolist() == (batch["index"] % 3).tolist()
    with pytest.raises(InvalidDataError, match="not opened with"):
        make_loader(dataset, sampler(dataset), layout="tokens", tokens=recipe)


def test_settings_that_do_not_fit(dataset: CellDataset, recipe: tokens.Recipe) -> None:
    order = sampler(dataset)
    with pytest.raises(ValueError, match="needs tokens="):
        make_loader(dataset, order, layout="tokens")
    with pytest.raises(ValueError, match='belongs to layout="tokens"'):
        make_loader(dataset, order, layout="dense", tokens=recipe)
    with pytest.raises(ValueError, match='belongs to layout="tokens"'):
        make_loader(dataset, order, layout="csr", padding="packed")
    with pytest.raises(ValueError, match="dtype and transform"):
        make_loader(dataset, order, layout="tokens", tokens=recipe, dtype="float64")
    with pytest.raises(ValueError, match="padding must be one of"):
        make_loader(dataset, order, layout="tokens", tokens=recipe, padding="short")
    with pytest.raises(ValueError, match="must be a recipe"):
        make_loader(dataset, order, layout="tokens", tokens="geneformer")  # type: ignore[arg-type]
    changed = tokens.compile(recipe, dataset.feature_uids[::-1])
    with pytest.raises(InvalidDataError, match="feature space has changed"):
        make_loader(dataset, order, layout="tokens", tokens=changed)


def test_loaders_say_what_matched(
    dataset: CellDataset, recipe: tokens.Recipe, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level("INFO", logger="hbx_gpu"):
        make_loader(dataset, sampler(dataset), layout="tokens", tokens=recipe).close()
    n = dataset.n_features
    assert any(f"{n} of {n} features are in the vocabulary" in r.getMessage() for r in caplog.records)


def test_tokens_beside_dense_proteins(multimodal: Any) -> None:
    rna, protein = multimodal.rna, multimodal.protein
    dataset = multimodal.dataset
    uids = dataset.datasets[rna].feature_uids
    words = {str(uid): i + 4 for i, uid in enumerate(uids)} | {
        "<pad>": 0,
        "<cls>": 1,
        "<eos>": 2,
        "<mask>": 3,
    }
    recipe = tokens.geneformer_v2(words, dict.fromkeys(map(str, uids), 2.0), length=9, mlm=0.2)
    order = CellSampler(dataset.groups_np, batch_size=8, seed=1)
    host = make_loader(
        dataset,
        order,
        layout={rna: "tokens", protein: "dense"},
        tokens=recipe,
        token_seed=5,
        executor="direct",
    )
    with pytest.raises(ValueError, match=f"layout was given for .*{protein}"):
        make_loader(dataset, order, layout={rna: "tokens", protein: "csr"}, tokens=recipe)
    device = device_loader(
        dataset, order, EmulatedBackend(),
        LoaderOptions.of(layout={rna: "tokens", protein: "dense"}, tokens={rna: recipe}, token_seed=5),
    )  # fmt: skip
    with host, device:
        for a, b in zip(host, device, strict=True):
            assert torch.equal(a["index"], b["index"])
            assert set(a[rna]) == set(b[rna]) == {"input_ids", "attention_mask", "lengths", "labels"}
            for name in a[rna]:
                assert torch.equal(a[rna][name], b[rna][name])
            assert torch.equal(a[protein]["X"], b[protein]["X"])
            rows = dataset.datasets[rna].__getitems__(a["index"].numpy())
            made = tokens.encode(rows, recipe, uids, 5, 0, a["index"].numpy(), engine="reference")
            check(a[rna], made)


class Multimodal:
    def __init__(self, path: Path) -> None:
        atlas = RaggedAtlas.checkout_latest(path)
        self.dataset: Any = atlas.query().to_multimodal_dataset(["gene_expression", "protein_abundance"])
        kinds = {name: part.kind for name, part in self.dataset.datasets.items()}
        self.rna = next(name for name, kind in kinds.items() if kind == "sparse")
        self.protein = next(name for name, kind in kinds.items() if kind == "matrix")


@pytest.fixture(scope="module")
def multimodal(homeobox_fixtures: Path) -> Multimodal:
    return Multimodal(homeobox_fixtures / "cite_multimodal" / "atlas")
