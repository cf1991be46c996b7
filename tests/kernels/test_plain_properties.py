"""Random arrays and damaged bytes through bitpacking, gather, densify, compact: right or refused."""

from __future__ import annotations

import itertools
import os
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from hbx_gpu._codecs.bitpacking import decode_bitpacking_reference, encode_bitpacking_reference
from hbx_gpu._codecs.bitpacking_format import TRANSFORMS
from hbx_gpu._engine.device.records import ELEMENT_TYPES, PACKED, PLAIN
from hbx_gpu._engine.host import dense_kernels
from hbx_gpu.errors import CorruptChunkError
from tests.kernels import plain_reference as ref

EXAMPLES = int(os.environ.get("HBX_FUZZ_EXAMPLES", "40"))
"""Examples per test and launcher; a long run sets more."""
many = settings(
    max_examples=EXAMPLES,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)


@st.composite
def packed_chunks(draw: st.DrawFn) -> tuple[bytes, int]:
    """A chunk and its element size."""
    element_size = draw(st.sampled_from([4, 8]))
    n = draw(st.integers(0, 700))
    rng = np.random.default_rng(draw(st.integers(0, 2**32)))
    words = rng.integers(0, 2**64, size=n, dtype=np.uint64) >> rng.integers(0, 64, size=n).astype(np.uint64)
    if draw(st.booleans()):
        words = np.sort(words)
    transform = draw(st.sampled_from(list(TRANSFORMS)))
    return encode_bitpacking_reference(
        words.astype(f"<u{element_size}"), transform, element_size
    ), element_size


@many
@given(
    chunk=packed_chunks(),
    window=st.tuples(st.floats(0, 1), st.floats(0, 1)),
    offset=st.integers(0, 15),
    stage=st.sampled_from([0, 600, 1 << 14]),
    block=st.sampled_from([32, 64, 160]),
)
def test_any_window_of_any_chunk(
    launcher: Any, chunk: tuple[bytes, int], window: tuple[float, float], offset: int, stage: int, block: int
) -> None:
    data, size = chunk
    words = decode_bitpacking_reference(data, size)
    first, last = sorted(round(x * len(words)) for x in window)
    arena, jobs = ref.pack_arena([data], [len(words)], size, offset=offset, tail=0)
    jobs["first_word"], jobs["last_word"] = first, last
    expected = arena.copy()
    out = int(jobs["out"][0])
    expected[out + first * size : out + last * size] = words[first:last].view(np.uint8)
    status, flag = ref.decode_packed(launcher, arena, jobs, size, stage_bytes=stage, block=block)
    assert status[0] == 0
    assert flag == 0
    np.testing.assert_array_equal(arena, expected)


@many
@given(
    chunk=packed_chunks(),
    edits=st.lists(st.tuples(st.floats(0, 1), st.integers(0, 255)), max_size=4),
    cut=st.floats(0, 1) | st.just(1.0),
    stage=st.sampled_from([0, 1 << 14]),
)
def test_damaged_chunks_are_refused_exactly_where_the_reference_refuses(
    launcher: Any, chunk: tuple[bytes, int], edits: list[tuple[float, int]], cut: float, stage: int
) -> None:
    data, size = bytearray(chunk[0]), chunk[1]
    n = int.from_bytes(data[1:5], "little")
    for place, value in edits:
        data[int(place * (len(data) - 1))] = value
    del data[round(cut * len(data)) :]
    arena, jobs = ref.pack_arena([bytes(data)], [n], size, offset=3, tail=0)
    expected = arena.copy()
    try:
        words: np.ndarray | None = decode_bitpacking_reference(bytes(data), size)
    except CorruptChunkError:
        words = None
    if words is not None and len(words) != n:
        words = None
    if words is not None:
        expected[int(jobs["out"][0]) :][: words.nbytes] = words.view(np.uint8)
    status, flag = ref.decode_packed(launcher, arena, jobs, size, stage_bytes=stage)
    assert (status[0] == 0) == (words is not None)
    assert flag == status[0]
    np.testing.assert_array_equal(arena, expected)


