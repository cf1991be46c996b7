"""CRC32C of many stretches at once is that of google_crc32c, with the CPU's instruction and without."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest

from hbx_gpu._codecs import crc32c_numba
from hbx_gpu._codecs.checksum import WITH_ITSELF, crc32c, with_crc32c
from hbx_gpu._codecs.crc32c_numba import by_instruction, crc32c_each, one_by_one

Each = Callable[[np.ndarray, np.ndarray, np.ndarray], None]
WAYS = [
    pytest.param(by_instruction, marks=pytest.mark.skipif(not crc32c_numba.HAS_INSTRUCTION, reason="CPU")),
    one_by_one,
]


@pytest.mark.parametrize("each", WAYS)
@pytest.mark.parametrize("n", range(8))
def test_equals_google_crc32c(each: Each, n: int) -> None:
    """Any number of stretches, of any length and alignment, empty ones included."""
    rng = np.random.default_rng(n)
    memory = rng.integers(0, 256, 4_000, dtype=np.uint8)
    offset, nbytes = rng.integers(0, 1_000, n), rng.choice([0, 1, 7, 8, 9, 333, 3_000], n)
    out = np.empty(n, np.uint32)
    each(memory.ctypes.data + offset.astype(np.uint64), nbytes, out)
    assert out.tolist() == [
        crc32c(memory[at : at + size]) for at, size in zip(offset.tolist(), nbytes.tolist(), strict=True)
    ]


@pytest.mark.parametrize("nbytes", [0, 1, 8, 1_001])
def test_of_bytes_with_their_own_checksum(nbytes: int) -> None:
    data = np.frombuffer(with_crc32c(bytes(range(256)) * 4)[-4:] + bytes(nbytes), np.uint8)
    whole = np.frombuffer(with_crc32c(data.tobytes()), np.uint8)
    assert crc32c(whole) == WITH_ITSELF
    assert crc32c_each(np.array([whole.ctypes.data], np.uint64), np.array([len(whole)])) == [WITH_ITSELF]
