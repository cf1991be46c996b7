"""Expected content of a sparse dataset, decoded by the NumPy reference engine."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from hbx_gpu._engine.reference import ReferenceEngine
from hbx_gpu._storage.choice import open_reader
from hbx_gpu.batch import SparseBatch
from hbx_gpu.dataloader import CellDataset


def read_reference(dataset: CellDataset, rows: Sequence[int] | np.ndarray) -> SparseBatch:
    """Rows of a dataset, read and decoded by simple code that is slow and easy to check.

    Parameters
    ----------
    dataset
        A dataset of a sparse feature space.
    rows
        Row numbers from 0 to ``len(dataset) - 1``.

    Returns
    -------
    SparseBatch
        The batch that ``dataset[rows]`` must equal, without metadata.
    """
    engine = ReferenceEngine(dataset.table, dataset.directory, list(dataset.dtypes.values()))
    plan = dataset.plan(np.asarray(rows, np.int64))
    reader = open_reader("preadv", dataset.directory)
    try:
        slab = reader.read(dataset.directory.extents(plan.chunks))
        indices, layers, offsets = engine.csr(plan, slab)
    finally:
        reader.close()
    several = dict(zip(dataset.layers, layers, strict=True)) if len(layers) > 1 else {}
    return SparseBatch(indices, layers[0], offsets, dataset.n_features, layers=several)
