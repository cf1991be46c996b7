"""Explain the status words that kernels report for a piece or a chunk."""

from __future__ import annotations

BAD_RECORD = 1
BAD_WIDTH = 2
TRUNCATED = 4
BAD_PATCH = 8
BAD_COLUMN = 16
BAD_HEADER = 32
BAD_PLACE = 64
NOT_COUNTS = 128
BAD_STREAM = 256

_REASONS = {
    BAD_RECORD: "the directory points outside the payload or patches of the blocks that were asked for",
    BAD_WIDTH: "a block has a width above that of its elements, or exceptions although its width is full",
    TRUNCATED: "a block reaches beyond the end of the data",
    BAD_PATCH: "positions of exceptions or resets do not ascend within their block",
    BAD_HEADER: "the bitpacking header has an unknown transform, or another number of words than the "
    "metadata demand",
    BAD_STREAM: "a compressed stream does not decompress, or to another number of bytes than expected",
}


def describe_status(status: int) -> str:
    """Reason of the lowest bit of a status word that concerns the bytes of a chunk."""
    for bit, reason in _REASONS.items():
        if status & bit:
            return reason
    return f"unknown status {status:#x}"
