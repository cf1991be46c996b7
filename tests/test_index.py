"""The compact index says of every row what the plain one says, in a few bytes."""

from __future__ import annotations

import pickle
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hbx_gpu._plan import index as module
from hbx_gpu._plan.index import CompactIndex, IndexMaker, compacted
from hbx_gpu._source import GroupRuns, RowIndex, RowTable
from hbx_gpu.atlas._query.ids import IdMaker, id_runs
from hbx_gpu.testing import example_dataset, example_groups


def equal(found: RowTable, rows: RowIndex) -> bool:
    return all(np.array_equal(getattr(found, name), getattr(rows, name)) for name in rows.__slots__)


def made(rows: RowIndex, parts: int = 3) -> CompactIndex:
    maker = IndexMaker()
    for cut in np.array_split(np.arange(len(rows)), parts):
        part = rows.at(cut)
        maker.add(part.source, part.start, part.length)
    return maker.finish()


@st.composite
def indexes(draw: st.DrawFn) -> RowIndex:
    """Segments in order, with gaps of all sizes, rows without data, and jumps back."""
    rng = np.random.default_rng(draw(st.integers(0, 99)))
    n = draw(st.integers(0, 400))
    length = rng.integers(0, draw(st.sampled_from([2, 300, 90_000])), n).astype(np.int32)
    source = np.sort(rng.integers(-1, draw(st.integers(1, 9)), n)).astype(np.int32)
    gaps = rng.choice([0, 1, 300, 70_000, 2**33], n, p=draw(st.sampled_from(
        [(1, 0, 0, 0, 0), (0.9, 0.1, 0, 0, 0), (0.5, 0.1, 0.2, 0.1, 0.1), (0, 0, 0.9, 0.1, 0)]
    )))  # fmt: skip
    start = np.cumsum(length.astype(np.int64) + gaps) - length
    start[source < 0] = length[source < 0] = 0
    order = rng.permutation(n) if draw(st.integers(0, 3)) == 0 else np.arange(n)
    return RowIndex(source, start, length).at(order)


