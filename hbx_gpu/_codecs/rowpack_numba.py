"""Numba kernels that decode any block of hbx_gpu.rowpack alone, with checks of all bounds.

They return a status (see `describe_status`) because compiled code without the GIL cannot raise.
"""

# numba looks at the names of arguments that only the generated code uses.
# ruff: noqa: ARG001, ARG005

from __future__ import annotations

import numpy as np
from numba import config, njit, types
from numba.extending import overload

from hbx_gpu._codecs import rowpack_vector as vector
from hbx_gpu._codecs.rowpack_format import (
    BLOCK,
    HEADER,
    MAGIC,
    MAX_VALUES,
    PATCH_BITS,
    RECORD_BLOCKS,
    TAIL_BYTES,
    VERSION,
)

OK = 0
SHORT = 1
BAD_HEADER = 2
WRONG_COUNT = 3
BAD_GEOMETRY = 4
BAD_BLOCK = 5
BAD_POSITIONS = 6
BAD_REQUEST = 7
BAD_DIRECTORY = 8
NOT_ZERO = 9
_REASONS = {
    OK: "decoded",
    SHORT: f"the chunk is shorter than the {HEADER.size + TAIL_BYTES} bytes of an empty one",
    BAD_HEADER: f"the header is not one of rowpack version {VERSION} for this element size",
    WRONG_COUNT: "the header's number of values is not what the array's metadata demand",
    BAD_GEOMETRY: "length of the chunk, directory, payload and patches contradict each other",
    BAD_BLOCK: "block {0}: its width is impossible, or payload or patches leave their area",
    BAD_POSITIONS: "block {0}: positions of exceptions or resets do not ascend within the block",
    BAD_REQUEST: "decode request does not fit: want 0 <= first <= last <= expected <= whole blocks in out",
    BAD_DIRECTORY: "block {0} does not begin where the one before it ends",
    NOT_ZERO: "reserved bytes are not zero",
}

_jit = njit(nogil=True, cache=True, boundscheck=False)
# The loads and stores of `rowpack_vector` check no bounds. Where tests make numba check indexing, these are
# checked too.
_CHECKED: bool = getattr(config, "BOUNDSCHECK", None) == 1
_HEADER_BYTES = HEADER.size
_MAGIC = int.from_bytes(MAGIC, "little")
_PATCH_BITS = np.array(PATCH_BITS, dtype=np.int64)


def describe_status(status: int) -> str:
    """Return what a status means in words, with the number of the block where there is one."""
    return _REASONS.get(status & 0xFF, f"unknown rowpack status {status}").format(status >> 8)


@_jit
def _load8(src, at):
    if _CHECKED and not 0 <= at < len(src):
        raise IndexError("load")
    return np.int64(vector.load8(src, at))


@_jit
def _load32(src, at):
    if _CHECKED and not 0 <= at <= len(src) - 4:
        raise IndexError("load")
    return np.int64(vector.load32(src, at))


@_jit
def _load64(src, at):
    if _CHECKED and not 0 <= at <= len(src) - 8:
        raise IndexError("load")
    return vector.load64(src, at)


@_jit
def _unpack32(src, at, width, add, out, to):
    if _CHECKED and not (
        0 <= width <= 32 and 0 <= at <= len(src) - 16 * width and 0 <= to <= len(out) - BLOCK
    ):
        raise IndexError("unpack")
    vector.unpack_block(src, at, width, add, out, to)


@_jit
def _sum32(out, to, base):
    if _CHECKED and not 0 <= to <= len(out) - BLOCK:
        raise IndexError("sum")
    vector.running_sum(out, to, base)


