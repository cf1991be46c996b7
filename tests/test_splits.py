"""Some rows of a dataset: subsets, torch's splits and concatenations; states belong to their rows."""

from __future__ import annotations

import pickle
from pathlib import Path
from typing import Any

import anndata
import numpy as np
import pandas as pd
import pytest
import scipy.sparse as sp
import torch
from torch.utils.data import ConcatDataset, DataLoader, RandomSampler, Subset, random_split

import hbx_gpu
from hbx_gpu._datasets.joined import joined
from hbx_gpu._source import ObsColumns
from hbx_gpu.atlas import RaggedAtlas, create_or_open_atlas
from hbx_gpu.dataloader import (
    CellDataset,
    MultimodalCellDataset,
    make_loader,
    sparse_to_csr_collate,
    sparse_to_dense_collate,
)
from hbx_gpu.errors import HbxError
from hbx_gpu.sampler import CellSampler
from hbx_gpu.testing import N_FEATURES, example_dataset, example_groups, expected_dense


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> CellDataset:
    return example_dataset(tmp_path_factory.mktemp("arrays"), example_groups())


@pytest.fixture(scope="module")
def expected() -> np.ndarray:
    return expected_dense(example_groups(), N_FEATURES)


def x(batch: Any) -> np.ndarray:
    found: np.ndarray = sparse_to_dense_collate(batch)["X"].numpy()
    return found


def for_torch(dataset: Any) -> Any:
    """A dataset or a sampler as torch takes it, which knows its own classes only."""
    return dataset


def all_of(loader: Any) -> np.ndarray:
    return torch.cat([batch["X"] for batch in loader]).numpy()


def test_one_row_in_any_coat(dataset: CellDataset, expected: np.ndarray) -> None:
    coats: list[Any] = [1, np.int64(1), np.uint8(1), np.array(1), torch.tensor(1), [1], torch.tensor([1])]
    for row in coats:
        assert np.array_equal(x(dataset[row]), expected[[1]])
    many: list[Any] = [slice(3, None, 40), torch.arange(3, 120, 40), range(3, 120, 40), [np.int32(3), 43, 83]]
    for rows in many:
        assert np.array_equal(x(dataset[rows]), expected[3::40])
    with pytest.raises(IndexError, match="integers"):
        dataset[torch.tensor(1.5)]  # type: ignore[index]


def test_a_subset_has_the_rows_in_the_order_given(dataset: CellDataset, expected: np.ndarray) -> None:
    rows = [100, 3, 3, -1, 50]
    part = dataset.subset(rows)
    assert (len(part), part.n_features) == (5, dataset.n_features)
    assert np.array_equal(x(part[:]), expected[rows])
    assert part[[1]].metadata is not None
    assert part[[1]].metadata["score"] == dataset.columns["score"][3]
    assert np.array_equal(part.groups_np, dataset.groups_np[rows])
    again = part.subset(np.array([True, False, False, False, True]))
    assert np.array_equal(x(again[:]), expected[[100, 50]])
    assert np.array_equal(x(pickle.loads(pickle.dumps(again))[:]), expected[[100, 50]])
    with pytest.raises(IndexError, match="row 5 is out of range"):
        part.subset([5])
    assert len(dataset.subset([])) == 0


def test_torch_splits_load_like_subsets(dataset: CellDataset, expected: np.ndarray) -> None:
    train, rest = random_split(for_torch(dataset), [90, 30], generator=torch.Generator().manual_seed(0))
    got = all_of(make_loader(train, batch_size=16, layout="dense"))
    assert np.array_equal(got, expected[list(train.indices)])
    nested = Subset(rest, [4, 2])
    assert np.array_equal(
        all_of(make_loader(nested, batch_size=16, layout="dense")),
        expected[[rest.indices[4], rest.indices[2]]],
    )
    # As torch loads them itself, batch by batch.
    plain = DataLoader(train, batch_size=16, collate_fn=sparse_to_dense_collate)
    assert np.array_equal(all_of(plain), got)


