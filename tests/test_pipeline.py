"""Pipelines of DALI operators over our loader: graphs, random operators, resume."""

from __future__ import annotations

import gc
import itertools
import pickle
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
import torch

from hbx_gpu.dataloader import CellDataset, make_loader
from hbx_gpu.pipeline import CellPipeline, cell_pipeline
from hbx_gpu.sampler import CellSampler
from hbx_gpu.testing import example_dataset, example_groups
from hbx_gpu.transforms import log1p, normalize_total
from tests.dali import need_dali, same_batch
from tests.ids import stable
from tests.loading import Slow, sampler_for
from tests.pages import blocks
from tests.threads import loader_threads

Fields = dict[str, Any]
ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(autouse=True)
def dali() -> None:
    need_dali()


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> CellDataset:
    return example_dataset(tmp_path_factory.mktemp("arrays"), example_groups())


def direct(dataset: CellDataset, **kwargs: Any) -> list[Fields]:
    return list(
        make_loader(dataset, sampler_for(dataset), executor="direct", **{"layout": "dense", **kwargs})
    )


def noise(fields: Fields) -> Fields:
    """Gaussian noise on X."""
    from nvidia.dali import fn

    return {**fields, "X": fields["X"] + fn.random.normal(fields["X"], stddev=1.0)}


def noisy(dataset: CellDataset, **kwargs: Any) -> CellPipeline:
    sampler = kwargs.pop("sampler", None) or sampler_for(dataset)
    return cell_pipeline(dataset, sampler, graph=noise, **kwargs)


def xs(loader: Any) -> list[torch.Tensor]:
    return [batch["X"] for batch in loader]


def equal(some: list[torch.Tensor], others: list[torch.Tensor]) -> bool:
    return len(some) == len(others) and all(map(torch.equal, some, others))


# -- graphs ----------------------------------------------------------------------------------------


def test_operators_of_dali_are_part_of_the_pipeline(dataset: CellDataset) -> None:
    def graph(fields: Fields) -> Fields:
        from nvidia.dali import fn
        from nvidia.dali import types as dali_types

        types: Any = dali_types
        x = fn.cast(fields["X"] * 0.5, dtype=types.FLOAT16)
        return {"X": x, "index": fields["index"], "largest": fn.reductions.max(fields["X"])}

    for found, plain in zip(
        cell_pipeline(dataset, sampler_for(dataset), graph=graph), direct(dataset), strict=True
    ):
        # What DALI does not carry is kept in its place, fields that the graph drops are gone.
        assert list(found) == ["X", "day", "index", "largest"]
        assert torch.equal(found["X"], (plain["X"] * 0.5).half())
        assert torch.equal(found["index"], plain["index"])
        assert np.array_equal(found["day"], plain["day"])
        assert found["largest"] == plain["X"].max()


def test_a_graph_sees_every_field_by_name(dataset: CellDataset) -> None:
    seen: list[list[str]] = []

    def graph(fields: Fields) -> Fields:
        seen.append(list(fields))
        return fields

    list(cell_pipeline(dataset, sampler_for(dataset), graph=graph))
    list(cell_pipeline(dataset, sampler_for(dataset), layout="csr", graph=graph))
    sparse = ["X.indices", "X.values", "X.offsets"]
    assert seen == [["X", "type", "score", "index"], [*sparse, "type", "score", "index"]]


def test_outputs_without_names_make_tuples(dataset: CellDataset) -> None:
    def pair(fields: Fields) -> tuple[Any, Any]:
        return fields["X"] + 1, fields["index"]

    def single(fields: Fields) -> Any:
        return fields["X"] + 1

    plain = direct(dataset)
    for found, want in zip(cell_pipeline(dataset, sampler_for(dataset), graph=pair), plain, strict=True):
        assert isinstance(found, tuple)
        assert torch.equal(found[0], want["X"] + 1)
        assert torch.equal(found[1], want["index"])
    (found,) = next(iter(cell_pipeline(dataset, sampler_for(dataset), graph=single)))
    assert torch.equal(found, plain[0]["X"] + 1)


def test_values_of_a_sparse_batch(dataset: CellDataset) -> None:
    def graph(fields: Fields) -> Fields:
        return {**fields, "X.values": fields["X.values"] * 2}

    pipeline = cell_pipeline(dataset, sampler_for(dataset), layout="csr", graph=graph)
    for found, plain in zip(pipeline, direct(dataset, layout="csr"), strict=True):
        plain["X"].values().mul_(2)
        same_batch(found, plain)


