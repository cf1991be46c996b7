"""The batches that datasets return: rows of one or several modalities."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Iterator, Mapping, Sequence, Sized
from dataclasses import dataclass, field, replace
from typing import Protocol, Self, TypeAlias, TypeVar

import numpy as np

ArrayT = TypeVar("ArrayT", np.ndarray, list[np.ndarray])


def teach_torch() -> None:
    """Let torch's default collate make tensors of batches, where torch is in use.

    It looks at ``batch[0]`` first, or at ``dataset[i]`` of a list of rows, in whatever process it runs. What
    makes tensors lies above this module, which is why it is found by name.
    """
    if "torch.utils.data" in sys.modules:
        importlib.import_module("hbx_gpu._collates").register_with_torch()


def _one_row(batch: Sized, row: int) -> slice:
    """Return a row number as a slice; as for sequences, negative ones count from the end."""
    n = len(batch)
    if not isinstance(row, int | np.integer):
        raise TypeError(
            f"batch[{row!r}]: a batch has rows by number. Tensors by name come from a collate: pass "
            "collate_fn=hbx_gpu.dataloader.sparse_to_dense_collate to a torch DataLoader, or layout='dense' "
            "to make_loader"
        )
    if not -n <= row < n:
        raise IndexError(f"row {row} is out of range for a batch of {n}")
    return slice(row % n, row % n + 1)


def _cut(arrays: Mapping[str, ArrayT], rows: slice) -> dict[str, ArrayT]:
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
    axes
        Of ``dataset[i]``: a digest of the dataset's features, layers and vocabularies. Rows with equal ones
        can be put together. Empty in other batches.
    """

    indices: np.ndarray
    values: np.ndarray
    offsets: np.ndarray
    n_features: int
    metadata: dict[str, np.ndarray] | None = None
    layers: dict[str, np.ndarray] = field(default_factory=dict)
    ascending: bool = False
    axes: str = ""

    def __len__(self) -> int:
        return len(self.offsets) - 1

    def __getitem__(self, row: int) -> SparseBatch:
        """One row, as a batch."""
        teach_torch()
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

    def joined_with(
        self, others: Sequence[SparseBatch], metadata: dict[str, np.ndarray] | None
    ) -> SparseBatch:
        """The rows of this batch, then those of `others`; see :func:`put_together`."""
        every = [self, *others]
        lengths = np.concatenate([np.diff(batch.offsets) for batch in every])
        return replace(
            self,
            indices=np.concatenate([batch.indices for batch in every]),
            values=np.concatenate([batch.values for batch in every]),
            offsets=np.concatenate([[0], np.cumsum(lengths)]),
            metadata=metadata,
            layers={k: np.concatenate([batch.layers[k] for batch in every]) for k in self.layers},
        )


