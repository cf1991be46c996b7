"""The host engine: plan and bytes in, CSR or dense rows in ordinary memory out.

One call uses one thread and holds the GIL only between kernels, so that several batches decode side
by side on the loader's threads.
"""

from __future__ import annotations

import itertools
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from hbx_gpu._buffers import BufferPool
from hbx_gpu._codecs import bitpacking_numba, rowpack_numba
from hbx_gpu._codecs.blosc_blocks import BloscBlocks
from hbx_gpu._codecs.chain import ChunkCodec
from hbx_gpu._codecs.containers import compression_of
from hbx_gpu._codecs.rowpack_format import BLOCK
from hbx_gpu._engine.host import canonical, kernels
from hbx_gpu._engine.host.canonical import as_float32
from hbx_gpu._engine.host.decoded import DecodedChunks, decoded_nbytes, default_budget
from hbx_gpu._engine.verify import ChunkChecks
from hbx_gpu._plan.rows import INDEX_ROLE, BatchPlan, SourceTable
from hbx_gpu._source import ArrayLayout
from hbx_gpu._storage.chunks import ChunkDirectory
from hbx_gpu._storage.readers import Slab
from hbx_gpu.errors import CorruptChunkError
from hbx_gpu.loader_stats import stage

RAW = "raw"
# Codec -> kernels that decode index chunks and value chunks, and the function that explains their status.
_KERNELS: dict[str, tuple[Callable[..., None], Callable[..., None], Callable[[int], str]]] = {
    "bitpacking": (
        kernels.bitpacked_columns,
        kernels.bitpacked_values,
        bitpacking_numba.describe_status,
    ),
    "rowpack": (kernels.rowpack_columns, kernels.rowpack_values, rowpack_numba.describe_status),
}


class _Scratch(threading.local):
    """Memory of the calling thread."""

    buffer: np.ndarray | None = None


@dataclass(frozen=True, slots=True)
class _Kind:
    """The properties that arrays of one kernel call share; codec "" means that no kernel decodes them.

    Chunks that are stored as they are (`RAW`) may differ in their number of elements.
    """

    role: int
    dtype: np.dtype
    codec: str
    word_size: int
    elements: int


def _kind(role: int, layout: ArrayLayout, codec: ChunkCodec, out: np.dtype) -> _Kind:
    elements, dtype = layout.chunk_shape[0], layout.dtype
    # numba can copy float16 as bit patterns and do nothing else with it.
    half = np.float16 in (dtype, out)
    if codec.is_raw and dtype.kind in "iuf" and (dtype == out or not half):
        return _Kind(role, dtype, RAW, dtype.itemsize, 0)
    if half:
        return _Kind(role, dtype, "", 0, elements)
    if codec.rowpack == dtype.itemsize and dtype.kind == "u":
        return _Kind(role, dtype, "rowpack", codec.rowpack, elements)
    if codec.bitpacking and elements * dtype.itemsize % codec.bitpacking == 0:
        return _Kind(role, dtype, "bitpacking", codec.bitpacking, elements)
    return _Kind(role, dtype, "", 0, elements)


