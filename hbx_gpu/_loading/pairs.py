"""Batches of several rows for each cell, handed out as cells and their controls or neighbors."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Protocol, runtime_checkable

import numpy as np

from hbx_gpu._protocols import TensorBatch

if TYPE_CHECKING:
    from torch import Tensor


@runtime_checkable
class _Rows(Protocol):
    """A tensor, an array, a list or whatever else has rows."""

    def __len__(self) -> int: ...

    def __getitem__(self, rows: slice, /) -> object: ...


def with_controls(batch: object) -> TensorBatch:
    """A batch of 2 n rows as its first n, and the others below the key ``"control"``; no tensor is copied.

    Parameters
    ----------
    batch
        Tensors, arrays and lists of 2 n rows each by name, or mappings of such.

    Raises
    ------
    TypeError
        The batch is not a mapping, or its rows lie end to end.
    """
    return {
        **_rows_of(_by_row(batch, "a sampler with paired=True"), 0, 1, 2),
        "control": _rows_of(batch, 1, 2, 2),
    }


def with_neighbors(batch: object, k: int) -> TensorBatch:
    """A batch of n cells and n * k neighbors as the cells, and the others below the key ``"neighbors"``.

    Parameters
    ----------
    batch
        As for :func:`with_controls`, of n * (1 + k) rows; the neighbors of a cell lie side by side.
    k
        Neighbors of each cell.

    Returns
    -------
    dict
        Dense tensors and arrays of neighbors are (n, k, ...); CSR tensors and lists have n * k rows.

    Raises
    ------
    TypeError
        As for :func:`with_controls`.
    """
    cells = _rows_of(_by_row(batch, "a NeighborSampler"), 0, 1, 1 + k)
    return {**cells, "neighbors": _folded(_rows_of(batch, 1, 1 + k, 1 + k), k)}


def _by_row(batch: object, sampler: str) -> Mapping[str, object]:
    if isinstance(batch, Mapping) and "cu_seqlens" not in batch:
        return batch
    raise TypeError(
        f"{sampler} needs batches that are dicts of one row per cell: choose "
        'layout="dense", "csr" or padded tokens, not packed ones, and no collate_fn that makes something '
        "else"
    )


def _rows_of(batch: object, begin: int, end: int, of: int) -> TensorBatch:
    """Parts `begin` to `end` of the rows of all entries, which are `of` equal parts."""
    assert isinstance(batch, Mapping)
    return {name: _part(value, begin, end, of) for name, value in batch.items()}


def _part(value: object, begin: int, end: int, of: int) -> object:
    import torch

    if isinstance(value, Mapping):
        return _rows_of(value, begin, end, of)
    if not isinstance(value, _Rows) or isinstance(value, str):
        return value
    n = len(value) // of
    rows = slice(begin * n, end * n)
    if isinstance(value, torch.Tensor) and value.layout is torch.sparse_csr:
        return _csr_rows(value, rows)
    return value[rows]


def _folded(batch: Mapping[str, object], k: int) -> TensorBatch:
    import torch

    found: TensorBatch = {}
    for name, value in batch.items():
        if isinstance(value, Mapping):
            found[name] = _folded(value, k)
        elif isinstance(value, np.ndarray) or (
            isinstance(value, torch.Tensor) and value.layout is torch.strided
        ):
            found[name] = value.reshape((len(value) // k, k, *value.shape[1:]))
        else:
            found[name] = value
    return found


def _csr_rows(matrix: Tensor, rows: slice) -> Tensor:
    import torch

    pointers = matrix.crow_indices()[rows.start : rows.stop + 1]
    held = slice(int(pointers[0]), int(pointers[-1]))
    return torch.sparse_csr_tensor(
        pointers - pointers[0],
        matrix.col_indices()[held],
        matrix.values()[held],
        size=(rows.stop - rows.start, matrix.shape[1]),
        check_invariants=False,
    )
