"""Rows to CSR tensors."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

torch = pytest.importorskip("torch")

from torch.utils.data import DataLoader, Dataset  # noqa: E402

from hbx_gpu.scdl import (  # noqa: E402
    SingleCellMemMapDataset,
    collate_neighbor_sparse_matrix_batch,
    collate_sparse_matrix_batch,
)
from tests.scdl.conftest import Case  # noqa: E402


def rows(*dense: Any, dtype: str = "f4") -> list[Any]:
    made = []
    for row in np.array(dense):
        columns = np.flatnonzero(row)
        made.append(torch.from_numpy(np.stack([row[columns], columns]).astype(dtype)))
    return made


def test_values_and_layout() -> None:
    dense = [[0, 2, 0, 1], [0, 0, 0, 0], [5, 0, 0, 0]]
    batch = collate_sparse_matrix_batch(rows(*dense))
    assert batch.layout is torch.sparse_csr
    assert (batch.crow_indices().dtype, batch.col_indices().dtype, batch.dtype) == (
        torch.int64, torch.int32, torch.float32,
    )  # fmt: skip
    assert batch.crow_indices().tolist() == [0, 2, 2, 3]
    assert batch.to_dense().tolist() == dense
    assert collate_sparse_matrix_batch(rows(*dense), dense=True).tolist() == dense


def test_empty_rows() -> None:
    assert collate_sparse_matrix_batch(rows([0, 0], [0, 0])).shape == (2, 0)
    assert (
        collate_sparse_matrix_batch(rows([0, 0], [0, 0]), n_features=7).to_dense().tolist() == [[0] * 7] * 2
    )
    assert collate_sparse_matrix_batch(rows([0, 3])).shape == (1, 2)
    assert collate_sparse_matrix_batch(rows([0, 3])[0]).to_dense().tolist() == [[0, 3]]


def test_width() -> None:
    batch = rows([0, 2, 0], [1, 0, 0])
    assert collate_sparse_matrix_batch(batch).shape == (2, 2)
    assert collate_sparse_matrix_batch(batch, n_features=0).shape == (2, 2)
    assert collate_sparse_matrix_batch(batch, n_features=9).shape == (2, 9)
    with pytest.raises(ValueError, match="below n_features=1, found column 1"):
        collate_sparse_matrix_batch(batch, n_features=1)


@pytest.mark.parametrize(
    ("dtype", "expected"),
    [("u1", "uint8"), ("u2", "int32"), ("u4", "int64"), ("u8", "int64"), ("f2", "float16"), ("f4", "float32"),
     ("f8", "float64"), ("i8", "int64")],
)  # fmt: skip
def test_every_dtype_becomes_dense(dtype: str, expected: str) -> None:
    batch = collate_sparse_matrix_batch(rows([0, 2], [3, 0], dtype=dtype))
    assert str(batch.dtype) == f"torch.{expected}"
    assert batch.to_dense().tolist() == [[0, 2], [3, 0]]


def test_values_that_torch_has_no_integer_for() -> None:
    with pytest.raises(ValueError, match="does not fit int64"):
        collate_sparse_matrix_batch([torch.from_numpy(np.array([[2**63], [0]], np.uint64))])


def test_repeated_columns_are_summed_when_dense() -> None:
    batch = collate_sparse_matrix_batch([torch.tensor([[3.0, 15, 4, 3], [1, 0, 0, 1]])])
    assert batch.values().tolist() == [3, 15, 4, 3]
    assert batch.to_dense().tolist() == [[19, 6]]


@pytest.mark.parametrize(
    ("name", "workers"),
    [
        *((name, 0) for name in ("uint16_counts", "all_dtypes_uint32", "raw_default", "unsorted_columns")),
        ("uint16_counts", 2),
    ],
)
def test_loader_batches_are_as_wide_as_the_genes(
    scdl_cases: dict[str, Case], name: str, workers: int
) -> None:
    case = scdl_cases[name]
    dataset = SingleCellMemMapDataset(case.archive)
    loader: Any = DataLoader(
        dataset,  # type: ignore[arg-type]
        batch_size=4,
        collate_fn=collate_sparse_matrix_batch,
        num_workers=workers,
        multiprocessing_context="spawn" if workers else None,
    )
    dense = np.concatenate([batch.to_dense().numpy() for batch in loader])
    np.testing.assert_array_equal(dense, case.expected["dense"])


def test_loader_without_collate(scdl_cases: dict[str, Case]) -> None:
    case = scdl_cases["single_f32"]
    loader: Any = DataLoader(SingleCellMemMapDataset(case.archive), batch_size=1)  # type: ignore[arg-type]
    for row, item in enumerate(loader):
        start, stop = (int(e) for e in case.expected["row_ptr"][row : row + 2])
        assert item.shape == (1, 2, stop - start)
        np.testing.assert_array_equal(item[0, 0], case.expected["values"][start:stop])


def test_rows_of_several_blocks_are_pointed_out(scdl_cases: dict[str, Case]) -> None:
    dataset = SingleCellMemMapDataset(scdl_cases["ragged_two"].archive)
    with pytest.warns(UserWarning, match="different genes share a batch"):
        items = dataset[[0, 42]]
    assert collate_sparse_matrix_batch(items).shape == (2, 90)


class Pairs(Dataset):  # type: ignore[type-arg]
    def __init__(self, dataset: SingleCellMemMapDataset) -> None:
        self.dataset = dataset

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, index: int) -> dict[str, object]:
        return self.dataset.get_row_with_neighbor(index)


def test_neighbor_batches(scdl_cases: dict[str, Case]) -> None:
    case = scdl_cases["neighbors"]
    dataset = SingleCellMemMapDataset(case.archive, load_neighbors=True)
    dense = case.expected["dense"]
    seen = 0
    for batch in DataLoader(Pairs(dataset), batch_size=5, collate_fn=collate_neighbor_sparse_matrix_batch):
        for key in ("current", "next"):
            tensor = batch[f"{key}_cells"]
            assert tensor.dtype is torch.float32
            wanted = dense[[int(i) for i in batch[f"{key}_cell_indices"]]]
            np.testing.assert_array_equal(tensor.to_dense(), wanted[:, : tensor.shape[1]])
            assert not wanted[:, tensor.shape[1] :].any()
        seen += batch["batch_size"]
    assert seen == 24


def test_neighbor_batches_of_empty_cells() -> None:
    item = {"current_cell": (np.empty(0), np.empty(0)), "next_cell": (np.array([7]), np.array([2])),
            "current_cell_index": 0, "next_cell_index": 1}  # fmt: skip
    batch: Any = collate_neighbor_sparse_matrix_batch([item, item])
    assert (batch["current_cells"].shape, batch["next_cells"].shape) == ((2, 0), (2, 3))
    one: Any = collate_neighbor_sparse_matrix_batch([item], n_features=9)
    assert one["current_cells"].shape == (1, 9)
