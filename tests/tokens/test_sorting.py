"""The smallest keys in order: few bits tell keys apart, or nearly all, or none."""

from __future__ import annotations

import numpy as np
import pytest

from hbx_gpu.tokens._host.sorting import HISTOGRAM, _by_half_words, smallest


def keys(kind: str, n: int) -> np.ndarray:
    rng = np.random.default_rng(n)
    drawn = rng.integers(0, 2**64, n, dtype=np.uint64)
    if kind == "random":
        return drawn
    if kind == "equal":
        return np.full(n, 7, np.uint64)
    if kind == "few":
        return drawn & np.uint64(3)
    if kind == "values":
        return ~(rng.integers(1, 30, n) / rng.lognormal(size=n)).view(np.uint64)
    # One far from the others, which agree in their leading bits: 16 of them, or 48 and more.
    near = np.arange(n, 0, -1, dtype=np.uint64) << np.uint64(20 if kind == "near" else 0)
    near[n // 2] = 2**63
    return near


@pytest.mark.parametrize("kind", ["random", "equal", "few", "values", "near", "nearer"])
def test_the_smallest_are_those_of_a_stable_sort(kind: str) -> None:
    for n in (1, 40, 500, 3000):
        key = keys(kind, n)
        order = np.argsort(key, kind="stable")
        for keep in {1, n // 10, n // 2 + 1, n}:
            some = np.empty(n, np.uint64), np.empty(n, np.uint64)
            item, histogram = np.empty(n, np.uint32), np.empty(HISTOGRAM, np.uint32)
            smallest(key, n, keep, *some, histogram, item)
            assert item[:keep].tolist() == order[:keep].tolist(), (n, keep)


@pytest.mark.parametrize(("kind", "enough"), [("random", True), ("equal", True), ("near", False)])
def test_keys_that_agree_in_sixteen_bits_take_more(kind: str, enough: bool) -> None:
    n = 3000
    some = np.empty(n, np.uint32), np.empty(n, np.uint32)
    item, histogram = np.empty(n, np.uint32), np.empty(HISTOGRAM, np.uint32)
    assert _by_half_words(keys(kind, n), n, n, *some, histogram, item) == enough
