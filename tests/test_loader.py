"""The loader: order, read-ahead, errors, shutdown, workers; through DALI and without it."""

from __future__ import annotations

import gc
import inspect
import itertools
import subprocess
import sys
import threading
import time
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.utils.data import BatchSampler, DataLoader, DistributedSampler, SequentialSampler

from hbx_gpu._buffers import POOL
from hbx_gpu._loading.loader import CellLoader
from hbx_gpu._loading.read_ahead import ReadAhead
from hbx_gpu._loading.workers import Handover
from hbx_gpu.dataloader import CellDataset, make_loader, sparse_to_dense_collate
from hbx_gpu.errors import CorruptChunkError, ResourceError
from hbx_gpu.sampler import CellSampler
from hbx_gpu.testing import N_FEATURES, example_dataset, example_groups, expected_dense
from hbx_gpu.transforms import log1p, normalize_total
from tests.dali import need_dali
from tests.limits import no_shared_memory
from tests.loading import Executor, Slow, sampler_for
from tests.threads import loader_threads


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> CellDataset:
    return example_dataset(tmp_path_factory.mktemp("arrays"), example_groups())


@pytest.fixture(scope="module")
def expected() -> np.ndarray:
    return expected_dense(example_groups(), N_FEATURES)


@pytest.fixture(params=["direct", "dali"])
def load(request: pytest.FixtureRequest) -> Executor:
    if request.param == "dali":
        need_dali()
    return Executor(request.param)


@pytest.mark.parametrize(("threads", "window"), [(1, 1), (2, 1), (2, 3), (3, 50), (None, None)])
@pytest.mark.parametrize("locality", ["none", "group"])
def test_batches_follow_the_sampler(
    load: Executor,
    dataset: CellDataset,
    expected: np.ndarray,
    threads: int | None,
    window: int | None,
    locality: str,
) -> None:
    sampler = sampler_for(dataset, locality=locality)
    loader = load(dataset, sampler, threads=threads, window=window)
    for epoch in range(2):
        loader.set_epoch(epoch)
        order = list(sampler)
        got = list(loader)
        assert len(loader) == len(got) == len(order)
        for rows, batch in zip(order, got, strict=True):
            assert np.array_equal(batch["X"].numpy(), expected[list(rows)])
            assert batch["score"].tolist() == np.linspace(0, 1, 120)[list(rows)].tolist()
    assert not loader_threads()


def test_without_collate_batches_come_as_they_are(dataset: CellDataset) -> None:
    batches = list(make_loader(dataset, sampler_for(dataset)))
    assert sum(len(batch) for batch in batches) == 120
    assert batches[0].n_features == N_FEATURES


def test_any_torch_batch_sampler_works(load: Executor, dataset: CellDataset, expected: np.ndarray) -> None:
    sampler = BatchSampler(SequentialSampler(range(120)), 50, drop_last=False)
    loader = load(dataset, sampler)
    assert isinstance(loader, DataLoader)
    assert torch.equal(torch.cat([b["X"] for b in loader]), torch.from_numpy(expected).float())


@pytest.mark.usefixtures("spawn")
def test_spawned_workers_give_the_same_batches(dataset: CellDataset) -> None:
    sampler = sampler_for(dataset, num_workers=2)
    plain = [b["X"] for b in make_loader(dataset, sampler, sparse_to_dense_collate, num_workers=0)]
    with make_loader(dataset, sampler, sparse_to_dense_collate) as loader:
        assert loader.num_workers == 2
        for _ in range(2):  # persistent: the second epoch starts no process
            assert all(torch.equal(a, b["X"]) for a, b in zip(plain, loader, strict=True))


def test_errors_reach_the_consumer(load: Executor, tmp_path: Path) -> None:
    dataset = example_dataset(tmp_path, example_groups())
    path = next(iter(sorted((tmp_path / "g1/csr/layers/counts/c").iterdir())))
    path.write_bytes(path.read_bytes()[:-1])
    sampler = sampler_for(dataset, locality="group", shuffle=False)
    batches = iter(load(dataset, sampler, threads=2, window=1))
    with pytest.raises(CorruptChunkError, match="g1/csr/layers/counts"):
        list(batches)
    assert next(batches, None) is None  # it ended; it does not hang
    assert not loader_threads()


