"""rowpack_dense: rows equal the reference over tiles, transforms, formats and remaps. NumPy only."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from hbx_gpu._codecs import rowpack, rowpack_format
from hbx_gpu._engine.device.records import PIECE, RUN, SEGMENT
from tests.kernels import rowpack_reference as reference
from tests.kernels.rowpack_reference import BAD_COLUMN, BAD_PATCH, BAD_PLACE, BAD_RECORD, Batch, Stage, piece

N_FEATURES = 300
KINDS = ["f32", "f16", "bf16"]
LENGTHS = (0, 1, 299, 0, 130, 7, 64, 0)


def example(
    seed: int = 0,
    *,
    index: str = "u2",
    count: str = "u1",
    n: int = N_FEATURES,
    lengths: tuple[int, ...] = LENGTHS,
    remap: np.ndarray | None = None,
    **how: Any,
) -> Batch:
    """Rows of so many genes out of n, with some large counts where the dtype has room for them."""
    rng = np.random.default_rng(seed)
    rows = [np.sort(rng.choice(n, k, replace=False)).astype(index) for k in lengths]
    top = min(np.iinfo(count).max, 10**6)
    counts = []
    for row in rows:
        x = rng.geometric(0.3, len(row)) + (rng.random(len(row)) < 0.1) * rng.integers(0, top, len(row))
        counts.append(np.minimum(x, top).astype(count))
    how.setdefault("remaps", [np.arange(n, dtype=np.int32) if remap is None else remap])
    return reference.csr_batch(rows, counts, **how)


def check(launcher: Any, batch: Batch, n_features: int = N_FEATURES, **how: Any) -> np.ndarray:
    """Rows and status equal the reference: bit for bit without transforms, else as the brief allows."""
    sums, totals, expected_status = reference.rowpack_sums(batch, n_features)
    rows, status, flag = reference.run_dense(launcher, batch, n_features, **how)
    np.testing.assert_array_equal(status, expected_status)
    assert flag == np.bitwise_or.reduce(status, initial=0)
    assert not status.any()
    kind, target, log1p = how.get("kind", "f32"), how.get("target_sum", 0.0), how.get("log1p", False)
    expected = reference.transformed(sums, totals, target, log1p)
    if kind != "f32":
        # Rounding is exact: of the very numbers that the float32 kernel makes.
        if log1p:
            single = reference.run_dense(launcher, batch, n_features, **{**how, "kind": "f32", "shift": 0})[0]
            np.testing.assert_allclose(single, expected, rtol=2e-6, atol=0)
            expected = single
        expected = reference.float16_bits(expected) if kind == "f16" else reference.bfloat16_bits(expected)
        np.testing.assert_array_equal(rows, expected)
    elif log1p:
        np.testing.assert_allclose(rows, expected, rtol=2e-6, atol=0)
    else:
        np.testing.assert_array_equal(rows, expected)
    return rows


@pytest.mark.parametrize("partial", [False, True])
@pytest.mark.parametrize("index", ["u1", "u2", "u4"])
@pytest.mark.parametrize("count", ["u1", "u2", "u4"])
def test_element_sizes(launcher: Any, index: str, count: str, partial: bool) -> None:
    n = 250 if index == "u1" else N_FEATURES
    lengths = tuple(min(k, n) for k in LENGTHS)
    check(launcher, example(1, index=index, count=count, n=n, lengths=lengths, partial=partial), n)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("target_sum", [0.0, 1.0, 1e4, 12_345.678])
@pytest.mark.parametrize("log1p", [False, True])
def test_transforms(launcher: Any, kind: str, target_sum: float, log1p: bool) -> None:
    batch = example(2, count="u4", lengths=(0, 3, 290, 1, 60))
    rows = check(launcher, batch, kind=kind, target_sum=target_sum, log1p=log1p)
    assert not rows[0].any()
    if target_sum and not log1p and kind == "f32":
        np.testing.assert_allclose(rows[1:].sum(axis=1, dtype=np.float64), target_sum, rtol=1e-6)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("n_features", [1, 3, 4, 7, 8, 9, 31, 64, 65, 250])
@pytest.mark.parametrize("shift", [0, 1, 2, 3, 5])
def test_rows_at_any_alignment(launcher: Any, kind: str, n_features: int, shift: int) -> None:
    """Rows of odd width begin at every place modulo 16 bytes."""
    lengths = tuple(min(k, n_features) for k in (1, 0, 250, 4))
    batch = example(3, n=n_features, lengths=lengths, count="u2")
    check(launcher, batch, n_features, kind=kind, shift=shift)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("tile", [1, 4, 37, 100, 128, 299, 300, 1_000])
def test_tiles_along_the_features(launcher: Any, kind: str, tile: int) -> None:
    """The total is that of all tiles."""
    batch = example(4, lengths=(200, 0, 299)) if tile > 30 else example(4, lengths=(20, 0, 3))
    check(launcher, batch, kind=kind, tile=tile)
    check(launcher, batch, kind=kind, tile=tile, target_sum=1e4, log1p=True)


def test_remap_drops_permutes_and_repeats(launcher: Any) -> None:
    rng = np.random.default_rng(5)
    panel = rng.permutation(N_FEATURES).astype(np.int32)
    drops = np.where(panel < 40, panel, -1).astype(np.int32)
    repeats = (np.arange(N_FEATURES) % 3).astype(np.int32)
    nothing = np.full(N_FEATURES, -1, np.int32)
    for remap, width in ((panel, N_FEATURES), (drops, 40), (repeats, 3), (repeats, 11), (nothing, 5)):
        for target_sum in (0.0, 100.0):
            batch = example(5, remap=remap)
            assert batch.sources["identity"].tolist() == [0]
            rows = check(launcher, batch, width, target_sum=target_sum, log1p=bool(target_sum))
            assert rows.any() == (remap is not nothing)


def test_sources_with_remaps_of_their_own(launcher: Any) -> None:
    rng = np.random.default_rng(6)
    remaps = [np.arange(N_FEATURES, dtype=np.int32), rng.permutation(N_FEATURES).astype(np.int32)]
    remaps.append(np.where(remaps[1] % 2, remaps[1], -1).astype(np.int32))
    check(launcher, example(6, remaps=remaps, row_source=[0, 1, 2, 0, 1, 2, 2, 0]), target_sum=1e3)


def test_rows_in_any_order_and_repeated(launcher: Any) -> None:
    order = [4, 2, 2, 0, 7, 1, 6, 2, 5]
    rows = check(launcher, example(7, order=order))
    np.testing.assert_array_equal(rows, check(launcher, example(7))[order])


@pytest.mark.parametrize("block", [32, 64, 96, 256])
@pytest.mark.parametrize("grid", [1, 3, 20])
def test_launch_shapes(launcher: Any, grid: int, block: int) -> None:
    """Fewer warps than blocks of 128, more rows than blocks of threads, and the other way round."""
    batch = example(8, n=1_500, lengths=(1_500, 10, 0, 900), chunk=512, count="u2")
    check(launcher, batch, 1_500, grid=grid, block=block, target_sum=1e4)


def test_a_row_of_many_segments(launcher: Any) -> None:
    """One segment per block, each in a chunk of its own."""
    batch = example(9, n=1_000, lengths=(900, 5, 800), chunk=128)
    assert np.diff(batch.row_ptr).max() == 8
    for block in (32, 128, 256):
        check(launcher, batch, 1_000, block=block, target_sum=10.0)


def test_counts_of_every_size(launcher: Any) -> None:
    """Around the table of small counts, and where float16 and float32 round."""
    counts = np.r_[0:130, 2_047:2_053, 65_503:65_540, 2**24 - 2 : 2**24 + 4, 2**32 - 3 : 2**32].astype(
        np.uint32
    )
    n = len(counts)
    remaps = [np.arange(n, dtype=np.int32)]
    batch = reference.csr_batch([np.arange(n, dtype=np.uint16)], [counts], remaps=remaps)
    for kind in KINDS:
        for target_sum in (0.0, 1e6):
            for log1p in (False, True):
                check(launcher, batch, n, kind=kind, target_sum=target_sum, log1p=log1p)


def test_float16_and_bfloat16_round_to_even(launcher: Any) -> None:
    counts = np.random.default_rng(10).integers(0, 70_000, 2_000).astype(np.uint32)
    counts[:4] = 2_049, 2_051, 257, 259  # ties
    remaps = [np.arange(2_000, dtype=np.int32)]
    batch = reference.csr_batch([np.arange(2_000, dtype=np.uint16)], [counts], remaps=remaps)
    half = check(launcher, batch, 2_000, kind="f16")[0].view(np.float16)
    assert half[:2].tolist() == [2_048, 2_052]
    brain = check(launcher, batch, 2_000, kind="bf16")[0].astype(np.uint32) << 16
    assert brain.view(np.float32)[2:4].tolist() == [256, 260]


def test_log1p_is_exact_enough_from_tiny_to_huge(launcher: Any) -> None:
    """One count per row, so that target_sum is the number itself."""
    numbers = np.concatenate([[1e-30, 1e-10], np.geomspace(1e-7, 1e9, 150), np.linspace(0.4, 0.6, 40)])
    remaps = [np.arange(1, dtype=np.int32)]
    batch = reference.csr_batch([np.zeros(1, np.uint8)], [np.ones(1, np.uint8)], remaps=remaps)
    found = [
        reference.run_dense(launcher, batch, 1, target_sum=float(x), log1p=True, grid=1, block=32)[0][0, 0]
        for x in numbers
    ]
    exact = np.log1p(numbers.astype(np.float32).astype(np.float64))
    assert np.abs(found / exact - 1).max() <= 2e-6


def test_sums_of_repeated_columns_wrap_and_totals_do_not(launcher: Any) -> None:
    counts = np.full(3, 2**31, np.uint32)
    remaps = [np.zeros(3, np.int32)]
    batch = reference.csr_batch([np.arange(3, dtype=np.uint8)], [counts], remaps=remaps)
    assert check(launcher, batch, 1)[0, 0] == 2**31
    assert check(launcher, batch, 1, target_sum=3.0)[0, 0] == 1.0


def test_no_rows_and_no_features(launcher: Any) -> None:
    rows, status, flag = reference.run_dense(launcher, example(11, order=[]), N_FEATURES)
    assert rows.shape == (0, N_FEATURES)
    assert flag == 0
    batch = example(11, remap=np.full(N_FEATURES, -1, np.int32))
    rows, status, flag = reference.run_dense(launcher, batch, 0, log1p=True, target_sum=1.0)
    assert rows.shape == (len(LENGTHS), 0)
    assert flag == 0
    assert not status.any()


def two_blocks(index: str = "u2", count: str = "u2") -> Batch:
    """One row over two blocks, in a chunk for the indices and one for the counts."""
    return example(12, lengths=(200,), index=index, count=count)


def refused(launcher: Any, batch: Batch, n_features: int = N_FEATURES) -> list[int]:
    """Status after a launch; it is the reference's, and no canary is touched."""
    expected = reference.rowpack_sums(batch, n_features)[2]
    for tile in (n_features, 64):
        _, status, flag = reference.run_dense(launcher, batch, n_features, tile=tile)
        np.testing.assert_array_equal(status, expected)
        assert flag == np.bitwise_or.reduce(status)
    return list(status.tolist())


