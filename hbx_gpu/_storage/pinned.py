"""Reader that uses ``preadv`` to read what a plan needs of its chunks straight into staging memory.

Files are mapped only to look at the directories inside chunks. On storage with a high latency, this reader
asks for large ranges from many threads, where touching mapped pages would ask for one page after the other.
"""

from __future__ import annotations

from functools import partial

import numpy as np

from hbx_gpu._storage.chunks import ChunkDirectory, Extents
from hbx_gpu._storage.readers import MAX_GAP, MmapReader, PreadReader, Slab

_MAX_RANGES = 500  # a call takes 1,024 pieces of memory, and every range may have a gap before it


class PinnedReader(PreadReader):
    """Reader whose slabs map files to find what is needed; `Slab.copy` reads it into memory of the caller."""

    def __init__(self, directory: ChunkDirectory) -> None:
        super().__init__(directory)
        self._mapped = MmapReader(directory)

    def __reduce__(self) -> tuple[object, ...]:
        return (PinnedReader, (self.directory,))

    def read(self, extents: Extents) -> Slab:
        """See :class:`Reader`."""
        slab = self._mapped.read(extents)
        return Slab(slab.address, slab.nbytes, slab.owner, partial(self._fill, extents, slab))

    def close(self) -> None:
        """See :class:`Reader`."""
        self._mapped.close()
        super().close()

    def _fill(self, extents: Extents, slab: Slab, ranges: np.ndarray, target: np.ndarray) -> None:
        """Read ranges of a slab to their places in `target`, neighboring ones in one call."""
        if not len(ranges):
            return
        chunk = np.argsort(slab.address, kind="stable")
        chunk = chunk[np.searchsorted(slab.address[chunk], ranges["source"], side="right") - 1]
        file = extents.file[chunk]
        begin = extents.offset[chunk] + (ranges["source"] - slab.address[chunk]).astype(np.int64)
        order = np.lexsort((begin, file))
        file, begin = file[order], begin[order]
        end = begin + ranges["nbytes"][order].astype(np.int64)
        place = ranges["target"][order].astype(np.int64)
        gap = begin - np.concatenate(([0], end[:-1]))
        # A range that overlaps the one before it (a row asked for twice) begins another call.
        apart = (np.diff(file, prepend=-1) != 0) | (gap < 0) | (gap > MAX_GAP)
        apart[::_MAX_RANGES] = True
        first = np.flatnonzero(apart)
        passed, memory = memoryview(bytearray(MAX_GAP)), target.data
        for a, b in zip(first.tolist(), [*first[1:].tolist(), len(order)], strict=True):
            vectors: list[memoryview] = []
            for k in range(a, b):
                if k > a and gap[k]:
                    vectors.append(passed[: int(gap[k])])
                vectors.append(memory[int(place[k]) : int(place[k] + end[k] - begin[k])])
            descriptor = self._open(extents, int(file[a]))
            if not descriptor.read(vectors, int(begin[a])):
                raise self._too_short(extents, int(file[a]), descriptor.size())
