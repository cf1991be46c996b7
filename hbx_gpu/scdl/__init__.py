"""SCDL archives: opened in place, created and changed safely. The public names, resolved on first use."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from hbx_gpu.scdl._api.collate import (
        collate_neighbor_sparse_matrix_batch as collate_neighbor_sparse_matrix_batch,
    )
    from hbx_gpu.scdl._api.collate import collate_sparse_matrix_batch as collate_sparse_matrix_batch
    from hbx_gpu.scdl._api.collection import SingleCellCollection as SingleCellCollection
    from hbx_gpu.scdl._api.dataset import Mode as Mode
    from hbx_gpu.scdl._api.dataset import SingleCellMemMapDataset as SingleCellMemMapDataset
    from hbx_gpu.scdl._format.archive import Archive as Archive
    from hbx_gpu.scdl._format.archive import open_archive as open_archive
    from hbx_gpu.scdl._format.features import ObservedFeatureIndex as ObservedFeatureIndex
    from hbx_gpu.scdl._format.features import VariableFeatureIndex as VariableFeatureIndex
    from hbx_gpu.scdl._format.features import are_dicts_equal as are_dicts_equal
    from hbx_gpu.scdl._format.header import ArrayInfo as ArrayInfo
    from hbx_gpu.scdl._format.header import FeatureIndexInfo as FeatureIndexInfo
    from hbx_gpu.scdl._format.header import Header as Header
    from hbx_gpu.scdl._format.header import SCDLHeader as SCDLHeader
    from hbx_gpu.scdl._format.header import merge_headers as merge_headers
    from hbx_gpu.scdl._format.header import read_header as read_header
    from hbx_gpu.scdl._format.header import validate_header_compatibility as validate_header_compatibility
    from hbx_gpu.scdl._format.layout import FileNames as FileNames
    from hbx_gpu.scdl._format.neighbors import NeighborSamplingStrategy as NeighborSamplingStrategy

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
    "ArrayInfo": "hbx_gpu.scdl._format.header",
    "FeatureIndexInfo": "hbx_gpu.scdl._format.header",
    "Header": "hbx_gpu.scdl._format.header",
    "SCDLHeader": "hbx_gpu.scdl._format.header",
    "read_header": "hbx_gpu.scdl._format.header",
    "merge_headers": "hbx_gpu.scdl._format.header",
    "validate_header_compatibility": "hbx_gpu.scdl._format.header",
}

__all__ = list(_PUBLIC)


if not TYPE_CHECKING:  # a type checker takes the names above and rejects all others

    def __getattr__(name: str) -> object:
        # PEP 562: importing the package must not import torch, pyarrow or pandas.
        if name in _PUBLIC:
            return getattr(importlib.import_module(_PUBLIC[name]), name)
        raise AttributeError(f"module 'hbx_gpu.scdl' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)
