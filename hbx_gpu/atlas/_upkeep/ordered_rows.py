"""Writing a sparse group anew with the elements of each row in the order of the registry.

Index and layers are read side by side, a window of whole rows at a time; one permutation per window orders
all of them. Rows, shapes and local columns stay what they are.
"""

from __future__ import annotations

import shutil
import uuid
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np

from hbx_gpu._engine.host.canonical import sorting_order
from hbx_gpu._source import ArrayLayout
from hbx_gpu._storage.metadata import read_layout
from hbx_gpu.atlas._upkeep.row_orders import Rows
from hbx_gpu.atlas._upkeep.stored_arrays import decoded_chunks, write_metadata
from hbx_gpu.atlas._writing.arrays import ObjectWriter
from hbx_gpu.atlas._writing.recoding import StoredArray
from hbx_gpu.errors import CorruptChunkError

_WINDOW = 1 << 20  # elements that are ordered at a time, unless a single row has more


def in_order(index: StoredArray, rows: Rows, pool: ThreadPoolExecutor) -> bool:
    """Whether the elements of every row lie in the order of the registry already."""
    columns = _Values(index.layout, index.encoder().batch, pool)
    return all(
        (np.diff(rows.rank[_checked(columns.take(end - begin), rows, index.layout)])[inside] >= 0).all()
        for begin, end, inside in _windows_of_pairs(rows, index.layout.shape[0])
    )


def write_ordered(
    arrays: Sequence[StoredArray],
    new: Path,
    rows: Rows,
    pool: ThreadPoolExecutor,
    tick: Callable[[int], object],
) -> None:
    """Write all arrays of a group, of which the first is its index, below the folder `new`."""
    # Each order has metadata of its own, so that readers which have opened some of the old files notice.
    about = {"row_order": rows.order, "edition": uuid.uuid4().hex[:16]}
    writers = [_ArrayWriter(array, new / array.relative) for array in arrays]
    try:
        for values, order in _ordered([array.layout for array in arrays], arrays, rows, pool):
            for writer, part in zip(writers, values, strict=True):
                writer.append(part[order])
                tick(len(order))
        for writer in writers:
            writer.close()
    finally:
        for writer in writers:
            writer.abort()
    for array, writer in zip(arrays, writers, strict=True):
        path, target = Path(array.layout.path), new / array.relative
        write_metadata(path / "zarr.json", target / "zarr.json", array.layout, writer.codecs, about)
        shutil.copymode(path, target)
        for file in (target / "c").iterdir():
            shutil.copymode(path / "zarr.json", file)


def compare_ordered(
    arrays: Sequence[StoredArray],
    new: Path,
    rows: Rows,
    pool: ThreadPoolExecutor,
    tick: Callable[[int], object],
) -> None:
    """Read both groups back: the new one has the elements of each row of the old one, in ascending order.

    Raises
    ------
    CorruptChunkError
        It has not.
    """
    layouts = [read_layout(new / array.relative, array.layout.name) for array in arrays]
    streams = [_Values(layout, a.encoder().batch, pool) for layout, a in zip(layouts, arrays, strict=True)]
    at = 0
    for before, order in _ordered([array.layout for array in arrays], arrays, rows, pool):
        edges, is_row = _segments(rows, at, at + len(order))
        row_of = np.repeat(np.arange(len(is_row)), np.diff(edges))
        after = [stream.take(len(order)) for stream in streams]
        same = all(
            np.array_equal(a[order].view(np.uint8), b.view(np.uint8))
            for a, b in zip(before, after, strict=True)
        )
        moved_within_rows = np.array_equal(row_of[order], row_of)
        each_once = (np.bincount(order, minlength=len(order)) == 1).all()
        rank = rows.rank[_checked(after[0], rows, layouts[0])]
        inside = (row_of[1:] == row_of[:-1]) & is_row[row_of[1:]]
        if not (same and moved_within_rows and each_once and (np.diff(rank)[inside] >= 0).all()):
            raise CorruptChunkError(
                f"ordered, elements {at} to {at + len(order)} are others than before; the group was left as "
                "it was",
                array=arrays[0].layout.name,
            )
        at += len(order)
        tick(len(arrays) * len(order))


def _ordered(
    layouts: Sequence[ArrayLayout], arrays: Sequence[StoredArray], rows: Rows, pool: ThreadPoolExecutor
) -> Iterator[tuple[list[np.ndarray], np.ndarray]]:
    """Windows of the values of all arrays as stored, and where each element comes from once ordered."""
    streams = [_Values(layout, a.encoder().batch, pool) for layout, a in zip(layouts, arrays, strict=True)]
    n = layouts[0].shape[0]
    for begin, end in _windows(rows, n):
        values = [stream.take(end - begin) for stream in streams]
        edges, is_row = _segments(rows, begin, end)
        columns = rows.rank[_checked(values[0], rows, layouts[0])]
        yield values, sorting_order(edges - begin, columns, len(rows.rank), is_row)


