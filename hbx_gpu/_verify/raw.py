"""Chunks that are stored as their elements: looked at where they lie, without making rows of them."""

from __future__ import annotations

import math

import numpy as np

from hbx_gpu._codecs.chain import ChunkCodec
from hbx_gpu._codecs.checksum import WITH_ITSELF
from hbx_gpu._codecs.crc32c_numba import crc32c_each
from hbx_gpu._source import ArrayLayout
from hbx_gpu._storage.chunks import ChunkDirectory
from hbx_gpu._storage.readers import Memory, Reader, Slab
from hbx_gpu.errors import HbxError


def are_raw(directory: ChunkDirectory, chunks: np.ndarray) -> bool:
    """Whether all chunks are their elements, in the order and byte order of this machine."""
    used = np.unique(np.searchsorted(directory.base, chunks, "right") - 1).tolist()
    try:
        return all(ChunkCodec(directory.layouts[array]).is_raw for array in used)
    except HbxError:
        return False  # decoding says what is wrong with the codecs


def is_whole(
    directory: ChunkDirectory, reader: Reader, chunks: np.ndarray, limits: np.ndarray
) -> tuple[bool, int]:
    """Read raw chunks, and look at their checksums, sizes and column numbers.

    Parameters
    ----------
    directory, reader
        Where the chunks lie, and what reads them.
    chunks
        int64, ascending. Chunks for which :func:`are_raw` holds.
    limits
        int64, (n_arrays,). What every element of an array has to be less than; -1: elements may have any
        value.

    Returns
    -------
    tuple
        Whether nothing is wrong with any of them, and the bytes that were read. Where something may be
        wrong, decoding the rows says what, and whether any row needs it.
    """
    try:
        slab = reader.read(directory.extents(chunks))
    except (HbxError, OSError):
        return False, 0
    arrays = np.searchsorted(directory.base, chunks, "right") - 1
    edges = np.flatnonzero(np.diff(arrays)) + 1
    whole = all(
        _is_whole(directory.layouts[arrays[part[0]]], slab, part, int(limits[arrays[part[0]]]))
        for part in np.split(np.arange(len(chunks)), edges)
        if len(part)
    )
    return whole, int(slab.nbytes[slab.nbytes > 0].sum())


def _is_whole(layout: ArrayLayout, slab: Slab, part: np.ndarray, limit: int) -> bool:
    """The same for chunks of one array, which are a part of a slab."""
    address, nbytes = slab.address[part], slab.nbytes[part]
    stored = nbytes >= 0
    if limit >= 0 and not stored.all():
        return False  # the fill value in place of column numbers is rarely right
    address, nbytes = address[stored], nbytes[stored]
    tail = ChunkCodec(layout).tail
    expected = math.prod(layout.chunk_shape) * layout.dtype.itemsize + tail
    # A plain file ends where its elements do, and the directory knows where.
    if layout.byte_offset is None and (nbytes != expected).any():
        return False
    if tail or limit < 0:  # without a checksum, this reads the bytes all the same
        found = crc32c_each(address, nbytes)
        if tail and (found != WITH_ITSELF).any():
            return False
    return limit < 0 or largest(address, nbytes - tail, slab.owner, layout.dtype) < limit


def largest(address: np.ndarray, nbytes: np.ndarray, owner: object, dtype: np.dtype) -> int:
    """The largest element, a negative one counting as larger than any other; -1 without elements."""
    # Chunks that follow each other in memory are one stretch.
    breaks = np.flatnonzero(address[1:] != address[:-1] + nbytes[:-1].astype(np.uint64)) + 1
    first = np.concatenate(([0], breaks)) if len(address) else breaks
    sizes = np.add.reduceat(nbytes, first) if len(first) else nbytes
    unsigned = np.dtype(f"u{dtype.itemsize}")
    return max(
        (
            int(np.asarray(Memory(at, size, owner)).view(unsigned).max())
            for at, size in zip(address[first].tolist(), sizes.tolist(), strict=True)
            if size
        ),
        default=-1,
    )
