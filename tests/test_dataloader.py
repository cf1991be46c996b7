"""CellDataset, its batches, and how it crosses to another process; no atlas involved."""

from __future__ import annotations

import pickle
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch

from hbx_gpu._source import RowIndex, Source
from hbx_gpu.batch import DenseBatch, SparseBatch
from hbx_gpu.dataloader import (
    CellDataset,
    MultimodalCellDataset,
    dense_to_tensor_collate,
    multimodal_to_dense_collate,
    sparse_to_csr_collate,
    sparse_to_dense_collate,
)
from hbx_gpu.errors import CorruptDataError
from hbx_gpu.testing import (
    N_FEATURES,
    StoredGroup,
    example_dataset,
    example_groups,
    expected_dense,
    write_sources,
)


@pytest.fixture(scope="module")
def groups() -> list[StoredGroup]:
    return example_groups()


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory, groups: list[StoredGroup]) -> CellDataset:
    return example_dataset(tmp_path_factory.mktemp("arrays"), groups)


def dense(batch: SparseBatch) -> np.ndarray:
    result: np.ndarray = sparse_to_dense_collate(batch)["X"].numpy()
    return result


def test_shape_and_names(dataset: CellDataset) -> None:
    assert (len(dataset), dataset.n_cells, dataset.n_features) == (120, 120, N_FEATURES)
    assert dataset.feature_uids[3] == "f3"
    assert dataset.groups_np.dtype == np.int32
    assert np.bincount(dataset.groups_np).tolist() == [60, 60]
    assert dataset.dtype == np.uint32
    assert "120 cells" in repr(dataset)


def test_rows_come_in_the_order_asked(dataset: CellDataset, groups: list[StoredGroup]) -> None:
    expected = expected_dense(groups, N_FEATURES)
    rows = [5, -1, 119, 5, 60, 0, -120]
    batch = dataset[rows]
    assert np.array_equal(dense(batch), expected[rows])
    assert batch.metadata is not None
    assert batch.metadata["type"].tolist() == [(r % 120) % 3 - 1 for r in rows]
    assert batch.metadata["score"].tolist() == np.linspace(0, 1, 120)[rows].tolist()
    for rows_like in (np.array(rows), np.array(rows, np.int32), tuple(rows)):
        assert np.array_equal(dataset.__getitems__(rows_like).indices, batch.indices)


def test_other_ways_to_index(dataset: CellDataset, groups: list[StoredGroup]) -> None:
    expected = expected_dense(groups, N_FEATURES)
    assert np.array_equal(dense(dataset[3]), expected[3:4])
    assert np.array_equal(dense(dataset[np.int64(-2)]), expected[[-2]])
    assert np.array_equal(dense(dataset[10:20:3]), expected[10:20:3])
    mask = np.arange(120) % 7 == 0
    assert np.array_equal(dense(dataset[mask]), expected[mask])
    empty = dataset[[]]
    assert (len(empty), dense(empty).shape) == (0, (0, N_FEATURES))


@pytest.mark.parametrize("rows", [[120], [-121], [0, 500], [[1, 2]], [1.5], np.ones(7, bool)])
def test_rows_that_do_not_exist(dataset: CellDataset, rows: object) -> None:
    with pytest.raises(IndexError):
        dataset[rows]  # type: ignore[index]


def test_windows_share_a_plan_but_not_their_content(dataset: CellDataset, groups: list[StoredGroup]) -> None:
    expected = expected_dense(groups, N_FEATURES)
    rng = np.random.default_rng(0)
    selections = [rng.integers(0, 120, size=n) for n in (7, 0, 33, 1)]
    for rows, batch in zip(selections, dataset.read_batches(selections), strict=True):
        assert batch.offsets[0] == 0
        assert np.array_equal(dense(batch), expected[rows])
        assert batch.metadata is not None
        assert batch.metadata["score"].tolist() == np.linspace(0, 1, 120)[rows].tolist()


def test_mixed_dtypes_make_one_dtype_for_the_dataset(tmp_path: Path) -> None:
    groups = example_groups(5)
    groups[1].matrix = groups[1].matrix.astype(np.float32)
    dataset = example_dataset(tmp_path, groups)
    assert dataset.dtype == np.float64
    assert dataset[[0]].values.dtype == dataset[[9]].values.dtype == np.float64


