"""What the values of a matrix look like, and which matrix is taken where nobody names one."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import scipy.sparse as sp

from hbx_gpu._h5ad.choice import choose_matrix
from hbx_gpu._h5ad.evidence import look_at
from hbx_gpu._h5ad.matrix import CscMatrix, CsrMatrix, DenseMatrix, Matrix

RNG = np.random.default_rng(0)
COUNTS = RNG.poisson(1.5, (60, 200)).astype(np.float64)
NORMALIZED = COUNTS / COUNTS.sum(1, keepdims=True) * 10_000
CORRECTED = np.where(COUNTS > 0, COUNTS * 40 - RNG.random(COUNTS.shape), 0)


def opened(values: np.ndarray, layout: str) -> Matrix:
    if layout == "dense":
        return DenseMatrix("m", values.shape, values)
    rows = sp.csr_matrix(values) if layout == "csr" else sp.csc_matrix(values)
    kind = CsrMatrix if layout == "csr" else CscMatrix
    return kind("m", rows.shape, rows.indptr, rows.indices, rows.data)


@pytest.mark.parametrize("layout", ["csr", "dense"])
@pytest.mark.parametrize(
    ("values", "kind"),
    [
        (COUNTS, "counts"),
        (COUNTS.astype(np.int16), "counts"),
        (NORMALIZED, "normalized"),
        (np.log1p(NORMALIZED), "logarithms"),
        (np.log1p(NORMALIZED)[:, :50], "logarithms"),  # of a part of the genes: sums say nothing
        (NORMALIZED[:, :50], "normalized"),
        (COUNTS - COUNTS.mean(0), "scaled"),
        (CORRECTED, "fractional counts"),
        (np.zeros((3, 4)), "counts"),
        (np.where(COUNTS > 3, np.nan, COUNTS), "fractions"),
    ],
)
def test_kinds_of_values(values: np.ndarray, kind: str, layout: str) -> None:
    found = look_at(opened(values, layout))
    assert found.kind == kind, str(found)
    assert found.are_counts == (kind == "counts")


def test_the_evidence_is_named() -> None:
    assert "expm1 of every cell sums to 10,000" in str(look_at(opened(np.log1p(NORMALIZED), "csr")))
    assert "every cell sums to 10,000" in str(look_at(opened(NORMALIZED, "csr")))
    assert "negative values, such as" in str(look_at(opened(COUNTS - 1, "csc")))
    # Columns that are stored together: rows cannot be summed, but fractions are seen.
    assert not look_at(opened(np.log1p(NORMALIZED), "csc")).are_counts


def test_values_far_inside_a_large_matrix_are_looked_at(tmp_path: Path) -> None:
    del tmp_path
    values = np.ones((1 << 10, 1 << 10))
    values[600:] = 0.5
    assert not look_at(opened(values, "csr")).are_counts


@pytest.mark.parametrize(
    ("stored", "expected", "said"),
    [
        ({"X": COUNTS}, "X", "counts"),
        ({"X": COUNTS, "raw": COUNTS}, "X", "counts"),
        ({"X": NORMALIZED, "raw": COUNTS}, "raw", "X holds normalized values"),
        ({"X": NORMALIZED, "raw": NORMALIZED, "counts": COUNTS}, "counts", "raw holds normalized values"),
        ({"X": NORMALIZED, "spliced": COUNTS}, "X", "normalized values"),
        ({"raw": NORMALIZED}, "raw", "normalized values"),
        ({"other": COUNTS}, "other", "counts"),
    ],
)
def test_the_matrix_that_holds_counts_is_taken(
    stored: dict[str, np.ndarray], expected: str, said: str
) -> None:
    choice = choose_matrix(list(stored), lambda name: opened(stored[name], "csr"))
    assert choice.name == expected
    assert said in str(choice)
