"""Find the compressed streams, stored bytes and shuffled blocks in a chunk of a general codec.

Nothing is decompressed here. Every offset and length is checked against the chunk and against the array's
metadata, so that a decompressor on the device can trust them. Formats: zstd frames (RFC 8878), gzip members
(RFC 1952), zlib streams (RFC 1950), LZ4 blocks after four bytes of length (numcodecs), and c-blosc 1.
"""

from __future__ import annotations

import math
import sys
from dataclasses import dataclass

import numpy as np

from hbx_gpu._codecs.chain import V2_CHAIN, check_crc32c
from hbx_gpu._source import ArrayLayout
from hbx_gpu.errors import CorruptChunkError

STREAM = np.dtype([("begin", "<i8"), ("nbytes", "<i8"), ("target", "<i8"), ("size", "<i8"), ("stored", "?")])
"""One stream: its first byte and its bytes in the chunk, the place and the size of its content in the
decompressed chunk, and whether the content is stored without compression."""
NO_SHUFFLE, BYTE_SHUFFLE, BIT_SHUFFLE = range(3)
ALGORITHMS = ("zstd", "lz4", "deflate")

_CONTAINERS = {"zstd": "zstd", "lz4": "lz4", "gzip": "gzip", "zlib": "zlib", "blosc": "blosc"}
_ZSTD_MAGIC = b"\x28\xb5\x2f\xfd"
_ZSTD_BLOCK = 128 << 10
_GZIP_CRC, _GZIP_EXTRA, _GZIP_NAME, _GZIP_COMMENT = 2, 4, 8, 16
_BLOSC_HEADER = 16
_BLOSC_SHUFFLE, _BLOSC_STORED, _BLOSC_BITSHUFFLE, _BLOSC_WHOLE = 1, 2, 4, 16
_BLOSC_FORMATS = {1: "lz4", 3: "zlib", 4: "zstd"}
_BLOSC_OTHERS = ("blosclz", "snappy")  # compressors inside blosc that no device decompressor takes
_BLOSC_MAX_SPLITS, _BLOSC_MIN_SPLIT = 16, 128


@dataclass(frozen=True, slots=True)
class Contents:
    """The streams of a chunk, and what to do after they are decompressed.

    Attributes
    ----------
    algorithm
        Compression algorithm of all streams that are not stored as they are: one of `ALGORITHMS`.
    streams
        The streams, of dtype `STREAM`, (n,). Their targets cover each byte of the decompressed chunk once.
    shuffle, typesize, block
        How the decompressed bytes were rearranged: `NO_SHUFFLE`, or in blocks of `block` bytes (the last one
        may be shorter) of elements of `typesize` bytes.
    """

    algorithm: str
    streams: np.ndarray
    shuffle: int = NO_SHUFFLE
    typesize: int = 1
    block: int = 0


@dataclass(frozen=True, slots=True)
class Compression:
    """A codec chain of one compressor, with or without a checksum over its output.

    Attributes
    ----------
    container
        Format of the compressed chunk: zstd, lz4, gzip, zlib or blosc.
    checksummed
        Whether a CRC32C of the compressed bytes follows them (codec crc32c after the compressor).
    nbytes
        Size of a decompressed chunk in bytes.
    """

    container: str
    checksummed: bool
    nbytes: int

    def open(self, data: np.ndarray) -> Contents | None:
        """Verify the checksum of a stored chunk, where there is one, and list its streams.

        Parameters
        ----------
        data
            uint8, (n,). The whole stored chunk.

        Returns
        -------
        Contents or None
            None for a form that is left to the codec's own decoder (several zstd frames, a frame without the
            length of its content, blosc with snappy, ...).

        Raises
        ------
        CorruptChunkError
            The checksum differs, or a header contradicts itself, the chunk's length, or the length that the
            metadata give.
        """
        raw = check_crc32c(data) if self.checksummed else data
        if self.container == "blosc":
            return _blosc(raw, self.nbytes)
        found = _stream(self.container, raw, self.nbytes)
        if found is None:
            return None
        algorithm, begin, nbytes = found
        return Contents(algorithm, np.array([(begin, nbytes, 0, self.nbytes, False)], STREAM))


