"""Obs tables: rows in order, pointers, columns as NumPy, and pointers that cannot be right."""

from __future__ import annotations

import datetime
import itertools
import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import lancedb
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import pytest

from hbx_gpu._buffers import give_back_unused
from hbx_gpu._source import BoxIndex
from hbx_gpu.atlas._catalog.snapshot import Snapshot
from hbx_gpu.atlas._query import encoders, obs
from hbx_gpu.atlas._query.query import AtlasQuery
from hbx_gpu.errors import CorruptDataError, UnknownNameError
from tests import npz

# (atlas, snapshot, table, suffix of its files)
TABLES = [
    ("all_spaces", 0, "cells", "_v0__cells"),
    ("all_spaces", 0, "spots", "_v0__spots"),
    ("cite_multimodal", 0, "cells", "_v0"),
    ("image_tiles", 0, "cells", "_v0"),
    ("legacy_0_2_3", 0, "cells", "_v0"),
    ("missing_shards", 0, "cells", "_v0"),
    ("ragged_rna", 0, "cells", "_v0"),
    ("ragged_rna", 1, "cells", "_v1"),
    ("seed_2026_05", 0, "cells", "_v0"),
    ("single_rna", 0, "cells", "_v0"),
    ("uid_collision", 0, "cells", "_v0"),
]

EPOCH = datetime.datetime(2024, 1, 1)


@pytest.fixture
def with_obs(homeobox_fixtures: Path, tmp_path: Path) -> Callable[[Callable[[pa.Table], pa.Table]], Snapshot]:
    """A copy of the atlas single_rna whose obs table is changed."""

    def make(change: Callable[[pa.Table], pa.Table]) -> Snapshot:
        root = Path(shutil.copytree(homeobox_fixtures / "single_rna" / "atlas", tmp_path / "atlas"))
        database = lancedb.connect(str(root / "lance_db"))
        new = change(database.open_table("cells").to_arrow())
        # Many small fragments: row ids with gaps between them.
        table = database.create_table("cells", new.slice(0, 7), mode="overwrite")
        for start in range(7, len(new), 7):
            table.add(new.slice(start, 7))
        pinned = json.dumps({"cells": table.version})
        database.open_table("atlas_versions").update(values={"obs_table_versions": pinned})
        return Snapshot.open(root)

    return make


def typed(table: pa.Table) -> pa.Table:
    """`table` with columns of every kind, values derived from the row number, those of row 5 missing."""
    n = len(table)

    def column(kind: pa.DataType, value: Callable[[int], object]) -> pa.Array:
        return pa.array([None if i == 5 else value(i) for i in range(n)], type=kind)

    columns = {
        "Cell Type": column(pa.string(), lambda i: "zyx"[i % 3]),
        "start": column(pa.int16(), lambda i: i - 3),
        "end": pa.array(range(n), pa.uint32()),
        "fraction": column(pa.float32(), lambda i: i / 4),
        "flag": column(pa.bool_(), lambda i: i % 2 == 0),
        "grade": column(pa.string(), lambda i: f"g{i % 2}").dictionary_encode(),
        "year": pa.array([2000 + i % 4 for i in range(n)], pa.int32()).dictionary_encode(),
        "moment": column(pa.timestamp("ns", tz="UTC"), lambda i: EPOCH + datetime.timedelta(hours=i)),
        "day": column(pa.date32(), lambda i: EPOCH.date() + datetime.timedelta(days=i)),
        "price": column(pa.decimal128(9, 2), lambda i: i),
        "vector": pa.FixedSizeListArray.from_arrays(pa.array(np.arange(2 * n, dtype=np.float32)), 2),
        "whole_vector": column(pa.list_(pa.int32(), 3), lambda i: [i, i, i]),
        "sizes": column(pa.list_(pa.int64()), lambda i: list(range(i % 3))),
        "tags": column(pa.list_(pa.string()), lambda i: ["a"] * (i % 2)),
        "nothing": pa.array([None] * n, pa.string()),
    }
    for name, values in columns.items():
        table = table.append_column(name, values)
    return table


