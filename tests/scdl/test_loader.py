"""Archives through `make_loader`: threads, spawned workers, an emulated device; neighbors in batches."""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from hbx_gpu._devices import dali_missing
from hbx_gpu._loading.make import device_loader
from hbx_gpu._loading.options import LoaderOptions
from hbx_gpu.dataloader import make_loader
from hbx_gpu.errors import InvalidDataError
from hbx_gpu.sampler import CellSampler
from hbx_gpu.scdl import SingleCellCollection, SingleCellMemMapDataset
from hbx_gpu.scdl._sources.cells import to_cell_dataset
from hbx_gpu.scdl._sources.pairs import PairedDataset
from tests.emulation.backend import EmulatedBackend
from tests.kernels.conftest import on_gpu
from tests.scdl.conftest import Case
from tests.scdl.files import dense_of

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")


@pytest.fixture(params=["emulated", pytest.param("cuda", marks=pytest.mark.gpu)])
def backend(request: pytest.FixtureRequest) -> Any:
    if request.param == "emulated":
        return EmulatedBackend()
    on_gpu()
    from hbx_gpu._engine.device.cuda import CudaBackend

    return CudaBackend(0)


def sampler(dataset: Any, **options: Any) -> CellSampler:
    plain: dict[str, Any] = {"batch_size": 7, "seed": 1, "locality": "none", "num_workers": 0}
    return CellSampler(dataset.groups_np, **(plain | options))


def readable(cases: dict[str, Case]) -> Iterator[tuple[str, Case]]:
    return ((name, case) for name, case in cases.items() if not case.info["must_raise"])


def check(batches: list[dict[str, Any]], truth: np.ndarray, name: str) -> None:
    """Every row once, each with its values (as float32, which batches are)."""
    rows = np.concatenate([batch["index"].cpu().numpy() for batch in batches])
    assert sorted(rows.tolist()) == list(range(len(truth))), name
    for batch in batches:
        x = batch["X"].cpu()
        found = x.to_dense() if x.layout is torch.sparse_csr else x
        expected = truth[batch["index"].cpu().numpy()].astype(np.float32)
        assert np.array_equal(found.numpy(), expected), name


@pytest.mark.parametrize("executor", ["direct", "dali"])
@pytest.mark.parametrize("layout", ["dense", "csr"])
def test_every_archive_through_the_loader(scdl_cases: dict[str, Case], layout: str, executor: str) -> None:
    if executor == "dali" and (reason := dali_missing()):
        pytest.skip(reason)
    for name, case in readable(scdl_cases):
        dataset: Any = SingleCellMemMapDataset(case.archive)
        with make_loader(dataset, sampler(dataset), layout=layout, executor=executor) as loader:
            check(list(loader), dense_of(case, dataset.to_cell_dataset()), name)


@pytest.mark.parametrize("layout", ["dense", "csr"])
def test_every_archive_on_a_device(scdl_cases: dict[str, Case], layout: str, backend: Any) -> None:
    for name, case in readable(scdl_cases):
        dataset: Any = SingleCellMemMapDataset(case.archive)
        truth = dense_of(case, dataset.to_cell_dataset())
        for how in ({"io": "mmap"}, {"io": "pinned"}, {"residency": "device"}, {"residency": "host"}):
            with device_loader(
                dataset, sampler(dataset), backend, LoaderOptions.of(layout=layout, **how)
            ) as loader:
                check(list(loader), truth, f"{name}, {how}")


def test_spawned_workers_and_metadata(scdl_cases: dict[str, Case]) -> None:
    case = scdl_cases["ragged_two"]
    dataset = to_cell_dataset(case.archive, metadata_columns=["cell_type", "plate"])
    with make_loader(dataset, sampler(dataset), layout="dense", num_workers=2) as loader:
        batches = list(loader)
    check(batches, dense_of(case, dataset), "ragged_two")
    with make_loader(dataset, sampler(dataset), layout="dense") as loader:
        for mine, theirs in zip(loader, batches, strict=True):
            for key in ("index", "cell_type", "plate", "X"):
                assert torch.equal(mine[key], theirs[key])
    blocks = case.frames("obs")
    wanted = [value for frame in blocks for value in frame["columns"]["cell_type"]]
    names = dataset.categories["cell_type"]
    for batch in batches:
        rows = batch["index"].tolist()
        assert [names[code] for code in batch["cell_type"]] == [wanted[row] for row in rows]


