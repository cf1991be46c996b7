"""LZF: what h5py wrote comes back; no damaged stream reads or writes outside its buffers."""

from __future__ import annotations

import contextlib

import h5py
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hbx_gpu._codecs.lzf import decode_lzf
from hbx_gpu.errors import CorruptChunkError


def streams(values: np.ndarray) -> bytes:
    """The stored chunk of `values`, as h5py compresses it."""
    with h5py.File("lzf", "w", driver="core", backing_store=False) as file:
        stored = file.create_dataset("a", data=values, chunks=values.shape, compression="lzf")
        mask, raw = stored.id.read_direct_chunk((0,))
    return b"" if mask else bytes(raw)


@settings(max_examples=50, deadline=None)
@given(st.integers(0, 2**32 - 1), st.integers(1, 20_000), st.integers(2, 200))
def test_round_trip(seed: int, n: int, distinct: int) -> None:
    values = np.random.default_rng(seed).integers(0, distinct, n).astype(np.uint8) // 3
    if raw := streams(values):
        np.testing.assert_array_equal(decode_lzf(raw, n), values)


@settings(max_examples=200, deadline=None)
@given(st.binary(min_size=1, max_size=400), st.integers(0, 2_000))
def test_any_bytes_end_in_an_error_or_in_a_chunk(raw: bytes, n: int) -> None:
    with contextlib.suppress(CorruptChunkError):
        assert len(decode_lzf(raw, n)) == n


def test_a_stream_cut_short_is_refused() -> None:
    raw = streams(np.repeat(np.arange(200, dtype=np.uint8), 50))
    for end in range(len(raw)):
        with pytest.raises(CorruptChunkError):
            decode_lzf(raw[:end], 10_000)
