"""Numba kernels that encode hbx_gpu.rowpack without the GIL, to the same bytes as the reference."""

from __future__ import annotations

import numpy as np
from numba import njit

from hbx_gpu._codecs import rowpack_vector as vector
from hbx_gpu._codecs.rowpack_format import BLOCK, MAX_EXCEPTIONS, PATCH_BITS, RECORD_BLOCKS

_jit = njit(nogil=True, cache=True, boundscheck=False)
_PATCH_BITS = np.array(PATCH_BITS, dtype=np.int64)


@_jit
def _pack_plane(stored, shift, width, out, at):
    """Pack bits [shift, shift + width) of 128 uint64 at out[at:at + 16 * width]: the 4-lane layout."""
    if width == 0:
        return
    mask = np.uint64((1 << width) - 1)
    for lane in range(4):
        pending, filled, to = np.uint64(0), 0, at + 4 * lane
        for row in range(BLOCK // 4):
            part = (stored[4 * row + lane] >> np.uint64(shift)) & mask
            pending |= part << np.uint64(filled)
            filled += width
            if filled >= 32:
                _store_bytes(out, to, pending, 4)
                to += 16
                pending >>= np.uint64(32)
                filled -= 32


@_jit
def _store_bytes(out, at, value, n):
    for byte in range(n):
        out[at + byte] = np.uint8((np.uint64(value) >> np.uint64(8 * byte)) & np.uint64(0xFF))


@_jit
def _wider_than(stored, width):
    """Return how many of the 128 values have more than `width` < 64 bits."""
    count = 0
    for i in range(BLOCK):
        count += np.int64((stored[i] >> np.uint64(width)) != 0)
    return count


@_jit
def _choose(stored):
    """Return the (width, code) that make a block smallest; see `rowpack.choose_width`."""
    union = np.uint64(0)
    for i in range(BLOCK):
        union |= stored[i]
    widest = 64 - np.int64(vector.leading_zeros(union))
    best_size, best_width, best_code = 16 * widest, widest, 0
    code = 0
    for width in range(widest - 1, -1, -1):
        exceptions = _wider_than(stored, width)
        while code < len(_PATCH_BITS) and _PATCH_BITS[code] < widest - width:
            code += 1
        if exceptions > MAX_EXCEPTIONS or code == len(_PATCH_BITS):
            break
        size = 16 * width + exceptions + ((exceptions * _PATCH_BITS[code] + 7) >> 3)
        if size < best_size:
            best_size, best_width, best_code = size, width, code
    return best_width, best_code


@_jit
def _store_values(values, begin, gaps, minimum, stored, reset_at):
    """Fill stored[0:128] with what the block that begins at `begin` stores; return the number of resets."""
    count = min(BLOCK, len(values) - begin)
    resets = 0
    if gaps:
        before = values[begin]
        for i in range(count):
            value = values[begin + i]
            if value < before:
                reset_at[resets] = i
                resets += 1
                stored[i] = value
            else:
                stored[i] = value - before
            before = value
    else:
        for i in range(count):
            stored[i] = values[begin + i] - minimum
    for i in range(count, BLOCK):
        stored[i] = 0
    return resets


@_jit
def _write_patches(stored, width, high_bits, reset_at, resets, patches, at):
    """Write positions of exceptions and of resets, then packed high parts; return (exceptions, end)."""
    exceptions = 0
    for i in range(BLOCK):
        if width < 64 and (stored[i] >> np.uint64(width)) != 0:
            patches[at + exceptions] = i
            exceptions += 1
    end = at + exceptions
    for j in range(resets):
        patches[end] = reset_at[j]
        end += 1
    pending, filled = np.uint64(0), 0
    for j in range(exceptions):
        pending |= (stored[patches[at + j]] >> np.uint64(width)) << np.uint64(filled)
        filled += high_bits
        whole = filled >> 3
        _store_bytes(patches, end, pending, whole)
        end += whole
        pending >>= np.uint64(8 * whole)
        filled &= 7
    if filled:
        patches[end] = np.uint8(pending)
        end += 1
    return exceptions, end


@_jit
def encode_blocks(values, gaps, minimum, base_bytes, directory, payload, patches):
    """Encode all blocks of one chunk.

    Parameters
    ----------
    values
        The values: uint64, (n,), C contiguous.
    gaps, minimum, base_bytes
        The fields of the header that have these names.
    directory
        Output: uint8 zeros, as many as the directory has bytes.
    payload, patches
        Outputs: uint8, (n_blocks * 128 * element_size,) and (n_blocks * 288,).

    Returns
    -------
    tuple of int64
        Bytes of payload and of patches written.
    """
    stored = np.empty(BLOCK, np.uint64)
    reset_at = np.empty(BLOCK, np.uint8)
    record_bytes = 32 + RECORD_BLOCKS * base_bytes if gaps else 24
    payload_at, patch_at = 0, 0
    for b in range((len(values) + BLOCK - 1) // BLOCK):
        record, k = (b >> 3) * record_bytes, b & 7
        if k == 0:
            _store_bytes(directory, record, payload_at // 16, 4)
            _store_bytes(directory, record + 4, patch_at, 4)
        resets = _store_values(values, b * BLOCK, gaps, minimum, stored, reset_at)
        width, code = _choose(stored)
        _pack_plane(stored, 0, min(width, 32), payload, payload_at)
        _pack_plane(stored, 32, max(width - 32, 0), payload, payload_at + 512)
        payload_at += 16 * width
        high_bits = _PATCH_BITS[code]
        exceptions, patch_at = _write_patches(stored, width, high_bits, reset_at, resets, patches, patch_at)
        directory[record + 8 + k] = width
        directory[record + 16 + k] = exceptions | code << 5
        if gaps:
            directory[record + 24 + k] = resets
            _store_bytes(directory, record + 32 + k * base_bytes, values[b * BLOCK], base_bytes)
    return payload_at, patch_at
