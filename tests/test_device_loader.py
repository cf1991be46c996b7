"""The loader on a device: the batches of the CPU, in order, and nothing used before or after its time."""

from __future__ import annotations

import logging
import threading
from collections.abc import Iterable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from hbx_gpu import _devices as devices
from hbx_gpu._collates import DenseCollate
from hbx_gpu._loading.feeds.device import DeviceFeed
from hbx_gpu._loading.make import device_loader
from hbx_gpu._loading.options import LoaderOptions
from hbx_gpu.dataloader import CellDataset, make_loader
from hbx_gpu.errors import CorruptChunkError, DeviceUnavailableError, InvalidDataError, UnsupportedError
from hbx_gpu.sampler import CellSampler
from hbx_gpu.testing import N_FEATURES, example_dataset, example_groups
from hbx_gpu.transforms import Transform
from tests.emulation.backend import EmulatedBackend
from tests.emulation.backends import BACKENDS, backend_named
from tests.emulation.streams import JUNK, StreamBackend, read_later
from tests.kernels.conftest import on_gpu
from tests.threads import loader_threads

TOLERANCE = {"float32": 5e-6, "float64": 5e-6, "float16": 2e-3, "bfloat16": 1e-2}


def codec_dataset(root: Path, codec: str, drop: bool = False) -> CellDataset:
    groups = example_groups()
    for group in groups:
        group.codec = codec
        if drop:
            group.remap = np.where(group.remap % 3 == 0, -1, group.remap).astype(np.int32)
    return example_dataset(root, groups)


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> CellDataset:
    return codec_dataset(tmp_path_factory.mktemp("arrays"), "hbx_gpu.rowpack")


@pytest.fixture(params=BACKENDS)
def backend(request: pytest.FixtureRequest) -> Any:
    return backend_named(request.param)


def sampler_for(dataset: CellDataset, **kwargs: Any) -> CellSampler:
    return CellSampler(dataset.groups_np, **{"batch_size": 16, "seed": 3, "num_workers": 0, **kwargs})


def on_cpu(dataset: CellDataset, sampler: Any, **kwargs: Any) -> list[dict[str, Any]]:
    return list(make_loader(dataset, sampler, num_workers=0, **kwargs))


def brought(batches: Iterable[dict[str, Any]]) -> list[dict[str, Any]]:
    """Batches in host memory; a GPU's current stream orders the copy behind the hand-over."""
    return [{k: v.cpu() if isinstance(v, torch.Tensor) else v for k, v in b.items()} for b in batches]


def same(found: dict[str, Any], expected: dict[str, Any], tolerance: float = 0.0) -> None:
    assert list(found) == list(expected)
    for key, value in expected.items():
        if not isinstance(value, torch.Tensor):
            assert np.array_equal(found[key], value)
        elif value.layout is torch.sparse_csr:
            assert found[key].layout is torch.sparse_csr
            assert found[key].shape == value.shape
            for part in ("crow_indices", "col_indices", "values"):
                got, want = getattr(found[key], part)(), getattr(value, part)()
                assert got.dtype == want.dtype
                assert torch.equal(got, want)
        else:
            assert found[key].dtype == value.dtype
            torch.testing.assert_close(found[key], value, rtol=tolerance, atol=0)


@pytest.mark.parametrize("layout", ["dense", "csr"])
@pytest.mark.parametrize(
    "codec", ["hbx_gpu.rowpack", "homeobox.bitpacking", "zstd", "none"], ids=lambda name: name.split(".")[-1]
)
@pytest.mark.parametrize(
    ("drop", "reader"),
    [(False, "mmap"), (True, "mmap"), (False, "pinned")],
    ids=["all", "panel", "pinned"],
)
def test_batches_equal_those_on_the_cpu(
    backend: Any, tmp_path: Path, layout: str, codec: str, drop: bool, reader: str
) -> None:
    dataset = codec_dataset(tmp_path, codec, drop)
    expected = on_cpu(dataset, sampler_for(dataset, locality="none"), layout=layout)
    sampler = sampler_for(dataset, locality="none")
    loader = device_loader(dataset, sampler, backend, LoaderOptions(layout=layout, threads=2, io=reader))
    found = brought(loader)
    assert len(found) == len(expected) == len(loader)
    for one, other in zip(found, expected, strict=True):
        same(one, other)
    assert sorted(np.concatenate([b["index"] for b in found]).tolist()) == list(range(len(dataset)))


@pytest.mark.parametrize("dtype", list(TOLERANCE))
def test_transforms_equal_within_rounding(backend: Any, dataset: CellDataset, dtype: str) -> None:
    transform = Transform(target_sum=1e4, log1p=True)
    expected = on_cpu(dataset, sampler_for(dataset), layout="dense", dtype=dtype, transform=transform)
    loader = device_loader(
        dataset,
        sampler_for(dataset),
        backend,
        LoaderOptions(layout="dense", dtype=dtype, transform=transform),
    )
    for one, other in zip(brought(loader), expected, strict=True):
        same(one, other, TOLERANCE[dtype])


