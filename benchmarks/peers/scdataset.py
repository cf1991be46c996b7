"""scDataset over a backed .h5ad, uniformly random and in blocks."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.peers.protocol import Csr, Loader, Peer, Rows, Task, Variant, bytes_below, main

# fetch_factor is the default of scDataset 0.3, block_size=16 that of its documentation's AnnData example.
_FETCH_FACTOR = 16
_BLOCK = {"random": 1, "block": 16, "block-workers": 16, "gzip-random": 1, "gzip-block": 16}
_GZIP = "gzip.h5ad"


def prepare(source: Path, work: Path, options: Mapping[str, str]) -> int:  # noqa: ARG001
    """It reads .h5ad as they are: uncompressed, the fastest form, and a copy with gzip."""
    import anndata

    anndata.read_h5ad(source).write_h5ad(work / _GZIP, compression="gzip")
    (work / "source").write_text(str(source.resolve()))
    return bytes_below(source)


def _fetch(adata: Any, rows: np.ndarray) -> Any:
    return adata.X[rows]


def _dense(x: Any) -> Any:
    return x.toarray().astype(np.float32, copy=False)


def open_loader(task: Task) -> Loader:
    """`scDataset` with `BlockShuffling`.

    Rows are made dense per batch: per fetch, as its example does it, needs 16 times the memory.
    """
    import anndata
    from scdataset import BlockShuffling, scDataset
    from torch.utils.data import DataLoader

    is_gzip = task.variant.startswith("gzip")
    path = task.work / _GZIP if is_gzip else Path((task.work / "source").read_text())
    adata = anndata.read_h5ad(path, backed="r")
    workers = 2 if task.variant.endswith("workers") else 0
    dataset = scDataset(
        adata,
        BlockShuffling(block_size=_BLOCK[task.variant]),
        batch_size=task.batch,
        fetch_factor=_FETCH_FACTOR,
        fetch_callback=_fetch,
        batch_transform=_dense if task.layout == "dense" else None,
        seed=task.seed,
    )
    loader: Any = DataLoader(
        dataset,
        batch_size=None,
        num_workers=workers,
        persistent_workers=workers > 0,
        prefetch_factor=_FETCH_FACTOR + 1 if workers else None,
    )

    def epoch(number: int) -> Iterator[Rows]:  # noqa: ARG001  (the dataset counts epochs itself)
        for x in loader:
            if task.layout == "csr":
                yield Csr(x.indptr, x.indices, x.data)
            else:
                yield np.asarray(x)

    return Loader(
        adata.n_obs,
        epoch,
        window=adata.n_obs if workers else task.batch * _FETCH_FACTOR,
        lingers=workers > 0,
    )


PEER = Peer(
    name="scdataset",
    packages=("scdataset", "anndata", "torch", "numpy"),
    imports=("scdataset", "anndata", "torch"),
    prepare=prepare,
    open=open_loader,
    variants={
        "random": Variant(
            "scDataset, block 1", "random", "BlockShuffling(1), fetch_factor=16, backed uncompressed .h5ad"
        ),
        "block": Variant(
            "scDataset, block 16",
            "stream",
            "BlockShuffling(16), fetch_factor=16: its documentation's AnnData example",
        ),
        "block-workers": Variant(
            "scDataset, block 16, 2 workers", "stream", "the same with num_workers=2, prefetch_factor=17"
        ),
        "gzip-random": Variant(
            "scDataset, gzip, block 1",
            "random",
            "BlockShuffling(1), fetch_factor=16, backed .h5ad with gzip",
            _GZIP,
        ),
        "gzip-block": Variant(
            "scDataset, gzip, block 16",
            "stream",
            "BlockShuffling(16), fetch_factor=16, backed .h5ad with gzip",
            _GZIP,
        ),
    },
)

if __name__ == "__main__":
    main(PEER)
