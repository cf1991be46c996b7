"""Fragments as intervals: per row, as flat arrays, as a table."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest

from hbx_gpu.chromatin import fragments_frame, fragments_of, read_fragments
from hbx_gpu.chromatin._intervals import FRAGMENT, observed_sizes
from hbx_gpu.errors import InvalidDataError
from tests.chromatin.cases import NAMES, InMemory, fragments

ROWS = [[(0, 5, 3), (3, 2**32 - 1, 2)], [], [(2, 7, 0), (0, 1, 1)], [(3, 4, 6)]]
UIDS = ["a", "b", "c", "d"]


def test_intervals_per_row() -> None:
    found = fragments_of(fragments(ROWS))
    assert [row.tolist() for row in found] == [
        [(0, 5, 8), (3, 2**32 - 1, 2**32 + 1)],
        [],
        [(2, 7, 7), (0, 1, 2)],
        [(3, 4, 10)],
    ]
    assert all(row.dtype == FRAGMENT for row in found)
    assert fragments_of(fragments([])) == []
    assert [len(row) for row in fragments_of(fragments([[]]))] == [0]


def test_flat_arrays_as_homeobox_has_them(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("hbx_gpu.chromatin._intervals._ROWS_AT_ONCE", 3)
    obs = pd.DataFrame({"x": range(4)}, index=UIDS)
    found = read_fragments(InMemory(ROWS), obs, NAMES)
    assert found.chromosomes.tolist() == [0, 3, 2, 0, 3]
    assert found.starts.tolist() == [5, 2**32 - 1, 7, 1, 4]
    assert found.lengths.tolist() == [3, 2, 0, 1, 6]
    assert found.offsets.tolist() == [0, 2, 2, 4, 5]
    assert found.offsets.dtype == np.int64
    assert found.chrom_names == NAMES
    assert found.obs is obs
    assert len(found) == 5


def test_as_a_table() -> None:
    frame = fragments_frame(InMemory(ROWS), UIDS, NAMES)
    assert frame.to_dict("list") == {
        "uid": ["a", "a", "c", "c", "d"],
        "chrom": ["chr1", "chrX", np.nan, "chr1", "chrX"],  # one chromosome was deleted
        "start": [5, 2**32 - 1, 7, 1, 4],
        "end": [8, 2**32 + 1, 7, 2, 10],
    }
    assert frame["start"].dtype == frame["end"].dtype == np.int64
    assert frame["chrom"].cat.categories.tolist() == ["chr1", "chr10", "chrX"]


def test_two_assemblies_share_a_name_in_a_table() -> None:
    frame = fragments_frame(InMemory(ROWS), UIDS, ["chr1", "chr2", "chr3", "chr1"])
    assert frame["chrom"].tolist() == ["chr1", "chr1", "chr3", "chr1", "chr1"]


def test_an_empty_dataset() -> None:
    frame = fragments_frame(InMemory([]), [], NAMES)
    assert len(frame) == 0
    assert frame.columns.tolist() == ["uid", "chrom", "start", "end"]
    found = read_fragments(InMemory([]), pd.DataFrame(), NAMES)
    assert found.offsets.tolist() == [0]


def test_what_does_not_fit() -> None:
    with pytest.raises(InvalidDataError, match="obs has 3 entries, but the dataset has 4 rows"):
        fragments_frame(InMemory(ROWS), UIDS[:3], NAMES)
    with pytest.raises(
        InvalidDataError, match="chromosome_names has 2 entries, but the dataset has 4 columns"
    ):
        fragments_frame(InMemory(ROWS), UIDS, NAMES[:2])
    batch = fragments(ROWS)
    batch.layers = {}
    with pytest.raises(InvalidDataError, match="needs the layers"):
        fragments_of(batch)


def test_sizes_that_fragments_show() -> None:
    assert observed_sizes(InMemory(ROWS), NAMES) == {"chr1": 8, "chrX": 2**32 + 1}