def test_part_of_a_sparse_batch_is_no_tensor_any_more(dataset: CellDataset) -> None:
    def graph(fields: Fields) -> Fields:
        return {"X.values": fields["X.values"], "length": fields["X.offsets"]}

    pipeline = cell_pipeline(dataset, sampler_for(dataset), layout="csr", graph=graph)
    for found, plain in zip(pipeline, direct(dataset, layout="csr"), strict=True):
        assert list(found) == ["day", "X.values", "length"]
        assert torch.equal(found["X.values"], plain["X"].values())
        assert torch.equal(found["length"], plain["X"].crow_indices())


def test_parts_that_are_no_sparse_matrix_are_refused(dataset: CellDataset) -> None:
    def graph(fields: Fields) -> Fields:
        from nvidia.dali import fn

        return {**fields, "X.values": fn.slice(fields["X.values"], 0, 2, axes=[0])}

    with pytest.raises(ValueError, match=r"2 X\.values"):
        next(iter(cell_pipeline(dataset, sampler_for(dataset), layout="csr", graph=graph)))


def test_python_inside_a_graph_does_not_stop_the_loader(dataset: CellDataset) -> None:
    """It needs the interpreter's lock on DALI's threads, which nobody may hold while waiting for DALI."""

    def graph(fields: Fields) -> Fields:
        from nvidia.dali import fn

        return {**fields, "X": fn.python_function(fields["X"], function=lambda x: x + 1)}

    pipeline = cell_pipeline(dataset, sampler_for(dataset), graph=graph)
    assert equal(xs(pipeline), [x + 1 for x in xs(direct(dataset))])


@pytest.mark.parametrize(
    "graph",
    [lambda fields: None, lambda fields: {}, lambda fields: {"X": 1}, lambda fields: {1: fields["X"]}],  # noqa: ARG005
)
def test_what_a_graph_may_not_return(dataset: CellDataset, graph: Callable[[Fields], Any]) -> None:
    with pytest.raises(TypeError, match="DataNodes by name"):
        next(iter(cell_pipeline(dataset, sampler_for(dataset), graph=graph)))
    assert not loader_threads()


def test_an_error_inside_the_graph_function_arrives(dataset: CellDataset) -> None:
    with pytest.raises(KeyError, match="no such field"):
        next(iter(cell_pipeline(dataset, sampler_for(dataset), graph=lambda fields: fields["no such field"])))
    assert not loader_threads()


