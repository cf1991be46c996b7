"""Columns of obs and var: what they are stored as, how differing ones merge, and what is refused."""

from __future__ import annotations

from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st

from hbx_gpu.atlas._model.columns import (
    Merge,
    features_table,
    fit,
    merged_schema,
    plan_merge,
    stored_names,
    to_arrow,
)
from hbx_gpu.errors import InvalidDataError


def stored(values: Any) -> pa.ChunkedArray:
    return to_arrow(pd.DataFrame({"x": values}), reserved=(), source="f.h5ad, obs").column("x")


@pytest.mark.parametrize(
    ("values", "kind", "expected"),
    [
        (np.array([1, 2], np.int8), pa.int64(), [1, 2]),
        (np.array([1, 2], np.uint32), pa.int64(), [1, 2]),
        (np.array([1.5, np.nan], np.float32), pa.float64(), [1.5, None]),
        (np.array([True, False]), pa.bool_(), [True, False]),
        (["a", None], pa.string(), ["a", None]),
        (pd.Categorical(["a", None, "b"]), pa.string(), ["a", None, "b"]),
        (pd.Categorical([3, 4]), pa.int64(), [3, 4]),
        (pd.array([1, None], "Int64"), pa.int64(), [1, None]),
        (pd.array([True, None], "boolean"), pa.bool_(), [True, None]),
        (pd.array(["a", None], "string"), pa.string(), ["a", None]),
        ([["a"], ["b", "c"]], pa.list_(pa.string()), [["a"], ["b", "c"]]),
        ([None, None], pa.null(), [None, None]),
    ],
)
def test_types(values: Any, kind: pa.DataType, expected: list[Any]) -> None:
    column = stored(values)
    assert column.type == kind
    assert column.to_pylist() == expected


def test_times_keep_microseconds() -> None:
    column = stored(pd.to_datetime(["2024-02-15 01:02:03.000004", None]))
    assert column.type == pa.timestamp("us")
    assert column.null_count == 1
    with pytest.raises(InvalidDataError, match="would lose data"):
        stored(pd.to_datetime(["2024-02-15 01:02:03.000000004"]))


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ([1, "a"], "column 'x'"),
        (np.array([2**63], np.uint64), "column 'x'"),
        ([b"a"], "type binary cannot be stored"),
        ([{"a": 1}], "type struct.* cannot be stored"),
    ],
)
def test_refused_values(values: Any, message: str) -> None:
    with pytest.raises(InvalidDataError, match=f"f.h5ad, obs.*{message}"):
        stored(values)


def test_stored_names() -> None:
    assert stored_names(["percent.mt", "uid", "cell type", "_rowid", ""], {"uid"}) == {
        "percent.mt": "percent_mt",
        "uid": "uid_in_file",
        "cell type": "cell type",
        "_rowid": "_rowid_in_file",
        "": "unnamed",
    }
    assert stored_names(["a.b", "a_b"], ()) == {"a.b": "a_b_", "a_b": "a_b"}
    assert stored_names(["uid", "uid_in_file"], {"uid"}) == {
        "uid": "uid_in_file_",
        "uid_in_file": "uid_in_file",
    }
    # A table has names for "percent.mt" of one file and "percent_mt" of another, and keeps them apart.
    known = {"percent.mt": "percent_mt"}
    assert stored_names(["percent_mt"], (), known) == {"percent_mt": "percent_mt_"}
    assert stored_names(["percent.mt", "percent_mt"], (), known) == {
        "percent.mt": "percent_mt",
        "percent_mt": "percent_mt_",
    }
    assert stored_names(["percent.mt"], (), {"percent_mt": "percent_mt"}) == {"percent.mt": "percent_mt_"}
    with pytest.raises(InvalidDataError, match=r"more than once: \['x'\]"):
        stored_names(["x", "y", "x"], ())


@given(st.lists(st.text("a.`_", max_size=4), unique=True), st.sets(st.text("a_", max_size=3)))
def test_stored_names_are_distinct_and_free(names: list[str], reserved: set[str]) -> None:
    new = stored_names(names, reserved)
    assert len(set(new.values())) == len(names)
    assert not set(new.values()) & reserved
    assert not any(c in name for name in new.values() for c in ".`")


SCHEMA = pa.schema(
    [
        pa.field("uid", pa.string(), nullable=False),
        pa.field("age", pa.int64()),
        pa.field("score", pa.float64()),
        pa.field("grade", pa.dictionary(pa.int32(), pa.string())),
        pa.field("small", pa.float32()),
    ]
)


STORED = {"age": pa.array([1, 2]), "score": pa.array([0.5]), "uid": pa.array(["a"])}


