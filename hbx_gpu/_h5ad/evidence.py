"""What the values of a matrix look like: counts, their logarithms, something else; with the evidence."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

import numpy as np

from hbx_gpu._h5ad.matrix import CsrMatrix, DenseMatrix, Matrix

ValueKind = Literal["counts", "logarithms", "normalized", "scaled", "fractional counts", "fractions"]

# Sample sizes: a part from the beginning, whole rows, and windows spread over the rest.
_BEGINNING = 1 << 16
_WINDOWS, _WINDOW = 16, 1 << 12
# Sums of cells, and ratios to a cell's smallest value, that differ by less are taken as equal.
_ALIKE = 0.01
# Logarithms of counts stay below: exp(20) is half a billion.
_LARGEST_LOGARITHM = 20.0


@dataclass(frozen=True)
class Evidence:
    """Evidence from a sample of the values.

    Attributes
    ----------
    kind
        Kind that the values look like.
    text
        The reason, as a clause that can follow "because".
    """

    kind: ValueKind
    text: str

    @property
    def are_counts(self) -> bool:
        """Whether they look like counts."""
        return self.kind == "counts"

    def __str__(self) -> str:
        return f"{_WORDS[self.kind]} ({self.text})"


_WORDS: dict[ValueKind, str] = {
    "counts": "counts",
    "logarithms": "log-normalized values",
    "normalized": "normalized values",
    "scaled": "scaled values",
    "fractional counts": "counts with fractions, as SoupX, CellBender and proseg write them",
    "fractions": "values with fractions",
}


def look_at(matrix: Matrix) -> Evidence:
    """Determine what the values of a matrix look like, from a sample of them.

    Counts are whole and not negative. Of other values: negative ones are scaled; cells that sum to the same
    number are normalized; cells whose ``expm1`` sums to the same number, or whose values are logarithms of
    multiples of their smallest one, are logarithms of normalized counts (``normalize_total``, ``log1p``).

    Parameters
    ----------
    matrix
        CSR, CSC or dense, in memory or in a file. Rows are looked at only where they are stored together.
    """
    values = _sample(matrix)
    shown = f"{len(values):,} values looked at"
    if not np.isfinite(values).all():
        return Evidence("fractions", f"NaN or infinite values among the {shown}")
    if not len(values):
        return Evidence("counts", "nothing but zeros")
    low, high = float(values.min()), float(values.max())
    if low < 0:
        return Evidence("scaled", f"negative values, such as {low:.4g}, among the {shown}")
    broken = values[np.trunc(values) != values]
    if not len(broken):
        return Evidence("counts", f"whole numbers up to {high:.0f} in the {shown}")
    example = f"fractions such as {float(broken[0]):.4g}, at most {high:.4g}, in the {shown}"
    rows = [row for row in _rows(matrix) if len(row) > 1]
    if len(rows) > 1:
        if (total := _constant([float(row.sum()) for row in rows])) is not None:
            return Evidence("normalized", f"{example}; every cell sums to {total:,.6g}")
        if high < _LARGEST_LOGARITHM:
            if (total := _constant([float(np.expm1(row).sum()) for row in rows])) is not None:
                return Evidence("logarithms", f"{example}; expm1 of every cell sums to {total:,.6g}")
            if _multiples([np.expm1(row) for row in rows]):
                return Evidence(
                    "logarithms", f"{example}; expm1 of a cell's values are multiples of the smallest"
                )
        if _multiples(rows):
            return Evidence("normalized", f"{example}; a cell's values are multiples of the smallest")
    share = len(broken) / len(values)
    if high < _LARGEST_LOGARITHM and share > 0.5:
        return Evidence("fractions", example)
    return Evidence("fractional counts", f"{example}; cells sum to different numbers")


def _sample(matrix: Matrix) -> np.ndarray:
    """float64, (n,). Nonzero values from everywhere in the matrix."""
    stored = matrix.values
    if isinstance(matrix, DenseMatrix):
        width = max(1, matrix.shape[1])
        parts = [np.asarray(stored[a:b]).ravel() for a, b in _windows(matrix.shape[0], width)]
    else:
        parts = [np.asarray(stored[a:b]) for a, b in _windows(int(stored.shape[0]), 1)]
    whole = np.concatenate(parts) if parts else np.empty(0)
    if whole.dtype.kind not in "biuf":
        return np.array([np.nan])
    whole = whole.astype(np.float64)
    result: np.ndarray = whole[whole != 0]
    return result


def _windows(length: int, width: int) -> Iterator[tuple[int, int]]:
    beginning, window = max(1, _BEGINNING // width), max(1, _WINDOW // width)
    yield 0, min(beginning, length)
    if length > beginning:
        starts = np.unique(np.linspace(beginning, max(beginning, length - window), _WINDOWS).astype(np.int64))
        for start in starts.tolist():
            yield start, min(start + window, length)


def _rows(matrix: Matrix) -> Iterator[np.ndarray]:
    """Nonzero values of the first rows, float64, row by row; nothing where rows are not stored together."""
    if isinstance(matrix, CsrMatrix):
        n = int(np.searchsorted(matrix.indptr[:], _BEGINNING, side="right")) - 1
        ends = np.asarray(matrix.indptr[: n + 1]).astype(np.int64)
        values = np.asarray(matrix.values[: int(ends[-1])]) if len(ends) else np.empty(0)
        for a, b in itertools.pairwise(ends.tolist()):
            row = values[a:b].astype(np.float64)
            yield row[row != 0]
    elif isinstance(matrix, DenseMatrix):
        block = np.asarray(matrix.values[: max(2, _BEGINNING // max(1, matrix.shape[1]))])
        for line in block:
            row = line.astype(np.float64)
            yield row[row != 0]


def _constant(sums: list[float]) -> float | None:
    """The number that all sums are, up to rounding; None if they differ."""
    middle = float(np.median(sums))
    return middle if middle > 0 and all(abs(s - middle) <= _ALIKE * middle for s in sums) else None


def _multiples(rows: list[np.ndarray]) -> bool:
    """Whether the values of most rows are multiples of their smallest one, and not all alike."""
    varied = [row / row.min() for row in rows if row.max() > 1.5 * row.min()]
    if len(varied) < 2:
        return False
    good = sum(bool((np.abs(row - np.rint(row)) <= _ALIKE * np.rint(row)).all()) for row in varied)
    return good >= 0.9 * len(varied) and 2 * len(varied) >= len(rows)
