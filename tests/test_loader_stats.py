"""Where the time goes: what stages, threads and the consumer are charged with."""

from __future__ import annotations

import json
import re
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from hbx_gpu._loading.loader import CellLoader
from hbx_gpu._loading.make import device_loader
from hbx_gpu._loading.options import LoaderOptions
from hbx_gpu.dataloader import CellDataset, make_loader
from hbx_gpu.loader_stats import OTHER, STAGES, WARM_UP, Recorder, format_line, stage
from hbx_gpu.sampler import CellSampler
from hbx_gpu.testing import N_FEATURES, example_dataset, example_groups
from tests.emulation.backend import EmulatedBackend


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> CellDataset:
    return example_dataset(tmp_path_factory.mktemp("arrays"), example_groups())


def sampler_for(n: int, batch_size: int = 10) -> CellSampler:
    return CellSampler(np.zeros(n, np.int32), batch_size=batch_size, shuffle=False, num_workers=0)


class Timed:
    """A feed that spends given seconds in each stage of a window."""

    one_batch_per_window = False

    def __init__(self, **seconds: float) -> None:
        self.seconds = seconds

    def make(self, selections: Sequence[np.ndarray]) -> Sequence[np.ndarray]:
        for name, seconds in self.seconds.items():
            if name in STAGES:
                with stage(name) as one:
                    one.nbytes = 1000
                    time.sleep(seconds)
            else:
                time.sleep(seconds)
        return selections

    def deliver(self, made: np.ndarray) -> np.ndarray:
        return made

    def nbytes(self, selections: Sequence[np.ndarray]) -> list[int]:
        return [1] * len(selections)

    def checked(self, batches: Sequence[np.ndarray]) -> list[np.ndarray]:
        return list(batches)

    def set_epoch(self, epoch: int) -> None:
        pass


def loader_over(feed: Any, n: int = 100, **kwargs: Any) -> CellLoader:
    return CellLoader(
        range(n), sampler_for(n), feed=feed, options=LoaderOptions.of(num_workers=0, window=1, **kwargs)
    )


def test_stages_are_summed_over_threads() -> None:
    loader = loader_over(Timed(read=0.004, decode=0.008, unnamed=0.002), threads=2)
    assert len(list(loader)) == 10
    stats = loader.stats()
    assert (stats.batches, stats.cells, stats.windows, stats.threads) == (10, 100, 10, 2)
    assert list(stats.stages) == [*STAGES, OTHER, WARM_UP]
    assert 0.04 <= stats.stages["read"].seconds < 0.2
    noise = stats.stages[WARM_UP].seconds  # the first windows may take a little longer
    assert 0.08 <= stats.stages["decode"].seconds + noise < 0.4
    assert 0.02 <= stats.stages[OTHER].seconds + noise < 0.2
    assert stats.stages["plan"].seconds == stats.stages["plan"].cells_per_s == 0
    assert stats.stages["read"].nbytes == 10_000
    assert stats.stages["read"].bytes_per_s == pytest.approx(10_000 / stats.stages["read"].seconds)
    assert stats.stages["read"].cells_per_s == pytest.approx(100 / stats.stages["read"].seconds)
    busy = sum(s.seconds for s in stats.stages.values())
    assert sum(s.share for s in stats.stages.values()) + stats.wait_for_consumer_share == pytest.approx(1)
    assert busy > stats.seconds  # two threads at once
    # The consumer did nothing but wait.
    assert stats.wait_for_data_share > 0.8
    assert stats.wait_for_consumer_share < 0.3


def test_a_slow_consumer_is_what_threads_wait_for() -> None:
    loader = loader_over(Timed(read=0.001), threads=2)
    for _ in loader:
        time.sleep(0.01)
    stats = loader.stats()
    assert stats.wait_for_consumer_share > 0.5
    assert stats.wait_for_data_share < 0.3
    assert stats.cells_per_s == pytest.approx(stats.cells / stats.seconds)


def test_time_stands_still_after_an_epoch_and_begins_anew_with_the_next() -> None:
    loader = loader_over(Timed(read=0.001), threads=1)
    assert loader.stats().batches == 0
    list(loader)
    first = loader.stats()
    time.sleep(0.02)
    assert loader.stats() == first
    batches = iter(loader)
    next(batches)
    second = loader.stats()
    assert second.batches == 1
    assert second.seconds < 0.02 + first.seconds
    del batches


