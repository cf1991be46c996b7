"""A kvikio in memory: what the reader takes from it, without a GPU."""

from __future__ import annotations

import os
from concurrent.futures import Future as _Future
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np

from hbx_gpu._storage.kvikio import PAGE


class StandIn:
    """A CuFile that reads with preadv, checks what GPUDirect would want, and fails on demand."""

    def __init__(self, path: str, *, short: int = 0, error: str = "") -> None:
        self.path, self.short, self.error = path, short, error
        self.fd = os.open(path, os.O_RDONLY)
        self.reads, self.done, self.closed = 0, 0, False
        self.sizes: list[int] = []

    def pread(self, buf: Any, size: int, file_offset: int, task_size: int) -> Pending:
        assert not self.closed
        assert isinstance(size, int)
        assert file_offset % PAGE == 0
        assert buf.ctypes.data % PAGE == 0
        assert size % PAGE == 0 or file_offset + size == os.fstat(self.fd).st_size
        assert 0 < size <= len(buf)
        assert task_size > 0
        self.reads += 1
        self.sizes.append(size)
        return Pending(_POOL.submit(self._read, buf, size, file_offset))

    def _read(self, buf: np.ndarray, size: int, offset: int) -> int:
        if self.error:
            raise RuntimeError(self.error)
        count = os.preadv(self.fd, [buf[: size - self.short].data], offset)
        self.done += 1
        return count

    def close(self) -> None:
        self.closed = True
        os.close(self.fd)


_POOL = ThreadPoolExecutor(4)


class Pending:
    """A read that a pool carries out."""

    def __init__(self, future: _Future[int]) -> None:
        self._future = future

    def get(self) -> int:
        return self._future.result()
