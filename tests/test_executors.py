"""Whoever hands them over, batches are the same: direct and DALI, on the CPU and on devices."""

from __future__ import annotations

import gc
import json
import logging
import sys
import threading
import weakref
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import scipy.sparse as sp
import torch

from benchmarks import executors
from hbx_gpu import pipeline
from hbx_gpu._devices import dali_missing, say_once
from hbx_gpu._loading.dali.dynamic import DynamicLoader
from hbx_gpu._loading.loader import CellLoader
from hbx_gpu._loading.make import device_loader
from hbx_gpu._loading.options import DynamicOptions, LoaderOptions
from hbx_gpu._source import ObsColumns
from hbx_gpu.atlas import RaggedAtlas
from hbx_gpu.cli import main
from hbx_gpu.dataloader import CellDataset, make_loader, sparse_to_dense_collate
from hbx_gpu.errors import CorruptChunkError, DeviceUnavailableError
from hbx_gpu.pipeline import CellPipeline, DaliOptions
from hbx_gpu.sampler import CellSampler
from hbx_gpu.testing import StoredGroup, example_dataset, example_groups, write_sources
from hbx_gpu.transforms import log1p, normalize_total
from tests.dali import need_dali, same_batch
from tests.emulation.backend import EmulatedBackend
from tests.emulation.streams import StreamBackend
from tests.ids import stable
from tests.threads import loader_threads


@pytest.fixture(autouse=True)
def dali(request: pytest.FixtureRequest) -> None:
    if "without" not in request.node.name:
        need_dali()


@pytest.fixture(scope="module")
def atlas(real_h5ad: tuple[Path, Path], tmp_path_factory: pytest.TempPathFactory) -> RaggedAtlas:
    path = tmp_path_factory.mktemp("real") / "atlas"
    assert main(["ingest", str(real_h5ad[0]), "--atlas", str(path)]) == 0
    return RaggedAtlas.checkout_latest(path)


@pytest.fixture(scope="module", params=["all genes", "panel"])
def real(request: pytest.FixtureRequest, atlas: RaggedAtlas) -> CellDataset:
    """The mouse data, with columns that no tensor can hold beside those that one can."""
    query = atlas.query()
    if request.param == "panel":
        genes = query.to_cell_dataset("gene_expression").feature_uids
        query = query.features(list(genes[::7]), "gene_expression")
    dataset = query.to_cell_dataset("gene_expression", metadata_columns=["obs_name", "dataset_uid"])
    assert isinstance(dataset, CellDataset)
    n = len(dataset)
    dataset.columns["note"] = np.array([f"cell {i}" for i in range(n)], dtype=object)
    dataset.columns["score"] = np.linspace(0, 1, n, dtype=np.float32)
    return dataset


def sampler_for(dataset: Any, **kwargs: Any) -> CellSampler:
    return CellSampler(
        dataset.groups_np, **{"batch_size": 700, "seed": 3, "num_workers": 0, "locality": "none", **kwargs}
    )


CASES: list[dict[str, Any]] = [
    *({"layout": "dense", "dtype": dtype} for dtype in ("float32", "float64", "float16", "bfloat16")),
    {"layout": "dense", "transform": [normalize_total(1e4), log1p]},
    {"layout": "csr"},
]


