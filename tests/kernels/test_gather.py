"""gather_pieces: NumPy's astype and fancy indexing, for every type and alignment; bad records are refused."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from hbx_gpu._engine.device.records import ELEMENT_TYPES
from tests.kernels import plain_reference as ref

TYPES = [name for name in ELEMENT_TYPES if name != "bfloat16"]
INTEGERS = [name for name in TYPES if "int" in name]
COLUMNS = np.empty(0, np.int32)


def extremes(name: str, rng: np.random.Generator, n: int = 200) -> np.ndarray:
    """Numbers of a type: its borders, numbers that round, and random bits."""
    dtype = np.dtype(name)
    if dtype.kind in "iu":
        info = np.iinfo(dtype)
        special: list[Any] = [
            0,
            1,
            info.min,
            info.max,
            info.max - 1,
            info.max // 3,
            2**24 + 1,
            2**53 + 1,
            2049,
            65_519,
            65_520,
        ]
        special = [x for x in special if info.min <= x <= info.max]
    else:
        special = [
            0.0,
            -0.0,
            1.5,
            np.inf,
            -np.inf,
            np.nan,
            65_504.0,
            65_520.0,
            6e-8,
            2.0**-24,
            1e-5,
            -3.25,
            1 / 3,
        ]
    with np.errstate(over="ignore"):
        first = np.array(special, dtype)
    random = rng.integers(0, 256, size=(n - len(first), dtype.itemsize), dtype=np.uint8).view(dtype).ravel()
    return np.concatenate([first, random])


def same(a: np.ndarray, b: np.ndarray) -> None:
    """Equal bits; NaNs equal each other."""
    assert a.dtype == b.dtype
    numbers = ~np.isnan(b) if b.dtype.kind == "f" else np.ones(len(b), bool)
    if b.dtype.kind == "f":
        np.testing.assert_array_equal(np.isnan(a), np.isnan(b))
    np.testing.assert_array_equal(a[numbers].view(f"u{a.itemsize}"), b[numbers].view(f"u{b.itemsize}"))


@pytest.mark.parametrize("target", TYPES)
def test_values_become_what_astype_makes_of_them(launcher: Any, target: str) -> None:
    arrays = [extremes(name, np.random.default_rng(k)) for k, name in enumerate(TYPES)]
    arena, pieces = ref.plain_arena(arrays)
    pieces["role"] = 1
    pieces["out"] = np.cumsum(pieces["count"]) - pieces["count"]
    out = np.zeros(int(pieces["count"].sum()), target)
    status, _ = ref.run_gather(launcher, arena, pieces, *ref.source_records([], []), [COLUMNS, out])
    for k, array in enumerate(arrays):
        part = out[int(pieces["out"][k]) :][: len(array)]
        if not ref.converts(array.dtype, out.dtype):
            assert status[k] == ref.BAD_RECORD, array.dtype
            assert not part.view(np.uint8).any(), array.dtype
            continue
        with np.errstate(over="ignore", invalid="ignore"):
            expected = array.astype(target)
        assert status[k] == 0, array.dtype
        same(part, expected)


def test_every_float16(launcher: Any) -> None:
    halves = np.arange(1 << 16, dtype=np.uint16).view(np.float16)
    arena, pieces = ref.plain_arena([halves])
    pieces["role"] = 1
    out = np.zeros(len(halves), np.float32)
    assert ref.run_gather(launcher, arena, pieces, *ref.source_records([], []), [COLUMNS, out])[1] == 0
    same(out, halves.astype(np.float32))


@pytest.mark.parametrize("name", ["uint8", "uint16", "float32", "float64"])
@pytest.mark.parametrize("gap", [0, 1, 3])
def test_any_alignment_and_length(launcher: Any, name: str, gap: int) -> None:
    rng = np.random.default_rng(6)
    arrays = [extremes(name, rng, 400)[:n] for n in (1, 2, 3, 5, 15, 16, 17, 31, 33, 64, 127, 300, 399)]
    arena, pieces = ref.plain_arena(arrays, gap=gap)
    pieces["role"] = 1
    for lead in (0, gap, 2):
        pieces["out"] = lead + np.cumsum(pieces["count"] + 1) - pieces["count"] - 1
        out = np.frombuffer(bytes([ref.CANARY]) * (2000 * np.dtype(name).itemsize), name).copy()
        expected = out.copy()
        for piece, array in zip(pieces, arrays, strict=True):
            expected[int(piece["out"]) :][: len(array)] = array
        status, flag = ref.run_gather(
            launcher, arena, pieces, *ref.source_records([], []), [COLUMNS, out], block=96
        )
        assert not status.any()
        assert flag == 0
        np.testing.assert_array_equal(out.view(np.uint8), expected.view(np.uint8))


@pytest.mark.parametrize("name", INTEGERS)
def test_columns_go_through_the_remap_of_their_source(launcher: Any, name: str) -> None:
    rng = np.random.default_rng(7)
    remaps: Any = [
        rng.permutation(120).astype(np.int32) - 20,
        rng.permutation(100).astype(np.int32),
        np.arange(90),
    ]
    remaps[0] = np.maximum(remaps[0], -1)
    arrays = [
        rng.integers(0, len(remaps[k]), size=n).astype(name) for k, n in ((0, 200), (1, 7), (2, 333), (0, 1))
    ]
    arena, pieces = ref.plain_arena(arrays, gap=1)
    pieces["source"] = [0, 1, 2, 0]
    pieces["out"] = np.cumsum(pieces["count"]) - pieces["count"] + 3
    out = np.full(600, -9, np.int32)
    expected = out.copy()
    for piece, array in zip(pieces, arrays, strict=True):
        expected[int(piece["out"]) :][: len(array)] = np.asarray(remaps[piece["source"]])[
            array.astype(np.int64)
        ]
    sources = ref.source_records(remaps, [False, False, True])
    status, flag = ref.run_gather(launcher, arena, pieces, *sources, [out])
    assert not status.any()
    assert flag == 0
    np.testing.assert_array_equal(out, expected)


def test_an_identity_needs_no_remap(launcher: Any) -> None:
    sources, _ = ref.source_records([np.arange(50)], [True])
    arena, pieces = ref.plain_arena([np.arange(50, dtype=np.uint8)])
    out = np.full(50, -9, np.int32)
    assert ref.run_gather(launcher, arena, pieces, sources, np.empty(0, np.int32), [out])[1] == 0
    np.testing.assert_array_equal(out, np.arange(50))


@pytest.mark.parametrize("identity", [False, True])
@pytest.mark.parametrize(
    ("name", "bad"), [("int64", -1), ("int8", -128), ("uint8", 50), ("uint64", 2**32), ("uint64", 2**64 - 1)]
)
def test_columns_outside_the_group_are_found(launcher: Any, name: str, bad: int, identity: bool) -> None:
    good = np.arange(45).astype(name)
    wrong = good.copy()
    wrong[37] = bad
    arena, pieces = ref.plain_arena([good, wrong, good])
    pieces["out"] = [0, 45, 90]
    out = np.full(135, -9, np.int32)
    sources = ref.source_records([np.arange(50)], [identity])
    status, flag = ref.run_gather(launcher, arena, pieces, *sources, [out])
    assert status.tolist() == [0, ref.BAD_COLUMN, 0]
    assert flag == ref.BAD_COLUMN
    np.testing.assert_array_equal(out[:45], np.arange(45))
    np.testing.assert_array_equal(out[90:], np.arange(45))


@pytest.mark.parametrize(
    ("role", "field", "value", "bit"),
    [
        (0, "data", 2**40, ref.BAD_RECORD),
        (1, "data", 2**64 - 4, ref.BAD_RECORD),
        (1, "data", 2, ref.BAD_RECORD),
        (1, "count", 11, ref.BAD_RECORD),
        (1, "count", 2**32 - 1, ref.BAD_RECORD),
        (1, "type", 12, ref.BAD_RECORD),
        (1, "type", ELEMENT_TYPES["bfloat16"], ref.BAD_RECORD),
        (0, "type", ELEMENT_TYPES["float32"], ref.BAD_RECORD),
        (0, "source", 1, ref.BAD_RECORD),
        (1, "role", 2, ref.BAD_PLACE),
        (1, "out", 11, ref.BAD_PLACE),
        (0, "out", 2**64 - 2, ref.BAD_PLACE),
    ],
)
def test_records_that_point_outside_are_refused(
    launcher: Any, role: int, field: str, value: int, bit: int
) -> None:
    arena, pieces = ref.plain_arena([np.arange(10, dtype=np.uint32)], tail=3)
    pieces["role"] = role
    pieces[field] = value
    outputs = [np.full(20, -9, np.int32), np.full(20, -9, np.float32)]
    status, flag = ref.run_gather(
        launcher, arena, pieces, *ref.source_records([np.arange(10)], [False]), outputs
    )
    assert status.tolist() == [bit]
    assert flag == bit
    assert all((out == -9).all() for out in outputs)


def test_tables_and_outputs_that_do_not_fit_are_refused(launcher: Any) -> None:
    arena, pieces = ref.plain_arena([np.arange(10, dtype=np.uint32)])
    sources, remap = ref.source_records([np.arange(10)], [False])
    out = np.full(20, -9, np.int32)

    def bits(sources: np.ndarray, records: np.ndarray) -> list[int]:
        result: list[int] = ref.run_gather(launcher, arena, pieces, sources, remap, [out], records=records)[
            0
        ].tolist()
        return result

    good = ref.output_records(launcher, [out])
    for field, value in (("remap_start", 1), ("remap_start", 2**64 - 1), ("remap_length", 11)):
        wrong = sources.copy()
        wrong[field] = value
        assert bits(wrong, good) == [ref.BAD_PLACE], field
    for field, value in (
        ("type", ELEMENT_TYPES["int64"]),
        ("type", 99),
        ("address", int(good["address"][0]) + 2),
    ):
        records = good.copy()
        records[field] = value
        assert bits(sources, records) == [ref.BAD_PLACE], field
    assert (out == -9).all()
    assert bits(sources, good) == [0]
