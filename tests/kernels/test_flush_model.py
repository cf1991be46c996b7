"""Every width of row takes the path of aligned rows: computed from the addresses that the kernel touches."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.kernels import flush_model

PAGE = Path(__file__).resolve().parents[2] / "docs" / "gpu.md"


@pytest.mark.parametrize("size", [2, 4])
@pytest.mark.parametrize("n", [500, 501, 502, 503, 1_001, 36_601])
def test_no_width_costs_more_than_an_aligned_one(n: int, size: int) -> None:
    aligned = flush_model.per_row(-(-n // 8) * 8, size, shifted=True)
    assert flush_model.per_row(n, size, shifted=True) <= aligned + 8  # and single elements at both ends


def test_without_the_shift_some_do() -> None:
    assert flush_model.per_row(36_601, 2, shifted=False) > 2 * flush_model.per_row(36_601, 2, shifted=True)
    assert flush_model.per_row(20_000, 2, shifted=False) == flush_model.per_row(20_000, 2, shifted=True)


def test_wavefronts_of_known_accesses() -> None:
    assert flush_model.phases(list(range(32)), 1) == 1
    assert flush_model.phases([0] * 32, 1) == 1  # a broadcast
    assert flush_model.phases([32 * lane for lane in range(32)], 1) == 32
    assert flush_model.phases([4 * lane for lane in range(32)], 4) == 4
    assert flush_model.phases([8 * lane for lane in range(32)], 4) == 8


def test_the_page_has_the_table() -> None:
    page = PAGE.read_text()
    for row in flush_model.table():
        assert "| " + " | ".join(row) + " |" in page, "run python -m tests.kernels.flush_model"
