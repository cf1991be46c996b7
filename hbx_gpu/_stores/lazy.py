"""Stored arrays that are read stretch by stretch, as ingest and conversion read them."""

from __future__ import annotations

import math
from itertools import product
from typing import TYPE_CHECKING

import numpy as np

from hbx_gpu._codecs.chain import ChunkCodec
from hbx_gpu._h5ad.matrix import CscMatrix, CsrMatrix, DenseMatrix, Matrix
from hbx_gpu._source import ArrayLayout
from hbx_gpu._storage import ChunkDirectory, open_reader
from hbx_gpu._storage.chunks import chunk_grid

if TYPE_CHECKING:
    from hbx_gpu._stores.matrix import StoredMatrix


class StoredArray:
    """An array on disk that can be sliced along its first axis, like a dataset of h5py.

    Parameters
    ----------
    layout
        Where and how it is stored.

    Attributes
    ----------
    shape, dtype, chunks
        Shape, type of the elements in native byte order, and shape of the chunks.
    """

    def __init__(self, layout: ArrayLayout) -> None:
        self.shape, self.dtype, self.chunks = layout.shape, layout.dtype, layout.chunk_shape
        self._layout, self._codec = layout, ChunkCodec(layout)
        self._directory = ChunkDirectory([layout])
        self._reader = open_reader("preadv", self._directory)
        self._last: tuple[int, np.ndarray] | None = None

    def __getitem__(self, wanted: slice) -> np.ndarray:
        """The elements `wanted` of the first axis, all of the others; steps are not allowed.

        Raises
        ------
        CorruptChunkError
            A chunk is missing or does not decode.
        """
        begin, end, step = wanted.indices(self.shape[0])
        if step != 1:
            raise ValueError(f"arrays on disk are read in stretches, without steps; got a step of {step}")
        out = np.empty((max(end - begin, 0), *self.shape[1:]), self.dtype)
        if not out.size:
            return out
        grid = chunk_grid(self._layout)
        first, last = begin // self.chunks[0], (end - 1) // self.chunks[0] + 1
        per_line = math.prod(grid[1:])
        numbers = np.arange(first * per_line, last * per_line)
        slab = self._reader.read(self._directory.extents(numbers))
        for i, where in enumerate(product(range(first, last), *map(range, grid[1:]))):
            low = [w * c for w, c in zip(where, self.chunks, strict=True)]
            high = [min(a + c, n) for a, c, n in zip(low, self.chunks, self.shape, strict=True)]
            rows = slice(max(low[0], begin), min(high[0], end))
            target = out[(slice(rows.start - begin, rows.stop - begin), *map(slice, low[1:], high[1:]))]
            if slab.address[i] == 0:
                target[...] = self._layout.fill_value
                continue
            chunk = self._decoded(int(numbers[i]), slab.view(i))
            inner = [slice(0, b - a) for a, b in zip(low[1:], high[1:], strict=True)]
            target[...] = chunk[(slice(rows.start - low[0], rows.stop - low[0]), *inner)]
        return out

    def _decoded(self, number: int, raw: np.ndarray) -> np.ndarray:
        """A chunk; the last one is kept, because stretches seldom end where chunks do."""
        if self._last is not None and self._last[0] == number:
            return self._last[1]
        try:
            chunk = self._codec.decode(raw, self._directory.skipped_filters(number))
        except ValueError as error:
            raise self._directory.error(number, error) from error
        self._last = number, chunk
        return chunk


def as_stream(matrix: StoredMatrix) -> Matrix:
    """A stored matrix as a stream of row blocks; CSC is transposed through temporary files."""
    values = StoredArray(matrix.values)
    if matrix.index is None or matrix.indptr is None:
        return DenseMatrix(matrix.name, matrix.shape, values)
    kind = CsrMatrix if matrix.form == "csr" else CscMatrix
    return kind(matrix.name, matrix.shape, matrix.pointers(), StoredArray(matrix.index), values)
