"""GPU-native loading of single-cell data. The public names, resolved on first use."""

from __future__ import annotations

import importlib
from typing import Any

__version__ = "0.1.0"

_PUBLIC = {
    "RaggedAtlas": "hbx_gpu.atlas",
    "AtlasQuery": "hbx_gpu.atlas",
    "create_or_open_atlas": "hbx_gpu.atlas",
    "add_from_anndata": "hbx_gpu.atlas",
    "add_from_h5ad": "hbx_gpu.atlas",
    "add_multimodal": "hbx_gpu.atlas",
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
    "open": "hbx_gpu._stores.opening",
}

__all__ = ["__version__", *_PUBLIC]


def __getattr__(name: str) -> Any:
    # PEP 562: importing the package must not import torch, lancedb or pandas.
    if name in _PUBLIC:
        return getattr(importlib.import_module(_PUBLIC[name]), name)
    raise AttributeError(f"module 'hbx_gpu' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)