@_jit
def parse_header(src, element_size, expected):
    """Check the header of a chunk, without verifying the checksum or looking at any block.

    Parameters
    ----------
    src
        uint8, (nbytes,), C contiguous: the whole chunk and nothing else.
    element_size, expected
        Bytes per value and number of values according to the array's metadata.

    Returns
    -------
    tuple
        The geometry that the other kernels take: (status, gaps, base_bytes, minimum, payload_start,
        patch_start, patch_end, element_size). It must not be used unless status is OK.
    """
    nothing = (False, 0, np.uint64(0), 0, 0, 0, 0)
    if len(src) < _HEADER_BYTES + TAIL_BYTES:
        return SHORT, *nothing
    gaps, base_bytes, minimum = _load8(src, 6) == 1, _load8(src, 7), _load64(src, 16)
    known_size = element_size == 1 or element_size == 2 or element_size == 4 or element_size == 8
    if (
        _load32(src, 0) != _MAGIC
        or _load8(src, 4) != VERSION
        or not known_size
        or _load8(src, 5) != element_size
        or _load8(src, 6) > 1
        or _load32(src, 28) != 0
    ):
        return BAD_HEADER, *nothing
    if gaps:
        known_base = base_bytes == 1 or base_bytes == 2 or base_bytes == 4 or base_bytes == 8
        if not known_base or base_bytes > element_size or minimum != 0:
            return BAD_HEADER, *nothing
    elif base_bytes != 0 or (element_size < 8 and minimum >> np.uint64(8 * element_size) != 0):
        return BAD_HEADER, *nothing
    n, patch_start, patch_end = _load32(src, 8), _load32(src, 12), len(src) - TAIL_BYTES
    if n != expected:
        return WRONG_COUNT, *nothing
    payload_start = (_directory_end(n, gaps, base_bytes) + 15) & ~15
    if n > MAX_VALUES or _load32(src, 24) != len(src) or not payload_start <= patch_start <= patch_end:
        return BAD_GEOMETRY, *nothing
    return OK, gaps, base_bytes, minimum, payload_start, patch_start, patch_end, np.int64(element_size)


@_jit
def _record_bytes(gaps, base_bytes):
    return 32 + RECORD_BLOCKS * base_bytes if gaps else 24


@_jit
def _directory_end(n, gaps, base_bytes):
    records = (n + BLOCK * RECORD_BLOCKS - 1) // (BLOCK * RECORD_BLOCKS)
    return _HEADER_BYTES + records * _record_bytes(gaps, base_bytes)


@_jit
def _entry(src, record, k, gaps):
    """Return (width, exceptions, high_bits, resets, patch_bytes) of the k-th block of a record."""
    width, info = _load8(src, record + 8 + k), _load8(src, record + 16 + k)
    exceptions, high_bits = info & 31, _PATCH_BITS[np.uint64(info >> 5)]
    resets = _load8(src, record + 24 + k) if gaps else 0
    return width, exceptions, high_bits, resets, exceptions + resets + ((exceptions * high_bits + 7) >> 3)


@_jit
def _find(src, b, geometry):
    """Return (payload, patch), the offsets where those of block b begin.

    This is the only look-up in the directory that random access needs.
    """
    _, gaps, base_bytes, _, payload_start, patch_start, _, _ = geometry
    record = _HEADER_BYTES + (b >> 3) * _record_bytes(gaps, base_bytes)
    payload = payload_start + 16 * _load32(src, record)
    patch = patch_start + _load32(src, record + 4)
    for k in range(b & 7):
        width, _, _, _, patch_bytes = _entry(src, record, k, gaps)
        payload += 16 * width
        patch += patch_bytes
    return payload, patch


@_jit
def _add_exceptions(src, patch, exceptions, high_at, high_bits, width, out, to):
    """Add the high parts of exceptions to out[to:to + 128]; return False where their positions are wrong."""
    word = out.dtype.type
    mask = (np.uint64(1) << np.uint64(high_bits)) - np.uint64(1)
    wrong, before = False, -1
    for j in range(exceptions):
        position, bit = _load8(src, patch + j), j * high_bits
        wrong |= (position <= before) | (position >= BLOCK)
        before = position
        high = (_load64(src, high_at + (bit >> 3)) >> np.uint64(bit & 7)) & mask
        out[np.uint64(to + (position & (BLOCK - 1)))] += word(high << np.uint64(width))
    return not wrong


@_jit
def _restart(src, patch, resets, out, to):
    """Turn one running sum over out[to:to + 128] into sums that start again at every reset."""
    start, before = np.int64(0), out.dtype.type(0)
    for j in range(resets):
        position = _load8(src, patch + j)
        if position <= start or position >= BLOCK:
            return False
        total = out[np.uint64(to + position - 1)]
        for i in range(np.uint64(to + start), np.uint64(to + position)):
            out[i] -= before
        start, before = position, total
    for i in range(np.uint64(to + start), np.uint64(to + BLOCK)):
        out[i] -= before
    return True


