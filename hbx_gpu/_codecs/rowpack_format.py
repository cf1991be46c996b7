"""The layout of a hbx_gpu.rowpack chunk: constants, header, and where areas lie; see docs/format.md."""

from __future__ import annotations

import struct
from dataclasses import dataclass

from hbx_gpu._codecs.bitpacking_format import BytesLike, as_bytes
from hbx_gpu._codecs.checksum import crc32c
from hbx_gpu.errors import CorruptChunkError

BLOCK = 128
"""Values per block."""


RECORD_BLOCKS = 8
"""Blocks per directory record."""


MAGIC = b"HBRP"


VERSION = 1


HEADER = struct.Struct("<4sBBBBIIQII")


TAIL_BYTES = 8
"""Four zeros and the CRC32C end a chunk, so that loading 8 bytes from any byte of a patch stays inside it."""


PATCH_BITS = (1, 2, 3, 4, 6, 8, 16, 32)
"""Widths in bits that the high part of an exception may have; the directory stores an index into these."""


MAX_EXCEPTIONS = 31


MAX_VALUES = 1 << 28
"""Most values per chunk; with this many, no offset exceeds 32 bits whatever the values are."""


TRANSFORMS = {"none": 0, "gaps": 1}


ELEMENT_SIZES = (1, 2, 4, 8)


@dataclass(frozen=True, slots=True)
class ChunkHeader:
    """The first 32 bytes of a chunk, and the offsets of areas that follow from them."""

    element_size: int
    transform: int
    base_bytes: int
    n: int
    patch_start: int
    minimum: int
    nbytes: int

    @property
    def n_blocks(self) -> int:
        """Number of blocks of the chunk, including a partial one."""
        return -(-self.n // BLOCK)

    @property
    def record_bytes(self) -> int:
        """Bytes of one directory record."""
        return record_bytes(self.transform, self.base_bytes)

    @property
    def directory_end(self) -> int:
        """Offset after the last directory record."""
        return HEADER.size + -(-self.n_blocks // RECORD_BLOCKS) * self.record_bytes

    @property
    def payload_start(self) -> int:
        """Offset of the payload area: the end of the directory, rounded up to 16."""
        return -(-self.directory_end // 16) * 16

    @property
    def patch_end(self) -> int:
        """Offset after the patches."""
        return self.nbytes - TAIL_BYTES


@dataclass(frozen=True, slots=True)
class Block:
    """Entry of one block in the directory."""

    payload_at: int
    patch_at: int
    width: int
    exceptions: int
    high_bits: int
    resets: int
    base: int

    @property
    def patch_bytes(self) -> int:
        """Bytes of the block's patches: a byte per exception and per reset, then the packed high parts."""
        return self.exceptions + self.resets + -(-self.exceptions * self.high_bits // 8)


def record_bytes(transform: int, base_bytes: int) -> int:
    """Return the bytes of a record: two offsets, 8 widths, 8 infos; for gaps also 8 resets and 8 bases."""
    return 24 if transform == TRANSFORMS["none"] else 32 + RECORD_BLOCKS * base_bytes


def read_header(chunk: BytesLike, *, check: bool = True) -> ChunkHeader:
    """Parse and check the header.

    Parameters
    ----------
    chunk
        The whole chunk.
    check
        Whether to verify the chunk's checksum.

    Raises
    ------
    CorruptChunkError
        No encoder writes such a header, or the bytes do not match their checksum.
    """
    data = as_bytes(chunk)
    if len(data) < HEADER.size + TAIL_BYTES:
        raise CorruptChunkError(
            f"{len(data)} bytes are not a rowpack chunk, which takes {HEADER.size + TAIL_BYTES} or more"
        )
    magic, version, size, transform, base_bytes, n, patch_start, minimum, nbytes, reserved = HEADER.unpack(
        data[: HEADER.size].tobytes()
    )
    if magic != MAGIC:
        raise CorruptChunkError(f"bytes 0..3 are {magic!r}, a rowpack chunk begins with {MAGIC!r}")
    if version != VERSION:
        raise CorruptChunkError(f"rowpack version {version}; this release reads version {VERSION}")
    if nbytes != len(data):
        raise CorruptChunkError(f"the header says {nbytes} bytes, the chunk has {len(data)}")
    if check:
        stored, found = int.from_bytes(data[-4:].tobytes(), "little"), crc32c(data[:-4])
        if stored != found:
            raise CorruptChunkError(f"CRC32C is {found:#010x}, {stored:#010x} is stored")
    header = ChunkHeader(size, transform, base_bytes, n, patch_start, minimum, nbytes)
    _check_header(header, reserved)
    return header


def _check_header(header: ChunkHeader, reserved: int) -> None:
    gaps = header.transform == TRANSFORMS["gaps"]
    if header.element_size not in ELEMENT_SIZES or header.transform not in TRANSFORMS.values():
        raise CorruptChunkError(f"element size {header.element_size}, transform {header.transform}")
    if header.base_bytes not in ([s for s in ELEMENT_SIZES if s <= header.element_size] if gaps else [0]):
        raise CorruptChunkError(f"{header.base_bytes} bytes per base")
    if header.n > MAX_VALUES:
        raise CorruptChunkError(f"{header.n} values; a chunk holds {MAX_VALUES} at most")
    if header.minimum >= (1 if gaps else 1 << 8 * header.element_size):
        raise CorruptChunkError(f"minimum {header.minimum} with elements of {header.element_size} bytes")
    if reserved:
        raise CorruptChunkError("reserved bytes 28..31 are not zero")
    if not header.payload_start <= header.patch_start <= header.patch_end:
        raise CorruptChunkError(
            f"{header.n} values have a directory up to {header.payload_start}, but the patches start at "
            f"{header.patch_start} of {header.nbytes}"
        )


def transform_code(transform: str) -> int:
    """The transform byte of a transform's name."""
    if not isinstance(transform, str) or transform not in TRANSFORMS:
        raise ValueError(f"unknown rowpack transform {transform!r}; known: {', '.join(TRANSFORMS)}")
    return TRANSFORMS[transform]