@dataclass(slots=True)
class DenseBatch:
    """Rows of a dense feature space, or image tiles of one shape.

    Attributes
    ----------
    data
        (n_rows, n_features), or ``(n_rows, *per_cell_shape)`` for tiles.
    n_features
        Number of columns (tiles: number of elements of one tile).
    per_cell_shape
        Shape of one tile, None for feature spaces.
    metadata
        As in :class:`SparseBatch`.
    layers
        Layer name -> array like `data`, as in :class:`SparseBatch`.
    axes
        As in :class:`SparseBatch`.
    """

    data: np.ndarray
    n_features: int
    per_cell_shape: tuple[int, ...] | None = None
    metadata: dict[str, np.ndarray] | None = None
    layers: dict[str, np.ndarray] = field(default_factory=dict)
    axes: str = ""

    def __len__(self) -> int:
        return len(self.data)

    def __getitem__(self, row: int) -> DenseBatch:
        """One row, as a batch."""
        teach_torch()
        rows = _one_row(self, row)
        metadata = None if self.metadata is None else _cut(self.metadata, rows)
        return replace(self, data=self.data[rows], metadata=metadata, layers=_cut(self.layers, rows))

    def joined_with(self, others: Sequence[DenseBatch], metadata: dict[str, np.ndarray] | None) -> DenseBatch:
        """The rows of this batch, then those of `others`; see :func:`put_together`."""
        every = [self, *others]
        return replace(
            self,
            data=np.concatenate([batch.data for batch in every]),
            metadata=metadata,
            layers={k: np.concatenate([batch.layers[k] for batch in every]) for k in self.layers},
        )


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
    axes
        As in :class:`SparseBatch`.
    """

    data: list[np.ndarray]
    n_features: int = 0
    metadata: dict[str, np.ndarray] | None = None
    layers: dict[str, list[np.ndarray]] = field(default_factory=dict)
    axes: str = ""

    def __len__(self) -> int:
        return len(self.data)

    def __getitem__(self, row: int) -> RaggedBatch:
        """One row, as a batch."""
        teach_torch()
        rows = _one_row(self, row)
        metadata = None if self.metadata is None else _cut(self.metadata, rows)
        return replace(self, data=self.data[rows], metadata=metadata, layers=_cut(self.layers, rows))

    def joined_with(
        self, others: Sequence[RaggedBatch], metadata: dict[str, np.ndarray] | None
    ) -> RaggedBatch:
        """The rows of this batch, then those of `others`; see :func:`put_together`."""
        every = [self, *others]
        return replace(
            self,
            data=[array for batch in every for array in batch.data],
            metadata=metadata,
            layers={k: [array for batch in every for array in batch.layers[k]] for k in self.layers},
        )


Part: TypeAlias = SparseBatch | DenseBatch | RaggedBatch
"""A batch of one modality."""


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
    axes
        As in :class:`SparseBatch`, of all modalities.
    """

    modalities: dict[str, Part]
    present: dict[str, np.ndarray]
    metadata: dict[str, np.ndarray] | None
    n_cells: int
    measured: Mapping[str, np.ndarray] = field(default_factory=dict)
    axes: str = ""

    def __len__(self) -> int:
        return self.n_cells

    def __getitem__(self, row: int) -> MultimodalBatch:
        """One row, as a batch; without its `measured` masks."""
        teach_torch()
        rows = _one_row(self, row)
        return replace(
            self,
            modalities={name: part[row] for name, part in self.modalities.items()},
            present=_cut(self.present, rows),
            metadata=None if self.metadata is None else _cut(self.metadata, rows),
            n_cells=1,
            measured={},
        )

    def joined_with(
        self, others: Sequence[MultimodalBatch], metadata: dict[str, np.ndarray] | None
    ) -> MultimodalBatch:
        """The rows of this batch, then those of `others`; see :func:`put_together`."""
        every = [self, *others]
        parts: dict[str, SparseBatch | DenseBatch | RaggedBatch] = {
            name: put_together([batch.modalities[name] for batch in every]) for name in self.modalities
        }
        return replace(
            self,
            modalities=parts,
            present={name: np.concatenate([b.present[name] for b in every]) for name in self.present},
            metadata=metadata,
            n_cells=sum(batch.n_cells for batch in every),
            measured=_Stacked([b.measured for b in every]) if all(b.measured for b in every) else {},
        )


class _Rows(Protocol):
    """A batch whose rows can be followed by those of others of its kind."""

    metadata: dict[str, np.ndarray] | None
    axes: str

    def joined_with(self, others: Sequence[Self], metadata: dict[str, np.ndarray] | None) -> Self:
        """The rows of this batch, then those of `others`, with the metadata of all."""


RowsT = TypeVar("RowsT", bound=_Rows)


def put_together(batches: RowsT | Sequence[RowsT]) -> RowsT:
    """One batch of the rows of several, as torch collects rows that it asked for one by one.

    Parameters
    ----------
    batches
        What ``dataset[i]`` returned, in a list or tuple; a batch is returned as it is.

    Raises
    ------
    TypeError
        The batches come from datasets with other features, layers, vocabularies or metadata columns.
    """
    if not isinstance(batches, list | tuple):
        return batches  # type: ignore[return-value]
    first: RowsT = batches[0]
    each = [batch.metadata or {} for batch in batches]
    if not first.axes or any(
        b.axes != first.axes or m.keys() != each[0].keys() for b, m in zip(batches, each, strict=True)
    ):
        raise TypeError(
            f"these {len(batches)} rows are from datasets that differ in features, layers, categories or obs "
            "columns, or were not read as dataset[i]; pass a ConcatDataset of them to hbx_gpu.make_loader, "
            "which puts datasets together or says how they differ"
        )
    metadata = {name: np.concatenate([columns[name] for columns in each]) for name in each[0]}
    return first.joined_with(batches[1:], metadata or None)


class _Stacked(Mapping[str, np.ndarray]):
    """Masks of several batches, one after the other, made when they are asked for."""

    def __init__(self, parts: Sequence[Mapping[str, np.ndarray]]) -> None:
        self._parts = parts

    def __getitem__(self, name: str) -> np.ndarray:
        return np.concatenate([part[name] for part in self._parts])

    def __iter__(self) -> Iterator[str]:
        return iter(self._parts[0])

    def __len__(self) -> int:
        return len(self._parts[0])
