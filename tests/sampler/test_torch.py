"""Samplers in torch: ranks of a process group, a DataLoader with workers, and no torch at all."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest


def run_script(code: str) -> None:
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120)


def test_rank_from_torch_distributed(tmp_path: Path) -> None:
    pytest.importorskip("torch")
    code = f"""
import numpy as np, torch.distributed as dist
from hbx_gpu.sampler import CellSampler
groups = np.zeros(20, np.int32)
before = CellSampler(groups, 4)
assert (before.rank, before.world_size, len(before)) == (0, 1, 5)
started = before.batches()
dist.init_process_group("gloo", init_method="file://{tmp_path}/store", rank=0, world_size=1)
dist.get_rank, dist.get_world_size = lambda: 1, lambda: 2
assert sum(map(len, started)) == 20, "an iteration keeps the ranks that it began with"
assert (before.rank, before.world_size, len(before)) == (1, 2, 3), "ranks are those there are when it begins"
mine = list(before)
assert [len(batch) for batch in mine] == [4, 4, 2] and before.seed == 0, mine
other = list(CellSampler(groups, 4, rank=0, world_size=2))
assert sorted(sum(mine + other, [])) == list(range(20)), "without a seed all ranks take the same"
s = CellSampler(groups, 4, seed=0, rank=0, world_size=1)
assert (s.rank, s.world_size, len(s)) == (0, 1, 5)
dist.get_world_size = lambda: 11
try:
    before.batches()
except ValueError as error:
    assert "20 cells cannot be shared among 11 ranks" in str(error)
else:
    raise AssertionError
dist.destroy_process_group()
"""
    run_script(code)


def test_torch_dataloader_with_workers_resumes_and_keeps_groups_to_workers() -> None:
    pytest.importorskip("torch")
    # In a process of its own: forking this one would copy whatever threads other tests have left.
    run_script("""
import numpy as np
from torch.utils.data import DataLoader, Sampler, get_worker_info
from hbx_gpu.sampler import CellSampler

class Cells:
    def __len__(self):
        return 160
    def __getitems__(self, cells):
        return list(cells), get_worker_info().id

def make():
    return CellSampler(np.repeat(np.arange(4), 40), 8, seed=3, num_workers=2, locality="group")

def loader(sampler):
    return DataLoader(Cells(), batch_sampler=sampler, num_workers=2, collate_fn=lambda b: b,
                      multiprocessing_context="fork")

s = make()
assert isinstance(s, Sampler)
plan = [list(b) for b in s]
got = list(loader(s))
assert [cells for cells, _ in got] == plan
assert [worker for _, worker in got] == [0, 1] * 10
for worker in (0, 1):
    assert len({cell // 40 for cells, w in got if w == worker for cell in cells}) == 2
t = make()
t.load_state_dict(s.state_dict(delivered=5))
resumed = loader(t)
assert len(resumed) == 20
assert [cells for cells, _ in resumed] == plan[5:]
assert [cells for cells, _ in resumed] == plan
""")


def test_importing_needs_no_torch() -> None:
    code = """
import sys
sys.modules["torch"] = None
from hbx_gpu.sampler import CellSampler
assert list(CellSampler([0, 0, 1], 2, False)) == [[0, 1], [2]]
"""
    run_script(code)