def test_pointer_beyond_the_array(tmp_path: Path) -> None:
    sources, rows = write_sources(tmp_path, example_groups(4))
    start = rows.start.copy()
    start[2] = 10**9
    with pytest.raises(CorruptDataError, match=r"row 2 .*'g0'"):
        CellDataset(
            sources,
            RowIndex(rows.source, start, rows.length),
            layer="counts",
            n_features=N_FEATURES,
            feature_uids=np.empty(N_FEATURES, object),
        )


def test_layer_shorter_than_its_index(tmp_path: Path) -> None:
    groups = example_groups(4)
    sources, rows = write_sources(tmp_path, groups)
    other = write_sources(tmp_path / "other", example_groups(5))[0]
    broken = Source("g0", sources[0].index, other[0].layers, sources[0].remap)
    with pytest.raises(CorruptDataError, match="must be parallel"):
        CellDataset(
            [broken, sources[1]],
            rows,
            layer="counts",
            n_features=N_FEATURES,
            feature_uids=np.empty(N_FEATURES, object),
        )


# -- pickling --------------------------------------------------------------------------------------


@dataclass
class FakeRecipe:
    """Rebuilds from the folder of arrays, as an atlas query would from its snapshot."""

    root: str

    def rebuild(self) -> CellDataset:
        groups = example_groups()
        return example_dataset(Path(self.root) / "again", groups, recipe=self)


def test_pickle_without_recipe_carries_everything(dataset: CellDataset) -> None:
    again = pickle.loads(pickle.dumps(dataset))
    assert np.array_equal(dense(again[[3, 70]]), dense(dataset[[3, 70]]))
    assert again.categories["type"].tolist() == ["b", "t"]


def test_pickle_is_a_path(tmp_path: Path, groups: list[StoredGroup]) -> None:
    dataset = example_dataset(tmp_path, groups, recipe=FakeRecipe(str(tmp_path)))
    expected = dense(dataset[[3, 70]])  # pickled after first use
    data = pickle.dumps(dataset)
    assert len(data) < 4096
    assert pickle.dumps(dataset) == data  # spilled once
    again = pickle.loads(data)
    assert np.array_equal(dense(again[[3, 70]]), expected)
    assert np.array_equal(again.columns["day"], dataset.columns["day"])
    assert len(pickle.dumps(again)) < 4096  # and on to the next process

    spill = Path(dataset._spill.folder or "")
    assert spill.is_dir()
    del dataset
    assert not spill.exists()  # gone with the dataset that wrote it
    late = pickle.loads(data)  # so this one runs its recipe
    assert np.array_equal(dense(late[[3, 70]]), expected)


def test_worker_imports_are_light(tmp_path: Path, groups: list[StoredGroup]) -> None:
    """Unpickling and reading a batch imports no catalog, no dataframe and no framework."""
    dataset = example_dataset(tmp_path, groups, recipe=FakeRecipe(str(tmp_path)))
    (tmp_path / "dataset.pickle").write_bytes(pickle.dumps(dataset))
    code = (
        "import pickle, sys\n"
        f"dataset = pickle.load(open({str(tmp_path / 'dataset.pickle')!r}, 'rb'))\n"
        "batch = dataset[[3, 70]]\n"
        "heavy = {'pandas', 'lancedb', 'torch', 'anndata', 'zarr', 'pyarrow', 'h5py'}\n"
        "heavy &= set(sys.modules)\n"
        "print(len(batch), sorted(heavy))\n"
    )
    # FakeRecipe lives in this module; workers of a real atlas find theirs in hbx_gpu.
    root = Path(__file__).resolve().parents[1]
    stub = (
        f"import sys, types\nmodule = types.ModuleType({__name__!r})\n"
        f"class FakeRecipe: pass\nmodule.FakeRecipe = FakeRecipe\nsys.modules[{__name__!r}] = module\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", stub + code], capture_output=True, text=True, cwd=root, timeout=120
    )
    assert done.stdout.strip() == "2 []", done.stderr


# -- collates --------------------------------------------------------------------------------------


