"""Feature indices: in memory, in a folder, and those of real archives."""

from __future__ import annotations

import json
import pickle
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st

from hbx_gpu.errors import CorruptDataError, InvalidDataError
from hbx_gpu.scdl._format.archive import open_archive
from hbx_gpu.scdl._format.features import (
    FeatureIndex,
    ObservedFeatureIndex,
    VariableFeatureIndex,
    are_dicts_equal,
)
from hbx_gpu.scdl._format.frames import StoredFrame
from hbx_gpu.scdl._format.index_writer import write_feature_index
from hbx_gpu.scdl._format.layout import block_file
from tests.scdl.conftest import Case


def test_single_elements_cost_their_row_group(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    texts = [f"t{i}" if i % 7 else None for i in range(100)]
    table = pa.table({"a": np.arange(100), "b": pa.array(texts).dictionary_encode()})
    pq.write_table(table, tmp_path / "x.parquet", row_group_size=9)
    read: list[tuple[str, int]] = []
    whole = pq.ParquetFile.read_row_group

    def read_row_group(file: pq.ParquetFile, i: int, columns: list[str]) -> pa.Table:
        read.append((columns[0], i))
        return whole(file, i, columns)

    monkeypatch.setattr(pq.ParquetFile, "read_row_group", read_row_group)
    monkeypatch.setattr(pq.ParquetFile, "read", lambda *_: pytest.fail("the whole column was read"))
    frame = StoredFrame(tmp_path / "x.parquet")
    assert [frame.value("a", 99), frame.value("b", 98), frame.value("b", 0)] == [99, None, None]
    assert read == [("a", 11), ("b", 10), ("b", 0)]
    for rows in ([50, 3, 99, 3], [45], [17, 18], np.arange(44, 30, -3)):
        for name in ("a", "b"):
            taken = frame.take(name, np.array(rows, int)).to_pylist()
            assert taken == table[name].take(pa.array(rows, pa.int64())).to_pylist()
    assert len(read) == len(set(read))


ONE = {"name": np.array(["a", "b", "c"]), "length": np.array([3, 2, 1])}
TWO = {"name": np.array(["a", "b"])}


def plain(values: Any) -> list[Any]:
    """Elements with None where one is missing."""
    return [None if v is None or v != v else v for v in np.asarray(values).tolist()]


@pytest.mark.parametrize(
    "name",
    ["single_f32", "ragged_two", "ragged_ten", "merge_blocks", "index_only", "legacy_v012", "labels_json"],
)
def test_real_frames(scdl_cases: dict[str, Case], name: str) -> None:
    case = scdl_cases[name]
    archive = open_archive(case.archive)
    for index, expected in ((archive.var, case.frames("var")), (archive.obs, case.frames("obs"))):
        if index is None:
            assert expected == []
            continue
        assert index.bounds.tolist() == [0, *(b["row_stop"] for b in expected)]
        for frame, block in zip(index.frames, expected, strict=True):
            assert {n: plain(frame[n]) for n in frame} == block["columns"]
    if archive.obs is None:
        return
    for block in case.frames("obs"):
        for row in range(block["row_start"], block["row_stop"]):
            values, _ = archive.obs.lookup(row)
            wanted = [column[row - block["row_start"]] for column in block["columns"].values()]
            assert plain(np.array(values, object)) == wanted
        rows = archive.obs[block["row_start"] : block["row_stop"]]
        assert {n: plain(rows[n]) for n in rows.keys()} == block["columns"]  # noqa: SIM118


class TestVariables:
    def test_equal_neighbors_merge(self) -> None:
        index = VariableFeatureIndex()
        for frame in (ONE, dict(reversed(ONE.items())), TWO, ONE):
            index.append_features(5, frame, "x.h5ad")
        assert (len(index), index.number_of_rows(), index.column_dims()) == (3, 20, [3, 2, 3])
        assert index.number_of_values() == [30, 10, 15]
        assert [index.number_vars_at_row(row) for row in (0, 9, 10, 14, 15, 19)] == [3, 3, 2, 2, 3, 3]

    def test_lookup(self) -> None:
        index: Any = VariableFeatureIndex()
        index.append_features(5, ONE, "x.h5ad")
        index.append_features(2, TWO)
        values, label = index.lookup(np.int64(4), ["length", "name"])
        np.testing.assert_array_equal(values[0], ONE["length"])
        np.testing.assert_array_equal(values[1], ONE["name"])
        assert label == "x.h5ad"
        assert index.lookup(5)[1] is None
        assert index.lookup(0, [])[0] == []
        with pytest.raises(ValueError, match=r"'length' in select_features.* has: 'name' \(block 1\)"):
            index.lookup(5, ["length"])
        with pytest.raises(IndexError, match="must be non-negative"):
            index.lookup(-1)
        with pytest.raises(IndexError, match="larger than number of rows"):
            index.lookup(7)

    def test_empty(self) -> None:
        index = VariableFeatureIndex()
        assert (len(index), index.number_of_rows(), index.column_dims(), index.number_of_values()) == (
            0,
            0,
            [],
            [0],
        )
        with pytest.raises(IndexError, match="no features"):
            index.lookup(0)

    def test_blocks_without_columns(self, tmp_path: Path) -> None:
        index = VariableFeatureIndex()
        index.append_features(4, {})
        index.append_features(4, ONE)
        index.save(tmp_path / "var_features")
        again = VariableFeatureIndex.load(tmp_path / "var_features")
        assert (again.column_dims(), again.number_of_rows(), again.number_of_values()) == ([0, 3], 8, [0, 12])

    def test_wrong_input(self) -> None:
        index = VariableFeatureIndex()
        with pytest.raises(TypeError, match="dict of column name"):
            index.append_features(1, [1, 2])
        with pytest.raises(ValueError, match="equal length"):
            index.append_features(1, {"a": [1], "b": [1, 2]})
        with pytest.raises(TypeError, match="expected VariableFeatureIndex"):
            index.concat(ObservedFeatureIndex())

    def test_concat_merges_at_the_border(self) -> None:
        one, other = VariableFeatureIndex(), VariableFeatureIndex()
        one.append_features(2, ONE, "a")
        other.append_features(3, ONE, "b")
        other.append_features(4, TWO, "c")
        assert one.concat(other_row_index=other) is one
        assert (one.bounds.tolist(), one.labels) == ([0, 5, 9], ["a", "c"])

    def test_a_nan_equals_nothing(self) -> None:
        assert are_dicts_equal({"a": np.array([1.0])}, {"a": np.array([1.0])})
        assert not are_dicts_equal({"a": np.array([np.nan])}, {"a": np.array([np.nan])})
        assert not are_dicts_equal({"a": np.array([1.0])}, {"b": np.array([1.0])})


def cells(*columns: str, n: int = 3, first: int = 0) -> dict[str, np.ndarray]:
    return {c: np.array([f"{c}{first + i}" for i in range(n)], object) for c in columns}


class TestCells:
    def test_blocks_merge_by_column_names(self) -> None:
        index = ObservedFeatureIndex()
        index.append_features(cells("x", "y"), "a")
        index.append_features(cells("y", "x", first=3), "b")
        index.append_features(cells("x", first=6), "c")
        index.append_features({"x": []}, "nothing")
        assert (len(index), index.bounds.tolist(), index.labels) == (2, [0, 6, 9], ["a", "c"])
        assert index.lookup(1) == (["y1", "x1"], "a")
        assert index.lookup(4, ["x"]) == (["x4"], "a")
        assert (index.column_dims(), index.names) == ([2, 1], ["y", "x"])
        assert index.column("x").to_pylist() == [f"x{i}" for i in range(9)]
        assert index.column("y").to_pylist() == [f"y{i}" for i in range(6)] + [None] * 3
        with pytest.raises(ValueError, match="no obs column 'z'; there are: 'y', 'x'"):
            index.column("z")

    def test_numbers_are_promoted(self) -> None:
        index = ObservedFeatureIndex()
        index.append_features({"x": np.array([1, 2])})
        index.append_features({"x": np.array([0.5, np.nan])})
        index.append_features({"x": np.array([True])})
        np.testing.assert_array_equal(index.frames[0]["x"], [1.0, 2.0, 0.5, np.nan, 1.0])

    def test_text_and_numbers_are_found_before_anything_changes(self) -> None:
        index, other = ObservedFeatureIndex(), ObservedFeatureIndex()
        index.append_features({"x": np.array([1, 2])})
        other.append_features({"y": np.array([1, 2])})
        other.append_features({"x": np.array(["text"])})
        index.concat(other)
        other.append_features({"x": np.array(["more"])})
        with pytest.raises(InvalidDataError, match="column 'x' is string in one place and int64 in another"):
            other.append_features({"x": np.array([5])})
        third = ObservedFeatureIndex()
        third.append_features({"x": np.array([0])})
        with pytest.raises(InvalidDataError, match="column 'x' is string"):
            index.concat(third)
        assert (index.bounds.tolist(), len(index)) == ([0, 2, 4, 5], 3)

    @pytest.fixture
    def index(self) -> ObservedFeatureIndex:
        return three_blocks()

    @given(
        start=st.none() | st.integers(-12, 12), stop=st.none() | st.integers(-12, 12), step=st.integers(-4, 4)
    )
    def test_slices(self, start: int | None, stop: int | None, step: int) -> None:
        index = three_blocks()
        wanted = slice(start, stop, step or None)
        parts, labels = index[wanted]
        rows = range(9)[wanted]
        assert [v for part in parts for v in next(iter(part.values()))] == [
            f"{'xxy'[row // 3]}{row}" for row in rows
        ]
        assert labels == [f"{3 * b}.h5ad" for b in dict.fromkeys(row // 3 for row in rows)]

    def test_one_row(self, index: ObservedFeatureIndex) -> None:
        values, label = index[7]
        assert (values, label) == (["y7", "z7"], "6.h5ad")
        seventh: Any = np.int32(7)
        assert index[seventh]["z"] == index[-2]["z"] == "z7"
        for outside in (9, -10):
            with pytest.raises(IndexError, match="9 rows"):
                index[outside]
        for wrong in ("x", 1.0, None, [1]):
            with pytest.raises(TypeError, match="int or slice"):
                index[wrong]  # type: ignore[index]

    def test_rows_of_one_block_are_a_dict_too(self, index: ObservedFeatureIndex) -> None:
        rows = index[1:3]
        assert rows.keys() == ["x", "y"]
        assert rows["y"].tolist() == ["y1", "y2"]
        frames, labels = rows
        assert (len(frames), labels) == (1, ["0.h5ad"])
        with pytest.raises(KeyError, match="2 blocks"):
            index[1:5]["x"]
        again = pickle.loads(pickle.dumps((rows, index[7])))
        assert (again[0]["y"].tolist(), again[1]["z"]) == (["y1", "y2"], "z7")

    def test_empty_slice(self, index: ObservedFeatureIndex) -> None:
        assert index[5:5] == ([], [])
        assert ObservedFeatureIndex()[:] == ([], [])


def three_blocks() -> ObservedFeatureIndex:
    index = ObservedFeatureIndex()
    for first, columns in ((0, ("x", "y")), (3, ("x",)), (6, ("y", "z"))):
        index.append_features(cells(*columns, first=first), f"{first}.h5ad")
    return index


KINDS = {
    "text": np.array(["a", None, "c"], object),
    "number": np.array([1.5, np.nan, 3.0]),
    "integer": np.array([1, 2, 3], np.int16),
    "large": np.array([0, 2**64 - 1, 1], np.uint64),
    "flag": np.array([True, False, True]),
    "maybe": pa.array([True, None, False]),
    "category": pa.DictionaryArray.from_arrays(pa.array([1, None, 0]), ["p", "q", "unused"]),
}


def test_every_kind_of_column_survives(tmp_path: Path) -> None:
    index = ObservedFeatureIndex()
    index.append_features(KINDS, "a")
    index.save(tmp_path / "obs_features")
    again = ObservedFeatureIndex.load(tmp_path / "obs_features")
    frame = again.frames[0]
    for name, values in KINDS.items():
        wanted = values.to_pylist() if isinstance(values, pa.Array) else plain(values)
        assert plain(frame[name]) == wanted, name
        assert [plain(np.array([again.lookup(i, [name])[0][0]], object))[0] for i in range(3)] == wanted, name
        if isinstance(values, np.ndarray) and values.dtype != object:
            assert frame[name].dtype == values.dtype
    assert frame.arrow("category").combine_chunks().dictionary.to_pylist() == ["p", "q", "unused"]
    assert again.labels == ["a"]


@pytest.mark.parametrize("n_blocks", [0, 1, 9, 10, 11])
def test_files(tmp_path: Path, n_blocks: int) -> None:
    blocks = [(2, {"g": np.array([f"g{b}"])}) for b in range(n_blocks)]
    labels = [None if b == 1 else f"{b}.h5ad" for b in range(n_blocks)]
    record = write_feature_index(tmp_path / "var_features", blocks, labels)
    names = {Path(name).name for name in record.files}
    assert names == {p.name for p in (tmp_path / "var_features").iterdir()}
    assert record.length == 2 * n_blocks
    assert block_file(3, 10) == "dataframe_03.parquet"
    # Nothing in it needs unpickling.
    stored = np.load(tmp_path / "var_features" / "labels.npy", allow_pickle=False)
    assert stored.dtype.kind == ("U" if n_blocks else "f")
    assert json.loads((tmp_path / "var_features" / "labels.json").read_text()) == labels
    again = VariableFeatureIndex.load(tmp_path / "var_features")
    assert again.bounds.tolist() == list(range(0, 2 * n_blocks + 1, 2))
    assert again.labels == labels
    assert [again.lookup(2 * b)[0][0].tolist() for b in range(n_blocks)] == [
        [f"g{b}"] for b in range(n_blocks)
    ]
    with pytest.raises(FileExistsError, match="not empty"):
        write_feature_index(tmp_path / "var_features", blocks)


@pytest.mark.parametrize("stale", ["labels.npy", "labels.json"])
def test_labels_survive_a_program_that_knows_one_file_only(tmp_path: Path, stale: str) -> None:
    write_feature_index(tmp_path / "var_features", [(2, {"g": np.array(["a"])})], ["a.h5ad"])
    old = (tmp_path / "var_features" / stale).read_bytes()
    shutil.rmtree(tmp_path / "var_features")
    blocks = [(2, {"g": np.array(["a"])}), (1, {"g": np.array(["b"])})]
    write_feature_index(tmp_path / "var_features", blocks, ["a.h5ad", "b.h5ad"])
    (tmp_path / "var_features" / stale).write_bytes(old)
    assert VariableFeatureIndex.load(tmp_path / "var_features").labels == ["a.h5ad", "b.h5ad"]


class TestDamage:
    @pytest.fixture
    def folder(self, tmp_path: Path) -> Path:
        write_feature_index(tmp_path / "obs_features", [(3, ONE), (2, TWO)], ["a", "b"])
        return tmp_path / "obs_features"

    @pytest.mark.parametrize(
        "ends", [np.array([3, 5]), np.array([-1, 5, 3]), np.array(-1), np.array(["x"]), np.array([], int)]
    )
    def test_ends(self, folder: Path, ends: np.ndarray) -> None:
        np.save(folder / "cumulative_sum_index.npy", ends)
        with pytest.raises(CorruptDataError, match=r"cumulative_sum_index\.npy: expected"):
            FeatureIndex.load(folder)

    def test_pickled_ends(self, folder: Path) -> None:
        np.save(folder / "cumulative_sum_index.npy", np.array([-1, 3, 5], object), allow_pickle=True)
        with pytest.raises(CorruptDataError, match="cannot be read"):
            FeatureIndex.load(folder)

    def test_rows_of_a_block(self, folder: Path) -> None:
        pq.write_table(pa.table({"name": ["only"]}), folder / "dataframe_0.parquet")
        index = ObservedFeatureIndex.load(folder)
        assert index.lookup(3)[0] == ["a"]
        for read in (lambda: index.lookup(0), lambda: index[0:2], lambda: index.column("name")):
            with pytest.raises(CorruptDataError, match=r"dataframe_0\.parquet: expected 3 rows .* found 1"):
                read()

    def test_parquet(self, folder: Path) -> None:
        (folder / "dataframe_1.parquet").write_bytes(b"no parquet")
        index = ObservedFeatureIndex.load(folder)
        assert index.lookup(0, ["length"])[0] == [3]
        with pytest.raises(CorruptDataError, match=r"dataframe_1\.parquet cannot be read"):
            index.lookup(4)


@pytest.mark.parametrize("stored", [False, True])
def test_the_dtype_of_a_part_is_that_of_the_column(stored: bool, tmp_path: Path) -> None:
    """A column with missing values has objects or doubles also in rows that miss none."""
    index = ObservedFeatureIndex()
    index.append_features(
        {
            "flag": pa.array([None, True, False, True]),
            "number": pa.array([1, None, 3, 4]),
            "whole": pa.array([1, 2, 3, 4]),
        },
        "cells",
    )
    if stored:
        index.save(str(tmp_path / "obs"))
        index = ObservedFeatureIndex.load(str(tmp_path / "obs"))
    (part,), _ = index[1:4]
    assert [part[name].dtype for name in part] == [object, np.float64, np.int64]
    (part,), _ = index[2:4]
    assert part["flag"].dtype == object
    assert part["flag"].tolist() == [False, True]
    (flag, number, whole), _ = index[2]
    assert flag is False
    assert (type(number), type(whole)) == (np.float64, np.int64)
    (flag, number, _), _ = index[1]
    assert flag is True
    assert np.isnan(number)