def test_columns_outside_the_features_are_refused(launcher: Any) -> None:
    for m in (N_FEATURES - 1, 10, 0):
        batch = two_blocks()
        batch.sources["remap_length"] = min(m, int(batch.runs["n"][0]))
        largest = int(reference.decode_block(batch, batch.runs[0], 1)[:72].max())
        assert refused(launcher, batch) == [BAD_COLUMN if largest >= m else 0, 0]


def test_remaps_that_point_outside_the_output_are_refused(launcher: Any) -> None:
    for wrong in (N_FEATURES, 2**31 - 1, -2, -(2**31)):
        batch = example(
            12, lengths=(300,), remap=np.r_[np.arange(150), wrong, np.arange(151, 300)].astype(np.int32)
        )
        assert refused(launcher, batch) == [BAD_PLACE] + [0] * (len(batch.pieces) - 1)
    assert refused(launcher, two_blocks(), n_features=100)[0] == BAD_PLACE  # identity, to fewer features


def test_tables_that_lie_are_refused(launcher: Any) -> None:
    def changed(table: str, **fields: int) -> list[int]:
        batch = two_blocks()
        for name, value in fields.items():
            getattr(batch, table)[name][0] = value
        return refused(launcher, batch)

    both = [BAD_RECORD, BAD_RECORD]
    assert changed("pieces", run=9) == [BAD_RECORD, 0]
    assert changed("pieces", run=2**32 - 1) == [BAD_RECORD, 0]
    assert changed("pieces", source=1) == [BAD_PLACE, 0]
    assert changed("sources", identity=0, remap_start=1) == [BAD_PLACE, 0]
    assert changed("segments", index_skip=1) == both
    assert changed("segments", count=2**32 - 1) == both
    assert changed("segments", index_skip=2**32 - 128) == [BAD_RECORD, 0]
    assert changed("segments", value_skip=128) == [0, BAD_RECORD]
    assert changed("runs", payload=2**40) == [BAD_RECORD, 0]
    assert changed("segments", count=0) == [0, 0]


