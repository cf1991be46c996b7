"""Numba kernels of the host engine: compiled once, cached on disk, run without the GIL.

Each kernel handles a list of chunks of one kind: it decodes a chunk into scratch, copies its pieces to the
output, and goes on. Everything that comes from decoded bytes (column numbers) is checked here; what comes
from the plan was checked when the dataset was made. A chunk that fails sets its status and writes nothing
more.
"""

from __future__ import annotations

import numba
import numpy as np
from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic, overload

from hbx_gpu._codecs.bitpacking_numba import decode_into
from hbx_gpu._codecs.rowpack_format import BLOCK
from hbx_gpu._codecs.rowpack_numba import decode_blocks_at, parse_header

COLUMN_OUT_OF_RANGE = -1
"""Status of a chunk that holds a column number its Source does not have."""

_FAR = 16 << 20
"""Outputs of more bytes than this are written past the caches, which could not keep them. The CPU then need
not read memory before it is written."""

_STORED = 32  # bytes that are written past the caches at once
_LINE = 1024  # columns looked up before they are written past the caches

_jit = numba.njit(nogil=True, cache=True, boundscheck=False)


@intrinsic
def _pointer(typingctx, address):  # noqa: ARG001 - numba's signature
    """An integer address as a void pointer, for numba.carray."""

    def codegen(context, builder, signature, args):  # noqa: ARG001
        return builder.inttoptr(args[0], cgutils.voidptr_t)

    return types.voidptr(types.uintp), codegen


@intrinsic
def _store_past_caches(typingctx, target, source, target_at, source_at):  # noqa: ARG001
    """Copy 32 bytes of `target`'s elements between addresses, widening integers; `target_at` is aligned."""

    def codegen(context, builder, signature, args):
        to, like = (context.get_data_type(array.dtype) for array in signature.args[:2])
        lanes = _STORED // context.get_abi_sizeof(to)
        vectors = [ir.VectorType(kind, lanes) for kind in (to, like)]
        places = [builder.inttoptr(a, v.as_pointer()) for a, v in zip(args[2:], vectors, strict=True)]
        elements = builder.load(places[1], align=1)
        if like != to:
            extend = builder.sext if signature.args[1].dtype.signed else builder.zext
            elements = extend(elements, vectors[0])
        stored = builder.store(elements, places[0], align=_STORED)
        stored.set_metadata("nontemporal", builder.module.add_metadata([ir.Constant(ir.IntType(32), 1)]))
        return context.get_dummy_value()

    return types.void(target, source, types.uintp, types.uintp), codegen


@intrinsic
def _fence(typingctx):  # noqa: ARG001
    """Make what was stored past the caches visible to other threads before anything that follows."""

    def codegen(context, builder, signature, args):  # noqa: ARG001
        builder.fence("seq_cst")
        return context.get_dummy_value()

    return types.void(), codegen


def _copy(source, target, far):
    """Copy the elements of an array to another; past the caches if the target is `far`."""
    raise NotImplementedError  # exists in compiled code only


