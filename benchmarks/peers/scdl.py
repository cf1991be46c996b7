"""BioNeMo-SCDL: its memory-mapped dataset under a torch DataLoader with its own collate function."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.peers.protocol import Csr, Loader, Peer, Rows, Task, Variant, bytes_below, main


def prepare(source: Path, work: Path, options: Mapping[str, str]) -> int:  # noqa: ARG001
    """One archive of X in its default dtype (float32)."""
    from bionemo.scdl.io.single_cell_memmap_dataset import SingleCellMemMapDataset

    archive = work / "archive"
    SingleCellMemMapDataset(str(archive), str(source), use_X_not_raw=True).save()
    return bytes_below(archive)


def open_loader(task: Task) -> Loader:
    """The loop of its README: shuffling DataLoader, `collate_sparse_matrix_batch`."""
    import torch
    from bionemo.scdl.io.single_cell_memmap_dataset import SingleCellMemMapDataset
    from bionemo.scdl.util.torch_dataloader_utils import collate_sparse_matrix_batch

    dataset = SingleCellMemMapDataset(str(task.work / "archive"))
    n_cells, n_genes = dataset.number_of_rows(), int(dataset.number_of_variables()[0])
    workers = 2 if task.variant == "workers" else 0
    loader: Any = torch.utils.data.DataLoader(
        dataset,
        batch_size=task.batch,
        shuffle=True,
        collate_fn=collate_sparse_matrix_batch,
        num_workers=workers,
        persistent_workers=workers > 0,
        generator=torch.Generator().manual_seed(task.seed),
    )

    def epoch(number: int) -> Iterator[Rows]:  # noqa: ARG001  (the generator goes on)
        for x in loader:
            if task.layout == "csr":
                yield Csr(x.crow_indices().numpy(), x.col_indices().numpy(), x.values().numpy())
            else:
                yield _dense(x, n_genes)

    return Loader(n_cells, epoch)


def _dense(x: Any, n_genes: int) -> np.ndarray:
    # Its batches are as wide as their last nonzero column; a model needs all genes.
    import torch

    parts = x.crow_indices(), x.col_indices(), x.values()
    dense: np.ndarray = torch.sparse_csr_tensor(*parts, size=(x.shape[0], n_genes)).to_dense().numpy()
    return dense


_README = "DataLoader(shuffle=True, collate_fn=collate_sparse_matrix_batch) as in its README"
PEER = Peer(
    name="scdl",
    packages=("bionemo-scdl", "torch", "numpy"),
    imports=("bionemo.scdl.io.single_cell_memmap_dataset", "torch"),
    prepare=prepare,
    open=open_loader,
    variants={
        "random": Variant("BioNeMo-SCDL", "random", f"{_README}, num_workers=0"),
        "workers": Variant("BioNeMo-SCDL, 2 workers", "random", f"{_README}, num_workers=2, persistent"),
    },
)

if __name__ == "__main__":
    main(PEER)
