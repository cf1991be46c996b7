"""Reads a whole array the way the engine would: directory, reader, codec."""

from __future__ import annotations

import itertools
from collections.abc import Callable

import numpy as np
import pytest

from hbx_gpu._codecs.chain import ChunkCodec
from hbx_gpu._storage import ChunkDirectory, Reader
from hbx_gpu._storage.chunks import chunk_grid


def _assemble(directory: ChunkDirectory, array: int, reader: Reader) -> np.ndarray:
    """The whole array, pasted together from its chunks."""
    layout = directory.layouts[array]
    codec = ChunkCodec(layout)
    grid = chunk_grid(layout)
    padded = tuple(n * c for n, c in zip(grid, layout.chunk_shape, strict=True))
    out = np.full(padded, layout.fill_value, layout.dtype)
    ids = np.arange(directory.base[array], directory.base[array + 1])
    slab = reader.read(directory.extents(ids))
    for i, where in enumerate(itertools.product(*map(range, grid))):
        if slab.nbytes[i] >= 0:
            place = tuple(slice(w * c, (w + 1) * c) for w, c in zip(where, layout.chunk_shape, strict=True))
            chunk = codec.decode(slab.view(i))
            assert chunk.shape == layout.chunk_shape
            assert chunk.dtype == layout.dtype
            assert chunk.flags.c_contiguous
            out[place] = chunk
    return out[tuple(slice(n) for n in layout.shape)]


@pytest.fixture(scope="session")
def assemble() -> Callable[[ChunkDirectory, int, Reader], np.ndarray]:
    return _assemble