def test_what_only_first_windows_take_is_a_stage_of_the_first_epoch() -> None:
    feed = Timed(read=0.001, decode=0.01)
    make, slow = feed.make, [0.3, 0.3]

    def compiling(selections: Any) -> Any:
        with stage("decode"):
            time.sleep(slow.pop() if slow else 0)
        return make(selections)

    feed.make = compiling  # type: ignore[method-assign]
    loader = loader_over(feed, threads=2)
    list(loader)
    stages = loader.stats().stages
    assert 0.55 <= stages[WARM_UP].seconds < 1.5
    assert 0.08 <= stages["decode"].seconds < 0.3
    list(loader)
    assert loader.stats().stages[WARM_UP].seconds == 0
    assert "warm-up" not in str(loader.stats())


def test_an_inner_stage_takes_its_time_from_the_outer() -> None:
    recorder = Recorder(threads=1)
    with recorder.window(5), stage("read"):
        time.sleep(0.002)
        with stage("decode"):
            time.sleep(0.02)
    stats = recorder.stats()
    assert 0.002 <= stats.stages["read"].seconds < 0.015
    assert stats.stages["decode"].seconds >= 0.02


def test_stages_outside_a_window_or_of_other_threads_go_nowhere() -> None:
    recorder = Recorder(threads=1)
    with stage("read"):
        pass
    with recorder.window(1):
        other = threading.Thread(target=lambda: stage("read").__enter__().__exit__())
        other.start()
        other.join()
    assert recorder.stats().stages["read"].seconds == 0


def test_a_window_that_fails_is_counted_and_leaves_nothing_behind() -> None:
    recorder = Recorder(threads=1)
    with pytest.raises(KeyError), recorder.window(1), stage("read"):
        raise KeyError
    assert recorder.stats().windows == 1
    with stage("read"):
        time.sleep(0.01)
    assert recorder.stats().stages["read"].seconds < 0.01


@pytest.mark.parametrize("place", ["host", "device"])
def test_real_loaders_charge_their_stages(dataset: CellDataset, place: str) -> None:
    sampler = CellSampler(dataset.groups_np, batch_size=16, seed=0, num_workers=0)
    if place == "host":
        loader = make_loader(dataset, sampler, layout="dense")
    else:
        loader = device_loader(dataset, sampler, EmulatedBackend(), LoaderOptions(layout="dense"))
    assert sum(len(b["X"]) for b in loader) == 120
    assert loader.stats().stages[WARM_UP].seconds > 0
    assert sum(len(b["X"]) for b in loader) == 120
    stats = loader.stats()
    assert (stats.batches, stats.cells) == (8, 120)
    for name in ("plan", "read", "decode", *(["copy"] if place == "device" else [])):
        assert stats.stages[name].seconds > 0
        if name != "plan":
            assert stats.stages[name].nbytes > 0
    assert stats.stages["decode"].nbytes >= 120 * N_FEATURES * 4
    assert json.loads(json.dumps(stats.as_dict()))["stages"]["read"]["nbytes"] > 0


def test_worker_processes_tell_what_the_consumer_sees(tmp_path: Path) -> None:
    dataset = example_dataset(tmp_path, example_groups())
    sampler = CellSampler(dataset.groups_np, batch_size=16, seed=0, num_workers=1)
    with make_loader(dataset, sampler) as loader:
        assert len(list(loader)) == 8
        stats = loader.stats()
    assert stats.batches == 8
    assert stats.wait_for_data > 0
    assert all(one.seconds == 0 for one in stats.stages.values())
    # The first epoch waits for the process to start.
    assert re.fullmatch(
        r".* batches/s \| 1 worker process \(no stages\), waiting \d+%: try num_workers=0", str(stats)
    )


def test_the_line_names_rate_stages_and_who_waits() -> None:
    loader = loader_over(Timed(read=0.001), threads=1)
    list(loader)
    line = format_line(loader.stats())
    assert line == str(loader.stats())
    for part in ("cells/s", "read ", "idle ", "waiting for data "):
        assert part in line
    assert "copy" not in line  # nothing is copied on the host
    assert "\n" not in line


def test_progress_is_a_line_while_an_epoch_runs(capsys: pytest.CaptureFixture[str]) -> None:
    loader = loader_over(Timed(read=0.001), threads=1, progress=True)
    assert len(list(loader)) == 10
    err = capsys.readouterr().err
    assert "10/10" in err
    assert "waiting for data" in err
    list(loader_over(Timed(read=0.001), threads=1))
    assert capsys.readouterr().err == ""


@pytest.mark.timing
def test_a_stage_costs_next_to_nothing() -> None:
    recorder = Recorder(threads=1)
    clock = time.perf_counter()
    with recorder.window(1):
        for _ in range(1000):
            with stage("read"):
                pass
    assert (time.perf_counter() - clock) / 1000 < 50e-6
