"""SCDL archives: opened in place, created and changed safely. The public names, resolved on first use."""

from __future__ import annotations

import importlib
from typing import Any

_PUBLIC = {
    "SingleCellMemMapDataset": "hbx_gpu.scdl._api.dataset",
    "Mode": "hbx_gpu.scdl._api.dataset",
    "FileNames": "hbx_gpu.scdl._format.layout",
    "NeighborSamplingStrategy": "hbx_gpu.scdl._format.neighbors",
    "SingleCellCollection": "hbx_gpu.scdl._api.collection",
    "ObservedFeatureIndex": "hbx_gpu.scdl._format.features",
    "VariableFeatureIndex": "hbx_gpu.scdl._format.features",
    "collate_sparse_matrix_batch": "hbx_gpu.scdl._api.collate",
    "collate_neighbor_sparse_matrix_batch": "hbx_gpu.scdl._api.collate",
    "are_dicts_equal": "hbx_gpu.scdl._format.features",
    "Archive": "hbx_gpu.scdl._format.archive",
    "open_archive": "hbx_gpu.scdl._format.archive",
    "Header": "hbx_gpu.scdl._format.header",
    "read_header": "hbx_gpu.scdl._format.header",
    "merge_headers": "hbx_gpu.scdl._format.header",
    "validate_header_compatibility": "hbx_gpu.scdl._format.header",
}

__all__ = list(_PUBLIC)


def __getattr__(name: str) -> Any:
    # PEP 562: importing the package must not import torch, pyarrow or pandas.
    if name in _PUBLIC:
        return getattr(importlib.import_module(_PUBLIC[name]), name)
    raise AttributeError(f"module 'hbx_gpu.scdl' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)
