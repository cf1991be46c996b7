"""Blocks of blosc chunks: any run of them equals the same stretch of the whole chunk."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numcodecs import Blosc

from hbx_gpu._codecs.blosc_blocks import BloscBlocks
from hbx_gpu.errors import CorruptChunkError


def chunk(values: np.ndarray, cname: str, shuffle: int, blocksize: int) -> np.ndarray:
    codec = Blosc(cname=cname, clevel=5, shuffle=shuffle, blocksize=blocksize)
    return np.frombuffer(codec.encode(values), np.uint8)


@settings(max_examples=60, deadline=None)
@given(
    data=st.data(),
    cname=st.sampled_from(["lz4", "zstd", "blosclz", "zlib"]),
    shuffle=st.sampled_from([0, 1, 2]),
    dtype=st.sampled_from(["u1", "<u2", "<i4", "<f8"]),
    n=st.integers(1, 50_000),
    blocksize=st.sampled_from([0, 1_024, 4_096, 65_536]),
    distinct=st.sampled_from([1, 5, 2**60]),
)
def test_every_run_of_blocks(
    data: st.DataObject, cname: str, shuffle: int, dtype: str, n: int, blocksize: int, distinct: int
) -> None:
    values = np.random.default_rng(n).integers(0, distinct, n).astype(dtype)
    blocks = BloscBlocks(chunk(values, cname, shuffle, blocksize), values.nbytes)
    first = data.draw(st.integers(0, blocks.n_blocks - 1))
    last = data.draw(st.integers(first + 1, blocks.n_blocks))
    out = np.zeros(values.nbytes, np.uint8)
    blocks.decode(first, last, out)
    part = slice(first * blocks.block, last * blocks.block)
    np.testing.assert_array_equal(out[part], values.view(np.uint8)[part])


def test_blocks_out_of_order_are_found() -> None:
    """Writers with several threads store blocks in the order in which they finish."""
    values = np.arange(40_000, dtype=np.int32)
    raw = chunk(values, "lz4", 1, 16_384)
    blocks = BloscBlocks(raw, values.nbytes)
    starts = raw[16 : 16 + 4 * blocks.n_blocks].view("<i4")
    borders = np.append(np.sort(starts), len(raw))
    pieces = [raw[s : borders[np.searchsorted(borders, s, "right")]] for s in starts]
    swapped = [1, 0, *range(2, len(pieces))]
    table, at = np.zeros(len(pieces), "<i4"), 16 + 4 * len(pieces)
    for k in swapped:
        table[k], at = at, at + len(pieces[k])
    other = np.concatenate([raw[:16], table.view(np.uint8), *(pieces[k] for k in swapped)])
    out = np.zeros(values.nbytes, np.uint8)
    for k in range(blocks.n_blocks):
        BloscBlocks(other, values.nbytes).decode(k, k + 1, out)
    np.testing.assert_array_equal(out.view(np.int32), values)


@settings(max_examples=150, deadline=None)
@given(at=st.integers(0, 200), value=st.integers(0, 255), end=st.integers(0, 400))
def test_damage_ends_in_an_error_or_stays_inside(at: int, value: int, end: int) -> None:
    values = np.repeat(np.arange(500, dtype=np.int32), 20)
    raw = chunk(values, "lz4", 1, 8_192).copy()
    raw[at] = value
    raw = raw[: len(raw) - end]
    out = np.zeros(values.nbytes + 64, np.uint8)
    try:
        blocks = BloscBlocks(raw, values.nbytes)
        for k in range(blocks.n_blocks):
            blocks.decode(k, k + 1, out[: values.nbytes])
    except CorruptChunkError:
        pass
    assert not out[values.nbytes :].any()


def test_a_length_that_the_metadata_do_not_demand_is_refused() -> None:
    values = np.arange(1_000, dtype=np.int32)
    with pytest.raises(CorruptChunkError, match="its header says"):
        BloscBlocks(chunk(values, "lz4", 1, 0), values.nbytes + 4)
