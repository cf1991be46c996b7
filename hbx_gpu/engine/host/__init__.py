"""The host engine: plan and bytes in, CSR or dense rows in ordinary memory out.

One call uses one thread and holds the GIL only between kernels, so that several batches decode side
by side on the loader's threads.
"""

from __future__ import annotations

import threading
from collections.abc import Sequence

import numpy as np

from hbx_gpu.codecs.bitpacking_numba import describe_status
from hbx_gpu.codecs.chain import ChunkCodec
from hbx_gpu.engine.host import kernels
from hbx_gpu.plan import INDEX_ROLE, BatchPlan, SourceTable
from hbx_gpu.storage.chunks import ChunkDirectory
from hbx_gpu.storage.readers import Slab

CHUNK_MISSING = "the object is missing, and its fill value would repeat column 0 within a row"


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
    """

    def __init__(self, table: SourceTable, directory: ChunkDirectory, dtypes: Sequence[np.dtype]) -> None:
        self.table, self.directory, self.dtypes = table, directory, list(dtypes)
        self._codecs = [ChunkCodec(layout) for layout in directory.layouts]
        # Arrays of one kind share a kernel call: (role, dtype, word size, chunk elements).
        kinds: dict[tuple[int, np.dtype, int, int], int] = {}
        kind_of = []
        for array, (layout, codec) in enumerate(zip(directory.layouts, self._codecs, strict=True)):
            key = (array % table.n_roles, layout.dtype, codec.bitpacking or 0, layout.chunk_shape[0])
            kind_of.append(kinds.setdefault(key, len(kinds)))
        self._kind_of = np.array(kind_of, dtype=np.int64)
        self._kinds = list(kinds)
        self._scratch = threading.local()

    def csr(self, plan: BatchPlan, slab: Slab) -> tuple[np.ndarray, list[np.ndarray], np.ndarray]:
        """Rows of `plan` in CSR form.

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
        indices = np.empty(plan.n_elements, dtype=np.int32)
        values = [np.empty(plan.n_elements, dtype=dtype) for dtype in self.dtypes]
        outputs = [indices, *values]
        absent = slab.address == 0
        self._fill_absent(plan, np.flatnonzero(absent), outputs)
        kind = self._kind_of[plan.chunk_array]
        for k in np.unique(kind):
            jobs = np.flatnonzero((kind == k) & ~absent)
            if not len(jobs):
                continue
            role, dtype, element_size, elements = self._kinds[k]
            if element_size and (elements * dtype.itemsize) % element_size == 0:
                self._bitpacked(plan, slab, jobs, role, dtype, element_size, elements, outputs[role])
            else:
                self._general(plan, slab, jobs, role, outputs[role])
        if not self.table.drops:
            return indices, values, plan.offsets
        keep = indices >= 0
        kept = np.zeros(len(indices) + 1, dtype=np.int64)
        np.cumsum(keep, out=kept[1:])
        return indices[keep], [v[keep] for v in values], kept[plan.offsets]

    def _bitpacked(
        self,
        plan: BatchPlan,
        slab: Slab,
        jobs: np.ndarray,
        role: int,
        dtype: np.dtype,
        element_size: int,
        elements: int,
        out: np.ndarray,
    ) -> None:
        scratch = self._scratch_bytes(elements * dtype.itemsize)
        words = scratch.view(np.uint64 if element_size == 8 else np.uint32)
        status = np.zeros(len(plan.chunks), dtype=np.int64)
        common = (
            jobs, slab.address, slab.nbytes, element_size, words, scratch.view(dtype),
            plan.piece_ptr, plan.piece_skip, plan.piece_count, plan.piece_out,
        )  # fmt: skip
        table = self.table
        if role == INDEX_ROLE:
            source = plan.chunk_array[jobs] // table.n_roles
            kernels.bitpacked_columns(
                *common, source, table.remap, table.remap_start, table.remap_length, out, status
            )
        else:
            kernels.bitpacked_values(*common, out, status)
        if status.any():
            c = int(np.flatnonzero(status)[0])
            raise self._error(plan, c, int(status[c]))

    def _general(self, plan: BatchPlan, slab: Slab, jobs: np.ndarray, role: int, out: np.ndarray) -> None:
        """Chunks of any other codec: one library call each, then the same hand-out."""
        table = self.table
        pieces = (plan.piece_skip, plan.piece_count, plan.piece_out)
        for c in jobs:
            array = int(plan.chunk_array[c])
            try:
                decoded = self._codecs[array].decode(slab.view(int(c)))
            except ValueError as error:
                raise self.directory.error(
                    int(plan.chunks[c]), getattr(error, "reason", str(error))
                ) from error
            decoded = np.ascontiguousarray(decoded)
            p0, p1 = plan.piece_ptr[c], plan.piece_ptr[c + 1]
            if role == INDEX_ROLE:
                source = array // table.n_roles
                first = table.remap_start[source]
                remap = table.remap[first : first + table.remap_length[source]]
                if not kernels.scatter_columns(decoded, p0, p1, *pieces, remap, out):
                    raise self._error(plan, int(c), kernels.COLUMN_OUT_OF_RANGE)
            else:
                kernels.scatter_values(decoded, p0, p1, *pieces, out)

    def _fill_absent(self, plan: BatchPlan, absent: np.ndarray, outputs: list[np.ndarray]) -> None:
        table = self.table
        for c in absent:
            array = int(plan.chunk_array[c])
            source, role = divmod(array, table.n_roles)
            p0, p1 = int(plan.piece_ptr[c]), int(plan.piece_ptr[c + 1])
            value = self.directory.layouts[array].fill_value
            if role == INDEX_ROLE:
                # Genes occur once per row. Several elements of a row under one fill value mean that
                # the object was lost, not that its writer skipped it.
                if plan.piece_count[p0:p1].max() > 1 and not table.repeats[source]:
                    raise self.directory.error(int(plan.chunks[c]), CHUNK_MISSING)
                if not 0 <= value < table.remap_length[source]:
                    raise self._error(plan, int(c), kernels.COLUMN_OUT_OF_RANGE)
                value = table.remap[table.remap_start[source] + int(value)]
            kernels.fill_pieces(
                p0, p1, plan.piece_count, plan.piece_out, outputs[role].dtype.type(value), outputs[role]
            )

    def _error(self, plan: BatchPlan, c: int, status: int) -> Exception:
        if status == kernels.COLUMN_OUT_OF_RANGE:
            source = int(plan.chunk_array[c]) // self.table.n_roles
            m = int(self.table.remap_length[source])
            reason = f"a column number is outside [0, {m}), the group's features"
        else:
            reason = describe_status(status)
        return self.directory.error(int(plan.chunks[c]), reason)

    def _scratch_bytes(self, nbytes: int) -> np.ndarray:
        """Scratch of this thread, kept between calls: fresh pages cost more than decoding into them."""
        buffer = getattr(self._scratch, "buffer", None)
        if buffer is None or len(buffer) < nbytes:
            # uint64 backing keeps every view aligned.
            buffer = self._scratch.buffer = np.empty(-(-nbytes // 8), dtype=np.uint64).view(np.uint8)
        return buffer[:nbytes]


def densify(
    offsets: np.ndarray,
    indices: np.ndarray,
    values: np.ndarray,
    out: np.ndarray,
) -> np.ndarray:
    """Write CSR rows into `out`, which need not be zeroed; columns that repeat are summed.

    Parameters
    ----------
    offsets, indices, values
        As in :class:`~hbx_gpu.batch.SparseBatch`; indices in ``[0, n_features)``.
    out
        C-contiguous matrix of a float or integer dtype; every element is written.
    """
    kernels.densify(offsets, indices, values, out)
    return out
