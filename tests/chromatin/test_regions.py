"""Bins and peaks: their columns, what they are read from, and what is refused."""

from __future__ import annotations

import gzip
import pickle
from pathlib import Path

import numpy as np
import pandas as pd
import pyarrow as pa
import pytest

from hbx_gpu.chromatin import Bins, Peaks
from hbx_gpu.chromatin._chromosomes import registered
from hbx_gpu.errors import InvalidDataError

THREE = [("chr2", 5, 9), ("chr1", 0, 10), ("chr1", 30, 40)]
BED = """track name=peaks
browser position chr1
# a comment
chr2\t5\t9\tname\t100
chr1\t0\t10

chr1 30 40
"""


def test_columns_of_bins() -> None:
    regions = Bins(100, {"chr2": 250, "chr1": 100, "chrM": 1}).over(["chr1", "chr2"])
    assert regions.feature_uids.tolist() == [
        "chr2:0-100",
        "chr2:100-200",
        "chr2:200-250",
        "chr1:0-100",
        "chrM:0-1",
    ]
    assert regions.n_features == 5
    assert regions.column_numbers().tolist() == [1, 1, 1, 0, -1]
    assert "5 bins of 100 bases" in repr(regions)


def test_registered_sizes_keep_the_registry_order() -> None:
    regions = Bins(10).over(["chr1", None, "chr2"], {"chr2": 10, "chr1": 11})
    assert regions.feature_uids.tolist() == ["chr1:0-10", "chr1:10-11", "chr2:0-10"]