def test_segments_without_a_piece_set_any(launcher: Any) -> None:
    for name in ("index_piece", "value_piece"):
        batch = two_blocks()
        batch.segments[name] = 2
        _, status, flag = reference.run_dense(launcher, batch, N_FEATURES)
        assert (status.tolist(), flag) == ([0, 0], BAD_RECORD)


def test_row_ptr_that_lies_sets_any_and_the_row_is_zeros(launcher: Any) -> None:
    for row_ptr in ([0, 2], [1, 0], [0, 2**32 - 1]):
        batch = two_blocks()
        batch.row_ptr = np.array(row_ptr, np.uint32)
        rows, status, flag = reference.run_dense(launcher, batch, N_FEATURES)
        assert (status.tolist(), flag) == ([0, 0], BAD_PLACE)
        assert not rows.any()


def test_no_room_for_a_tile_sets_any(launcher: Any) -> None:
    _, status, flag = reference.run_dense(launcher, two_blocks(), N_FEATURES, tile=0)
    assert (status.tolist(), flag) == ([0, 0], BAD_PLACE)


def test_eight_byte_elements_are_refused(launcher: Any) -> None:
    assert refused(launcher, two_blocks(index="u8", count="u8")) == [BAD_RECORD, BAD_RECORD]


def test_each_bad_piece_is_named_and_the_other_rows_are_right(launcher: Any) -> None:
    """Of six rows in twelve chunks, two have exceptions out of order."""
    stage, pieces, segments = Stage(), [], []
    for row in range(6):
        counts = np.ones(128, np.uint32)
        counts[[3, 90]] = 2**20
        chunk = bytearray(rowpack.encode_rowpack(counts))
        if row in (1, 4):
            patch = rowpack_format.read_header(chunk).patch_start
            chunk[patch], chunk[patch + 1] = chunk[patch + 1], chunk[patch]
        pieces.append(
            piece(stage.add(rowpack.encode_rowpack(np.arange(128, dtype=np.uint16), "gaps")), 0, 128)
        )
        pieces.append(piece(stage.add(bytes(chunk)), 0, 128, role=1))
        segments.append(np.array((2 * row, 2 * row + 1, 0, 0, 128, 0), SEGMENT))
    sources, remap = reference.remap_tables([np.arange(128, dtype=np.int32)])
    tables = reference.records(RUN, stage.runs), reference.records(PIECE, pieces)
    batch = Batch(
        stage.arena(), *tables, sources, remap, reference.records(SEGMENT, segments), np.arange(7, dtype="u4")
    )
    for block in (32, 256):
        rows, status, flag = reference.run_dense(launcher, batch, 128, block=block, grid=2)
        assert flag == BAD_PATCH
        assert np.flatnonzero(status).tolist() == [3, 9]
        for row in (0, 2, 3, 5):
            np.testing.assert_array_equal(rows[row], counts)
