"""CRC32C is the one of the Castagnoli polynomial, as zarr stores it."""

from __future__ import annotations

from hbx_gpu._codecs.checksum import crc32c, with_crc32c


def test_known_value() -> None:
    assert crc32c(b"123456789") == 0xE3069283
    assert with_crc32c(b"123456789") == b"123456789" + (0xE3069283).to_bytes(4, "little")