@pytest.mark.parametrize("text", ["chr2\t20\nchr1\t15\n", "chr2\t20\t6\t60\t61\nchr1\t15\t30\t60\t61\n"])
def test_sizes_from_a_file(tmp_path: Path, text: str) -> None:
    path = tmp_path / "genome.fai"
    path.write_text("# sizes\n" + text)
    for given in (path, str(path)):
        assert Bins(10, given).over(["chr1"]).feature_uids.tolist() == [
            "chr2:0-10",
            "chr2:10-20",
            "chr1:0-10",
            "chr1:10-15",
        ]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("chr1\n", "line 1: expected"),
        ("chr1\t0\n", "positive"),
        ("chr1 x\n", "positive"),
        ("a 1\na 2\n", "twice"),
    ],
)
def test_broken_files_of_sizes(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "sizes"
    path.write_text(text)
    with pytest.raises(InvalidDataError, match=message):
        Bins(10, path).over(["chr1"])


@pytest.mark.parametrize("size", [0, -5, 1.5, float("inf"), "x", None])
def test_broken_sizes(size: object) -> None:
    with pytest.raises(InvalidDataError, match="positive number of bases"):
        Bins(10, {"chr1": size}).over(["chr1"])  # type: ignore[dict-item]


@pytest.mark.parametrize("width", [0, -1, 2.5, True])
def test_broken_widths(width: int) -> None:
    with pytest.raises(InvalidDataError, match="positive number of bases wide"):
        Bins(width)


def test_bins_without_sizes_say_what_to_do() -> None:
    with pytest.raises(InvalidDataError, match=r"registry does not say for \['chr1'\].*chromosome_sizes="):
        Bins(5000).over(["chr1"])


def test_more_bins_than_columns() -> None:
    with pytest.raises(InvalidDataError, match="wider bins"):
        Bins(1, {"chr1": 2**31}).over(["chr1"])


@pytest.mark.parametrize("matrix", [Bins(10, {"1": 50}), Peaks([("1", 2, 3)])])
def test_two_spellings(matrix: Bins | Peaks) -> None:
    with pytest.raises(
        InvalidDataError, match=r"no chromosome in common: \['1'\] against \['chr1', 'chr2'\]"
    ):
        matrix.over(["chr1", "chr2"])


def test_an_unknown_way_to_count() -> None:
    for make in (lambda: Bins(10, count="reads"), lambda: Peaks([], count="reads")):
        with pytest.raises(ValueError, match="'fragments', 'insertions', 'paired', 'binary', got 'reads'"):
            make()


@pytest.mark.parametrize("suffix", ["bed", "bed.gz"])
def test_peaks_from_bed(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"peaks.{suffix}"
    path.write_bytes(gzip.compress(BED.encode()) if suffix.endswith("gz") else BED.encode())
    for given in (path, str(path)):
        check_three(Peaks(given))


def test_peaks_from_tables() -> None:
    frame = pd.DataFrame(THREE, columns=["chrom", "start", "end"]).assign(name="x")
    for table in (
        frame,
        frame.astype({"chrom": "category", "start": np.uint32, "end": float}),
        pa.Table.from_pandas(frame),
        frame.to_dict("list"),
        THREE,
        (row for row in THREE),
    ):
        check_three(Peaks(table))


def check_three(peaks: Peaks) -> None:
    assert len(peaks) == 3
    assert peaks.over(["chr1", "chr2"]).feature_uids.tolist() == ["chr2:5-9", "chr1:0-10", "chr1:30-40"]


@pytest.mark.parametrize(
    ("table", "message"),
    [
        ([("chr1", 5, 5)], r"peak 0 is chr1:5-5; a peak needs 0 <= start < end"),
        ([("chr1", 0, 2), ("chr1", -1, 5)], "peak 1 is"),
        ([("chr1", 0, 2), ("chr2", 0, 2), ("chr1", 0, 2)], "chr1:0-2 is listed more than once"),
        ([("chr1", 0)], "triples"),
        (["chr1:0-5"], "triples"),
        ({"chrom": ["chr1"], "start": [0]}, r"\['end'\] missing"),
        ({"chrom": ["chr1"], "start": [0.5], "end": [3]}, "'start' of the peaks must hold whole numbers"),
        ({"chrom": ["chr1"], "start": [0], "end": [np.nan]}, "'end' of the peaks must hold whole numbers"),
        ({"chrom": ["chr1"], "start": ["a"], "end": [3]}, "'start' of the peaks must hold whole numbers"),
    ],
)
@pytest.mark.filterwarnings("ignore:invalid value encountered in cast")
def test_broken_peaks(table: object, message: str) -> None:
    with pytest.raises(InvalidDataError, match=message):
        Peaks(table)


@pytest.mark.parametrize("line", ["chr1\t5", "chr1\tx\t9"])
def test_broken_bed(tmp_path: Path, line: str) -> None:
    path = tmp_path / "peaks.bed"
    path.write_text(f"chr1\t0\t10\n{line}\n")
    with pytest.raises(
        InvalidDataError, match=r"peaks.bed, line 2: expected a chromosome, a start and an end"
    ):
        Peaks(path)
    path.write_text("chr1\t9\t2\n")
    with pytest.raises(InvalidDataError, match=r"peaks.bed: peak 0 is chr1:9-2"):
        Peaks(path)


def test_regions_travel_without_their_names() -> None:
    regions = Bins(10, {"chr1": 100_000}).over(["chr1"])
    names = regions.feature_uids
    assert len(pickle.dumps(regions)) < 5000
    again = pickle.loads(pickle.dumps(regions))
    assert np.array_equal(again.feature_uids, names)


def test_names_and_sizes_of_a_registry() -> None:
    frame = pd.DataFrame(
        {"sequence_name": ["chr1", "chr2", None], "sequence_length": [10, 20, 30], "name": "other"},
        index=["u1", "u2", "u3"],
    )
    names, sizes = registered(frame, ["u3", None, "u1"])
    assert names.tolist() == ["u3", None, "chr1"]
    assert sizes == {"u3": 30, "chr1": 10}
    names, sizes = registered(frame.assign(sequence_length=[10, np.nan, np.nan]), ["u2", "u1"])
    assert sizes == {"chr1": 10}
    names, sizes = registered(pd.DataFrame(index=["chr1"]), ["chr1"])
    assert names.tolist() == ["chr1"]
    assert sizes == {}


def test_one_name_in_two_assemblies() -> None:
    frame = pd.DataFrame({"sequence_name": ["chr1", "chr1"]}, index=["human", "mouse"])
    with pytest.raises(InvalidDataError, match=r"called 'chr1' \(uids 'human' and 'mouse'\).*features"):
        registered(frame, ["human", "mouse"])
    assert registered(frame, ["mouse"])[0].tolist() == ["chr1"]
    with pytest.raises(InvalidDataError, match="called 'chr1'"):
        Bins(10, {"chr1": 5}).over(["chr1", "chr1"])
