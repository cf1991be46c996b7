"""Splits of row numbers: shares, strata, whole groups."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hbx_gpu.sampler import split_rows

SHARES = {"train": 0.7, "val": 0.2, "test": 0.1}


@settings(max_examples=25, deadline=None)
@given(
    n=st.integers(0, 200),
    shares=st.lists(st.floats(0.05, 0.3), min_size=1, max_size=3),
    n_strata=st.integers(1, 6),
    seed=st.integers(0, 5),
)
def test_each_stratum_is_shared_to_within_one_row(
    n: int, shares: list[float], n_strata: int, seed: int
) -> None:
    strata = np.random.default_rng(seed).integers(-1, n_strata, n)
    fractions = {str(k): share for k, share in enumerate(shares)}
    found = split_rows(n, fractions, strata=strata, seed=seed)
    joined = np.concatenate(list(found.values()))
    assert len(np.unique(joined)) == len(joined)
    total = 0.0
    for name, share in fractions.items():
        rows = found[name]
        assert np.array_equal(rows, np.sort(rows))
        total += share
        for code in np.unique(strata):
            assert abs((strata[rows] == code).sum() - share * (strata == code).sum()) <= 2
    assert abs(len(joined) - total * n) <= 1


def test_the_same_seed_splits_alike() -> None:
    first, again, other = (split_rows(500, SHARES, seed=seed)["train"] for seed in (1, 1, 2))
    assert np.array_equal(first, again)
    assert not np.array_equal(first, other)
    assert len(first) == 350
    # At random: neither the first rows nor every k-th.
    assert 120 < (first < 250).sum() < 230


@settings(max_examples=25, deadline=None)
@given(n_groups=st.integers(3, 30), seed=st.integers(0, 50))
def test_no_group_is_in_two_splits_and_none_is_empty(n_groups: int, seed: int) -> None:
    rng = np.random.default_rng(seed)
    groups = np.append(np.arange(n_groups), rng.integers(-1, n_groups, 300))
    found = split_rows(len(groups), SHARES, groups=groups, seed=seed)
    held = {name: set(groups[rows].tolist()) for name, rows in found.items()}
    assert all(held.values())
    assert sum(map(len, held.values())) == n_groups
    assert sorted(np.concatenate(list(found.values())).tolist()) == np.flatnonzero(groups >= 0).tolist()


def test_groups_are_shared_by_size_and_by_stratum() -> None:
    """Forty donors, half of them ill: each split has its share of cells of both kinds."""
    rng = np.random.default_rng(0)
    groups = np.repeat(np.arange(40), rng.integers(20, 60, 40))
    ill = (groups % 2).astype(np.int64)
    found = split_rows(len(groups), SHARES, groups=groups, strata=ill)
    for name, share in SHARES.items():
        for code in (0, 1):
            got = (ill[found[name]] == code).sum() / (ill == code).sum()
            assert got == pytest.approx(share, abs=0.04)


def test_a_rest_is_in_no_split() -> None:
    groups = np.repeat(np.arange(20), 10)
    for found in (split_rows(200, {"a": 0.25}), split_rows(200, {"a": 0.25}, groups=groups)):
        assert len(found["a"]) == 50


@pytest.mark.parametrize(
    ("fractions", "arguments", "told"),
    [
        ({}, {}, "fractions must be positive"),
        ({"a": 0.7, "b": 0.4}, {}, "adds up to 1.1"),
        ({"a": 0.5, "b": 0.0}, {}, "fractions must be positive"),
        ({"a": 0.5}, {"strata": [1, 2]}, "strata must have 6 entries"),
        ({"a": 0.5, "b": 0.5}, {"groups": [0] * 6}, r"1 groups cannot be shared among 2 splits \(a, b\)"),
        ({"a": 0.5}, {"seed": -1}, "seed must be at least 0"),
    ],
)
def test_wrong_arguments(fractions: dict[str, float], arguments: dict[str, object], told: str) -> None:
    with pytest.raises(ValueError, match=told):
        split_rows(6, fractions, **arguments)  # type: ignore[arg-type]
