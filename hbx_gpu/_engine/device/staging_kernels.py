"""Numba kernels of staging: which bytes of rowpack chunks cross, the copy itself, rows cut into segments.

They run without the GIL and raise nothing: sizes are checked once, in `size_runs`, and what it wrote is
what the copies believe, its own and those of `copy_ranges`.
"""

from __future__ import annotations

import numba
import numpy as np
from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

from hbx_gpu._codecs.rowpack_format import BLOCK, HEADER
from hbx_gpu._codecs.rowpack_numba import BAD_REQUEST, OK, block_range, parse_header
from hbx_gpu._engine.host.kernels import _bytes_at

MAX_GAP = 4
"""Most unneeded blocks between two needed ones that are copied too, instead of beginning another run."""
RANGE = np.dtype([("source", "<u8"), ("target", "<u8"), ("nbytes", "<u8")])
"""One copy: address, place in the staged bytes, length."""
SLACK = 8
"""Bytes after the patches of a run, because decoders load eight bytes from any byte of the patches."""

_AHEAD = 16  # chunks or copies whose first bytes are asked for before their turn comes
_DELAY = 8  # runs between the one whose bytes are asked for and the one that is copied
_MOST_LINES = 24  # asked for of one run; the CPU foresees the rest of a long stretch by itself
_CACHE_LINE = 64  # bytes

_jit = numba.njit(nogil=True, cache=True, boundscheck=False)
_HEADER_BYTES = HEADER.size


@intrinsic
def _copy(typingctx, target, source, nbytes):  # noqa: ARG001 - numba's signature
    """memcpy between two addresses."""

    def codegen(context, builder, signature, args):  # noqa: ARG001
        target, source = (builder.inttoptr(address, cgutils.voidptr_t) for address in args[:2])
        cgutils.raw_memcpy(builder, target, source, args[2], 1)
        return context.get_dummy_value()

    return types.void(types.uint64, types.uint64, types.uint64), codegen


@intrinsic
def _prefetch(typingctx, address):  # noqa: ARG001
    """Ask for the cache line at an address that will be read soon. It may be any address."""

    def codegen(context, builder, signature, args):  # noqa: ARG001
        flag = ir.IntType(32)
        kind = ir.FunctionType(ir.VoidType(), [cgutils.voidptr_t, flag, flag, flag])
        function = builder.module.declare_intrinsic("llvm.prefetch", [cgutils.voidptr_t], kind)
        place = builder.inttoptr(args[0], cgutils.voidptr_t)
        builder.call(function, [place, flag(0), flag(3), flag(1)])  # to read, often, data
        return context.get_dummy_value()

    return types.void(types.uint64), codegen


