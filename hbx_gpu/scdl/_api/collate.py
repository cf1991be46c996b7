"""Rows of a dataset as one torch CSR tensor, for `DataLoader(collate_fn=...)`."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    import torch


class Rows(list["torch.Tensor"]):
    """Row tensors of a dataset together with the width of their dense matrix.

    Attributes
    ----------
    n_features
        Number of genes; of the widest block, where the archive has several.
    """

    def __init__(self, rows: Sequence[torch.Tensor], n_features: int) -> None:
        super().__init__(rows)
        self.n_features = n_features


def collate_sparse_matrix_batch(
    batch: Sequence[torch.Tensor], *, n_features: int | None = None, dense: bool = False
) -> torch.Tensor:
    """Stack rows to a CSR tensor.

    Parameters
    ----------
    batch
        Row tensors of shape (2, k): values, then columns; or, for ``batch_size=None``, one such tensor.
    n_features
        Columns of the result; 0 for the largest column in this batch + 1, as the real package does. None:
        the genes of the dataset where a `DataLoader` reads rows through it, which makes all batches
        equally wide; without a dataset as for 0.
    dense
        Return a dense tensor instead.

    Returns
    -------
    torch.Tensor
        Sparse CSR, (B, n_features): int64 row pointers, int32 columns, values in the dtype of the rows;
        uint16 becomes int32 and uint32, uint64 become int64, because torch computes with those. Columns that
        repeat in a row stay apart; making it dense sums them.

    Raises
    ------
    ValueError
        A column beyond `n_features`, or a value beyond int64.
    """
    import torch

    rows = [batch] if isinstance(batch, torch.Tensor) else list(batch)
    lengths = [row.shape[1] for row in rows]
    offsets = np.zeros(len(rows) + 1, np.int64)
    np.cumsum(lengths, out=offsets[1:])
    both = [row.numpy() for row in rows]
    columns = np.concatenate([b[1] for b in both]) if both else np.empty(0)
    values = np.concatenate([b[0] for b in both]) if both else np.empty(0, np.float32)
    largest = int(columns.max()) + 1 if len(columns) else 0
    width = _width(batch, n_features, largest)
    with warnings.catch_warnings():
        # torch calls its own CSR support a prototype, once per process.
        warnings.filterwarnings("ignore", message="Sparse CSR tensor support")
        tensor = torch.sparse_csr_tensor(
            torch.from_numpy(offsets),
            torch.from_numpy(columns.astype(np.int32)),
            torch.from_numpy(computable(values)),
            size=(len(rows), width),
            # Columns that repeat or are unsorted break them, and are legal here.
            check_invariants=False,
        )
    return tensor.to_dense() if dense else tensor


def _width(batch: object, n_features: int | None, largest: int) -> int:
    if n_features is None:
        # Columns beyond the recorded genes exist: raw.X beside the genes of a smaller X.
        return max(batch.n_features if isinstance(batch, Rows) else 0, largest)
    if n_features == 0:
        return largest
    if largest > n_features:
        raise ValueError(
            f"expected columns below n_features={n_features}, found column {largest - 1}; pass the width of "
            "the dataset (number_of_variables), or 0 for that of the batch"
        )
    return n_features


def computable(values: np.ndarray) -> np.ndarray:
    """Values in a dtype that torch computes with: the same, or the next signed one.

    Raises
    ------
    ValueError
        uint64 values beyond int64.
    """
    if values.dtype == np.uint16:
        return values.astype(np.int32)
    if values.dtype == np.uint64 and len(values) and int(values.max()) > np.iinfo(np.int64).max:
        raise ValueError(
            f"value {values.max()} does not fit int64, the widest integer that torch computes with; cast the "
            "archive to float64 (cast_data_to_dtype) or collate the rows yourself"
        )
    return values.astype(np.int64) if values.dtype in (np.uint32, np.uint64) else values


def collate_neighbor_sparse_matrix_batch(
    batch: Sequence[Mapping[str, Any]], *, n_features: int | None = None
) -> dict[str, object]:
    """Stack cells and their neighbors.

    Parameters
    ----------
    batch
        What ``get_row_with_neighbor`` returned for each cell.
    n_features
        Columns of both tensors; None or 0 for the largest column of each + 1.

    Returns
    -------
    dict
        ``current_cells`` and ``next_cells`` (float32 sparse CSR), ``current_cell_indices`` and
        ``next_cell_indices`` (lists), ``batch_size``.
    """
    import torch

    def stacked(name: str) -> torch.Tensor:
        rows = [
            torch.from_numpy(np.stack([np.asarray(part).astype(np.float64) for part in item[name]]))
            for item in batch
        ]
        tensor = collate_sparse_matrix_batch(rows, n_features=n_features)
        return tensor.to(torch.float32)

    return {
        "current_cells": stacked("current_cell"),
        "next_cells": stacked("next_cell"),
        "current_cell_indices": [item["current_cell_index"] for item in batch],
        "next_cell_indices": [item["next_cell_index"] for item in batch],
        "batch_size": len(batch),
    }