def compression_of(layout: ArrayLayout) -> Compression | None:
    """Return the compression of an array whose elements are compressed in machine byte order.

    Returns None for any other chain (filters, several compressors, big-endian elements, Fortran order), and
    for blosc with a compressor inside that is always left to the codec's own decoder.
    """
    names = [codec["name"].removeprefix("numcodecs.") for codec in layout.codecs]
    settings = [codec.get("configuration") or {} for codec in layout.codecs]
    if layout.byte_offset is not None or not names or sys.byteorder != "little":
        return None
    if layout.table is not None and layout.table.skipped is not None:
        return None  # some chunks are not compressed
    nbytes = math.prod(layout.chunk_shape) * layout.dtype.itemsize
    if names == [V2_CHAIN]:
        chain = settings[0]
        as_is = np.dtype(chain["dtype"]) == layout.dtype and (
            chain["order"] == "C" or len(layout.chunk_shape) < 2
        )
        name = (chain["compressor"] or {}).get("id")
        if chain["filters"] or not as_is or name not in _CONTAINERS:
            return None
        if chain["compressor"].get("cname") in _BLOSC_OTHERS:
            return None
        return Compression(_CONTAINERS[name], False, nbytes)
    checksummed = layout.codecs[-1]["name"] == "crc32c"
    if checksummed:
        names = names[:-1]
    if len(names) != 2 or names[0] != "bytes" or names[1] not in _CONTAINERS:
        return None
    if layout.dtype.itemsize > 1 and settings[0].get("endian") != "little":
        return None
    if settings[1].get("cname") in _BLOSC_OTHERS:
        return None
    return Compression(_CONTAINERS[names[1]], checksummed, nbytes)


def _stream(container: str, raw: np.ndarray, size: int) -> tuple[str, int, int] | None:
    """Return (algorithm, first byte, bytes) of the only stream in a chunk or in a part of a blosc chunk."""
    if container == "zstd":
        return ("zstd", 0, len(raw)) if _is_zstd_frame(raw, size) else None
    if container == "lz4":
        stored = _number(raw, 0, 4, "lz4 length")
        if stored != size:
            raise CorruptChunkError(f"lz4 chunk of {stored} bytes, {size} expected")
        return "lz4", 4, _not_empty(len(raw) - 4, "lz4")
    if container == "gzip":
        return _gzip(raw, size)
    return _zlib(raw)


def _is_zstd_frame(raw: np.ndarray, size: int) -> bool:
    """Return whether the bytes are one zstd frame that gives the length of its content, and nothing else."""
    if raw[:4].tobytes() != _ZSTD_MAGIC:
        return False  # a skippable or legacy frame, or not a frame: left to the codec's own decoder
    descriptor = _number(raw, 4, 1, "zstd frame header")
    single, checksum = descriptor >> 5 & 1, descriptor >> 2 & 1
    if descriptor & 3 or descriptor & 8:  # a dictionary; the reserved bit
        return False
    at = 5 + (not single)
    width = (single, 2, 4, 8)[descriptor >> 6]
    if not width:
        return False
    content = _number(raw, at, width, "zstd frame header") + (256 if width == 2 else 0)
    if content != size:
        raise CorruptChunkError(f"zstd frame of {content} bytes, {size} expected")
    at += width
    last = False
    while not last:
        header = _number(raw, at, 3, "zstd block header")
        last, kind, nbytes = bool(header & 1), header >> 1 & 3, header >> 3
        if kind == 3 or nbytes > (size if kind == 1 else _ZSTD_BLOCK):
            raise CorruptChunkError(f"zstd block at byte {at} has type {kind} and {nbytes} bytes")
        at += 3 + (1 if kind == 1 else nbytes)
    at += 4 * checksum
    if at > len(raw):
        raise CorruptChunkError(f"zstd frame ends at byte {at} of a chunk of {len(raw)}")
    return at == len(raw)  # otherwise more frames or junk follow: left to the codec's own decoder


def _gzip(raw: np.ndarray, size: int) -> tuple[str, int, int] | None:
    if raw[:3].tobytes() != b"\x1f\x8b\x08":
        return None
    flags, at = _number(raw, 3, 1, "gzip header"), 10
    if flags & 0xE0:
        return None
    if flags & _GZIP_EXTRA:
        at += 2 + _number(raw, at, 2, "gzip header")
    for flag in (_GZIP_NAME, _GZIP_COMMENT):
        if flags & flag:
            ends = np.flatnonzero(raw[at:] == 0)
            if not len(ends):
                raise CorruptChunkError("gzip header does not end")
            at += int(ends[0]) + 1
    if flags & _GZIP_CRC:
        at += 2
    nbytes = _not_empty(len(raw) - 8 - at, "gzip")
    if _number(raw, len(raw) - 4, 4, "gzip length") != size % 2**32:
        return None  # several members, or damage: left to the codec's own decoder
    return "deflate", at, nbytes