class HostEngine:
    """Decode and gather with numba.

    Parameters
    ----------
    table
        Vectors of the dataset's Sources.
    directory
        Their chunks; its arrays are numbered as in `table`.
    dtypes
        Output dtype of each layer.
    pool
        Pool that the memory of outputs comes from; None for fresh memory.
    keep
        Bytes of decoded chunks of general codecs (blosc, zstd, gzip, ...) that are kept for later batches;
        None for as many as are of use and memory allows (`default_budget`).
    """

    def __init__(
        self,
        table: SourceTable,
        directory: ChunkDirectory,
        dtypes: Sequence[np.dtype],
        pool: BufferPool | None = None,
        *,
        keep: int | None = None,
    ) -> None:
        self.table, self.directory, self.dtypes = table, directory, list(dtypes)
        self._empty = pool.empty if pool else np.empty
        self._codecs = ChunkCodec.several(directory.layouts)
        compressions = [compression_of(layout) for layout in directory.layouts]
        self._in_blocks = [found is not None and found.container == "blosc" for found in compressions]
        # Arrays of one kind share a kernel call.
        kinds: dict[_Kind, int] = {}
        kind_of = [
            kinds.setdefault(_kind(role, layout, codec, out), len(kinds))
            for (role, out), layout, codec in zip(
                itertools.cycle(enumerate([np.dtype(np.int32), *self.dtypes])),
                directory.layouts,
                self._codecs,
                strict=False,
            )
        ]
        self._kind_of = np.array(kind_of, dtype=np.int64)
        self._kinds = list(kinds)
        general = [not self._kinds[k].codec for k in kind_of]
        needed = sum(
            decoded_nbytes(la)
            for la, is_general in zip(directory.layouts, general, strict=True)
            if is_general
        )
        self._kept = DecodedChunks(default_budget(needed) if keep is None else keep)
        taken = [one.codec in (RAW, "bitpacking") for one in self._kinds]
        tails = [co.tail if taken[k] else 0 for co, k in zip(self._codecs, kind_of, strict=True)]
        self._checks = ChunkChecks(table, directory, tails)
        self._scratch = _Scratch()

    def csr(self, plan: BatchPlan, slab: Slab) -> tuple[np.ndarray, list[np.ndarray], np.ndarray]:
        """Rows of `plan` in CSR form, columns in stored order.

        Parameters
        ----------
        plan, slab
            What to decode, and the stored bytes of its chunks.

        Returns
        -------
        indices
            int32, (nnz,). Output columns in stored order.
        values
            One array (nnz,) per layer, of the engine's dtypes.
        offsets
            int64, (n_rows + 1,).

        Raises
        ------
        CorruptChunkError
            A chunk does not decode, or holds a column number its Source does not have.
        """
        indices, values = self._outputs(plan, np.int32)
        self._decode(plan, slab, [indices, *values], np.zeros(0, np.uint8))
        if not self.table.drops:
            return indices, values, plan.offsets
        offsets, indices, values = canonical.drop_columns(plan.offsets, indices, values)
        return indices, values, offsets

    def canonical(self, plan: BatchPlan, slab: Slab) -> tuple[np.ndarray, list[np.ndarray], np.ndarray]:
        """Return the rows of `plan` in canonical form, which sparse tensors need; see also :meth:`csr`.

        Returns
        -------
        indices
            int64, (nnz,). Output columns, ascending and each once within a row.
        values
            One float32 array (nnz,) per layer. Values of repeated columns are summed in stored order.
        offsets
            int64, (n_rows + 1,).
        """
        indices, values = self._outputs(plan, np.int64)
        # Pieces whose columns do not ascend are marked while they are in cache. Dropped columns, which are -1
        # then, make the marks meaningless, so all rows of a panel are looked at again.
        unsorted = np.zeros(len(plan.piece_row), np.uint8)
        self._decode(plan, slab, [indices, *values], unsorted)
        offsets, unsorted_rows = plan.offsets, np.full(plan.n_rows, self.table.drops)
        if self.table.drops:
            offsets, indices, values = canonical.drop_columns(offsets, indices, values)
        else:
            kernels.mark_unsorted_rows(
                plan.piece_row, plan.piece_out, offsets, indices, unsorted, unsorted_rows
            )
        values = [as_float32(layer, self._empty) for layer in values]
        if unsorted_rows.any():
            with stage("sort"):
                offsets, indices, values = canonical.sort_rows(
                    offsets, indices, values, self.table.n_features, unsorted_rows
                )
        return indices, values, offsets

    def _outputs(
        self, plan: BatchPlan, columns: type[np.signedinteger]
    ) -> tuple[np.ndarray, list[np.ndarray]]:
        n = plan.n_elements
        return self._empty(n, columns), [self._empty(n, dtype) for dtype in self.dtypes]

    def _decode(self, plan: BatchPlan, slab: Slab, outputs: list[np.ndarray], unsorted: np.ndarray) -> None:
        """Decode all elements to `outputs`, with column -1 where the remap drops one.

        `unsorted`, unless it is empty, is set to 1 for pieces whose columns do not ascend.
        """
        slab = self._checks.without_tails(plan, slab)
        kind = self._kind_of[plan.chunk_array]
        if not slab.address.all():
            absent = slab.address == 0
            self._fill_absent(plan, np.flatnonzero(absent), outputs, unsorted)
            kind[absent] = -1
        for k, one in enumerate(self._kinds):
            jobs = (kind == k).nonzero()[0]
            if not len(jobs):
                continue
            if one.codec == RAW:
                self._raw(plan, slab, jobs, one, outputs[one.role], unsorted)
            elif one.codec:
                self._packed(plan, slab, jobs, one, outputs[one.role], unsorted)
            else:
                self._general(plan, slab, jobs, one.role, outputs[one.role], unsorted)

    def _packed(
        self,
        plan: BatchPlan,
        slab: Slab,
        jobs: np.ndarray,
        kind: _Kind,
        out: np.ndarray,
        unsorted: np.ndarray,
    ) -> None:
        """Decode and copy all chunks that a kernel can decode, in one call."""
        word = np.dtype(np.uint64 if kind.word_size == 8 else np.uint32)
        columns, values, describe = _KERNELS[kind.codec]
        buffers: tuple[object, ...]
        if kind.codec == "rowpack":
            self._checks.rowpack_checksums(plan, slab, jobs)
            # One value per word, whatever the array's dtype; whole words of values go straight out.
            scratch = self._scratch_bytes((BLOCK + kind.elements) * word.itemsize).view(word)
            edge, words = scratch[:BLOCK], scratch[BLOCK:]
            buffers = (kind.word_size, kind.elements, words, edge)
            if kind.role != INDEX_ROLE:
                direct = out.dtype == word
                buffers = (kind.word_size, kind.elements, out if direct else words, edge, direct)
        else:
            scratch = self._scratch_bytes(kind.elements * kind.dtype.itemsize)
            buffers = (kind.word_size, scratch.view(word), scratch.view(kind.dtype))
        pieces = (plan.piece_ptr, plan.piece_skip, plan.piece_count, plan.piece_out)
        status = np.zeros(len(plan.chunks), dtype=np.int64)
        if kind.role == INDEX_ROLE:
            table = self.table
            source = plan.chunk_array[jobs] // table.n_roles
            remap = (table.remap, table.remap_start, table.remap_length, table.identity)
            columns(jobs, slab.address, slab.nbytes, *buffers, *pieces, source, *remap, out, unsorted, status)
        else:
            values(jobs, slab.address, slab.nbytes, *buffers, *pieces, out, status)
        if status.any():
            c = int(status.nonzero()[0][0])
            raise self._error(plan, c, int(status[c]), describe)

    def _raw(
        self,
        plan: BatchPlan,
        slab: Slab,
        jobs: np.ndarray,
        kind: _Kind,
        out: np.ndarray,
        unsorted: np.ndarray,
    ) -> None:
        """Copy from chunks that are stored without a codec, touching only what the pieces need."""
        self._checks.raw_sizes(plan, slab, jobs)
        like = np.empty(0, kind.dtype)
        if kind.dtype == np.float16:
            like, out = like.view(np.uint16), out.view(np.uint16)
        pieces = (plan.piece_ptr, plan.piece_skip, plan.piece_count, plan.piece_out)
        if kind.role != INDEX_ROLE:
            kernels.raw_values(jobs, slab.address, slab.nbytes, like, *pieces, out)
            return
        table = self.table
        status = np.zeros(len(plan.chunks), dtype=np.int64)
        remap = (table.remap, table.remap_start, table.remap_length, table.identity)
        source = plan.chunk_array[jobs] // table.n_roles
        kernels.raw_columns(
            jobs, slab.address, slab.nbytes, like, *pieces, source, *remap, out, unsorted, status
        )
        if status.any():
            raise self._error(plan, int(np.flatnonzero(status)[0]), kernels.COLUMN_OUT_OF_RANGE)

    def _general(
        self, plan: BatchPlan, slab: Slab, jobs: np.ndarray, role: int, out: np.ndarray, unsorted: np.ndarray
    ) -> None:
        """Decode chunks of any other codec, with one library call each, and copy their pieces."""
        table = self.table
        pieces = (plan.piece_skip, plan.piece_count, plan.piece_out)
        out = out.view(np.uint8) if out.dtype == bool else out
        for c in jobs:
            array = int(plan.chunk_array[c])
            decoded = self._decoded(plan, slab, int(c), array)
            if decoded.dtype == bool:  # numba does not copy them
                decoded = (decoded.view(np.uint8) != 0).view(np.uint8)
            p0, p1 = plan.piece_ptr[c], plan.piece_ptr[c + 1]
            if role == INDEX_ROLE:
                source = array // table.n_roles
                first = table.remap_start[source]
                remap = table.remap[first : first + table.remap_length[source]]
                if not kernels.scatter_columns(
                    decoded, p0, p1, *pieces, remap, table.identity[source], out, unsorted
                ):
                    raise self._error(plan, int(c), kernels.COLUMN_OUT_OF_RANGE)
            elif np.float16 in (decoded.dtype, out.dtype):
                for skip, count, at in zip(*(numbers[p0:p1].tolist() for numbers in pieces), strict=True):
                    out[at : at + count] = decoded[skip : skip + count]
            else:
                kernels.scatter_values(decoded, p0, p1, *pieces, out)

    def _decoded(self, plan: BatchPlan, slab: Slab, c: int, array: int) -> np.ndarray:
        """Return the elements of a chunk: all, or at least those that its pieces need."""
        chunk = int(plan.chunks[c])
        kept = self._kept.get(chunk)
        if kept is not None:
            return kept
        try:
            raw = slab.view(c)
            if self._in_blocks[array]:
                part = self._needed_blocks(plan, raw, c, array)
                if part is not None:
                    return part
            decoded = self._codecs[array].decode(raw, self.directory.skipped_filters(chunk))
        except ValueError as error:
            raise self.directory.error(chunk, error) from error
        decoded = np.ascontiguousarray(decoded)
        self._kept.add(chunk, decoded)
        return decoded

    def _needed_blocks(self, plan: BatchPlan, raw: np.ndarray, c: int, array: int) -> np.ndarray | None:
        """Decode only the blocks of a chunk that its pieces touch; return None where that saves little."""
        layout = self.directory.layouts[array]
        p0, p1 = int(plan.piece_ptr[c]), int(plan.piece_ptr[c + 1])
        skip, count = plan.piece_skip[p0:p1], plan.piece_count[p0:p1]
        size = layout.dtype.itemsize
        nbytes = layout.chunk_shape[0] * size
        if 2 * int(count.sum()) * size > nbytes:
            return None
        if layout.codecs[-1]["name"] == "crc32c":
            raw = self._checks.checked(plan, c, raw)
        blocks = BloscBlocks(raw, nbytes)
        n = blocks.n_blocks + 1
        begun = np.bincount(skip * size // blocks.block, minlength=n)
        ended = np.bincount(((skip + count) * size - 1) // blocks.block + 1, minlength=n)
        needed = np.cumsum(begun - ended)[:-1] > 0
        if 2 * int(needed.sum()) > blocks.n_blocks:
            return None
        edges = np.flatnonzero(np.diff(needed.astype(np.int8), prepend=0, append=0))
        scratch = self._scratch_bytes(nbytes)
        for first, last in zip(edges[::2].tolist(), edges[1::2].tolist(), strict=True):
            blocks.decode(first, last, scratch)
        return scratch.view(layout.dtype)

    def _fill_absent(
        self, plan: BatchPlan, absent: np.ndarray, outputs: list[np.ndarray], unsorted: np.ndarray
    ) -> None:
        table = self.table
        for c in absent:
            array = int(plan.chunk_array[c])
            source, role = divmod(array, table.n_roles)
            p0, p1 = int(plan.piece_ptr[c]), int(plan.piece_ptr[c + 1])
            value = self._checks.fill_value(plan, int(c))
            if role == INDEX_ROLE:
                value = table.remap[table.remap_start[source] + int(value)]
                unsorted[p0:p1] = plan.piece_count[p0:p1] > 1 if len(unsorted) else 0
            out = outputs[role]
            filling = np.array(value, out.dtype)
            if out.dtype == np.float16:
                out, filling = out.view(np.uint16), filling.view(np.uint16)
            elif out.dtype == bool:
                out, filling = out.view(np.uint8), filling.view(np.uint8)
            kernels.fill_pieces(p0, p1, plan.piece_count, plan.piece_out, filling[()], out)

    def _error(
        self, plan: BatchPlan, c: int, status: int, describe: Callable[[int], str] = str
    ) -> CorruptChunkError:
        if status == kernels.COLUMN_OUT_OF_RANGE:
            return self._checks.column_error(plan, c)
        return self.directory.error(int(plan.chunks[c]), describe(status))

    def _scratch_bytes(self, nbytes: int) -> np.ndarray:
        """Return scratch memory of this thread. It is kept between calls, because fresh pages are slow."""
        buffer = self._scratch.buffer
        if buffer is None or len(buffer) < nbytes:
            # uint64 backing keeps every view aligned.
            buffer = self._scratch.buffer = np.empty(-(-nbytes // 8), dtype=np.uint64).view(np.uint8)
        return buffer[:nbytes]
