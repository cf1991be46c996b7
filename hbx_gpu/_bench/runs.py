"""Measuring: warm up, check, time, train; one setting after the other in one process."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from hbx_gpu._bench import cache, limits
from hbx_gpu._bench.check import Checker
from hbx_gpu._bench.machine import Conditions, conditions
from hbx_gpu._bench.settings import Setting, combinations, executors, open_dataset
from hbx_gpu._bench.training import Trained, train
from hbx_gpu._devices import cores, resolve
from hbx_gpu.errors import UnsupportedError
from hbx_gpu.loader_stats import LoaderStats

if TYPE_CHECKING:
    from hbx_gpu._datasets.cells import CellDataset
    from hbx_gpu._loading.loader import CellLoader

_WARM_UP_S = 1.0
_CHECKED = 2  # batches per setting

Advance = Callable[[str], object]


@dataclass(frozen=True)
class Options:
    """What to measure, and for how long.

    Attributes
    ----------
    seconds, epochs, repeat
        Each setting is timed `repeat` times, for so many seconds, or for whole epochs where these are given.
    io
        None: measured on a GPU, the loader's default on the CPU.
    models
        Names of :data:`hbx_gpu._bench.training.MODELS` to train while loading.
    threads
        Threads of the loader; None for its own choice, with windows that size themselves.
    """

    path: Path
    device: str = "auto"
    layouts: Sequence[str] = ("dense", "csr")
    dtypes: Sequence[str] = ("float32", "bfloat16")
    orders: Sequence[str] = ("random", "stream")
    batches: Sequence[int] = (1024,)
    executors: Sequence[str] = ("auto",)
    residencies: Sequence[str] = ("none",)
    io: str | None = None
    caches: Sequence[str] = ("warm", "cold")
    models: Sequence[str] = ("mlp", "transformer")
    seconds: float = 2.0
    epochs: int | None = None
    repeat: int = 3
    threads: int | None = None
    seed: int = 0
    field: str | None = None
    layer: str | None = None
    allow_links: bool = False


NOISE = 0.2
"""Range of the repeats, as a share of their median, from which on a figure is marked as noisy."""


@dataclass
class Result:
    """One setting, measured.

    Attributes
    ----------
    rates
        Cells/s of each repeat.
    limit
        Cells/s that memory and link allow.
    stats
        Statistics of the loader in the last repeat.
    checked, wrong
        Rows compared with the reference, and how many of them were not equal.
    """

    setting: Setting
    rates: list[float]
    limit: float
    stats: LoaderStats
    checked: int
    wrong: int

    @property
    def median(self) -> float:
        """Median of the rates, in cells/s."""
        return statistics.median(self.rates)

    @property
    def is_noisy(self) -> bool:
        """Whether the repeats differ by more than a fifth of their median."""
        return max(self.rates) - min(self.rates) > NOISE * self.median


@dataclass
class Report:
    """All that a run found."""

    what: str
    conditions: Conditions
    bandwidth: limits.Bandwidth
    bytes_per_cell: limits.Bytes
    results: list[Result] = field(default_factory=list)
    trained: list[Trained] = field(default_factory=list)
    skipped: list[str] = field(default_factory=list)

    @property
    def wrong(self) -> int:
        """Rows that were not what is stored."""
        return sum(result.wrong for result in self.results)


def run(
    options: Options,
    *,
    dataset: CellDataset | None = None,
    make: Callable[..., CellLoader] | None = None,
    advance: Callable[[int], Advance] | None = None,
) -> Report:
    """Measure everything that `options` name.

    Parameters
    ----------
    dataset
        Dataset to use instead of the one at ``options.path``.
    make
        Function to use instead of :func:`hbx_gpu.make_loader`.
    advance
        Function that gets the number of steps, and returns a function to call before each step with its name.

    Raises
    ------
    DeviceUnavailableError
        ``options.device`` names a GPU that cannot be used.
    UnsupportedError
        Nothing at ``options.path`` that can be loaded.
    """
    gpu = resolve(options.device)
    if dataset is None:
        dataset = open_dataset(options.path, options.field, options.layer, allow_links=options.allow_links)
    kinds, skipped = executors(options.executors)
    settings = combinations(
        layouts=options.layouts,
        dtypes=options.dtypes,
        orders=options.orders,
        batches=options.batches,
        executors=kinds,
        residencies=options.residencies,
        io=options.io or ("auto" if gpu is not None else None),
        caches=options.caches,
    )
    bench = _Bench(options, dataset, gpu, make)
    report = Report(repr(dataset), conditions(gpu), bench.bandwidth, bench.sizes, skipped=skipped)
    tell = (advance or _silently)(len(settings) + len(options.models))
    cache.load(bench.files)
    for setting in settings:
        name = setting.describe()
        tell(name)
        with _said(report, name):
            report.results.append(bench.measure(setting))
    cache.load(bench.files)
    for model in options.models:
        tell(f"training: {model}")
        with _said(report, f"training: {model}"):
            report.trained.append(bench.train(model, kinds[-1]))
    return report


def _silently(steps: int) -> Advance:  # noqa: ARG001
    return lambda name: None  # noqa: ARG005


@contextmanager
def _said(report: Report, name: str) -> Iterator[None]:
    """Leave out what cannot be measured here, and note the reason in the report."""
    try:
        yield
    except (UnsupportedError, ImportError) as error:
        report.skipped.append(f"{name}: {error}")


class _Bench:
    """The dataset, and what all settings share."""

    def __init__(
        self,
        options: Options,
        dataset: CellDataset,
        gpu: int | None,
        make: Callable[..., CellLoader] | None,
    ) -> None:
        from hbx_gpu._loading.make import make_loader

        self._options, self._dataset, self._gpu = options, dataset, gpu
        self._make: Callable[..., CellLoader] = make or make_loader
        self._device = "cpu" if gpu is None else f"cuda:{gpu}"
        self._checker = Checker(dataset, options.seed)
        self.files = cache.files_below(options.path)
        self.bandwidth = limits.bandwidth(gpu, options.threads or cores())
        self.sizes = limits.bytes_per_cell(dataset)

    def loader(self, setting: Setting) -> CellLoader:
        sampler = setting.sampler(self._dataset, self._options.seed)
        keywords = setting.loader_options()
        if self._options.threads is not None:
            keywords["threads"] = self._options.threads
        return self._make(self._dataset, sampler, device=self._device, **keywords)

    def measure(self, setting: Setting) -> Result:
        before = self._checker.rows, self._checker.wrong
        rates = []
        with self.loader(setting) as loader:
            self._warm_up(loader)
            for k in range(self._options.repeat):
                if setting.cache == "cold" and (reason := self._forget()):
                    raise UnsupportedError(f"the page cache does not let go of the files: {reason}")
                rates.append(self._rate(loader, 1 + 100 * k, once=setting.cache == "cold"))
            stats = loader.stats()
        return Result(
            setting,
            rates,
            limits.limit(setting, self.bandwidth, self.sizes),
            stats,
            self._checker.rows - before[0],
            self._checker.wrong - before[1],
        )

    def train(self, model: str, executor: str) -> Trained:
        options = self._options
        dtype = "float32" if self._gpu is None else "bfloat16"
        setting = Setting(
            dtype=dtype,
            batch=options.batches[0],
            executor=executor,
            residency=options.residencies[0],
            io=options.io,
        )
        with self.loader(setting) as loader:
            return train(
                model, loader, self._dataset.n_features, seconds=2 * options.seconds, finish=self._finish
            )

    def _warm_up(self, loader: CellLoader) -> None:
        """Compile, verify checksums, let sizes settle; and look at the first batches."""
        clock = time.perf_counter()
        loader.set_epoch(0)
        for number, batch in enumerate(loader):
            if number < _CHECKED:
                self._checker.check(batch)
            elif time.perf_counter() - clock > _WARM_UP_S:
                break
        self._finish()

    def _rate(self, loader: CellLoader, epoch: int, *, once: bool) -> float:
        """Cells/s of batches that are dropped as they come; the clock starts with an epoch."""
        cells, elapsed, last = 0, 0.0, None
        enough = self._options.epochs
        clock = time.perf_counter()
        for number in range(enough or 1 << 30):
            loader.set_epoch(epoch + number)
            for batch in loader:
                cells += len(batch["index"])
                last = batch
                elapsed = time.perf_counter() - clock
                if enough is None and elapsed >= self._options.seconds:
                    break
            if once or (enough is None and elapsed >= self._options.seconds):
                break
        self._finish()
        elapsed = time.perf_counter() - clock
        if last is not None:  # long after warm-up: what comes under load is right too
            self._checker.check(last)
        return cells / elapsed

    def _forget(self) -> str:
        if not self.files:
            return "the dataset is not read from files that are known here"
        self._dataset.close()  # mapped pages stay
        return cache.forget(self.files)

    def _finish(self) -> None:
        if self._gpu is not None:
            import torch

            torch.cuda.synchronize(self._gpu)