@pytest.mark.parametrize("options", CASES, ids=lambda o: "-".join(map(str, o.values()))[:16])
def test_real_data_two_epochs(real: CellDataset, options: dict[str, Any]) -> None:
    direct = make_loader(real, sampler_for(real), executor="direct", **options)
    through = make_loader(real, sampler_for(real), executor="dali", **options)
    assert type(direct) is CellLoader
    assert type(through) is DynamicLoader
    for epoch in range(2):
        direct.set_epoch(epoch)
        through.set_epoch(epoch)
        assert len(direct) == len(through) == -(-len(real) // 700)
        for found, expected in zip(through, direct, strict=True):
            same_batch(found, expected)
        assert len(found["index"]) == len(real) % 700  # the last batch is a partial one


def of_dali(mode: str, dataset: Any, sampler: Any, layout: str) -> CellLoader:
    """A loader through dynamic mode, or through a pipeline."""
    if mode == "pipeline":
        return pipeline.cell_pipeline(dataset, sampler, layout=layout)
    return make_loader(dataset, sampler, layout=layout, executor="dali")


COLUMNS = {
    "uint16": np.arange(120, dtype=np.uint16) + 65_400,
    "uint32": np.arange(120, dtype=np.uint32) + (2**32 - 200),
    "uint64": np.arange(120, dtype=np.uint64) + np.uint64(2**64 - 200),
    "int8": np.arange(120, dtype=np.int8),
    "float16": np.linspace(0, 1, 120).astype(np.float16),
    "float64": np.linspace(0, 1, 120),
    "bool": np.arange(120) % 2 == 0,
    "a str, ü": np.arange(120).astype(str),
    "object": np.array([None, "x", 3] * 40, dtype=object),
    "day": np.arange(120).astype("M8[us]"),
    "complex": np.arange(120) * 1j,
}


@pytest.mark.parametrize("layout", ["dense", "csr"])
@pytest.mark.parametrize("mode", ["dynamic", "pipeline"])
def test_columns_of_any_type(tmp_path: Path, layout: str, mode: str) -> None:
    dataset = example_dataset(tmp_path, example_groups())
    dataset._obs = ObsColumns(columns=dict(COLUMNS), categories={})
    sampler = sampler_for(dataset, batch_size=50)
    direct = list(make_loader(dataset, sampler, layout=layout, executor="direct"))
    through = list(of_dali(mode, dataset, sampler, layout))
    for found, expected in zip(through, direct, strict=True):
        same_batch(found, expected)
    whole = np.concatenate([batch["index"] for batch in through])
    for name, column in COLUMNS.items():
        assert np.array_equal(np.concatenate([batch[name] for batch in through]), column[whole])


@pytest.mark.parametrize("layout", ["dense", "csr"])
@pytest.mark.parametrize("n_features", [0, 5])
@pytest.mark.parametrize("mode", ["dynamic", "pipeline"])
def test_batches_without_a_single_value(tmp_path: Path, layout: str, n_features: int, mode: str) -> None:
    """Cells without counts, next to each other or under a panel of nothing."""
    matrix = sp.csr_matrix((np.repeat([0, 1, 0], 40), (np.arange(120), np.zeros(120))), shape=(120, 5))
    matrix.eliminate_zeros()
    remap = np.arange(5, dtype=np.int32) if n_features else np.full(5, -1, np.int32)
    sources, rows = write_sources(tmp_path, [StoredGroup(matrix=matrix.astype(np.uint32), remap=remap)])
    uids = np.arange(n_features).astype(object)
    dataset = CellDataset(sources, rows, layer="counts", n_features=n_features, feature_uids=uids)
    sampler = sampler_for(dataset, batch_size=40, shuffle=False)
    direct = list(make_loader(dataset, sampler, layout=layout, executor="direct"))
    through = list(of_dali(mode, dataset, sampler, layout))
    assert [batch["X"].shape for batch in through] == [(40, n_features)] * 3
    for found, expected in zip(through, direct, strict=True):
        same_batch(found, expected)


@pytest.mark.parametrize("layout", ["dense", "csr"])
@pytest.mark.parametrize("backend", [EmulatedBackend, StreamBackend], ids=["emulated", "streams"])
@pytest.mark.parametrize("window", [1, 3])
@pytest.mark.parametrize("dali", [DynamicOptions(), DaliOptions()], ids=["dynamic", "pipeline"])
def test_batches_of_a_device(
    tmp_path: Path, layout: str, backend: Any, window: int, dali: DynamicOptions | DaliOptions
) -> None:
    groups = example_groups()
    for group in groups:
        group.codec = "hbx_gpu.rowpack"
    dataset = example_dataset(tmp_path, groups)
    sampler = sampler_for(dataset, batch_size=16)
    expected = list(make_loader(dataset, sampler, layout=layout, executor="direct"))
    loader = device_loader(
        dataset,
        sampler,
        backend(),
        LoaderOptions(layout=layout, threads=2, window=window, dali=dali),
    )
    assert type(loader) is (CellPipeline if isinstance(dali, DaliOptions) else DynamicLoader)
    for found, want in zip(loader, expected, strict=True):
        same_batch(found, want)


@pytest.mark.gpu
@pytest.mark.parametrize("options", CASES, ids=lambda o: "-".join(map(str, o.values()))[:16])
def test_batches_of_a_gpu(tmp_path: Path, options: dict[str, Any]) -> None:
    dataset = example_dataset(tmp_path, example_groups(2000))
    sampler = sampler_for(dataset, batch_size=256)
    expected = list(make_loader(dataset, sampler, device="cuda", executor="direct", **options))
    for _ in range(3):
        through = make_loader(dataset, sampler, device="cuda", executor="dali", **options)
        for found, want in zip(through, expected, strict=True):
            assert found["X"].is_cuda
            same_batch(
                {k: v.cpu() if isinstance(v, torch.Tensor) else v for k, v in found.items()},
                {k: v.cpu() if isinstance(v, torch.Tensor) else v for k, v in want.items()},
            )


def test_a_corrupt_chunk_arrives_behind_the_batches_before_it(tmp_path: Path) -> None:
    dataset = example_dataset(tmp_path, example_groups())
    path = next(iter(sorted((tmp_path / "g1/csr/layers/counts/c").iterdir())))
    path.write_bytes(path.read_bytes()[:-1])
    sampler = sampler_for(dataset, batch_size=16, locality="group", shuffle=False)
    seen = {}
    for executor in ("direct", "dali"):
        got: list[Any] = []
        batches = iter(make_loader(dataset, sampler, layout="dense", executor=executor, threads=1, window=1))
        with pytest.raises(CorruptChunkError, match="g1/csr/layers/counts"):
            got.extend(batches)
        seen[executor] = got
    assert len(seen["direct"]) > 0
    for found, expected in zip(seen["dali"], seen["direct"], strict=True):
        same_batch(found, expected)


# -- dynamic mode ----------------------------------------------------------------------------------


@pytest.mark.parametrize("options", [{"layout": "dense", "dtype": "bfloat16"}, {"layout": "csr"}], ids=stable)
def test_dali_hands_over_the_memory_that_the_feed_made(dataset: CellDataset, options: Any) -> None:
    (batch,) = make_loader(dataset, [np.arange(10)], executor="direct", **options)
    loader = make_loader(dataset, [np.arange(10)], executor="dali", **options)
    executors.ready(loader.feed, batch)
    (found,) = loader
    same_batch(found, batch)
    if options["layout"] == "csr":
        assert found["X"].values().data_ptr() == batch["X"].values().data_ptr()
        assert found["X"].col_indices().data_ptr() == batch["X"].col_indices().data_ptr()
    else:
        assert found["X"].data_ptr() == batch["X"].data_ptr()


def test_memory_is_kept_while_the_batch_is_and_no_longer(dataset: CellDataset) -> None:
    loader = make_loader(dataset, [np.arange(10)], executor="dali", layout="dense")
    freed: list[bool] = []
    memory = np.ones((10, 3), np.float32)
    weakref.finalize(memory, freed.append, True)
    batch = {"X": torch.from_numpy(memory)}
    executors.ready(loader.feed, batch)
    batches = iter(loader)
    found = next(batches)
    batch.clear()
    del memory
    loader.feed.make = None  # type: ignore[method-assign, assignment]
    loader.close()
    gc.collect()
    assert (found["X"] == 1).all()
    assert not freed
    del found, batches, loader
    gc.collect()
    assert freed


def hide_some(fields: dict[str, Any], rng: Any) -> dict[str, Any]:
    from nvidia.dali.experimental import dynamic

    seen = dynamic.random.uniform(fields["X"], range=[0.0, 1.0], rng=rng) > 0.5
    return {**fields, "X": dynamic.cast(fields["X"] * seen, dtype=dynamic.float16), "seen": seen}


def test_operators_of_dali_run_on_every_batch(dataset: CellDataset) -> None:
    def load(epoch: int = 0, seed: int = 3) -> CellLoader:
        sampler = sampler_for(dataset, batch_size=16, seed=seed, shuffle=False)
        loader = make_loader(dataset, sampler, layout="dense", operators=hide_some)
        loader.set_epoch(epoch)
        return loader

    plain = list(make_loader(dataset, sampler_for(dataset, batch_size=16, shuffle=False), layout="dense"))
    first = list(load())
    for found, whole in zip(first, plain, strict=True):
        assert list(found) == [*whole, "seen"]
        assert found["X"].dtype == torch.float16
        assert torch.equal(found["X"], (whole["X"] * found["seen"]).half())
        assert 0.2 < found["seen"].float().mean() < 0.8
        assert torch.equal(found["index"], whole["index"])
    assert not torch.equal(first[0]["seen"], first[1]["seen"])  # noise is new for every batch,
    for found, again in zip(load(), first, strict=True):  # the same in the same epoch,
        same_batch(found, again)
    assert not torch.equal(next(iter(load(epoch=1)))["seen"], first[0]["seen"])  # and not in another,
    assert not torch.equal(next(iter(load(seed=4)))["seen"], first[0]["seen"])  # nor with another seed.

    begun = load()
    batches = iter(begun)
    for _ in range(3):
        next(batches)
    resumed = load()
    resumed.load_state_dict(begun.state_dict())
    begun.close()
    for found, want in zip(resumed, first[3:], strict=True):
        same_batch(found, want)


def test_operators_run_ahead_of_the_consumer_on_another_thread(dataset: CellDataset) -> None:
    begun: list[str] = []
    second = threading.Event()

    def note(fields: dict[str, Any], rng: Any) -> dict[str, Any]:  # noqa: ARG001
        begun.append(threading.current_thread().name)
        if len(begun) == 2:
            second.set()
        return fields

    loader = make_loader(dataset, sampler_for(dataset, batch_size=16), layout="dense", operators=note)
    batches = iter(loader)
    next(batches)
    assert second.wait(60)  # while nobody asks for it
    assert len(list(batches)) == len(loader) - 1
    assert set(begun) == {"hbx_gpu-loader-operators"}
    del batches
    assert not loader_threads("hbx_gpu-loader-operators")

    dropped = iter(loader)
    next(dropped)
    del dropped
    gc.collect()
    assert not loader_threads("hbx_gpu-loader-operators")


def test_errors_of_operators_arrive_at_next(dataset: CellDataset) -> None:
    def load(operators: Any) -> CellLoader:
        return make_loader(dataset, sampler_for(dataset), layout="dense", operators=operators)

    with pytest.raises(TypeError, match="a dict of DALI tensors by name"):
        next(iter(load(lambda fields, rng: fields["X"])))  # noqa: ARG005
    with pytest.raises(ZeroDivisionError):
        next(iter(load(lambda fields, rng: 1 / 0)))  # noqa: ARG005
    wrong: list[dict[str, Any]] = [{"executor": "direct"}, {"dtype": "bfloat16"}]
    for options in wrong:
        with pytest.raises(ValueError, match="operators"):
            make_loader(dataset, sampler_for(dataset), layout="dense", operators=hide_some, **options)


# -- which executor --------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> CellDataset:
    return example_dataset(tmp_path_factory.mktemp("arrays"), example_groups())


@pytest.fixture
def fresh_log() -> None:
    say_once.cache_clear()


@pytest.fixture
def no_dali(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """An interpreter in which DALI is not installed."""
    monkeypatch.setitem(sys.modules, "nvidia.dali", None)
    dali_missing.cache_clear()
    yield
    dali_missing.cache_clear()


def said(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [r.getMessage() for r in caplog.records if "hands batches over" in r.getMessage()]


@pytest.mark.usefixtures("fresh_log")
def test_auto_is_dali_and_says_so_once(dataset: CellDataset, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, logger="hbx_gpu"):
        loaders = [make_loader(dataset, sampler_for(dataset), layout="dense") for _ in range(2)]
    assert all(type(loader) is DynamicLoader for loader in loaders)
    assert len(said(caplog)) == 1
    assert "DALI" in said(caplog)[0]


@pytest.mark.usefixtures("fresh_log", "no_dali")
def test_without_dali_auto_is_direct_and_says_so_once(
    dataset: CellDataset, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.INFO, logger="hbx_gpu"):
        loaders = [make_loader(dataset, sampler_for(dataset), layout="dense") for _ in range(2)]
    assert all(type(loader) is CellLoader for loader in loaders)
    assert len(said(caplog)) == 1
    assert "directly" in said(caplog)[0]
    assert "hbx_gpu[dali]" in said(caplog)[0]
    assert sum(len(batch["X"]) for batch in loaders[0]) == 120


@pytest.mark.usefixtures("no_dali")
def test_without_dali_asking_for_it_names_the_extra(dataset: CellDataset) -> None:
    with pytest.raises(DeviceUnavailableError, match=r"pip install 'hbx_gpu\[dali\]'"):
        make_loader(dataset, sampler_for(dataset), layout="dense", executor="dali")
    with pytest.raises(DeviceUnavailableError, match=r"pip install 'hbx_gpu\[dali\]'"):
        pipeline.cell_pipeline(dataset, sampler_for(dataset))


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"collate_fn": sparse_to_dense_collate},
        {"layout": "dense", "num_workers": 1},
        {"layout": "dense", "executor": "direct"},
    ],
    ids=stable,
)
def test_what_stays_direct(dataset: CellDataset, options: dict[str, Any]) -> None:
    assert type(make_loader(dataset, sampler_for(dataset), **options)) is CellLoader


