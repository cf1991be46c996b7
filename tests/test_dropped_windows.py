"""Windows that nobody takes: memory that the device still uses is not given to the next batch."""

from __future__ import annotations

import ctypes
import gc
import time
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from hbx_gpu._collates import DenseCollate
from hbx_gpu._engine.device.backend import Slot
from hbx_gpu._loading.feeds.device import DeviceFeed
from hbx_gpu._loading.make import device_loader
from hbx_gpu._loading.options import LoaderOptions
from hbx_gpu._loading.residency import device as device_residency
from hbx_gpu._storage import kvikio
from hbx_gpu._storage.kvikio import KvikioReader
from hbx_gpu.dataloader import CellDataset
from tests.emulation.streams import StreamBackend
from tests.storage.kvikio_stand_in import StandIn
from tests.test_device_loader import brought, codec_dataset, on_cpu, same, sampler_for
from tests.test_residency import needed_bytes


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> CellDataset:
    return codec_dataset(tmp_path_factory.mktemp("arrays"), "hbx_gpu.rowpack")


@pytest.mark.parametrize("layout", ["dense", "csr"])
def test_epochs_left_early_do_not_disturb_the_next(dataset: CellDataset, layout: str) -> None:
    loader = device_loader(
        dataset,
        sampler_for(dataset),
        StreamBackend(delay=0.003),
        LoaderOptions(layout=layout, threads=4, window=1),
    )
    for epoch in range(2):
        loader.set_epoch(100 + epoch)
        for _ in loader:
            break  # a validation loop that has seen enough
        sampler = sampler_for(dataset)
        sampler.set_epoch(epoch)
        loader.set_epoch(epoch)
        found = brought(iter(loader))
        for one, other in zip(found, on_cpu(dataset, sampler, layout=layout, executor="direct"), strict=True):
            same(one, other)


def test_staging_memory_of_dropped_windows_is_used_again(dataset: CellDataset) -> None:
    backend = StreamBackend(delay=0.005)
    feed = DeviceFeed(dataset, backend, LoaderOptions(layout="dense"))
    for _ in range(6):
        feed.make([np.arange(10)])
    assert len(feed._free) == 1
    assert backend.host_pool.n_allocated <= 4


@pytest.mark.parametrize("io", ["mmap", "kvikio"])
def test_areas_of_dropped_windows_come_back(
    dataset: CellDataset, io: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(device_residency, "AREA_BYTES", 4 << 20)
    monkeypatch.setattr(kvikio, "missing", lambda: None)
    monkeypatch.setattr(kvikio, "KvikioReader", partial(KvikioReader, open_file=StandIn))
    options = LoaderOptions(
        layout="dense",
        threads=4,
        window=1,
        io=io,
        residency="none" if io == "kvikio" else "device",
        residency_budget=needed_bytes(dataset) // 3,
    )
    loader: Any = device_loader(dataset, sampler_for(dataset), StreamBackend(delay=0.001), options)
    areas = loader.feed.chunks.store.areas
    whole = list(areas._free)
    assert whole
    for epoch in range(4):
        loader.set_epoch(epoch)
        for _ in loader:
            break
    loader.feed._free.clear()
    loader._runs.clear()
    gc.collect()
    assert areas._free == whole


def test_new_arena_memory_is_free_of_earlier_kernels() -> None:
    """An output that nobody took makes way for a slot; a kernel that still writes to it must not win."""
    backend = StreamBackend()
    nbytes = 1 << 20
    output = backend.empty(nbytes + 256, "uint8")  # as much as an arena of so many bytes takes
    address = int(output.data_ptr())

    def write() -> None:
        time.sleep(0.05)
        ctypes.memset(address, 1, nbytes)

    backend.decode.order(write)
    del output
    slot: Any = Slot(backend)
    slot.reserve(nbytes, nbytes)
    assert slot.device is not None
    assert abs(slot.device.address - address) < 512  # the same block
    slot.host[:] = 7
    backend.upload(slot.host[: slot.device.nbytes], slot.device)
    backend.decode.synchronize()
    assert (slot.device.array(0, slot.device.nbytes) == 7).all()


def test_a_dropped_slot_waits_for_its_copies() -> None:
    backend = StreamBackend(delay=0.03)
    target = torch.zeros(1 << 17, dtype=torch.uint8)
    slot = Slot(backend)
    slot.reserve(0, 0, 1 << 17)
    slot.side[:] = 5
    backend.decode.order(partial(time.sleep, 0.03))
    backend.send(slot.side, target)
    slot.busy = backend.event()
    del slot
    backend.host_buffer(1 << 17)[:] = 9
    backend.decode.synchronize()
    assert (target == 5).all()


def test_chunks_read_in_place_stay_until_kernels_have_read_them(dataset: CellDataset) -> None:
    """The loader goes, a window of it is still being made: what it reads must not be somebody else's."""
    backend = StreamBackend(delay=0.02)
    feed = DeviceFeed(dataset, backend, LoaderOptions(layout="dense", residency="host"))
    assert feed.chunks.store is not None
    feed.chunks.in_place = True
    held = feed.chunks.store._host
    assert held is not None
    nbytes = len(held)
    made = feed.make([np.arange(20)])
    kept = made[0].window.tensors[0]
    expected = DenseCollate()(dataset[np.arange(20)])["X"]
    del feed, made, held
    gc.collect()
    backend.mapped_buffer(nbytes)
    backend.decode.synchronize()
    assert torch.equal(kept, expected)


def test_constants_of_an_engine_stay_until_they_have_crossed(tmp_path: Path) -> None:
    dataset = codec_dataset(tmp_path, "hbx_gpu.rowpack", drop=True)
    backend = StreamBackend(delay=0.02)
    engine = dataset.device_engine(backend)
    before = backend.host_pool.free_bytes
    del engine
    gc.collect()
    assert backend.copy.idle
    assert backend.host_pool.free_bytes > before
