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
from hbx_gpu.codecs.rowpack import BLOCK
from hbx_gpu.codecs.rowpack_numba import decode_blocks_at, parse_header

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
def scatter_columns(decoded, p0, p1, skip, count, out_at, remap, identity, out):
    """Hand the pieces p0..p1 of one decoded index chunk out, local -> output column.

    Returns False at a piece with a column number outside the remap. `identity` says that the remap
    changes nothing, so that looking it up can be left out.
    """
    for p in range(p0, p1):
        # Slices, and loops from 0: the compiler then sees no negative index and vectorises.
        source = decoded[skip[p] : skip[p] + count[p]]
        target = out[out_at[p] : out_at[p] + count[p]]
        # Checked before it is used, in a pass of its own: that one vectorises, a look-up does not.
        low = high = source[0]
        for k in range(len(source)):
            if source[k] > high:
                high = source[k]
            if source[k] < low:
                low = source[k]
        if low < 0 or high >= len(remap):
            return False
        if identity:
            for k in range(len(source)):
                target[k] = source[k]
        else:
            for k in range(len(source)):
                target[k] = remap[np.uint64(source[k])]
    return True


@_jit
def scatter_values(decoded, p0, p1, skip, count, out_at, out):
    """Hand the pieces p0..p1 of one decoded value chunk out."""
    for p in range(p0, p1):
        source = decoded[skip[p] : skip[p] + count[p]]
        target = out[out_at[p] : out_at[p] + count[p]]
        for k in range(len(source)):
            target[k] = source[k]


@_jit
def to_wide_columns(offsets, indices, out):
    """Copy column numbers to int64; returns whether they ascend, each once, within every row."""
    for k in range(len(indices)):
        out[k] = indices[k]
    for row in range(len(offsets) - 1):
        line = indices[offsets[row] : offsets[row + 1]]
        falls = False
        for k in range(1, len(line)):
            falls |= line[k] <= line[k - 1]  # no way out: the loop vectorises
        if falls:
            return False
    return True


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
    job_source, remap, remap_start, remap_length, identity, out, status,
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
            r, same = remap_start[job_source[j]], identity[job_source[j]]
            part = remap[r : r + remap_length[job_source[j]]]
            if not scatter_columns(elements, p0, p1, skip, count, out_at, part, same, out):
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
def raw_columns(
    jobs, address, nbytes, like, piece_ptr, skip, count, out_at,
    job_source, remap, remap_start, remap_length, identity, out, status,
):  # fmt: skip
    """Hand out the columns of index chunks that are stored as they are; `like` has their dtype."""
    for j in range(len(jobs)):
        c = jobs[j]
        elements = _bytes_at(address[c], nbytes[c]).view(like.dtype)
        r, same = remap_start[job_source[j]], identity[job_source[j]]
        part = remap[r : r + remap_length[job_source[j]]]
        if not scatter_columns(
            elements, piece_ptr[c], piece_ptr[c + 1], skip, count, out_at, part, same, out
        ):
            status[c] = COLUMN_OUT_OF_RANGE


@_jit
def raw_values(jobs, address, nbytes, like, piece_ptr, skip, count, out_at, out):
    """Hand out the values of chunks that are stored as they are; `like` has their dtype."""
    for j in range(len(jobs)):
        c = jobs[j]
        elements = _bytes_at(address[c], nbytes[c]).view(like.dtype)
        scatter_values(elements, piece_ptr[c], piece_ptr[c + 1], skip, count, out_at, out)


@_jit
def fill_pieces(p0, p1, count, out_at, value, out):
    """Write one value into the pieces p0..p1: the elements of an absent chunk."""
    for p in range(p0, p1):
        for k in range(count[p]):
            out[out_at[p] + k] = value


@_jit
def _copy_edge(src, geometry, b, skip, end, out, at, edge, held):
    """Decode block b to `edge` unless it is there, and copy what of it lies in [skip, end)."""
    if b != held:
        status = decode_blocks_at(src, geometry, b, b + 1, edge, 0)
        if status != 0:
            return status
    begin, stop = max(skip, b * BLOCK), min(end, (b + 1) * BLOCK)
    source = edge[begin - b * BLOCK : stop - b * BLOCK]
    target = out[at + begin - skip : at + stop - skip]
    for k in range(len(source)):
        target[k] = source[k]
    return 0


@_jit
def _decode_piece(src, geometry, skip, count, out, at, edge, held):
    """Decode values [skip, skip + count) of a chunk to out[at:at + count]; returns (status, held).

    Blocks that lie wholly in the piece go straight to their place. The two at its ends go through `edge`
    (one block), where block `held` still stands from the piece before: neighbouring rows share it.
    """
    end = skip + count
    head, first, last = skip // BLOCK, (skip + BLOCK - 1) // BLOCK, end // BLOCK
    status = 0
    if first > head:
        status = _copy_edge(src, geometry, head, skip, end, out, at, edge, held)
        held = head
    if first < last and status == 0:
        status = decode_blocks_at(src, geometry, first, last, out, at + first * BLOCK - skip)
    if end > last * BLOCK and (last > head or first == head) and status == 0:
        status = _copy_edge(src, geometry, last, skip, end, out, at, edge, held)
        held = last
    return status, held


@_jit
def rowpack_columns(
    jobs, address, nbytes, element_size, elements, words, edge, piece_ptr, skip, count, out_at,
    job_source, remap, remap_start, remap_length, identity, out, status,
):  # fmt: skip
    """Decode the blocks of `hbx_gpu.rowpack` index chunks that the pieces touch, and hand out their columns.

    `words` is scratch for one piece, `edge` for one block.
    """
    origin = np.zeros(1, np.int64)
    for j in range(len(jobs)):
        c = jobs[j]
        src = _bytes_at(address[c], nbytes[c])
        geometry = parse_header(src, element_size, elements)
        status[c] = geometry[0]
        r, same = remap_start[job_source[j]], identity[job_source[j]]
        part = remap[r : r + remap_length[job_source[j]]]
        held = np.int64(-1)
        for p in range(piece_ptr[c], piece_ptr[c + 1]):
            if status[c] != 0:
                break
            status[c], held = _decode_piece(src, geometry, skip[p], count[p], words, 0, edge, held)
            if status[c] == 0 and not scatter_columns(
                words, 0, 1, origin, count[p : p + 1], out_at[p : p + 1], part, same, out
            ):
                status[c] = COLUMN_OUT_OF_RANGE


@_jit
def rowpack_values(
    jobs, address, nbytes, element_size, elements, words, edge, direct, piece_ptr, skip, count, out_at,
    out, status,
):  # fmt: skip
    """Decode the blocks of `hbx_gpu.rowpack` value chunks that the pieces touch, and hand out their values.

    `words` is the output itself, seen as unsigned words, if `direct`; else scratch for one piece.
    """
    origin = np.zeros(1, np.int64)
    for j in range(len(jobs)):
        c = jobs[j]
        src = _bytes_at(address[c], nbytes[c])
        geometry = parse_header(src, element_size, elements)
        status[c] = geometry[0]
        held = np.int64(-1)
        for p in range(piece_ptr[c], piece_ptr[c + 1]):
            if status[c] != 0:
                break
            at = out_at[p] if direct else 0
            status[c], held = _decode_piece(src, geometry, skip[p], count[p], words, at, edge, held)
            if status[c] == 0 and not direct:
                scatter_values(words, 0, 1, origin, count[p : p + 1], out_at[p : p + 1], out)
