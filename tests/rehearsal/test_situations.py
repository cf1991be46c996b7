"""What a first run on a GPU would meet: epochs left early, a second device, hidden waits, pooled streams."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from hbx_gpu._streams import own_stream
from hbx_gpu.dataloader import CellDataset, make_loader
from hbx_gpu.testing import example_groups, write_sources
from tests.gpu import gpu_missing
from tests.rehearsal import runtime
from tests.test_device_loader import brought, codec_dataset, on_cpu, same, sampler_for

pytestmark = pytest.mark.gpu
WIDE = 20_000  # genes: a row of float32 takes more shared memory than a kernel has without asking for it


@pytest.fixture(autouse=True)
def gpu() -> None:
    if reason := gpu_missing():
        pytest.fail(reason)


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> CellDataset:
    return codec_dataset(tmp_path_factory.mktemp("arrays"), "hbx_gpu.rowpack")


def loader_of(dataset: CellDataset, **options: Any) -> Any:
    device = options.pop("device", "cuda")
    return make_loader(
        dataset, sampler_for(dataset), device=device, executor="direct", threads=4, window=1, **options
    )


@pytest.mark.parametrize("layout", ["dense", "csr"])
@pytest.mark.parametrize("residency", ["none", "device"])
def test_epochs_left_early_do_not_disturb_the_next(dataset: CellDataset, layout: str, residency: str) -> None:
    loader = loader_of(dataset, layout=layout, residency=residency)
    for epoch in range(3):
        loader.set_epoch(100 + epoch)
        for _ in loader:
            break
        sampler = sampler_for(dataset)
        sampler.set_epoch(epoch)
        loader.set_epoch(epoch)
        expected = on_cpu(dataset, sampler, layout=layout, executor="direct")
        for one, other in zip(brought(loader), expected, strict=True):
            same(one, other)


def test_wide_rows_on_a_second_device(tmp_path: Path) -> None:
    if torch.cuda.device_count() < 2:
        pytest.skip("there is one GPU")
    groups = example_groups()
    for group in groups:
        group.codec, group.remap = "hbx_gpu.rowpack", (group.remap * (WIDE // 50)).astype(np.int32)
    sources, rows = write_sources(tmp_path, groups)
    uids = np.array([f"f{i}" for i in range(WIDE)], dtype=object)
    dataset = CellDataset(sources, rows, layer="counts", n_features=WIDE, feature_uids=uids)
    expected = on_cpu(dataset, sampler_for(dataset), layout="dense", executor="direct")
    with loader_of(dataset, layout="dense", device="cuda:1") as loader:
        found = list(loader)
    assert {batch["X"].device for batch in found} == {torch.device("cuda", 1)}
    for one, other in zip(brought(found), expected, strict=True):
        same(one, other)
    if runtime.rehearsing():
        import cupy

        assert {name for device, name in cupy.loads if device == 1}


@pytest.mark.parametrize("residency", ["none", "device"])
@pytest.mark.parametrize("layout", ["dense", "csr"])
def test_no_copy_of_an_epoch_waits_for_pageable_memory(
    dataset: CellDataset, layout: str, residency: str
) -> None:
    """CUDA copies pageable memory while the caller waits, which torch's check for waits does not see."""
    if not runtime.rehearsing():
        pytest.skip("a real runtime does not count its copies")
    loader = loader_of(dataset, layout=layout, residency=residency)
    list(loader)
    before = runtime.counts()
    n = len(list(loader))
    after = runtime.counts()
    assert n > 3
    assert after["launches"] > before["launches"]
    assert after["copies"] > before["copies"]
    assert after["pageable copies"] == before["pageable copies"]


def test_streams_of_the_loader_are_its_own() -> None:
    """torch hands out 32 streams in turn: after that many the consumer's may be anybody's."""
    streams = {own_stream(0, purpose).cuda_stream for purpose in ("copy", "dali", "images")}
    streams.add(own_stream(0, "decode", urgent=True).cuda_stream)
    for _ in range(70):
        torch.cuda.Stream(0)
    again = {own_stream(0, purpose).cuda_stream for purpose in ("copy", "dali", "images")}
    again.add(own_stream(0, "decode", urgent=True).cuda_stream)
    assert len(streams) == 4
    assert again == streams
