"""Metadata columns of a batch as tensors."""

from __future__ import annotations

from collections.abc import Container, Mapping, Sequence

import numpy as np


def check_columns(names: Sequence[str]) -> None:
    """Refuse metadata columns that a batch has another meaning for.

    Raises
    ------
    ValueError
        One is called ``X``, or two have the same name.
    """
    for name in names:
        if name == "X" or names.count(name) > 1:
            raise ValueError(
                f"the metadata column {name!r} would overwrite the batch's own entry of that name; "
                "leave it out of metadata_columns, or write a collate of your own"
            )


def gathered(
    columns: Mapping[str, np.ndarray], codes: Container[str], rows: np.ndarray
) -> dict[str, np.ndarray]:
    """Metadata of some rows, as batches carry it.

    Codes of a vocabulary, the columns named in `codes`, are kept in the smallest type that holds them;
    batches have int64, which losses and embeddings need.
    """
    return {
        name: column[rows].astype(np.int64, copy=False) if name in codes else column[rows]
        for name, column in columns.items()
    }


def metadata_tensors(metadata: Mapping[str, np.ndarray] | None) -> dict[str, object]:
    import torch

    check_columns(list(metadata or {}))
    return {
        name: torch.from_numpy(column) if column.dtype.kind in "iuf" else column
        for name, column in (metadata or {}).items()
    }
