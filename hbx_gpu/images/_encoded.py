"""Read headers of encoded images, to find those that DALI would decode wrongly without an error.

PNG: ISO/IEC 15948, chunk IHDR. TIFF: the TIFF 6.0 specification and the BigTIFF design, first directory.
"""

from __future__ import annotations

import struct
from typing import NamedTuple

import numpy as np

from hbx_gpu.errors import CorruptDataError, UnsupportedError

_PNG = b"\x89PNG\r\n\x1a\n"
_JPEG = b"\xff\xd8\xff"
_TIFF = {b"II*\0": ("<", 4), b"MM\0*": (">", 4), b"II+\0": ("<", 8), b"MM\0+": (">", 8)}
_BITS, _PHOTOMETRIC, _SAMPLES, _PLANAR, _FORMAT = 258, 262, 277, 284, 339
_TYPES = {1: "B", 3: "H", 4: "I", 16: "Q"}  # BYTE, SHORT, LONG, LONG8
_FORMATS = {2: "signed integers", 3: "floating point", 5: "complex integers", 6: "complex numbers"}


class ImageHeader(NamedTuple):
    """The properties that decide how an image is decoded.

    Attributes
    ----------
    kind
        ``"jpeg"``, ``"png"``, ``"tiff"``, or ``""`` for the others that DALI decodes.
    dtype
        uint8 or uint16: type that holds the samples.
    mixed
        Whether the channels are not colors, so that decoding the image as RGB or gray would drop some of
        them.
    """

    kind: str
    dtype: np.dtype
    mixed: bool = False


def read_header(image: np.ndarray) -> ImageHeader:
    """Look at the first bytes of an encoded image.

    Parameters
    ----------
    image
        uint8, 1-D.

    Raises
    ------
    CorruptDataError
        The header ends early.
    UnsupportedError
        DALI would decode the image into wrong pixels: it has several pages or planes, or samples that are not
        unsigned integers of up to 16 bits.
    """
    start = image[:32].tobytes()
    if start.startswith(_PNG):
        if len(start) < 26:
            raise CorruptDataError(f"the PNG ends within its header, after {len(image)} bytes")
        return ImageHeader("png", np.dtype(np.uint16 if start[24] == 16 else np.uint8))
    if start[:4] in _TIFF:
        return _tiff(image, *_TIFF[start[:4]])
    return ImageHeader("jpeg" if start.startswith(_JPEG) else "", np.dtype(np.uint8))


def _tiff(image: np.ndarray, order: str, width: int) -> ImageHeader:
    try:
        tags, following = _directory(image.data, order, width)
    except (struct.error, OverflowError):  # the latter: offsets of 64 bits
        raise CorruptDataError(
            f"the TIFF's first directory lies outside its {len(image)} bytes; the file was cut off or damaged"
        ) from None
    samples = tags.get(_SAMPLES, [1])[0]
    bits, formats = set(tags.get(_BITS, [1])), set(tags.get(_FORMAT, [1]))
    if following:
        raise UnsupportedError(
            "the TIFF has several pages, of which only the first would be decoded; store one"
        )
    if samples > 1 and tags.get(_PLANAR, [1])[0] == 2:
        raise UnsupportedError(
            "the TIFF holds its channels as separate planes, which DALI mixes up; store them interleaved "
            "(planar configuration 1)"
        )
    if formats - {1} or len(bits) > 1 or max(bits) > 16:
        kind = _FORMATS.get(max(formats), "unsigned integers")
        raise UnsupportedError(
            f"the TIFF's samples are {kind} of {'/'.join(map(str, sorted(bits)))} bits; unsigned integers of "
            "8 or 16 bits are decoded. Store the others as tiles of numbers"
        )
    mixed = samples > 1 and tags.get(_PHOTOMETRIC, [1])[0] in (0, 1)
    return ImageHeader("tiff", np.dtype(np.uint16 if max(bits) > 8 else np.uint8), mixed)


def _directory(data: memoryview, order: str, width: int) -> tuple[dict[int, list[int]], int]:
    """(values by tag, offset of the next directory) of the first directory."""
    offset_code = "I" if width == 4 else "Q"
    count_code = "H" if width == 4 else "Q"

    def unpack(code: str, at: int) -> tuple[int, ...]:
        found: tuple[int, ...] = struct.unpack_from(order + code, data, at)
        return found

    (position,) = unpack(offset_code, width if width == 4 else 8)
    (count,) = unpack(count_code, position)
    position += struct.calcsize(order + count_code)
    entry = 4 + 2 * width
    tags: dict[int, list[int]] = {}
    for at in range(position, position + count * entry, entry):
        tag, kind = unpack("HH", at)
        (length,) = unpack(offset_code, at + 4)
        if tag not in (_BITS, _PHOTOMETRIC, _SAMPLES, _PLANAR, _FORMAT) or kind not in _TYPES:
            continue
        code = f"{min(length, 65536)}{_TYPES[kind]}"
        inline = struct.calcsize(order + code) <= width
        (place,) = (at + 4 + width,) if inline else unpack(offset_code, at + 4 + width)
        tags[tag] = list(unpack(code, place)) or [1]
    (following,) = unpack(offset_code, position + count * entry)
    return tags, following
