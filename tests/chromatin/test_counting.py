"""Counting fragments: the kernels against the definition, and the definition against examples by hand."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings

from hbx_gpu.batch import SparseBatch
from hbx_gpu.chromatin import Bins, Peaks, Regions, count_fragments
from hbx_gpu.chromatin._reference import reference_counts
from hbx_gpu.chromatin._regions import COUNTS
from hbx_gpu.errors import CorruptDataError, InvalidDataError
from tests.chromatin.cases import NAMES, batches, bins, dense, fragments, peaks

ONE = ["chr1"]


def counted(rows: list[list[tuple[int, int, int]]], regions: Regions) -> list[list[int]]:
    batch = fragments(rows)
    found = dense(count_fragments(batch, regions))
    assert np.array_equal(found, reference_counts(batch, regions))
    result: list[list[int]] = found.tolist()
    return result


@settings(deadline=None, max_examples=150)
@given(batch=batches, regions=bins())
def test_bins_equal_the_reference(batch: SparseBatch, regions: Regions) -> None:
    check(batch, regions)


@settings(deadline=None, max_examples=150)
@given(batch=batches, regions=peaks())
def test_peaks_equal_the_reference(batch: SparseBatch, regions: Regions) -> None:
    check(batch, regions)


def check(batch: SparseBatch, regions: Regions) -> None:
    batch.metadata = {"row": np.arange(len(batch))}
    found = count_fragments(batch, regions)
    assert np.array_equal(dense(found), reference_counts(batch, regions))
    assert found.indices.dtype == np.int32
    assert found.values.dtype == np.uint32
    assert found.offsets.dtype == np.int64
    assert found.offsets[0] == 0
    assert len(found.indices) == len(found.values) == found.offsets[-1]
    assert len(found) == len(batch)
    assert found.n_features == regions.n_features == len(regions.feature_uids)
    assert found.metadata is batch.metadata
    assert not found.layers


@pytest.mark.parametrize(
    ("count", "expected"),
    [
        ("fragments", [1, 1, 1, 0]),
        ("insertions", [1, 0, 1, 0]),
        ("paired", [1, 0, 1, 0]),
        ("binary", [1, 0, 1, 0]),
    ],
)
def test_a_fragment_across_two_borders(count: str, expected: list[int]) -> None:
    regions = Bins(10, {"chr1": 40}, count=count).over(ONE)
    assert counted([[(0, 9, 12)]], regions) == [expected]


@pytest.mark.parametrize(
    ("count", "expected"), [("fragments", 2), ("insertions", 4), ("paired", 2), ("binary", 1)]
)
def test_two_fragments_inside_one_region(count: str, expected: int) -> None:
    rows = [[(0, 2, 3), (0, 4, 2)]]
    assert counted(rows, Bins(10, {"chr1": 10}, count=count).over(ONE)) == [[expected]]
    assert counted(rows, Peaks([("chr1", 1, 9)], count=count).over(ONE)) == [[expected]]


@pytest.mark.parametrize(
    ("count", "expected"), [("fragments", 1), ("insertions", 0), ("paired", 0), ("binary", 0)]
)
def test_a_fragment_around_a_peak(count: str, expected: int) -> None:
    assert counted([[(0, 0, 100)]], Peaks([("chr1", 40, 50)], count=count).over(ONE)) == [[expected]]


def test_borders_are_half_open() -> None:
    # [10, 20) meets neither [0, 10) nor [20, 30).
    for count in COUNTS:
        assert counted(
            [[(0, 10, 10)]], Peaks([("chr1", 0, 10), ("chr1", 20, 30)], count=count).over(ONE)
        ) == [[0, 0]]
    assert counted([[(0, 10, 10)]], Bins(10, {"chr1": 30}, count="insertions").over(ONE)) == [[0, 2, 0]]


def test_one_base_has_two_cuts() -> None:
    assert counted([[(0, 5, 1)]], Bins(10, {"chr1": 10}, count="insertions").over(ONE)) == [[2]]


@pytest.mark.parametrize("count", COUNTS)
def test_without_length_nothing_is_counted(count: str) -> None:
    rows = [[(0, 5, 0), (0, 10, 0)]]
    assert counted(rows, Bins(10, {"chr1": 20}, count=count).over(ONE)) == [[0, 0]]
    assert counted(rows, Peaks([("chr1", 0, 20)], count=count).over(ONE)) == [[0]]


def test_overlapping_peaks_count_one_fragment_each() -> None:
    regions = Peaks([("chr1", 0, 100), ("chr1", 10, 20), ("chr1", 15, 60), ("chr1", 70, 80)]).over(ONE)
    assert counted([[(0, 16, 10)], [(0, 65, 7)], [(0, 200, 5)]], regions) == [
        [1, 1, 1, 0],
        [1, 0, 0, 1],
        [0, 0, 0, 0],
    ]


def test_a_long_peak_is_found_behind_many_short_ones() -> None:
    short = [("chr1", 10 * k, 10 * k + 2) for k in range(1, 500)]
    regions = Peaks([*short, ("chr1", 0, 10_000)]).over(ONE)
    row = counted([[(0, 4995, 3)]], regions)[0]
    assert row[-1] == 1
    assert sum(row) == 1


def test_columns_are_those_of_the_list_not_of_the_genome() -> None:
    regions = Peaks([("chrX", 5, 9), ("chr1", 30, 40), ("chr1", 0, 10)]).over(NAMES)
    assert regions.feature_uids.tolist() == ["chrX:5-9", "chr1:30-40", "chr1:0-10"]
    assert counted([[(0, 1, 2), (0, 35, 1), (3, 0, 6), (0, 36, 1)]], regions) == [[1, 2, 1]]


def test_the_far_end_of_a_chromosome() -> None:
    start, size = 2**32 - 2, 2**32 + 10
    for count, expected in (("fragments", [1, 1]), ("insertions", [1, 1])):
        regions = Bins(2**32, {"chr1": size}, count=count).over(ONE)
        assert counted([[(0, start, 5)]], regions) == [expected]
    assert regions.feature_uids.tolist() == ["chr1:0-4294967296", "chr1:4294967296-4294967306"]
    # Beyond the size there are no bins: only what lies before it counts.
    short = Bins(10, {"chr1": 25}, count="insertions").over(ONE)
    assert short.feature_uids.tolist() == ["chr1:0-10", "chr1:10-20", "chr1:20-25"]
    assert counted([[(0, 22, 8), (0, 25, 3), (0, start, 9)]], short) == [[0, 0, 1]]


def test_chromosomes_without_regions_are_left_out() -> None:
    rows = [[(0, 1, 2), (1, 1, 2), (2, 1, 2), (3, 1, 2)]]
    assert counted(rows, Bins(10, {"chrX": 10, "chr7": 15}).over(NAMES)) == [[1, 0, 0]]
    assert counted(rows, Peaks([("chr7", 0, 9), ("chr10", 0, 9)]).over(NAMES)) == [[0, 1]]


def test_fragments_in_any_order_and_repeated() -> None:
    regions = Bins(10, {"chr1": 50, "chrX": 20}).over(NAMES)
    rows = [[(3, 12, 3), (0, 41, 2), (0, 3, 2), (3, 11, 1), (0, 3, 2), (0, 41, 2)], [], [(0, 0, 1)]]
    assert counted(rows, regions) == [[2, 0, 0, 0, 2, 0, 2], [0] * 7, [1, *[0] * 6]]


def test_nothing_at_all() -> None:
    nothing: list[list[Any]] = [[], [[]], [[], []]]
    for rows in nothing:
        found = count_fragments(fragments(rows), Bins(10, {"chr1": 50}).over(NAMES))
        assert found.offsets.tolist() == [0] * (len(rows) + 1)
        assert found.indices.dtype == np.int32
        assert len(found.values) == 0
    none = Peaks([]).over(NAMES)
    assert count_fragments(fragments([[(0, 1, 1)]]), none).n_features == 0


def test_room_grows_with_what_is_hit() -> None:
    narrow = Bins(1, {"chr1": 10_000}, count="fragments").over(ONE)
    assert (
        counted([[(0, 3, 2)], [(0, 10, 5000)], [(0, 0, 9000)]], narrow)[1]
        == [0] * 10 + [1] * 5000 + [0] * 4990
    )
    nested = Peaks([("chr1", k, 1000 - k) for k in range(400)], count="insertions").over(ONE)
    assert counted([[(0, 450, 100)] * 5, [(0, 0, 1)]], nested) == [[10] * 400, [2] + [0] * 399]


def test_columns_far_from_genome_order() -> None:
    rng = np.random.default_rng(0)
    places = rng.permutation(300) * 10
    regions = Peaks([("chr1", int(p), int(p) + 8) for p in places]).over(ONE)
    counted([[(0, 10 * k, 3) for k in range(300)], [(0, 10 * k, 25) for k in range(0, 300, 3)]], regions)


def test_short_lengths_are_not_added_in_their_own_type() -> None:
    batch = fragments([[(0, 2**32 - 1, 2**16 - 1)]], np.uint16)
    regions = Peaks([("chr1", 2**32 + 2**16 - 3, 2**32 + 2**16)], count="insertions").over(ONE)
    assert dense(count_fragments(batch, regions)).tolist() == [[1]]


def test_a_batch_of_one_layer() -> None:
    batch = fragments([[(0, 1, 1)]])
    del batch.layers["lengths"]
    with pytest.raises(InvalidDataError, match=r"\['lengths'\] missing.*read both, with layer="):
        count_fragments(batch, Bins(10, {"chr1": 50}).over(NAMES))


@pytest.mark.parametrize("chromosome", [-1, 1])
def test_a_chromosome_that_the_regions_do_not_know(chromosome: int) -> None:
    batch = fragments([[(0, 1, 1), (chromosome, 1, 1)]])
    with pytest.raises(CorruptDataError, match="laid over 1"):
        count_fragments(batch, Bins(10, {"chr1": 50}).over(ONE))
