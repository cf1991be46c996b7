"""One rank of a training run, for the test of ranks: ``rank_job.py ATLAS OUT EXECUTOR...``."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from hbx_gpu.atlas import RaggedAtlas
from hbx_gpu.dataloader import make_loader
from hbx_gpu.sampler import CellSampler


def main(atlas: str, out: str, *executors: str) -> None:
    """Two epochs with each executor."""
    dist.init_process_group("gloo")
    for executor in executors:
        seen = epochs(atlas, executor)
        Path(out, f"{executor}{dist.get_rank()}.json").write_text(json.dumps(seen))
    dist.destroy_process_group()


def epochs(atlas: str, executor: str) -> list[dict[str, Any]]:
    """What this rank saw; every step is a collective, so that a rank with a step too many would hang."""
    dataset = RaggedAtlas.checkout_latest(atlas).query().to_cell_dataset()
    sampler = CellSampler(dataset.groups_np, batch_size=48, seed=9, num_workers=0, locality="none")
    seen = []
    with make_loader(dataset, sampler, layout="dense", executor=executor) as loader:
        for epoch in range(2):
            loader.set_epoch(epoch)
            for batch in loader:
                total = batch["X"].sum(dtype=torch.float64)
                dist.all_reduce(total)
                seen.append({"epoch": epoch, "rows": batch["index"].tolist(), "total": float(total)})
    return seen


if __name__ == "__main__":
    main(*sys.argv[1:])
