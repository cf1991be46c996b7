"""The binary header, byte by byte."""

from __future__ import annotations

import json
import struct
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hbx_gpu import scdl
from hbx_gpu.errors import CorruptDataError, UnsupportedError
from hbx_gpu.scdl._format.header import (
    DTYPE_CODES,
    ArrayInfo,
    FeatureIndexInfo,
    Header,
    archive_header,
    merge_headers,
    read_header,
    validate_header_compatibility,
)

TEXT = st.text(st.characters(codec="utf-8", exclude_categories=["Cs"]), min_size=1, max_size=20)
LENGTH = st.integers(0, 2**64 - 1)
SHAPE = st.none() | st.lists(st.integers(1, 2**32 - 1), max_size=3).map(tuple)
DTYPE = st.sampled_from(sorted(DTYPE_CODES))


@st.composite
def headers(draw: st.DrawFn) -> Header:
    arrays = draw(
        st.lists(st.builds(ArrayInfo, TEXT, LENGTH, DTYPE, SHAPE), max_size=4, unique_by=lambda a: a.name)
    )
    index = st.builds(
        FeatureIndexInfo, TEXT.map("_".__add__), LENGTH, st.lists(TEXT).map(tuple), DTYPE, SHAPE
    )
    features = draw(st.lists(index, max_size=3, unique_by=lambda f: f.name))
    names = {a.name for a in arrays}
    return Header(tuple(arrays), tuple(f for f in features if f.name not in names))


@given(headers())
def test_headers_survive(header: Header) -> None:
    assert Header.from_bytes(header.to_bytes()) == header
    assert Header.from_bytes(header.to_bytes() + b"more") == header
    assert header.nbytes == len(header.to_bytes())


@given(headers())
@settings(deadline=None)
def test_headers_survive_as_text(header: Header) -> None:
    assert Header.from_json(header.to_json()) == header
    yaml = pytest.importorskip("yaml")
    assert yaml.safe_load(header.to_yaml()) == {**header.to_dict(), "version": "0.1.0"}
    assert Header.from_yaml(header.to_yaml()) == header


def test_text_of_a_real_header(scdl_cases: dict[str, Any], tmp_path: Path) -> None:
    """As bionemo-scdl exports it: what PyYAML makes of the same values."""
    yaml = pytest.importorskip("yaml")
    header = read_header(scdl_cases["ragged_ten"].archive / "header.sch")
    assert header.to_yaml() == yaml.safe_dump({**header.to_dict(), "version": "0.1.0"})
    header.save(tmp_path / "header.sch")
    assert read_header(tmp_path / "header.sch") == header


@pytest.mark.parametrize(
    "change",
    [
        {"version": "0.1"},
        {"version": {"major": 0}},
        {"version": "9.0.0"},
        {"endianness": "LITTLE"},
        {"backend": "ZARR"},
        {"arrays": None},
        {"arrays": [{"name": "DATA"}]},
        {"arrays": [{"name": "DATA", "length": 1, "dtype": "INT32_ARRAY", "shape": None}]},
        {"arrays": [{"name": "DATA", "length": 1, "dtype": "UINT8_ARRAY", "shape": [0]}]},
    ],
)
def test_text_that_is_no_header(small: Header, change: dict[str, Any]) -> None:
    with pytest.raises(CorruptDataError, match="not a header in JSON"):
        Header.from_json(json.dumps(small.to_dict() | change))
    for text in ("", "[]", "{"):
        with pytest.raises(CorruptDataError, match="not a header in JSON"):
            Header.from_json(text)


def test_merging() -> None:
    one = Header((ArrayInfo("A", 1, "uint8"),), (FeatureIndexInfo("x", 1, ("f",)),), (0, 1, 9))
    two = Header((ArrayInfo("B", 2, "uint8"),), (FeatureIndexInfo("y", 2, ("f",)),), (0, 2, 3))
    merged = merge_headers(one, two)
    assert [a.name for a in merged.arrays] == ["A", "B"]
    assert [f.name for f in merged.features] == ["x", "y"]
    assert merged.version == (0, 2, 3)
    shared = Header((ArrayInfo("x", 2, "uint8"),))
    later = Header((ArrayInfo("B", 2, "uint8"),), (), (1, 0, 0))
    for other in (one, shared, later):
        assert not validate_header_compatibility(one, other)
        with pytest.raises(ValueError, match="one major version and no name in common"):
            merge_headers(one, other)


