"""A model that writes down the rows it is given, and a dataset of 120 rows for it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import LightningModule

from hbx_gpu.dataloader import CellDataset, make_loader
from hbx_gpu.sampler import CellSampler
from hbx_gpu.testing import N_FEATURES, example_dataset

N_ROWS = 120
BATCH = 16


class Recorder(LightningModule):
    """Linear autoencoder; `seen` has (epoch, rows) of every training step, `held` those of the others."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = torch.nn.Linear(N_FEATURES, N_FEATURES)
        self.seen: list[tuple[int, list[int]]] = []
        self.held: list[tuple[str, list[int]]] = []

    def loss(self, batch: Any) -> torch.Tensor:
        x = torch.log1p(batch["X"])
        return torch.nn.functional.mse_loss(self.layer(x), x)

    def training_step(self, batch: Any) -> torch.Tensor:
        self.seen.append((self.current_epoch, batch["index"].tolist()))
        return self.loss(batch)

    def validation_step(self, batch: Any) -> None:
        self.held.append(("val", batch["index"].tolist()))
        self.log("val", self.loss(batch), batch_size=len(batch["index"]), sync_dist=True)

    def test_step(self, batch: Any) -> None:
        self.held.append(("test", batch["index"].tolist()))

    def predict_step(self, batch: Any) -> dict[str, torch.Tensor]:
        return {"row": batch["index"], "value": self.layer(batch["X"])}

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=1e-3)

    def rows(self, epoch: int) -> list[int]:
        """Training rows of an epoch, in the order in which they came."""
        return [row for at, rows in self.seen if at == epoch for row in rows]


def new_loader(dataset: CellDataset, **options: Any) -> Any:
    order = {"batch_size": BATCH, "seed": 3} | options
    return make_loader(dataset, CellSampler(dataset.groups_np, **order), layout="dense", threads=2)


def new_dataset(folder: Path) -> CellDataset:
    return example_dataset(folder)
