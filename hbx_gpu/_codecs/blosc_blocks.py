"""Decode single blocks of a blosc chunk, so that random rows need not pay for the whole chunk.

A chunk of c-blosc 1 has 16 bytes of header, then the start of each block, then the blocks. A run of
consecutive blocks after a header of its own is a smaller chunk of the same format, which the library decodes.
"""

from __future__ import annotations

import numpy as np
from numcodecs import blosc

from hbx_gpu.errors import CorruptChunkError

_HEADER = 16
_STORED = 2  # flag: the blocks are not compressed, and lie one after the other


class BloscBlocks:
    """The blocks of one chunk.

    Parameters
    ----------
    raw
        uint8, (n,). The whole stored chunk.
    nbytes
        Size of the decoded chunk in bytes, according to the array's metadata.

    Attributes
    ----------
    block
        Bytes of a decoded block; the last one of a chunk may be shorter.
    n_blocks
        Number of blocks.

    Raises
    ------
    CorruptChunkError
        The header contradicts itself, the length of the stored chunk, or `nbytes`.
    """

    def __init__(self, raw: np.ndarray, nbytes: int) -> None:
        if len(raw) < _HEADER:
            raise CorruptChunkError(f"blosc chunk of {len(raw)} bytes is shorter than its header")
        self._raw, self._nbytes = raw, nbytes
        self._stored = bool(raw[2] & _STORED)
        decoded, block, length = np.frombuffer(raw[4:_HEADER].tobytes(), "<u4").tolist()
        if length != len(raw) or decoded != nbytes:
            raise CorruptChunkError(
                f"blosc chunk of {len(raw)} bytes for {nbytes} decoded ones; its header says {length} and "
                f"{decoded}"
            )
        if not 0 < block <= max(nbytes, 1) or (self._stored and len(raw) != _HEADER + nbytes):
            raise CorruptChunkError(f"blosc blocks of {block} bytes in a chunk of {nbytes}")
        self.block, self.n_blocks = block, -(-nbytes // block)
        if not self._stored:
            self._starts, self._ends = self._read_places()

    def _read_places(self) -> tuple[np.ndarray, np.ndarray]:
        """Return the first byte of each block and where each block ends, int64, (n_blocks,) each.

        A writer with several threads stores blocks in the order in which they were finished; a block ends
        where the next one in the file begins.
        """
        table = _HEADER + 4 * self.n_blocks
        if table > len(self._raw):
            raise CorruptChunkError(f"blosc chunk of {len(self._raw)} bytes ends inside its block starts")
        starts = np.frombuffer(self._raw[_HEADER:table].tobytes(), "<i4").astype(np.int64)
        if (starts < table).any() or (starts >= len(self._raw)).any():
            raise CorruptChunkError(f"a blosc block starts outside its chunk of {len(self._raw)} bytes")
        borders = np.append(np.sort(starts), len(self._raw))
        return starts, borders[np.searchsorted(borders, starts, "right")]

    def decode(self, first: int, last: int, out: np.ndarray) -> None:
        """Decode the blocks ``[first, last)`` to their places in `out`.

        Parameters
        ----------
        first, last
            Range of block numbers.
        out
            Output: uint8, (nbytes,). Only the bytes of these blocks are written.

        Raises
        ------
        CorruptChunkError
            A block does not decode.
        """
        if self.n_blocks > 1 and first == self.n_blocks - 1:
            first -= 1  # blosc does not decode a short last block alone
        begin, end = first * self.block, min(last * self.block, self._nbytes)
        if self._stored:
            out[begin:end] = self._raw[_HEADER + begin : _HEADER + end]
            return
        n = last - first
        starts, ends = self._starts[first:last].tolist(), self._ends[first:last].tolist()
        places = np.cumsum([_HEADER + 4 * n, *(e - s for s, e in zip(starts, ends, strict=True))]).tolist()
        frame = np.empty(places[-1], np.uint8)
        frame[:4] = self._raw[:4]
        frame[4:_HEADER].view("<u4")[:] = end - begin, min(self.block, end - begin), len(frame)
        frame[_HEADER : places[0]].view("<i4")[:] = places[:-1]
        for place, start, stop in zip(places, starts, ends, strict=False):
            frame[place : place + stop - start] = self._raw[start:stop]
        try:
            blosc.decompress(frame, out[begin:end])
        except (RuntimeError, ValueError) as error:
            raise CorruptChunkError(f"blosc cannot decode blocks {first} to {last - 1}: {error}") from error
