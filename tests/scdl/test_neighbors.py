"""Neighbors: what is stored, how one is drawn, and files that cannot be used."""

from __future__ import annotations

import pickle
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from hbx_gpu.scdl import NeighborSamplingStrategy, SingleCellMemMapDataset
from hbx_gpu.scdl._format.archive import open_archive
from hbx_gpu.scdl._format.neighbors import NeighborsUnusableError, NeighborTable
from hbx_gpu.scdl._sources.cells import to_cell_dataset
from hbx_gpu.scdl._sources.pairs import PairedDataset
from hbx_gpu.scdl._writing.concat import concat_archives
from tests.scdl.conftest import Case, Handmade

ALONE = [0, 7, 21, 22, 23]


@pytest.fixture
def case(scdl_cases: dict[str, Case]) -> Case:
    return scdl_cases["neighbors"]


@pytest.fixture
def dataset(case: Case) -> SingleCellMemMapDataset:
    return SingleCellMemMapDataset(case.archive, load_neighbors=True, neighbor_seed=0)


def stored(case: Case, row: int) -> tuple[np.ndarray, np.ndarray]:
    start, stop = (int(e) for e in case.expected["neighbor_indptr"][row : row + 2])
    return case.expected["neighbor_indices"][start:stop], case.expected["neighbor_values"][start:stop]


def test_stored_neighbors(case: Case, dataset: SingleCellMemMapDataset) -> None:
    for row in range(24):
        indices, weights = stored(case, row)
        np.testing.assert_array_equal(dataset.get_neighbor_indices_for_cell(row), indices, strict=True)
        np.testing.assert_array_equal(dataset.get_neighbor_weights_for_cell(row), weights, strict=True)
    counts = np.diff(case.expected["neighbor_indptr"])
    assert dataset.get_neighbor_stats() == {
        "has_neighbors": True,
        "total_connections": 54,
        "min_neighbors_per_cell": 0,
        "max_neighbors_per_cell": int(counts.max()),
        "avg_neighbors_per_cell": pytest.approx(54 / 24),
        "cells_with_no_neighbors": 5,
    }
    for outside in (-1, 24):
        with pytest.raises(IndexError, match="out of bounds"):
            dataset.get_neighbor_indices_for_cell(outside)
        with pytest.raises(IndexError, match="out of bounds"):
            dataset.get_neighbor_weights_for_cell(outside)
        with pytest.raises(IndexError, match="out of bounds"):
            dataset.sample_neighbor_index(outside)


def test_random_draws_reach_every_neighbor_equally(case: Case, dataset: SingleCellMemMapDataset) -> None:
    row = int(np.diff(case.expected["neighbor_indptr"]).argmax())
    known = set(stored(case, row)[0].tolist())
    drawn: list[Any] = [dataset.sample_neighbor_index(row) for _ in range(400)]
    assert {int(d) for d in drawn} == known
    assert isinstance(drawn[0], np.uint32)
    counts = np.unique(drawn, return_counts=True)[1]
    assert counts.min() > 400 / len(known) * 0.6


def test_seeds(case: Case) -> None:
    def draw(seed: int | None) -> list[int]:
        dataset = SingleCellMemMapDataset(case.archive, load_neighbors=True, neighbor_seed=seed)
        return dataset.sample_neighbor_indices(range(24), 5).ravel().tolist()

    state = np.random.get_state(legacy=False)["state"]["key"].tolist()  # noqa: NPY002
    assert draw(3) == draw(3) != draw(4)
    assert draw(None) != draw(None)
    assert np.random.get_state(legacy=False)["state"]["key"].tolist() == state  # noqa: NPY002


def test_first(case: Case) -> None:
    dataset = SingleCellMemMapDataset(case.archive, load_neighbors=True, neighbor_sampling_strategy="first")
    assert dataset.neighbor_sampling_strategy is NeighborSamplingStrategy.FIRST
    for row in set(range(24)) - set(ALONE):
        assert dataset.sample_neighbor_index(row) == stored(case, row)[0][0]
    wanted = [row if row in ALONE else int(stored(case, row)[0][0]) for row in range(24)]
    assert dataset.sample_neighbor_indices(range(24)).tolist() == wanted


