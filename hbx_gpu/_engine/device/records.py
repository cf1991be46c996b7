"""The records that host and kernels share, as NumPy sees them: layouts, element types, sizes.

Field for field what `kernels/hbx.cuh` declares; a test compares the two texts.
"""

from __future__ import annotations

import numpy as np

from hbx_gpu._advice import option
from hbx_gpu.errors import UnsupportedError

RUN = np.dtype(
    [
        ("records", "<u8"),
        ("payload", "<u8"),
        ("patches", "<u8"),
        ("minimum", "<u8"),
        ("first_record", "<u4"),
        ("n_records", "<u4"),
        ("payload_begin", "<u4"),
        ("payload_units", "<u4"),
        ("patch_begin", "<u4"),
        ("patch_bytes", "<u4"),
        ("n", "<u4"),
        ("element_size", "u1"),
        ("transform", "u1"),
        ("base_bytes", "u1"),
        ("unused", "u1"),
    ]
)
PIECE = np.dtype(
    [
        ("out", "<u8"),
        ("run", "<u4"),
        ("skip", "<u4"),
        ("count", "<u4"),
        ("source", "<u4"),
        ("role", "<u4"),
        ("unused", "<u4"),
    ]
)
PLAIN = np.dtype(
    [
        ("data", "<u8"),
        ("out", "<u8"),
        ("count", "<u4"),
        ("source", "<u4"),
        ("role", "<u4"),
        ("type", "<u4"),
    ]
)
OUTPUT = np.dtype([("address", "<u8"), ("elements", "<u8"), ("type", "<u4"), ("unused", "<u4")])
PACKED = np.dtype(
    [
        ("data", "<u8"),
        ("out", "<u8"),
        ("nbytes", "<u4"),
        ("n_words", "<u4"),
        ("first_word", "<u4"),
        ("last_word", "<u4"),
    ]
)
SOURCE = np.dtype([("remap_start", "<u8"), ("remap_length", "<u4"), ("identity", "<u4")])
SEGMENT = np.dtype(
    [
        ("index_piece", "<u4"),
        ("value_piece", "<u4"),
        ("index_skip", "<u4"),
        ("value_skip", "<u4"),
        ("count", "<u4"),
        ("unused", "<u4"),
    ]
)
BLOCK = np.dtype(
    [
        ("from", "<u8"),
        ("to", "<u8"),
        ("nbytes", "<u4"),
        ("typesize", "<u4"),
        ("shuffle", "<u4"),
        ("unused", "<u4"),
    ]
)
ARRAY = np.dtype([("first_chunk", "<u8"), ("elements", "<u4"), ("n_chunks", "<u4")])
COLUMN = np.dtype([("data", "<u8"), ("at", "<u4"), ("size", "<u4")])
RECORDS = {
    "HbxRun": RUN,
    "HbxPiece": PIECE,
    "HbxPlain": PLAIN,
    "HbxOutput": OUTPUT,
    "HbxPacked": PACKED,
    "HbxSource": SOURCE,
    "HbxSegment": SEGMENT,
    "HbxBlock": BLOCK,
    "HbxArray": ARRAY,
    "HbxColumn": COLUMN,
}
"""Name in `kernels/hbx.cuh` -> dtype."""
SIZES = {"HbxRun": 64, "HbxPiece": 32, "HbxPlain": 32, "HbxOutput": 24, "HbxPacked": 32, "HbxSource": 16,
         "HbxSegment": 24, "HbxBlock": 32, "HbxArray": 16, "HbxColumn": 16}  # fmt: skip
assert {name: dtype.itemsize for name, dtype in RECORDS.items()} == SIZES

ELEMENT_TYPES = {
    "uint8": 0,
    "uint16": 1,
    "uint32": 2,
    "uint64": 3,
    "int8": 4,
    "int16": 5,
    "int32": 6,
    "int64": 7,
    "float16": 8,
    "float32": 9,
    "float64": 10,
    "bfloat16": 11,
}
"""Name of a dtype -> number of the element type in records."""
BOOL = np.dtype(bool)


def element_type(dtype: np.dtype, name: str) -> int:
    """Number of a dtype in records; bool counts as uint8, which is what it is stored as.

    Raises
    ------
    UnsupportedError
        No kernel takes it; `name` says whose dtype it is.
    """
    number = ELEMENT_TYPES.get("uint8" if dtype == BOOL else dtype.name)
    if number is None:
        raise UnsupportedError(
            f"{name} has dtype {dtype}, which cannot be decoded on a device (it can be: "
            f"{', '.join(ELEMENT_TYPES)}); read it with {option('device', 'cpu')}"
        )
    return number