def test_the_samplers_workers_stay_direct_unless_dali_is_asked_for(dataset: CellDataset) -> None:
    sampler = sampler_for(dataset, num_workers=2)
    assert make_loader(dataset, sampler, layout="dense").num_workers == 2
    loader = make_loader(dataset, sampler, layout="dense", executor="dali")
    assert loader.num_workers == 0
    assert sum(len(batch["X"]) for batch in loader) == 120


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"executor": "queue"}, "'auto', 'dali', 'direct'"),
        ({"executor": "dali"}, "layout"),
        ({"executor": "dali", "collate_fn": sparse_to_dense_collate}, "layout"),
        ({"executor": "dali", "layout": "dense", "num_workers": 2}, "worker processes"),
    ],
    ids=stable,
)
def test_options_that_do_not_go_together(dataset: CellDataset, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make_loader(dataset, sampler_for(dataset), **options)


@pytest.mark.parametrize(("first", "second"), [("direct", "dali"), ("dali", "direct")])
def test_a_state_goes_from_one_executor_to_the_other(dataset: CellDataset, first: str, second: str) -> None:
    def load(executor: str) -> CellLoader:
        return make_loader(dataset, sampler_for(dataset, batch_size=16), layout="dense", executor=executor)

    whole = list(load("direct"))
    begun = load(first)
    batches = iter(begun)
    for _ in range(3):
        next(batches)
    resumed = load(second)
    resumed.load_state_dict(begun.state_dict())
    begun.close()
    for found, expected in zip(resumed, whole[3:], strict=True):
        same_batch(found, expected)


@pytest.mark.parametrize("executor", ["direct", "dali"])
@pytest.mark.parametrize(
    "storage",
    [{"io": "pinned"}, {"residency": "host"}, {"residency": "device", "residency_budget": 1000}],
    ids=stable,
)
def test_io_and_residency_reach_the_feed(
    dataset: CellDataset, executor: str, storage: dict[str, Any]
) -> None:
    sampler = sampler_for(dataset)
    loader: Any = make_loader(
        dataset, sampler, layout="dense", executor=executor, residency_load="touch", **storage
    )
    assert type(loader.feed._dataset._reader) is not type(dataset._reader)  # read otherwise
    for found, want in zip(loader, make_loader(dataset, sampler, layout="dense"), strict=True):
        same_batch(found, want)
    (whole,) = make_loader(dataset, sampler_for(dataset), **storage)
    assert len(whole) == 120


def test_io_and_residency_are_of_one_process(dataset: CellDataset) -> None:
    with pytest.raises(ValueError, match="num_workers=0"):
        make_loader(dataset, sampler_for(dataset), residency="host", num_workers=1)
    with pytest.raises(ValueError, match="num_workers=0"):
        make_loader(dataset, sampler_for(dataset, num_workers=1), io="pinned")
    with pytest.raises(ValueError, match="somewhere"):
        make_loader(dataset, sampler_for(dataset), residency="somewhere")


def test_stats_pass_through(dataset: CellDataset) -> None:
    loader = make_loader(dataset, sampler_for(dataset, batch_size=16), layout="dense", executor="dali")
    list(loader)
    stats = loader.stats()
    assert (stats.batches, stats.cells) == (8, 120)


def test_the_benchmark_says_what_dali_adds(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    options = ["--cells", "400", "--genes", "100", "--rows", "32", "--rounds", "1", "--batches", "5"]
    assert executors.main([*options, "--data", str(tmp_path / "data"), "--out", str(tmp_path)]) == 0
    printed = capsys.readouterr().out
    results = json.loads((tmp_path / "executors.json").read_text())["results"]
    assert [r["table"] for r in results] == ["hand-over", "loading"] * 3
    for result in results:
        for added, executor in (("added", "dali"), ("added_by_pipeline", "pipeline")):
            assert result[added] == result[executor]["median"] - result["direct"]["median"]
        assert f"{result['table']}, {result['layout']}, 32 rows" in printed
    assert results[0]["nbytes"] == 32 * 100 * 4 + 32 * 8  # X and index