def test_dense_collate(dataset: CellDataset, groups: list[StoredGroup]) -> None:
    out = sparse_to_dense_collate(dataset[[1, 100]])
    assert out["X"].dtype == torch.float32
    assert out["X"].shape == (2, N_FEATURES)
    assert np.array_equal(out["X"].numpy(), expected_dense(groups, N_FEATURES)[[1, 100]])
    assert out["type"].dtype == torch.int64
    assert out["score"].dtype == torch.float64
    assert isinstance(out["day"], np.ndarray)  # no tensor type holds dates


def test_csr_collate_is_canonical(dataset: CellDataset) -> None:
    batch = SparseBatch(
        indices=np.array([4, 1, 4, 0], np.int32),
        values=np.array([1, 2, 3, 5], np.uint32),
        offsets=np.array([0, 3, 3, 4], np.int64),
        n_features=6,
        metadata={"a": np.array([1, 2, 3])},
    )
    x = sparse_to_csr_collate(batch)["X"]
    assert x.layout is torch.sparse_csr
    assert x.crow_indices().tolist() == [0, 2, 2, 3]
    assert x.col_indices().tolist() == [1, 4, 0]
    assert x.values().tolist() == [2, 4, 5]
    assert batch.indices.tolist() == [4, 1, 4, 0]  # the batch itself is untouched
    torch.sparse_csr_tensor(
        x.crow_indices(), x.col_indices(), x.values(), size=x.shape, check_invariants=True
    )
    whole = dataset[np.arange(120)]
    assert torch.equal(sparse_to_csr_collate(whole)["X"].to_dense(), sparse_to_dense_collate(whole)["X"])


def test_dense_to_tensor_collate() -> None:
    batch = DenseBatch(np.ones((2, 3), np.uint8), 3, metadata={"a": np.array([1.0, 2.0])})
    out = dense_to_tensor_collate(batch)
    assert out["X"].dtype == torch.uint8
    assert out["a"].tolist() == [1.0, 2.0]


@pytest.mark.parametrize("collate", [sparse_to_dense_collate, sparse_to_csr_collate])
def test_a_column_called_x_is_refused(dataset: CellDataset, collate: object) -> None:
    batch = dataset[[0]]
    batch.metadata = {"X": np.zeros(1)}
    with pytest.raises(ValueError, match="would overwrite"):
        collate(batch)  # type: ignore[operator]


# -- several modalities ----------------------------------------------------------------------------


def test_multimodal_rows_keep_their_place(tmp_path: Path, groups: list[StoredGroup]) -> None:
    rna = example_dataset(tmp_path / "rna", groups)
    sources, rows = write_sources(tmp_path / "atac", groups[:1])
    # The second modality exists for every other cell only.
    source = np.where(np.arange(120) % 2 == 0, 0, -1).astype(np.int32)
    pick = np.arange(120) // 2
    part = CellDataset(
        sources,
        RowIndex(source, rows.start[pick], rows.length[pick]),
        layer="counts",
        n_features=N_FEATURES,
        feature_uids=np.empty(N_FEATURES, object),
    )
    both = MultimodalCellDataset({"rna": rna, "atac": part})
    assert both.n_cells == len(both) == 120
    assert both.n_features == {"rna": N_FEATURES, "atac": N_FEATURES}
    asked = [7, 2, -2, 2]
    out = multimodal_to_dense_collate(both[asked])
    assert out["present"]["atac"].tolist() == [False, True, True, True]
    assert out["present"]["rna"].all()
    assert np.array_equal(out["rna"]["X"].numpy(), expected_dense(groups, N_FEATURES)[asked])
    atac = expected_dense(groups[:1], N_FEATURES)
    assert np.array_equal(out["atac"]["X"].numpy()[1:], atac[[1, 59, 1]])
    assert not out["atac"]["X"][0].any()
    assert out["metadata"]["type"].tolist() == [0, 1, 0, 1]
    swapped = MultimodalCellDataset({"atac": part, "rna": rna})
    assert np.bincount(swapped.groups_np).tolist() == [60, 60]
    with pytest.raises(ValueError, match="same rows"):
        MultimodalCellDataset({"rna": rna, "atac": example_dataset(tmp_path / "x", example_groups(4))})
