"""The reference engine in NumPy, which every other engine must equal. It is kept simple, not fast."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import numpy as np

from hbx_gpu._codecs.chain import ChunkCodec
from hbx_gpu._plan.rows import INDEX_ROLE, BatchPlan, SourceTable
from hbx_gpu._storage.chunks import ChunkDirectory
from hbx_gpu._storage.readers import Slab
from hbx_gpu.errors import CorruptChunkError


class ReferenceEngine:
    """Decode every chunk whole with the NumPy codecs and copy piece by piece."""

    def __init__(self, table: SourceTable, directory: ChunkDirectory, dtypes: Sequence[np.dtype]) -> None:
        self.table, self.directory, self.dtypes = table, directory, list(dtypes)

    def csr(self, plan: BatchPlan, slab: Slab) -> tuple[np.ndarray, list[np.ndarray], np.ndarray]:
        """Rows of `plan` as ``(indices int32, one values array per layer, offsets int64)``."""
        table = self.table
        outputs = [np.zeros(plan.n_elements, dtype=np.int32)]
        outputs += [np.zeros(plan.n_elements, dtype=dtype) for dtype in self.dtypes]
        for c, array in enumerate(plan.chunk_array):
            layout = self.directory.layouts[array]
            source, role = divmod(int(array), table.n_roles)
            if slab.address[c] == 0:
                decoded = np.full(layout.chunk_shape, layout.fill_value, dtype=layout.dtype)
            else:
                try:
                    decoded = ChunkCodec(layout).decode(
                        slab.view(c), self.directory.skipped_filters(int(plan.chunks[c]))
                    )
                except CorruptChunkError as error:
                    raise self.directory.error(int(plan.chunks[c]), error.reason) from error
            for p in range(plan.piece_ptr[c], plan.piece_ptr[c + 1]):
                skip, count, out = plan.piece_skip[p], plan.piece_count[p], plan.piece_out[p]
                part = decoded[skip : skip + count]
                if role == INDEX_ROLE:
                    first, m = table.remap_start[source], table.remap_length[source]
                    if part.min(initial=0) < 0 or part.max(initial=0) >= m:
                        raise self.directory.error(
                            int(plan.chunks[c]), f"a column number is outside [0, {m})"
                        )
                    if slab.address[c] == 0 and count > 1 and not table.repeats[source]:
                        raise self.directory.error(int(plan.chunks[c]), "the object is missing")
                    part = table.remap[first : first + m][part.astype(np.int64)]
                outputs[role][out : out + count] = part
        indices, values = outputs[0], outputs[1:]
        keep = indices >= 0
        offsets = np.concatenate([[0], np.cumsum(keep)]).astype(np.int64)[plan.offsets]
        return indices[keep], [v[keep] for v in values], offsets

    def canonical(self, plan: BatchPlan, slab: Slab) -> tuple[np.ndarray, list[np.ndarray], np.ndarray]:
        """Rows as sparse tensors want them; see :meth:`HostEngine.canonical`."""
        indices, layers, offsets = self.csr(plan, slab)
        columns = [np.unique(indices[a:b]) for a, b in pairwise(offsets)]
        ends = np.cumsum([0, *map(len, columns)], dtype=np.int64)
        sums = [np.zeros(ends[-1], np.float32) for _ in layers]
        for row, (a, b) in enumerate(pairwise(offsets)):
            place = ends[row] + np.searchsorted(columns[row], indices[a:b])
            for total, values in zip(sums, layers, strict=True):
                np.add.at(total, place, values[a:b].astype(np.float32))
        return np.concatenate([*columns, np.empty(0)]).astype(np.int64), sums, ends
