"""Batches that the device plans are those that the host plans."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from hbx_gpu._engine.device.planned import MOST_SLOTS
from hbx_gpu._loading.feeds.device import DeviceFeed
from hbx_gpu._loading.residency.device import DeviceChunks
from hbx_gpu._source import RowIndex
from hbx_gpu._tensors import gathered
from hbx_gpu.dataloader import CellDataset
from hbx_gpu.errors import CorruptChunkError
from hbx_gpu.testing import example_dataset, example_groups
from hbx_gpu.transforms import log1p, normalize_total
from tests.emulation.backend import Arena, EmulatedBackend
from tests.emulation.streams import StreamBackend
from tests.test_device_loader import same
from tests.test_residency import feed_for, on_cuda


def dataset_of(root: Path, kind: str = "plain", n_rows: int = 30) -> CellDataset:
    """Two matrices of rowpack chunks; of kind "cut", chunks are so small that rows lie in several."""
    groups = example_groups(n_rows)
    for group in groups:
        group.codec = "hbx_gpu.rowpack"
        group.chunk = 8 if kind == "cut" else 128
        if kind == "panel":
            group.remap = np.where(group.remap % 3 == 0, -1, group.remap).astype(np.int32)
        elif kind == "sorted":
            group.remap = np.sort(group.remap)
    dataset = example_dataset(root, groups)
    n = len(dataset)
    numbers: dict[str, np.ndarray] = {
        "batch": np.arange(n, dtype=np.int16),
        "depth": np.linspace(1, 2, n, dtype=np.float32),
    }
    dataset = dataset.with_columns({**numbers, "name": np.array([f"c{i}" for i in range(n)], object)})
    if kind != "lacking":
        return dataset
    rows = dataset.row_index
    source = np.where(np.arange(len(rows)) % 4 == 0, -1, rows.source).astype(np.int32)
    return dataset._derived(_rows=RowIndex(source, rows.start, rows.length))


def both(dataset: CellDataset, backend: Any, layout: str, **options: Any) -> tuple[DeviceFeed, DeviceFeed]:
    """A feed whose batches the device plans, and one whose batches the host plans."""
    planned, staged = (feed_for(dataset, backend, layout, residency="device", **options) for _ in range(2))
    assert planned.chunks.index is not None
    staged.chunks.index = None
    return planned, staged


def batches(feed: DeviceFeed, selections: list[np.ndarray]) -> list[Any]:
    """Finished batches, a window for those that go together."""
    windows = [[rows] for rows in selections] if feed.one_batch_per_window else [selections]
    return [feed.deliver(made) for window in windows for made in feed.make(window)]


@pytest.mark.parametrize("backend", [EmulatedBackend, on_cuda])
@pytest.mark.parametrize("kind", ["plain", "sorted", "panel", "cut", "lacking"])
@pytest.mark.parametrize(
    ("layout", "options"),
    [
        ("dense", {"dtype": "bfloat16", "transform": [normalize_total(1e4), log1p]}),
        ("dense", {"dtype": "float64"}),
        ("csr", {}),
    ],
    ids=["dense", "flat", "csr"],
)
def test_batches_are_those_that_the_host_plans(
    tmp_path: Path, kind: str, layout: str, options: dict[str, Any], backend: Any
) -> None:
    dataset = dataset_of(tmp_path, kind)
    planned, staged = both(dataset, backend(), layout, **options)
    rng = np.random.default_rng(0)
    selections = [rng.integers(0, len(dataset), n) for n in (7, 1, 12)]
    for found, expected in zip(batches(planned, selections), batches(staged, selections), strict=True):
        same(found, expected)


def test_batches_on_streams_that_lag(tmp_path: Path) -> None:
    """Row numbers, records and elements of windows in flight do not meet."""
    dataset = dataset_of(tmp_path, "panel")
    planned, staged = both(dataset, StreamBackend(delay=0.001), "csr")
    rng = np.random.default_rng(1)
    selections = [rng.integers(0, len(dataset), 5) for _ in range(6)]
    windows = [planned.make([rows]) for rows in selections]
    found = [planned.deliver(made) for window in windows for made in window]
    for one, other in zip(found, batches(staged, selections), strict=True):
        same(one, other)


def test_chunks_in_page_locked_memory_are_planned_in_place(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    dataset, rows = dataset_of(tmp_path), np.arange(9)
    expected = batches(both(dataset, EmulatedBackend(), "dense")[1], [rows])
    for in_place in (True, False):
        monkeypatch.setattr(DeviceChunks, "_in_place_is_faster", lambda _, answer=in_place: answer)
        feed = feed_for(dataset, EmulatedBackend(), residency="host")
        assert (feed.chunks.index is not None) == in_place
        same(batches(feed, [rows])[0], expected[0])


def test_a_chunk_that_kernels_find_wrong_is_named(tmp_path: Path) -> None:
    """The host plans the batch anew to say which one it is; batches without it are fine."""
    dataset = dataset_of(tmp_path)
    feed, _ = both(dataset, EmulatedBackend(), "dense")
    assert feed.chunks.store is not None
    plan = dataset.plan(np.array([35]))
    arena = feed.chunks.store.arena
    resident = feed.chunks.store.lookup(plan)
    assert isinstance(arena, Arena)
    arena.memory[resident.at[-1] + 32 + 8] = (
        77  # the width of the first block, which is checked by kernels alone
    )
    batches(feed, [np.arange(10)])
    with pytest.raises(CorruptChunkError, match="layers/counts") as raised:
        batches(feed, [np.array([3, 35])])
    assert raised.value.chunk == plan.chunks[-1] - dataset.directory.base[plan.chunk_array[-1]]
    batches(feed, [np.arange(10)])


def test_what_the_device_does_not_plan(tmp_path: Path) -> None:
    """Chunks of other codecs, chunks that are not all there, and rows that lie in very many of them."""
    mixed = example_groups(30)
    mixed[0].codec = "hbx_gpu.rowpack"
    long = example_groups(6)
    for group in long:
        group.codec, group.chunk, group.chunks_per_shard = "hbx_gpu.rowpack", 1, 256
        assert np.diff(group.matrix.indptr).max() > MOST_SLOTS
    for name, groups in (("mixed", mixed), ("long", long)):
        feed = feed_for(example_dataset(tmp_path / name, groups), residency="device")
        assert feed.chunks.index is None
    dataset = dataset_of(tmp_path / "whole")
    assert feed_for(dataset, residency="device", residency_load="touch").chunks.index is None
    assert feed_for(dataset, residency="device", residency_budget=1000).chunks.index is None
    assert feed_for(dataset, residency="none").chunks.index is None


def test_metadata_of_every_dtype(tmp_path: Path) -> None:
    dataset = dataset_of(tmp_path)
    rows = np.array([5, 40, 5, 0])
    feed, _ = both(dataset, EmulatedBackend(), "dense")
    (batch,) = batches(feed, [rows])
    columns = gathered(dataset.columns, dataset.categories, np.arange(len(dataset)))
    for name, column in {**columns, "index": np.arange(len(dataset))}.items():
        found = batch[name]
        assert isinstance(found, torch.Tensor) == (column.dtype.kind in "iuf")
        np.testing.assert_array_equal(np.asarray(found), column[rows])
        assert np.asarray(found).dtype == column.dtype


def test_row_numbers_of_the_caller_stay_the_callers(tmp_path: Path) -> None:
    """Strided and read-only ones are taken, and batches have an array of their own."""
    dataset = dataset_of(tmp_path).with_row_numbers()
    numbers = np.arange(40)
    strided = numbers[::3]
    strided.flags.writeable = False
    batch = dataset[strided]
    assert batch.metadata is not None
    assert not np.shares_memory(batch.metadata["index"], numbers)
    np.testing.assert_array_equal(batch.metadata["index"], strided)
    feed, _ = both(dataset_of(tmp_path / "again"), EmulatedBackend(), "dense")
    np.testing.assert_array_equal(batches(feed, [strided])[0]["index"], strided)
