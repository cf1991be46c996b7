"""Decompress no more bytes than the metadata allow: a few bytes of a stream may claim, or make, gigabytes.

Every general compressor of a chain is told how many bytes its output has, and nothing larger is allocated.
The number is exact where no other compressor stands between it and the elements, and an upper bound
elsewhere.
"""

from __future__ import annotations

import bz2
import lzma
import zlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Protocol, TypeAlias, runtime_checkable

import numpy as np

from hbx_gpu._codecs.bitpacking_format import BytesLike, as_bytes
from hbx_gpu.errors import CorruptChunkError

_CHECKSUM_BYTES = 4
_CHECKSUMS = {"adler32", "crc32", "crc32c", "fletcher32", "jenkins_lookup3"}
_ZSTD_MAGIC, _ZSTD_SKIPPABLE = 0xFD2FB528, 0x184D2A50
_GZIP, _ZLIB = 31, 15  # window bits of zlib
_LZMA_MEMORY = 1 << 30


@dataclass(frozen=True, slots=True)
class Room:
    """How many bytes a step of decoding may return.

    Attributes
    ----------
    nbytes
        Number of bytes.
    exact
        Whether the step must return exactly `nbytes`; otherwise `nbytes` is an upper bound.
    """

    nbytes: int
    exact: bool = False

    def check(self, found: int, codec: str) -> None:
        """Check a number of bytes against this room.

        Raises
        ------
        CorruptChunkError
            The number does not fit; the message gives both numbers.
        """
        if found > self.nbytes or (self.exact and found < self.nbytes):
            expected = f"{self.nbytes:,}" if self.exact else f"at most {self.nbytes:,}"
            raise CorruptChunkError(f"{codec} decodes to {found:,} bytes, {expected} expected")

    def plus(self, nbytes: int) -> Room:
        """Return room for a few bytes more."""
        return Room(self.nbytes + nbytes, self.exact)

    def compressed(self) -> Room:
        """Return room for these bytes in compressed form, which may be a little longer."""
        return Room(self.nbytes + self.nbytes // 8 + 4096)


Decode: TypeAlias = Callable[[BytesLike], BytesLike]
"""Undoes one step of encoding."""


class Numcodec(Protocol):
    """A codec of numcodecs."""

    def decode(self, buf: BytesLike, out: np.ndarray | None = None) -> BytesLike:
        """Undo the encoding."""


@runtime_checkable
class _Lzma(Protocol):
    """numcodecs' LZMA."""

    format: int
    filters: Sequence[Mapping[str, int]] | None


class _Stream(Protocol):
    """A decompressor of the standard library, for one stream."""

    @property
    def eof(self) -> bool: ...

    @property
    def unused_data(self) -> bytes: ...

    def decompress(self, data: bytes, max_length: int, /) -> bytes: ...


def bounded(name: str, codec: Numcodec, room: Room) -> tuple[Decode, Room]:
    """Return a decoder whose output fits `room`, and the room that its input has.

    Parameters
    ----------
    name
        Id of a compressor, a checksum or the shuffle of numcodecs.
    codec
        The numcodecs object.
    room
        Size of the output.
    """
    if name in _CHECKSUMS:
        return codec.decode, room.plus(_CHECKSUM_BYTES)
    if name == "shuffle":
        return codec.decode, room
    step = _STEPS[name]
    return partial(step, codec, room), room.compressed()


def zstd_size(raw: np.ndarray) -> int | None:
    """Return the bytes of content that the headers of all zstd frames give; None if a header has no size.

    Raises
    ------
    CorruptChunkError
        The frames do not end where the bytes do.
    """
    total, at = 0, 0
    while at < len(raw):
        magic = _number(raw, at, 4)
        if magic & 0xFFFFFFF0 == _ZSTD_SKIPPABLE:
            at += 8 + _number(raw, at + 4, 4)
            continue
        if magic != _ZSTD_MAGIC:
            raise CorruptChunkError(f"there is no zstd frame at byte {at}")
        descriptor = _number(raw, at + 4, 1)
        single = descriptor >> 5 & 1
        at += 5 + (not single) + (0, 1, 2, 4)[descriptor & 3]
        width = (single, 2, 4, 8)[descriptor >> 6]
        if not width:
            return None
        total += _number(raw, at, width) + (256 if width == 2 else 0)
        at = _end_of_blocks(raw, at + width) + (4 if descriptor & 4 else 0)
    if at != len(raw):
        raise CorruptChunkError(f"the zstd frames end at byte {at}, the chunk has {len(raw)}")
    return total


def _end_of_blocks(raw: np.ndarray, at: int) -> int:
    while True:
        header = _number(raw, at, 3)
        at += 3 + (1 if header >> 1 & 3 == 1 else header >> 3)  # a repeated byte, or so many
        if header & 1:
            return at


def _number(raw: np.ndarray, at: int, width: int) -> int:
    found = raw[at : at + width].tobytes()
    if len(found) != width:
        raise CorruptChunkError(f"byte {at + width} of a header is needed, the chunk has {len(raw)}")
    return int.from_bytes(found, "little")


def _zstd(codec: Numcodec, room: Room, data: BytesLike) -> BytesLike:
    raw = as_bytes(data)
    size = zstd_size(raw)
    if size is not None:
        room.check(size, "zstd")
        return codec.decode(raw)
    if not room.exact:
        raise CorruptChunkError("the zstd frame does not say how long its content is, which is needed here")
    # The library refuses content that does not fill this output.
    return codec.decode(raw, out=np.empty(room.nbytes, np.uint8))


def _lz4(codec: Numcodec, room: Room, data: BytesLike) -> BytesLike:
    raw = as_bytes(data)
    room.check(_number(raw, 0, 4), "lz4")
    return codec.decode(raw)


def _blosc(codec: Numcodec, room: Room, data: BytesLike) -> BytesLike:
    raw = as_bytes(data)
    # The library trusts the lengths in the header, and would read past a chunk that was cut short.
    stored = _number(raw, 12, 4)
    if stored != len(raw):
        raise CorruptChunkError(f"blosc chunk of {len(raw)} bytes, its header says {stored}")
    room.check(_number(raw, 4, 4), "blosc")
    return codec.decode(raw)


def _deflate(bits: int, room: Room, data: BytesLike) -> bytes:
    return _inflated(lambda: zlib.decompressobj(bits), "gzip" if bits == _GZIP else "zlib", room, data)


def _bz2(_: Numcodec, room: Room, data: BytesLike) -> bytes:
    return _inflated(bz2.BZ2Decompressor, "bz2", room, data)


def _lzma(codec: Numcodec, room: Room, data: BytesLike) -> bytes:
    assert isinstance(codec, _Lzma)
    kind, filters = codec.format, codec.filters
    if kind == lzma.FORMAT_RAW:
        return _inflated(lambda: lzma.LZMADecompressor(kind, filters=filters), "lzma", room, data, last=True)
    return _inflated(lambda: lzma.LZMADecompressor(kind, _LZMA_MEMORY), "lzma", room, data)


def _inflated(
    begin: Callable[[], _Stream], name: str, room: Room, data: BytesLike, *, last: bool = False
) -> bytes:
    """Decompress all streams that follow each other, as far as there is room."""
    parts: list[bytes] = []
    rest, total = as_bytes(data).tobytes(), 0
    # Zeros after the last stream are padding.
    while rest.strip(b"\0") or not parts:
        stream = begin()
        part = stream.decompress(rest, room.nbytes - total + 1)
        total += len(part)
        room.check(total if total > room.nbytes else room.nbytes, name)
        if not stream.eof and not last:
            raise CorruptChunkError(f"the {name} stream is cut short")
        parts.append(part)
        rest = stream.unused_data
    room.check(total, name)
    return parts[0] if len(parts) == 1 else b"".join(parts)


_STEPS: dict[str, Callable[[Numcodec, Room, BytesLike], BytesLike]] = {
    "blosc": _blosc,
    "bz2": _bz2,
    "gzip": lambda _, room, data: _deflate(_GZIP, room, data),
    "lz4": _lz4,
    "lzma": _lzma,
    "zlib": lambda _, room, data: _deflate(_ZLIB, room, data),
    "zstd": _zstd,
}
