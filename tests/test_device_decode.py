"""Loaders whose chunks of general codecs are decompressed on the device: the batches of the CPU."""

from __future__ import annotations

import struct
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from hbx_gpu._codecs.checksum import crc32c
from hbx_gpu._loading.make import device_loader
from hbx_gpu._loading.options import LoaderOptions
from hbx_gpu._loading.residency import device as device_residency
from hbx_gpu._storage import kvikio
from hbx_gpu._storage.kvikio import KvikioReader
from hbx_gpu.dataloader import CellDataset, make_loader
from hbx_gpu.errors import CorruptChunkError, DeviceUnavailableError
from hbx_gpu.testing import example_dataset, example_groups
from tests.emulation.backend import EmulatedBackend
from tests.emulation.streams import StreamBackend
from tests.kernels.conftest import on_gpu
from tests.storage.kvikio_stand_in import StandIn
from tests.test_device_loader import brought, codec_dataset, on_cpu, same
from tests.test_residency import check, feed_for, needed_bytes, sampler_for

CODECS = ("zstd+crc32c", "blosc-lz4-bits+crc32c", "hbx_gpu.rowpack", "lz4")


def cuda() -> Any:
    """A real device."""
    on_gpu()
    from hbx_gpu._engine.device.cuda import CudaBackend

    return CudaBackend(0)


BACKENDS = [EmulatedBackend, partial(StreamBackend, 0.001), pytest.param(cuda, marks=pytest.mark.gpu)]


@pytest.fixture(autouse=True)
def small_areas(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(device_residency, "AREA_BYTES", 4 << 20)


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> CellDataset:
    """Sources of several codecs, one of them with dropped columns."""
    groups = example_groups(40) + example_groups(40)
    for group, codec in zip(groups, CODECS, strict=True):
        group.codec = codec
    groups[1].remap = np.where(groups[1].remap % 3 == 0, -1, groups[1].remap).astype(np.int32)
    return example_dataset(tmp_path_factory.mktemp("general"), groups)


@pytest.mark.parametrize("layout", ["dense", "csr"])
@pytest.mark.parametrize("decode", ["host", "auto", "device"])
@pytest.mark.parametrize("backend", BACKENDS, ids=["emulated", "streams", "cuda"])
def test_batches_equal_those_on_the_cpu(dataset: CellDataset, backend: Any, decode: str, layout: str) -> None:
    sampler = partial(sampler_for, dataset)
    expected = on_cpu(dataset, sampler(), layout=layout, executor="direct")
    loader = device_loader(
        dataset, sampler(), backend(), LoaderOptions(layout=layout, threads=2, decode=decode)
    )
    found = brought(loader)
    assert len(found) == len(expected)
    for one, other in zip(found, expected, strict=True):
        same(one, other)


@pytest.mark.parametrize("layout", ["dense", "csr"])
@pytest.mark.parametrize("load", ["start", "touch"])
@pytest.mark.parametrize("share", [2.0, 0.4], ids=["all", "part"])
@pytest.mark.parametrize("backend", BACKENDS[1:], ids=["streams", "cuda"])
def test_beside_resident_chunks(
    dataset: CellDataset, layout: str, load: str, share: float, backend: Any
) -> None:
    """Streams are staged in the arena of the chunks that stay, and decompressed there."""
    options: dict[str, Any] = {"residency_budget": int(share * needed_bytes(dataset)), "decode": "device"}
    feed = feed_for(dataset, backend(), layout, residency="device", residency_load=load, **options)
    check(dataset, feed, layout)


@pytest.mark.parametrize("in_place", [True, False])
def test_beside_chunks_in_page_locked_memory(dataset: CellDataset, in_place: bool) -> None:
    backend = EmulatedBackend()
    feed = feed_for(dataset, backend, "dense", residency="host", decode="device", io="pinned")
    feed.chunks.in_place = in_place
    backend.launches.clear()
    check(dataset, feed, "dense", epochs=1)
    assert "check_streams" in backend.launches


def test_beside_chunks_that_kvikio_reads(dataset: CellDataset, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kvikio, "missing", lambda: None)
    monkeypatch.setattr(kvikio, "KvikioReader", partial(KvikioReader, open_file=StandIn))
    backend = StreamBackend()
    check(dataset, feed_for(dataset, backend, "csr", io="kvikio", decode="device"), "csr")
    assert "check_streams" in backend.launches


def test_a_damaged_stream_is_named_at_delivery(tmp_path: Path) -> None:
    dataset = codec_dataset(tmp_path, "zstd+crc32c")
    path = sorted((tmp_path / "g1/csr/layers/counts/c").iterdir())[0]
    stored = bytearray(path.read_bytes())
    # The first inner chunk of the shard; its checksum is made right, that of the index says nothing of it.
    index = np.frombuffer(bytes(stored[-36:-4]), "<u8")
    end = int(index[0] + index[1])
    stored[end - 40 : end - 4] = b"\xff" * 36
    stored[end - 4 : end] = struct.pack("<I", crc32c(bytes(stored[int(index[0]) : end - 4])))
    path.write_bytes(stored)
    with pytest.raises(CorruptChunkError, match=r"g1/csr/layers/counts.*stream"):
        brought(
            device_loader(dataset, sampler_for(dataset), EmulatedBackend(), LoaderOptions(layout="dense"))
        )


def test_decoded_chunks_count_as_memory(tmp_path: Path) -> None:
    dataset = codec_dataset(tmp_path, "zstd+crc32c")
    rows = np.arange(20)
    device, host = (feed_for(dataset, decode=decode).nbytes([rows])[0] for decode in ("device", "host"))
    assert device - host > 256 * 4


def test_the_keyword_reaches_the_engine(dataset: CellDataset) -> None:
    backend = EmulatedBackend()
    backend.no_decompressor = "there is none here"
    with pytest.raises(DeviceUnavailableError, match="there is none here"):
        device_loader(dataset, sampler_for(dataset), backend, LoaderOptions(layout="dense", decode="device"))
    with pytest.raises(ValueError, match="'auto', 'host', 'device', got 'nvcomp'"):
        make_loader(dataset, sampler_for(dataset), layout="dense", decode="nvcomp")
    with make_loader(
        dataset, sampler_for(dataset), layout="dense", decode="device", executor="direct"
    ) as loader:
        same(next(iter(loader)), on_cpu(dataset, sampler_for(dataset), layout="dense", executor="direct")[0])
