"""Buffers come back when the last array or tensor on them goes, and not before."""

from __future__ import annotations

import threading

import numpy as np
import torch

from hbx_gpu._buffers import BufferPool


def test_memory_is_used_again_after_the_last_view() -> None:
    pool = BufferPool()
    first = pool.empty((1000, 100), np.float32)
    address = first.ctypes.data
    assert address % 64 == 0
    assert first.shape == (1000, 100)
    assert first.flags.writeable
    view = first[10:20, ::2]
    del first
    assert pool.free_bytes == 0  # a view keeps the memory
    second = pool.empty((1000, 100), np.float32)
    assert second.ctypes.data != address
    del view
    third = pool.empty((990, 100), np.float32)  # nearly the same size shares blocks
    assert third.ctypes.data == address


def test_a_tensor_keeps_its_memory() -> None:
    pool = BufferPool()
    tensor = torch.from_numpy(pool.empty(50_000, np.int64))
    tensor.fill_(7)
    other = pool.empty(50_000, np.int64)
    other[:] = 3
    assert (tensor == 7).all()
    del tensor
    assert pool.free_bytes > 0


def test_free_memory_is_bounded() -> None:
    pool = BufferPool(max_bytes=1 << 20)
    arrays = [pool.empty(1 << 19, np.uint8) for _ in range(5)]
    del arrays
    assert 0 < pool.free_bytes <= 1 << 20
    pool.clear()
    assert pool.free_bytes == 0


def test_small_requests_are_plain_arrays() -> None:
    pool = BufferPool()
    assert pool.empty(0, np.float32).shape == (0,)
    assert pool.empty((3, 0), np.float32).shape == (3, 0)
    assert pool.empty(10, np.uint16).base is None


def test_threads_never_share_a_block() -> None:
    pool = BufferPool()
    wrong = []

    def work(value: int) -> None:
        for _ in range(200):
            array = pool.empty(20_000, np.int64)
            array[:] = value
            if not (array == value).all():
                wrong.append(value)

    threads = [threading.Thread(target=work, args=(i,)) for i in range(4)]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    assert not wrong


def test_memory_begins_at_a_cache_line() -> None:
    pool = BufferPool()
    kept = [pool.empty(n, np.uint8) for n in (70_000, 300_000, 3 << 20)]
    assert [array.ctypes.data % 64 for array in kept] == [0] * len(kept)
