"""`hbx-gpu bench`: what it measures, what it checks, and what it says when it cannot."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from hbx_gpu import cli
from hbx_gpu._bench import cache, limits, report
from hbx_gpu._bench.check import Checker
from hbx_gpu._bench.runs import Options, Result, run
from hbx_gpu._bench.settings import Setting, combinations, executors, open_dataset
from hbx_gpu._bench.training import MODELS, make_step, train
from hbx_gpu._loading.make import device_loader
from hbx_gpu._loading.options import LoaderOptions
from hbx_gpu.atlas import create_or_open_atlas
from hbx_gpu.dataloader import CellDataset, make_loader
from hbx_gpu.errors import DeviceUnavailableError, UnsafePathError, UnsupportedError
from hbx_gpu.loader_stats import Recorder
from hbx_gpu.sampler import CellSampler
from hbx_gpu.scdl import SingleCellMemMapDataset
from hbx_gpu.synthetic import write_demo_pair
from hbx_gpu.testing import example_dataset, example_groups
from tests.emulation.backend import EmulatedBackend

no_gpu_here = pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without a GPU")


@pytest.fixture(autouse=True)
def _one_torch_thread() -> Iterator[None]:
    """On a busy machine torch's threads wait for each other longer than small models take."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> CellDataset:
    return example_dataset(tmp_path_factory.mktemp("arrays"), example_groups(100))