def _zlib(raw: np.ndarray) -> tuple[str, int, int] | None:
    header = int.from_bytes(raw[:2].tobytes(), "big")
    if header >> 8 & 15 != 8 or header % 31 or header & 32:  # another method, damage, a dictionary
        return None
    return "deflate", 2, _not_empty(len(raw) - 6, "zlib")


def _blosc(raw: np.ndarray, size: int) -> Contents | None:
    version, version_inside, flags, typesize = (_number(raw, at, 1, "blosc header") for at in range(4))
    nbytes, block, stored = (_number(raw, at, 4, "blosc header") for at in (4, 8, 12))
    if stored != len(raw):
        raise CorruptChunkError(f"blosc chunk of {len(raw)} bytes, its header says {stored}")
    if nbytes != size:
        raise CorruptChunkError(f"blosc chunk of {nbytes} decoded bytes, {size} expected")
    container = _BLOSC_FORMATS.get(flags >> 5)
    if version != 2 or flags & 8 or typesize < 1:
        return None
    if flags & _BLOSC_STORED:
        if len(raw) != _BLOSC_HEADER + size:
            raise CorruptChunkError(f"blosc chunk stores {len(raw) - _BLOSC_HEADER} bytes, {size} expected")
        return Contents("lz4", np.array([(_BLOSC_HEADER, size, 0, size, True)], STREAM))
    if container is None or version_inside != 1:
        return None
    if not 0 < block <= size:
        raise CorruptChunkError(f"blosc blocks of {block} bytes in a chunk of {size}")
    streams = _blosc_streams(raw, size, flags, typesize, block, container)
    if streams is None:
        return None
    shuffle = NO_SHUFFLE
    if flags & _BLOSC_SHUFFLE:
        shuffle = BYTE_SHUFFLE if typesize > 1 else NO_SHUFFLE
    elif flags & _BLOSC_BITSHUFFLE:
        shuffle = BIT_SHUFFLE
    algorithm = "deflate" if container == "zlib" else container
    return Contents(algorithm, streams, shuffle, typesize, block)


def _blosc_streams(
    raw: np.ndarray, size: int, flags: int, typesize: int, block: int, container: str
) -> np.ndarray | None:
    n_blocks = -(-size // block)
    table = _BLOSC_HEADER + 4 * n_blocks
    if table > len(raw):
        raise CorruptChunkError(
            f"blosc chunk of {len(raw)} bytes is shorter than its {n_blocks} block starts"
        )
    starts = raw[_BLOSC_HEADER:table].view("<i4") if not raw.ctypes.data % 4 else _copied(raw, table)
    splits = (
        not flags & _BLOSC_WHOLE and typesize <= _BLOSC_MAX_SPLITS and block // typesize >= _BLOSC_MIN_SPLIT
    )
    found: list[tuple[int, int, int, int, bool]] = []
    for b, start in enumerate(starts.tolist()):
        target, length = b * block, min(block, size - b * block)
        n = typesize if splits and length == block else 1
        if length % n:
            raise CorruptChunkError(f"blosc block of {length} bytes in {n} streams")
        length //= n
        at = start
        for k in range(n):
            if not table <= at <= len(raw) - 4:
                raise CorruptChunkError(f"blosc stream at byte {at} of a chunk of {len(raw)}")
            nbytes = _number(raw, at, 4, "blosc stream")
            at += 4
            if not 0 < nbytes <= min(length, len(raw) - at):
                raise CorruptChunkError(
                    f"blosc stream of {nbytes} bytes at byte {at} of {len(raw)}, for {length} bytes"
                )
            place = target + k * length
            if nbytes == length:
                found.append((at, nbytes, place, length, True))
            else:
                inner = ("lz4", 0, nbytes)
                if container != "lz4":
                    inside = _stream(container, raw[at : at + nbytes], length)
                    if inside is None:
                        return None
                    inner = inside
                found.append((at + inner[1], inner[2], place, length, False))
            at += nbytes
    return np.array(found, STREAM)


def _copied(raw: np.ndarray, table: int) -> np.ndarray:
    return np.frombuffer(raw[_BLOSC_HEADER:table].tobytes(), "<i4")


def _number(raw: np.ndarray, at: int, width: int, what: str) -> int:
    """Little-endian number of `width` bytes at `at`."""
    found = raw[at : at + width].tobytes()
    if len(found) != width:
        raise CorruptChunkError(f"{what}: byte {at + width} is needed, the chunk has {len(raw)}")
    return int.from_bytes(found, "little")


def _not_empty(nbytes: int, what: str) -> int:
    if nbytes < 1:
        raise CorruptChunkError(f"{what} chunk is shorter than its headers")
    return nbytes
