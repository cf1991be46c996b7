"""Numba kernels of the host engine: compiled once, cached on disk, run without the GIL.

Each one handles a list of chunks of one kind: decode into scratch, hand out the pieces, go on.
Bounds are checked here for everything that comes from decoded bytes (column numbers); what comes
from the plan was checked when the dataset was made. A chunk that fails sets its status and writes
nothing more.
"""

from __future__ import annotations

import numba
import numpy as np
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

from hbx_gpu.codecs.bitpacking_numba import decode_into

COLUMN_OUT_OF_RANGE = -1
"""Status of a chunk that holds a column number its Source does not have."""

_jit = numba.njit(nogil=True, cache=True, boundscheck=False)


@intrinsic
def _pointer(typingctx, address):  # noqa: ARG001 - numba's signature
    """An integer address as a void pointer, for numba.carray."""

    def codegen(context, builder, signature, args):  # noqa: ARG001
        return builder.inttoptr(args[0], cgutils.voidptr_t)

    return types.voidptr(types.uintp), codegen


@_jit
def _bytes_at(address, nbytes):
    return numba.carray(_pointer(np.uintp(address)), (nbytes,), np.uint8)


@_jit
def scatter_columns(decoded, p0, p1, skip, count, out_at, remap, out):
    """Hand the pieces p0..p1 of one decoded index chunk out, local -> output column.

    Returns False at the first column number outside the remap.
    """
    m = np.uint64(len(remap))
    for p in range(p0, p1):
        at, first = out_at[p], skip[p]
        for k in range(count[p]):
            # A negative column becomes a huge unsigned one: a single comparison catches both.
            column = np.uint64(decoded[first + k])
            if column >= m:
                return False
            out[at + k] = remap[column]
    return True


@_jit
def scatter_values(decoded, p0, p1, skip, count, out_at, out):
    """Hand the pieces p0..p1 of one decoded value chunk out."""
    for p in range(p0, p1):
        at, first = out_at[p], skip[p]
        for k in range(count[p]):
            out[at + k] = decoded[first + k]


@_jit
def _needed_words(skip, count, p0, p1, itemsize, element_size):
    """Range of packed words that hold the elements of pieces p0..p1."""
    low, high = skip[p0], skip[p0] + count[p0]
    for p in range(p0 + 1, p1):
        low = min(low, skip[p])
        high = max(high, skip[p] + count[p])
    return low * itemsize // element_size, -(-high * itemsize // element_size)


@_jit
def bitpacked_columns(
    jobs, address, nbytes, element_size, words, elements, piece_ptr, skip, count, out_at,
    job_source, remap, remap_start, remap_length, out, status,
):  # fmt: skip
    """Decode `homeobox.bitpacking` index chunks and hand out their columns.

    `words` and `elements` are two views of one scratch buffer of a chunk's size.
    """
    for j in range(len(jobs)):
        c = jobs[j]
        p0, p1 = piece_ptr[c], piece_ptr[c + 1]
        first, last = _needed_words(skip, count, p0, p1, elements.itemsize, element_size)
        src = _bytes_at(address[c], nbytes[c])
        status[c] = decode_into(src, element_size, len(words), first, last, words)
        if status[c] == 0:
            r = remap_start[job_source[j]]
            part = remap[r : r + remap_length[job_source[j]]]
            if not scatter_columns(elements, p0, p1, skip, count, out_at, part, out):
                status[c] = COLUMN_OUT_OF_RANGE


@_jit
def bitpacked_values(
    jobs, address, nbytes, element_size, words, elements, piece_ptr, skip, count, out_at, out, status
):  # fmt: skip
    """Decode `homeobox.bitpacking` value chunks and hand out their values."""
    for j in range(len(jobs)):
        c = jobs[j]
        p0, p1 = piece_ptr[c], piece_ptr[c + 1]
        first, last = _needed_words(skip, count, p0, p1, elements.itemsize, element_size)
        src = _bytes_at(address[c], nbytes[c])
        status[c] = decode_into(src, element_size, len(words), first, last, words)
        if status[c] == 0:
            scatter_values(elements, p0, p1, skip, count, out_at, out)


@_jit
def fill_pieces(p0, p1, count, out_at, value, out):
    """Write one value into the pieces p0..p1: the elements of an absent chunk."""
    for p in range(p0, p1):
        for k in range(count[p]):
            out[out_at[p] + k] = value


@_jit
def densify(offsets, indices, values, out):
    """Write CSR rows into the dense rows `out` (n_rows, n_features); repeated columns are summed."""
    for row in range(len(offsets) - 1):
        out[row, :] = 0
        for k in range(offsets[row], offsets[row + 1]):
            out[row, indices[k]] += values[k]