@_jit
def _ask_for_directory(address, element, record_bytes):
    """Ask for the header of a rowpack chunk, and for the directory record of one of its elements.

    Random rows need a few lines in each of thousands of chunks, and would wait for memory at every one.
    `record_bytes` may be wrong: it is that of the chunk before, which is mostly of the same array.
    """
    record = address + np.uint64(_HEADER_BYTES + element // (8 * BLOCK) * record_bytes)
    _prefetch(address)
    _prefetch(record)
    _prefetch(record + np.uint64(_CACHE_LINE))


@_jit
def _up(x, step):
    return (x + step - 1) & ~np.int64(step - 1)


@_jit
def _end_run(src, address, geometry, first_block, end_block, n, at, run, ranges):
    """Describe the run of blocks [first_block, end_block) staged at `at`; returns (status, bytes)."""
    _, gaps, base_bytes, minimum, payload_start, patch_start, _, element_size = geometry
    status, payload, payload_end, patch, patch_end = block_range(src, first_block, end_block, geometry)
    if status != OK:
        return status, 0
    record_bytes = 32 + 8 * base_bytes if gaps else 24
    first_record = first_block >> 3
    n_records = ((end_block + 7) >> 3) - first_record

    begin = (_HEADER_BYTES + first_record * record_bytes, payload, patch)
    nbytes = (n_records * record_bytes, payload_end - payload, patch_end - patch)
    target = (at, _up(at + nbytes[0], 16), _up(at + nbytes[0], 16) + nbytes[1])
    for k in range(3):
        ranges[k].source = address + np.uint64(begin[k])
        ranges[k].target = target[k]
        ranges[k].nbytes = nbytes[k]

    run.records, run.payload, run.patches = target[0], target[1], target[2]
    run.minimum = minimum
    run.first_record, run.n_records = first_record, n_records
    run.payload_begin, run.payload_units = (payload - payload_start) >> 4, nbytes[1] >> 4
    run.patch_begin, run.patch_bytes = patch - patch_start, nbytes[2]
    run.n = n
    run.element_size, run.transform, run.base_bytes = element_size, gaps, base_bytes
    run.unused = 0
    return OK, _up(target[2] + nbytes[2] + SLACK, 16) - at


@_jit
def _copy_run(ranges, run, target):
    """Carry out the three copies of a run."""
    for k in range(3 * run, 3 * run + 3):
        _copy(target + ranges[k].target, ranges[k].source, ranges[k].nbytes)


@_jit
def _copy_later(ranges, n_runs, n_copied, target):
    """Ask for the bytes of the run before `n_runs`, copy one whose bytes have come; returns `n_copied`."""
    for k in range(3 * n_runs - 2, 3 * n_runs):  # its payload and patches; records were just read
        begin = ranges[k].source
        lines = min(np.int64(ranges[k].nbytes + 2 * _CACHE_LINE - 1) // _CACHE_LINE, _MOST_LINES)
        for line in range(lines):
            _prefetch(begin + np.uint64(_CACHE_LINE * line))
    if n_runs - n_copied > _DELAY:
        _copy_run(ranges, n_copied, target)
        n_copied += 1
    return n_copied


@_jit
def size_runs(
    jobs, address, nbytes, elements, element_size, source, role, resident, piece_ptr, skip, count, out, row,
    target, capacity, runs, ranges, pieces, piece_row, status,
):  # fmt: skip
    """Cut what the pieces of rowpack chunks need into runs of blocks, one after the other from byte 0.

    They are copied in the same pass, as far as there is room, because the bytes of a run are near then.

    Parameters
    ----------
    jobs
        int64, (k,). Chunks of the plan.
    address, nbytes
        Address and stored bytes of every chunk of the plan, as in a Slab.
    elements, element_size, source, role
        int64, (k,). For each job: values of its chunk, bytes per value, its HbxSource and its HbxOutput.
    resident
        int64, (k,). The run of a job whose chunk is in device memory, of which nothing is staged; else -1.
    piece_ptr, skip, count, out, row
        As in a BatchPlan.
    target, capacity
        uint64, int64. Address that the runs are copied to, and the bytes that fit there; 0 bytes: nothing is
        copied.
    runs, ranges, pieces, piece_row
        Filled: HbxRun (as many as pieces at most), three copies per run, HbxPiece and output row of each
        piece of the jobs in order.
    status
        int64, (k,). Filled: OK, or why a job does not work (`rowpack_numba.describe_status`).

    Returns
    -------
    tuple
        (runs, bytes staged, runs copied). They must not be used unless every status is OK.
    """
    n_runs, n_pieces, at, n_copied, n_fit = 0, 0, np.int64(0), 0, 0
    record_bytes = np.int64(24)
    soon_job, soon_piece, n_soon = 0, np.int64(0), 0  # the next piece whose directory is asked for
    for j in range(len(jobs)):
        c = jobs[j]
        staged = resident[j] < 0
        src = _bytes_at(address[c], nbytes[c] if staged else 0)
        geometry = parse_header(src, element_size[j], elements[j])
        status[j] = geometry[0] if staged else OK
        if staged:
            record_bytes = np.int64(32 + 8 * geometry[2] if geometry[1] else 24)
        begin, end = np.int64(-1), np.int64(0)  # blocks of the run that is open
        for p in range(piece_ptr[c], piece_ptr[c + 1]):
            if count[p] < 1 or skip[p] < 0 or skip[p] + count[p] > elements[j]:
                status[j] = BAD_REQUEST
            if status[j] != OK:
                return n_runs, at, n_copied
            while n_soon <= n_pieces + _AHEAD and soon_job < len(jobs):
                soon = jobs[soon_job]
                first = max(soon_piece, piece_ptr[soon])
                if resident[soon_job] < 0:
                    _ask_for_directory(address[soon], skip[first], record_bytes)
                soon_piece, n_soon = first + 1, n_soon + 1
                if soon_piece >= piece_ptr[soon + 1]:
                    soon_job, soon_piece = soon_job + 1, np.int64(0)
            piece = pieces[n_pieces]
            piece.out, piece.run, piece.skip, piece.count = out[p], resident[j], skip[p], count[p]
            piece.source, piece.role, piece.unused = source[j], role[j], 0
            piece_row[n_pieces] = row[p]
            n_pieces += 1
            if not staged:
                continue
            first, last = skip[p] // BLOCK, (skip[p] + count[p] + BLOCK - 1) // BLOCK
            if begin >= 0 and first > end + MAX_GAP:
                status[j], nbytes_run = _end_run(
                    src, address[c], geometry, begin, end, elements[j], at, runs[n_runs], ranges[3 * n_runs :]
                )
                n_runs, at, begin = n_runs + 1, at + nbytes_run, -1
                if at <= capacity and status[j] == OK:
                    n_fit = n_runs
                    n_copied = _copy_later(ranges, n_runs, n_copied, target)
            if begin < 0:
                begin = first
                end = first
            end = max(end, last)
            piece.run = n_runs
        if begin >= 0 and status[j] == OK:
            status[j], nbytes_run = _end_run(
                src, address[c], geometry, begin, end, elements[j], at, runs[n_runs], ranges[3 * n_runs :]
            )
            n_runs, at = n_runs + 1, at + nbytes_run
            if at <= capacity and status[j] == OK:
                n_fit = n_runs
                n_copied = _copy_later(ranges, n_runs, n_copied, target)
        if status[j] != OK:
            return n_runs, at, n_copied
    while n_copied < n_fit:
        _copy_run(ranges, n_copied, target)
        n_copied += 1
    return n_runs, at, n_copied


@_jit
def whole_runs(address, nbytes, elements, element_size, place, runs, status):
    """Describe whole rowpack chunks as runs.

    Parameters
    ----------
    address, nbytes, elements, element_size
        Address, stored bytes, number of values and bytes per value of each chunk, as in `size_runs`.
    place
        int64, (k,). Where the chunk lies in the arena.
    runs, status
        Filled: HbxRun; OK, or why it does not work.
    """
    for j in range(len(address)):
        geometry = parse_header(_bytes_at(address[j], nbytes[j]), element_size[j], elements[j])
        status[j], gaps, base_bytes, minimum, payload_start, patch_start, patch_end, _ = geometry
        run = runs[j]
        run.records, run.payload, run.patches = (
            place[j] + _HEADER_BYTES, place[j] + payload_start, place[j] + patch_start
        )  # fmt: skip
        run.minimum = minimum
        run.first_record, run.n_records = 0, (elements[j] + 8 * BLOCK - 1) // (8 * BLOCK)
        run.payload_begin, run.payload_units = 0, (patch_start - payload_start) >> 4
        run.patch_begin, run.patch_bytes = 0, patch_end - patch_start
        run.n = elements[j]
        run.element_size, run.transform, run.base_bytes = element_size[j], gaps, base_bytes
        run.unused = 0


@_jit
def copy_ranges(ranges, base, target):
    """Carry out copies: `base` is added to their sources, `target` is the address that places count from."""
    for k in range(len(ranges)):
        if k + _AHEAD < len(ranges):
            for line in range(4):
                _prefetch(base + ranges[k + _AHEAD].source + np.uint64(_CACHE_LINE * line))
        _copy(target + ranges[k].target, base + ranges[k].source, ranges[k].nbytes)


@_jit
def _by_row(pieces, piece_row, role, n_rows, ptr, order):
    """Numbers of the pieces of one role, row after row; within a row in the order they come."""
    ptr[:] = 0
    for i in range(len(pieces)):
        if pieces[i].role == role:
            ptr[piece_row[i] + 1] += 1
    for r in range(n_rows):
        ptr[r + 1] += ptr[r]
    for i in range(len(pieces)):
        if pieces[i].role == role:
            order[ptr[piece_row[i]]] = i
            ptr[piece_row[i]] += 1
    for r in range(n_rows, 0, -1):
        ptr[r] = ptr[r - 1]
    ptr[0] = 0


@_jit
def cut_segments(pieces, piece_row, role, n_rows, segments, row_ptr):
    """Pair the pieces of column indices (role 0) with those of a layer, row by row.

    Parameters
    ----------
    pieces, piece_row
        From `size_runs`; the pieces of a row and role come in ascending order.
    role
        Role of the layer.
    segments
        Filled: HbxSegment, as many as pieces at most.
    row_ptr
        uint32, (n_rows + 1,). Filled: row r has segments row_ptr[r]:row_ptr[r + 1].

    Returns
    -------
    int
        Number of segments; -1 where the two arrays do not have their blocks at the same places.
    """
    index_ptr, value_ptr = np.empty(n_rows + 1, np.int64), np.empty(n_rows + 1, np.int64)
    index_order, value_order = np.empty(len(pieces), np.int64), np.empty(len(pieces), np.int64)
    _by_row(pieces, piece_row, 0, n_rows, index_ptr, index_order)
    _by_row(pieces, piece_row, role, n_rows, value_ptr, value_order)
    n = 0
    row_ptr[0] = 0
    for r in range(n_rows):
        i, v, i_used, v_used = index_ptr[r], value_ptr[r], np.int64(0), np.int64(0)
        while i < index_ptr[r + 1] and v < value_ptr[r + 1]:
            index, value = pieces[index_order[i]], pieces[value_order[v]]
            index_skip, value_skip = np.int64(index.skip) + i_used, np.int64(value.skip) + v_used
            if (index_skip - value_skip) % BLOCK != 0:
                return -1
            count = min(np.int64(index.count) - i_used, np.int64(value.count) - v_used)
            segment = segments[n]
            segment.index_piece, segment.value_piece = index_order[i], value_order[v]
            segment.index_skip, segment.value_skip = index_skip, value_skip
            segment.count, segment.unused = count, 0
            n += 1
            i_used += count
            v_used += count
            if i_used == index.count:
                i, i_used = i + 1, 0
            if v_used == value.count:
                v, v_used = v + 1, 0
        if i < index_ptr[r + 1] or v < value_ptr[r + 1]:
            return -1
        row_ptr[r + 1] = n
    return n
