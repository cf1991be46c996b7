"""What stays in memory, and that batches do not notice: the same from anywhere, whatever fits."""

from __future__ import annotations

import itertools
import logging
import re
import time
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import zarr

from hbx_gpu._collates import DenseCollate, FunctionCollate
from hbx_gpu._datasets.plain import PlainDataset
from hbx_gpu._engine.device.backend import NoRoom, Part
from hbx_gpu._engine.device.store import MAX_ARENA, ChunkStore, FreeList, resident_sizes
from hbx_gpu._loading.feeds.device import DeviceFeed
from hbx_gpu._loading.feeds.host import HostFeed
from hbx_gpu._loading.loader import CellLoader
from hbx_gpu._loading.make import device_loader
from hbx_gpu._loading.options import LoaderOptions
from hbx_gpu._loading.residency import device as device_residency
from hbx_gpu._loading.residency.host import HeapReader, decide, fitting, hold_on_host
from hbx_gpu._plan import rows as plan_module
from hbx_gpu._plan.rows import needed_chunks, plan_rows
from hbx_gpu._storage import kvikio
from hbx_gpu._storage.choice import open_reader
from hbx_gpu._storage.chunks import ChunkDirectory
from hbx_gpu._storage.kvikio import KvikioReader
from hbx_gpu._storage.metadata import read_layout
from hbx_gpu.dataloader import CellDataset, MultimodalCellDataset, make_loader
from hbx_gpu.errors import CorruptChunkError, UnsupportedError
from hbx_gpu.sampler import CellSampler
from hbx_gpu.testing import example_dataset, example_groups
from tests.emulation.backend import EmulatedBackend
from tests.emulation.streams import StreamBackend
from tests.kernels.conftest import on_gpu
from tests.storage.kvikio_stand_in import StandIn
from tests.test_device_loader import brought, codec_dataset, on_cpu, same
from tests.threads import loader_threads

CODECS = ("hbx_gpu.rowpack", "homeobox.bitpacking", "zstd", "none")


