"""densify_*: dense rows in four float types, with and without normalizing and log1p; rounding to the bit."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from hbx_gpu._engine.device.records import ELEMENT_TYPES
from tests.kernels import plain_reference as ref

TRANSFORMS = [(0.0, False), (1e4, False), (0.0, True), (1e4, True)]


def csr(
    rng: np.random.Generator, n_rows: int, n_features: int, dtype: str = "uint32", *, repeats: bool = False
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Random rows (indices, values, offsets), some empty, a tenth of the elements dropped."""
    lengths = rng.integers(0, max(2, n_features // 2), size=n_rows)
    lengths[rng.random(n_rows) < 0.2] = 0
    offsets = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64)
    rows = [rng.choice(n_features, size=n, replace=repeats) for n in lengths]
    indices = np.concatenate([*rows, np.empty(0)]).astype(np.int32)
    indices[rng.random(len(indices)) < 0.1] = -1
    values = rng.geometric(0.3, size=len(indices)) % 120
    return indices, values.astype(dtype), offsets


def ulps(dtype: str) -> float:
    """Relative tolerance for float sums and log1p: rounding may differ by one step of a 16-bit float."""
    return {"float32": 2e-6, "float64": 1e-12, "float16": 1.1e-3, "bfloat16": 8e-3}[dtype]


def as_numbers(bits: np.ndarray, dtype: str) -> np.ndarray:
    """float64 of what a kernel wrote."""
    if dtype == "float16":
        return bits.view(np.float16).astype(np.float64)
    if dtype == "bfloat16":
        return (bits.astype(np.uint32) << 16).view(np.float32).astype(np.float64)
    return bits.astype(np.float64)


@pytest.mark.parametrize(("target_sum", "log"), TRANSFORMS)
@pytest.mark.parametrize("dtype", ref.DENSE)
def test_rows_equal_the_reference(launcher: Any, dtype: str, target_sum: float, log: bool) -> None:
    indices, values, offsets = csr(np.random.default_rng(1), 12, 200)
    out, status, flag = ref.run_densify(
        launcher, indices, values, offsets, 200, dtype=dtype, target_sum=target_sum, log=log
    )
    expected = ref.dense_reference(indices, values, offsets, 200, dtype=dtype, target_sum=target_sum, log=log)
    assert not status.any()
    assert flag == 0
    assert out.dtype == expected.dtype
    if log:
        np.testing.assert_allclose(as_numbers(out, dtype), as_numbers(expected, dtype), rtol=ulps(dtype))
    else:
        np.testing.assert_array_equal(out, expected)


@pytest.mark.parametrize("dtype", ref.DENSE)
@pytest.mark.parametrize(
    ("n_features", "tile"), [(1, 1), (7, 7), (33, 8), (100, 99), (101, 16), (128, 64), (97, 1000)]
)
def test_any_width_and_any_tile(launcher: Any, dtype: str, n_features: int, tile: int) -> None:
    """Rows begin unaligned where n_features is odd; the last tile is short."""
    indices, values, offsets = csr(np.random.default_rng(n_features), 5, n_features)
    out, status, _ = ref.run_densify(
        launcher, indices, values, offsets, n_features, dtype=dtype, tile=tile, target_sum=1e3, block=96
    )
    assert not status.any()
    expected = ref.dense_reference(indices, values, offsets, n_features, dtype=dtype, target_sum=1e3)
    np.testing.assert_array_equal(out, expected)


@pytest.mark.parametrize("name", [name for name in ELEMENT_TYPES if name != "bfloat16"])
def test_values_of_any_type(launcher: Any, name: str) -> None:
    indices, values, offsets = csr(np.random.default_rng(3), 6, 60, name)
    if np.dtype(name).kind in "if":
        values = -values
    for dtype in ("float32", "float64"):
        out, status, _ = ref.run_densify(launcher, indices, values, offsets, 60, dtype=dtype)
        assert not status.any()
        np.testing.assert_array_equal(out, ref.dense_reference(indices, values, offsets, 60, dtype=dtype))


def test_large_integers_are_rounded_once(launcher: Any) -> None:
    values = np.array([2**24 + 1, 2**53 + 1, 2**64 - 1, 2**63 + 2**39 + 1], np.uint64)
    out, _, _ = ref.run_densify(launcher, np.arange(4, dtype=np.int32), values, np.array([0, 4]), 4)
    np.testing.assert_array_equal(out[0], values.astype(np.float32))


def test_repeated_columns_add_up(launcher: Any) -> None:
    indices, values, offsets = csr(np.random.default_rng(4), 10, 30, repeats=True)
    for dtype in ref.DENSE:
        out, _, _ = ref.run_densify(launcher, indices, values, offsets, 30, dtype=dtype)
        np.testing.assert_array_equal(out, ref.dense_reference(indices, values, offsets, 30, dtype=dtype))


def test_a_row_without_a_sum_is_not_scaled(launcher: Any) -> None:
    values = np.zeros(2, np.float32)
    out, status, _ = ref.run_densify(launcher, np.arange(2, dtype=np.int32), values, np.array([0, 2]), 2,
                                     target_sum=100.0)  # fmt: skip
    assert not status.any()
    np.testing.assert_array_equal(out, values.reshape(1, 2))


@pytest.mark.parametrize("value", [-3.0, 0.5, np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("transform", [{"target_sum": 100.0}, {"log": True}])
def test_what_is_no_count_is_refused(launcher: Any, value: float, transform: dict[str, Any]) -> None:
    values = np.array([1, 2, value, 4, 5], np.float32)
    indices, offsets = np.array([0, 1, 0, 1, 0], np.int32), np.array([0, 2, 4, 5])
    _, status, flag = ref.run_densify(launcher, indices, values, offsets, 2, **transform)
    assert status.tolist() == [0, 128, 0]
    assert flag == 128
    _, status, _ = ref.run_densify(launcher, indices, values, offsets, 2)
    assert not status.any()  # as they are, all values are fine


def test_dropped_columns_do_not_count_for_the_total(launcher: Any) -> None:
    indices = np.array([0, -1, 2], np.int32)
    values = np.array([1, 1000, 3], np.uint16)
    out, status, _ = ref.run_densify(launcher, indices, values, np.array([0, 3]), 3, target_sum=8.0)
    assert not status.any()
    np.testing.assert_array_equal(out, [[2.0, 0.0, 6.0]])


@pytest.mark.parametrize("bad", [-2, 50, 2**31 - 1, -(2**31)])
def test_columns_outside_are_found_in_every_tile(launcher: Any, bad: int) -> None:
    indices = np.array([1, 2, bad, 3, 49], np.int32)
    offsets = np.array([0, 2, 4, 5])
    out, status, flag = ref.run_densify(
        launcher, indices, np.ones(5, np.float32), offsets, 50, tile=16, target_sum=2.0
    )
    assert status.tolist() == [0, ref.BAD_COLUMN, 0]
    assert flag == ref.BAD_COLUMN
    assert out[0, [1, 2]].tolist() == [1.0, 1.0]
    assert out[2, 49] == 2.0


@pytest.mark.parametrize("offsets", [[-1, 2], [3, 2], [0, 6], [0, 2**62], [-(2**63), 2**63 - 1]])
def test_offsets_outside_are_refused(launcher: Any, offsets: list[int]) -> None:
    indices = np.zeros(5, np.int32)
    out, status, flag = ref.run_densify(launcher, indices, np.ones(5, np.float32), np.array(offsets), 9)
    assert status.tolist() == [ref.BAD_PLACE]
    assert flag == ref.BAD_PLACE
    assert not out.any()


@pytest.mark.parametrize("value_type", [ELEMENT_TYPES["bfloat16"], 12, 2**32 - 1])
def test_unknown_types_are_refused(launcher: Any, value_type: int) -> None:
    out = ref.run_densify(
        launcher, np.zeros(2, np.int32), np.ones(2, np.float32), np.array([0, 2]), 9, value_type=value_type
    )
    assert out[2] == ref.BAD_PLACE


def test_no_rows_and_no_features(launcher: Any) -> None:
    none = np.empty(0, np.int32)
    for n_rows, n_features in ((0, 5), (3, 0)):
        values = none.astype(np.float32)
        out, status, _ = ref.run_densify(launcher, none, values, np.zeros(n_rows + 1), n_features, tile=8)
        assert out.shape == (n_rows, n_features)
        assert not status.any()


def one_row(launcher: Any, x: np.ndarray, **options: Any) -> np.ndarray:
    """float32 numbers through a kernel as one dense row."""
    columns = np.arange(len(x), dtype=np.int32)
    result: np.ndarray = ref.run_densify(
        launcher, columns, x, np.array([0, len(x)]), len(x), block=256, tile=16384, **options
    )[0][0]
    return result


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_rounding_to_16_bits(launcher: Any, dtype: str) -> None:
    """Each upper half of a float32 with lower halves around a tie, and float16's own ties."""
    rng = np.random.default_rng(5)
    high = np.arange(0, 1 << 16, 5, dtype=np.uint32)
    low = rng.choice(
        np.array([0, 1, 0x7FFF, 0x8000, 0x8001, 0x0FFF, 0x1000, 0x1001, 0x3000, 0xFFFF]), len(high)
    )
    x = (high << 16 | low.astype(np.uint32)).view(np.float32)
    subnormal = (np.abs(x) < 2.0**-126) & (x != 0)
    x = np.where(np.isnan(x) | subnormal, np.float32(1), x)
    x = np.concatenate(
        [x, np.array([np.nan, 65_519.996, 65_520, 2.0**-25, 2.0**-24, 1.5 * 2.0**-24], np.float32)]
    )
    out = one_row(launcher, x, dtype=dtype)
    x = x + np.float32(0)  # -0 is added to 0
    bits = ref.float16_bits(x) if dtype == "float16" else ref.bfloat16_bits(x)
    np.testing.assert_array_equal(out, bits)


def test_log1p_is_accurate(launcher: Any) -> None:
    rng = np.random.default_rng(6)
    x = np.concatenate(
        [
            np.float32(2.0) ** rng.uniform(-120, 120, 1000).astype(np.float32),
            rng.uniform(0, 2, 1000).astype(np.float32),
            rng.uniform(-0.999, 0, 1000).astype(np.float32),
            np.arange(1, 1000, dtype=np.float32),
            np.nextafter(np.array([-0.3, -0.3, 0.5, 0.5], np.float32), np.array([-1, 1, 0, 1], np.float32)),
        ]
    )
    out = one_row(launcher, x, log=True)
    np.testing.assert_allclose(out, np.log1p(x.astype(np.float64)), rtol=2e-6)
    edges = one_row(launcher, np.array([0, np.inf, -1, -1.5, np.nan], np.float32), log=True)
    np.testing.assert_array_equal(edges, np.array([0, np.inf, -np.inf, np.nan, np.nan], np.float32))
