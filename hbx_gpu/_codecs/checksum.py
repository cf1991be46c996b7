"""CRC32C (Castagnoli) of bytes."""

from __future__ import annotations

from typing import Any

try:
    from google_crc32c import value as _value
except ImportError:  # a machine with a GPU and little else still runs the kernels' tests
    _value = None


def crc32c(data: Any) -> int:
    """CRC32C of a bytes-like object; ``crc32c(b"123456789") == 0xE3069283``.

    Runs at tens of GB/s with google-crc32c (a dependency of this package), byte by byte without.
    """
    return int(_value(data)) if _value is not None else _by_table(data)


def with_crc32c(data: bytes) -> bytes:
    """Bytes, and their CRC32C in four more, as zarr's codec ``crc32c`` stores it."""
    return data + crc32c(data).to_bytes(4, "little")


def _by_table(data: Any) -> int:
    crc = 0xFFFFFFFF
    for byte in bytes(data):
        crc = _TABLE[(crc ^ byte) & 0xFF] ^ crc >> 8
    return crc ^ 0xFFFFFFFF


def _entry(byte: int) -> int:
    for _ in range(8):
        byte = byte >> 1 ^ (0x82F63B78 if byte & 1 else 0)
    return byte


_TABLE = [_entry(byte) for byte in range(256)]
