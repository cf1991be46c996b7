"""annbatch, its codecs run by zarrs: random rows, chunks of rows, and its pre-shuffled collection."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.peers.protocol import Csr, Loader, Peer, Rows, Source, Task, Variant, bytes_below, main

# chunk_size and preload_nchunks. 32 x 256 stands in annbatch's README, 512 x 32 are its defaults; chunks of
# one row are what its documentation calls perfect random sampling (any preload does for them).
_CHUNKS = {"1": (1, 4_096), "32": (32, 256), "512": (512, 32), "512-preshuffled": (512, 32)}


def _use_zarrs() -> None:
    import zarr

    zarr.config.set({"codec_pipeline.path": "zarrs.ZarrsCodecPipeline"})


def prepare(source: Path, work: Path, options: Mapping[str, str]) -> int:  # noqa: ARG001
    """Two collections at the defaults: cells in stored order, and shuffled as its documentation advises.

    The size returned is that of the first; the second holds the same cells.
    """
    import anndata
    import pandas as pd
    from annbatch import DatasetCollection

    _use_zarrs()
    data = Source(source)
    n_cells = data.shape()[0]
    plain = work / "plain.h5ad"
    obs = pd.DataFrame(index=[f"cell_{k}" for k in range(n_cells)])
    anndata.AnnData(data.rows(0, n_cells), obs=obs, var=pd.DataFrame(index=data.genes())).write_h5ad(plain)
    for name, shuffle in (("stored", False), ("shuffled", True)):
        DatasetCollection(str(work / f"{name}.zarr")).add_adatas(
            [str(plain)],
            shuffle=shuffle,
            shuffle_chunk_size=min(1_000, n_cells),
            rng=np.random.default_rng(0),
        )
    plain.unlink()
    return bytes_below(work / "stored.zarr")


def open_loader(task: Task) -> Loader:
    """A `Loader` over X alone (its README: every obs column costs)."""
    import anndata
    from annbatch import DatasetCollection
    from annbatch import Loader as AnnbatchLoader

    _use_zarrs()
    chunk, preload = _CHUNKS[task.variant]
    name = "shuffled" if task.variant == "512-preshuffled" else "stored"
    loader = AnnbatchLoader(
        batch_size=task.batch,
        chunk_size=chunk,
        preload_nchunks=preload,
        shuffle=True,
        preload_to_gpu=False,
        rng=np.random.default_rng(task.seed),
    )

    def matrix_only(group: Any) -> Any:
        return anndata.AnnData(X=anndata.io.sparse_dataset(group["X"]))

    loader.use_collection(
        DatasetCollection(str(task.work / f"{name}.zarr"), mode="r"), load_adata=matrix_only
    )

    def epoch(number: int) -> Iterator[Rows]:  # noqa: ARG001  (the loader's generator goes on)
        for batch in loader:
            x = batch["X"]
            if task.layout == "dense":
                yield x.toarray()
            else:
                yield Csr(x.indptr, x.indices, x.data)

    return Loader(loader.n_obs, epoch, window=chunk * preload)


def _variant(key: str, order: str, who: str) -> Variant:
    chunk, preload = _CHUNKS[key]
    label = key.replace("-", ", ")
    return Variant(
        f"annbatch, chunk {label}", order, f"chunk_size={chunk}, preload_nchunks={preload}: {who}; zarrs"
    )


PEER = Peer(
    name="annbatch",
    packages=("annbatch", "zarrs", "zarr", "anndata", "numpy"),
    imports=("annbatch", "zarrs"),
    prepare=prepare,
    open=open_loader,
    variants={
        "1": _variant("1", "random", "uniformly random rows"),
        "32": _variant("32", "stream", "its README"),
        "512": _variant("512", "stream", "its defaults"),
        "512-preshuffled": _variant(
            "512-preshuffled", "stream", "its defaults, over its advised copy of the data in shuffled order"
        ),
    },
)

if __name__ == "__main__":
    main(PEER)
