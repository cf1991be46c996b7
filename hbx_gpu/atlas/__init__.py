"""Atlases: many datasets with different features in one catalogue. Names are resolved on first use."""

from __future__ import annotations

import importlib
from typing import Any

# Workers import recipes from here, which must not cost them lancedb or anndata.
_PUBLIC = {
    "AtlasQuery": "_query.query",
    "DatasetRecord": "_model.schema",
    "DatasetSchema": "_model.schema",
    "DenseZarrPointer": "_model.schema",
    "DiscreteSpatialPointer": "_model.schema",
    "FeatureBaseSchema": "_model.schema",
    "FeatureSpace": "_model.spaces",
    "FragmentsInput": "_ingest.fragments",
    "HoxBaseSchema": "_model.schema",
    "ImageInput": "_ingest.images",
    "IngestReport": "_ingest.commit",
    "PointerField": "_model.schema",
    "RaggedAtlas": "_atlas",
    "RepackReport": "_upkeep.repack",
    "Snapshot": "_catalogue.snapshot",
    "SparseZarrPointer": "_model.schema",
    "StableUIDField": "_model.schema",
    "add_from_anndata": "_ingest.anndata",
    "add_from_h5ad": "_ingest.anndata",
    "add_multimodal": "_ingest.multimodal",
    "create_or_open_atlas": "_atlas",
    "get_space": "_model.spaces",
    "layout_uid": "_model.schema",
    "list_versions": "_catalogue.records",
    "make_uid": "_model.schema",
    "register_space": "_model.spaces",
    "repack": "_upkeep.repack",
}

__all__ = list(_PUBLIC)


def __getattr__(name: str) -> Any:
    if name in _PUBLIC:
        return getattr(importlib.import_module(f"{__name__}.{_PUBLIC[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(_PUBLIC)
