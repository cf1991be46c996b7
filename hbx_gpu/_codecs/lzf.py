"""Decode LZF as HDF5 files use it (filter 32000), which h5py writes for ``compression="lzf"``.

The format is that of the LibLZF library: a stream of instructions. A byte below 32 is followed by that many
plus one literal bytes. Any other byte, with the next one, is a reference into the output: the upper three
bits of the first byte are the length minus two (7: another byte, to be added to the length, comes next), its
lower five bits and the last byte are the distance minus one.
"""

from __future__ import annotations

import numba
import numpy as np

from hbx_gpu._codecs.bitpacking_format import BytesLike, as_bytes
from hbx_gpu.errors import CorruptChunkError


def decode_lzf(data: BytesLike, nbytes: int) -> np.ndarray:
    """Decode one LZF stream.

    Parameters
    ----------
    data
        The whole stored chunk.
    nbytes
        Size of the decoded chunk in bytes.

    Returns
    -------
    ndarray
        uint8, (nbytes,).

    Raises
    ------
    CorruptChunkError
        The stream ends early, refers to bytes before the output, or does not decode to `nbytes`.
    """
    raw, out = as_bytes(data), np.empty(nbytes, np.uint8)
    written = _decode(raw, out)
    if written != nbytes:
        raise CorruptChunkError(
            f"the LZF stream of {len(raw)} bytes does not decode to the {nbytes} bytes of a chunk"
        )
    return out


@numba.njit(nogil=True, cache=True, boundscheck=False)
def _decode(raw, out):
    """Decode `raw` to `out`; return the bytes written, or -1 where the stream leaves its input or output."""
    at, to, n, size = 0, 0, len(raw), len(out)
    while at < n:
        control = np.int64(raw[at])
        at += 1
        if control < 32:
            count = control + 1
            if at + count > n or to + count > size:
                return -1
            for k in range(count):
                out[to + k] = raw[at + k]
            at += count
        else:
            count = control >> 5
            if count == 7:
                if at >= n:
                    return -1
                count += np.int64(raw[at])
                at += 1
            if at >= n:
                return -1
            origin = to - ((control & 31) << 8) - np.int64(raw[at]) - 1
            at += 1
            count += 2
            if origin < 0 or to + count > size:
                return -1
            for k in range(count):  # byte by byte, because source and target may overlap
                out[to + k] = out[origin + k]
        to += count
    return to
