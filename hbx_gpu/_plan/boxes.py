"""Plan boxes: find the chunks that a set of boxes needs, and where each part of them goes, without any I/O.

The counterpart of :mod:`hbx_gpu._plan.rows` for arrays of several axes: rows of dense matrices, image tiles,
boxes of an image, encoded images. The unit of work is again the *piece*: what one row needs of one chunk,
here a box inside the chunk. Pieces of one array are sorted by chunk.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from hbx_gpu._source import ArrayLayout, BoxIndex, Source
from hbx_gpu._storage.chunks import chunk_grid

_ROWS = 1 << 16  # rows of a dataset that are looked at together


@dataclass(frozen=True, slots=True)
class BoxTable:
    """The arrays of a dataset, numbered ``source * len(layers) + layer``.

    Attributes
    ----------
    layouts
        The arrays.
    n_layers
        Arrays per Source.
    chunk_base
        int64, (n_arrays + 1,). First global chunk number of each array.
    grids
        Chunks per axis of each array.
    """

    layouts: tuple[ArrayLayout, ...]
    n_layers: int
    chunk_base: np.ndarray
    grids: tuple[tuple[int, ...], ...]


def box_table(sources: Sequence[Source], layers: Sequence[str]) -> BoxTable:
    """The arrays of `sources`, in the order in which plans number them."""
    layouts = tuple(source.layers[name] for source in sources for name in layers)
    grids = tuple(chunk_grid(layout) for layout in layouts)
    base = np.cumsum([0, *(math.prod(grid) for grid in grids)])
    return BoxTable(layouts, len(layers), base.astype(np.int64), grids)


@dataclass(frozen=True, slots=True)
class ArrayPieces:
    """The pieces of one array.

    Attributes
    ----------
    array
        Number of the array.
    first_chunk
        Position of the array's first chunk in the plan's `chunks`.
    piece_ptr
        int64, (n_chunks + 1,). Chunk ``first_chunk + c`` serves pieces ``piece_ptr[c]:piece_ptr[c + 1]``.
    row
        int64, (n_pieces,). Output row of each piece.
    begin, count, out
        int64, (n_pieces, n_axes). First element of each piece inside its chunk, number of elements, and place
        inside the row's box.
    """

    array: int
    first_chunk: int
    piece_ptr: np.ndarray
    row: np.ndarray
    begin: np.ndarray
    count: np.ndarray
    out: np.ndarray


@dataclass(frozen=True, slots=True)
class BoxPlan:
    """What to read, and where each piece of it goes.

    Attributes
    ----------
    source
        int32, (n_rows,). Source of every output row; -1 = the row lacks this modality.
    size
        int64, (n_rows, k). Elements of each row's box on the leading axes; -1 = an axis in full.
    chunks
        int64, ascending. Global numbers of the chunks to read, each once.
    parts
        The pieces of each array.
    """

    source: np.ndarray
    size: np.ndarray
    chunks: np.ndarray
    parts: tuple[ArrayPieces, ...]

    def __len__(self) -> int:
        return len(self.source)

    @property
    def share(self) -> float:
        """Part of the chunks that decoding looks at: all."""
        return 1.0


def plan_boxes(table: BoxTable, rows: BoxIndex, selection: np.ndarray) -> BoxPlan:
    """Plan of the rows `selection` (int64, in ``[0, len(rows))``; repeats allowed)."""
    source = rows.source[selection]
    lower, size = rows.lower[selection], rows.size[selection]
    parts: list[ArrayPieces] = []
    chunks: list[np.ndarray] = [np.empty(0, np.int64)]
    first = 0
    for one in np.unique(source[source >= 0]).tolist():
        mine = np.flatnonzero(source == one)
        for layer in range(table.n_layers):
            array = one * table.n_layers + layer
            layout = table.layouts[array]
            full = full_boxes(layout.shape, lower[mine], size[mine])
            pieces = _pieces(table, array, mine, *full)
            if pieces is not None:
                numbers, cut = pieces
                parts.append(ArrayPieces(array, first, *cut))
                chunks.append(numbers)
                first += len(numbers)
    return BoxPlan(source, size, np.concatenate(chunks), tuple(parts))


def full_boxes(shape: tuple[int, ...], lower: np.ndarray, size: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return the first element and the number of elements of boxes on every axis, int64, (n, n_axes).

    Axes that `lower` and `size` do not have, and axes with size -1, are taken in full.
    """
    k = min(size.shape[1], len(shape))
    begin = np.zeros((len(size), len(shape)), np.int64)
    count = np.tile(np.array(shape, np.int64), (len(size), 1))
    begin[:, :k] = np.where(size[:, :k] < 0, 0, lower[:, :k])
    count[:, :k] = np.where(size[:, :k] < 0, count[:, :k], size[:, :k])
    return begin, count


def _pieces(
    table: BoxTable, array: int, rows: np.ndarray, lower: np.ndarray, size: np.ndarray
) -> tuple[np.ndarray, tuple[np.ndarray, ...]] | None:
    """Chunks of one array that boxes need, and their pieces by chunk; None where the boxes are empty."""
    chunk = np.array(table.layouts[array].chunk_shape, np.int64)
    filled = (size > 0).all(axis=1)
    if not filled.all():
        rows, lower, size = rows[filled], lower[filled], size[filled]
    if not len(rows):
        return None
    first = lower // chunk
    spans = (lower + size - 1) // chunk - first + 1
    n_pieces = spans.prod(axis=1)
    at = first
    if n_pieces.max() > 1:
        box = np.repeat(np.arange(len(rows)), n_pieces)
        number = np.arange(len(box)) - np.repeat(np.cumsum(n_pieces) - n_pieces, n_pieces)
        rows, lower, size, spans = rows[box], lower[box], size[box], spans[box]
        at = first[box]
        for axis in reversed(range(len(chunk))):  # C order over the chunks of a box
            at[:, axis] += number % spans[:, axis]
            number //= spans[:, axis]
    edge = at * chunk
    begin = np.maximum(lower, edge)
    count = np.minimum(lower + size, edge + chunk) - begin
    grid = table.grids[array]
    numbers = np.ravel_multi_index(tuple(at.T), grid) + table.chunk_base[array]
    # Sort pieces by chunk, and within a chunk from front to back.
    order = np.lexsort((begin[:, 0], numbers))
    numbers = numbers[order]
    head = np.flatnonzero(np.diff(numbers, prepend=-1))
    cut = (
        np.append(head, len(numbers)),
        rows[order],
        (begin - edge)[order],
        count[order],
        (begin - lower)[order],
    )
    return numbers[head], cut


def needed_chunks(table: BoxTable, rows: BoxIndex) -> np.ndarray:
    """int64, ascending. Global numbers of the chunks that any row needs."""
    found = np.zeros(int(table.chunk_base[-1]), bool)
    for begin in range(0, len(rows), _ROWS):
        found[plan_boxes(table, rows, np.arange(begin, min(begin + _ROWS, len(rows)))).chunks] = True
    return np.flatnonzero(found)
