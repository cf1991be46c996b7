"""The planner against a row-at-a-time description of what it must say."""

from __future__ import annotations

import pickle
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from hbx_gpu._plan.rows import SourceTable, element_base, plan_rows
from hbx_gpu._plan.rows_numba import plan_rows_numba
from hbx_gpu._source import RowIndex


def make_table(chunk_sizes: np.ndarray, lengths: np.ndarray) -> SourceTable:
    """Sources with the given chunk sizes (n_sources, n_roles) and array lengths (n_sources,)."""
    n_chunks = -(-lengths[:, None] // chunk_sizes)
    n = len(lengths)
    return SourceTable(
        n_roles=chunk_sizes.shape[1],
        chunk_base=np.concatenate([[0], np.cumsum(n_chunks.ravel())]).astype(np.int64),
        chunk_elements=chunk_sizes.ravel().astype(np.int64),
        element_base=element_base(n_chunks.ravel(), chunk_sizes.ravel().tolist()),
        remap=np.zeros(n, np.int32),
        remap_start=np.arange(n),
        remap_length=np.ones(n, np.int64),
        n_features=1,
        drops=False,
        repeats=np.zeros(n, bool),
        identity=np.zeros(n, bool),
        in_parts=np.arange(chunk_sizes.size) % 3 > 0,
    )


@st.composite
def planned(draw: st.DrawFn) -> tuple[SourceTable, RowIndex, np.ndarray]:
    n_sources = draw(st.integers(1, 5))
    n_roles = draw(st.integers(1, 3))
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    chunk_sizes = rng.integers(1, 50, size=(n_sources, n_roles))
    lengths = rng.integers(1, 400, size=n_sources)
    n_rows = draw(st.integers(1, 60))
    source = rng.integers(-1, n_sources, size=n_rows).astype(np.int32)
    ends = np.sort(rng.integers(0, lengths[source][:, None] + 1, size=(n_rows, 2)), axis=1)
    rows = RowIndex(source, ends[:, 0].astype(np.int64), (ends[:, 1] - ends[:, 0]).astype(np.int32))
    selection = rng.integers(0, n_rows, size=draw(st.integers(0, 80)))
    return make_table(chunk_sizes, lengths), rows, selection


@given(planned())
def test_every_element_of_every_row_is_planned_once_and_in_place(
    case: tuple[SourceTable, RowIndex, np.ndarray],
) -> None:
    table, rows, selection = case
    plan = plan_rows(table, rows, selection)
    wanted = [rows.length[r] if rows.source[r] >= 0 else 0 for r in selection]
    assert plan.offsets.tolist() == np.concatenate([[0], np.cumsum(wanted)]).astype(int).tolist()
    assert (np.diff(plan.chunks) > 0).all()  # each chunk once, ascending

    # What the plan says: output element -> (array, element), per role.
    got: dict[tuple[int, int], tuple[int, int]] = {}
    for c, chunk in enumerate(plan.chunks):
        array = int(plan.chunk_array[c])
        assert table.chunk_base[array] <= chunk < table.chunk_base[array + 1]
        chunk_start = (chunk - table.chunk_base[array]) * table.chunk_elements[array]
        assert (np.diff(plan.piece_skip[plan.piece_ptr[c] : plan.piece_ptr[c + 1]]) >= 0).all()
        for p in range(plan.piece_ptr[c], plan.piece_ptr[c + 1]):
            assert 0 <= plan.piece_skip[p]
            assert plan.piece_count[p] >= 1
            assert plan.piece_skip[p] + plan.piece_count[p] <= table.chunk_elements[array]
            for k in range(plan.piece_count[p]):
                key = (array % table.n_roles, int(plan.piece_out[p]) + k)
                assert key not in got
                got[key] = (array, int(chunk_start + plan.piece_skip[p]) + k)
                assert plan.offsets[plan.piece_row[p]] <= key[1] < plan.offsets[plan.piece_row[p] + 1]
    expected = {
        (role, int(plan.offsets[i]) + k): (int(rows.source[r]) * table.n_roles + role, int(rows.start[r]) + k)
        for i, r in enumerate(selection)
        for k in range(wanted[i])
        for role in range(table.n_roles)
    }
    assert got == expected


@given(planned())
def test_one_pass_makes_the_plan_of_the_reference(case: tuple[SourceTable, RowIndex, np.ndarray]) -> None:
    want, found = plan_rows(*case), plan_rows_numba(*case)
    for name in type(want).__slots__:
        expected, got = getattr(want, name), getattr(found, name)
        if name == "share":
            assert got == pytest.approx(expected)
            continue
        assert got.dtype == expected.dtype, name
        assert np.array_equal(got, expected), name


def test_one_pass_sorts_many_rows_of_a_large_dataset() -> None:
    """Places of more than 32 bits in storage, overlapping rows, more than are sorted by insertion."""
    rng = np.random.default_rng(0)
    lengths = np.array([2**31, 5, 2**33])
    table = make_table(np.array([[40_960, 40_960], [2, 3], [40_960, 1_000]]), lengths)
    source = rng.integers(-1, 3, 5_000).astype(np.int32)
    length = rng.integers(0, 5, 5_000).astype(np.int32)
    start = (rng.random(5_000) * (lengths[source] - length)).astype(np.int64)
    rows = RowIndex(source, start, length)
    selection = rng.integers(0, 5_000, 9_000)
    want, found = plan_rows(table, rows, selection), plan_rows_numba(table, rows, selection)
    assert np.array_equal(want.piece_out, found.piece_out)
    assert np.array_equal(want.chunks, found.chunks)
    assert np.array_equal(want.piece_ptr, found.piece_ptr)


def test_the_share_of_chunks_that_is_looked_at() -> None:
    table = make_table(np.full((1, 3), 100), np.array([1_000]))
    rows = RowIndex(np.zeros(2, np.int32), np.array([0, 200]), np.array([10, 100], np.int32))
    # The first array decodes whole: of six chunks two are taken whole for it, of the others 10 % or all.
    assert table.in_parts.tolist() == [False, True, True]
    plan = plan_rows_numba(table, rows, np.array([0, 1]))
    assert plan.share == pytest.approx((1 + 1 + 0.1 + 1 + 0.1 + 1) / 6)
    assert plan_rows_numba(table, rows, np.empty(0, np.int64)).share == 1


def test_row_pointers_pass_two_to_the_31() -> None:
    lengths = np.array([3 * 2**31])
    table = make_table(np.array([[40960, 40960]]), lengths)
    start = np.array([2**31 - 10, 3 * 2**31 - 100_000], dtype=np.int64)
    rows = RowIndex(np.zeros(2, np.int32), start, np.array([20, 100_000], np.int32))
    plan = plan_rows_numba(table, rows, np.array([1, 0]))
    covered = plan.chunks % table.chunk_base[1]
    assert covered.max() == (3 * 2**31 - 1) // 40960
    assert plan.offsets.tolist() == [0, 100_000, 100_020]
    assert plan.piece_count.sum() == 2 * 100_020


def test_plan_is_picklable() -> None:
    table = make_table(np.array([[8, 8]]), np.array([100]))
    rows = RowIndex(np.zeros(3, np.int32), np.array([0, 10, 50]), np.array([10, 40, 3], np.int32))
    plan = plan_rows(table, rows, np.array([2, 0, 0]))
    again = pickle.loads(pickle.dumps(plan))
    assert all(np.array_equal(getattr(plan, name), getattr(again, name)) for name in type(plan).__slots__)


def test_roles_of_sources_without_column_indices_begin_with_the_first_layer() -> None:
    table = make_table(np.full((2, 2), 8), np.array([20, 20]))
    for first in (0, 1):
        source, role = replace(table, first_role=first).roles(np.array([0, 1, 2, 3]))
        assert source.tolist() == [0, 0, 1, 1]
        assert role.tolist() == [first, first + 1, first, first + 1]