def test_full_shared_memory_is_an_error(dataset: CellDataset) -> None:
    sampler = sampler_for(dataset)
    list(make_loader(dataset, sampler, layout="dense"))  # what is compiled is written to a file
    loader = make_loader(
        dataset, sampler, layout="dense", num_workers=1, worker_init_fn=no_shared_memory, timeout=60
    )
    with loader, pytest.raises(ResourceError, match=r"Shared memory.*num_workers=0"):
        list(loader)


def test_batches_of_workers_lie_in_shared_memory() -> None:
    csr = torch.eye(3).to_sparse_csr()
    batch = {"X": torch.ones(3), "more": [torch.zeros(2), {"csr": csr}], "text": "a", "array": np.ones(3)}
    handed = Handover(lambda batch: batch)(batch)
    assert handed is batch
    parts = [batch["X"], batch["more"][0], csr.values(), csr.crow_indices(), csr.col_indices()]  # type: ignore[index]
    assert all(part.is_shared() for part in parts)
    assert torch.equal(csr.to_dense(), torch.eye(3))


def test_errors_of_workers_reach_the_consumer(tmp_path: Path) -> None:
    dataset = example_dataset(tmp_path, example_groups())
    for path in (tmp_path / "g1/csr/indices/c").iterdir():
        path.write_bytes(b"\\0" * 7)
    with (
        make_loader(dataset, sampler_for(dataset, num_workers=1), timeout=60) as loader,
        pytest.raises(CorruptChunkError),
    ):
        list(loader)


def slow_loader(load: Executor, dataset: Slow, **kwargs: Any) -> CellLoader:
    sampler = CellSampler(np.zeros(1000, np.int32), batch_size=10, shuffle=False, num_workers=0)
    return load(dataset, sampler, window=1, **kwargs)


def test_leaving_early_leaves_no_thread(load: Executor) -> None:
    dataset = Slow()
    for _ in slow_loader(load, dataset, threads=2):
        break
    gc.collect()
    assert not loader_threads()
    assert dataset.made < 10


def test_close_ends_a_running_iteration(load: Executor) -> None:
    loader = slow_loader(load, Slow(), threads=2)
    batches = iter(loader)
    next(batches)
    loader.close()
    assert not loader_threads()
    assert len(list(batches)) <= 3  # what was ready may still come; nothing hangs


def test_reading_ahead_is_bounded_and_overlaps(load: Executor) -> None:
    dataset = Slow(0.01)
    batches = iter(slow_loader(load, dataset, threads=2))
    next(batches)
    time.sleep(0.5)
    # Ahead of the consumer, but not the whole epoch.
    assert 2 <= dataset.made <= 6 + load.inside


