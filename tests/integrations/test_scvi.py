"""Models of scvi-tools on a dataset: the losses of AnnData, SCANVI, save and load, query data."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import anndata
import numpy as np
import pandas as pd
import pytest
import torch

pytest.importorskip("scvi", reason="scvi-tools is not installed")

import scvi
from scvi.model import SCANVI, SCVI

import hbx_gpu
from hbx_gpu.integrations.scvi import ScviDataModule, load_query_data

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]
N, GENES = 240, 30
KEYS: dict[str, Any] = {
    "batch_key": "batch",
    "labels_key": "type",
    "categorical_covariate_keys": ["sex", "site"],
    "continuous_covariate_keys": ["age"],
}
QUIET = {"enable_progress_bar": False, "logger": False, "enable_checkpointing": False, "accelerator": "cpu"}


def cells(seed: int = 0, batches: str = "ab") -> anndata.AnnData:
    rng = np.random.default_rng(seed)
    obs = pd.DataFrame(
        {
            "batch": pd.Categorical(rng.choice(list(batches), N)),
            "type": pd.Categorical(rng.choice(["B", "T", "NK", "unknown"], N)),
            "sex": pd.Categorical(rng.choice(["f", "m"], N)),
            "site": pd.Categorical(rng.choice(["x", "y", "z"], N)),
            "age": rng.normal(size=N).astype(np.float32),
            "size": rng.uniform(0.5, 2, N).astype(np.float32),
        },
        index=[f"c{i}" for i in range(N)],
    )
    rates = rng.gamma(1.0, 3.0, (4, GENES))[obs["type"].cat.codes]
    var = pd.DataFrame(index=[f"g{i}" for i in range(GENES)])
    return anndata.AnnData(rng.poisson(rates).astype(np.float32), obs=obs, var=var)


def dataset_of(adata: anndata.AnnData, folder: Path) -> Any:
    adata.write_h5ad(folder / "cells.h5ad")
    columns = list(adata.obs.columns)
    return hbx_gpu.open(str(folder / "cells.h5ad")).to_cell_dataset(layer="X", metadata_columns=columns)


@pytest.fixture(scope="module")
def adata() -> anndata.AnnData:
    return cells()


@pytest.fixture(scope="module")
def dataset(adata: anndata.AnnData, tmp_path_factory: pytest.TempPathFactory) -> Any:
    return dataset_of(adata, tmp_path_factory.mktemp("scvi"))


def module(dataset: Any, **options: Any) -> ScviDataModule:
    plain: dict[str, Any] = {"batch_size": 64, "executor": "direct"}
    return ScviDataModule(dataset, **(plain | KEYS | options))


def steps(model: Any, batches: Any, n_epochs: int = 2) -> list[float]:
    """Losses of training steps over batches in the order in which they come."""
    batches = list(batches)  # torch's loader draws a seed when it is iterated
    torch.manual_seed(1)
    optimizer = torch.optim.Adam(model.module.parameters(), lr=1e-3)
    model.module.train()
    losses = []
    for _ in range(n_epochs):
        for batch in batches:
            _, _, output = model.module(batch, loss_kwargs={"kl_weight": 1.0})
            optimizer.zero_grad()
            output.loss.backward()
            optimizer.step()
            losses.append(output.loss.item())
    return losses


@pytest.mark.parametrize("size_factor", [None, "size"])
def test_losses_equal_those_of_anndata(adata: anndata.AnnData, dataset: Any, size_factor: str | None) -> None:
    """Equal weights and order: the same cells, codes and covariates give the same losses."""
    copy = adata.copy()
    SCVI.setup_anndata(copy, size_factor_key=size_factor, **KEYS)
    scvi.settings.seed = 0
    theirs = SCVI(copy, n_hidden=16, n_latent=4)
    data = module(dataset, size_factor_key=size_factor)
    scvi.settings.seed = 0
    ours = SCVI(registry=data.registry, n_hidden=16, n_latent=4)
    for a, b in zip(ours.module.state_dict().values(), theirs.module.state_dict().values(), strict=True):
        assert torch.equal(a, b)
    expected = steps(theirs, theirs._make_data_loader(adata=copy, batch_size=64))
    found = steps(ours, data.inference_dataloader(batch_size=64))
    assert np.allclose(found, expected, rtol=1e-5)
    assert len(set(found)) == len(found)


def test_three_lines_train_a_model_that_can_be_saved_and_loaded(dataset: Any, tmp_path: Path) -> None:
    data = module(dataset, fractions={"train": 0.7, "val": 0.3}, stratify_by="batch")
    model = SCVI(registry=data.registry, n_hidden=16, n_latent=4)
    logged = {name: value for name, value in QUIET.items() if name != "logger"}
    model.train(
        datamodule=data, max_epochs=20, early_stopping=True, early_stopping_patience=1,
        early_stopping_min_delta=50.0, check_val_every_n_epoch=1, **logged,
    )  # fmt: skip
    history = model.history["train_loss"].to_numpy().ravel()
    assert 1 <= len(history) < 20  # stopped early, by the validation split
    assert len(model.history["validation_loss"]) == len(history)
    assert np.array_equal(model.train_indices, data.rows["train"])
    latent = model.get_latent_representation(dataloader=data.inference_dataloader())
    assert latent.shape == (N, 4)

    model.save(str(tmp_path / "model"), datamodule=data)
    loaded = SCVI.load(str(tmp_path / "model"), adata=False, accelerator="cpu")
    again = loaded.get_latent_representation(dataloader=data.inference_dataloader(batch_size=50))
    assert np.allclose(again, latent, atol=1e-5)
    some = np.array([5, 17, 100])
    part = loaded.get_latent_representation(dataloader=data.inference_dataloader(indices=some))
    assert np.allclose(part, latent[some], atol=1e-5)
    loaded.train(datamodule=data, max_epochs=1, **QUIET)


def test_a_run_is_resumed(dataset: Any, tmp_path: Path) -> None:
    """Two epochs, a checkpoint in the middle of the second: the rest of it, then the third."""
    from lightning.pytorch import Callback

    class Save(Callback):
        def on_train_batch_end(self, trainer: Any, *_: Any) -> None:
            if trainer.global_step == 6:
                trainer.save_checkpoint(tmp_path / "last.ckpt")

    class Seen(Callback):
        def __init__(self) -> None:
            self.rows: list[list[int]] = []

        def on_train_batch_start(self, _trainer: Any, _module: Any, batch: Any, _index: int) -> None:
            self.rows.append(batch["ind_x"].ravel().tolist())

    whole, rest = Seen(), Seen()
    options = {**QUIET, "max_epochs": 3}
    data = module(dataset)
    SCVI(registry=data.registry).train(datamodule=data, callbacks=[whole, Save()], **options)
    data = module(dataset)
    SCVI(registry=data.registry).train(
        datamodule=data, callbacks=[rest], ckpt_path=tmp_path / "last.ckpt", **options
    )
    assert len(whole.rows) == 12
    assert rest.rows == whole.rows[6:]


def test_scanvi_learns_labels(dataset: Any, adata: anndata.AnnData) -> None:
    data = module(
        dataset, unlabeled_category="unknown", model_name="SCANVI", fractions={"train": 0.8, "val": 0.2}
    )
    assert data.labels.tolist() == ["B", "NK", "T", "unknown"]
    assert data.labels_.tolist() == adata.obs["type"].tolist()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = SCANVI(registry=data.registry, datamodule=data, n_hidden=32, n_latent=5)
        model.train(datamodule=data, max_epochs=25, check_val_every_n_epoch=25, **QUIET)
    assert model.n_labels == 3
    found = model.predict(dataloader=data.inference_dataloader())
    labels = np.asarray(found[0] if isinstance(found, tuple) else found).ravel()
    known = (adata.obs["type"] != "unknown").to_numpy()
    assert set(labels.tolist()) <= {"B", "NK", "T"}
    assert (labels[known] == adata.obs["type"].to_numpy()[known]).mean() > 0.8


def test_query_data_with_a_new_batch(dataset: Any, tmp_path: Path) -> None:
    """Weights of what the reference knew are kept; training changes those of the new batch only."""
    none = {"categorical_covariate_keys": None, "continuous_covariate_keys": None}
    reference = module(dataset, **none)
    query = module(dataset_of(cells(1, "bc"), tmp_path), reference=reference, **none)
    assert query.batch_labels.tolist() == ["a", "b", "c"]
    assert query.labels.tolist() == reference.labels.tolist()
    model = SCVI(registry=reference.registry, n_hidden=16, n_latent=4)
    model.train(datamodule=reference, max_epochs=1, **QUIET)
    model.save(str(tmp_path / "model"), datamodule=reference)
    grown = load_query_data(SCVI, tmp_path / "model", query)
    name = "decoder.px_decoder.fc_layers.Layer 0.0.weight"
    old, new = (m.module.state_dict()[name].clone() for m in (model, grown))
    assert (old.shape, new.shape) == ((16, 6), (16, 7))
    assert torch.equal(old, new[:, :6])
    grown.train(datamodule=query, max_epochs=1, plan_kwargs={"weight_decay": 0.0}, **QUIET)
    trained = grown.module.state_dict()[name]
    assert torch.equal(trained[:, :4], old[:, :4])
    assert not torch.equal(trained[:, 6], new[:, 6])
    assert grown.get_latent_representation(dataloader=query.inference_dataloader()).shape == (N, 4)


def test_query_data_with_a_new_batch_and_covariates(dataset: Any, tmp_path: Path) -> None:
    """Cells of the reference have the latent values that they had: each weight is at its category."""
    reference = module(dataset)
    model = SCVI(registry=reference.registry, n_hidden=16, n_latent=4, encode_covariates=True)
    model.train(datamodule=reference, max_epochs=1, **QUIET)
    before = model.get_latent_representation(dataloader=reference.inference_dataloader())
    query = module(dataset_of(cells(1, "bc"), tmp_path), reference=reference)
    grown = load_query_data(SCVI, model, query)
    name = "z_encoder.encoder.fc_layers.Layer 0.0.weight"
    old, new = (m.module.state_dict()[name] for m in (model, grown))
    assert (old.shape[1], new.shape[1]) == (GENES + 1 + 2 + 5, GENES + 1 + 3 + 5)
    grown.is_trained_ = True
    after = grown.get_latent_representation(dataloader=reference.inference_dataloader())
    assert np.allclose(after, before, atol=1e-5)
    grown.is_trained_ = False
    grown.train(datamodule=query, max_epochs=1, plan_kwargs={"weight_decay": 0.0}, **QUIET)
    assert grown.get_latent_representation(dataloader=query.inference_dataloader()).shape == (N, 4)


def test_splits_of_train_unless_the_module_has_its_own(dataset: Any) -> None:
    data = module(dataset)
    data.set_split(train_size=0.5, validation_size=0.25, batch_size=32)
    assert (data.n_train, data.n_val, len(data.test_idx), data.batch_size) == (120, 60, 60, 32)
    data.set_split(train_size=0.75, shuffle_set_split=False)
    assert data.val_idx.tolist() == list(range(60))
    assert data.train_idx.tolist() == list(range(60, N))
    fixed = module(dataset, fractions={"train": 0.5})
    fixed.set_split(train_size=0.9)
    assert fixed.n_train == 120


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ({"batch_key": "donor"}, "no column 'donor'"),
        ({"continuous_covariate_keys": ["sex"]}, "'sex' does not hold numbers"),
    ],
)
def test_wrong_columns(dataset: Any, options: dict[str, Any], told: str) -> None:
    with pytest.raises(ValueError, match=told):
        module(dataset, **options)


def test_a_reference_with_other_features_or_categories(
    dataset: Any, adata: anndata.AnnData, tmp_path: Path
) -> None:
    other = adata[:, ::-1].copy()
    with pytest.raises(ValueError, match=r"or in another order: .*features\(list"):
        module(dataset_of(other, tmp_path), reference=module(dataset))
    other = adata.copy()
    other.obs["site"] = pd.Categorical(["q"] * N)
    with pytest.raises(ValueError, match=r"'site' has \['q'\], which the reference does not have"):
        module(dataset_of(other, tmp_path), reference=module(dataset).registry)
    other.obs["batch"] = other.obs["batch"].where(np.arange(N) > 2)
    with pytest.raises(ValueError, match="3 cells have no value in the column 'batch'"):
        module(dataset_of(other, tmp_path))