def test_concatenations_are_one_dataset(dataset: CellDataset, expected: np.ndarray) -> None:
    parts: Any = ConcatDataset(for_torch([dataset.subset(range(80, 120)), dataset.subset([5, 3])]))
    rows = [*range(80, 120), 5, 3]
    got = list(make_loader(parts, batch_size=16, layout="dense"))
    assert np.array_equal(all_of(got), expected[rows])
    scores = torch.cat([batch["score"] for batch in got])
    assert scores.tolist() == dataset.columns["score"][rows].tolist()
    one = joined([dataset.subset([0, 1]), dataset.subset([119])])
    assert one.n_groups == dataset.n_groups, "a stored matrix counts once"
    assert np.array_equal(x(pickle.loads(pickle.dumps(one))[:]), expected[[0, 1, 119]])
    with pytest.raises(HbxError, match="obs columns cannot be put together"):
        joined([dataset, dataset.without_metadata()])


def test_parts_of_one_dataset_of_any_kind_are_put_together(dataset: CellDataset, tmp_path: Path) -> None:
    """Dense rows and several modalities cannot be joined, but splits of one dataset can."""
    two = MultimodalCellDataset({"rna": dataset, "atac": example_dataset(tmp_path, example_groups())})
    x = np.arange(40, dtype=np.float32).reshape(10, 4)
    anndata.AnnData(x).write_h5ad(tmp_path / "dense.h5ad")
    dense = hbx_gpu.open(tmp_path / "dense.h5ad").to_cell_dataset()
    for whole, n in ((two, 120), (dense, 10)):
        first, second = random_split(for_torch(whole), [n - 4, 4], torch.Generator().manual_seed(0))
        both: Any = ConcatDataset([second, Subset(first, [3, 1])])
        rows = [*second.indices, first.indices[3], first.indices[1]]
        for loader in (make_loader(both, batch_size=6, layout="dense"), DataLoader(both, batch_size=6)):
            (batch,) = loader
            found = batch["rna"]["X"] if whole is two else batch["X"]
            wanted = (
                sparse_to_dense_collate(dataset[rows])["X"] if whole is two else torch.from_numpy(x[rows])
            )
            assert torch.equal(found, wanted)
    other = hbx_gpu.open(tmp_path / "dense.h5ad").to_cell_dataset()
    with pytest.raises(HbxError, match="select all rows with one query"):
        make_loader(ConcatDataset(for_torch([dense, other])), batch_size=6, layout="dense")


def test_labels_of_a_concatenation_are_numbered_together(dataset: CellDataset) -> None:
    def labeled(words: list[str], codes: list[int], rows: list[int]) -> CellDataset:
        part = dataset.subset(rows)
        obs = ObsColumns({"label": np.array(codes)}, {"label": np.array(words, object)})
        part.__dict__.update(_obs=obs)
        return part

    one = joined([labeled(["B", "T"], [1, -1], [0, 1]), labeled(["T", "NK"], [0, 1, 0], [2, 3, 4])])
    words = one.categories["label"]
    assert words.tolist() == ["B", "T", "NK"]
    assert one.columns["label"].tolist() == [1, -1, 1, 2, 1]


def test_samplers_of_rows_and_no_sampler(dataset: CellDataset, expected: np.ndarray) -> None:
    order = list(RandomSampler(dataset, generator=torch.Generator().manual_seed(3)))
    sampler = RandomSampler(dataset, generator=torch.Generator().manual_seed(3))
    loader = make_loader(dataset, sampler, batch_size=50, drop_last=True, layout="dense")
    assert [len(batch["X"]) for batch in loader] == [50, 50]
    sampler = RandomSampler(dataset, generator=torch.Generator().manual_seed(3))
    assert np.array_equal(all_of(make_loader(dataset, sampler, layout="dense")), expected[order])
    shuffled = make_loader(dataset, batch_size=50, shuffle=True, seed=4, layout="dense")
    rows = [row for batch in CellSampler(dataset.groups_np, 50, seed=4) for row in batch]
    assert np.array_equal(all_of(shuffled), expected[rows])
    assert np.array_equal(all_of(make_loader(dataset, layout="dense")), expected)
    for options in ({"batch_size": 8}, {"shuffle": True}, {"drop_last": True}, {"seed": 1}):
        with pytest.raises(ValueError, match="the sampler decides this"):
            make_loader(dataset, CellSampler(dataset.groups_np, 16), **options)
    with pytest.raises(ValueError, match="shuffle: the sampler decides this"):
        make_loader(dataset, sampler, shuffle=True)
    with pytest.raises(ValueError, match=r"one by one .* pass batch_size="):
        next(iter(make_loader(dataset, [3, 4, 5], layout="dense")))
    assert np.array_equal(
        all_of(make_loader(dataset, [3, 4, 5], batch_size=2, layout="dense")), expected[3:6]
    )


