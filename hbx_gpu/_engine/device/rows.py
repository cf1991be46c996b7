"""Rows of dense arrays on a device: which datasets have them, and their plans in the terms of staging.

Where chunks span all axes but the first, a row is a contiguous stretch of a chunk. What is staged, decoded
and gathered of it is then what it is for the values of a sparse matrix, without column indices.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

import numpy as np

from hbx_gpu._engine.device.records import BOOL, ELEMENT_TYPES
from hbx_gpu._plan.boxes import BoxPlan, full_boxes
from hbx_gpu._plan.rows import BatchPlan, SourceTable, element_base
from hbx_gpu._source import RowIndex

if TYPE_CHECKING:
    from hbx_gpu._source import ArrayLayout, BoxIndex, Source
    from hbx_gpu._storage.chunks import ChunkDirectory

_MAX_ELEMENTS = 1 << 31  # of a chunk: kernels count those of a stretch in 31 bits


class Boxes(Protocol):
    """The part of :class:`~hbx_gpu.dataloader.DenseCellDataset` that is used here."""

    per_cell_shape: tuple[int, ...] | None

    @property
    def directory(self) -> ChunkDirectory: ...

    @property
    def sources(self) -> list[Source]: ...

    @property
    def row_index(self) -> BoxIndex: ...

    @property
    def layers(self) -> tuple[str, ...]: ...

    @property
    def dtype(self) -> np.dtype: ...

    @property
    def n_features(self) -> int: ...

    @property
    def is_matrix(self) -> bool: ...

    @property
    def positions(self) -> bool: ...


@dataclass(frozen=True, slots=True)
class DenseRows:
    """How rows of one layer of a dense dataset lie in chunks, and become rows of a batch.

    Attributes
    ----------
    table
        Table of the dataset's arrays, without column indices. Remaps go from output column to local column.
    dtype
        dtype that kernels convert elements to.
    length, inner
        int64, (n_sources,). Positions on the first axis of each array, and elements of each position.
    shapes
        Shape of one position on the first axis, for each array.
    width
        Elements of every row; None where rows differ.
    placed
        Whether columns have other places in the output than where they are stored.
    positions
        See :class:`~hbx_gpu._datasets.dense.DenseCellDataset`.
    """

    table: SourceTable
    dtype: np.dtype
    length: np.ndarray
    inner: np.ndarray
    shapes: tuple[tuple[int, ...], ...]
    width: int | None
    placed: bool
    positions: bool

    @classmethod
    def of(cls, dataset: Boxes, dtype: str | None = None) -> DenseRows | None:
        """Return the rows of a dataset; None if they are not stretches of chunks that kernels can take.

        Parameters
        ----------
        dataset
            A dataset with one layer.
        dtype
            What its own dtype becomes, once rows have it; None: nothing else.
        """
        layouts, remaps = dataset.directory.layouts, [source.remap for source in dataset.sources]
        rows: BoxIndex = dataset.row_index
        if len(dataset.layers) != 1 or not layouts or not rows.size.shape[1]:
            return None
        final = np.dtype(dtype or dataset.dtype)
        for layout in layouts:
            if not (_in_one_piece(layout) and _converts(layout.dtype, dataset.dtype, final)):
                return None
        if not _take_all(layouts, rows):
            return None
        shapes = tuple(layout.shape[1:] for layout in layouts)
        inner = np.array([math.prod(shape) for shape in shapes], np.int64)
        width: int | None = dataset.n_features
        placed = False
        if dataset.is_matrix:
            if any(len(remap) != n for remap, n in zip(remaps, inner.tolist(), strict=True)):
                return None
            own = np.arange(dataset.n_features)
            placed = not all(np.array_equal(remap, own) for remap in remaps)
        elif dataset.per_cell_shape is None:
            if any(layout.dtype != final for layout in layouts):
                return None
            width = None
        # Sources that share a layout share the remap object: one inverse of each.
        made = {id(remap): _inverse(remap, dataset.n_features) for remap in remaps if placed}
        none = np.empty(0, np.int32)
        inverses = [made.get(id(remap), none) for remap in remaps]
        return cls(
            table=_table(dataset.directory, inverses, dataset.n_features),
            dtype=final,
            length=np.array([layout.shape[0] for layout in layouts], np.int64),
            inner=inner,
            shapes=shapes,
            width=None if placed else width,
            placed=placed,
            positions=dataset.positions,
        )

    def plan(self, boxes: BoxPlan) -> BatchPlan:
        """A plan of boxes as one of stretches.

        Where all rows have `width` elements, one that lacks the modality has as many, which no piece brings;
        elsewhere it has none.
        """
        source = boxes.source
        if self.width is None:
            length = self._length(source, boxes.size[:, 0])
        else:
            length = np.full(len(source), self.width, np.int64)
        offsets = np.concatenate([[0], np.cumsum(length)]).astype(np.int64)
        none = np.empty(0, np.int64)
        arrays, counts = [none], [none]
        pieces: list[tuple[np.ndarray, ...]] = [(none,) * 4]
        for part in boxes.parts:
            n = np.diff(part.piece_ptr)
            arrays.append(np.full(len(n), part.array, np.int64))
            counts.append(n)
            begin, taken, behind = (
                x[:, 0] * self.inner[part.array] for x in (part.begin, part.count, part.out)
            )
            pieces.append((part.row, begin, taken, offsets[part.row] + behind))
        row, skip, taken, out = (np.concatenate(column) for column in zip(*pieces, strict=True))
        return BatchPlan(
            source=source.astype(np.int32, copy=False),
            offsets=offsets,
            chunks=boxes.chunks,
            chunk_array=np.concatenate(arrays),
            piece_ptr=np.concatenate([[0], np.cumsum(np.concatenate(counts))]).astype(np.int64),
            piece_row=row,
            piece_skip=skip,
            piece_count=taken,
            piece_out=out,
        )

    def stretches(self, index: BoxIndex, rows: np.ndarray) -> RowIndex:
        """Elements of the arrays that rows of a dataset take."""
        source, lower, size = index.source[rows], index.lower[rows, 0], index.size[rows, 0]
        begin = np.where(size < 0, 0, lower) * self.inner[source]
        return RowIndex(source, begin, self._length(source, size))

    def _length(self, source: np.ndarray, size: np.ndarray) -> np.ndarray:
        """Elements of rows that take so many positions; of rows without a source none."""
        count = np.where(size < 0, self.length[source], size) * self.inner[source]
        return np.where(source >= 0, count, 0)

    def shape_of(self, plan: BatchPlan, row: int) -> tuple[int, ...]:
        """Return the shape of one row of a plan, for datasets whose rows differ in shape."""
        source = int(plan.source[row])
        if source < 0:
            return (0,)
        n = int(plan.offsets[row + 1] - plan.offsets[row]) // int(self.inner[source])
        return self.shapes[source] if self.positions else (n, *self.shapes[source])


def _in_one_piece(layout: ArrayLayout) -> bool:
    """Whether a position on the first axis is a stretch of one chunk."""
    whole = len(layout.shape) > 0 and layout.shape[1:] == layout.chunk_shape[1:]
    return whole and 0 < math.prod(layout.chunk_shape) < _MAX_ELEMENTS


def _converts(stored: np.dtype, between: np.dtype, final: np.dtype) -> bool:
    """Whether `gather_pieces` makes the final dtype of the stored one as NumPy does by way of another."""
    if any(dtype != BOOL and dtype.name not in ELEMENT_TYPES for dtype in (stored, final)):
        return False
    if final != between:
        # Kernels round once: the step between may not round.
        rounds = stored.kind in "iu" and stored.itemsize == 8 and between.kind == "f"
        if rounds or not np.can_cast(stored, between, "safe"):
            return False
    # bool is a number for kernels.
    return stored == final or (
        final != BOOL and (stored, final) != (np.dtype(np.float64), np.dtype(np.float16))
    )


def _take_all(layouts: Sequence[ArrayLayout], rows: BoxIndex) -> bool:
    """Whether all rows take all of every axis but the first."""
    for i, layout in enumerate(layouts):
        mine = np.flatnonzero(rows.source == i)
        _, count = full_boxes(layout.shape, rows.lower[mine], rows.size[mine])
        if (count[:, 1:] != layout.shape[1:]).any():
            return False
    return True


def _table(directory: ChunkDirectory, inverses: Sequence[np.ndarray], n_features: int) -> SourceTable:
    """Vectors of the arrays; `inverses`: of each the local column of every output column."""
    elements = [math.prod(layout.chunk_shape) for layout in directory.layouts]
    distinct = {id(inverse): inverse for inverse in inverses}
    begin = dict(zip(distinct, np.cumsum([0, *map(len, distinct.values())]).tolist(), strict=False))
    own = np.arange(n_features)
    same = {key: np.array_equal(inverse, own) for key, inverse in distinct.items()}
    return SourceTable(
        n_roles=1,
        chunk_base=directory.base,
        chunk_elements=np.array(elements, np.int64),
        element_base=element_base(np.diff(directory.base).tolist(), elements),
        remap=np.concatenate([*distinct.values(), np.empty(0, np.int32)]),
        remap_start=np.array([begin[id(inverse)] for inverse in inverses], np.int64),
        remap_length=np.array([len(inverse) for inverse in inverses], np.int64),
        n_features=n_features,
        drops=False,
        repeats=np.zeros(len(elements), bool),
        identity=np.array([same[id(inverse)] for inverse in inverses], bool),
        in_parts=np.zeros(len(elements), bool),
        first_role=1,
    )


def _inverse(remap: np.ndarray, n_features: int) -> np.ndarray:
    """int32, (n_features,). Local column of each output column, -1 = none; of several the last."""
    inverse = np.full(n_features, -1, np.int32)
    kept = np.flatnonzero(remap >= 0)
    inverse[remap[kept]] = kept
    return inverse
