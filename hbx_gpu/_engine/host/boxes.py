"""The host engine for arrays of several axes: plan and bytes in, rows, tiles and boxes out.

One call uses one thread; decompressors and copies release the GIL. A chunk is decoded once per plan, and kept
while there is room: dense spaces are small, and a random batch touches most of their chunks. Of a chunk that
is stored as it is only what pieces need is touched.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from itertools import pairwise

import numpy as np

from hbx_gpu._buffers import BufferPool
from hbx_gpu._codecs.chain import ChunkCodec
from hbx_gpu._engine.host.decoded import DecodedChunks, decoded_nbytes, default_budget
from hbx_gpu._plan.boxes import ArrayPieces, BoxPlan, BoxTable, full_boxes
from hbx_gpu._storage.chunks import ChunkDirectory
from hbx_gpu._storage.readers import Slab


class BoxEngine:
    """Decode chunks and copy boxes out of them.

    Parameters
    ----------
    table
        The dataset's arrays.
    directory
        Their chunks; its arrays are numbered as in `table`.
    dtypes
        Output dtype of each layer.
    pool
        Where the memory of outputs comes from; None: fresh memory.
    keep
        Bytes of decoded chunks that are kept for later plans; None for as many as are of use and memory
        allows (`default_budget`).
    """

    def __init__(
        self,
        table: BoxTable,
        directory: ChunkDirectory,
        dtypes: Sequence[np.dtype],
        pool: BufferPool | None = None,
        *,
        keep: int | None = None,
    ) -> None:
        self.table, self.directory, self.dtypes = table, directory, list(dtypes)
        self._empty = pool.empty if pool else np.empty
        self._codecs = ChunkCodec.several(directory.layouts)
        pairs = zip(directory.layouts, self._codecs, strict=True)
        decoded = [decoded_nbytes(layout) for layout, codec in pairs if codec.tail or not codec.is_raw]
        self._kept = DecodedChunks(default_budget(sum(decoded)) if keep is None else keep)

    def matrix(
        self, plan: BoxPlan, slab: Slab, n_features: int, remaps: Sequence[np.ndarray]
    ) -> list[np.ndarray]:
        """Rows of dense feature matrices, their columns put in place.

        Parameters
        ----------
        plan, slab
            Boxes of one row each, and the chunks they need.
        n_features
            Width of the output.
        remaps
            Remap of each Source: int32, local column -> output column, -1 = drop.

        Returns
        -------
        list of ndarray
            (n_rows, n_features) per layer; 0 where a row's Source does not have the column.

        Raises
        ------
        CorruptChunkError
            A chunk does not decode.
        """
        outputs = [self._zeros((len(plan), n_features), dtype) for dtype in self.dtypes]
        for part in plan.parts:
            source, layer = divmod(part.array, self.table.n_layers)
            out, remap = outputs[layer], remaps[source]
            identity = len(remap) == n_features and bool((remap == np.arange(n_features)).all())
            if identity and _are_rows(part, (n_features,)):
                self._copy_rows(plan, slab, part, out)
                continue
            for chunk, pieces in self._decoded(plan, slab, part):
                rows = part.row[pieces]
                position = part.begin[pieces, 0]
                # Chunks are cut into columns at the same places for every row.
                column = int(part.out[pieces.start, 1])
                local = remap[column : column + int(part.count[pieces.start, 1])]
                kept = np.flatnonzero(local >= 0)
                out[rows[:, None], local[kept]] = chunk[position[:, None], kept]
        return outputs

    def tiles(self, plan: BoxPlan, slab: Slab, shape: tuple[int, ...]) -> list[np.ndarray]:
        """Boxes that all have one shape.

        Returns
        -------
        list of ndarray
            (n_rows, *shape) per layer; zeros for rows without the modality.

        Raises
        ------
        CorruptChunkError
            A chunk does not decode.
        """
        outputs = [self._empty((len(plan), *shape), dtype) for dtype in self.dtypes]
        for out in outputs:
            out[plan.source < 0] = 0
        self._copy(plan, slab, outputs)
        return outputs

    def boxes(
        self, plan: BoxPlan, slab: Slab, *, positions: bool, native: Sequence[bool]
    ) -> list[list[np.ndarray]]:
        """Boxes of any shape.

        Parameters
        ----------
        plan, slab
            Boxes, and the chunks they need.
        positions
            Whether boxes are single positions on the first axis, which is then left out.
        native
            Whether the arrays of each layer keep the dtype that they are stored in; otherwise all have the
            engine's dtype.

        Returns
        -------
        list of list of ndarray
            For each layer one array per row. The arrays are views of one allocation per Source; they have no
            elements where a row lacks the modality.

        Raises
        ------
        CorruptChunkError
            A chunk does not decode.
        """
        outputs = []
        for layer, dtype in enumerate(self.dtypes):
            arrays = [np.empty(0, dtype)] * len(plan)
            for source in np.unique(plan.source[plan.source >= 0]).tolist():
                layout = self.table.layouts[source * self.table.n_layers + layer]
                mine = np.flatnonzero(plan.source == source)
                size = plan.size[mine]
                counts = full_boxes(layout.shape, np.zeros_like(size), size)[1]
                ends = np.cumsum(counts.prod(axis=1))
                flat = self._empty(int(ends[-1]), layout.dtype if native[layer] else dtype)
                for row, end, count in zip(mine.tolist(), ends.tolist(), counts.tolist(), strict=True):
                    box = flat[end - math.prod(count) : end]
                    arrays[row] = box.reshape(count[1:] if positions else count)
            outputs.append(arrays)
        self._copy(plan, slab, outputs)
        return outputs

    def _copy(self, plan: BoxPlan, slab: Slab, outputs: Sequence[np.ndarray | list[np.ndarray]]) -> None:
        """Copy from chunks to the rows that have an output array."""
        for part in plan.parts:
            out = outputs[part.array % self.table.n_layers]
            if isinstance(out, np.ndarray) and _are_rows(part, out.shape[1:]):
                self._copy_rows(plan, slab, part, out)
                continue
            for chunk, pieces in self._decoded(plan, slab, part):
                for p in range(pieces.start, pieces.stop):
                    begin, count, place = part.begin[p], part.count[p], part.out[p]
                    target = out[part.row[p]]
                    # A dataset of single positions leaves their axis out.
                    lead = len(count) - target.ndim
                    piece = chunk[_slices(begin, count)].reshape(tuple(count[lead:]))
                    target[_slices(place[lead:], count[lead:])] = piece

    def _copy_rows(self, plan: BoxPlan, slab: Slab, part: ArrayPieces, out: np.ndarray) -> None:
        """Copy from chunks whose pieces are whole rows."""
        row, position = part.row, part.begin[:, 0]
        for chunk, pieces in self._decoded(plan, slab, part):
            if pieces.stop - pieces.start == 1:  # most of them, in small batches
                out[row[pieces.start]] = chunk[position[pieces.start]]
            else:
                out[row[pieces]] = chunk[position[pieces]]

    def _decoded(self, plan: BoxPlan, slab: Slab, part: ArrayPieces) -> Iterator[tuple[np.ndarray, slice]]:
        """Yield (elements, pieces) of the chunks of one array, one chunk at a time."""
        layout, codec = self.table.layouts[part.array], self._codecs[part.array]
        places = slice(part.first_chunk, part.first_chunk + len(part.piece_ptr) - 1)
        numbers, there = plan.chunks[places].tolist(), (slab.address[places] != 0).tolist()
        cuts = pairwise(part.piece_ptr.tolist())
        for c, (number, is_there, cut) in enumerate(zip(numbers, there, cuts, strict=True), places.start):
            pieces = slice(*cut)
            if not is_there:
                yield np.broadcast_to(np.array(layout.fill_value, layout.dtype), layout.chunk_shape), pieces
                continue
            chunk = self._kept.get(number)
            if chunk is None:
                try:
                    chunk = codec.decode(slab.view(c), self.directory.skipped_filters(number)).reshape(
                        layout.chunk_shape
                    )
                except ValueError as error:
                    raise self.directory.error(number, error) from error
                if (
                    codec.tail
                ):  # such a chunk aliases the file; keeping it avoids verifying its checksum again
                    chunk = chunk.copy()
                if codec.tail or not codec.is_raw:
                    self._kept.add(number, chunk)
            yield chunk, pieces

    def _zeros(self, shape: tuple[int, ...], dtype: np.dtype) -> np.ndarray:
        out = self._empty(shape, dtype)
        out[...] = 0
        return out


def _are_rows(part: ArrayPieces, shape: tuple[int, ...]) -> bool:
    """Return whether each piece is a whole row of this shape, at one position on the first axis."""
    whole = (1, *shape)
    return part.count.shape[1] == len(whole) and bool((part.count == whole).all())


def _slices(begin: np.ndarray, count: np.ndarray) -> tuple[slice, ...]:
    return tuple(slice(b, b + c) for b, c in zip(begin.tolist(), count.tolist(), strict=True))
