"""Damage: what storage, copies and people do to bytes."""

from __future__ import annotations

import numpy as np

_NUMBERS = (
    0,
    1,
    0x7F,
    0x80,
    0xFF,
    0x7FFF,
    0x7FFFFFFF,
    0x80000000,
    0xFFFFFFFF,
    1 << 40,
    1 << 62,
    (1 << 64) - 1,
)


def damaged(rng: np.random.Generator, whole: bytes) -> bytes:
    """Another content than `whole`, by one of the common accidents."""
    if not whole:
        return bytes([int(rng.integers(256))])
    data = bytearray(whole)
    n = len(data)
    at = int(rng.integers(n))
    length = int(min(n - at, rng.choice([1, 2, 4, 8, 64, 4096])))
    kind = int(rng.integers(8))
    if kind <= 2:
        data[at] ^= 1 << int(rng.integers(8))
    elif kind == 3:
        data[at] = int(rng.integers(256))
    elif kind == 4:
        del data[at : n if rng.random() < 0.5 else at + length]
    elif kind == 5:
        data[at : at + length] = bytes(length)
    elif kind == 6:
        number = int(rng.choice(np.array(_NUMBERS, np.uint64)))
        width = int(rng.choice([2, 4, 8]))
        data[at : at + width] = (number & ((1 << 8 * width) - 1)).to_bytes(width, "little")
    else:
        other = int(rng.integers(n))
        data[at:at] = data[other : other + length]
    return bytes(data) if bytes(data) != whole else damaged(rng, whole)
