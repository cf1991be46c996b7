"""Loaders under Hugging Face accelerate: each cell once on two processes, accumulation, checkpoints."""

from __future__ import annotations

import json
import pickle
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("accelerate", reason="accelerate is not installed")

from accelerate import Accelerator

from hbx_gpu.dataloader import CellDataset, make_loader
from hbx_gpu.integrations.accelerate import prepare
from hbx_gpu.sampler import CellSampler
from hbx_gpu.testing import example_dataset
from tests import fresh
from tests.emulation.build import outer_environment

ROOT = Path(__file__).resolve().parents[2]
ALL = list(range(120))


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> CellDataset:
    return example_dataset(tmp_path_factory.mktemp("arrays"))


def new_loader(dataset: CellDataset) -> Any:
    sampler = CellSampler(dataset.groups_np, 16, seed=3)
    return make_loader(dataset, sampler, layout="dense", threads=1, executor="direct")


def rows(batches: list[list[int]]) -> list[int]:
    return sorted(row for batch in batches for row in batch)


def test_gradients_are_accumulated_to_the_end_of_the_epoch(dataset: CellDataset) -> None:
    accelerator = Accelerator(cpu=True, gradient_accumulation_steps=3)
    model = torch.nn.Linear(50, 50)
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-4)
    loader = prepare(new_loader(dataset), accelerator)
    model, optimizer, prepared = accelerator.prepare(model, optimizer, loader)
    assert prepared is loader
    seen: list[list[int]] = []
    stepped: list[int] = []
    for _ in range(2):
        for batch in prepared:
            with accelerator.accumulate(model):
                x = torch.log1p(batch["X"])
                accelerator.backward(torch.nn.functional.mse_loss(model(x), x))
                if accelerator.sync_gradients:
                    stepped.append(len(seen))
                optimizer.step()
                optimizer.zero_grad()
            seen.append(batch["index"].tolist())
    assert stepped == [2, 5, 7, 10, 13, 15]
    assert rows(seen[:8]) == rows(seen[8:]) == ALL
    assert seen[:8] != seen[8:]
    assert not accelerator.gradient_state.in_dataloader


def test_a_checkpoint_in_mid_epoch(dataset: CellDataset, tmp_path: Path) -> None:
    accelerator = Accelerator(cpu=True)
    loader = prepare(new_loader(dataset), accelerator)
    accelerator.register_for_checkpointing(loader)
    whole: list[list[int]] = []
    for _ in range(3):
        for batch in loader:
            whole.append(batch["index"].tolist())
            if len(whole) == 11:
                accelerator.save_state(tmp_path / "state")
    again = Accelerator(cpu=True)
    resumed = prepare(new_loader(dataset), again)
    again.register_for_checkpointing(resumed)
    again.load_state(tmp_path / "state")
    rest: list[list[int]] = []
    ends: list[int] = []
    for _ in range(2):
        for batch in resumed:
            rest.append(batch["index"].tolist())
            if resumed.end_of_dataloader:
                ends.append(len(rest))
    assert rest == whole[11:]
    assert ends == [5, 13]


JOB = """
import json, pickle, sys
import torch
from accelerate import Accelerator
from hbx_gpu.dataloader import make_loader
from hbx_gpu.integrations.accelerate import prepare
from hbx_gpu.sampler import CellSampler

torch.set_num_threads(1)
folder = sys.argv[1]
dataset = pickle.load(open(f"{folder}/dataset.pickle", "rb"))
options = dict(layout="dense", threads=1, executor="direct")
plain = make_loader(dataset, CellSampler(dataset.groups_np, 16, seed=3), **options)
random = make_loader(dataset, torch.utils.data.RandomSampler(range(120)), batch_size=15, **options)
inner = make_loader(dataset, CellSampler(dataset.groups_np, 16, seed=3), **options)
accelerator = Accelerator(cpu=True)
model = torch.nn.Linear(50, 50)
model, plain, prepared, random = accelerator.prepare(model, plain, prepare(inner, accelerator), random)
found = {}
for name, loader in {"plain": plain, "prepared": prepared, "random": random}.items():
    found[name] = []
    for epoch in range(2):
        if name == "plain":
            loader.set_epoch(epoch)
        for batch in loader:
            loss = model(torch.log1p(batch["X"])).square().mean()
            accelerator.backward(loss)
            found[name].append([epoch, batch["index"].tolist()])
json.dump(found, open(f"{folder}/rank{accelerator.process_index}.json", "w"))
accelerator.end_training()
"""


@pytest.mark.slow
@pytest.mark.timeout(400)
def test_two_processes_share_the_cells(dataset: CellDataset, tmp_path: Path) -> None:
    (tmp_path / "dataset.pickle").write_bytes(pickle.dumps(dataset))
    (tmp_path / "job.py").write_text(JOB)
    # What a launcher sets.
    environment = outer_environment() | {"PYTHONPATH": str(ROOT), "ACCELERATE_USE_CPU": "true"}
    environment |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(fresh.free_port())}
    environment |= {"WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2"}
    processes = [
        fresh.popen(
            [sys.executable, tmp_path / "job.py", tmp_path],
            env=environment | {"RANK": rank, "LOCAL_RANK": rank},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
        )
        for rank in "01"
    ]
    try:
        outputs = [process.communicate(timeout=300)[0] for process in processes]
    finally:
        for process in processes:
            process.kill()
    assert [process.returncode for process in processes] == [0, 0], outputs
    ranks = [json.loads((tmp_path / f"rank{rank}.json").read_text()) for rank in range(2)]
    for name in ("plain", "prepared", "random"):
        for epoch in range(2):
            seen = [[batch for at, batch in rank[name] if at == epoch] for rank in ranks]
            assert len(seen[0]) == len(seen[1])
            assert rows(seen[0] + seen[1]) == ALL, (name, epoch)