def test_every_kind_of_column(with_obs: Callable[..., Any]) -> None:
    snapshot = with_obs(typed)
    pointer = snapshot.pointer_fields()["gene_expression"]
    names = [n for n in snapshot.obs_schema().names if n != "gene_expression"]
    found = obs.read_modality(snapshot, "cells", pointer, names)
    got, vocabularies = found.obs.columns, found.obs.categories
    n = len(found.rowids)
    rows = np.arange(n)
    missing = rows == 5
    assert all(len(got[name]) == n for name in names)

    assert vocabularies["Cell Type"].tolist() == ["x", "y", "z"]
    assert vocabularies["Cell Type"].dtype == object
    assert np.array_equal(got["Cell Type"], np.where(missing, -1, 2 - rows % 3))
    assert got["Cell Type"].dtype == np.int8, "the smallest type; batches have int64"
    assert got["start"].dtype == np.int16
    assert np.array_equal(got["start"], np.where(missing, np.iinfo(np.int16).min, rows - 3))
    assert got["end"].dtype == np.uint32
    assert np.array_equal(got["end"], rows)
    assert got["fraction"].dtype == np.float32
    assert np.array_equal(got["fraction"], np.where(missing, np.nan, rows / 4), equal_nan=True)
    assert np.array_equal(vocabularies["flag"], [False, True])
    assert vocabularies["flag"].dtype == bool
    assert np.array_equal(got["flag"], np.where(missing, -1, 1 - rows % 2))
    assert got["flag"].dtype == np.int8
    assert vocabularies["grade"].tolist() == ["g0", "g1"]
    assert np.array_equal(got["grade"], np.where(missing, -1, rows % 2))
    assert np.array_equal(got["year"], 2000 + rows % 4)
    assert got["moment"].dtype == got["day"].dtype == np.dtype("datetime64[us]")
    assert np.isnat(got["moment"][5])
    assert np.isnat(got["day"][5])
    assert got["moment"][7] == np.datetime64("2024-01-01T07:00")
    assert got["day"][7] == np.datetime64("2024-01-08")
    assert np.array_equal(got["price"], np.where(missing, np.nan, rows), equal_nan=True)
    assert got["vector"].dtype == np.float32
    assert np.array_equal(got["vector"], np.arange(2 * n).reshape(n, 2))
    whole = np.where(missing[:, None], np.nan, rows[:, None] + np.zeros(3))
    assert np.array_equal(got["whole_vector"], whole, equal_nan=True)
    assert got["sizes"].dtype == object
    assert got["sizes"][5] is None
    assert got["sizes"][8].tolist() == [0, 1]
    assert got["sizes"][9].dtype == np.int64
    assert [v if v is None else v.tolist() for v in got["tags"][:6]] == [[], ["a"], [], ["a"], [], None]
    assert vocabularies["nothing"].tolist() == []
    assert (got["nothing"] == -1).all()
    assert set(vocabularies) == {
        *("uid", "dataset_uid", "cell_type", "split", "Cell Type", "flag", "grade", "nothing"),
    }


def test_columns_of_no_rows_keep_their_type(with_obs: Callable[..., Any]) -> None:
    snapshot = with_obs(typed)
    pointer = snapshot.pointer_fields()["gene_expression"]
    names = [n for n in snapshot.obs_schema().names if n != "gene_expression"]
    found = obs.read_modality(snapshot, "cells", pointer, names, where="uid = 'nobody'")
    dtypes = {name: found.obs.columns[name].dtype for name in names}
    assert dtypes["Cell Type"] == dtypes["flag"] == np.int8
    assert dtypes["end"] == np.uint32
    assert dtypes["moment"] == np.dtype("datetime64[us]")
    assert dtypes["tags"].kind == "O"
    assert found.obs.columns["vector"].shape == (0, 2)
    # A vocabulary belongs to the snapshot, not to the query.
    assert found.obs.categories["Cell Type"].tolist() == ["x", "y", "z"]
    assert (found.groups, len(found.rows)) == ([], 0)