@_jit
def _unpack64(src, at, width, add, out, to, planes):
    """Unpack 128 uint64 of up to 64 bits: the low 32 bits are one packed plane, the rest another."""
    for plane in range(2):  # a loop, so that the long inlined code occurs once
        of_plane = min(max(width - 32 * plane, 0), 32)
        _unpack32(src, at, of_plane, np.uint32(0), planes, plane * BLOCK)
        at += 16 * of_plane
    for i in range(BLOCK):
        out[to + i] = (np.uint64(planes[i]) | np.uint64(planes[BLOCK + i]) << np.uint64(32)) + add


@_jit
def _sum64(out, to, base):
    for i in range(to, to + BLOCK):
        base += out[i]
        out[i] = base


def _unpack(src, at, width, add, out, to, planes):
    raise NotImplementedError("compiled for the dtype of out")


@overload(_unpack, jit_options={"nogil": True})
def _overload_unpack(src, at, width, add, out, to, planes):
    # Chosen by type, not by a branch on the element size: the branch not taken would have to compile as well.
    if out.dtype == types.uint64:
        return lambda src, at, width, add, out, to, planes: _unpack64(src, at, width, add, out, to, planes)
    return lambda src, at, width, add, out, to, planes: _unpack32(src, at, width, np.uint32(add), out, to)


def _scratch(out):
    raise NotImplementedError("compiled for the dtype of out")


@overload(_scratch, jit_options={"nogil": True})
def _overload_scratch(out):
    # Only the two planes of uint64 need scratch; allocating it always would take a tenth of the time of a
    # row.
    if out.dtype == types.uint64:
        return lambda out: np.empty(2 * BLOCK, np.uint32)
    return lambda out: out


def _sum(out, to, base):
    raise NotImplementedError("compiled for the dtype of out")


@overload(_sum, jit_options={"nogil": True})
def _overload_sum(out, to, base):
    if out.dtype == types.uint64:
        return lambda out, to, base: _sum64(out, to, base)
    return lambda out, to, base: _sum32(out, to, np.uint32(base))


@_jit
def block_range(src, b0, b1, geometry):
    """Return where the payload and the patches of blocks [b0, b1) lie in the chunk.

    Parameters
    ----------
    src, geometry
        The chunk, and what `parse_header` said of it; its status must be OK.
    b0, b1
        Range of blocks, 0 <= b0 < b1 <= number of blocks of the chunk.

    Returns
    -------
    tuple
        (status, payload, payload_end, patch, patch_end), the last four as byte offsets. If status is OK, both
        ranges lie in their areas; blocks between the first and the last one are not looked at.
    """
    _, gaps, base_bytes, _, _, patch_start, patch_limit, _ = geometry
    payload, patch = _find(src, b0, geometry)
    payload_end, patch_end = _find(src, b1 - 1, geometry)
    record = _HEADER_BYTES + ((b1 - 1) >> 3) * _record_bytes(gaps, base_bytes)
    width, _, _, _, patch_bytes = _entry(src, record, (b1 - 1) & 7, gaps)
    payload_end += 16 * width
    patch_end += patch_bytes
    # _find adds non-negative numbers to the beginnings of the areas, so both ranges begin inside.
    if payload > payload_end or payload_end > patch_start or patch > patch_end or patch_end > patch_limit:
        return BAD_BLOCK | (b1 - 1) << 8, 0, 0, 0, 0
    return OK, payload, payload_end, patch, patch_end