def test_a_state_belongs_to_its_rows(dataset: CellDataset, tmp_path: Path) -> None:
    def loader(rows: Any) -> Any:
        return make_loader(dataset.subset(rows), batch_size=8, shuffle=True, seed=0, layout="dense")

    mine, other = np.arange(0, 120, 2), np.arange(1, 120, 2)  # as two donors of one matrix
    first = loader(mine)
    next(iter(first))
    state = first.state_dict()
    assert len(repr(state)) < 1000
    loader(mine).load_state_dict(state)
    with pytest.raises(ValueError, match=r"other cells \(60 cells .* saved, 60 here; the rows differ"):
        loader(other).load_state_dict(state)
    assert dataset.subset(mine).with_layers(dataset.layer).identity() == dataset.subset(mine).identity()
    assert dataset.subset([0, 1]).identity() != dataset.subset([1, 0]).identity()
    same = example_dataset(tmp_path, example_groups())
    assert same.identity() == dataset.identity(), "the same matrices elsewhere"


@pytest.mark.parametrize("workers", [0, 1])
def test_torch_loads_with_its_default_collate(
    dataset: CellDataset, expected: np.ndarray, workers: int
) -> None:
    context = "spawn" if workers else None
    numbered: Any = dataset.with_columns({"row": np.arange(120)})
    loader: Any = DataLoader(
        numbered, batch_size=50, shuffle=True, num_workers=workers, multiprocessing_context=context
    )
    batches = list(loader)
    rows = torch.cat([batch["row"] for batch in batches]).tolist()
    assert sorted(rows) == list(range(120))
    assert np.array_equal(all_of(batches), expected[rows])
    assert batches[0]["X"].dtype == torch.float32
    part: Any = Subset(numbered, [7, 5])
    assert next(iter(DataLoader(part, batch_size=2)))["row"].tolist() == [7, 5]
    both: Any = ConcatDataset([numbered.subset([3, 60]), part])
    (batch,) = DataLoader(both, batch_size=8, num_workers=workers, multiprocessing_context=context)
    assert batch["row"].tolist() == [3, 60, 7, 5]
    assert np.array_equal(all_of([batch]), expected[[3, 60, 7, 5]])


@pytest.mark.parametrize("collate", [None, sparse_to_dense_collate, sparse_to_csr_collate])
def test_rows_that_torch_asks_for_one_by_one(
    dataset: CellDataset, expected: np.ndarray, collate: Any
) -> None:
    first, second = random_split(for_torch(dataset), [70, 50], torch.Generator().manual_seed(1))
    rows = [*first.indices, *second.indices]
    both: Any = ConcatDataset([first, second])
    loader = DataLoader(both, batch_size=50, collate_fn=collate)
    assert np.array_equal(torch.cat([b["X"].to_dense() for b in loader]).numpy(), expected[rows])
    some = Subset(both, [100, 2, 2])
    (batch,) = DataLoader(some, batch_size=50, collate_fn=collate)
    assert np.array_equal(batch["X"].to_dense().numpy(), expected[[rows[100], rows[2], rows[2]]])
    assert batch["type"].tolist() == dataset.columns["type"][[rows[100], rows[2], rows[2]]].tolist()


def test_rows_of_other_features_are_not_put_together(dataset: CellDataset) -> None:
    """Batches of one width whose columns, codes or obs columns mean something else."""
    other = dataset._derived(feature_uids=dataset.feature_uids[::-1].copy())
    recoded = dataset._derived(_obs=ObsColumns(dataset.columns, {"type": np.array(["t", "b"])}))
    for odd in (other, recoded, dataset.with_columns({"more": np.arange(120)})):
        with pytest.raises(TypeError, match=r"differ in features, .*hbx_gpu\.make_loader"):
            next(
                iter(
                    DataLoader(ConcatDataset(list(map(for_torch, [dataset.subset([1]), odd]))), batch_size=2)
                )
            )
    with pytest.raises(TypeError, match=r"were not read as dataset\[i\]"):
        sparse_to_dense_collate([dataset[[1]], dataset[[2]]])


def test_rows_of_several_modalities_are_put_together(dataset: CellDataset, tmp_path: Path) -> None:
    both: Any = MultimodalCellDataset({"rna": dataset, "atac": example_dataset(tmp_path, example_groups())})
    rows = [5, 119, 5]
    (whole,) = DataLoader(both, batch_size=3, sampler=rows)
    (batch,) = DataLoader(ConcatDataset([both]), batch_size=3, sampler=rows)
    for space in ("rna", "atac"):
        assert torch.equal(batch[space]["X"], whole[space]["X"])
        assert torch.equal(batch["measured"][space], whole["measured"][space])
        assert torch.equal(batch["present"][space], whole["present"][space])
    assert torch.equal(batch["metadata"]["type"], whole["metadata"]["type"])