def test_cells_without_neighbors_are_their_own(case: Case, dataset: SingleCellMemMapDataset) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert [dataset.sample_neighbor_index(row) for row in ALONE] == ALONE
        assert dataset.sample_neighbor_indices(ALONE, 2).tolist() == [[row] * 2 for row in ALONE]
    strict = SingleCellMemMapDataset(case.archive, load_neighbors=True, fallback_to_identity=False)
    with pytest.warns(UserWarning, match="Cell 7 has no neighbors"):
        assert strict.sample_neighbor_index(7) == 7


def test_rows_with_neighbors(case: Case, dataset: SingleCellMemMapDataset) -> None:
    dense = case.expected["dense"]
    for row in range(24):
        found = dataset.get_row_with_neighbor(row, return_obs_features=True, obs_feature_names=["stage"])
        assert list(found) == [
            "current_cell", "next_cell", "current_cell_index", "next_cell_index", "var_features",
            "obs_features",
        ]  # fmt: skip
        other = int(found["next_cell_index"])
        assert other in stored(case, row)[0] or (row in ALONE and other == row)
        assert (found["current_cell_index"], found["var_features"]) == (row, None)
        assert found["obs_features"] == [case.frames("obs")[0]["columns"]["stage"][row]]
        np.testing.assert_array_equal(found["next_cell"][0], dataset.get_row(other)[0][0])
        padded = dataset.get_row_padded_with_neighbor(row)
        np.testing.assert_array_equal(padded["current_cell"], dense[row])
        np.testing.assert_array_equal(padded["next_cell"], dense[int(padded["next_cell_index"])])
    assert dataset.get_row_with_neighbor(-1)["current_cell_index"] == 23


class TestWithoutNeighbors:
    def test_not_asked_for(self, case: Case) -> None:
        dataset = SingleCellMemMapDataset(case.archive, neighbor_sampling_strategy="nonsense")
        assert len(dataset.get_neighbor_indices_for_cell(3)) == 0
        assert dataset.get_neighbor_indices_for_cell(3).dtype == np.uint32
        assert dataset.get_neighbor_weights_for_cell(99).dtype == np.float32
        assert dataset.sample_neighbor_index(3) == 3
        assert dataset.sample_neighbor_indices([3, -1]).tolist() == [3, 23]
        assert dataset.get_neighbor_stats() == {"has_neighbors": False}
        assert not hasattr(dataset, "neighbor_key")
        for read in (dataset.get_row_with_neighbor, dataset.get_row_padded_with_neighbor):
            with pytest.raises(ValueError, match="Cannot include neighbor data"):
                read(0)

    def test_none_stored(self, scdl_cases: dict[str, Case]) -> None:
        with pytest.warns(UserWarning, match="neighbor files are missing"):
            dataset = SingleCellMemMapDataset(scdl_cases["single_f32"].archive, load_neighbors=True)
        assert dataset.get_neighbor_stats() == {"has_neighbors": False}
        for read in (
            dataset.get_neighbor_indices_for_cell,
            dataset.get_neighbor_weights_for_cell,
            dataset.sample_neighbor_index,
        ):
            with pytest.raises(ValueError, match="no neighbor data is available"):
                read(0)
        with pytest.raises(ValueError, match="Cannot include neighbor data"):
            dataset.get_row_with_neighbor(0)

    def test_unknown_strategy(self, case: Case) -> None:
        with pytest.raises(ValueError, match="Unsupported neighbor_sampling_strategy: nonsense"):
            SingleCellMemMapDataset(case.archive, load_neighbors=True, neighbor_sampling_strategy="nonsense")


def with_neighbors(handmade: Handmade, **changed: Any) -> Path:
    arrays = {
        "indptr": np.arange(41, dtype="u8"),
        "indices": np.arange(40, dtype="u4")[::-1],
        "values": np.ones(40, "f4"),
    } | changed
    path = handmade.write()
    for name, array in arrays.items():
        array.tofile(path / f"neighbor_{name}.npy")
    return path


