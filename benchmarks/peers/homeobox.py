"""Homeobox: its map-style and its iterable dataset over an atlas that it wrote itself."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.peers.protocol import (
    Csr,
    Loader,
    Peer,
    Rows,
    Source,
    Task,
    Variant,
    bytes_below,
    main,
    shuffled_batches,
)

# Rows per read of the iterable in Homeobox's published benchmark (docs/dataloader_benchmark.md); its default.
_IO_ROWS = 65_536


def _schemas(hox: Any) -> tuple[Any, Any]:
    """The README's feature and cell schemas (made by hand: Homeobox reads annotations as objects)."""
    symbol = {"gene_symbol": str}, {"gene_symbol": hox.StableUIDField.declare(default=...)}
    pointer = (
        {"gene_expression": hox.SparseZarrPointer | None},
        {"gene_expression": hox.PointerField.declare(feature_space="gene_expression")},
    )
    return tuple(
        type(name, (base,), {"__module__": __name__, "__annotations__": annotations, **fields})
        for name, base, (annotations, fields) in (
            ("Gene", hox.FeatureBaseSchema, symbol),
            ("Cell", hox.HoxBaseSchema, pointer),
        )
    )  # type: ignore[return-value]


def prepare(source: Path, work: Path, options: Mapping[str, str]) -> int:
    """One zarr group per dataset, at the ingestion defaults, as in Homeobox's README."""
    import anndata
    import homeobox as hox
    import pandas as pd
    import polars as pl

    gene, cell = _schemas(hox)
    data = Source(source)
    atlas = hox.create_or_open_atlas(
        atlas_path=str(work / "atlas"),
        obs_schemas={"cells": cell},
        dataset_table_name="datasets",
        dataset_schema=hox.DatasetSchema,
        registry_schemas={"gene_expression": gene},
    )
    names = data.genes()
    var = pd.DataFrame({"gene_symbol": names}, index=names)
    gene.compute_stable_uids(var)
    atlas.register_features("gene_expression", pl.from_pandas(var))
    for number, (first, rows, genes) in enumerate(data.datasets(options)):
        n_rows = rows.shape[0]
        cells = anndata.AnnData(
            rows.astype(np.uint32),
            obs=pd.DataFrame(index=[f"cell_{first + k}" for k in range(n_rows)]),
            var=var.loc[genes].copy(),
        )
        record = hox.DatasetSchema(
            zarr_group=f"dataset_{number}", feature_space="gene_expression", n_rows=n_rows
        )
        hox.add_from_anndata(
            atlas, cells, field_name="gene_expression", zarr_layer="counts", dataset_record=record
        )
    atlas.optimize()
    atlas.snapshot()
    return bytes_below(work / "atlas")


def _rows(batch: Any, layout: str) -> Rows:
    values = batch.layers["counts"]
    if layout == "csr":
        return Csr(batch.offsets, batch.indices, values)
    from scipy import sparse

    shape = len(batch), batch.n_features
    rows = sparse.csr_matrix((values.astype(np.float32), batch.indices, batch.offsets), shape)
    result: Rows = rows.toarray()
    return result


def open_loader(task: Task) -> Loader:
    """A dataset of the latest snapshot, iterated without torch (which adds nothing at no workers)."""
    import homeobox as hox

    atlas = hox.RaggedAtlas.checkout_latest(str(task.work / "atlas"))
    query = atlas.query()

    def columns() -> list[str]:
        registry = atlas.feature_registry("gene_expression")
        result: list[str] = registry.sort("global_index")["gene_symbol"].to_list()
        return result

    if task.variant == "map":
        dataset = query.to_unimodal_dataset("gene_expression", ["counts"])

        def map_epoch(number: int) -> Iterator[Rows]:
            for batch in shuffled_batches(dataset.n_rows, task.batch, task.seed, number):
                yield _rows(dataset.__getitems__(batch.tolist()), task.layout)

        return Loader(dataset.n_rows, map_epoch, columns=columns)

    n_cells = query.count()
    # At least four reads per epoch, so that its two threads overlap on small data as they would on large.
    io_rows = max(task.batch, min(_IO_ROWS, n_cells // 4))
    stream = query.to_unimodal_dataset(
        "gene_expression",
        ["counts"],
        mode="iterable",
        batch_size=task.batch,
        io_batch_size=io_rows,
        shuffle=True,
        seed=task.seed,
    )

    def epoch(number: int) -> Iterator[Rows]:  # noqa: ARG001  (the dataset counts epochs itself)
        for batch in stream:
            yield _rows(batch, task.layout)

    return Loader(stream.n_rows, epoch, window=stream.n_rows, lingers=True, columns=columns)


PEER = Peer(
    name="homeobox",
    packages=("homeobox", "lancedb", "zarr", "polars", "numpy"),
    imports=("homeobox",),
    prepare=prepare,
    open=open_loader,
    of_datasets=True,
    variants={
        "map": Variant("Homeobox map", "random", "to_unimodal_dataset(mode='map'), uniform batches"),
        "iterable": Variant(
            "Homeobox iterable",
            "random",
            "mode='iterable', shuffle, prefetch=2, io_batch_size = min(65,536, a quarter of the cells)",
        ),
    },
)

if __name__ == "__main__":
    main(PEER)
