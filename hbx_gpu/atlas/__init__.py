"""Atlases: many datasets with different features in one catalogue. Names are resolved on first use."""

from __future__ import annotations

import importlib
from typing import Any

# Workers import recipes from here, which must not cost them lancedb or anndata.
_PUBLIC = {
    "AtlasQuery": "query",
    "DatasetRecord": "schema",
    "DatasetSchema": "schema",
    "DenseZarrPointer": "schema",
    "DiscreteSpatialPointer": "schema",
    "FeatureBaseSchema": "schema",
    "FeatureSpace": "spaces",
    "FragmentsInput": "fragments",
    "HoxBaseSchema": "schema",
    "ImageInput": "image_parts",
    "IngestReport": "ingest",
    "PointerField": "schema",
    "RaggedAtlas": "atlas",
    "RepackReport": "repacking",
    "Snapshot": "snapshot",
    "SparseZarrPointer": "schema",
    "StableUIDField": "schema",
    "add_from_anndata": "ingest_anndata",
    "add_from_h5ad": "ingest_anndata",
    "add_multimodal": "ingest_multimodal",
    "create_or_open_atlas": "atlas",
    "get_space": "spaces",
    "layout_uid": "schema",
    "list_versions": "records",
    "make_uid": "schema",
    "register_space": "spaces",
    "repack": "repacking",
}

__all__ = list(_PUBLIC)


def __getattr__(name: str) -> Any:
    if name in _PUBLIC:
        return getattr(importlib.import_module(f"{__name__}.{_PUBLIC[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(_PUBLIC)
