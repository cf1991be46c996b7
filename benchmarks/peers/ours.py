"""hbx_gpu: the in-process loader (threads that read and decode ahead), in each of its orders."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from benchmarks.peers.protocol import Csr, Loader, Peer, Rows, Source, Task, Variant, bytes_below, main


def prepare(source: Path, work: Path, options: Mapping[str, str]) -> int:
    """One atlas of the source's datasets (`Source.datasets`); ``codec`` as `hbx-gpu ingest --codec`."""
    import anndata
    import pandas as pd

    from hbx_gpu import cli

    codec = ["--codec", options["codec"]] if options.get("codec") else []
    for first, rows, genes in Source(source).datasets(options):
        part = work / f"dataset_{first}.h5ad"
        obs = pd.DataFrame(index=[f"cell_{first + k}" for k in range(rows.shape[0])])
        anndata.AnnData(rows, obs=obs, var=pd.DataFrame(index=genes)).write_h5ad(part)
        # The command has said why when its status is not 0.
        if status := cli.main(["ingest", str(part), "--atlas", str(work / "atlas"), *codec]):
            raise SystemExit(status)
        part.unlink()
    return bytes_below(work / "atlas")


def open_loader(task: Task) -> Loader:
    """`make_loader` over a `CellSampler`, at their defaults; CSR as ``torch.sparse_csr_tensor``."""
    from hbx_gpu.atlas import RaggedAtlas
    from hbx_gpu.dataloader import make_loader, sparse_to_csr_collate, sparse_to_dense_collate
    from hbx_gpu.sampler import CellSampler

    dataset = RaggedAtlas.checkout_latest(str(task.work / "atlas")).query().to_cell_dataset("gene_expression")
    sampler: Any = CellSampler(
        dataset.groups_np, batch_size=task.batch, seed=task.seed, locality=task.variant, num_workers=0
    )
    collate = sparse_to_dense_collate if task.layout == "dense" else sparse_to_csr_collate
    loader = make_loader(dataset, sampler, collate)

    def epoch(number: int) -> Iterator[Rows]:
        loader.set_epoch(number)
        batches = iter(loader)
        try:
            for batch in batches:
                x = batch["X"]
                if task.layout == "dense":
                    yield x.numpy()
                else:
                    yield Csr(x.crow_indices().numpy(), x.col_indices().numpy(), x.values().numpy())
        finally:
            if hasattr(batches, "close"):
                batches.close()

    return Loader(dataset.n_cells, epoch, columns=lambda: [str(uid) for uid in dataset.feature_uids])


_DEFAULTS = "make_loader(num_workers=0) at its defaults"
PEER = Peer(
    name="ours",
    packages=("hbx_gpu", "numba", "numpy", "torch"),
    imports=("hbx_gpu.dataloader", "hbx_gpu.atlas", "lancedb", "numba", "torch"),
    prepare=prepare,
    open=open_loader,
    of_datasets=True,
    variants={
        "none": Variant("hbx_gpu, locality none", "random", f"{_DEFAULTS}, uniform permutation"),
        "group": Variant("hbx_gpu, locality group", "stream", f"{_DEFAULTS}, every batch from one dataset"),
        "block": Variant("hbx_gpu, locality block", "stream", f"{_DEFAULTS}, windows of shuffled blocks"),
    },
)

if __name__ == "__main__":
    main(PEER)
