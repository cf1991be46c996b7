"""Batches of a few rows, as hypothesis draws them."""

from __future__ import annotations

import numpy as np
from hypothesis import strategies as st

from hbx_gpu import SparseBatch
from tests.tokens.recipes import N


@st.composite
def batches(draw: st.DrawFn) -> SparseBatch:
    """Rows in any order, with zeros, repeats, ties and huge counts."""
    counts = st.one_of(
        st.integers(0, 4), st.integers(0, 200), st.integers(4090, 4100), st.integers(2**24 - 2, 2**24 + 2),
        st.just(2**40),
    )  # fmt: skip
    entry = st.tuples(st.integers(0, N - 1), counts)
    rows = draw(st.lists(st.lists(entry, max_size=90), min_size=1, max_size=4))
    offsets = np.cumsum([0, *map(len, rows)])
    columns = np.array([c for row in rows for c, _ in row], np.int32)
    dtype = draw(st.sampled_from([np.float64, np.int64]))
    values = np.array([v for row in rows for _, v in row], dtype)
    numbers = draw(st.lists(st.integers(0, 2**40 - 1), min_size=len(rows), max_size=len(rows)))
    return SparseBatch(columns, values, offsets, N, {"index": np.array(numbers, np.int64)})