@settings(max_examples=150, deadline=None)
@given(rows=indexes(), parts=st.integers(1, 5), seed=st.integers(0, 9))
def test_a_compact_index_says_what_the_plain_one_says(rows: RowIndex, parts: int, seed: int) -> None:
    index = made(rows, parts)
    assert equal(index, rows)
    assert equal(index.plain(), rows)
    chosen = np.random.default_rng(seed).integers(0, max(len(rows), 1), 60 * bool(len(rows)))
    for some in (chosen, np.sort(chosen)):
        assert equal(index.at(some), rows.at(some))
    assert equal(index.slice(len(rows) // 3, len(rows) // 2), rows.slice(len(rows) // 3, len(rows) // 2))
    assert np.array_equal(np.asarray(index.groups()), rows.source)
    assert equal(CompactIndex(**index.arrays()), rows)
    assert equal(compacted(index), rows)
    for table in (index, rows):  # what holds the outermost rows of each source holds all of them
        outermost, ends = table.outermost(), rows.start + rows.length
        if table is index:
            first = index.run_first
            assert equal(outermost, rows.at(np.concatenate([first[:-1], first[1:] - 1])))
        for source in np.unique(rows.source).tolist():
            of_all, of_some = rows.source == source, outermost.source == source
            assert outermost.start[of_some].min() == rows.start[of_all].min()
            assert (outermost.start + outermost.length)[of_some].max() == ends[of_all].max()
    assert equal(compacted(rows), rows)


def test_an_index_made_of_many_blocks_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    rows = realistic(2_000)
    some = rows.at(np.flatnonzero(np.random.default_rng(0).random(2_000) < 0.4))
    monkeypatch.setattr(module, "_BLOCKS_AT_ONCE", 1)
    for table in (rows, some, some.at(np.arange(len(some))[::-1])):
        assert equal(made(table), table)


def realistic(n: int = 300_000, groups: int = 12) -> RowIndex:
    """Cells of about 2,000 stored values each, some of more than 10,000, in groups of unequal size."""
    rng = np.random.default_rng(4)
    length = np.clip(rng.lognormal(7.6, 0.6, n), 200, 40_000).astype(np.int32)
    source = np.sort(rng.choice(groups, n, p=rng.dirichlet(np.ones(groups)))).astype(np.int32)
    ends = np.cumsum(length.astype(np.int64))
    first = np.searchsorted(source, source)  # of the row's group
    return RowIndex(source, ends - length - (ends - length)[first], length)


def test_bytes_per_row_of_atlases_as_they_are() -> None:
    rows = realistic()
    rng = np.random.default_rng(5)
    n = len(rows)
    cases = {
        "all cells": np.arange(n),
        "a filter that keeps a third": np.flatnonzero(rng.random(n) < 0.33),
        "a filter that keeps whole samples": np.flatnonzero(np.repeat(rng.random(n // 500) < 0.3, 500)),
        "nine of ten cells, for training": np.flatnonzero(rng.random(n) < 0.9),
    }
    for name, kept in cases.items():
        index = compacted(rows.at(kept))
        assert isinstance(index, CompactIndex)
        assert index.nbytes / len(index) < (2.5 if name == "all cells" else 4.5), name
    shuffled = compacted(rows.at(rng.permutation(n)))
    assert isinstance(shuffled, RowIndex), "no runs: 16 bytes per row as they are"


def test_long_rows_and_short_ones_have_types_of_their_own() -> None:
    start = np.arange(1000, dtype=np.int64)
    for length, kind in ((1, np.uint8), (300, np.uint16), (70_000, np.uint32)):
        rows = RowIndex(np.zeros(1000, np.int32), start * length, np.full(1000, length, np.int32))
        index = made(rows)
        assert index.lengths.dtype == kind
        assert len(index.gaps) == 0
        assert len(index.run_source) == 1
        assert equal(index, rows)


def test_datasets_keep_the_compact_index_and_pickle_it(tmp_path: Path) -> None:
    dataset = example_dataset(tmp_path, example_groups())
    assert isinstance(dataset.row_index, CompactIndex)
    again = pickle.loads(pickle.dumps(dataset))
    assert isinstance(again.row_index, CompactIndex)
    rows = np.random.default_rng(0).permutation(len(dataset))[: len(dataset) // 2]
    some = dataset.subset(rows)
    for one in (again, some, some.subset(np.arange(len(rows)))):
        assert isinstance(one.group_runs, GroupRuns)
        assert np.array_equal(np.asarray(one.group_runs), one.groups_np)
        assert np.array_equal(one.groups_of(np.arange(5)), one.groups_np[:5])
    assert np.array_equal(some.groups_np, dataset.groups_np[rows])
    assert np.array_equal(some.row_lengths, dataset.row_lengths[rows])
    batch, whole = some[np.arange(9)], dataset[rows[:9]]
    assert np.array_equal(batch.values, whole.values)
    assert np.array_equal(batch.indices, whole.indices)


def test_the_identity_of_rows_does_not_depend_on_how_they_are_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    dataset = example_dataset(tmp_path, example_groups())
    expected = dataset.identity()
    monkeypatch.setattr("hbx_gpu._datasets.subsets._AT_ONCE", 7)
    monkeypatch.setattr(module, "_AT_ONCE", 5)
    assert dataset.subset(np.arange(len(dataset))).identity()["rows"] == expected["rows"]
    assert dataset.subset(np.arange(len(dataset))[::-1]).identity()["rows"] != expected["rows"]


@settings(max_examples=60, deadline=None)
@given(ids=st.lists(st.integers(0, 60), unique=True), ordered=st.booleans(), parts=st.integers(1, 4))
def test_row_ids_as_runs(ids: list[int], ordered: bool, parts: int) -> None:
    array = np.array(sorted(ids) if ordered else ids, np.uint64)
    maker = IdMaker()
    for part in np.array_split(array, parts):
        maker.add(part)
    runs = maker.finish()
    assert np.array_equal(runs.all(), array)
    assert runs.ascending == bool((np.diff(array.astype(np.int64)) > 0).all())
    assert np.array_equal(runs[np.arange(len(array))], array)
    assert len(id_runs(np.arange(5, 500, dtype=np.uint64)).first) == 1
