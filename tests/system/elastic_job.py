"""One rank of an elastic run: ``elastic_job.py ATLAS OUT [STEP TO SLOW DOWN AT]``, or several of them.

Several, where `RANKS` says how many: this process imports everything once, forks them, prints their process
ids, and ends with the worst of their exit statuses. Otherwise a launcher's environment tells the rank.

Continues from OUT/state.json if it is there, and writes it after every third step. The rows of each step go
to OUT/RUN-RANK.txt, where RUN counts the cells that were done before.
"""

from __future__ import annotations

import json
import os
import sys
import time
from pathlib import Path

import torch
import torch.distributed as dist

from hbx_gpu.atlas import RaggedAtlas
from hbx_gpu.dataloader import make_loader
from hbx_gpu.sampler import CellSampler


def main(atlas: str, out: str, slow: str = "") -> None:
    """One epoch, step by step; every step is a collective, as training is."""
    dist.init_process_group("gloo")
    rank, saved = dist.get_rank(), Path(out, "state.json")
    dataset = RaggedAtlas.checkout_latest(atlas).query().to_cell_dataset()
    sampler = CellSampler(dataset.group_runs, batch_size=16, seed=9)
    with make_loader(dataset.with_row_numbers(), sampler) as loader:
        done = 0
        if saved.exists():
            state = json.loads(saved.read_text())
            loader.load_state_dict(state)
            done = state["sampler"]["cells"]
        dist.barrier()
        with open(Path(out, f"{done}-{rank}.txt"), "w") as file:
            for step, batch in enumerate(loader, 1):
                dist.all_reduce(torch.ones(1))
                print(json.dumps(batch.metadata["index"].tolist()), file=file, flush=True)
                if step % 3 == 0 and rank == 0:
                    partial = saved.with_suffix(".partial")
                    partial.write_text(json.dumps(loader.state_dict()))
                    os.replace(partial, saved)
                dist.barrier()
                if slow and step >= int(slow):
                    time.sleep(60)
    Path(out, f"finished-{rank}").touch()
    dist.destroy_process_group()


def forked(ranks: int, arguments: list[str]) -> int:
    """Start so many ranks, each a process of its own, and wait for them."""
    children = []
    for rank in range(ranks):
        child = os.fork()
        if child == 0:
            os.environ.update(WORLD_SIZE=str(ranks), LOCAL_WORLD_SIZE=str(ranks), RANK=str(rank))
            os.environ["LOCAL_RANK"] = str(rank)
            main(*arguments)
            os._exit(0)
        children.append(child)
    print(*children, flush=True)
    return max(abs(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])) for child in children)


if __name__ == "__main__":
    if number := os.environ.get("RANKS"):
        sys.exit(forked(int(number), sys.argv[1:]))
    main(*sys.argv[1:])
