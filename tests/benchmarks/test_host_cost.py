"""What the host does for a batch does not grow with its rows: calls are counted, not seconds."""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path

import numpy as np
import pytest

from benchmarks import host_cost
from benchmarks.null_backend import NullBackend
from hbx_gpu import loader_stats as stats
from hbx_gpu.dataloader import CellDataset
from hbx_gpu.testing import example_dataset, example_groups


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> CellDataset:
    groups = example_groups(2_000)
    for group in groups:
        group.codec = "hbx_gpu.rowpack"
    return example_dataset(tmp_path_factory.mktemp("arrays"), groups)


@pytest.mark.parametrize("layout", list(host_cost.LAYOUTS))
@pytest.mark.parametrize("path", list(host_cost.PATHS))
def test_calls_do_not_grow_with_the_rows(dataset: CellDataset, path: str, layout: str) -> None:
    feed = host_cost.feed_of(dataset, path, layout)
    rng = np.random.default_rng(0)
    feed.deliver(feed.make([np.arange(len(dataset))])[0])  # verifies every chunk
    found = {}
    for n in (800, 3_200):  # both need all files
        for _ in range(2):  # the first warms up
            rows = rng.integers(0, len(dataset), n)
            found[n] = host_cost.calls(partial(host_cost.delivered, feed, rows))
    assert found[3_200] <= 1.1 * found[800], found


def test_calls_are_counted() -> None:
    def work() -> None:
        for _ in range(10):
            abs(-1)

    assert 11 <= host_cost.calls(work) <= 13  # 10, `work` itself, and what ends the counting


def test_stages_are_measured_in_cpu_time(dataset: CellDataset) -> None:
    found = host_cost.measure(host_cost.feed_of(dataset, "stream", "dense"), [np.arange(100)] * 3)
    assert set(found) == set(host_cost.COLUMNS)
    assert sum(found[name] for name in host_cost.COLUMNS[:-1]) == pytest.approx(found["total"], rel=0.5)
    assert vars(stats)["time"].perf_counter() > 0  # the clock is back


def test_the_null_backend_counts_what_it_does_not_do(dataset: CellDataset) -> None:
    backend = NullBackend()
    engine = dataset.device_engine(backend)
    plan, slab = dataset.read(np.arange(50))
    engine.dense(plan, slab)
    assert backend.launches == 1
    assert backend.copies >= 2


def test_the_benchmark(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    options = ["--cells", "400", "--genes", "100", "--rows", "16", "--batches", "3", "--layouts", "csr"]
    assert host_cost.main([*options, "--data", str(tmp_path / "data"), "--out", str(tmp_path)]) == 0
    printed = capsys.readouterr().out
    results = json.loads((tmp_path / "host_cost.json").read_text())["results"]
    assert [r["path"] for r in results] == [*host_cost.PATHS, "hand-over"]
    assert "stream, csr, 16 rows" in printed


@pytest.mark.parametrize(("layout", "most"), [("dense", 170), ("csr", 215)])
def test_batches_that_the_device_plans_cost_the_host_the_same(
    dataset: CellDataset, layout: str, most: int
) -> None:
    """Row numbers are all that crosses, in a bounded number of calls of Python and C functions."""
    feed = host_cost.feed_of(dataset, "device", layout)
    assert feed.chunks.index is not None
    found = set()
    for n in (16, 256, 4_000):
        rows = np.random.default_rng(0).integers(0, len(dataset), n)
        host_cost.delivered(feed, rows)  # slots grow, places are computed
        before = feed._backend.copies
        found.add(host_cost.calls(partial(host_cost.delivered, feed, rows)))
        assert feed._backend.copies - before <= 3
    assert len(found) == 1
    assert max(found) <= most