@pytest.fixture(scope="module")
def atlas(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("bench")
    made = create_or_open_atlas(folder / "atlas")
    for file in write_demo_pair(folder, n_obs=(300, 200), n_vars=60):
        made.add_from_h5ad(file)
    made.optimize()
    made.snapshot()
    return folder / "atlas"


def options(**changes: Any) -> Options:
    quick = Options(
        path=Path("nowhere"),
        device="cpu",
        batches=(32,),
        executors=("direct",),
        caches=("warm",),
        models=(),
        seconds=0.05,
        repeat=2,
    )
    return replace(quick, **changes)


def test_the_command_prints_checks_and_writes(atlas: Path, tmp_path: Path, capsys: Any) -> None:
    arguments = ["--layout", "dense", "csr", "--dtype", "float32", "--batch", "64", "--seconds", "0.05",
                 "--repeat", "1", "--train", *MODELS, "--out", str(tmp_path / "out")]  # fmt: skip
    assert cli.main(["bench", str(atlas), "--device", "cpu", *arguments]) == 0
    out, err = capsys.readouterr()
    assert "all equal" in out
    assert "dense float32, random, batch 64, direct, page cache" in out
    for part in ("limit", "training while loading", "waits for data", "numpy ", "stored bytes per cell"):
        assert part in out
    assert "bench: 100%" in err
    found = json.loads((tmp_path / "out/bench.json").read_text())
    warm = [one for one in found["results"] if one["cache"] == "warm"]
    kinds = executors(["auto"])[0]
    assert len(warm) == 4 * len(kinds)
    for one in found["results"]:
        assert one["cells_per_s"] > 0
        assert one["wrong_rows"] == 0
        assert one["checked_rows"] > 0
        assert one["limit_cells_per_s"] > 0
        assert one["stats"]["batches"] > 0
    assert len(found["results"]) + len(found["not_measured"]) >= 2 * len(
        warm
    )  # cold: measured, or said why not
    assert [one["model"] for one in found["training"]] == list(MODELS)
    assert (tmp_path / "out/bench.png").stat().st_size > 1000
    assert (tmp_path / "out/bench.txt").read_text().strip() in out


def test_epochs_are_measured_whole(dataset: CellDataset) -> None:
    seen: list[int] = []

    def make(*args: Any, **kwargs: Any) -> Any:
        loader = make_loader(*args, **kwargs)
        set_epoch = loader.set_epoch

        def noted(epoch: int) -> None:
            seen.append(epoch)
            set_epoch(epoch)

        loader.set_epoch = noted  # type: ignore[method-assign]
        return loader

    found = run(options(epochs=2, layouts=("csr",), orders=("stream",)), dataset=dataset, make=make)
    (result,) = found.results
    assert seen == [0, 1, 2, 101, 102]  # warm-up, and two epochs twice
    assert len(result.rates) == 2
    assert result.stats.cells == len(dataset)


@pytest.mark.parametrize("layout", ["dense", "csr"])
def test_an_emulated_device_is_measured_and_checked(dataset: CellDataset, layout: str) -> None:
    def make(dataset: Any, sampler: Any, *, device: str, **kwargs: Any) -> Any:
        assert device == "cpu"
        kwargs = {k: v for k, v in kwargs.items() if k in ("layout", "dtype")}
        return device_loader(dataset, sampler, EmulatedBackend(), LoaderOptions.of(**kwargs))

    # Batches of 40 of 200 cells: none is short, whichever is the last when time is up.
    settings = options(layouts=(layout,), dtypes=("float32",), orders=("random", "group"), batches=(40,))
    found = run(settings, dataset=dataset, make=make)
    assert found.wrong == 0
    assert [one.checked for one in found.results] == [96, 96]
    stages = found.results[0].stats.stages
    assert stages["copy"].nbytes > 0


def wrong_value(batch: dict[str, Any]) -> None:
    batch["X"][3, 7] += 1


def wrong_order(batch: dict[str, Any]) -> None:
    batch["index"] = batch["index"].flip(0)


@pytest.mark.parametrize("spoil", [wrong_value, wrong_order])
def test_wrong_batches_are_found(
    dataset: CellDataset, spoil: Callable[[dict[str, Any]], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    def make(*args: Any, **kwargs: Any) -> Any:
        loader = make_loader(*args, **kwargs)
        deliver = loader.feed.deliver

        def spoiled(made: Any) -> Any:
            batch = deliver(made)
            spoil(batch)
            return batch

        loader.feed.deliver = spoiled  # type: ignore[method-assign]
        return loader

    monkeypatch.setattr("hbx_gpu._bench.check._ROWS", 32)
    found = run(options(layouts=("dense",), orders=("random",)), dataset=dataset, make=make)
    assert found.wrong > 0
    assert "WRONG" in report.text(found)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_checker_rounds_as_dtypes_do(dataset: CellDataset, dtype: str) -> None:
    checker = Checker(dataset)
    sampler = CellSampler(dataset.groups_np, batch_size=50, seed=1, num_workers=0)
    for batch in make_loader(dataset, sampler, layout="dense", dtype=dtype, executor="direct"):
        checker.check(batch)
    assert (checker.rows, checker.wrong) == (96, 0)


@no_gpu_here
def test_a_gpu_that_is_not_there(atlas: Path, capsys: Any) -> None:
    with pytest.raises(DeviceUnavailableError):
        run(options(device="cuda"), dataset=None)
    assert cli.main(["bench", str(atlas), "--device", "cuda"]) == 1
    assert "--device cuda was asked for, but" in capsys.readouterr().err


def test_dense_spaces_are_not_measured(homeobox_fixtures: Path) -> None:
    with pytest.raises(UnsupportedError, match=r"'protein_abundance' of .* is dense.*--field"):
        open_dataset(homeobox_fixtures / "cite_multimodal" / "atlas", "protein_abundance")


def test_links_of_an_archive_are_followed_when_allowed(tmp_path: Path) -> None:
    archive, outside = tmp_path / "archive", tmp_path / "data.npy"
    file, _ = write_demo_pair(tmp_path, n_obs=(20, 5), n_vars=60)
    SingleCellMemMapDataset(archive, file, use_X_not_raw=True)
    (archive / "data.npy").rename(outside)
    (archive / "data.npy").symlink_to(outside)
    with pytest.raises(UnsafePathError, match="leads out"):
        open_dataset(archive)
    opened: Any = open_dataset(archive, allow_links=True)
    assert len(opened[list(range(20))].values) > 0


def test_what_is_no_atlas(tmp_path: Path, capsys: Any) -> None:
    with pytest.raises(FileNotFoundError, match="does not exist"):
        open_dataset(tmp_path / "nothing")
    assert cli.main(["bench", str(tmp_path), "--device", "cpu"]) == 1
    assert str(tmp_path) in capsys.readouterr().err
    assert cli.main(["bench", str(tmp_path), "--seconds", "0"]) == 1
    assert "--seconds must be positive" in capsys.readouterr().err


def test_what_cannot_be_measured_is_said(dataset: CellDataset) -> None:
    def refuse(*args: Any, **kwargs: Any) -> Any:
        if kwargs.get("layout") == "csr":
            raise UnsupportedError("no CSR today")
        return make_loader(*args, **kwargs)

    found = run(
        options(layouts=("csr", "dense"), dtypes=("float32",), caches=("warm", "cold"), orders=("random",)),
        dataset=dataset,
        make=refuse,
    )
    assert [one.setting.cache for one in found.results] == ["warm"]
    text = report.text(found)
    assert "no CSR today" in text
    assert "page cache does not let go" in text  # this dataset's files are not known to the command


def test_combinations_leave_out_what_makes_no_sense() -> None:
    found = combinations(
        layouts=("dense", "csr"), dtypes=("float32", "bfloat16"), orders=("random",), batches=(8,),
        executors=("direct",), residencies=("none", "device"), io="auto", caches=("warm", "cold"),
    )  # fmt: skip
    assert len([s for s in found if s.cache == "warm"]) == 6
    assert {s.residency for s in found if s.cache == "cold"} == {"none"}
    assert {s.dtype for s in found if s.layout == "csr"} == {"float32"}


def test_orders(dataset: CellDataset) -> None:
    first = {
        name: next(iter(Setting(order=name, batch=32).sampler(dataset, 0)))
        for name in ("random", "stream", "block", "group")
    }
    assert list(first["stream"]) == list(range(32))
    assert len({dataset.groups_np[row] for row in first["group"]}) == 1
    assert len({dataset.groups_np[row] for row in first["random"]}) == 2


def test_dropping_files_from_the_page_cache(tmp_path: Path) -> None:
    files = [tmp_path / name for name in "ab"]
    for file in files:
        file.write_bytes(os.urandom(1 << 20))
    (tmp_path / "lance_db").mkdir()
    (tmp_path / "lance_db" / "c").write_bytes(b"c")
    assert cache.files_below(tmp_path) == files
    cache.load(files)
    assert cache.resident_share(files) == 1.0
    reason = cache.forget(files)
    if reason:
        pytest.skip(f"not on this file system: {reason}")
    assert cache.resident_share(files) < 0.05


def test_a_file_in_memory_is_not_called_cold() -> None:
    shm = Path("/dev/shm")
    if not shm.is_dir():
        pytest.skip("no file system in memory here")
    file = shm / f"hbx_gpu-{os.getpid()}"
    try:
        file.write_bytes(os.urandom(1 << 20))
        assert "stayed" in cache.forget([file])
    finally:
        file.unlink()


@pytest.mark.parametrize(
    ("rates", "noisy"), [([100.0], False), ([95.0, 100.0, 112.0], False), ([80.0, 100.0, 105.0], True)]
)
def test_a_noisy_figure_is_marked(rates: list[float], noisy: bool) -> None:
    result = Result(Setting(), rates, 1.0, Recorder(1, 1, 1).stats(), 0, 0)
    assert result.is_noisy == noisy


def test_limits(dataset: CellDataset) -> None:
    speed = limits.bandwidth(None, 1)
    assert 1e8 < speed.copy < 1e12
    assert 1e8 < speed.fill < 1e12
    sizes = limits.bytes_per_cell(dataset)
    assert sizes.n_features == dataset.n_features
    assert sizes.values == pytest.approx(dataset.row_index.length.mean())
    assert 0 < sizes.stored < sizes.values * 8 + 1000
    dense = limits.limit(Setting("dense"), speed, sizes)
    assert dense == pytest.approx(1 / (dataset.n_features * 4 / speed.fill + sizes.stored / speed.copy))
    assert limits.limit(Setting("dense", "bfloat16"), speed, sizes) > dense
    gpu = limits.Bandwidth(fill=1e12, copy=1e12, link=1e9)
    assert limits.limit(Setting(), gpu, sizes) == pytest.approx(1e9 / sizes.stored)
    assert limits.limit(Setting(residency="device"), gpu, sizes) > limits.limit(Setting(), gpu, sizes)


@pytest.mark.parametrize("model", MODELS)
def test_models_learn(model: str) -> None:
    x = torch.from_numpy(np.random.default_rng(0).poisson(0.5, size=(64, 80))).float()
    step = make_step(model, 80, "cpu", torch.float32)
    losses = [float(step(x)) for _ in range(60)]
    assert np.isfinite(losses).all()
    assert np.mean(losses[-10:]) < np.mean(losses[:10])


def test_training_tells_how_long_it_waits(dataset: CellDataset) -> None:
    sampler = CellSampler(dataset.groups_np, batch_size=32, seed=1, num_workers=0)
    loader = make_loader(dataset, sampler, layout="dense", executor="direct")
    # Batches of 32 cells and 50 genes are ready long before a step is done.
    fast = train("mlp", loader, dataset.n_features, seconds=0.2, finish=lambda: None)
    make = loader.feed.make

    def slowly(selections: Any) -> Any:
        time.sleep(0.2)
        return make(selections)

    loader.feed.make = slowly  # type: ignore[method-assign]
    slow = train("mlp", loader, dataset.n_features, seconds=0.6, finish=lambda: None)
    assert slow.waiting > 0.5 > fast.waiting
    assert slow.slowdown > fast.slowdown
    assert fast.steps > 2
    assert fast.cells_per_s > 0
