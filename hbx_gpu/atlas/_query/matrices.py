"""Query results as matrices in memory, from which AnnData objects are cut."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import TYPE_CHECKING

import numpy as np
import pyarrow as pa

from hbx_gpu.atlas._query.obs import has_gaps
from hbx_gpu.atlas._query.opening import group_records
from hbx_gpu.atlas._query.state import FeatureJoin

if TYPE_CHECKING:
    import pandas as pd
    from anndata import AnnData
    from scipy.sparse import csr_matrix

    from hbx_gpu._datasets.dense import FeatureDataset
    from hbx_gpu.atlas._catalog.snapshot import Snapshot

_BLOCK_ELEMENTS = 1 << 27
"""Number of matrix entries, zeros included, that are read at once when a matrix is assembled."""


def measured(snapshot: Snapshot, feature_space: str, groups: Sequence[str], join: FeatureJoin) -> np.ndarray:
    """Ascending global indices of the features that any (union) or all (intersection) groups measured."""
    counts = np.zeros(snapshot.registry(feature_space).n_features, dtype=np.int64)
    for group in group_records(snapshot, groups, feature_space):
        remap = snapshot.remap(group.name, feature_space)
        counts[np.unique(remap[remap >= 0])] += 1
    return np.flatnonzero(counts == len(groups) if join == "intersection" and groups else counts > 0)


@dataclass(frozen=True, slots=True)
class Matrices:
    """The layers of a query's rows, with names for both axes, from which AnnData is cut.

    Attributes
    ----------
    layers
        Layer name -> dataset, all with the same rows and columns. The first becomes ``X``.
    obs
        Obs, one row per dataset row, with the uid as one column.
    obs_names
        Columns of `obs` that AnnData objects get.
    var
        Var, one row per column, indexed by uid.
    """

    layers: dict[str, FeatureDataset]
    obs: pa.Table
    obs_names: list[str]
    var: pd.DataFrame

    def __len__(self) -> int:
        return len(self.obs)

    def cut(self, start: int, stop: int) -> AnnData:
        """Rows ``[start, stop)`` as AnnData, in query order, with CSR of the stored dtype."""
        from anndata import AnnData

        frame = obs_frame(self.obs.slice(start, stop - start), self.obs_names)
        matrices = {name: read_matrix(dataset, start, stop) for name, dataset in self.layers.items()}
        first = next(iter(matrices))
        x = matrices.pop(first)
        return AnnData(x, obs=frame, var=self.var.copy(), layers=matrices)

    def pieces(self, batch_size: int) -> Iterator[AnnData]:
        """All rows, `batch_size` at a time."""
        for start in range(0, len(self), batch_size):
            yield self.cut(start, min(start + batch_size, len(self)))


def read_matrix(dataset: FeatureDataset, start: int, stop: int) -> np.ndarray | csr_matrix:
    """Rows ``[start, stop)`` of a dataset as one matrix in memory.

    Returns
    -------
    numpy.ndarray or scipy.sparse.csr_matrix
        (stop - start, n_features), dense or CSR as the dataset is, in the stored dtype; columns of CSR rows
        ascend.
    """
    from scipy.sparse import csr_matrix

    from hbx_gpu._datasets.cells import CellDataset

    rows = _blocks(dataset.n_features, start, stop)
    if not isinstance(dataset, CellDataset):
        return np.concatenate([dataset.__getitems__(block).data for block in rows])
    blocks = [dataset.__getitems__(block) for block in rows]
    lengths = np.concatenate([np.diff(block.offsets) for block in blocks])
    matrix = csr_matrix(
        (
            np.concatenate([block.values for block in blocks]),
            np.concatenate([block.indices for block in blocks]),
            np.concatenate([[0], np.cumsum(lengths)]),
        ),
        shape=(stop - start, dataset.n_features),
    )
    matrix.sort_indices()
    return matrix


def _blocks(n_features: int, start: int, stop: int) -> list[np.ndarray]:
    """Row numbers cut into at least one piece of at most `_BLOCK_ELEMENTS` matrix entries each."""
    rows = max(1, _BLOCK_ELEMENTS // max(1, n_features))
    edges = [*range(start, stop, rows), stop] if stop > start else [start, stop]
    return [np.arange(a, b) for a, b in pairwise(edges)]


def obs_frame(obs: pa.Table, names: Sequence[str]) -> pd.DataFrame:
    """Obs columns with the uid as index."""
    frame = to_pandas(obs.select(names))
    frame.index = obs.column("uid").to_numpy().astype(str).astype(object)
    frame.index.name = "uid"
    return frame


def to_pandas(table: pa.Table) -> pd.DataFrame:
    """A pandas frame in which whole numbers and booleans stay what they are where some are missing.

    By default pandas turns them into doubles and objects. Gaps are determined over the whole table, so the
    dtype of a column does not depend on the requested rows.
    """
    import pandas as pd

    frame = table.to_pandas()
    for i, column in enumerate(table.schema):
        if has_gaps(column) or table.column(i).null_count:
            kind: object = None
            if pa.types.is_boolean(column.type):
                kind = pd.BooleanDtype()
            elif pa.types.is_integer(column.type):
                kind = pd.array([], dtype=pd.api.types.pandas_dtype(_nullable_name(column.type))).dtype
            if kind is not None:
                frame[column.name] = table.column(i).to_pandas(types_mapper=lambda _, kind=kind: kind)
    return frame


def _nullable_name(kind: pa.DataType) -> str:
    return f"{'U' if pa.types.is_unsigned_integer(kind) else ''}Int{kind.bit_width}"
