"""The Trainer of transformers with a loader: an order for each epoch, resumed in mid-epoch."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("transformers", reason="transformers is not installed")

from transformers import Trainer, TrainingArguments

from hbx_gpu.dataloader import make_loader
from hbx_gpu.integrations.accelerate import prepare
from hbx_gpu.sampler import CellSampler
from hbx_gpu.testing import example_dataset

pytestmark = pytest.mark.slow


class Model(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = torch.nn.Linear(50, 50)
        self.seen: list[list[int]] = []

    def forward(self, X: torch.Tensor, index: torch.Tensor, **_: Any) -> dict[str, torch.Tensor]:
        self.seen.append(index.tolist())
        x = torch.log1p(X)
        return {"loss": torch.nn.functional.mse_loss(self.layer(x), x)}


def test_a_run_and_the_rest_of_one(tmp_path: Path) -> None:
    dataset = example_dataset(tmp_path / "arrays")

    class CellTrainer(Trainer):  # type: ignore[misc]  # transformers is optional
        def get_train_dataloader(self) -> Any:
            order = CellSampler(dataset.groups_np, 16, seed=3)
            loader = make_loader(dataset, order, layout="dense", executor="direct", threads=1)
            return prepare(loader, self.accelerator)

    def run(**options: Any) -> list[list[int]]:
        arguments = TrainingArguments(
            output_dir=str(tmp_path / "out"),
            num_train_epochs=3,
            use_cpu=True,
            report_to=[],
            save_strategy="steps",
            save_steps=11,
            remove_unused_columns=False,
            disable_tqdm=True,
        )
        model = Model()
        CellTrainer(model=model, args=arguments).train(**options)
        return model.seen

    whole = run()
    for epoch in range(3):
        seen = whole[8 * epoch : 8 * epoch + 8]
        assert sorted(row for rows in seen for row in rows) == list(range(120))
    assert whole[:8] != whole[8:16]
    assert run(resume_from_checkpoint=str(tmp_path / "out" / "checkpoint-11")) == whole[11:]
