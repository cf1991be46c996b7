"""GPU-native loading of single-cell data. The public names, resolved on first use."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

from hbx_gpu._version import __version__

if TYPE_CHECKING:
    from hbx_gpu._inplace.opening import open as open  # noqa: A004 - said as hbx_gpu.open
    from hbx_gpu.atlas import AtlasQuery as AtlasQuery
    from hbx_gpu.atlas import RaggedAtlas as RaggedAtlas
    from hbx_gpu.atlas import add_from_anndata as add_from_anndata
    from hbx_gpu.atlas import add_from_h5ad as add_from_h5ad
    from hbx_gpu.atlas import add_multimodal as add_multimodal
    from hbx_gpu.atlas import create_or_open_atlas as create_or_open_atlas
    from hbx_gpu.atlas import ingest_many as ingest_many
    from hbx_gpu.batch import DenseBatch as DenseBatch
    from hbx_gpu.batch import MultimodalBatch as MultimodalBatch
    from hbx_gpu.batch import RaggedBatch as RaggedBatch
    from hbx_gpu.batch import SparseBatch as SparseBatch
    from hbx_gpu.dataloader import CellDataset as CellDataset
    from hbx_gpu.dataloader import DenseCellDataset as DenseCellDataset
    from hbx_gpu.dataloader import MultimodalCellDataset as MultimodalCellDataset
    from hbx_gpu.dataloader import dense_to_tensor_collate as dense_to_tensor_collate
    from hbx_gpu.dataloader import make_loader as make_loader
    from hbx_gpu.dataloader import multimodal_to_dense_collate as multimodal_to_dense_collate
    from hbx_gpu.dataloader import sparse_to_csr_collate as sparse_to_csr_collate
    from hbx_gpu.dataloader import sparse_to_dense_collate as sparse_to_dense_collate
    from hbx_gpu.sampler import CellSampler as CellSampler

_PUBLIC = {
    "RaggedAtlas": "hbx_gpu.atlas",
    "AtlasQuery": "hbx_gpu.atlas",
    "create_or_open_atlas": "hbx_gpu.atlas",
    "add_from_anndata": "hbx_gpu.atlas",
    "add_from_h5ad": "hbx_gpu.atlas",
    "add_multimodal": "hbx_gpu.atlas",
    "ingest_many": "hbx_gpu.atlas",
    "CellDataset": "hbx_gpu.dataloader",
    "DenseCellDataset": "hbx_gpu.dataloader",
    "MultimodalCellDataset": "hbx_gpu.dataloader",
    "make_loader": "hbx_gpu.dataloader",
    "sparse_to_dense_collate": "hbx_gpu.dataloader",
    "sparse_to_csr_collate": "hbx_gpu.dataloader",
    "dense_to_tensor_collate": "hbx_gpu.dataloader",
    "multimodal_to_dense_collate": "hbx_gpu.dataloader",
    "CellSampler": "hbx_gpu.sampler",
    "SparseBatch": "hbx_gpu.batch",
    "DenseBatch": "hbx_gpu.batch",
    "RaggedBatch": "hbx_gpu.batch",
    "MultimodalBatch": "hbx_gpu.batch",
    "open": "hbx_gpu._inplace.opening",
}

__all__ = ["__version__", *_PUBLIC]


if not TYPE_CHECKING:  # a type checker takes the names above, and knows no others

    def __getattr__(name: str) -> object:
        # PEP 562: importing the package must not import torch, lancedb or pandas.
        if name in _PUBLIC:
            return getattr(importlib.import_module(_PUBLIC[name]), name)
        raise AttributeError(f"module 'hbx_gpu' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)