def test_a_collection_through_the_loader(scdl_cases: dict[str, Case], tmp_path: Path) -> None:
    cases = [scdl_cases["merge_blocks"], scdl_cases["single_f32"]]
    for k, case in enumerate(cases):
        (tmp_path / f"{k}").symlink_to(case.archive)
    collection = SingleCellCollection.open(tmp_path)
    dataset = collection.to_cell_dataset()
    truth = np.zeros((len(dataset), dataset.n_features))
    begin, place = 0, {uid: i for i, uid in enumerate(dataset.feature_uids)}
    for case in cases:
        alone = to_cell_dataset(case.archive)
        columns = [place[uid] for uid in alone.feature_uids]
        truth[begin : begin + len(alone), columns] = dense_of(case, alone)
        begin += len(alone)
    with make_loader(collection, sampler(collection, locality="group"), layout="dense") as loader:
        check(list(loader), truth, "collection")


def test_resuming_in_mid_epoch(scdl_cases: dict[str, Case]) -> None:
    dataset = SingleCellMemMapDataset(scdl_cases["single_f32"].archive)
    with make_loader(dataset, sampler(dataset), layout="dense") as loader:
        expected = [batch["index"].tolist() for batch in loader]
    with make_loader(dataset, sampler(dataset), layout="dense") as loader:
        batches = iter(loader)
        next(batches), next(batches)
        state = loader.state_dict()
    with make_loader(dataset, sampler(dataset), layout="dense") as loader:
        loader.load_state_dict(state)
        assert [batch["index"].tolist() for batch in loader] == expected[2:]


# -- neighbors -----------------------------------------------------------------------------------------


def links_of(case: Case) -> list[dict[int, set[float]]]:
    pointers = case.expected["neighbor_indptr"].astype(int)
    found = []
    for a, b in itertools.pairwise(pointers):
        weights: dict[int, set[float]] = {}
        for other, weight in zip(
            case.expected["neighbor_indices"][a:b], case.expected["neighbor_values"][a:b], strict=True
        ):
            weights.setdefault(int(other), set()).add(float(weight))
        found.append(weights)
    return found


def check_pairs(batches: list[dict[str, Any]], case: Case, truth: np.ndarray) -> None:
    check(batches, truth, "neighbors")
    links = links_of(case)
    for batch in batches:
        others = batch["neighbor_index"].tolist()
        assert batch["neighbor_weight"].dtype == torch.float32
        x = batch["neighbor_X"].cpu()
        found = x.to_dense() if x.layout is torch.sparse_csr else x
        assert np.array_equal(found.numpy(), truth[others].astype(np.float32))
        for row, other, weight in zip(
            batch["index"].tolist(), others, batch["neighbor_weight"].tolist(), strict=True
        ):
            if links[row]:
                assert weight in links[row][other]
            else:
                assert (other, weight) == (row, 0)


@pytest.mark.parametrize("strategy", ["random", "first", "weighted"])
@pytest.mark.parametrize("layout", ["dense", "csr"])
def test_neighbors_are_a_second_batch(
    scdl_cases: dict[str, Case], layout: str, strategy: str, backend: Any
) -> None:
    case = scdl_cases["neighbors"]
    dataset = SingleCellMemMapDataset(
        case.archive, load_neighbors=True, neighbor_sampling_strategy=strategy, neighbor_seed=5
    )
    truth = dense_of(case, to_cell_dataset(case.archive))
    with make_loader(dataset, sampler(dataset), layout=layout) as loader:  # through DALI where it is there
        here = list(loader)
    check_pairs(here, case, truth)
    with make_loader(dataset, sampler(dataset), layout=layout, executor="direct") as loader:
        check_pairs(list(loader), case, truth)
    with device_loader(dataset, sampler(dataset), backend, LoaderOptions(layout=layout)) as loader:
        there = list(loader)
    check_pairs(there, case, truth)
    for mine, theirs in zip(here, there, strict=True):
        assert mine["neighbor_index"].tolist() == theirs["neighbor_index"].tolist()
        assert list(mine) == list(theirs)


def test_neighbors_from_workers_are_the_same(scdl_cases: dict[str, Case]) -> None:
    case = scdl_cases["neighbors"]
    dataset = SingleCellMemMapDataset(case.archive, load_neighbors=True)
    paired = dataset.to_cell_dataset(["stage"])
    with make_loader(paired, sampler(paired), layout="dense") as loader:
        expected = list(loader)
    with make_loader(paired, sampler(paired), layout="dense", num_workers=2) as loader:
        found = list(loader)
    for mine, theirs in zip(expected, found, strict=True):
        assert list(mine) == list(theirs)
        assert all(torch.equal(mine[key], theirs[key]) for key in mine)
    assert "stage" in found[0]