def test_real_headers_are_written_alike(scdl_cases: dict[str, Any]) -> None:
    seen = 0
    for case in scdl_cases.values():
        file = case.archive / "header.sch"
        if file.exists():
            assert read_header(file).to_bytes() == file.read_bytes(), file
            seen += 1
    assert seen > 20


def test_first_bytes() -> None:
    raw = archive_header(
        {"DATA": 72, "ROWPTR": 13, "COLPTR": 72}, {"DATA": "f4", "ROWPTR": "u1", "COLPTR": "u1"}
    )
    expected = "5343444c00010001000000010000000300000004444154410000000000000048000000060000000006"
    assert raw.to_bytes().hex().startswith(expected)


@pytest.fixture
def small() -> Header:
    files = ("var_features/labels.npy",)
    return archive_header(
        {"DATA": 3, "ROWPTR": 2, "COLPTR": 3},
        {"DATA": "u2", "ROWPTR": "u1", "COLPTR": "u4"},
        [FeatureIndexInfo("var_features", 1, files)],
    )


def test_every_cut_is_noticed_but_the_one_after_the_arrays(small: Header) -> None:
    raw = small.to_bytes()
    ends = len(Header(small.arrays).to_bytes()) - 4
    for cut in range(len(raw)):
        if cut == ends:
            assert Header.from_bytes(raw[:cut]) == Header(small.arrays)
            continue
        with pytest.raises(CorruptDataError, match=r"offset|end of the file"):
            Header.from_bytes(raw[:cut])


@pytest.mark.parametrize(
    ("offset", "value", "message"),
    [
        (0, b"X", "magic"),
        (7, b"\0", "endianness"),
        (8, b"\0\0\0\2", "backend"),
        (12, b"\xff\0\0\0", "array count"),
    ],
)
def test_foreign_bytes_are_refused(small: Header, offset: int, value: bytes, message: str) -> None:
    raw = small.to_bytes()
    with pytest.raises(CorruptDataError, match=message):
        Header.from_bytes(raw[:offset] + value + raw[offset + len(value) :], where="header.sch")


def test_later_versions_are_refused(small: Header) -> None:
    raw = small.to_bytes()
    with pytest.raises(UnsupportedError, match=r"9\.1\.0"):
        Header.from_bytes(raw[:4] + b"\x09" + raw[5:])


def test_unknown_dtype_code(small: Header) -> None:
    raw = small.to_bytes().replace(struct.pack(">QI", 3, 2), struct.pack(">QI", 3, 77), 1)
    with pytest.raises(CorruptDataError, match="77 of 'DATA'"):
        Header.from_bytes(raw)


@pytest.mark.parametrize(
    "arrays",
    [
        (ArrayInfo("", 1, "uint8"),),
        (ArrayInfo("x" * 1025, 1, "uint8"),),
        (ArrayInfo("A", 1, "uint8"), ArrayInfo("A", 1, "uint8")),
        (ArrayInfo("A", 1, "uint8", (0,)),),
    ],
)
def test_bad_records_are_not_written(arrays: tuple[ArrayInfo, ...]) -> None:
    with pytest.raises(ValueError, match="expected"):
        Header(arrays).to_bytes()


def test_dtypes(small: Header) -> None:
    assert small.dtype("DATA") == np.uint16
    assert small.dtype("NEIGHBOR_VALUES") is None
    assert Header((ArrayInfo("DATA", 1, "string"),)).dtype("DATA") is None


def test_names_of_the_package_that_is_followed(scdl_cases: dict[str, Any], tmp_path: Path) -> None:
    file = scdl_cases["ragged_two"].archive / "header.sch"
    header = scdl.SCDLHeader.load(file)
    assert header == scdl.SCDLHeader.deserialize(file.read_bytes()) == read_header(file)
    assert header.serialize() == file.read_bytes()
    assert header.calculate_total_size() == file.stat().st_size
    assert isinstance(header.get_array("DATA"), scdl.ArrayInfo)
    assert header.get_array("NO") is None
    assert isinstance(header.get_feature_index("var_features"), scdl.FeatureIndexInfo)
    header.save(tmp_path / "h.sch")
    assert scdl.SCDLHeader.load(tmp_path / "h.sch") == header
