"""The names that a training script imports: datasets, collates and `make_loader`.

Importing this module pulls in NumPy and the reading rooms only: it is what a spawned worker imports.
"""

from __future__ import annotations

from hbx_gpu._collates import (
    DenseCollate,
    MultimodalCollate,
    dense_to_tensor_collate,
    multimodal_to_dense_collate,
    sparse_to_csr_collate,
    sparse_to_dense_collate,
)
from hbx_gpu._datasets.cells import CellDataset
from hbx_gpu._datasets.dense import DenseCellDataset
from hbx_gpu._datasets.multimodal import MultimodalCellDataset
from hbx_gpu._loading.make import make_loader
from hbx_gpu.batch import DenseBatch, MultimodalBatch, RaggedBatch, SparseBatch

__all__ = [
    "CellDataset",
    "DenseBatch",
    "DenseCellDataset",
    "DenseCollate",
    "MultimodalBatch",
    "MultimodalCellDataset",
    "MultimodalCollate",
    "RaggedBatch",
    "SparseBatch",
    "dense_to_tensor_collate",
    "make_loader",
    "multimodal_to_dense_collate",
    "sparse_to_csr_collate",
    "sparse_to_dense_collate",
]
