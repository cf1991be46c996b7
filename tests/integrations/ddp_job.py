"""What a training script does: `ddp_job.py FOLDER STAGE DEVICES [CHECKPOINT]`; rows go to files by rank.

Lightning starts the other ranks by running this script again. Every loader is made before the process group.
"""

from __future__ import annotations

import json
import os
import pickle
import signal
import sys
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from torch.utils.data import RandomSampler

from hbx_gpu.dataloader import make_loader
from tests.integrations.recording import BATCH, N_ROWS, Recorder, new_loader

KILLED_AFTER = 11  # steps: in the second epoch


class Mortal(Recorder):
    """Writes its rows down at once, and is killed in a step before it is done."""

    def __init__(self, log: Path) -> None:
        super().__init__()
        self.log_file = log

    def on_train_batch_end(self, *_: Any) -> None:
        with self.log_file.open("a") as file:
            file.write(json.dumps(self.seen[-1]) + "\n")

    def on_train_batch_start(self, _batch: Any, _batch_idx: int) -> None:
        if len(self.seen) == KILLED_AFTER:
            os.kill(os.getpid(), signal.SIGKILL)


class Saving(Recorder):
    """Writes a checkpoint after the second batch of the third epoch."""

    def on_train_batch_end(self, _outputs: Any, _batch: Any, batch_idx: int) -> None:
        if (self.current_epoch, batch_idx) == (2, 1):
            self.trainer.save_checkpoint(Path(self.trainer.default_root_dir) / "two.ckpt")


def trainer(folder: Path, devices: int, **options: Any) -> Trainer:
    quiet: Any = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False}
    plain: Any = {"max_epochs": 3, "enable_checkpointing": False, "default_root_dir": folder}
    strategy = "ddp" if devices > 1 else "auto"
    return Trainer(accelerator="cpu", devices=devices, strategy=strategy, **quiet, **(plain | options))


def main(folder: Path, stage: str, devices: int, checkpoint: str | None) -> None:
    torch.set_num_threads(1)
    dataset = pickle.loads((folder / "dataset.pickle").read_bytes())
    found: dict[str, Any] = {}
    if stage == "kill":
        saves = ModelCheckpoint(folder, filename="last", every_n_train_steps=1, save_top_k=1, monitor=None)
        run = trainer(folder, devices, callbacks=[saves], enable_checkpointing=True)
        run.fit(Mortal(folder / "killed.jsonl"), new_loader(dataset))
        return
    loader = new_loader(dataset)
    model: Recorder = Saving()
    run = trainer(folder, devices)
    run.fit(model, loader, new_loader(dataset, shuffle=False), ckpt_path=checkpoint)
    found["fit"], found["val"] = model.seen, model.held
    predicted: Any = run.predict(model, new_loader(dataset, shuffle=False))
    assert predicted is not None
    found["predict"] = [batch["row"].tolist() for batch in predicted]
    model = Recorder()
    trainer(folder, devices, overfit_batches=1, max_epochs=2).fit(model, new_loader(dataset))
    found["overfit"] = model.seen
    model = Recorder()
    plain = make_loader(dataset, RandomSampler(range(N_ROWS)), batch_size=BATCH, layout="dense", threads=1)
    trainer(folder, devices, max_epochs=2).fit(model, plain)
    found["torch"] = model.seen
    (folder / f"rank{run.global_rank}.json").write_text(json.dumps(found))


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2], int(sys.argv[3]), sys.argv[4] if len(sys.argv) > 4 else None)
