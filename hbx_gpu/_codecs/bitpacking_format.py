"""Constants of the homeobox.bitpacking stream, and the status codes that its decoder returns."""

from __future__ import annotations

from typing import TypeAlias

import numpy as np

BytesLike: TypeAlias = bytes | bytearray | memoryview | np.ndarray


HEADER_BYTES = 5


BLOCK = 128


LANES = 4


ROWS = BLOCK // LANES


TRANSFORMS = {"none": 0, "delta": 1, "delta_zigzag": 2}


MAX_WORDS = 2**32 - 1


# Status of a decoder: a code in the low byte, a detail (an offset or a count) above it. Kernels cannot raise;
# one int64 that they return still tells the caller what went wrong and where.
OK = 0


SHORT_HEADER = 1


UNKNOWN_TRANSFORM = 2


WRONG_COUNT = 3


WIDE_BLOCK = 4


MISSING_WIDTH = 5


TRUNCATED_BLOCK = 6


BAD_REQUEST = 7


_REASONS = {
    OK: "decoded",
    SHORT_HEADER: "bitpacking header needs 5 bytes, the chunk holds {0}",
    UNKNOWN_TRANSFORM: "unknown bitpacking transform byte {0} at offset 0; known: 0, 1, 2",
    WRONG_COUNT: "bitpacking header at offset 1 promises {0} words, the metadata demand another number",
    WIDE_BLOCK: "bitpacking width byte at offset {0} is above 32",
    MISSING_WIDTH: "bitpacked data end at offset {0}, where a block's width byte is due",
    TRUNCATED_BLOCK: "bitpacked block with its width byte at offset {0} reaches beyond the end of the data",
    BAD_REQUEST: "decode request does not fit: want 0 <= first <= last <= expected <= len(out)",
}


def describe_status(status: int) -> str:
    """Return what a status of `bitpacking_numba.decode_into` means, in words and with the offset, if any."""
    return _REASONS.get(status & 0xFF, f"unknown bitpacking status {status}").format(status >> 8)


def as_bytes(data: BytesLike) -> np.ndarray:
    """Return the same memory as uint8, (nbytes,)."""
    return np.frombuffer(data, np.uint8)


def transform_code(transform: str) -> int:
    """The transform byte of a transform's name."""
    try:
        return TRANSFORMS[transform]
    except (KeyError, TypeError):
        raise ValueError(
            f"unknown bitpacking transform {transform!r}; known: {', '.join(TRANSFORMS)}"
        ) from None
