"""A small dataset and a small atlas, the same wherever they are made."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from hbx_gpu._source import ObsColumns
from hbx_gpu.dataloader import CellDataset
from hbx_gpu.testing._stored import StoredGroup, write_sources

if TYPE_CHECKING:
    from hbx_gpu.atlas import RaggedAtlas

N_FEATURES = 50
"""Features of :func:`example_dataset`."""


def example_groups(n_rows: int = 60) -> list[StoredGroup]:
    """Two matrices of `n_rows` rows with 40 and 25 of 50 features each, in different orders.

    Counts from 1 to 499 as uint32, 30 % of them stored.
    """
    from scipy.sparse import random as random_matrix

    rng = np.random.default_rng(11)
    groups = []
    for n_columns in (40, 25):
        matrix = random_matrix(n_rows, n_columns, density=0.3, format="csr", random_state=rng)
        matrix.data = rng.integers(1, 500, size=matrix.nnz).astype(np.uint32)
        remap = rng.permutation(N_FEATURES)[:n_columns].astype(np.int32)
        groups.append(StoredGroup(matrix=matrix, remap=remap, chunk=256, chunks_per_shard=2))
    return groups


def example_dataset(
    root: str | Path, groups: Sequence[StoredGroup] | None = None, **options: Any
) -> CellDataset:
    """A dataset over matrices that are written below a folder.

    Parameters
    ----------
    root
        Folder for the arrays; made where it is missing.
    groups
        The matrices; :func:`example_groups` by default. Their columns must be below 50.
    options
        Passed on to :class:`~hbx_gpu.CellDataset`.

    Returns
    -------
    CellDataset
        The rows of the first matrix, then those of the next. Metadata columns are ``type`` (codes -1, 0, 1 of
        the categories "b" and "t"), ``score`` (float64, rising from 0 to 1) and ``day`` (datetime64[us]).
    """
    sources, rows = write_sources(Path(root), list(example_groups() if groups is None else groups))
    n = len(rows)
    obs = ObsColumns(
        columns={
            "type": np.arange(n) % 3 - 1,
            "score": np.linspace(0, 1, n),
            "day": np.arange(n).astype("M8[us]"),
        },
        categories={"type": np.array(["b", "t"], dtype=object)},
    )
    uids = np.array([f"f{i}" for i in range(N_FEATURES)], dtype=object)
    return CellDataset(
        sources, rows, layer="counts", n_features=N_FEATURES, feature_uids=uids, obs=obs, **options
    )


def example_atlas(root: str | Path, n_cells: int = 60) -> RaggedAtlas:
    """An atlas of two datasets of `n_cells` cells each, checked out at its only snapshot.

    The matrices are those of :func:`example_groups`; genes are called ``f0`` to ``f49``, cells have a column
    ``donor`` of two values.
    """
    import pandas as pd
    from anndata import AnnData

    from hbx_gpu.atlas import RaggedAtlas, create_or_open_atlas

    atlas = create_or_open_atlas(root)
    for number, group in enumerate(example_groups(n_cells)):
        obs = pd.DataFrame(
            {"donor": [f"d{row % 2}" for row in range(n_cells)]},
            index=[f"s{number}c{row}" for row in range(n_cells)],
        )
        var = pd.DataFrame(index=[f"f{column}" for column in group.remap])
        atlas.add_from_anndata(AnnData(group.matrix.astype(np.float32), obs=obs, var=var))
    atlas.optimize()
    atlas.snapshot()
    return RaggedAtlas.checkout_latest(root)