u32s = st.sampled_from([0, 1, 2, 5, 127, 128, 255, 1000, 2**16, 2**31, 2**32 - 1]) | st.integers(0, 600)
u64s = st.sampled_from([2**32, 2**63, 2**64 - 1, 2**64 - 8]) | u32s


@many
@given(st.data())
def test_random_bitpacking_records_stay_inside(launcher: Any, data: st.DataObject) -> None:
    """Outputs lie in front, chunks behind: whatever a record says, nothing but its own output may change."""
    chunk = encode_bitpacking_reference(np.arange(200, dtype=np.uint32), "delta", 4)
    arena, good = ref.pack_arena([chunk], [200], 4)
    jobs = np.concatenate([good, np.zeros(2, PACKED)])
    for job in jobs[1:]:
        for name in PACKED.names or ():
            job[name] = (
                data.draw(u64s if PACKED[name].itemsize == 8 else u32s)
                if data.draw(st.booleans())
                else good[name][0]
            )
        if job["last_word"] > job["first_word"] and job["out"] != good["out"][0]:
            job["out"] = 2**40  # a chunk decoded over its own bytes is the host's mistake, not a damaged file
    status, _ = ref.decode_packed(launcher, arena, jobs, 4, max_blocks=3, grid=1)
    assert status[0] == 0
    np.testing.assert_array_equal(ref.packed_words(arena, jobs[0], 4), np.arange(200))
    assert (arena[:8] == ref.CANARY).all()


@many
@given(st.data())
def test_random_gather_records_stay_inside(launcher: Any, data: st.DataObject) -> None:
    rng = np.random.default_rng(data.draw(st.integers(0, 2**32)))
    arena = rng.integers(0, 256, size=data.draw(st.integers(0, 700)), dtype=np.uint8)
    pieces = np.zeros(4, PLAIN)
    for piece in pieces:
        for name in PLAIN.names or ():
            piece[name] = data.draw(u64s if PLAIN[name].itemsize == 8 else u32s)
        piece["role"] %= 4
        piece["type"] %= 14
        piece["source"] %= 4
    sources, remap = ref.source_records(
        [np.arange(50), rng.integers(-1, 9, size=300), np.arange(9)], [True, False, False]
    )
    sources["remap_length"] += data.draw(st.sampled_from([0, 0, 1, 2**31]))
    outputs: Any = [np.full(300, -9, np.int32), np.zeros(100, np.float32), np.zeros(300, np.uint16)]
    status, flag = ref.run_gather(launcher, arena, pieces, sources, remap, outputs)
    assert (flag != 0) == bool(status.any())
    written = (outputs[0] != -9).sum()
    assert (
        written <= pieces["count"][(pieces["role"] == 0) & (status & ~np.uint32(ref.BAD_COLUMN) == 0)].sum()
    )


NUMBERS = [name for name in ELEMENT_TYPES if name != "bfloat16"]


@many
@given(
    array=st.sampled_from(NUMBERS).flatmap(lambda name: hnp.arrays(name, st.integers(1, 150))),
    target=st.sampled_from(NUMBERS),
    gap=st.integers(0, 3),
    lead=st.integers(0, 5),
)
def test_any_values_convert_as_in_numpy(
    launcher: Any, array: np.ndarray, target: str, gap: int, lead: int
) -> None:
    arena, pieces = ref.plain_arena([array], gap=gap)
    pieces["role"], pieces["out"] = 1, lead
    out = np.zeros(lead + len(array) + 3, target)
    sources = ref.source_records([], [])
    status, _ = ref.run_gather(launcher, arena, pieces, *sources, [np.empty(0, np.int32), out])
    if not ref.converts(array.dtype, out.dtype):
        assert status[0] == ref.BAD_RECORD
        assert not out.any()
        return
    with np.errstate(all="ignore"):
        np.testing.assert_array_equal(out[lead:-3], array.astype(target))
    assert status[0] == 0
    assert not out[:lead].any()
    assert not out[-3:].any()


