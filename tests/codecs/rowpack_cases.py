"""Material of the rowpack tests: arrays that reach every corner, damaged chunks, the published vectors.

``python -m tests.codecs.rowpack_cases`` writes rowpack_vectors.json anew; ``--fuzz N`` compares the decoders
on N damaged chunks.
"""

from __future__ import annotations

import json
import struct
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import google_crc32c
import numpy as np

from hbx_gpu._codecs import decode_rowpack, decode_rowpack_reference, encode_rowpack_reference
from hbx_gpu.errors import CorruptChunkError

VECTORS = Path(__file__).with_name("rowpack_vectors.json")
DTYPES = ("u1", "u2", "u4", "u8")


def varied(rng: np.random.Generator, n: int, dtype: str, shape: str) -> np.ndarray:
    """n values whose widths change from block to block, with outliers; `shape` says how they run."""
    bits = 8 * np.dtype(dtype).itemsize
    widths = np.repeat(rng.integers(0, bits + 1, n // 128 + 1), 128)[:n]
    outlier = rng.random(n) < rng.choice([0, 0.02, 0.1, 0.4])
    # Each outlier up to so many bits wider: every width of high parts occurs.
    widths = np.where(outlier, np.minimum(widths + rng.integers(0, rng.integers(1, 34), n), bits), widths)
    values = rng.integers(0, 2**64, n, dtype=np.uint64, endpoint=False)
    values = np.where(widths == 0, 0, values >> np.uint64(64) - np.maximum(widths, 1).astype(np.uint64))
    if shape == "wrapping":
        values = np.cumsum(values, dtype=np.uint64)
    elif shape == "rows":
        top = min(2**bits, int(rng.integers(2, 40_000)))
        parts = [np.sort(rng.integers(0, top, rng.integers(0, 300))) for _ in range(n // 100 + 1)]
        values = np.resize(np.concatenate([*parts, [0]]), n)
    elif shape == "equal":
        values = np.full(n, values[0] if n else 0)
    elif shape == "extreme":
        values = rng.choice(np.array([0, 1, 2**bits - 1], np.uint64), n)
    return values.astype(dtype)


SHAPES = ("plain", "wrapping", "rows", "equal", "extreme")


def seal(chunk: bytearray | bytes) -> bytes:
    """The chunk with length and checksum put right, so that decoders look at the rest."""
    chunk = bytearray(chunk)
    if len(chunk) >= 40:
        struct.pack_into("<I", chunk, 24, len(chunk))
        struct.pack_into("<I", chunk, len(chunk) - 4, google_crc32c.value(bytes(chunk[:-4])))
    return bytes(chunk)


def damaged(rng: np.random.Generator) -> Iterator[bytes]:
    """Chunks with a few bytes altered, cut or added, most with a right checksum."""
    sizes = [0, 1, 100, 128, 129, 400, 1_024, 1_100]
    while True:
        values = varied(rng, int(rng.choice(sizes)), str(rng.choice(DTYPES)), str(rng.choice(SHAPES)))
        good = encode_rowpack_reference(values, str(rng.choice(["none", "gaps"])))
        for _ in range(8):
            chunk = bytearray(good)
            for _ in range(rng.integers(1, 4)):
                # Header and directory are the interesting part.
                end = min(len(chunk), 32 + 96) if rng.random() < 0.6 else len(chunk)
                at = int(rng.integers(0, end))
                chunk[at] = rng.choice(
                    [int(rng.integers(0, 256)), int(chunk[at]) ^ 1, (int(chunk[at]) + 1) % 256, 0]
                )
            if rng.random() < 0.1:
                chunk = chunk[: rng.integers(0, len(chunk) + 1)]
            if rng.random() < 0.1:
                chunk += bytes(rng.integers(0, 256, rng.integers(1, 40), dtype=np.uint8))
            yield seal(chunk) if rng.random() < 0.9 else bytes(chunk)


def outcome(decode: Any, chunk: bytes, *, check: bool) -> tuple[str, bytes] | None:
    """dtype and bytes of what a decoder makes of a chunk; None where it refuses."""
    try:
        values = decode(chunk, check=check)
    except CorruptChunkError:
        return None
    return values.dtype.str, values.tobytes()


def fuzz(seed: int, n: int) -> tuple[int, int]:
    """Both decoders must refuse, or decode alike, n damaged chunks; returns (decoded, refused)."""
    rng = np.random.default_rng(seed)
    decoded = 0
    for number, chunk in zip(range(n), damaged(rng), strict=False):
        check = bool(number % 4)
        fast = outcome(decode_rowpack, chunk, check=check)
        plain = outcome(decode_rowpack_reference, chunk, check=check)
        assert fast == plain, f"seed {seed}, chunk {number}, check {check}: {chunk.hex()}"
        decoded += fast is not None
    return decoded, n - decoded


def _good_cases() -> Iterator[tuple[str, str, np.ndarray]]:
    rng = np.random.default_rng(7)
    yield "empty", "none", np.array([], np.uint32)
    yield "empty gaps", "gaps", np.array([], np.uint16)
    yield "one value", "none", np.array([41], np.uint8)
    yield "worked example", "gaps", worked_example()
    yield "all equal", "none", np.full(130, 7, np.uint16)
    counts = rng.geometric(0.4, 200).astype(np.uint32)
    counts[[3, 60, 150]] = 300, 70_000, 2**32 - 1
    yield "counts with exceptions", "none", counts
    rows = [np.sort(rng.choice(300, 30, replace=False)) for _ in range(9)]
    yield "rows with resets", "gaps", np.concatenate(rows).astype(np.uint16)
    wide = np.arange(140, dtype=np.uint64) * np.uint64(3)
    wide[[5, 131]] = 2**40, 2**64 - 1
    yield "uint64 above 32 bits", "none", wide
    yield "uint64 at full width", "none", rng.integers(0, 2**64, 128, dtype=np.uint64)
    yield "two records", "gaps", np.cumsum(rng.integers(0, 9, 1_100)).astype(np.uint32)


def worked_example() -> np.ndarray:
    """The column indices of docs/format.md: two rows, one wide gap in the first."""
    return np.concatenate([np.arange(0, 40, 2), [5_000, 5_001], np.arange(3, 15)]).astype(np.uint16)


def _bad_cases() -> Iterator[tuple[str, bytes]]:
    good = encode_rowpack_reference(worked_example(), "gaps")

    def changed(at: int, value: int, *, sealed: bool = True) -> bytes:
        chunk = bytearray(good)
        assert chunk[at] != value
        chunk[at] = value
        return seal(chunk) if sealed else bytes(chunk)

    patch = struct.unpack_from("<I", good, 12)[0]
    yield "no bytes", b""
    yield "shorter than header and tail", good[:39]
    yield "last byte cut off", good[:-1]
    yield "a byte added", good + b"\0"
    yield "a payload bit flipped, checksum left", changed(patch - 1, good[patch - 1] ^ 0x80, sealed=False)
    yield "magic", changed(0, 0x49)
    yield "version 2", changed(4, 2)
    yield "element size 3", changed(5, 3)
    yield "transform 2", changed(6, 2)
    yield "gaps without bases", changed(7, 0)
    yield "bases wider than elements", changed(7, 4)
    yield "more values than the directory covers", changed(9, 4)
    yield "more values than 2**28", changed(11, 0x20)
    yield "patches before the payload", changed(12, 0x10)
    yield "patches behind the end", changed(13, 0x7F)
    yield "minimum with gaps", changed(16, 1)
    yield "header's reserved bytes", changed(28, 1)
    yield "payload of the first record not at its start", changed(32, 1)
    yield "patches of the first record not at their start", changed(36, 1)
    yield "width above the element's", changed(40, 17)
    yield "payload beyond its area", changed(40, 5)
    yield "payload shorter than its area", changed(40, 1)
    yield "an exception too many", changed(48, good[48] + 1)
    yield "exceptions at full width", _full_width_with_exceptions()
    yield "a reset too many", changed(56, 2)
    yield "unused place of a record", changed(41, 1)
    yield "unused base", changed(66, 1)
    yield "exception beyond the block", changed(patch, 128)
    yield "reset at the block's first value", changed(patch + 1, 0)
    yield "reset beyond the block", changed(patch + 1, 128)
    yield "bytes before the checksum", changed(len(good) - 8, 1)
    plain = bytearray(encode_rowpack_reference(np.array([9, 9], np.uint8)))
    plain[17] = 1
    yield "minimum wider than the element", seal(plain)
    plain = bytearray(encode_rowpack_reference(np.array([9, 9], np.uint8)))
    assert struct.unpack_from("<I", plain, 12)[0] == 64
    plain[60] = 1
    yield "padding behind the directory", seal(plain)
    unordered = bytearray(encode_rowpack_reference(np.tile(np.r_[np.zeros(63), 255], 2).astype(np.uint8)))
    start = struct.unpack_from("<I", unordered, 12)[0]
    unordered[start], unordered[start + 1] = unordered[start + 1], unordered[start]
    yield "positions out of order", seal(unordered)


def _full_width_with_exceptions() -> bytes:
    """One block of 8-bit values at width 8 that lists an exception of one bit."""
    chunk = bytearray(encode_rowpack_reference(np.arange(128, dtype=np.uint8) * 2))
    assert chunk[40] == 8
    chunk[48] = 1
    return seal(chunk[:-8] + b"\0\0" + chunk[-8:])


def make_vectors() -> dict[str, Any]:
    """The content of rowpack_vectors.json."""
    good = [
        {
            "name": name,
            "dtype": values.dtype.name,
            "transform": transform,
            "values": values.tolist(),
            "chunk": encode_rowpack_reference(values, transform).hex(),
        }
        for name, transform, values in _good_cases()
    ]
    bad = [{"reason": reason, "chunk": chunk.hex()} for reason, chunk in _bad_cases()]
    return {"format": "hbx_gpu.rowpack version 1", "good": good, "malformed": bad}


if __name__ == "__main__":
    if sys.argv[1:2] == ["--fuzz"]:
        print(*fuzz(0, int(sys.argv[2])))
    else:
        VECTORS.write_text(json.dumps(make_vectors(), indent=1) + "\n")