@pytest.mark.parametrize(("atlas", "version", "table", "suffix"), TABLES)
class TestFixtures:
    def test_obs_equal(
        self, homeobox_fixtures: Path, atlas: str, version: int, table: str, suffix: str
    ) -> None:
        snapshot = Snapshot.open(homeobox_fixtures / atlas / "atlas", version)
        want = pq.read_table(homeobox_fixtures / atlas / f"obs{suffix}.parquet")
        got = AtlasQuery(snapshot, table).to_arrow()
        assert got.schema.equals(want.schema)
        assert got.to_pylist() == want.to_pylist()

    def test_presence_groups_and_extents(
        self, homeobox_fixtures: Path, atlas: str, version: int, table: str, suffix: str
    ) -> None:
        snapshot = Snapshot.open(homeobox_fixtures / atlas / "atlas", version)
        fields = json.loads((homeobox_fixtures / atlas / "expected.json").read_text())["versions"][version][
            "tables"
        ][table]["fields"]
        arrays = npz.load(homeobox_fixtures / atlas / f"expected{suffix}.npz")
        pointers = pq.read_table(homeobox_fixtures / atlas / f"obs{suffix}.parquet")
        for pointer in snapshot.pointer_fields(table).values():
            if pointer.kind == "discrete_spatial":
                continue
            here = arrays[f"{pointer.name}/present"]
            found = obs.read_modality(snapshot, table, pointer)
            assert np.array_equal(found.rowids, arrays["rowid"][here])
            assert found.groups == fields[pointer.name]["groups"]
            rows: Any = found.rows
            assert np.array_equal(rows.source, arrays[f"{pointer.name}/group_ids"][here])
            assert (rows.source.dtype, rows.start.dtype, rows.length.dtype) == (np.int32, np.int64, np.int32)
            stored = pointers[pointer.name].filter(pa.array(here))
            if pointer.kind == "dense":
                assert np.array_equal(rows.start, pc.struct_field(stored, "position"))
                assert (rows.length == 1).all()
            else:
                assert np.array_equal(rows.start, pc.struct_field(stored, "start"))
                assert np.array_equal(rows.start + rows.length, pc.struct_field(stored, "end"))