def test_draws_follow_from_seed_and_rows(scdl_cases: dict[str, Case]) -> None:
    case = scdl_cases["neighbors"]
    cells = to_cell_dataset(case.archive)
    rows = np.arange(24)
    one, same, other = (PairedDataset(cells, [case.archive], seed=seed).draw(rows)[0] for seed in (0, 0, 1))
    assert one.tolist() == same.tolist()
    assert one.tolist() != other.tolist()
    assert PairedDataset(cells, [case.archive], seed=0).draw(rows[::-1])[0][::-1].tolist() != one.tolist()


def test_weighted_draws_follow_the_weights(handmade: Any) -> None:
    """Row 0: weights 1, 0, 3; row 1: all zero; row 2: none; the last row: one link."""
    archive = handmade.write()
    n = handmade.n_rows
    pointers = np.zeros(n + 1, "u8")
    pointers[1:] = [3, 5, *[5] * (n - 3), 6]
    pointers.tofile(archive / "neighbor_indptr.npy")
    np.array([4, 5, 6, 7, 8, 9], "u4").tofile(archive / "neighbor_indices.npy")
    np.array([1, 0, 3, 0, 0, 0.5], "f4").tofile(archive / "neighbor_values.npy")
    paired = PairedDataset(to_cell_dataset(archive), [archive], strategy="weighted")
    rows = np.tile([0, 1, 2, n - 1], 4000)
    index, weight = (found.reshape(-1, 4) for found in paired.draw(rows))
    assert set(index[:, 0]) == {4, 6}
    assert abs((index[:, 0] == 6).mean() - 0.75) < 0.03
    assert abs((index[:, 1] == 7).mean() - 0.5) < 0.04
    assert set(index[:, 2]) == {2}
    assert set(index[:, 3]) == {9}
    assert set(weight[:, 0]) == {1.0, 3.0}
    assert set(weight[:, 3]) == {0.5}
    random = PairedDataset(to_cell_dataset(archive), [archive]).draw(rows)[0].reshape(-1, 4)
    assert all(abs((random[:, 0] == k).mean() - 1 / 3) < 0.04 for k in (4, 5, 6))
    np.array([1, -1, 3, 0, 0, 0.5], "f4").tofile(archive / "neighbor_values.npy")
    paired = PairedDataset(to_cell_dataset(archive), [archive], strategy="weighted")
    with pytest.raises(InvalidDataError, match="negative"):
        paired.draw(rows)


def test_neighbors_of_several_archives(scdl_cases: dict[str, Case]) -> None:
    """Row numbers count through the archives; one without neighbors has its cells stand in."""
    case, other = scdl_cases["neighbors"], scdl_cases["single_f32"]
    paths = [other.archive, case.archive, case.archive]
    paired = PairedDataset(to_cell_dataset(paths), paths, strategy="first")
    index, weight = paired.draw(np.arange(len(paired)))
    assert index[:40].tolist() == list(range(40))
    assert not weight[:40].any()
    alone = PairedDataset(to_cell_dataset(case.archive), [case.archive], strategy="first").draw(np.arange(24))
    assert index[40:64].tolist() == (alone[0] + 40).tolist()
    assert index[64:].tolist() == (alone[0] + 64).tolist()
    assert weight[64:].tolist() == alone[1].tolist()


def test_what_cannot_be_paired(scdl_cases: dict[str, Case]) -> None:
    archive = scdl_cases["single_f32"].archive
    with pytest.raises(InvalidDataError, match="no neighbors are stored"):
        PairedDataset(to_cell_dataset(archive), [archive])
    with pytest.raises(ValueError, match="Unsupported neighbor_sampling_strategy"):
        PairedDataset(to_cell_dataset(archive), [archive], strategy="nearest")
    case = scdl_cases["neighbors"]
    plain = PairedDataset(to_cell_dataset(case.archive), [case.archive])
    batch = plain[[0, 3]]
    assert (len(batch), len(batch.neighbors)) == (2, 2)
    assert plain.n_features == 50


def test_the_page_for_scdl_users_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every Python block of docs/scdl.md, one after the other in one session."""
    page = Path(__file__).parents[2] / "docs" / "scdl.md"
    monkeypatch.chdir(tmp_path)
    sources = re.findall(r"```python\n(.*?)```", page.read_text(), re.DOTALL)
    assert len(sources) > 5
    namespace: dict[str, Any] = {"__name__": "__main__"}
    for number, source in enumerate(sources):
        exec(compile(source, f"{page}, block {number}", "exec"), namespace)