@pytest.mark.parametrize("budget", [1, 3000, 100_000])
def test_the_memory_budget_holds(
    load: Executor,
    dataset: CellDataset,
    expected: np.ndarray,
    budget: int,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Bytes of batches made and not yet handed over never pass the budget, but for a batch on its own."""
    sampler = sampler_for(dataset)
    loader = load(dataset, sampler, memory_budget=budget, threads=3, window=4)
    order = list(sampler)
    sizes = [dataset.batch_nbytes(np.array(rows)) + len(rows) * N_FEATURES * 4 for rows in order]
    held: list[int] = []
    lock = threading.Lock()
    made: set[int] = set()
    make = loader.feed.make

    def watched(selections: Any) -> Any:
        with lock:
            made.update(order.index(rows.tolist()) for rows in selections)
            held.append(sum(sizes[i] for i in made))
        return make(selections)

    release = ReadAhead._release

    def handed_over(ahead: ReadAhead, nbytes: int) -> None:
        with lock:
            made.remove(min(made))  # they go in order
        release(ahead, nbytes)

    loader.feed.make = watched  # type: ignore[method-assign]
    monkeypatch.setattr(ReadAhead, "_release", handed_over)
    for i, batch in enumerate(loader):
        assert np.array_equal(batch["X"].numpy(), expected[list(order[i])])
        time.sleep(0.005)
    assert not made
    assert max(held) <= max(budget, max(sizes))


def test_batch_nbytes_is_what_a_batch_takes(dataset: CellDataset) -> None:
    batch = dataset[[3, 3, 70]]
    assert dataset.batch_nbytes([3, 3, -50]) == batch.indices.nbytes + batch.values.nbytes


@pytest.mark.parametrize("dtype", ["float32", "float64", "float16", "bfloat16"])
def test_layout_dense(load: Executor, dataset: CellDataset, expected: np.ndarray, dtype: str) -> None:
    sampler = sampler_for(dataset)
    loader = load(dataset, sampler, dtype=dtype, transform=[normalize_total(100.0), log1p])
    totals = np.maximum(expected.sum(1, keepdims=True), 1)
    scaled = torch.from_numpy(np.log1p(expected * (100.0 / totals)))
    for rows, batch in zip(sampler, loader, strict=True):
        assert batch["X"].dtype == getattr(torch, dtype)
        torch.testing.assert_close(
            batch["X"].double(), scaled[list(rows)], rtol=1e-2 if "16" in dtype else 1e-6, atol=1e-6
        )


def test_layout_csr(load: Executor, dataset: CellDataset, expected: np.ndarray) -> None:
    sampler = sampler_for(dataset)
    for rows, batch in zip(sampler, load(dataset, sampler, layout="csr"), strict=True):
        assert batch["X"].layout is torch.sparse_csr
        assert np.array_equal(batch["X"].to_dense().numpy(), expected[list(rows)])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"layout": "dense", "collate_fn": sparse_to_dense_collate}, "give one of them"),
        ({"layout": "blocked"}, "blocked"),
        ({"layout": "dense", "dtype": "int8"}, "int8"),
        ({"layout": "csr", "dtype": "float16"}, "dense"),
        ({"dtype": "float16"}, 'layout="dense"'),
        ({"layout": "dense", "transform": [log1p, normalize_total()]}, "last"),
        ({"memory_budget": 0}, "memory_budget"),
    ],
)
def test_options_that_do_not_go_together(dataset: CellDataset, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make_loader(dataset, sampler_for(dataset), **options)


def test_two_iterations_do_not_disturb_each_other(load: Executor, dataset: CellDataset) -> None:
    loader = load(dataset, sampler_for(dataset))
    both = list(itertools.zip_longest(loader, loader))
    assert all(torch.equal(a["X"], b["X"]) for a, b in both)


@pytest.mark.parametrize("name", ["batch_size", "shuffle", "drop_last", "batch_sampler"])
def test_what_the_sampler_decides_is_refused(dataset: CellDataset, name: str) -> None:
    given: dict[str, Any] = {name: 1}
    with pytest.raises(ValueError, match=name):
        make_loader(dataset, sampler_for(dataset), **given)


def test_bad_numbers(dataset: CellDataset) -> None:
    with pytest.raises(ValueError, match="threads"):
        make_loader(dataset, sampler_for(dataset), threads=0)
    with pytest.raises(ValueError, match="window"):
        make_loader(dataset, sampler_for(dataset), window=0)


def test_frameworks_find_the_epoch_and_the_ranks(dataset: CellDataset) -> None:
    """Lightning tells the epoch to `sampler` only, and replaces samplers that are not distributed ones."""
    sampler = sampler_for(dataset, rank=1, world_size=2)
    loader: Any = make_loader(dataset, sampler)
    for found in (loader.sampler, loader.batch_sampler.sampler):
        assert isinstance(found, DistributedSampler)
        assert (found.rank, found.num_replicas, found.epoch) == (1, 2, 0)
    loader.sampler.set_epoch(3)
    assert (loader.epoch, sampler.epoch) == (3, 3)
    assert list(loader.sampler) == [row for rows in sampler for row in rows]
    rebuilt = type(loader.batch_sampler)(loader.sampler, batch_size=16, drop_last=False)
    assert list(rebuilt) == list(sampler)
    assert (len(rebuilt), loader.batch_sampler.batch_size) == (len(sampler), 16)


class SeenIndices(BatchSampler):
    """What Lightning puts around a batch sampler to learn which rows a prediction is of."""

    def __init__(self, batch_sampler: Any) -> None:
        self.__dict__ = dict(batch_sampler.__dict__)
        self._batch_sampler = batch_sampler

    def __iter__(self) -> Any:
        self.seen: list[list[int]] = []
        for rows in self._batch_sampler:
            self.seen.append(rows)
            yield rows

    def __len__(self) -> int:
        return len(self._batch_sampler)


def made_again(loader: CellLoader, *, hook: bool = False) -> CellLoader:
    """Another loader, as Lightning 2 makes it to predict: from attributes, or from what a hook was passed."""
    parameters = inspect.signature(type(loader).__init__).parameters
    found = {k: v for k, v in vars(loader).items() if k in parameters and parameters[k].default is not v}
    batches: Any = loader.batch_sampler
    again = type(batches)(loader.sampler, batch_size=batches.batch_size, drop_last=False)
    injected = {"sampler": None, "shuffle": False, "batch_size": 1, "drop_last": False}
    found |= injected | {"batch_sampler": SeenIndices(again)}
    assert set(found) <= set(parameters)
    return type(loader)(found.pop("dataset"), **found) if hook else type(loader)(**found)


@pytest.mark.parametrize("hook", [False, True])
def test_lightning_predicts_with_another_loader_of_the_same_class(
    load: Executor, dataset: CellDataset, expected: np.ndarray, hook: bool
) -> None:
    loader = load(dataset, sampler_for(dataset, rank=1, world_size=2), threads=2)
    again: Any = made_again(loader, hook=hook)
    assert again.num_workers == 0
    assert len(again) == len(loader)
    found, seen = list(again), again.batch_sampler.seen
    ours: Any = loader.batch_sampler
    assert seen == list(ours)
    for rows, batch in zip(seen, found, strict=True):
        assert np.array_equal(batch["X"].numpy(), expected[rows])
        assert batch["index"].tolist() == rows


def test_another_loader_of_worker_processes_counts_what_they_were_fed(dataset: CellDataset) -> None:
    with make_loader(dataset, sampler_for(dataset), layout="dense", num_workers=1) as loader:
        again = made_again(loader)
        assert again.num_workers == 1
        batches = iter(again)
        first = next(batches)["index"].tolist()
        ours: Any = loader.batch_sampler
        assert first == next(iter(ours))
        assert again.state_dict()["sampler"]["batches"] == 1
        again.close()


def test_predicting_names_rows_that_the_sampler_leaves_out(dataset: CellDataset) -> None:
    loader = make_loader(dataset, sampler_for(dataset, drop_last=True), layout="dense")
    with pytest.warns(UserWarning, match="leaves out the last rows .* drop_last=False"):
        made_again(loader)


def test_a_loader_takes_one_sampler_that_decides(dataset: CellDataset) -> None:
    sampler = sampler_for(dataset)
    wrongs: list[dict[str, Any]] = [{}, {"sampler": sampler, "batch_sampler": sampler}]
    for wrong in wrongs:
        with pytest.raises(ValueError, match=r"either sampler= or batch_sampler="):
            CellLoader(dataset, **wrong)
    with pytest.raises(ValueError, match="batch_size, shuffle: the sampler decides this"):
        CellLoader(dataset, sampler, batch_size=5, shuffle=True)


def test_a_script_without_a_guard_is_told_so(tmp_path: Path) -> None:
    script = tmp_path / "train.py"
    script.write_text(
        "import numpy as np\n"
        "from hbx_gpu._loading.loader import CellLoader\n"
        "from hbx_gpu._loading.options import LoaderOptions\n"
        "from hbx_gpu.sampler import CellSampler\n"
        "class Rows:\n"
        "    def __len__(self): return 8\n"
        "    def __getitems__(self, rows): return list(rows)\n"
        "sampler = CellSampler(np.zeros(8, int), 4)\n"
        "WORKERS\n"
    )
    text = script.read_text()
    made = "CellLoader(Rows(), sampler, options=LoaderOptions(num_workers=1))"
    script.write_text(text.replace("WORKERS", f"print(len(list({made})))"))
    run = subprocess.run(
        [sys.executable, str(script)], capture_output=True, text=True, timeout=120, check=False
    )
    assert run.returncode != 0
    child, parent = run.stderr, run.stderr.splitlines()[-1]
    assert "this script starts worker processes without a __main__ guard" in child
    assert "a worker process ended before it gave a batch" in parent
    assert 'if __name__ == "__main__":' in parent


def test_no_memory_is_asked_for_in_steady_state(load: Executor, tmp_path: Path) -> None:
    """Once two epochs have gone by, batches live in the memory of earlier ones."""
    dataset = example_dataset(tmp_path, example_groups(2000))
    sampler = sampler_for(dataset, batch_size=512)
    loader = load(dataset, sampler, threads=2)
    for epoch in range(6):
        if epoch == 2:
            before = POOL.n_allocated
        loader.set_epoch(epoch)
        for batch in loader:
            assert batch["X"].shape[1] == N_FEATURES
    # Batches differ a little in size, and may now and then be the first of theirs.
    assert POOL.n_allocated - before <= 2
    assert before > 0


def test_windows_of_wide_batches_leave_room_for_every_thread(load: Executor, dataset: CellDataset) -> None:
    sampler = sampler_for(dataset)
    widest = max(dataset.batch_nbytes(rows) for rows in sampler) + 16 * N_FEATURES * 4
    loader = load(dataset, sampler, memory_budget=8 * widest, threads=3, window=8)
    lengths: list[int] = []
    make = loader.feed.make

    def watched(selections: Any) -> Any:
        lengths.append(len(selections))
        return make(selections)

    loader.feed.make = watched  # type: ignore[method-assign]
    assert sum(len(batch["X"]) for batch in loader) == 120
    assert max(lengths) <= 2  # a fifth of the budget: three threads, one window waiting, one consumed


@pytest.mark.filterwarnings("error::pytest.PytestUnraisableExceptionWarning")
@pytest.mark.parametrize("where", ["a thread of its own", "a thread of another loader"])
def test_an_iterator_that_the_garbage_collector_drops_on_a_loader_thread_ends(
    load: Executor, dataset: CellDataset, where: str
) -> None:
    dropped, own = threading.Event(), where == "a thread of its own"
    loader = load(dataset, sampler_for(dataset, batch_size=4), threads=1, window=1)
    other = loader if own else load(dataset, sampler_for(dataset), threads=1, window=1)
    # Both threads: the one that makes windows, and the one that hands them to DALI.
    make, deliver, first = other.feed.make, other.feed.deliver, threading.Event()

    def collecting(call: Any, argument: Any) -> Any:
        if first.is_set():
            assert dropped.wait(20)
            gc.collect()
        return call(argument)

    other.feed.make = partial(collecting, make)  # type: ignore[method-assign]
    other.feed.deliver = partial(collecting, deliver)  # type: ignore[method-assign]
    gc.disable()
    try:
        batches: Any = iter(loader)
        next(batches)
        cycle: list[Any] = [batches]
        cycle.append(cycle)
        first.set()
        del batches, cycle
        dropped.set()
        if not own:
            assert len(list(other)) == 8
        end = time.monotonic() + 20
        while loader_threads() and time.monotonic() < end:
            time.sleep(0.01)
        assert not loader_threads()
    finally:
        gc.enable()


@pytest.mark.parametrize("dtype", ["float16", np.float16, np.dtype("float16"), torch.float16])
def test_a_dtype_is_named_or_given(dtype: object, tmp_path: Path) -> None:
    dataset = example_dataset(tmp_path, example_groups())
    with make_loader(dataset, batch_size=4, layout="dense", dtype=dtype, executor="direct") as loader:
        assert next(iter(loader))["X"].dtype is torch.float16


@pytest.mark.parametrize(
    "wrong",
    [
        {"dtype": 16},
        {"memory_budget": "1GB"},
        {"residency_budget": "1GB"},
        {"token_seed": 1.5},
        {"image_seed": "a"},
    ],
)
def test_options_of_the_wrong_type_are_refused_by_name(wrong: dict[str, Any], tmp_path: Path) -> None:
    dataset = example_dataset(tmp_path, example_groups())
    with pytest.raises((TypeError, ValueError), match=f"{next(iter(wrong))} must be"):
        make_loader(dataset, batch_size=4, layout="dense", **wrong)
