"""What a dataset hands out: rows of one or several modalities, on one device."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np


@dataclass(slots=True)
class SparseBatch:
    """Rows of a sparse feature space in CSR form.

    Attributes
    ----------
    indices
        int32, (nnz,). Output column of each value: the global feature index, or the position in
        the panel asked for. Inside a row in stored order, which need not be ascending. int64 where
        `ascending` is True.
    values
        (nnz,), dtype of the dataset's layer.
    offsets
        int64, (n_rows + 1,). Row ``i`` is ``indices[offsets[i]:offsets[i + 1]]``.
    n_features
        Width of the dense matrix these rows belong to.
    metadata
        One array of n_rows per requested obs column, or None when none was requested.
    layers
        Layer name -> (nnz,) values, every layer that was asked for; `values` is the first of them. Empty
        where only one was.
    ascending
        Whether columns are known to ascend, each once, in every row: batches made for sparse tensors.
    """

    indices: np.ndarray
    values: np.ndarray
    offsets: np.ndarray
    n_features: int
    metadata: dict[str, np.ndarray] | None = None
    layers: dict[str, np.ndarray] = field(default_factory=dict)
    ascending: bool = False

    def __len__(self) -> int:
        return len(self.offsets) - 1


@dataclass(slots=True)
class DenseBatch:
    """Rows of a dense feature space, or image tiles of one shape.

    Attributes
    ----------
    data
        (n_rows, n_features), or (n_rows, *per_cell_shape) for tiles.
    n_features
        Number of columns (tiles: number of elements of one tile).
    per_cell_shape
        Shape of one tile, None for feature spaces.
    metadata
        As in :class:`SparseBatch`.
    layers
        Layer name -> array like `data`, as in :class:`SparseBatch`.
    """

    data: np.ndarray
    n_features: int
    per_cell_shape: tuple[int, ...] | None = None
    metadata: dict[str, np.ndarray] | None = None
    layers: dict[str, np.ndarray] = field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.data)


@dataclass(slots=True)
class RaggedBatch:
    """Arrays of differing shape, one per row: tiles of several sizes, boxes of an image, encoded images.

    Attributes
    ----------
    data
        n_rows arrays of the stored dtype. A cell without the modality has an array without elements.
    n_features
        0: there are no columns.
    metadata
        As in :class:`SparseBatch`.
    layers
        Layer name -> list like `data`, as in :class:`SparseBatch`.
    """

    data: list[np.ndarray]
    n_features: int = 0
    metadata: dict[str, np.ndarray] | None = None
    layers: dict[str, list[np.ndarray]] = field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.data)


@dataclass(slots=True)
class MultimodalBatch:
    """The same cells in several modalities; every modality holds a row for every cell.

    Attributes
    ----------
    modalities
        One batch of n_cells rows per feature space. A cell without the modality has a row of zeros (in a
        :class:`RaggedBatch` an array without elements).
    present
        bool, (n_cells,) per feature space: tells a true zero from a modality that was not measured.
    metadata
        As in :class:`SparseBatch`.
    n_cells
        Number of rows.
    measured
        bool, (n_cells, n_features) per feature space that has features, made when it is asked for: whether
        the cell's dataset has the feature at all. False throughout for a cell without the modality.
    """

    modalities: dict[str, SparseBatch | DenseBatch | RaggedBatch]
    present: dict[str, np.ndarray]
    metadata: dict[str, np.ndarray] | None
    n_cells: int
    measured: Mapping[str, np.ndarray] = field(default_factory=dict)

    def __len__(self) -> int:
        return self.n_cells
