"""CRC32C (Castagnoli) of bytes."""

from __future__ import annotations

import google_crc32c

WITH_ITSELF = 0x48674BC7
"""CRC32C of any bytes that are followed by their own CRC32C, in little-endian order."""


def crc32c(data: object) -> int:
    """CRC32C of a bytes-like object; ``crc32c(b"123456789") == 0xE3069283``."""
    return int(google_crc32c.value(data))


def with_crc32c(data: bytes) -> bytes:
    """Return `data` followed by four bytes of its CRC32C, as zarr's codec ``crc32c`` stores it."""
    return data + crc32c(data).to_bytes(4, "little")
