"""Looking rows up in a compact index, in compiled code without the GIL."""

from __future__ import annotations

import numba
import numpy as np

_SHIFT = 6  # 64 rows per block

_jit = numba.njit(nogil=True, cache=True, boundscheck=False)


@_jit
def look_up(rows, run_first, run_source, run_start, block_run, block_start, lengths, gaps):
    """Source, first element and length of each of `rows`; see :class:`~hbx_gpu._plan.index.CompactIndex`."""
    source = np.empty(len(rows), np.int32)
    start = np.empty(len(rows), np.int64)
    length = np.empty(len(rows), np.int32)
    with_gaps = len(gaps) > 0
    before, element, run = np.int64(-1), np.int64(0), np.int64(0)
    for k in range(len(rows)):
        row = np.int64(rows[k])
        block = row >> _SHIFT
        if row < before or block != before >> _SHIFT or before < 0:
            before, run, element = block << _SHIFT, np.int64(block_run[block]), block_start[block]
        if run_first[run + 1] <= row:
            while run_first[run + 1] <= row:
                run += 1
            before, element = run_first[run], run_start[run]
        for i in range(np.uint64(before), np.uint64(row)):  # two plain sums, which are vectorized
            element += np.int64(lengths[i])
        if with_gaps:
            for i in range(np.uint64(before + 1), np.uint64(row + 1)):
                element += np.int64(gaps[i])
        before = row
        source[k], start[k], length[k] = run_source[run], element, lengths[row]
    return source, start, length