@st.composite
def csr_rows(draw: st.DrawFn) -> tuple[np.ndarray, np.ndarray, np.ndarray, int]:
    """(indices with some -1, values, offsets, n_features)."""
    n_features = draw(st.integers(1, 90))
    lengths = draw(st.lists(st.integers(0, 120), max_size=5))
    rng = np.random.default_rng(draw(st.integers(0, 2**32)))
    indices = rng.integers(-1, n_features, size=sum(lengths)).astype(np.int32)
    values = rng.integers(0, 100, size=len(indices)).astype(draw(st.sampled_from(NUMBERS)))
    return indices, values, np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64), n_features


@many
@given(
    rows=csr_rows(),
    dtype=st.sampled_from(list(ref.DENSE)),
    tile=st.integers(1, 100),
    log=st.booleans(),
    target_sum=st.sampled_from([0.0, 1e4]),
)
def test_any_rows_densify(
    launcher: Any,
    rows: tuple[np.ndarray, np.ndarray, np.ndarray, int],
    dtype: str,
    tile: int,
    log: bool,
    target_sum: float,
) -> None:
    """Three or more scaled floats of one column add up in any order: hence the tolerance."""
    indices, values, offsets, n_features = rows
    options: Any = {"dtype": dtype, "log": log, "target_sum": target_sum}
    out, status, _ = ref.run_densify(launcher, indices, values, offsets, n_features, tile=tile, **options)
    expected = ref.dense_reference(indices, values, offsets, n_features, **options)
    assert not status.any()
    if dtype in ("float16", "bfloat16"):
        assert np.abs(out.astype(int) - expected.astype(int)).max(initial=0) <= 1
    else:
        np.testing.assert_allclose(out, expected, rtol=5e-6 if dtype == "float32" else 1e-12)


@many
@given(
    rows=csr_rows(), wild=st.lists(st.tuples(st.floats(0, 1), st.integers(-(2**31), 2**31 - 1)), max_size=3)
)
def test_wild_columns_are_found_or_kept(
    launcher: Any, rows: tuple[np.ndarray, np.ndarray, np.ndarray, int], wild: list[Any]
) -> None:
    indices, values, offsets, n_features = rows
    indices = indices.copy()
    for place, column in wild:
        if len(indices):
            indices[int(place * (len(indices) - 1))] = column
    bad = (indices < -1) | (indices >= n_features)
    expected = [ref.BAD_COLUMN * bool(bad[a:b].any()) for a, b in itertools.pairwise(offsets)]
    status = ref.run_densify(launcher, indices, values, offsets, n_features, tile=40)[1]
    assert status.tolist() == expected


@many
@given(rows=csr_rows())
def test_any_rows_compact(launcher: Any, rows: tuple[np.ndarray, np.ndarray, np.ndarray, int]) -> None:
    indices, values, offsets, _ = rows
    found, layers, found_offsets = ref.compact(launcher, indices, [values], offsets)
    kept = indices != -1
    np.testing.assert_array_equal(found, indices[kept])
    np.testing.assert_array_equal(layers[0], values[kept])
    np.testing.assert_array_equal(found_offsets, np.concatenate([[0], np.cumsum(kept)])[offsets])


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
@many
@given(bits=hnp.arrays(np.uint32, st.integers(1, 200)))
def test_rounding_is_that_of_the_host_engine(launcher: Any, dtype: str, bits: np.ndarray) -> None:
    x = bits.view(np.float32)
    x = np.where((np.abs(x) < 2.0**-126) | (x == 0), np.float32(0), x)
    columns = np.arange(len(x), dtype=np.int32)
    out = ref.run_densify(launcher, columns, x, np.array([0, len(x)]), len(x), dtype=dtype)[0][0]
    host = dense_kernels.float16_bits if dtype == "float16" else dense_kernels.bfloat16_bits
    nan = np.isnan(x)
    np.testing.assert_array_equal(out[~nan], [host(np.float32(y)) for y in x[~nan]])
    np.testing.assert_array_equal(out[nan] & 0x7FFF, 0x7E00 if dtype == "float16" else 0x7FC0)
