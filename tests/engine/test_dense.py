"""Dense rows against NumPy and torch: sums, rounding, normalization."""

from __future__ import annotations

import numba
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from hbx_gpu._buffers import BufferPool
from hbx_gpu._engine.host.dense import densify
from hbx_gpu._engine.host.dense_kernels import bfloat16_bits, float16_bits, log1p32
from hbx_gpu.batch import SparseBatch
from hbx_gpu.errors import InvalidDataError
from hbx_gpu.transforms import Transform, chain, log1p, normalize_total


def random_batch(seed: int, dtype: type = np.uint32, high: int = 1000) -> SparseBatch:
    rng = np.random.default_rng(seed)
    lengths = rng.integers(0, 20, size=30)
    offsets = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64)
    indices = rng.integers(0, 25, size=offsets[-1]).astype(np.int32)  # columns repeat within rows
    values = rng.integers(0, high, size=offsets[-1]).astype(dtype)
    return SparseBatch(indices, values, offsets, 25)


def plain_dense(batch: SparseBatch) -> np.ndarray:
    out = np.zeros((len(batch), batch.n_features))
    np.add.at(out, (np.repeat(np.arange(len(batch)), np.diff(batch.offsets)), batch.indices), batch.values)
    return out


@given(st.integers(0, 2**32 - 1), st.sampled_from([np.uint8, np.uint32, np.int64, np.float32, np.float64]))
@settings(max_examples=50, deadline=None)
def test_sums(seed: int, dtype: type) -> None:
    batch = random_batch(seed, dtype, high=200)
    expected = plain_dense(batch)
    for name in ("float32", "float64", "float16"):
        assert np.array_equal(densify(batch, dtype=name), expected.astype(name))
    bits = densify(batch, dtype="bfloat16")
    assert np.array_equal(bits, torch.from_numpy(expected).float().bfloat16().view(torch.uint16).numpy())


@pytest.mark.parametrize("steps", [normalize_total(50.0), log1p, [normalize_total(1e4), log1p], None, []])
def test_transforms(steps: object) -> None:
    batch = random_batch(4)
    transform = chain(steps)  # type: ignore[arg-type]
    expected = plain_dense(batch)
    if transform.target_sum:
        totals = expected.sum(1, keepdims=True)
        expected = np.divide(expected * transform.target_sum, totals, where=totals > 0, out=expected)
    if transform.log1p:
        expected = np.log1p(expected)
    # float32 sums of scaled values: a few units in the last place.
    np.testing.assert_allclose(densify(batch, transform=transform), expected, rtol=1e-6)
    np.testing.assert_allclose(densify(batch, transform=transform, dtype="float16"), expected, rtol=1e-3)


def test_order_of_transforms() -> None:
    assert chain([normalize_total(2.0), normalize_total(3.0)]) == Transform(3.0)
    for wrong in (np.log1p, [normalize_total]):
        with pytest.raises(TypeError, match=r"normalize_total\(1e4\), log1p or a list of both.*convert="):
            chain(wrong)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="log1p must come last"):
        chain([log1p, normalize_total()])
    with pytest.raises(ValueError, match="positive"):
        normalize_total(0)


def test_memory_of_the_pool_need_not_be_clean() -> None:
    pool = BufferPool()
    batch = SparseBatch(np.zeros(0, np.int32), np.zeros(0, np.uint32), np.zeros(301, np.int64), 200)
    pool.empty((300, 200), np.float32)[:] = 7
    for dtype in ("float32", "float16", "bfloat16"):
        assert not densify(batch, pool=pool, dtype=dtype).any()


def test_unknown_dtype() -> None:
    with pytest.raises(ValueError, match="float16"):
        densify(random_batch(0), dtype="int8")


@numba.njit
def _all_bits(x, half, brain):  # type: ignore[no-untyped-def]
    for i in range(len(x)):
        half[i] = float16_bits(x[i])
        brain[i] = bfloat16_bits(x[i])


def test_rounding_to_16_bits_is_exact() -> None:
    rng = np.random.default_rng(0)
    edges = [0.0, -0.0, np.inf, -np.inf, 65504.0, 65519.99, 65520.0, 2.0**-24, 2.0**-25, 3e-8, 6.1e-5]
    x = np.concatenate(
        [
            rng.integers(0, 2**32, size=500_000, dtype=np.uint32).view(np.float32),
            (rng.random(200_000) * 1e-4).astype(np.float32),  # subnormal halves
            np.arange(70_000, dtype=np.float32),
            np.array(edges, np.float32),
        ]
    )
    x = x[~np.isnan(x)]
    half, brain = np.empty(len(x), np.uint16), np.empty(len(x), np.uint16)
    _all_bits(x, half, brain)
    with np.errstate(over="ignore"):
        assert np.array_equal(half, x.astype(np.float16).view(np.uint16))
    assert np.array_equal(brain, torch.from_numpy(x).bfloat16().view(torch.uint16).numpy())


def test_log1p_to_float32_accuracy() -> None:
    rng = np.random.default_rng(0)
    edges = [0.0, 1e-45, 1e-30, 9.9e-5, 1e-4, 1.01e-4, 0.41421, 0.41422, 1.0, 2**24, 1e29]
    x = np.concatenate(
        [np.exp(rng.uniform(-60, 60, 400_000)), rng.random(200_000) * 50, np.arange(5000), edges]
    ).astype(np.float32)
    out = np.empty_like(x)
    for part in (slice(0, 400_000), slice(400_000, None)):
        log1p32(x[part], out[part])
    exact = np.log1p(x.astype(np.float64))
    # Half a unit in the last place is what rounding costs; allow 0.6 of one.
    assert (np.abs(out - exact) <= 0.6 * np.spacing(exact.astype(np.float32))).all()

    odd = np.array([1.0, -0.5, -1.0, 1e31, np.inf, np.nan], np.float32)
    result = np.empty_like(odd)
    log1p32(odd, result)
    with np.errstate(divide="ignore"):
        np.testing.assert_array_equal(result, np.log1p(odd.astype(np.float64)).astype(np.float32))


@pytest.mark.parametrize("column", [-1, 25, 2**31 - 1])
@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_columns_outside_the_matrix(column: int, dtype: str) -> None:
    batch = random_batch(1)
    batch.indices[batch.offsets[7]] = column
    row = int(np.searchsorted(batch.offsets, batch.offsets[7], side="right")) - 1
    with pytest.raises(ValueError, match=f"row {row} .*outside"):
        densify(batch, dtype=dtype)


@pytest.mark.parametrize("value", [-1.0, 0.5, np.nan, np.inf])
@pytest.mark.parametrize("transform", [Transform(target_sum=10.0), Transform(log1p=True)])
def test_what_is_no_count_is_not_transformed(value: float, transform: Transform) -> None:
    batch = SparseBatch(np.array([0, 1], np.int32), np.array([1, value], np.float32), np.array([0, 2]), 3)
    assert densify(batch).shape == (1, 3)
    with pytest.raises(InvalidDataError, match="no whole numbers"):
        densify(batch, transform=transform)


def test_negative_integers_are_no_counts() -> None:
    batch = SparseBatch(np.array([0], np.int32), np.array([-2], np.int32), np.array([0, 1]), 3)
    with pytest.raises(InvalidDataError, match="negative"):
        densify(batch, transform=Transform(log1p=True))
