"""Bring chunks from object storage into the cache on the local disk, before anybody needs them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from hbx_gpu._storage.choice import open_reader
from hbx_gpu._storage.chunks import ChunkDirectory, Extents
from hbx_gpu._storage.remote import RemoteReader
from hbx_gpu.errors import UnsupportedError

_PIECE = 64 << 20  # bytes of chunks that are fetched at once
_LOOKED_UP = 1 << 16  # chunks whose places are looked up at once


@dataclass(frozen=True, slots=True)
class Prefetched:
    """What a query needs, and what came for it.

    Attributes
    ----------
    chunks, nbytes
        Chunks of the query, and their stored bytes.
    moved
        Bytes that came from object storage; less where the cache had chunks already.
    """

    chunks: int
    nbytes: int
    moved: int


def prefetch(
    directory: ChunkDirectory, chunks: np.ndarray, advance: Callable[[int], object] = lambda _: None
) -> Prefetched:
    """Bring chunks into the cache that was chosen where the data were opened.

    Parameters
    ----------
    directory
        Where the chunks lie.
    chunks
        int64. Their numbers.
    advance
        Called with bytes that are in the cache by then.

    Raises
    ------
    UnsupportedError
        The data are on a local disk, no cache was chosen, or the cache is smaller than the chunks.
    """
    with open_reader("mmap", directory) as reader:
        if not isinstance(reader, RemoteReader):
            raise UnsupportedError("these data are on a local disk already: there is nothing to prefetch")
        if reader.cache is None:
            raise UnsupportedError("no cache was chosen where these data were opened: pass cache='DIR' there")
        chunks = np.unique(chunks)
        wanted = moved = 0
        for first in range(0, len(chunks), _LOOKED_UP):
            extents = directory.extents(chunks[first : first + _LOOKED_UP])
            nbytes = np.maximum(extents.nbytes, 0)
            pieces = np.flatnonzero(np.diff(np.cumsum(nbytes) // _PIECE)) + 1
            for part in np.split(np.arange(len(extents)), pieces):
                mine = int(nbytes[part].sum())
                wanted += mine
                if wanted > reader.cache.most:
                    raise UnsupportedError(
                        f"the cache in {reader.cache.folder} may take {reader.cache.most:,} bytes, and this "
                        "query needs more: it would push out its own chunks. Allow more, or take fewer cells"
                    )
                moved += reader.bring(Extents(extents.file[part], extents.offset[part], extents.nbytes[part]))
                advance(mine)
        return Prefetched(len(chunks), wanted, moved)