def _windows(rows: Rows, n: int) -> Iterator[tuple[int, int]]:
    """Consecutive stretches of elements that cut no row, up to element `n`."""
    at = 0
    while at < n:
        end = min(at + _WINDOW, n)
        # The row that `end` would cut, if there is one, comes with the next window unless it begins this one.
        row = int(np.searchsorted(rows.starts, end)) - 1
        if row >= 0 and rows.ends[row] > end:
            end = int(rows.starts[row]) if rows.starts[row] > at else int(rows.ends[row])
        yield at, end
        at = end


def _segments(rows: Rows, begin: int, end: int) -> tuple[np.ndarray, np.ndarray]:
    """Rows of a window, and the stretches between them that belong to no row.

    Returns
    -------
    edges
        int64, (n + 1,), from `begin` to `end`.
    is_row
        bool, (n,).
    """
    some = slice(np.searchsorted(rows.starts, begin), np.searchsorted(rows.starts, end))
    starts = rows.starts[some]
    edges = np.unique(np.concatenate([[begin, end], starts, rows.ends[some]]))
    return edges, np.isin(edges[:-1], starts, assume_unique=True)


def _windows_of_pairs(rows: Rows, n: int) -> Iterator[tuple[int, int, np.ndarray]]:
    """Windows, and for each pair of neighboring elements whether both are of one row."""
    for begin, end in _windows(rows, n):
        edges, is_row = _segments(rows, begin, end)
        inside = np.repeat(is_row, np.diff(edges))[1:]
        inside[edges[1:-1] - begin - 1] = False
        yield begin, end, inside


def _checked(columns: np.ndarray, rows: Rows, layout: ArrayLayout) -> np.ndarray:
    if len(columns) and not 0 <= int(columns.min()) <= int(columns.max()) < len(rows.rank):
        raise CorruptChunkError(
            f"a column number is not below the {len(rows.rank)} features of the group's layout",
            array=layout.name,
        )
    return columns


class _Values:
    """The values of an array from the first to the last, taken as many at a time as a window needs."""

    def __init__(self, layout: ArrayLayout, batch: int, pool: ThreadPoolExecutor) -> None:
        self._chunks = self._each(layout, batch, pool)
        self._left = np.empty(0, layout.dtype)

    @staticmethod
    def _each(layout: ArrayLayout, batch: int, pool: ThreadPoolExecutor) -> Iterator[np.ndarray]:
        absent = np.full(layout.chunk_shape, layout.fill_value, layout.dtype)
        for chunks in decoded_chunks(layout, batch, pool):
            yield from (absent if chunk is None else chunk for chunk in chunks)

    def take(self, n: int) -> np.ndarray:
        """The next `n` values, as a new array or a view."""
        parts = [self._left]
        there = len(self._left)
        while there < n:
            parts.append(next(self._chunks))
            there += len(parts[-1])
        values = np.concatenate(parts) if len(parts) > 1 else parts[0]
        self._left = values[n:]
        return values[:n]


class _ArrayWriter:
    """An array of the shape, chunks and shards of another one, written front to back."""

    def __init__(self, array: StoredArray, target: Path) -> None:
        layout = array.layout
        self._chunk = layout.chunk_shape[0]
        self._encoder = array.encoder()
        self.codecs = self._encoder.codecs
        self._buffer = np.empty(self._encoder.batch * self._chunk, layout.dtype)
        self._filled = 0
        self._fill_value = layout.fill_value
        per_shard = layout.shard_shape[0] // self._chunk if layout.sharded else 0
        self._objects = ObjectWriter(target, per_shard)

    def append(self, values: np.ndarray) -> None:
        at = 0
        while at < len(values):
            n = min(len(values) - at, len(self._buffer) - self._filled)
            self._buffer[self._filled : self._filled + n] = values[at : at + n]
            self._filled, at = self._filled + n, at + n
            if self._filled == len(self._buffer):
                self._flush()

    def close(self) -> None:
        """Write the last chunks; the fill value follows the last element."""
        if self._filled:
            self._flush()
        self._objects.close()

    def abort(self) -> None:
        self._objects.abort()

    def _flush(self) -> None:
        whole = -(-self._filled // self._chunk) * self._chunk
        self._buffer[self._filled : whole] = self._fill_value
        for encoded in self._encoder.encode(self._buffer[:whole]):
            self._objects.put(encoded)
        self._filled = 0
