"""Lightning trains with a plain loader: orders, resume, predictions, Fabric, and the data module."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.utils.data import BatchSampler, RandomSampler

pytest.importorskip("lightning", reason="Lightning is not installed")

from lightning.fabric import Fabric
from lightning.pytorch import Callback, Trainer
from lightning.pytorch.callbacks import BasePredictionWriter
from lightning.pytorch.utilities import CombinedLoader

from hbx_gpu.dataloader import CellDataset, make_loader
from hbx_gpu.integrations.lightning import CellDataModule
from hbx_gpu.sampler import CellSampler
from tests.dali import need_dali
from tests.integrations.recording import BATCH, N_ROWS, Recorder, new_dataset, new_loader

ALL = list(range(N_ROWS))
N_BATCHES = 8


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> CellDataset:
    return new_dataset(tmp_path_factory.mktemp("arrays"))


def flat(batches: list[list[int]]) -> list[int]:
    return [row for rows in batches for row in rows]


def trainer(**options: Any) -> Trainer:
    quiet: Any = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False}
    plain: Any = {"enable_checkpointing": False, "accelerator": "cpu", "max_epochs": 2}
    return Trainer(**quiet, **(plain | options))


def fitted(loader: Any, **options: Any) -> Recorder:
    model = Recorder()
    trainer(**options).fit(model, loader)
    return model


def test_each_epoch_has_all_rows_in_an_order_of_its_own(dataset: CellDataset) -> None:
    loader = new_loader(dataset)
    model = fitted(loader)
    assert [len(rows) for _, rows in model.seen[:N_BATCHES]] == [BATCH] * 7 + [8]
    assert sorted(model.rows(0)) == sorted(model.rows(1)) == ALL
    assert model.rows(0) != model.rows(1)
    for epoch in range(2):
        order = CellSampler(dataset.groups_np, BATCH, seed=3)
        order.set_epoch(epoch)
        assert model.rows(epoch) == [row for rows in order for row in rows]


class Save(Callback):
    """Writes a checkpoint at the end of a training step of an epoch, of its validation, or of the epoch."""

    def __init__(self, path: Path, when: str, epoch: int, step: int = N_BATCHES - 1) -> None:
        self.path, self.when, self.at = path, when, (epoch, step)

    def _save(self, trainer: Trainer, when: str, step: int) -> None:
        if (when, trainer.current_epoch, step) == (self.when, *self.at) and not trainer.sanity_checking:
            trainer.save_checkpoint(self.path)

    def on_train_batch_end(self, trainer: Any, _module: Any, _outputs: Any, _batch: Any, step: int) -> None:
        self._save(trainer, "batch", step)

    def on_validation_end(self, trainer: Any, _module: Any) -> None:
        self._save(trainer, "validation", self.at[1])

    def on_train_epoch_end(self, trainer: Any, _module: Any) -> None:
        self._save(trainer, "epoch", self.at[1])


@pytest.mark.parametrize(
    ("when", "epoch", "step"),
    [
        ("batch", 0, 2),
        ("batch", 1, 4),
        ("batch", 1, N_BATCHES - 1),
        ("validation", 0, N_BATCHES - 1),
        ("validation", 1, N_BATCHES - 1),
        ("epoch", 1, N_BATCHES - 1),
    ],
)
def test_a_run_goes_on_where_its_checkpoint_was_written(
    dataset: CellDataset, tmp_path: Path, when: str, epoch: int, step: int
) -> None:
    """The two runs together see what an uninterrupted one sees, batch by batch."""
    path = tmp_path / "last.ckpt"
    whole = Recorder()
    saving = trainer(max_epochs=4, callbacks=[Save(path, when, epoch, step)])
    saving.fit(whole, new_loader(dataset), new_loader(dataset, shuffle=False))
    resumed = Recorder()
    again = trainer(max_epochs=4)
    again.fit(resumed, new_loader(dataset), new_loader(dataset, shuffle=False), ckpt_path=path)
    assert resumed.seen == whole.seen[epoch * N_BATCHES + step + 1 :]
    assert again.global_step == saving.global_step == 4 * N_BATCHES


def test_a_loader_through_dali_resumes_too(dataset: CellDataset, tmp_path: Path) -> None:
    need_dali()

    def loader() -> Any:
        order = CellSampler(dataset.groups_np, BATCH, seed=3)
        return make_loader(dataset, order, layout="dense", executor="dali")

    whole, resumed = Recorder(), Recorder()
    trainer(callbacks=[Save(tmp_path / "last.ckpt", "batch", 0, 4)]).fit(whole, loader())
    trainer().fit(resumed, loader(), ckpt_path=tmp_path / "last.ckpt")
    assert resumed.seen == whole.seen[5:]


def test_limited_epochs_resume_with_the_next_epoch(dataset: CellDataset, tmp_path: Path) -> None:
    """Of each epoch Lightning takes the first three batches; what is left of it is not caught up on."""
    path = tmp_path / "last.ckpt"
    whole, resumed = Recorder(), Recorder()
    limits = {"max_epochs": 3, "limit_train_batches": 3}
    trainer(callbacks=[Save(path, "batch", 1, 1)], **limits).fit(whole, new_loader(dataset))
    trainer(**limits).fit(resumed, new_loader(dataset), ckpt_path=path)
    assert len(whole.seen) == 9
    assert resumed.seen == whole.seen[5:]
    assert len({tuple(rows) for _, rows in whole.seen}) == 9


@pytest.mark.filterwarnings("default")  # `pytest.warns` forgets whose warnings the others are
def test_overfit_batches_are_the_same_in_each_epoch(dataset: CellDataset) -> None:
    with pytest.warns(UserWarning, match="turning off the train dataloader shuffling"):
        model = fitted(new_loader(dataset), overfit_batches=2, max_epochs=3)
    assert [rows for _, rows in model.seen] == [ALL[:16], ALL[16:32]] * 3


@pytest.mark.filterwarnings("default")  # `pytest.warns` forgets whose warnings the others are
def test_overfit_batches_stay_within_the_rows_of_the_sampler(dataset: CellDataset) -> None:
    loader = new_loader(dataset, rows=np.arange(1, N_ROWS, 2))
    with pytest.warns(UserWarning, match="turning off"):
        model = fitted(loader, overfit_batches=1)
    assert [rows for _, rows in model.seen] == [ALL[1:33:2]] * 2
    with pytest.warns(UserWarning, match="turning off"):
        model = fitted(CellDataModule(dataset, fractions={"train": 0.5}, batch_size=BATCH), overfit_batches=1)
    train = CellDataModule(dataset, fractions={"train": 0.5}).rows["train"].tolist()
    assert [rows for _, rows in model.seen] == [train[:BATCH]] * 2


def test_combined_loaders(dataset: CellDataset, tmp_path: Path) -> None:
    """The shorter of two loaders begins again; both continue after a checkpoint."""

    class Two(Recorder):
        def training_step(self, batch: Any) -> torch.Tensor:
            self.held.append(("short", batch["short"]["index"].tolist()))
            return super().training_step(batch["long"])

    def loaders() -> CombinedLoader:
        short = new_loader(dataset, rows=np.arange(40))
        return CombinedLoader({"long": new_loader(dataset), "short": short}, "max_size_cycle")

    whole, resumed = Two(), Two()
    trainer(callbacks=[Save(tmp_path / "last.ckpt", "batch", 0, 3)]).fit(whole, loaders())
    trainer().fit(resumed, loaders(), ckpt_path=tmp_path / "last.ckpt")
    assert sorted(whole.rows(0)) == sorted(whole.rows(1)) == ALL
    assert sorted(flat([rows for _, rows in whole.held[:3]])) == ALL[:40]
    assert resumed.seen == whole.seen[4:]
    assert resumed.held == whole.held[4:]


class Keep(BasePredictionWriter):
    def __init__(self) -> None:
        super().__init__("batch_and_epoch")
        self.batches: list[list[int]] = []
        self.epoch: list[list[int]] = []

    def write_on_batch_end(self, *args: Any) -> None:
        self.batches.append(args[3])

    def write_on_epoch_end(self, *args: Any) -> None:
        self.epoch = args[3][0]


@pytest.mark.parametrize("workers", [0, pytest.param(1, marks=pytest.mark.slow)])
def test_predictions_come_with_their_rows(dataset: CellDataset, workers: int) -> None:
    keep = Keep()
    order = CellSampler(dataset.groups_np, BATCH, shuffle=False)
    loader = make_loader(dataset, order, layout="dense", num_workers=workers)
    found: Any = trainer(callbacks=[keep]).predict(Recorder(), loader)
    assert found is not None
    rows = [batch["row"].tolist() for batch in found]
    assert keep.batches == keep.epoch == rows
    assert flat(rows) == ALL


def test_fabric_goes_on_too(dataset: CellDataset, tmp_path: Path) -> None:
    """Fabric counts epochs from 0 in every process."""
    fabric = Fabric(accelerator="cpu", devices=1)

    def run(fabric_loader: Any, epochs: int, save_after: int | None = None) -> list[list[int]]:
        seen = []
        for _ in range(epochs):
            for batch in fabric_loader:
                seen.append(batch["index"].tolist())
                if len(seen) == save_after:
                    fabric.save(tmp_path / "state.ckpt", {"loader": fabric_loader})
        return seen

    loader = new_loader(dataset)
    whole = run(fabric.setup_dataloaders(loader), 3, save_after=11)
    assert sorted(flat(whole[:8])) == sorted(flat(whole[16:])) == ALL
    assert whole[:8] != whole[8:16] != whole[16:]
    loader = new_loader(dataset)
    fabric_loader = fabric.setup_dataloaders(loader)
    fabric.load(tmp_path / "state.ckpt", {"loader": fabric_loader})
    assert loader.epoch == 1
    assert run(fabric_loader, 2) == whole[11:]


def test_torch_samplers_are_replaced_where_ranks_are_known(dataset: CellDataset) -> None:
    """A sampler that does not know of ranks looks like one, so that frameworks deal its rows."""
    loader = make_loader(dataset, RandomSampler(range(N_ROWS)), batch_size=BATCH, layout="dense")
    assert isinstance(loader.sampler, RandomSampler)
    assert sorted(fitted(loader).rows(1)) == ALL

    class Pairs(BatchSampler):
        pass

    batches = Pairs(RandomSampler(range(N_ROWS)), BATCH, False)
    assert not hasattr(make_loader(dataset, batches, layout="dense").sampler, "num_replicas")


def codes(dataset: CellDataset, rows: np.ndarray) -> set[int]:
    return set(np.asarray(dataset.columns["type"])[rows].tolist())


def test_splits_by_fraction_and_by_column(dataset: CellDataset) -> None:
    data = CellDataModule(dataset, fractions={"train": 0.5, "val": 0.3, "test": 0.2}, batch_size=BATCH)
    model = Recorder()
    runs = trainer()
    runs.fit(model, datamodule=data)
    assert sorted(model.rows(0)) == data.rows["train"].tolist() != model.rows(0)
    assert len(data.rows["train"]) == 60
    model.held.clear()
    runs.validate(model, datamodule=data, verbose=False)
    runs.test(model, datamodule=data, verbose=False)
    for name in ("val", "test"):
        assert flat([rows for at, rows in model.held if at == name]) == data.rows[name].tolist()
    predicted: Any = runs.predict(model, datamodule=data)
    assert predicted is not None
    assert torch.cat([batch["row"] for batch in predicted]).tolist() == ALL

    data = CellDataModule(dataset, split_by="type", splits={"val": ["b"]})
    assert (codes(dataset, data.rows["train"]), codes(dataset, data.rows["val"])) == ({1}, {0})
    assert data.test_dataloader() == []
    trainer().fit(Recorder(), datamodule=data)


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        ({"split_by": "type"}, "holds none of 'train', 'val', 'test', only .*'b', 't'.* splits="),
        ({"split_by": "type", "splits": {"val": ["x"]}}, r"no value \['x'\]"),
        ({"split_by": "type", "splits": {"val": ["b"], "test": ["b"]}}, "in two splits"),
        ({"split_by": "donor"}, "no column 'donor', only .*metadata_columns"),
        ({"split_by": "type", "fractions": {"train": 1.0}}, "pass one of them"),
        ({"splits": {"val": ["b"]}}, "pass split_by= too"),
        ({"group_by": "type"}, "pass fractions= too"),
        ({"fractions": {"train": 0.5, "valid": 0.5}}, r"splits are called .* got \['valid'\]"),
        ({"predict": "everything"}, "splits are called"),
    ],
)
def test_wrong_splits(dataset: CellDataset, arguments: dict[str, Any], told: str) -> None:
    with pytest.raises(ValueError, match=told):
        CellDataModule(dataset, **arguments)


def test_the_sampler_of_training_batches_is_yours(dataset: CellDataset) -> None:
    def sampler(rows: np.ndarray) -> CellSampler:
        return CellSampler(dataset.groups_np, 30, seed=5, drop_last=True, rows=rows)

    data = CellDataModule(dataset, fractions={"train": 0.6, "val": 0.4}, sampler=sampler)
    model = Recorder()
    trainer(max_epochs=1).fit(model, datamodule=data)
    assert [len(rows) for _, rows in model.seen] == [30, 30]