def test_rows_are_sorted_whatever_the_scan_delivers(
    homeobox_fixtures: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    snapshot = Snapshot.open(homeobox_fixtures / "ragged_rna" / "atlas")
    pointer = snapshot.pointer_fields()["gene_expression"]
    columns = ["uid", "age", "tags", "quality", "collected"]
    before: Any = obs.read_modality(snapshot, "cells", pointer, columns)
    table = obs.read_table(snapshot.obs_table(), columns)
    paged = AtlasQuery(snapshot).limit(9).offset(4).to_pandas()
    scan = obs.scan

    def shuffled(*args: object, limit: int | None = None, **kwargs: object) -> Iterator[pa.RecordBatch]:
        batches = list(scan(*args, **kwargs))  # type: ignore[arg-type]
        rows = pa.Table.from_batches(batches)
        order = np.random.default_rng(0).permutation(len(rows))[:limit]
        yield from rows.take(pa.array(order)).to_batches(max_chunksize=11)

    monkeypatch.setattr(obs, "scan", shuffled)
    after: Any = obs.read_modality(snapshot, "cells", pointer, columns)
    assert np.array_equal(before.rowids, after.rowids)
    assert not isinstance(before.rows, BoxIndex)
    assert np.array_equal(before.rows.start, after.rows.start)
    assert np.array_equal(before.rows.source, after.rows.source)
    for name in columns:
        for a, b in zip(before.obs.columns[name], after.obs.columns[name], strict=True):
            assert np.array_equal(a, b) or (a != a and b != b)
    assert obs.read_table(snapshot.obs_table(), columns).to_pylist() == table.to_pylist()
    assert AtlasQuery(snapshot).limit(9).offset(4).to_pandas().uid.tolist() == paged.uid.tolist()


def test_limit_reads_few_rows(homeobox_fixtures: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    snapshot = Snapshot.open(homeobox_fixtures / "ragged_rna" / "atlas")
    pointer = snapshot.pointer_fields()["gene_expression"]
    scan, read = obs.scan, []

    def counted(*args: object, **kwargs: object) -> Iterator[pa.RecordBatch]:
        for batch in scan(*args, **kwargs):  # type: ignore[arg-type]
            read.append(batch.num_rows)
            yield batch

    monkeypatch.setattr(obs, "scan", counted)
    everything = AtlasQuery(snapshot)
    assert len(everything.to_pandas()) == 70
    assert sum(read) == 70
    read.clear()
    rows = everything.limit(4).selection.read_rows(pointer, [])
    assert len(rows.rowids) == 4
    # Four ids as found, the ids up to the largest of them, and then the four rows.
    assert sum(read) == 12


def test_many_row_ids_are_read_by_scan_and_few_by_id(
    homeobox_fixtures: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    snapshot = Snapshot.open(homeobox_fixtures / "ragged_rna" / "atlas")
    ids = obs.read_modality(snapshot, "cells", snapshot.pointer_fields()["gene_expression"]).rowids[::3]
    by_id = obs.read_table(snapshot.obs_table(), ["uid"], rowids=ids)
    monkeypatch.setattr(obs, "_TAKE_AT_MOST", 0)
    by_scan = obs.read_table(snapshot.obs_table(), ["uid"], rowids=ids)
    assert len(by_id) == len(ids)
    assert by_id.equals(by_scan)
    monkeypatch.setattr(obs, "_TAKE_AT_MOST", 10)
    with pytest.raises(CorruptDataError, match="got 0"):
        obs.read_table(snapshot.obs_table(), ["uid"], rowids=np.array([2**60], np.uint64))


def test_three_kinds_of_absent(with_obs: Callable[..., Any]) -> None:
    def change(table: pa.Table) -> pa.Table:
        rows = table["gene_expression"].to_pylist()
        rows[0] = None
        rows[1] = dict.fromkeys(rows[1])
        rows[2] = rows[2] | {"zarr_group": ""}
        field = table.schema.field("gene_expression")
        return table.set_column(2, field, pa.array(rows, field.type))

    snapshot = with_obs(change)
    found = obs.read_modality(snapshot, "cells", snapshot.pointer_fields()["gene_expression"], ["uid"])
    names = found.obs.categories["uid"][found.obs.columns["uid"]]
    assert names.tolist() == [f"single_rna-{i:04d}" for i in range(3, 40)]
    assert len(AtlasQuery(snapshot).limit(5).to_cell_dataset()) == 5


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"start": 9, "end": 8}, r"not a valid range: \[9, 8\)"),
        ({"start": -2}, r"not a valid range: \[-2"),
        ({"end": None}, "not a valid range"),
        ({"start": 0, "end": 2**31}, "not a valid range"),
        (
            {"end": 5000},
            r"pointer beyond the array: row 'single_rna-0004' claims elements \[\d+, 5000\) of array "
            r"'d0/rna/csr/indices' in group 'd0/rna', which has \d+",
        ),
        ({"start": 2**40, "end": 2**40 + 5}, "pointer beyond the array: row 'single_rna-0004'"),
        ({"zarr_group": "d1/rna"}, "lists no group 'd1/rna'"),
    ],
)
def test_impossible_pointers(with_obs: Callable[..., Any], change: dict[str, Any], reason: str) -> None:
    def corrupt(table: pa.Table) -> pa.Table:
        rows = table["gene_expression"].to_pylist()
        rows[4] = rows[4] | change
        field = table.schema.field("gene_expression")
        return table.set_column(2, field, pa.array(rows, field.type))

    with pytest.raises(Exception, match=reason) as caught:
        AtlasQuery(with_obs(corrupt)).to_cell_dataset()
    assert type(caught.value).__module__ == "hbx_gpu.errors"
    if "valid range" in reason:
        assert "single_rna-0004" in str(caught.value)


