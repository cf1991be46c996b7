"""Label codes of cells: checked, combined, and found again by label and number without a sorted copy."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypeAlias

import numpy as np
from numpy.typing import ArrayLike

from hbx_gpu.sampler._runs import as_array, integers

Codes: TypeAlias = ArrayLike | Sequence[ArrayLike]


def checked_codes(name: str, labels: ArrayLike) -> np.ndarray:
    codes = integers(name, labels)
    if codes.min(initial=0) < -1:
        raise ValueError(f"{name} must be codes, -1 (missing) or above; found {codes.min()}")
    return codes


def combined_codes(name: str, labels: Codes) -> np.ndarray:
    """One code per combination, -1 where any part is missing."""
    if isinstance(labels, list | tuple) and any(np.ndim(part) == 1 for part in labels):
        columns = [checked_codes(f"{name}[{i}]", part) for i, part in enumerate(labels)]
    else:
        table = as_array(name, labels)
        columns = (
            [checked_codes(name, c) for c in table.T] if table.ndim == 2 else [checked_codes(name, table)]
        )
    if not columns or len({len(column) for column in columns}) != 1:
        raise ValueError(f"{name} must hold one or more code arrays of equal length")
    combined = columns[0].astype(np.int64)
    for column in columns[1:]:
        missing = (combined < 0) | (column < 0)
        # Renumbered at each step, so that the product stays far from overflow.
        _, combined = np.unique(combined * (int(column.max(initial=0)) + 1) + column, return_inverse=True)
        combined[missing] = -1
    return combined
