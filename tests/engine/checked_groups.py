"""A small sparse group as our writer stores it, and a dataset over it, without any catalog."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from hbx_gpu._datasets.cells import CellDataset
from hbx_gpu._source import RowIndex, Source
from hbx_gpu._storage import read_layout
from hbx_gpu.atlas._model.spaces import get_space
from hbx_gpu.atlas._writing.arrays import SparseGroupWriter

CHUNK, N_ROWS, N_GENES = 128, 60, 50
SPACE = get_space("gene_expression")


def write(folder: Path, codec: str, dtype: str) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """A group of random rows, and what it holds: columns, values, offsets."""
    rng = np.random.default_rng(7)
    counts = rng.integers(3, 12, N_ROWS)
    indices = np.concatenate([np.sort(rng.choice(N_GENES, n, replace=False)) for n in counts]).astype("u4")
    values = rng.integers(1, 200, len(indices)).astype(dtype)
    writer = SparseGroupWriter(
        folder, SPACE, layers={"counts": dtype}, codec=codec, chunk=CHUNK, shard=8 * CHUNK
    )
    writer.append(indices, {"counts": values})
    writer.close()
    return indices, values, np.concatenate([[0], np.cumsum(counts)])


def opened(folder: Path, offsets: np.ndarray) -> CellDataset:
    source = Source(
        "g",
        read_layout(folder / "csr/indices", absent_is_fill=False),
        {"counts": read_layout(folder / "csr/layers/counts", absent_is_fill=False)},
        np.arange(N_GENES, dtype=np.int32),
    )
    start, length = offsets[:-1].astype(np.int64), np.diff(offsets).astype(np.int32)
    rows = RowIndex(np.zeros(N_ROWS, np.int32), start, length)
    names = np.array([f"g{i}" for i in range(N_GENES)], object)
    return CellDataset([source], rows, layer=["counts"], n_features=N_GENES, feature_uids=names)


def rows_of() -> np.ndarray:
    """Where the rows of :func:`write` begin and end."""
    counts = np.random.default_rng(7).integers(3, 12, N_ROWS)
    return np.concatenate([[0], np.cumsum(counts)])