def test_unknown_columns_are_listed(homeobox_fixtures: Path) -> None:
    snapshot = Snapshot.open(homeobox_fixtures / "single_rna" / "atlas")
    pointer = snapshot.pointer_fields()["gene_expression"]
    with pytest.raises(UnknownNameError, match=r"unknown obs column\(s\) \['nope'\].*'cell_type', 'split'"):
        obs.read_modality(snapshot, "cells", pointer, ["split", "nope"])
    with pytest.raises(UnknownNameError, match="nope"):
        obs.categories(snapshot, "cells", "nope")


def test_categories_cover_the_whole_table(homeobox_fixtures: Path) -> None:
    root = homeobox_fixtures / "ragged_rna" / "atlas"
    for version in (0, 1):
        snapshot = Snapshot.open(root, version)
        want = pq.read_table(homeobox_fixtures / "ragged_rna" / f"obs_v{version}.parquet")
        for name in ("cell_type", "donor", "quality", "split"):
            values = sorted({v for v in want[name].to_pylist() if v is not None})
            found: Any = obs.categories(snapshot, "cells", name)
            assert found.tolist() == values
        assert obs.categories(snapshot, "cells", "age") is None
        flags: Any = obs.categories(snapshot, "cells", "is_doublet")
        assert flags.tolist() == [False, True]


@pytest.mark.parametrize("words", [[], ["b", None, "a"], [None] * 3, [f"w{i % 300:03}" for i in range(900)]])
@pytest.mark.parametrize(("encoded", "few"), [(False, 1_000), (True, 1_000), (False, 1)])
def test_a_vocabulary_that_grows_gives_the_codes_of_a_known_one(
    words: list[str | None], encoded: bool, few: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(encoders, "_FEW_WORDS", few)
    column = pa.array(words, pa.string())
    parts = [column.slice(0, 2), column.slice(2)]
    grow = encoders.GrowingVocabulary()
    pieces = [grow(part.dictionary_encode() if encoded else part) for part in parts]
    vocabulary, codes = grow.finish(pieces)
    assert vocabulary.to_pylist() == sorted({word for word in words if word is not None})
    known = encoders.narrow(encoders.encoder_of(pa.string(), vocabulary), len(vocabulary))(column)
    assert codes.dtype == known.dtype
    assert np.array_equal(codes, known)


@pytest.mark.parametrize(
    "texts",
    [
        [],
        ["a"],
        ["aaa", "aaa", "aab", "aab", "baa"],
        ["group-01"] * 3 + ["group-02"] + ["group-01"] * 2,
        ["a", "b"] * 40,
        ["a", "bb", "bb", "", ""],
        [""] * 3,
        ["a", None, None, "a", "a"],
    ],
)
@pytest.mark.parametrize("kind", [pa.string(), pa.large_string()])
def test_runs_of_equal_texts(texts: list[str | None], kind: pa.DataType) -> None:
    column = pa.array(["before", *texts, "after"], kind).slice(1, len(texts))
    values, ends = obs._runs(column)
    expected = [(text, len(list(same))) for text, same in itertools.groupby(texts)]
    assert values.to_pylist() == [text for text, _ in expected]
    assert np.diff(ends, prepend=0).tolist() == [n for _, n in expected]


def test_memory_is_given_back_after_a_scan_of_many_rows(
    homeobox_fixtures: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[bool] = []

    def note() -> None:
        asked.append(True)
        give_back_unused()

    monkeypatch.setattr(obs, "give_back_unused", note)
    for least in (1, 1 << 22):
        monkeypatch.setattr(obs, "_MANY_ROWS", least)
        snapshot = Snapshot.open(homeobox_fixtures / "ragged_rna" / "atlas")
        assert len(AtlasQuery(snapshot).to_cell_dataset()) > 1
    assert asked == [True]
