"""CRC32C with and without the library."""

from __future__ import annotations

import numpy as np

from hbx_gpu._codecs import checksum


def test_known_value() -> None:
    assert checksum.crc32c(b"123456789") == 0xE3069283
    assert checksum._by_table(b"123456789") == 0xE3069283


def test_the_table_equals_the_library() -> None:
    data = np.random.default_rng(0).integers(0, 256, 4_099, dtype=np.uint8)
    for part in (data[:0], data[:1], data[5:77], data):
        assert checksum._by_table(part) == checksum.crc32c(part)
