"""Any record of unshuffle_blocks: refused, or its block in order; under the sanitizer, nothing outside."""

from __future__ import annotations

import os
from typing import Any

import numpy as np
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from hbx_gpu._engine.device import status
from tests.kernels.unshuffle_reference import block, shuffled, unshuffle

EXAMPLES = int(os.environ.get("HBX_FUZZ_EXAMPLES", "60"))
ARENA = 3000
PLACES = st.one_of(st.integers(0, ARENA + 20), st.sampled_from([2**32, 2**63, 2**64 - 8, 2**64 - 1]))


@given(
    begin=PLACES,
    to=PLACES,
    nbytes=st.one_of(st.integers(0, 1400), st.sampled_from([ARENA, 2**31, 2**32 - 1])),
    typesize=st.one_of(st.integers(0, 20), st.sampled_from([255, 2**31, 2**32 - 1])),
    shuffle=st.integers(0, 4),
    slices=st.integers(1, 40),
    threads=st.sampled_from([32, 96, 256]),
    seed=st.integers(0, 9),
)
@settings(max_examples=EXAMPLES, deadline=None, suppress_health_check=list(HealthCheck))
def test_any_record(
    launcher: Any,
    begin: int,
    to: int,
    nbytes: int,
    typesize: int,
    shuffle: int,
    slices: int,
    threads: int,
    seed: int,
) -> None:
    arena = np.random.default_rng(seed).integers(0, 256, ARENA, dtype=np.uint8)
    expected = arena.copy()
    inside = begin + nbytes <= ARENA and to + nbytes <= ARENA
    apart = begin + nbytes <= to or to + nbytes <= begin
    sound = inside and apart and typesize >= 1 and shuffle <= 2
    if sound:
        data = np.random.default_rng(seed + 100).integers(0, 256, nbytes, dtype=np.uint8)
        arena[begin : begin + nbytes] = shuffled(data, typesize, shuffle)
        expected[begin : begin + nbytes] = arena[begin : begin + nbytes]
        expected[to : to + nbytes] = data
    record = block(begin, to, nbytes, typesize, shuffle)
    found, _ = unshuffle(launcher, arena, record, slices=slices, threads=threads)
    assert found.tolist() == [0 if sound else status.BAD_PLACE]
    assert np.array_equal(arena, expected)