def merging(data: pa.Table, *, allow_new: bool = True, **there: Any) -> Merge:
    """The merge of some data with a table of SCHEMA that holds STORED."""
    values = STORED | {name: pa.array(column) for name, column in there.items()}
    return plan_merge(
        SCHEMA, data, allow_new=allow_new, source="f", stored=lambda name: pa.chunked_array([values[name]])
    )


def test_merge_adds_and_promotes() -> None:
    data = pa.table({"uid": ["a"], "age": [1.5], "score": [1], "new": [True], "void": pa.nulls(1)})
    merge = merging(data)
    assert merge == Merge(
        (pa.field("new", pa.bool_()),),
        {"age": (pa.float64(), "CAST(`age` AS DOUBLE)")},
        notes=("f, column 'age': the atlas holds int64, the file double; stored as double",),
    )
    schema = merged_schema(SCHEMA, merge)
    rows = fit(data, schema, source="f", table="cells")
    assert rows.schema == schema
    assert rows.to_pylist() == [
        {"uid": "a", "age": 1.5, "score": 1.0, "grade": None, "small": None, "new": True}
    ]


def test_merge_can_leave_out() -> None:
    data = pa.table({"uid": ["a"], "new": [True]})
    assert merging(data, allow_new=False) == Merge((), {}, ("new",))
    assert fit(data, SCHEMA, source="f", table="cells").schema == SCHEMA
    with pytest.raises(InvalidDataError, match="schema class says int64, the file has string"):
        merging(pa.table({"age": ["x"]}), allow_new=False)


@pytest.mark.parametrize(
    ("column", "values", "joined"),
    [
        ("age", ["x"], pa.string()),
        ("age", [True], None),  # as 0 and 1 among integers
        ("uid", [3], None),  # as text among texts
        ("grade", [3], None),
        ("score", ["x"], pa.string()),
        ("score", [2], None),
        ("age", [3.0, None], None),  # integers with gaps, as pandas writes them
        ("age", [None, None], None),
    ],
)
def test_types_are_joined_without_loss(column: str, values: list[Any], joined: pa.DataType | None) -> None:
    merge = merging(pa.table({column: values}), grade=pa.array(["x"]).dictionary_encode())
    assert {name: kind for name, (kind, _) in merge.changed.items()} == ({column: joined} if joined else {})


def test_what_would_lose_information_is_refused_with_the_options() -> None:
    with pytest.raises(
        InvalidDataError, match=r"too large to be exact.*obs_types=\{'age': 'str'\}.*drop_obs="
    ):
        merging(pa.table({"age": [0.5]}), age=[2**60])
    with pytest.raises(InvalidDataError, match="no common type"):
        merging(pa.table({"age": [[1], [2]]}))


def test_fit_takes_strings_into_categories() -> None:
    rows = fit(pa.table({"uid": ["a", "b"], "grade": ["x", None]}), SCHEMA, source="f", table="cells")
    assert rows.column("grade").to_pylist() == ["x", None]
    assert rows.schema == SCHEMA


def test_fit_uses_defaults_and_requires_the_rest() -> None:
    schema = pa.schema(
        [pa.field("uid", pa.string(), nullable=False), pa.field("split", pa.string(), nullable=False)]
    )
    data = pa.table({"uid": ["a", "b"]})
    assert fit(data, schema, defaults={"split": "train"}, source="f", table="t").column(
        "split"
    ).to_pylist() == [
        "train",
        "train",
    ]
    with pytest.raises(InvalidDataError, match="column 'split' is missing, but table 't' requires it"):
        fit(data, schema, source="f", table="t")
    data = pa.table({"uid": ["a", None], "split": ["x", "y"]})
    with pytest.raises(InvalidDataError, match="column 'uid' lacks 1 values"):
        fit(data, schema, source="f", table="t")


def test_fit_never_rounds() -> None:
    for column, values in (("score", [2**53 + 1]), ("small", [0.1]), ("small", [2**24 + 1])):
        with pytest.raises(InvalidDataError, match=f"column '{column}'.*(exact|too large|not in range)"):
            fit(pa.table({"uid": ["a"], column: values}), SCHEMA, source="f", table="t")
    exact = fit(pa.table({"uid": ["a", "b"], "small": [0.5, None]}), SCHEMA, source="f", table="t")
    assert exact.column("small").to_pylist() == [0.5, None]


def test_features_in_every_form() -> None:
    frame = pd.DataFrame({"uid": ["a", "b"], "name": ["A", "B"], "global_index": [0, 1]})
    for features in (frame, frame.set_index("uid"), pa.Table.from_pandas(frame)):
        assert features_table(features, "f").select(["uid", "name"]).to_pylist() == [
            {"uid": "a", "name": "A"},
            {"uid": "b", "name": "B"},
        ]
        assert "global_index" not in features_table(features, "f").schema.names
    with pytest.raises(ValueError, match="expected a column 'uid'"):
        features_table(pd.DataFrame({"name": ["A"]}), "f")