@pytest.mark.parametrize("window", [1, 3])
def test_resume_in_mid_epoch(backend: Any, dataset: CellDataset, window: int) -> None:
    def fresh() -> Any:
        return device_loader(
            dataset, sampler_for(dataset), backend, LoaderOptions(layout="dense", window=window)
        )

    with fresh() as loader:
        loader.set_epoch(2)
        whole = brought(loader)
    with fresh() as loader:
        loader.set_epoch(2)
        batches = iter(loader)
        begun = brought(next(batches) for _ in range(3))
        state = loader.state_dict()
        del batches
    with fresh() as loader:
        loader.load_state_dict(state)
        rest = brought(loader)
    for one, other in zip(begun + rest, whole, strict=True):
        same(one, other)


def test_a_corrupt_chunk_never_yields_a_batch(backend: Any, tmp_path: Path) -> None:
    dataset = codec_dataset(tmp_path, "homeobox.bitpacking")
    path = sorted((tmp_path / "g1/csr/layers/counts/c").iterdir())[0]
    stored = bytearray(path.read_bytes())
    stored[0] = 77  # no transform has this number: only the kernel looks at it
    path.write_bytes(stored)
    sampler = sampler_for(dataset, locality="group", shuffle=False)
    batches = iter(
        device_loader(dataset, sampler, backend, LoaderOptions(layout="dense", threads=2, window=1))
    )
    with pytest.raises(CorruptChunkError, match="g1/csr/layers/counts") as raised:
        list(batches)
    assert raised.value.chunk == 0
    assert raised.value.file.endswith(path.name)
    assert next(batches, None) is None
    assert not loader_threads()


def test_transforms_refuse_what_is_no_count(backend: Any, tmp_path: Path) -> None:
    groups = example_groups()
    for group in groups:
        group.codec = "zstd"
        group.matrix.data = (group.matrix.data / 7).astype(np.float32)
    dataset = example_dataset(tmp_path, groups)
    options: dict[str, Any] = {"layout": "dense", "transform": Transform(log1p=True)}
    for loader in (
        make_loader(dataset, sampler_for(dataset), num_workers=0, **options),
        device_loader(dataset, sampler_for(dataset), backend, LoaderOptions.of(**options)),
    ):
        with pytest.raises(InvalidDataError, match="counts"):
            next(iter(loader))
    assert (
        len(brought(device_loader(dataset, sampler_for(dataset), backend, LoaderOptions(layout="dense"))))
        == 8
    )


def noted(seen: list[int], allocate: Any, n: int) -> Any:
    seen.append(n)
    return allocate(n)


def test_steady_state_allocates_no_staging(backend: Any, dataset: CellDataset) -> None:
    made: list[int] = []
    for name in ("host_buffer", "device_buffer"):
        allocate = getattr(backend, name)
        setattr(backend, name, partial(noted, made, allocate))
    loader = device_loader(
        dataset, sampler_for(dataset), backend, LoaderOptions(layout="dense", threads=2, window=1)
    )
    for epoch in range(2):
        loader.set_epoch(epoch)
        assert len(brought(loader)) == len(loader)
    after_two = len(made)
    for epoch in range(2, 6):
        loader.set_epoch(epoch)
        assert len(brought(loader)) == len(loader)
    # Threads may now and then want a slot more than before, but not one per batch.
    assert len(made) - after_two <= 6
    assert after_two > 0


def test_the_order_of_streams_is_what_makes_batches_right(dataset: CellDataset) -> None:
    """The canary: with the waits taken out, the same test reads junk."""

    def wrong_values(waits: bool) -> int:
        backend = StreamBackend(delay=0.02, waits=waits)
        loader = device_loader(
            dataset, sampler_for(dataset), backend, LoaderOptions(layout="dense", threads=2, window=1)
        )
        expected = on_cpu(dataset, sampler_for(dataset), layout="dense")
        if not waits:  # nor may the host's own wait, which it needs for the status words, hide it
            loader.feed.deliver = partial(deliver_blindly, backend)  # type: ignore[method-assign]
        seen: list[np.ndarray] = []
        for batch in loader:
            read_later(backend, batch["X"], seen)
        backend.consumer.synchronize()
        return sum(int((got != want["X"].numpy()).sum()) for got, want in zip(seen, expected, strict=True))

    assert wrong_values(waits=True) == 0
    assert wrong_values(waits=False) > 0


def deliver_blindly(backend: StreamBackend, made: Any) -> dict[str, Any]:
    backend.hand_over(made.window.event, made.window.tensors)
    return {"X": made.window.x(made.first, made.last)}


def test_memory_is_not_given_away_under_the_consumer(dataset: CellDataset) -> None:
    """The other canary: unless the consumer's stream is recorded, later batches write over what it reads."""

    def wrong_values(records: bool) -> int:
        backend = StreamBackend(records=records)
        loader = device_loader(
            dataset, sampler_for(dataset), backend, LoaderOptions(layout="dense", threads=2, window=1)
        )
        expected = on_cpu(dataset, sampler_for(dataset), layout="dense")
        seen: list[np.ndarray] = []
        for batch in loader:
            read_later(backend, batch["X"], seen, delay=0.03)
            del batch  # Python is done with it, the consumer's stream is not
        backend.consumer.synchronize()
        return sum(int((got != want["X"].numpy()).sum()) for got, want in zip(seen, expected, strict=True))

    assert wrong_values(records=True) == 0
    assert wrong_values(records=False) > 0


