"""Batches with neighbors of each cell: the rows, the tables of a graph, what a loader hands out, resume."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import scipy.sparse as sp
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from hbx_gpu.dataloader import make_loader
from hbx_gpu.sampler import CellSampler, NeighborSampler, neighbor_table
from hbx_gpu.testing import N_FEATURES, example_dataset, example_groups, expected_dense

N, K = 120, 3
TABLE = np.random.default_rng(0).integers(-1, N, (N, K))


def sampler(table: np.ndarray = TABLE, **options: Any) -> NeighborSampler:
    return NeighborSampler(CellSampler(np.zeros(N, int), 16, **({"seed": 2} | options)), table)


@settings(max_examples=25, deadline=None)
@given(
    n=st.integers(1, 12),
    k=st.integers(1, 5),
    seed=st.integers(0, 50),
    nearest=st.sampled_from(["largest", "smallest"]),
)
def test_the_table_of_a_graph_is_that_of_sorting_each_row(n: int, k: int, seed: int, nearest: str) -> None:
    rng = np.random.default_rng(seed)
    graph = sp.random(n, n, density=0.4, format="csr", random_state=rng)
    graph.data = rng.integers(1, 4, graph.nnz).astype(float)  # with ties
    found = neighbor_table(graph, k, nearest=nearest)
    sign = -1 if nearest == "largest" else 1
    for row in range(n):
        links = zip(graph[row].indices.tolist(), graph[row].data.tolist(), strict=True)
        expected = [column for column, value in sorted(links, key=lambda link: (sign * link[1], link[0]))]
        assert found[row].tolist() == (expected + [-1] * k)[:k]


@pytest.mark.parametrize("layout", ["dense", "csr"])
def test_a_loader_hands_out_neighbors_beside_the_cells(tmp_path: Path, layout: str) -> None:
    dataset = example_dataset(tmp_path)
    expected = torch.from_numpy(expected_dense(example_groups(), N_FEATURES)).float()
    loader = make_loader(dataset, sampler(), layout=layout, executor="direct", threads=2)
    seen: list[int] = []
    for batch in loader:
        rows = batch["index"]
        index = torch.from_numpy(np.where(TABLE[rows] < 0, rows[:, None].numpy(), TABLE[rows]))
        others = batch["neighbors"]
        assert torch.equal(others["index"], index)
        assert others["score"].shape == (len(rows), K)
        x, neighbors = batch["X"], others["X"]
        if layout == "csr":
            assert neighbors.shape == (len(rows) * K, N_FEATURES)
            x, neighbors = x.to_dense(), neighbors.to_dense().reshape(len(rows), K, -1)
        assert torch.equal(x, expected[rows])
        assert torch.equal(neighbors, expected[index])
        seen += rows.tolist()
    assert sorted(seen) == list(range(N))
    assert len(loader) == 8


def test_the_order_is_that_of_the_sampler_on_all_ranks() -> None:
    for rank in range(2):
        options: dict[str, Any] = {"rank": rank, "world_size": 2}
        plain = CellSampler(np.zeros(N, int), 16, seed=2, **options)
        ours = sampler(**options)
        for epoch in range(2):
            plain.set_epoch(epoch)
            ours.set_epoch(epoch)
            assert [rows[: len(rows) // (1 + K)] for rows in ours] == list(plain)
        assert (ours.rank, ours.world_size, len(ours)) == (rank, 2, len(plain))


def test_a_run_goes_on_and_refuses_other_neighbors(tmp_path: Path) -> None:
    dataset = example_dataset(tmp_path)
    loader = make_loader(dataset, sampler(), layout="dense", executor="direct")
    whole: list[list[int]] = []
    state: dict[str, Any] = {}
    for batch in loader:
        whole.append(batch["index"].tolist())
        if len(whole) == 3:
            state = loader.state_dict()
    again = make_loader(dataset, sampler(), layout="dense", executor="direct")
    again.load_state_dict(state)
    assert [batch["index"].tolist() for batch in again] == whole[3:]
    other = make_loader(dataset, sampler(TABLE[:, :2]), layout="dense", executor="direct")
    with pytest.raises(ValueError, match="saved with other neighbors"):
        other.load_state_dict(state)


def test_wrong_tables() -> None:
    with pytest.raises(ValueError, match=r"of shape \(n_cells, k\).* got float64"):
        sampler(TABLE.astype(float))
    with pytest.raises(IndexError, match="neighbor 120 is out of range for 120 cells"):
        sampler(np.where(TABLE == 5, N, TABLE))
    with pytest.raises(IndexError, match="neighbors are there for 40 cells"):
        list(sampler(np.zeros((40, 2), int)))
    with pytest.raises(ValueError, match="as many rows as columns"):
        neighbor_table(sp.csr_matrix((3, 4)), 2)
    with pytest.raises(ValueError, match="nearest must be"):
        neighbor_table(sp.csr_matrix((3, 3)), 2, nearest="far")