@pytest.fixture(autouse=True)
def small_areas(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(device_residency, "AREA_BYTES", 4 << 20)


def mixed_dataset(root: Path) -> CellDataset:
    """Sources of every codec, one of them with dropped columns."""
    groups = example_groups(40) + example_groups(40)
    for group, codec in zip(groups, CODECS, strict=True):
        group.codec = codec
    groups[1].remap = np.where(groups[1].remap % 3 == 0, -1, groups[1].remap).astype(np.int32)
    return example_dataset(root, groups)


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> CellDataset:
    return mixed_dataset(tmp_path_factory.mktemp("mixed"))


@pytest.fixture(scope="module")
def rowpack(tmp_path_factory: pytest.TempPathFactory) -> CellDataset:
    return codec_dataset(tmp_path_factory.mktemp("rowpack"), "hbx_gpu.rowpack")


def sampler_for(dataset: CellDataset) -> CellSampler:
    return CellSampler(dataset.groups_np, batch_size=16, seed=3, num_workers=0, locality="none")


def feed_for(dataset: CellDataset, backend: Any = None, layout: str = "dense", **options: Any) -> DeviceFeed:
    return DeviceFeed(
        dataset, backend or EmulatedBackend(), LoaderOptions.of(layout=layout, **{"threads": 2} | options)
    )


as_is = FunctionCollate(lambda batch: batch)


def loader_of(dataset: CellDataset, feed: Any, **options: Any) -> CellLoader:
    return CellLoader(
        dataset,
        sampler_for(dataset),
        feed=feed,
        options=LoaderOptions.of(num_workers=0, threads=2, **options),
    )


def needed_bytes(dataset: CellDataset) -> int:
    """Stored bytes of everything."""
    reader = dataset.open_reader("mmap")
    chunks = needed_chunks(dataset.table, dataset.row_index)
    return int(reader.directory.extents(chunks).nbytes.sum())


def check(dataset: CellDataset, feed: DeviceFeed, layout: str, epochs: int = 2) -> None:
    loader = loader_of(dataset, feed, window=1)
    for epoch in range(epochs):
        sampler = sampler_for(dataset)
        sampler.set_epoch(epoch)
        loader.set_epoch(epoch)
        expected = on_cpu(dataset, sampler, layout=layout, executor="direct")
        found = brought(loader)
        assert len(found) == len(expected) > 3
        for one, other in zip(found, expected, strict=True):
            same(one, other)


def cuda() -> Any:
    """A real device."""
    on_gpu()
    from hbx_gpu._engine.device.cuda import CudaBackend

    return CudaBackend(0)


on_cuda = pytest.param(cuda, marks=pytest.mark.gpu, id="cuda")


# -- identical batches -------------------------------------------------------------------------------


@pytest.mark.parametrize("layout", ["dense", "csr"])
@pytest.mark.parametrize("load", ["start", "touch"])
@pytest.mark.parametrize("share", [2.0, 0.4, 0.0], ids=["all", "part", "nothing"])
@pytest.mark.parametrize("backend", [EmulatedBackend, StreamBackend, on_cuda])
def test_batches_of_resident_chunks(
    dataset: CellDataset, layout: str, load: str, share: float, backend: Any
) -> None:
    budget = int(share * 10 * needed_bytes(dataset)) if share > 1 else int(share * needed_bytes(dataset))
    feed = feed_for(
        dataset, backend(), layout, residency="device", residency_budget=budget, residency_load=load
    )
    check(dataset, feed, layout)
    assert feed.chunks.store is not None
    assert (feed.chunks.store.nbytes > 0) == (share > 0)


@pytest.mark.parametrize("layout", ["dense", "csr"])
@pytest.mark.parametrize("in_place", [True, False])
@pytest.mark.parametrize("share", [2.0, 0.4, 0.0], ids=["all", "part", "nothing"])
@pytest.mark.parametrize("io", ["mmap", "pinned"])
@pytest.mark.parametrize("backend", [EmulatedBackend, on_cuda])
def test_batches_of_chunks_in_page_locked_memory(
    dataset: CellDataset, layout: str, in_place: bool, share: float, io: str, backend: Any
) -> None:
    budget = int(share * 2 * needed_bytes(dataset))
    feed = feed_for(dataset, backend(), layout, residency="host", residency_budget=budget, io=io)
    feed.chunks.in_place = in_place
    check(dataset, feed, layout)


def test_reading_host_memory_in_place_and_packing_it_are_both_measured(
    rowpack: CellDataset, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.INFO):
        feed_for(rowpack, residency="host")
    assert re.search(r"\d ms in place, .* ms packed", caplog.text)


@pytest.mark.parametrize("codec", CODECS)
def test_every_codec_alone(tmp_path: Path, codec: str) -> None:
    dataset = codec_dataset(tmp_path, codec)
    for residency in ("device", "host"):
        feed = feed_for(dataset, residency=residency)
        check(dataset, feed, "dense", epochs=1)
        assert (feed.chunks.residency, feed.chunks.io) == (residency, "mmap")


@pytest.fixture
def files(monkeypatch: pytest.MonkeyPatch) -> list[StandIn]:
    """Files that the stand-in for kvikio opens."""
    opened: list[StandIn] = []

    def open_file(path: str) -> StandIn:
        opened.append(StandIn(path))
        return opened[-1]

    monkeypatch.setattr(kvikio, "missing", lambda: None)
    monkeypatch.setattr(kvikio, "KvikioReader", partial(KvikioReader, open_file=open_file))
    return opened


@pytest.mark.parametrize("load", ["start", "touch"])
@pytest.mark.parametrize("residency", ["none", "device"])
@pytest.mark.parametrize("layout", ["dense", "csr"])
def test_batches_of_chunks_that_kvikio_reads(
    dataset: CellDataset, files: list[StandIn], layout: str, residency: str, load: str
) -> None:
    feed = feed_for(dataset, StreamBackend(), layout, io="kvikio", residency=residency, residency_load=load)
    check(dataset, feed, layout)
    assert feed.chunks.store is not None
    assert sum(file.reads for file in files) > 0
    assert (feed.chunks.store.nbytes > 0) == (residency == "device")


@pytest.mark.gpu
@pytest.mark.parametrize("residency", ["none", "device"])
def test_batches_of_chunks_that_the_real_kvikio_reads(dataset: CellDataset, residency: str) -> None:
    backend = cuda()
    if reason := kvikio.missing():
        pytest.skip(reason)
    check(dataset, feed_for(dataset, backend, io="kvikio", residency=residency), "dense")


def test_a_chunk_that_kvikio_brings_is_verified(tmp_path: Path, files: list[StandIn]) -> None:
    dataset = codec_dataset(tmp_path, "hbx_gpu.rowpack")
    path = sorted((tmp_path / "g0/csr/layers/counts/c").iterdir())[0]
    stored = bytearray(path.read_bytes())
    stored[60] ^= 1
    path.write_bytes(stored)
    with pytest.raises(CorruptChunkError, match=r"g0/csr/layers/counts.*CRC32C"):
        feed_for(dataset, io="kvikio", residency="device")
    assert files


def test_io_auto_measures_kvikio_where_it_can_be_used(
    rowpack: CellDataset, files: list[StandIn], caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.INFO, logger="hbx_gpu"):
        check(rowpack, feed_for(rowpack, io="auto"), "dense", epochs=1)
    (said,) = [record.getMessage() for record in caplog.records if "io='auto'" in record.getMessage()]
    assert "kvikio" in said
    assert files


def test_areas_are_given_back(rowpack: CellDataset, files: list[StandIn]) -> None:
    """Chunks that come for one batch lie where others lay before."""
    feed: Any = feed_for(rowpack, io="kvikio")
    loader = loader_of(rowpack, feed, window=1)
    assert feed.chunks.store is not None
    before = list(feed.chunks.store.areas._free)
    for epoch in range(6):
        loader.set_epoch(epoch)
        assert len(list(loader)) == len(loader)
    for slot in feed._free:
        slot.release()
        if slot.area.nbytes:
            feed.chunks.store.areas.give(slot.area)
    assert feed.chunks.store.areas._free == before
    assert files


def test_absent_chunks_stay_fill_values(tmp_path: Path) -> None:
    groups = example_groups()
    for group in groups:
        group.codec, group.chunks_per_shard = "hbx_gpu.rowpack", 0
        group.matrix.data[:] = 0  # zarr writes no chunk that is all fill value
    dataset = example_dataset(tmp_path, groups)
    for load in ("start", "touch"):
        check(dataset, feed_for(dataset, residency="device", residency_load=load), "dense", epochs=1)
    check(dataset, feed_for(dataset, residency="host"), "dense", epochs=1)


# -- what crosses --------------------------------------------------------------------------------------


def test_resident_rowpack_batches_read_and_copy_no_chunk(rowpack: CellDataset) -> None:
    backend = EmulatedBackend()
    feed = feed_for(rowpack, backend, residency="device")
    feed.chunks._reader.read = None  # type: ignore[method-assign, assignment]  # whoever reads now fails
    rowpack_rows = np.arange(len(rowpack))
    for made in feed.make([rowpack_rows]):
        before = backend.uploaded
        slot = feed.chunks.slot()
        staging = feed.chunks.stage_on_host(rowpack_rows, slot)
        assert (staging.staged_bytes, staging.area_bytes) == (0, 0)
        assert sum(map(len, [staging.rowpack_ranges, *staging.ranges])) == 0
        feed._engine.submit_dense(staging, slot).check()
        # Two pieces, a segment, pointers and status words per row that lies in one chunk.
        pieces, segments = len(staging.tables["pieces"]), len(staging.tables["segments0"])
        assert backend.uploaded - before <= 36 * pieces + 24 * segments + 20 * len(rowpack) + 300
        feed.deliver(made)


def test_chunks_are_loaded_once(rowpack: CellDataset) -> None:
    feed = feed_for(rowpack, residency="device", residency_load="touch")
    store = feed.chunks.store
    assert store is not None
    assert store.nbytes == 0
    list(loader_of(rowpack, feed))
    whole = store.nbytes
    assert whole > needed_bytes(rowpack)
    feed.chunks._reader.read = None  # type: ignore[method-assign, assignment]
    list(loader_of(rowpack, feed))
    assert store.nbytes == whole


def test_threads_that_need_the_same_chunks(rowpack: CellDataset) -> None:
    """One of them loads a chunk, the others do without until it is there."""
    feed = feed_for(rowpack, StreamBackend(), residency="device", residency_load="touch")
    store = feed.chunks.store
    assert store is not None
    fill = store._fill

    def slowly(*arguments: Any) -> Any:
        time.sleep(0.1)
        return fill(*arguments)

    store._fill = slowly  # type: ignore[method-assign, assignment]
    rows = np.arange(len(rowpack))
    with ThreadPoolExecutor(4) as pool:
        made = [entry for (entry,) in pool.map(feed.make, [[rows]] * 8)]
    expected = next(iter(make_loader(rowpack, [rows], layout="dense", executor="direct")))
    for entry in made:
        assert torch.equal(brought([feed.deliver(entry)])[0]["X"], expected["X"])
    chunks = needed_chunks(rowpack.table, rowpack.row_index)
    sizes = resident_sizes(feed._engine.stager, chunks, decoded=True)
    assert store.nbytes == sizes.sum()
    assert not store.full


def test_an_area_too_small_is_no_error(dataset: CellDataset, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(device_residency, "AREA_BYTES", 4096)
    budget = needed_bytes(dataset) // 3
    check(dataset, feed_for(dataset, residency="device", residency_budget=budget), "dense", epochs=1)


# -- corrupt chunks ------------------------------------------------------------------------------------


@pytest.mark.parametrize("load", ["start", "touch"])
@pytest.mark.parametrize("byte", [40, 5, 24], ids=["payload", "header", "size"])
def test_a_corrupt_chunk_is_named_when_it_is_loaded(tmp_path: Path, load: str, byte: int) -> None:
    dataset = codec_dataset(tmp_path, "hbx_gpu.rowpack")
    path = sorted((tmp_path / "g1/csr/layers/counts/c").iterdir())[0]
    stored = bytearray(path.read_bytes())
    stored[byte] ^= 0x10
    path.write_bytes(stored)

    def load_and_iterate() -> None:
        feed = feed_for(dataset, residency="device", residency_load=load)
        list(loader_of(dataset, feed))

    with pytest.raises(CorruptChunkError, match="g1/csr/layers/counts") as raised:
        load_and_iterate()
    assert raised.value.chunk == 0
    assert not loader_threads("hbx_gpu-")


def test_a_chunk_that_only_kernels_find_wrong(tmp_path: Path) -> None:
    dataset = codec_dataset(tmp_path, "homeobox.bitpacking")
    path = sorted((tmp_path / "g1/csr/layers/counts/c").iterdir())[0]
    stored = bytearray(path.read_bytes())
    stored[0] = 77
    path.write_bytes(stored)
    feed = feed_for(dataset, residency="device")
    with pytest.raises(CorruptChunkError, match="g1/csr/layers/counts") as raised:
        list(loader_of(dataset, feed))
    assert raised.value.chunk == 0


def test_an_uncompressed_chunk_of_the_wrong_size(tmp_path: Path) -> None:
    groups = example_groups()
    for group in groups:
        group.codec, group.chunks_per_shard = "none", 0
    dataset = example_dataset(tmp_path, groups)
    path = sorted((tmp_path / "g1/csr/layers/counts/c").iterdir())[0]
    path.write_bytes(path.read_bytes()[:-4])
    with pytest.raises(CorruptChunkError, match=r"g1/csr/layers/counts.*1020 bytes stored"):
        feed_for(dataset, residency="device")


# -- parts ---------------------------------------------------------------------------------------------


def test_needed_chunks_are_those_of_the_plans(dataset: CellDataset) -> None:
    plan = plan_rows(dataset.table, dataset.row_index, np.arange(len(dataset)))
    needed = needed_chunks(dataset.table, dataset.row_index)
    assert np.array_equal(np.sort(needed), plan.chunks)
    # Any beginning serves whole rows: indices and values of a stretch of elements stand together.
    array = np.searchsorted(dataset.table.chunk_base, needed, "right") - 1
    assert array[:4].tolist() == [0, 1, 0, 1]
    assert len(needed_chunks(dataset.table, dataset.row_index)) == len(set(needed.tolist()))


def test_needed_chunks_of_many_rows(dataset: CellDataset, monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows are looked at a part at a time; none falls between two parts."""
    whole = needed_chunks(dataset.table, dataset.row_index)
    for rows in (1, 7, len(dataset) - 1):
        monkeypatch.setattr(plan_module, "_ROWS", rows)
        assert np.array_equal(needed_chunks(dataset.table, dataset.row_index), whole)


def test_a_copy_on_the_heap_tells_chunks_apart(tmp_path: Path) -> None:
    """Two files of two chunks: the last of one file, kept, is not taken for the first of the next."""
    shape: Any = {"shape": (80,), "chunks": (20,), "shards": (40,), "dtype": "uint32", "compressors": None}
    zarr.create_array(tmp_path / "a", **shape)[:] = np.arange(1, 81)
    directory = ChunkDirectory([read_layout(tmp_path / "a")])
    extents = directory.extents(np.arange(4))
    for kept in itertools.chain.from_iterable(itertools.permutations(range(4), n) for n in range(5)):
        with open_reader("mmap", directory) as plain:
            held = HeapReader(plain, np.array(kept, np.int64), budget=1 << 20, threads=1)
            slab = held.read(extents)
            for c in range(4):
                assert slab.view(c).view("<u4").tolist() == list(range(20 * c + 1, 20 * c + 21))


def test_what_fits() -> None:
    sizes = np.array([10, 20, 30])
    assert [fitting(sizes, budget) for budget in (0, 9, 10, 59, 60, 10**9)] == [0, 0, 1, 2, 3, 3]


@pytest.mark.parametrize(
    ("device", "host", "budget", "expected"),
    [(45, 70, None, "device"), (70, 30, None, "host"), (90, 90, None, "none"), (70, 70, 60, "none"),
     (70, 50, 60, "host"), (30, 30, 60, "device")],
)  # fmt: skip
def test_auto_decides_by_size(device: int, host: int, budget: int | None, expected: str) -> None:
    sizes = {"device_bytes": device << 30, "host_bytes": host << 30}
    free = {"free_device": 100 << 30, "free_host": 100 << 30}
    budget = None if budget is None else budget << 30
    chosen, reason = decide("auto", **sizes, **free, budget=budget)
    assert chosen == expected
    assert "GiB" in reason
    assert decide("host", **sizes, **free, budget=budget)[0] == "host"


@pytest.mark.parametrize("residency", ["auto", "device"])
def test_resident_chunks_leave_room_for_a_model(dataset: CellDataset, residency: str) -> None:
    """Made before the model, a loader takes half of what is free, staging included, whatever would fit."""
    backend = EmulatedBackend()
    backend.free = 6 << 20  # half of it is less than chunks and the area beside them would take
    taken: list[int] = []
    allocate = backend.device_buffer

    def noted(n: int) -> Any:
        taken.append(n)
        return allocate(n)

    backend.device_buffer = noted  # type: ignore[method-assign, assignment]
    feed = feed_for(dataset, backend, residency=residency)
    assert feed.chunks.residency == "device"
    assert 0 < max(taken) <= backend.free // 2


def test_auto_says_so_once(rowpack: CellDataset, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, logger="hbx_gpu"):
        feed = feed_for(rowpack, residency="auto")
    assert feed.chunks.residency == "device"
    said = [record.getMessage() for record in caplog.records if "residency" in record.getMessage()]
    assert len(said) == 1
    assert "'device'" in said[0]
    assert "fit" in said[0]


def test_a_small_device_leaves_chunks_on_the_host(rowpack: CellDataset) -> None:
    backend = EmulatedBackend()
    backend.free = 1000
    assert feed_for(rowpack, backend, residency="auto").chunks.residency == "host"


def test_wrong_words(rowpack: CellDataset) -> None:
    for wrong in ({"residency": "disk"}, {"io": "gds"}, {"residency_load": "later", "residency": "device"}):
        with pytest.raises(ValueError, match=r"must be one of .*got"):
            feed_for(rowpack, **wrong)


def test_free_list_joins_what_comes_back() -> None:
    areas = FreeList(Part(1 << 20, 10_000), 100, 256 * 11)
    parts = [areas.take(n) for n in (1, 512, 257)]
    assert [(p.address - (1 << 20), p.nbytes) for p in parts] == [(256, 256), (512, 512), (1024, 512)]
    with pytest.raises(NoRoom):
        areas.take(256 * 6)
    areas.give(parts[1])
    assert areas.take(300).address == parts[1].address
    areas.give(parts[1])
    areas.give(parts[0])
    areas.give(parts[2])
    assert areas.take(256 * 10) == Part((1 << 20) + 256, 256 * 10)


def test_a_store_that_kernels_could_not_address(rowpack: CellDataset) -> None:
    engine = rowpack.device_engine(EmulatedBackend())
    with pytest.raises(ValueError, match=str(MAX_ARENA)):
        ChunkStore(engine, rowpack.open_reader("mmap"), capacity=1 << 36)


def test_loaded_whole_chunks_equal_the_files(dataset: CellDataset) -> None:
    engine = dataset.device_engine(EmulatedBackend())
    reader = dataset.open_reader("mmap")
    store = ChunkStore(engine, reader, capacity=1 << 20, memory="host")
    chunks = needed_chunks(dataset.table, dataset.row_index)
    store.load(chunks)
    plan = plan_rows(dataset.table, dataset.row_index, np.arange(len(dataset)))
    held, stored = store.slab(plan), reader.read(engine.directory.extents(plan.chunks))
    here = np.flatnonzero(held.address)
    assert 0 < len(here) < len(plan.chunks)  # all but those of the general codec
    for c in here.tolist():
        assert held.address[c] % 16 == 0
        assert np.array_equal(held.view(c), stored.view(c)[: held.nbytes[c]])


# -- the CPU -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("share", [2.0, 0.5, 0.0])
@pytest.mark.parametrize("residency", ["host", "device"])
def test_a_copy_on_the_heap(dataset: CellDataset, residency: str, share: float) -> None:
    budget = int(share * needed_bytes(dataset)) + 100_000 * (share > 1)
    held = hold_on_host(dataset, LoaderOptions(residency=residency, residency_budget=budget, threads=2))
    rows = np.random.default_rng(0).permutation(len(dataset))
    found, expected = held[rows], dataset[rows]
    for name in ("indices", "values", "offsets"):
        assert np.array_equal(getattr(found, name), getattr(expected, name))
    assert isinstance(held._reader, HeapReader)
    assert held._reader.nbytes <= budget + 16
    if share > 1:
        held._reader._reader.read = None  # type: ignore[method-assign, assignment]  # nothing is read any more
        assert np.array_equal(held[rows[:50]].values, expected.values[: expected.offsets[50]])
        with pytest.raises(TypeError, match="num_workers"):
            held._reader.__reduce__()


@pytest.mark.parametrize("io", [None, "mmap", "pinned", "auto"])
@pytest.mark.parametrize("residency", ["none", "host", "auto"])
def test_host_feed(dataset: CellDataset, io: str | None, residency: str) -> None:
    options = LoaderOptions(io=io, residency=residency)
    feed = HostFeed(dataset.with_row_numbers(), DenseCollate(), options)
    loader = loader_of(dataset, feed)
    for one, other in zip(
        loader, on_cpu(dataset, sampler_for(dataset), layout="dense", executor="direct"), strict=True
    ):
        same(one, other)


def test_host_feed_of_several_spaces(dataset: CellDataset) -> None:
    both = MultimodalCellDataset({"a": dataset, "b": dataset})
    feed = HostFeed(both, as_is, LoaderOptions(residency="host", residency_budget=10**6))
    made: list[Any] = feed.make([np.arange(7)])
    (batch,) = made
    assert np.array_equal(batch.modalities["b"].values, dataset[np.arange(7)].values)


def test_what_the_cpu_refuses(dataset: CellDataset) -> None:
    with pytest.raises(ValueError, match="GPU"):
        HostFeed(dataset, as_is, LoaderOptions(io="kvikio"))
    with pytest.raises(ValueError, match="residency"):
        LoaderOptions(residency="gpu")
    with pytest.raises(UnsupportedError, match="PlainDataset"):
        HostFeed(PlainDataset([1, 2]), as_is, LoaderOptions(residency="host"))


# -- io="auto" -----------------------------------------------------------------------------------------


def test_make_loader_takes_the_keywords(dataset: CellDataset) -> None:
    expected = on_cpu(dataset, sampler_for(dataset), layout="dense", executor="direct")
    options: dict[str, Any] = {"layout": "dense", "io": "auto", "residency": "device"}
    with make_loader(
        dataset, sampler_for(dataset), executor="direct", num_workers=0, **options
    ) as on_the_cpu:
        for one, other in zip(on_the_cpu, expected, strict=True):
            same(one, other)
    loader = device_loader(
        dataset, sampler_for(dataset), EmulatedBackend(), LoaderOptions.of(threads=2, **options)
    )
    for one, other in zip(brought(loader), expected, strict=True):
        same(one, other)
    assert isinstance(loader.feed, DeviceFeed)
    assert loader.feed.chunks.residency == "device"


def test_io_auto_says_what_it_measured(rowpack: CellDataset, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, logger="hbx_gpu"):
        feed = feed_for(rowpack, io="auto")
    assert feed.chunks.io in ("mmap", "pinned")
    (said,) = [record.getMessage() for record in caplog.records if "io='auto'" in record.getMessage()]
    assert feed.chunks.io in said
    assert "microseconds per row" in said
    check(rowpack, feed, "dense", epochs=1)


# -- the budget ----------------------------------------------------------------------------------------


def test_chunks_that_are_decoded_whole_count(tmp_path: Path) -> None:
    packed = codec_dataset(tmp_path / "a", "homeobox.bitpacking")
    other = codec_dataset(tmp_path / "b", "hbx_gpu.rowpack")
    rows = np.arange(0, 120, 3)
    extra = feed_for(packed).nbytes([rows])[0] - feed_for(other).nbytes([rows])[0]
    plan = plan_rows(packed.table, packed.row_index, rows)
    assert extra == len(plan.chunks) * 256 * 4
    assert feed_for(packed).nbytes([rows[:0]]) == [0]