def test_a_row_of_a_batch_is_a_batch(dataset: CellDataset, expected: np.ndarray) -> None:
    batch = dataset[[4, 9, 100]]
    assert np.array_equal(x(batch[1]), expected[[9]])
    assert np.array_equal(x(batch[-1]), expected[[100]])
    assert batch[-1].metadata is not None
    assert batch[-1].metadata["score"] == dataset.columns["score"][100]
    assert len(list(for_torch(batch))) == 3
    with pytest.raises(IndexError, match="row 3 is out of range for a batch of 3"):
        batch[3]
    # As of a DataLoader with batch_size=None, which converts nothing.
    with pytest.raises(TypeError, match="sparse_to_dense_collate to a torch DataLoader"):
        batch["X"]  # type: ignore[index]


def test_states_of_an_atlas(tmp_path: Path) -> None:
    def add(seed: int, donor: str) -> None:
        atlas = create_or_open_atlas(tmp_path / "atlas")
        x = sp.csr_matrix(np.random.default_rng(seed).poisson(1, (40, 6)).astype(np.float32))
        obs = pd.DataFrame({"donor": [donor] * 40}, index=[f"{donor}{i}" for i in range(40)])
        var = pd.DataFrame(index=[f"gene{i}" for i in range(6)])
        atlas.add_from_anndata(anndata.AnnData(x, obs=obs, var=var))
        atlas.optimize()
        atlas.snapshot()

    def loader(where: str | None = None) -> Any:
        query = RaggedAtlas.checkout_latest(tmp_path / "atlas").query()
        dataset = query.where(where).to_cell_dataset()
        return make_loader(dataset, batch_size=8, shuffle=True, seed=0)

    add(0, "A")
    add(1, "B")
    whole, donor = loader(), loader("donor = 'A'")
    next(iter(whole)), next(iter(donor))
    with pytest.raises(ValueError, match="belongs to other cells"):
        loader("donor = 'B'").load_state_dict(donor.state_dict())
    add(2, "C")
    with pytest.raises(ValueError, match=r"over snapshot 1 of the atlas, .*checkout\(path, 1\)"):
        loader().load_state_dict(whole.state_dict())
    again = loader("donor = 'A'")
    again.load_state_dict(donor.state_dict())  # the same cells in a later snapshot
    assert len(list(again)) == 4


def test_what_else_people_pass_to_a_loader(dataset: CellDataset) -> None:
    order = CellSampler(dataset.groups_np, 50, seed=3)
    batches = list(order)
    order.set_epoch(0)
    with make_loader(dataset, batch_sampler=order, layout="dense", executor="direct") as loader:
        assert [batch["index"].tolist() for batch in loader] == batches
    with pytest.raises(ValueError, match="sampler and batch_sampler both say"):
        make_loader(dataset, order, batch_sampler=order)
    with pytest.raises(TypeError, match=r"make_loader\(dataset, batch_size=64\)"):
        make_loader(dataset, 64)
    with pytest.raises(ValueError, match="batch_size"):
        make_loader(dataset, batch_size=0)
    with pytest.raises(IndexError, match="given to a torch DataLoader as batch_sampler="):
        next(iter(DataLoader(for_torch(dataset), sampler=for_torch(order), batch_size=4)))


def test_what_has_cells_needs_no_sampler(tmp_path: Path) -> None:
    path = tmp_path / "a.h5ad"
    anndata.AnnData(sp.csr_matrix(np.eye(20, 10, dtype=np.float32))).write_h5ad(path)
    for source in (hbx_gpu.open(path), hbx_gpu.open(path).where("obs_name <> ''")):
        loader = make_loader(source, batch_size=8, shuffle=True, seed=0, layout="dense", executor="direct")
        assert sorted(np.concatenate([batch["index"] for batch in loader])) == list(range(20))
    with pytest.raises(TypeError, match=r"not a path: pass hbx_gpu.open\('.*a.h5ad'\)"):
        make_loader(path, batch_size=8)
    with pytest.raises(TypeError, match=r"a object does not tell .*atlas.query\(\)"):
        make_loader(object(), batch_size=8)
