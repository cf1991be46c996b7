"""plan_rows takes any row number and any index: it writes where it may, and reports what it refuses."""

from __future__ import annotations

from typing import Any

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.kernels.test_plan import case, expected_pieces, run

numbers = st.one_of(st.integers(-2, 12), st.sampled_from([-(2**63), 2**31, 2**32, 2**63 - 1]))
sizes = st.lists(st.sampled_from([1, 7, 64, 128, 256]), min_size=2, max_size=3)


@settings(deadline=None, max_examples=40)
@given(
    seed=st.integers(0, 1000),
    of_source=sizes,
    selection=st.lists(numbers, min_size=1, max_size=8),
    slots=st.integers(1, 6),
    wrong=st.sampled_from(["", "source", "start", "length"]),
    value=st.sampled_from([-(2**31), -1, 5, 2**31 - 1]),
)
def test_any_rows(
    launcher: Any, seed: int, of_source: list[int], selection: list[int], slots: int, wrong: str, value: int
) -> None:
    rng = np.random.default_rng(seed)
    made = case(rng, [of_source, of_source[::-1]], n=10, longest=200)
    broken = 4
    if wrong:
        getattr(made.rows, wrong)[broken] = value
    rows = np.array(selection, np.int64)
    found = run(launcher, made, rows, slots=slots)
    there = (rows >= 0) & (rows < 10) & ((rows != broken) | (wrong == ""))
    pieces = found["pieces"].reshape(len(rows), made.table.n_roles, slots)
    refused = not ((rows >= 0) & (rows < 10)).all()
    for row in np.flatnonzero(there):
        whole = expected_pieces(made, rows[[row]])
        for role in range(made.table.n_roles):
            wanted = [piece[:3] for piece in whole.get((0, role), [])]
            taken = pieces[row, role]
            refused |= len(wanted) > slots
            assert [tuple(map(int, (p["run"], p["skip"], p["count"]))) for p in taken if p["count"]] == (
                wanted[:slots]
            )
    assert not refused or found["any"][0]
    if not (rows == broken).any() or not wrong:
        assert refused == bool(found["any"][0])
