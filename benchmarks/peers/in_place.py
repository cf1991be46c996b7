"""hbx_gpu over stores that it did not write: annbatch collections, .h5ad files, zarr at its defaults."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from benchmarks.peers.protocol import Csr, Loader, Peer, Rows, Source, Task, Variant, bytes_below, main

# Where each store lies, seen from the folder of this peer; annbatch's is the one that its own adapter made.
_STORES = {
    "annbatch": "../annbatch/stored.zarr",
    "h5ad": "none.h5ad",
    "gzip": "gzip.h5ad",
    "zarr": "default.zarr",
    "scdl": "archive",
    "atlas": "atlas",
}
# How anndata 0.13.4 stores 28 million values by default (read from the metadata of a store that it wrote):
# inner chunks of 218,750 values, zstd at level 0, many of them in one object. Here all shards are full.
_INNER, _INNER_PER_SHARD = 218_750, 32


def prepare(source: Path, work: Path, options: Mapping[str, str]) -> int:  # noqa: ARG001
    """The source in every format: .h5ad without and with gzip, anndata's zarr, an SCDL archive, an atlas."""
    import anndata
    import pandas as pd
    import zarr

    from hbx_gpu import cli

    data = Source(source)
    n_cells = data.shape()[0]
    obs = pd.DataFrame(index=[f"cell_{k}" for k in range(n_cells)])
    whole = anndata.AnnData(data.rows(0, n_cells), obs=obs, var=pd.DataFrame(index=data.genes()))
    whole.write_h5ad(work / _STORES["h5ad"])
    whole.write_h5ad(work / _STORES["gzip"], compression="gzip")
    with anndata.settings.override(zarr_write_format=3):
        anndata.AnnData(obs=whole.obs, var=whole.var).write_zarr(work / _STORES["zarr"])
        root = zarr.open_group(str(work / _STORES["zarr"]), use_consolidated=False)
        del root["X"]
        chunks = {"chunks": (_INNER,), "shards": (_INNER * _INNER_PER_SHARD,)}
        compressors = zarr.codecs.ZstdCodec(level=0)
        anndata.io.write_elem(root, "X", whole.X, dataset_kwargs={**chunks, "compressors": compressors})
    commands = (
        ["convert", str(work / _STORES["h5ad"]), str(work / _STORES["scdl"])],
        ["ingest", str(work / _STORES["h5ad"]), "--atlas", str(work / _STORES["atlas"])],
    )
    for command in commands:
        # The command has said why when its status is not 0.
        if status := cli.main(command):
            raise SystemExit(status)
    return bytes_below(work / _STORES["h5ad"])


def open_loader(task: Task) -> Loader:
    """`make_loader` over a `CellSampler`, at their defaults; CSR as ``torch.sparse_csr_tensor``."""
    import hbx_gpu
    from hbx_gpu.dataloader import make_loader, sparse_to_csr_collate, sparse_to_dense_collate
    from hbx_gpu.sampler import CellSampler

    store, locality = task.variant.split("-")
    dataset = hbx_gpu.open(task.work / _STORES[store]).to_cell_dataset()
    sampler: Any = CellSampler(dataset.groups_np, batch_size=task.batch, seed=task.seed, locality=locality)
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


def _variant(store: str, locality: str) -> Variant:
    what = _WHAT[store]
    order = "random" if locality == "none" else "stream"
    settings = f"hbx_gpu.open, locality {locality!r}"
    return Variant(f"hbx_gpu, {what}, {locality}", order, settings, _STORES[store])


_WHAT = {
    "annbatch": "annbatch collection",
    "h5ad": ".h5ad",
    "gzip": ".h5ad with gzip",
    "zarr": "anndata 0.13 zarr",
    "scdl": "SCDL archive",
    "atlas": "own atlas",
}
PEER = Peer(
    name="in_place",
    packages=("hbx_gpu", "anndata", "zarr", "h5py", "torch"),
    imports=("hbx_gpu", "numba", "torch"),
    prepare=prepare,
    open=open_loader,
    variants={
        f"{store}-{locality}": _variant(store, locality)
        for store in _STORES
        for locality in ("none", "block")
    },
)

if __name__ == "__main__":
    main(PEER)
