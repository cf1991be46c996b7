"""AnnLoader of anndata.experimental over a backed .h5ad."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.peers.protocol import Csr, Loader, Peer, Rows, Task, Variant, bytes_below, main


def prepare(source: Path, work: Path, options: Mapping[str, str]) -> int:  # noqa: ARG001
    """It reads .h5ad as they are; here uncompressed, the fastest form."""
    (work / "source").write_text(str(source.resolve()))
    return bytes_below(source)


def open_loader(task: Task) -> Loader:
    """Dense batches through its default converter (to tensors), CSR batches without one."""
    import anndata
    from anndata.experimental import AnnLoader

    adata = anndata.read_h5ad((task.work / "source").read_text(), backed="r")
    loader: Any = AnnLoader(
        [adata], batch_size=task.batch, shuffle=True, use_default_converter=task.layout == "dense"
    )

    def epoch(number: int) -> Iterator[Rows]:  # noqa: ARG001  (torch's generator goes on)
        for batch in loader:
            x = batch.X
            if task.layout == "csr":
                yield Csr(x.indptr, x.indices, x.data)
            else:
                yield np.asarray(x)

    return Loader(adata.n_obs, epoch)


PEER = Peer(
    name="annloader",
    packages=("anndata", "torch", "numpy"),
    imports=("anndata.experimental", "torch"),
    prepare=prepare,
    open=open_loader,
    variants={"random": Variant("AnnLoader", "random", "shuffle=True over a backed uncompressed .h5ad")},
)

if __name__ == "__main__":
    main(PEER)