def test_an_error_of_an_operator_arrives(dataset: CellDataset) -> None:
    """In the batch it happens in; those before are handed over."""

    def graph(fields: Fields) -> Fields:
        from nvidia.dali import fn

        return {**fields, "X": fn.slice(fields["X"], 0, 16, axes=[0])}  # the last batch has 8 rows

    batches = iter(cell_pipeline(dataset, sampler_for(dataset), graph=graph))
    got = list(itertools.islice(batches, 7))
    assert equal(xs(got), xs(direct(dataset))[:7])
    with pytest.raises(RuntimeError, match="out of bounds"):
        next(batches)
    assert next(batches, None) is None
    assert not loader_threads()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"graph": noise, "dtype": "bfloat16"}, "bfloat16"),
        ({"prefetch_queue_depth": 0}, "prefetch_queue_depth"),
        ({"num_threads": 0}, "num_threads"),
        ({"layout": "blocked"}, "blocked"),
        ({"num_workers": 2}, "worker processes"),
    ],
    ids=stable,
)
def test_options_that_do_not_go_together(dataset: CellDataset, options: Fields, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        cell_pipeline(dataset, sampler_for(dataset), **options)


# -- random operators --------------------------------------------------------------------------------


def test_random_operators_follow_seed_and_epoch(dataset: CellDataset) -> None:
    one, other = noisy(dataset), noisy(dataset, prefetch_queue_depth=4, threads=1, window=1)
    first = xs(one)
    assert not equal(first, xs(direct(dataset)))
    assert equal(first, xs(one))  # the same epoch again
    assert equal(first, xs(other))  # however far ahead
    same_cells = sampler_for(dataset, shuffle=False)
    unshuffled = noisy(dataset, sampler=same_cells)
    epochs = []
    for epoch in (0, 1, 0):
        unshuffled.set_epoch(epoch)
        epochs.append(xs(unshuffled))
    assert equal(epochs[0], epochs[2])
    assert not any(map(torch.equal, epochs[0], epochs[1]))


def test_a_seed_of_its_own(dataset: CellDataset) -> None:
    assert equal(xs(noisy(dataset, seed=1)), xs(noisy(dataset, seed=1)))
    assert not equal(xs(noisy(dataset, seed=1)), xs(noisy(dataset, seed=2)))


def test_ranks_have_noise_of_their_own(dataset: CellDataset) -> None:
    def first_noise(rank: int) -> torch.Tensor:
        sampler = sampler_for(dataset, rank=rank, world_size=2)
        plain = next(iter(make_loader(dataset, sampler, layout="dense", executor="direct")))
        result: torch.Tensor = next(iter(noisy(dataset, sampler=sampler)))["X"] - plain["X"]
        return result

    assert not torch.allclose(first_noise(0), first_noise(1), atol=1e-3)


@pytest.mark.parametrize("how", ["running", "left", "closed"])
@pytest.mark.parametrize("step", [0, 1, 5])
def test_random_operators_resume(dataset: CellDataset, step: int, how: str) -> None:
    whole = noisy(dataset)
    whole.set_epoch(2)
    expected = xs(whole)

    begun = noisy(dataset)
    begun.set_epoch(2)
    batches = iter(begun)
    head = [next(batches)["X"] for _ in range(step)]
    if how == "closed":
        begun.close()
    elif how == "left":
        del batches
        gc.collect()
    state = pickle.loads(pickle.dumps(begun.state_dict()))
    begun.close()

    resumed = noisy(dataset)
    resumed.load_state_dict(state)
    resumed.set_epoch(2)
    assert resumed.state_dict() == state  # handed on before anything is loaded
    assert equal(head + xs(resumed), expected)
    resumed.set_epoch(3)
    whole.set_epoch(3)
    assert equal(xs(resumed), xs(whole))


@pytest.mark.filterwarnings("ignore:set_epoch.4. drops the position")
def test_another_epoch_forgets_where_random_operators_were(dataset: CellDataset) -> None:
    begun = noisy(dataset)
    batches = iter(begun)
    next(batches), next(batches)
    state = begun.state_dict()
    begun.close()
    whole, resumed = noisy(dataset), noisy(dataset)
    resumed.load_state_dict(state)
    for loader in (whole, resumed):
        loader.set_epoch(4)
    assert equal(xs(resumed), xs(whole))


@pytest.mark.parametrize("place", ["after the last batch", "after the iteration has ended"])
def test_the_state_at_the_end_of_an_epoch_begins_the_next_one(dataset: CellDataset, place: str) -> None:
    whole = noisy(dataset)
    batches = iter(whole)
    for _ in range(len(whole)):
        next(batches)
    if place == "after the iteration has ended":
        assert list(batches) == []
    state = whole.state_dict()
    assert "graph" not in state
    assert state["epoch"] == 1
    resumed = noisy(dataset)
    resumed.load_state_dict(state)
    del batches
    whole.set_epoch(1)
    assert equal(xs(resumed), xs(whole))


def test_another_rank_takes_up_the_order_with_noise_of_its_own(dataset: CellDataset) -> None:
    begun = noisy(dataset, sampler=sampler_for(dataset, rank=0, world_size=2))
    batches = iter(begun)
    next(batches)
    state = begun.state_dict()
    begun.close()

    def resumed(rank: int) -> list[Fields]:
        loader = noisy(dataset, sampler=sampler_for(dataset, rank=rank, world_size=2))
        loader.load_state_dict(state)
        return list(loader)

    def plain(rank: int) -> list[Fields]:
        sampler = sampler_for(dataset, rank=rank, world_size=2)
        return list(make_loader(dataset, sampler, layout="dense", executor="direct"))

    assert equal(xs(resumed(1)), xs(resumed(1)))
    assert equal([b["index"] for b in resumed(1)], [b["index"] for b in plain(1)][1:])
    one, other = (resumed(rank)[0]["X"] - plain(rank)[1]["X"] for rank in (0, 1))
    assert not torch.allclose(one, other, atol=1e-3)


def test_the_position_is_what_the_consumer_received(dataset: CellDataset) -> None:
    """Not what is inside DALI: a deep queue that had time to fill changes nothing."""
    loader = cell_pipeline(dataset, sampler_for(dataset), prefetch_queue_depth=5)
    whole = list(loader)
    batches = iter(loader)
    for step in range(1, 4):
        next(batches)
        time.sleep(0.1)
        resumed = cell_pipeline(dataset, sampler_for(dataset))
        resumed.load_state_dict(loader.state_dict())
        for found, expected in zip(resumed, whole[step:], strict=True):
            same_batch(found, expected)


# -- ends --------------------------------------------------------------------------------------------


def test_batches_stay_as_they_are_while_they_are_held(dataset: CellDataset) -> None:
    """Outputs are views of DALI's memory: it may not be used again, nor go with the pipeline."""
    loader = cell_pipeline(dataset, sampler_for(dataset))
    held = list(loader)
    loader.close()
    del loader
    gc.collect()
    list(cell_pipeline(dataset, sampler_for(dataset, shuffle=False)))
    for found, expected in zip(held, direct(dataset), strict=True):
        same_batch(found, expected)


def test_a_context_manager_ends_everything(dataset: CellDataset) -> None:
    list(cell_pipeline(dataset, sampler_for(dataset)))
    gc.collect()
    native = psutil.Process().num_threads()
    gc.disable()  # nothing waits for it
    try:
        with cell_pipeline(dataset, sampler_for(dataset)) as loader:
            batches = iter(loader)
            next(batches)
            assert loader_threads()
            assert isinstance(loader, CellPipeline)
            dali = loader.pipeline()
        assert not loader_threads()
        del batches, dali
        assert psutil.Process().num_threads() <= native
    finally:
        gc.enable()


def test_epochs_leave_no_threads_behind(dataset: CellDataset) -> None:
    loader = cell_pipeline(dataset, sampler_for(dataset))
    list(loader)
    gc.collect()
    native = psutil.Process().num_threads()
    for epoch in range(20):
        loader.set_epoch(epoch)
        for _ in zip(loader, range(epoch % 9), strict=False):  # leaving somewhere
            pass
    assert not loader_threads()
    assert psutil.Process().num_threads() <= native


def test_a_consumer_that_stops_stops_the_loader() -> None:
    data = Slow(0.001)
    sampler = CellSampler(np.zeros(1000, np.int32), batch_size=10, shuffle=False, num_workers=0)
    with cell_pipeline(data, sampler, prefetch_queue_depth=3, window=1, threads=1) as loader:
        batches = iter(loader)
        next(batches)
        time.sleep(0.3)
        made = data.made
        time.sleep(0.2)
        assert data.made == made  # bounded: 3 inside DALI, the loader's own ahead
        assert made <= 1 + 3 + 4


def test_a_program_that_ends_in_mid_epoch_ends() -> None:
    """No thread of ours or of DALI's keeps the interpreter, or crashes it."""
    script = """
import time
import numpy as np
from hbx_gpu.pipeline import cell_pipeline
from hbx_gpu.sampler import CellSampler
from tests.loading import Slow, sampler_for
from tests.test_pipeline import noise
cells = np.zeros(100_000, np.int32)
sampler = CellSampler(cells, batch_size=4, num_workers=0, shuffle=False)
loader = cell_pipeline(Slow(0), sampler, graph=noise, prefetch_queue_depth=100_000, window=1)
batches = iter(loader)
next(batches)
dali = loader.pipeline()
dali.close()
other = cell_pipeline(Slow(0), sampler, window=1)
dali = other.pipeline()
dali.run()
time.sleep(0.2)
print("read")
"""
    done = subprocess.run(
        [sys.executable, "-c", script],
        capture_output=True,
        text=True,
        timeout=120,
        cwd=ROOT,
        check=False,
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, "read\n", "")


def test_the_documentation_runs(dataset: CellDataset) -> None:
    """Every Python block of docs/dali.md, one after the other."""
    seen: list[tuple[torch.Size, float]] = []

    def train(x: torch.Tensor, mask: torch.Tensor) -> None:
        assert x.dtype == torch.float16
        assert not x[~mask].any()
        seen.append((x.shape, mask.float().mean().item()))

    namespace = {
        "dataset": dataset,
        "sampler": sampler_for(dataset),
        "train": train,
        "normalize_total": normalize_total,
        "log1p": log1p,
    }
    for language, block in blocks(ROOT / "docs" / "dali.md"):
        if language == "python":
            exec(block, namespace)
    assert len(seen) == 5 * 8  # an epoch in dynamic mode, one of our pipeline, three of DALI's iterator
    assert abs(np.mean([share for _, share in seen]) - 0.85) < 0.02


# -- GPU ---------------------------------------------------------------------------------------------


@pytest.mark.gpu
def test_noise_on_a_gpu(tmp_path: Path) -> None:
    """Held batches and a consumer that lags behind, with DALI's operators between kernels and consumer."""
    dataset = example_dataset(tmp_path, example_groups(2000))
    sampler = sampler_for(dataset, batch_size=256)
    plain = make_loader(dataset, sampler, device="cuda", layout="dense", executor="direct")
    want = [batch["X"].cpu() for batch in plain]

    def graph(fields: Fields) -> Fields:
        return {**fields, "X": fields["X"] * 2 + 1}

    for _ in range(3):
        loader = cell_pipeline(dataset, sampler, device="cuda", graph=graph)
        assert equal([x.cpu() for x in xs(loader)], [x * 2 + 1 for x in want])
    first = xs(cell_pipeline(dataset, sampler, device="cuda", graph=noise))
    assert equal(first, xs(cell_pipeline(dataset, sampler, device="cuda", graph=noise)))
