"""Batches of paired rows handed out as cells and their controls."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Protocol, runtime_checkable

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
    if not isinstance(batch, Mapping) or "cu_seqlens" in batch:
        raise TypeError(
            "a sampler with paired=True needs batches that are dicts of one row per cell: choose "
            'layout="dense", "csr" or padded tokens, not packed ones, and no collate_fn that makes something '
            "else"
        )
    return {**_halves(batch, 0), "control": _halves(batch, 1)}


def _halves(batch: Mapping[str, object], which: int) -> TensorBatch:
    return {name: _half(part, which) for name, part in batch.items()}


def _half(value: object, which: int) -> object:
    import torch

    if isinstance(value, Mapping):
        return _halves(value, which)
    if not isinstance(value, _Rows) or isinstance(value, str):
        return value
    n = len(value) // 2
    rows = slice(which * n, (which + 1) * n)
    if isinstance(value, torch.Tensor) and value.layout is torch.sparse_csr:
        return _csr_rows(value, rows)
    return value[rows]


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
