"""Metadata columns of a batch as tensors."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

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


def metadata_tensors(metadata: Mapping[str, np.ndarray] | None) -> dict[str, object]:
    import torch

    check_columns(list(metadata or {}))
    return {
        name: torch.from_numpy(column) if column.dtype.kind in "iuf" else column
        for name, column in (metadata or {}).items()
    }