@_jit
def decode_blocks_at(src, geometry, b0, b1, out, to):
    """Decode blocks [b0, b1) to out[to:to + 128 * (b1 - b0)]; blocks are always decoded whole.

    Parameters
    ----------
    src, geometry
        The chunk, and what `parse_header` said of it; its status must be OK.
    b0, b1
        Range of blocks; 0 <= b0, and b1 <= number of blocks of the chunk.
    out
        Output: uint32 (element_size <= 4) or uint64 (8), C contiguous, with room for all blocks from `to` on.

    Returns
    -------
    int64
        OK, or a status for `describe_status`. After an error, the blocks before the bad one are written, and
        parts of the bad one may be.
    """
    _, gaps, base_bytes, minimum, _, patch_start, patch_end, element_size = geometry
    word = out.dtype.type
    bits = 8 * element_size
    planes = _scratch(out)
    base_mask = np.uint64(0xFFFFFFFFFFFFFFFF) >> np.uint64(64 - 8 * base_bytes if gaps else 0)
    narrow = word((1 << bits) - 1) if bits < 32 else word(0)
    stride = _record_bytes(gaps, base_bytes)
    payload, patch, record = 0, 0, 0
    for b in range(b0, b1):
        k = b & 7
        if k == 0 or b == b0:
            record = _HEADER_BYTES + (b >> 3) * stride
            payload, patch = _find(src, b, geometry)
        width, exceptions, high_bits, resets, patch_bytes = _entry(src, record, k, gaps)
        # A width that leaves room for exceptions is below the element's.
        if width + (exceptions > 0) > bits or payload + 16 * width > patch_start:
            return BAD_BLOCK | b << 8
        if patch + patch_bytes > patch_end:
            return BAD_BLOCK | b << 8
        _unpack(src, payload, width, minimum, out, to, planes)
        if exceptions:
            high_at = patch + exceptions + resets
            if not _add_exceptions(src, patch, exceptions, high_at, high_bits, width, out, to):
                return BAD_POSITIONS | b << 8
        if gaps:
            # This load stays in bounds, because eight bytes follow the directory's last base in every chunk.
            base = _load64(src, record + 32 + k * base_bytes) & base_mask
            _sum(out, to, base)
            if resets and not _restart(src, patch + exceptions, resets, out, to):
                return BAD_POSITIONS | b << 8
        if narrow:
            for i in range(np.uint64(to), np.uint64(to + BLOCK)):
                out[i] &= narrow
        payload += 16 * width
        patch += patch_bytes
        to += BLOCK
    return OK


@_jit
def decode_blocks(src, geometry, b0, b1, out):
    """Decode blocks to the place that they have in the chunk, out[128 * b0:128 * b1]."""
    return decode_blocks_at(src, geometry, b0, b1, out, b0 * BLOCK)


@_jit
def decode_rowpack_into(src, element_size, expected, first, last, out):
    """Decode the blocks that hold values [first, last) of one chunk to their place in `out`.

    Parameters
    ----------
    src
        uint8, (nbytes,), C contiguous: the whole chunk. Nothing outside it is read; no checksum is verified.
    element_size
        Bytes per value: 1, 2, 4 or 8.
    expected
        Number of values according to the array's metadata.
    first, last
        Range of values, 0 <= first <= last <= expected.
    out
        Output: uint32 (element_size <= 4) or uint64 (8), (>= expected rounded up to 128,), C contiguous.
        Whole blocks are written.

    Returns
    -------
    int64
        OK, or a status for `describe_status`.
    """
    end = (last + BLOCK - 1) // BLOCK
    fits = out.itemsize == (8 if element_size == 8 else 4)
    if not fits or not 0 <= first <= last <= expected or end * BLOCK > len(out):
        return BAD_REQUEST
    geometry = parse_header(src, element_size, expected)
    if geometry[0] != OK:
        return geometry[0]
    return decode_blocks(src, geometry, first // BLOCK, end if first < last else 0, out)


@_jit
def check_directory(src, element_size, expected):
    """Check what reading rows does not need: records continue each other, and reserved bytes are zero.

    Parameters and result have the meaning they have in `decode_rowpack_into`.
    """
    geometry = parse_header(src, element_size, expected)
    status, gaps, base_bytes, _, payload_start, patch_start, patch_end, _ = geometry
    if status != OK:
        return status
    payload, patch = payload_start, patch_start
    n_blocks = (expected + BLOCK - 1) // BLOCK
    record = _HEADER_BYTES
    for b in range((n_blocks + 7) & ~7):
        k = b & 7
        if k == 0:
            record = _HEADER_BYTES + (b >> 3) * _record_bytes(gaps, base_bytes)
            if _find(src, b, geometry) != (payload, patch):
                return BAD_DIRECTORY | b << 8
        width, _, _, _, patch_bytes = _entry(src, record, k, gaps)
        payload += 16 * width
        patch += patch_bytes
        if b >= n_blocks:
            used = _load8(src, record + 8 + k) | _load8(src, record + 16 + k)
            if gaps:
                used |= _load8(src, record + 24 + k)
                for byte in range(base_bytes):
                    used |= _load8(src, record + 32 + k * base_bytes + byte)
            if used:
                return NOT_ZERO
    for at in range(_directory_end(expected, gaps, base_bytes), payload_start):
        if _load8(src, at):
            return NOT_ZERO
    if _load32(src, patch_end):
        return NOT_ZERO
    return OK if payload == patch_start and patch == patch_end else BAD_DIRECTORY | n_blocks << 8
