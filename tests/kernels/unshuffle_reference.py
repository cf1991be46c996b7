"""What c-blosc's shuffles do to a block, in NumPy, and the launches that undo them."""

from __future__ import annotations

from typing import Any

import numpy as np

from hbx_gpu._engine.device.records import BLOCK

NONE, BYTES, BITS = range(3)


def shuffled(data: np.ndarray, typesize: int, shuffle: int) -> np.ndarray:
    """A block as c-blosc rearranges it before it compresses it."""
    n = len(data) // typesize
    if shuffle == NONE or (shuffle == BITS and n % 8):
        return data.copy()
    whole = data[: n * typesize].reshape(n, typesize)
    if shuffle == BYTES:
        moved = whole.T
    else:
        # (typesize, 8 bits, n): bits of one weight of all elements, packed with the first element lowest.
        bits = np.unpackbits(whole.T[:, None, :], axis=1, bitorder="little")
        moved = np.packbits(bits, axis=2, bitorder="little")
    return np.concatenate([moved.ravel(), data[n * typesize :]])


def unshuffle(
    launcher: Any, arena: np.ndarray, blocks: np.ndarray, *, slices: int = 1, grid: int = 3, threads: int = 64
) -> tuple[np.ndarray, int]:
    """Run unshuffle_blocks over an arena; returns (status of each block, any)."""
    status, any_ = np.zeros(max(1, len(blocks)), np.uint32), np.zeros(1, np.uint32)
    launcher.run(
        "unshuffle_blocks",
        grid,
        threads,
        [arena, np.uint64(len(arena)), blocks, np.uint32(len(blocks)), np.uint32(slices), status, any_],
    )
    return status[: len(blocks)], int(any_[0])


def block(from_: int, to: int, nbytes: int, typesize: int = 1, shuffle: int = NONE) -> np.ndarray:
    """One HbxBlock."""
    return np.array([(from_, to, nbytes, typesize, shuffle, 0)], BLOCK)