def test_a_slot_is_not_filled_while_the_device_reads_it(dataset: CellDataset) -> None:
    """Batches that nobody delivers give their slots back through no event but `busy`."""
    backend = StreamBackend(delay=0.03)
    feed = DeviceFeed(dataset, backend, LoaderOptions(layout="dense"))
    first = feed.make([np.arange(10)])[0]
    slot = first.window.slot
    assert slot is not None
    feed._free.append(slot)  # as if it had been given up without waiting
    second = feed.make([np.arange(50, 60)])[0]
    assert second.window.slot is slot
    backend.decode.synchronize()
    expected = DenseCollate()(dataset[np.arange(10)])["X"]
    assert torch.equal(first.window.tensors[0], expected)


def test_host_and_device_budget_holds(dataset: CellDataset) -> None:
    backend = EmulatedBackend()
    loader = device_loader(
        dataset,
        sampler_for(dataset),
        backend,
        LoaderOptions(layout="dense", memory_budget=1, threads=2, window=1),
    )
    feed = loader.feed
    alive: list[int] = []
    held = 0
    lock = threading.Lock()
    make, deliver = feed.make, feed.deliver

    def making(selections: Any) -> Any:
        nonlocal held
        with lock:
            held += len(selections)
            alive.append(held)
        return make(selections)

    def delivering(made: Any) -> Any:
        nonlocal held
        with lock:
            held -= 1
        return deliver(made)

    feed.make, feed.deliver = making, delivering  # type: ignore[method-assign]
    assert len(list(loader)) == len(loader)
    assert max(alive) == 1  # a budget of nothing: one batch at a time


def test_what_a_gpu_loader_refuses(dataset: CellDataset) -> None:
    backend = EmulatedBackend()
    with pytest.raises(ValueError, match="num_workers"):
        device_loader(dataset, sampler_for(dataset), backend, LoaderOptions(layout="dense", num_workers=2))
    with pytest.raises(UnsupportedError, match="list is loaded on the CPU only"):
        device_loader([1, 2, 3], sampler_for(dataset), backend, LoaderOptions(layout="dense"))


no_gpu_here = pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without a GPU")


@no_gpu_here
def test_without_a_gpu_cuda_names_what_is_missing(dataset: CellDataset) -> None:
    for device in ("cuda", "cuda:1", torch.device("cuda", 0)):
        with pytest.raises(DeviceUnavailableError, match=r"(torch|GPU|cupy).*auto"):
            make_loader(dataset, sampler_for(dataset), device=device, layout="dense")


@no_gpu_here
def test_without_a_gpu_auto_is_the_cpu_and_says_so_once(
    dataset: CellDataset, caplog: pytest.LogCaptureFixture
) -> None:
    devices.say_once.cache_clear()
    with caplog.at_level(logging.INFO, logger="hbx_gpu"):
        loaders = [
            make_loader(dataset, sampler_for(dataset), device="auto", layout="dense") for _ in range(2)
        ]
    assert len([r for r in caplog.records if "CPU" in r.getMessage()]) == 1
    first = next(iter(loaders[0]))
    assert first["X"].device.type == "cpu"
    assert set(first) == {"X", "index", "type", "score", "day"}
    assert first["X"].shape == (16, N_FEATURES)
    same(first, next(iter(loaders[1])))


@pytest.mark.parametrize("device", ["gpu", "cuda:x", "mps"])
def test_a_device_that_does_not_exist(dataset: CellDataset, device: str) -> None:
    with pytest.raises(ValueError, match="device must be"):
        make_loader(dataset, sampler_for(dataset), device=device, layout="dense")


def test_junk_is_not_zero() -> None:
    assert EmulatedBackend().empty((3,), "uint8").tolist() == [JUNK] * 3


@pytest.mark.gpu
@pytest.mark.filterwarnings("ignore:Synchronization debug mode is a prototype feature")
def test_nothing_synchronizes_the_consumer(tmp_path: Path) -> None:
    on_gpu()
    groups = example_groups()
    for group in groups:  # columns that ascend: those of a sparse tensor that do not are sorted, which waits
        group.codec = "hbx_gpu.rowpack"
        group.matrix.sort_indices()
        group.remap = np.sort(group.remap)
    dataset = example_dataset(tmp_path, groups)
    # DALI waits for each batch on a thread of its own, which is not the consumer's.
    make = partial(make_loader, dataset, sampler_for(dataset), device="cuda", executor="direct")
    for layout in ("dense", "csr"):  # compile and allocate first
        list(make(layout=layout))
    try:  # from here on: a mode that is left on fails every test after this one
        torch.cuda.set_sync_debug_mode("error")
        for layout in ("dense", "csr"):
            for batch in make(layout=layout):
                assert batch["X"].is_cuda
    finally:
        torch.cuda.set_sync_debug_mode("default")