@overload(_copy)
def _compiled_copy(source, target, far):  # noqa: ARG001
    like, to = source.dtype, target.dtype
    integers = isinstance(like, types.Integer) and isinstance(to, types.Integer)

    def plain(source, target, far):  # noqa: ARG001
        for k in range(len(source)):
            target[k] = source[k]

    if like != to and not (integers and like.bitwidth <= to.bitwidth):
        return plain
    itemsize, width = to.bitwidth // 8, like.bitwidth // 8
    lanes = _STORED // itemsize

    def streaming(source, target, far):
        if far:
            at, origin = target.ctypes.data, source.ctypes.data
            head = min((-at % _STORED) // itemsize, len(source))
            for k in range(head):
                target[k] = source[k]
            last = head + (len(source) - head) // lanes * lanes
            for k in range(head, last, lanes):
                _store_past_caches(target, source, np.uintp(at + k * itemsize), np.uintp(origin + k * width))
            source, target = source[last:], target[last:]
        for k in range(len(source)):
            target[k] = source[k]

    return streaming


@_jit
def _bytes_at(address, nbytes):
    return numba.carray(_pointer(np.uintp(address)), (nbytes,), np.uint8)


@_jit
def _is_unsorted(line):
    """Return whether columns do not ascend or one repeats; call it while they are in cache."""
    is_unsorted = False
    for k in range(1, len(line)):
        is_unsorted |= line[k] <= line[k - 1]  # no early exit, so that the loop is vectorized
    return is_unsorted


@_jit
def _look_up_far(source, remap, target):
    """Local to output columns, past the caches; returns whether the output columns do not ascend.

    They pass through a line that stays in the nearest cache, because what went past it is not read again.
    """
    line = np.empty(_LINE, remap.dtype)
    is_unsorted, before = False, np.int64(-2)
    for first in range(0, len(source), _LINE):
        part = source[first : first + _LINE]
        mapped = line[: len(part)]
        for k in range(len(part)):
            mapped[k] = remap[np.uint64(part[k])]
        is_unsorted |= mapped[0] <= before or _is_unsorted(mapped)
        before = np.int64(mapped[len(mapped) - 1])
        _copy(mapped, target[first : first + len(part)], True)
    return is_unsorted


@_jit
def scatter_columns(decoded, p0, p1, skip, count, out_at, remap, identity, out, unsorted):
    """Copy the pieces p0..p1 of one decoded index chunk to the output, as output columns.

    Returns False at a piece with a column number outside the remap. `identity` means that the remap changes
    nothing, so that columns need not be looked up. `unsorted`, unless it is empty, is set to 1 for pieces
    whose output columns do not ascend.
    """
    far = out.size * out.itemsize > _FAR
    for p in range(p0, p1):
        # With slices, and loops from 0, the compiler knows that no index is negative, and vectorizes.
        source = decoded[skip[p] : skip[p] + count[p]]
        target = out[out_at[p] : out_at[p] + count[p]]
        # Columns are checked in a pass of their own, because that pass is vectorized and the look-up is not.
        low = high = source[0]
        for k in range(len(source)):
            if source[k] > high:
                high = source[k]
            if source[k] < low:
                low = source[k]
        if low < 0 or high >= len(remap):
            return False
        if identity:
            _copy(source, target, far)
            if len(unsorted):
                unsorted[p] = _is_unsorted(source)
        elif far:
            is_unsorted = _look_up_far(source, remap, target)
            if len(unsorted):
                unsorted[p] = is_unsorted
        else:
            for k in range(len(source)):
                target[k] = remap[np.uint64(source[k])]
            if len(unsorted):
                unsorted[p] = _is_unsorted(target)
    return True


@_jit
def scatter_values(decoded, p0, p1, skip, count, out_at, out):
    """Copy the pieces p0..p1 of one decoded value chunk to the output."""
    far = out.size * out.itemsize > _FAR
    for p in range(p0, p1):
        source = decoded[skip[p] : skip[p] + count[p]]
        _copy(source, out[out_at[p] : out_at[p] + count[p]], far)


@_jit
def mark_unsorted_rows(piece_row, piece_out, offsets, columns, unsorted, rows):
    """Set `rows` where columns do not ascend or repeat, inside a piece or from one piece to the next."""
    for p in range(len(piece_row)):
        row, at = piece_row[p], piece_out[p]
        if unsorted[p] or (at > offsets[row] and columns[at] <= columns[at - 1]):
            rows[row] = True


@_jit
def _needed_words(skip, count, p0, p1, itemsize, element_size):
    """Return the range of packed words that hold the elements of pieces p0..p1."""
    low, high = skip[p0], skip[p0] + count[p0]
    for p in range(p0 + 1, p1):
        low = min(low, skip[p])
        high = max(high, skip[p] + count[p])
    return low * itemsize // element_size, -(-high * itemsize // element_size)


@_jit
def bitpacked_columns(
    jobs, address, nbytes, element_size, words, elements, piece_ptr, skip, count, out_at,
    job_source, remap, remap_start, remap_length, identity, out, unsorted, status,
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
            if not scatter_columns(elements, p0, p1, skip, count, out_at, part, same, out, unsorted):
                status[c] = COLUMN_OUT_OF_RANGE
    _fence()


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
    _fence()


@_jit
def raw_columns(
    jobs, address, nbytes, like, piece_ptr, skip, count, out_at,
    job_source, remap, remap_start, remap_length, identity, out, unsorted, status,
):  # fmt: skip
    """Hand out the columns of index chunks that are stored as they are; `like` has their dtype."""
    for j in range(len(jobs)):
        c = jobs[j]
        elements = _bytes_at(address[c], nbytes[c]).view(like.dtype)
        r, same = remap_start[job_source[j]], identity[job_source[j]]
        part = remap[r : r + remap_length[job_source[j]]]
        if not scatter_columns(
            elements, piece_ptr[c], piece_ptr[c + 1], skip, count, out_at, part, same, out, unsorted
        ):
            status[c] = COLUMN_OUT_OF_RANGE
    _fence()


@_jit
def raw_values(jobs, address, nbytes, like, piece_ptr, skip, count, out_at, out):
    """Hand out the values of chunks that are stored as they are; `like` has their dtype."""
    for j in range(len(jobs)):
        c = jobs[j]
        elements = _bytes_at(address[c], nbytes[c]).view(like.dtype)
        scatter_values(elements, piece_ptr[c], piece_ptr[c + 1], skip, count, out_at, out)
    _fence()


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

    Blocks that lie wholly in the piece are decoded to their place. The two at its ends are decoded to `edge`,
    which has room for one block. Block `held` is still there from the piece before, because neighboring rows
    share blocks.
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
    job_source, remap, remap_start, remap_length, identity, out, unsorted, status,
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
                words, 0, 1, origin, count[p : p + 1], out_at[p : p + 1], part, same, out, unsorted[p : p + 1]
            ):
                status[c] = COLUMN_OUT_OF_RANGE
    _fence()


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
    _fence()
