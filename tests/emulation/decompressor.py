"""The double of nvCOMP on the CPU: decoders of numcodecs and zlib, told of streams in nvCOMP's way."""

from __future__ import annotations

import ctypes
import struct
import zlib
from typing import Any

import numcodecs.lz4
import numcodecs.zstd
import numpy as np

from hbx_gpu._engine.device.backend import STREAM_ALIGNMENT, Streams

CANNOT_DECOMPRESS = 12  # nvcompErrorCannotDecompress


class CpuDecompressor:
    """Decompresses what the arrays of `Streams` say, and writes to them what it found.

    A stream that does not decode leaves its output as it is, one that is too long is refused: what nvCOMP
    does at its best.
    """

    def decompress(self, algorithm: str, streams: Streams) -> None:
        n = len(streams.sizes)
        sources, source_bytes, targets, target_bytes = (
            _array(address, n, np.uint64).tolist()
            for address in (streams.sources, streams.source_bytes, streams.targets, streams.target_bytes)
        )
        actual, states = _array(streams.actual, n, np.uint64), _array(streams.states, n, np.int32)
        assert target_bytes == streams.sizes.tolist()
        for i in range(n):
            assert sources[i] % STREAM_ALIGNMENT == 0
            data = ctypes.string_at(sources[i], source_bytes[i])
            found = inflate(algorithm, data, target_bytes[i])
            if found is None or len(found) > target_bytes[i]:
                states[i], actual[i] = CANNOT_DECOMPRESS, 0
                continue
            ctypes.memmove(targets[i], found, len(found))
            states[i], actual[i] = 0, len(found)


def inflate(algorithm: str, data: bytes, size: int) -> bytes | None:
    """What one stream holds; None if it does not decode."""
    try:
        if algorithm == "zstd":
            return bytes(numcodecs.zstd.decompress(data))
        if algorithm == "lz4":
            return bytes(numcodecs.lz4.decompress(struct.pack("<I", size) + data))
        decoder = zlib.decompressobj(-15)
        found = decoder.decompress(data, size + 1)
        return found if decoder.eof else None
    except (RuntimeError, ValueError, zlib.error):
        return None


def _array(address: int, n: int, dtype: type) -> np.ndarray:
    nbytes = n * np.dtype(dtype).itemsize
    memory: Any = (ctypes.c_char * nbytes).from_address(address)
    return np.frombuffer(memory, np.dtype(dtype))
