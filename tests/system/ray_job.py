"""A job of Ray Train, for its test: ``ray_job.py ATLAS OUT``."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

import ray
import torch
import torch.distributed as dist
from ray.train import RunConfig, ScalingConfig
from ray.train.torch import TorchTrainer


def train(config: dict[str, Any]) -> None:
    """One epoch on one worker, which takes its rank from the process group that Ray Train made."""
    from hbx_gpu.atlas import RaggedAtlas
    from hbx_gpu.dataloader import make_loader
    from hbx_gpu.sampler import CellSampler

    dataset = RaggedAtlas.checkout_latest(config["atlas"]).query().to_cell_dataset()
    sampler = CellSampler(dataset.group_runs, batch_size=48, seed=9)
    seen = []
    with make_loader(dataset, sampler, layout="csr") as loader:
        for batch in loader:
            total = batch["X"].values().sum(dtype=torch.float64)
            dist.all_reduce(total)
            seen.append({"rows": batch["index"].tolist(), "total": float(total)})
    Path(config["out"], f"rank{dist.get_rank()}.json").write_text(json.dumps(seen))


def main(atlas: str, out: str) -> None:
    """Two workers on the processors of this machine."""
    ray.init(
        num_cpus=2,
        include_dashboard=False,
        _temp_dir=os.path.join(out, "r"),
        object_store_memory=100 << 20,
        runtime_env={"env_vars": {"PYTHONPATH": os.environ.get("PYTHONPATH", "")}},
    )
    TorchTrainer(
        train,
        train_loop_config={"atlas": atlas, "out": out},
        scaling_config=ScalingConfig(num_workers=2, use_gpu=False),
        run_config=RunConfig(name="run", storage_path=os.path.join(out, "results")),
    ).fit()
    ray.shutdown()


if __name__ == "__main__":
    main(*sys.argv[1:])
