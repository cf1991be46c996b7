"""Batches of paired rows handed out as cells and their controls."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any


def with_controls(batch: Any) -> dict[str, Any]:
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
    return {**_half(batch, 0), "control": _half(batch, 1)}


def _half(value: Any, which: int) -> Any:
    if isinstance(value, Mapping):
        return {name: _half(part, which) for name, part in value.items()}
    if not hasattr(value, "__getitem__") or isinstance(value, str):
        return value
    n = len(value) // 2
    rows = slice(which * n, (which + 1) * n)
    if str(getattr(value, "layout", "")) == "torch.sparse_csr":
        return _csr_rows(value, rows)
    return value[rows]


def _csr_rows(matrix: Any, rows: slice) -> Any:
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
