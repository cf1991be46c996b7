"""Atlases: many datasets with different features in one catalog. Names are resolved on first use."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from hbx_gpu.atlas._atlas import RaggedAtlas as RaggedAtlas
    from hbx_gpu.atlas._catalog.snapshot import Snapshot as Snapshot
    from hbx_gpu.atlas._catalog.snapshot_records import list_versions as list_versions
    from hbx_gpu.atlas._create import create_or_open_atlas as create_or_open_atlas
    from hbx_gpu.atlas._ingest.anndata import add_from_anndata as add_from_anndata
    from hbx_gpu.atlas._ingest.anndata import add_from_h5ad as add_from_h5ad
    from hbx_gpu.atlas._ingest.commit import IngestReport as IngestReport
    from hbx_gpu.atlas._ingest.embeddings import add_embedding as add_embedding
    from hbx_gpu.atlas._ingest.fragments import FragmentsInput as FragmentsInput
    from hbx_gpu.atlas._ingest.images import ImageInput as ImageInput
    from hbx_gpu.atlas._ingest.multimodal import add_multimodal as add_multimodal
    from hbx_gpu.atlas._ingest.reports import FileReport as FileReport
    from hbx_gpu.atlas._ingest.reports import ManyReport as ManyReport
    from hbx_gpu.atlas._many import ingest_many as ingest_many
    from hbx_gpu.atlas._model.schema import DatasetRecord as DatasetRecord
    from hbx_gpu.atlas._model.schema import DatasetSchema as DatasetSchema
    from hbx_gpu.atlas._model.schema import DenseZarrPointer as DenseZarrPointer
    from hbx_gpu.atlas._model.schema import DiscreteSpatialPointer as DiscreteSpatialPointer
    from hbx_gpu.atlas._model.schema import FeatureBaseSchema as FeatureBaseSchema
    from hbx_gpu.atlas._model.schema import HoxBaseSchema as HoxBaseSchema
    from hbx_gpu.atlas._model.schema import PointerField as PointerField
    from hbx_gpu.atlas._model.schema import SparseZarrPointer as SparseZarrPointer
    from hbx_gpu.atlas._model.schema import StableUIDField as StableUIDField
    from hbx_gpu.atlas._model.schema import layout_uid as layout_uid
    from hbx_gpu.atlas._model.schema import make_uid as make_uid
    from hbx_gpu.atlas._model.spaces import FeatureSpace as FeatureSpace
    from hbx_gpu.atlas._model.spaces import get_space as get_space
    from hbx_gpu.atlas._model.spaces import register_space as register_space
    from hbx_gpu.atlas._query.query import AtlasQuery as AtlasQuery
    from hbx_gpu.atlas._upkeep.repack import RepackReport as RepackReport
    from hbx_gpu.atlas._upkeep.repack import repack as repack

# Workers import recipes from here and must not pay for importing lancedb or anndata.
_PUBLIC = {
    "AtlasQuery": "_query.query",
    "DatasetRecord": "_model.schema",
    "DatasetSchema": "_model.schema",
    "DenseZarrPointer": "_model.schema",
    "DiscreteSpatialPointer": "_model.schema",
    "FeatureBaseSchema": "_model.schema",
    "FeatureSpace": "_model.spaces",
    "FileReport": "_ingest.reports",
    "FragmentsInput": "_ingest.fragments",
    "HoxBaseSchema": "_model.schema",
    "ImageInput": "_ingest.images",
    "IngestReport": "_ingest.commit",
    "ManyReport": "_ingest.reports",
    "PointerField": "_model.schema",
    "RaggedAtlas": "_atlas",
    "RepackReport": "_upkeep.repack",
    "Snapshot": "_catalog.snapshot",
    "SparseZarrPointer": "_model.schema",
    "StableUIDField": "_model.schema",
    "add_embedding": "_ingest.embeddings",
    "add_from_anndata": "_ingest.anndata",
    "add_from_h5ad": "_ingest.anndata",
    "add_multimodal": "_ingest.multimodal",
    "create_or_open_atlas": "_create",
    "get_space": "_model.spaces",
    "ingest_many": "_many",
    "layout_uid": "_model.schema",
    "list_versions": "_catalog.snapshot_records",
    "make_uid": "_model.schema",
    "register_space": "_model.spaces",
    "repack": "_upkeep.repack",
}

__all__ = list(_PUBLIC)


if not TYPE_CHECKING:  # a type checker takes the names above and rejects all others

    def __getattr__(name: str) -> object:
        if name in _PUBLIC:
            return getattr(importlib.import_module(f"{__name__}.{_PUBLIC[name]}"), name)
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(_PUBLIC)
