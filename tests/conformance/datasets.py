"""One small dataset of every kind that a loader takes."""

from __future__ import annotations

import uuid
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from hbx_gpu import RaggedAtlas
from hbx_gpu._datasets.stored import StoredDataset
from hbx_gpu._source import ObsColumns
from hbx_gpu.chromatin import Bins
from hbx_gpu.dataloader import CellDataset, DenseCellDataset, MultimodalCellDataset
from hbx_gpu.scdl import SingleCellMemMapDataset
from hbx_gpu.testing import example_dataset, example_groups, write_sources
from tests import dense_stores

Stored = StoredDataset[Any, Any, Any]


@dataclass(frozen=True)
class Again:
    """A recipe that makes the dataset once more, in another folder."""

    make: Callable[[Path], Stored]
    folder: Path

    def rebuild(self) -> Stored:
        return self.make(self.folder / uuid.uuid4().hex)


def sparse(folder: Path) -> CellDataset:
    return example_dataset(folder, example_groups(), recipe=Again(sparse, folder))


def two_layers(folder: Path) -> CellDataset:
    """Sparse, with a second name for the layer."""
    sources, rows = write_sources(folder, example_groups())
    return CellDataset(
        [replace(source, layers={**source.layers, "same": source.layers["counts"]}) for source in sources],
        rows,
        layer=["counts", "same"],
        n_features=50,
        feature_uids=np.arange(50).astype(str).astype(object),
        obs=ObsColumns({"number": np.arange(len(rows)), "name": np.arange(len(rows)).astype(object)}),
        recipe=Again(two_layers, folder),
    )


def matrix(folder: Path) -> DenseCellDataset:
    return dense_stores.matrix(folder, "zstd", "float32", recipe=Again(matrix, folder))


def tiles(folder: Path) -> DenseCellDataset:
    return dense_stores.tiles(folder, "zstd", "uint16", recipe=Again(tiles, folder))


def ragged(folder: Path) -> DenseCellDataset:
    return dense_stores.encoded(folder, "zstd", "uint8", recipe=Again(ragged, folder))


STORED: dict[str, Callable[[Path], Stored]] = {
    made.__name__: made for made in (sparse, two_layers, matrix, tiles, ragged)
}


def of_shared(shared: Path) -> dict[str, Callable[[], Any]]:
    """Datasets over real fixtures, by kind."""
    spaces = shared / "fixtures" / "homeobox" / "all_spaces" / "atlas"

    def query() -> Any:
        return RaggedAtlas.checkout_latest(spaces).query("cells")

    def multimodal() -> MultimodalCellDataset:
        result: MultimodalCellDataset = query().to_multimodal_dataset(
            ["adt", "rna"], metadata_columns=["cell_type"]
        )
        return result

    def fragments() -> Any:
        return query().to_cell_dataset(
            "chromatin_accessibility", matrix=Bins(100_000, "observed"), metadata_columns=["cell_type"]
        )

    def pairs() -> Any:
        (archive,) = (shared / "fixtures" / "scdl" / "neighbors").glob("arch*")
        return SingleCellMemMapDataset(archive, load_neighbors=True, neighbor_seed=5).to_cell_dataset()

    return {"multimodal": multimodal, "fragments": fragments, "pairs": pairs}


KINDS = [*STORED, "multimodal", "fragments", "pairs"]
