"""The batches that datasets return: rows of one or several modalities."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np


def _teach_torch() -> None:
    """Let torch's default collate make tensors of batches, where torch is in use.

    It looks at ``batch[0]`` first, in whatever process it runs. What makes tensors lies above this module,
    which is why it is found by name.
    """
    if "torch.utils.data" in sys.modules:
        importlib.import_module("hbx_gpu._collates").register_with_torch()


def _one_row(batch: Any, row: int) -> slice:
    """Return a row number as a slice; as for sequences, negative ones count from the end."""
    n = len(batch)
    if not -n <= row < n:
        raise IndexError(f"row {row} is out of range for a batch of {n}")
    return slice(row % n, row % n + 1)


def _cut(arrays: Mapping[str, Any], rows: slice) -> dict[str, Any]:
    return {name: array[rows] for name, array in arrays.items()}


@dataclass(slots=True)
class SparseBatch:
    """Rows of a sparse feature space in CSR form.

    Attributes
    ----------
    indices
        int32, (nnz,). Output column of each value: the global feature index, or the position in
        the panel asked for. Columns of a row are in stored order, which need not be ascending. The dtype is
        int64 where `ascending` is True.
    values
        (nnz,), dtype of the dataset's layer.
    offsets
        int64, (n_rows + 1,). Row ``i`` is ``indices[offsets[i]:offsets[i + 1]]``.
    n_features
        Width of the dense matrix these rows belong to.
    metadata
        One array of n_rows per requested obs column, or None when none was requested. Missing values: -1
        among codes, NaN among floats, the smallest integer of the dtype among integers.
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

    def __getitem__(self, row: int) -> SparseBatch:
        """One row, as a batch."""
        _teach_torch()
        rows = _one_row(self, row)
        values = slice(*self.offsets[rows.start : rows.stop + 1])
        return replace(
            self,
            indices=self.indices[values],
            values=self.values[values],
            offsets=self.offsets[rows.start : rows.stop + 1] - self.offsets[rows.start],
            metadata=None if self.metadata is None else _cut(self.metadata, rows),
            layers=_cut(self.layers, values),
        )


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

    def __getitem__(self, row: int) -> DenseBatch:
        """One row, as a batch."""
        _teach_torch()
        rows = _one_row(self, row)
        metadata = None if self.metadata is None else _cut(self.metadata, rows)
        return replace(self, data=self.data[rows], metadata=metadata, layers=_cut(self.layers, rows))


@dataclass(slots=True)
class RaggedBatch:
    """Arrays of differing shape, one per row: tiles of several sizes, boxes of an image, encoded images.

    Attributes
    ----------
    data
        n_rows arrays of the stored dtype. A cell without the modality has an array without elements.
    n_features
        Always 0, because there are no columns.
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

    def __getitem__(self, row: int) -> RaggedBatch:
        """One row, as a batch."""
        _teach_torch()
        rows = _one_row(self, row)
        metadata = None if self.metadata is None else _cut(self.metadata, rows)
        return replace(self, data=self.data[rows], metadata=metadata, layers=_cut(self.layers, rows))


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

    def __getitem__(self, row: int) -> MultimodalBatch:
        """One row, as a batch; without its `measured` masks."""
        _teach_torch()
        rows = _one_row(self, row)
        return replace(
            self,
            modalities={name: part[row] for name, part in self.modalities.items()},
            present=_cut(self.present, rows),
            metadata=None if self.metadata is None else _cut(self.metadata, rows),
            n_cells=1,
            measured={},
        )