class TestFiles:
    def test_padding(self, handmade: Handmade) -> None:
        path = with_neighbors(
            handmade, indptr=np.zeros(41, "u8"), indices=np.zeros(1, "u1"), values=np.zeros(1, "u1")
        )
        dataset = SingleCellMemMapDataset(path, load_neighbors=True)
        assert dataset.get_neighbor_stats()["cells_with_no_neighbors"] == 40
        assert dataset.sample_neighbor_indices(range(40)).tolist() == list(range(40))

    def test_of_other_rows(self, handmade: Handmade) -> None:
        path = with_neighbors(handmade, indptr=np.arange(31, dtype="u8"))
        with pytest.warns(UserWarning, match="neighbors of 30 rows, but the archive has 40"):
            dataset = SingleCellMemMapDataset(path, load_neighbors=True)
        with pytest.raises(ValueError, match="neighbors of 30 rows"):
            dataset.sample_neighbor_index(0)
        assert len(dataset[0]) == 2
        assert pickle.loads(pickle.dumps(dataset)).get_neighbor_stats() == {"has_neighbors": False}

    @pytest.mark.parametrize("n", [39, 41, 80])
    @pytest.mark.parametrize("name", ["indices", "values"])
    def test_short_and_long(self, handmade: Handmade, name: str, n: int) -> None:
        dtype = {"indices": "u4", "values": "f4"}[name]
        path = with_neighbors(handmade, **{name: np.zeros(n, dtype)})
        with pytest.raises(NeighborsUnusableError, match=f"neighbor_{name}.npy: expected 40"):
            _ = open_archive(path).neighbors

    def test_outside(self, handmade: Handmade) -> None:
        path = with_neighbors(handmade, indices=np.full(40, 40, "u4"))
        table = open_archive(path).neighbors
        assert table is not None
        self.refused(table)

    def test_descending(self, handmade: Handmade) -> None:
        indptr = np.arange(41, dtype="u8")
        indptr[5] = 12
        path = with_neighbors(handmade, indptr=indptr)
        table = open_archive(path).neighbors
        assert table is not None
        assert table.of(3)[0].tolist() == [36]
        self.refused(table)

    @pytest.mark.parametrize("strategy", list(NeighborSamplingStrategy))
    @pytest.mark.parametrize("flaw", ["outside", "descending", "beyond"])
    def test_in_batches(self, handmade: Handmade, strategy: str, flaw: str) -> None:
        """The loader takes no damaged row for one without neighbors, and no cells of the next archive."""
        indptr, indices = np.arange(41, dtype="u8"), np.arange(40, dtype="u4")
        if flaw == "outside":
            indices[5] = 45
        else:
            indptr[5] = {"descending": 12, "beyond": 1 << 40}[flaw]
        path = with_neighbors(handmade, indptr=indptr, indices=indices)
        handmade.path = path.with_name("next")
        paths = [path, handmade.write()]
        paired = PairedDataset(to_cell_dataset(paths), paths, strategy=strategy)
        assert paired.draw([0, 40, 7])[0].tolist() == [0, 40, 7]
        with pytest.raises(NeighborsUnusableError, match=r"neighbors of row [45] "):
            paired.draw(np.arange(10))
        with pytest.warns(UserWarning, match=r"left out: the neighbors of row [45] "):
            concat_archives(paths, path.with_name("joined"))
        assert open_archive(path.with_name("joined")).neighbors is None

    @staticmethod
    def refused(table: NeighborTable) -> None:
        with pytest.raises(NeighborsUnusableError, match="row 5"):
            table.of(5)
        with pytest.raises(NeighborsUnusableError, match="row 5"):
            table.draw(np.array([5]), np.random.default_rng(0))
        with pytest.raises(NeighborsUnusableError, match=r"row \d"):
            table.check()


class TestWeights:
    @staticmethod
    def table(*weights: float) -> NeighborTable:
        n = len(weights)
        return NeighborTable(
            np.array([0, n] + [n] * (n - 1), "u8"), np.arange(n, dtype="u4"), np.array(weights, "f4")
        )

    def test_in_proportion(self) -> None:
        table = self.table(0, 1, 3, 0)
        drawn = table.draw(np.array([0]), np.random.default_rng(0), NeighborSamplingStrategy.WEIGHTED, 4000)
        counts = np.bincount(drawn[0], minlength=4)
        assert counts[[0, 3]].tolist() == [0, 0]
        assert counts[2] / counts[1] == pytest.approx(3, rel=0.15)

    def test_without_any_weight(self) -> None:
        drawn = self.table(0, 0).draw(
            np.array([0, 1]), np.random.default_rng(0), NeighborSamplingStrategy.WEIGHTED, 50
        )
        assert set(drawn[0].tolist()) == {0, 1}
        assert set(drawn[1].tolist()) == {1}

    @pytest.mark.parametrize("bad", [-1.0, np.nan])
    def test_no_probabilities(self, bad: float) -> None:
        with pytest.raises(ValueError, match="row 0 has negative or missing neighbor weights"):
            self.table(1, bad).draw(
                np.array([0]), np.random.default_rng(0), NeighborSamplingStrategy.WEIGHTED
            )
