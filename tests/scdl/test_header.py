"""The binary header, byte by byte."""

from __future__ import annotations

import struct
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from hbx_gpu.errors import CorruptDataError, UnsupportedError
from hbx_gpu.scdl.header import (
    DTYPE_CODES,
    ArrayInfo,
    FeatureIndexInfo,
    Header,
    archive_header,
    read_header,
)

TEXT = st.text(st.characters(codec="utf-8", exclude_categories=["Cs"]), min_size=1, max_size=20)
LENGTH = st.integers(0, 2**64 - 1)
SHAPE = st.none() | st.lists(st.integers(1, 2**32 - 1), max_size=3).map(tuple)
DTYPE = st.sampled_from(sorted(DTYPE_CODES))


@given(
    arrays=st.lists(st.builds(ArrayInfo, TEXT, LENGTH, DTYPE, SHAPE), max_size=4, unique_by=lambda a: a.name),
    features=st.lists(
        st.builds(FeatureIndexInfo, TEXT.map("_".__add__), LENGTH, st.lists(TEXT).map(tuple), DTYPE, SHAPE),
        max_size=3,
        unique_by=lambda f: f.name,
    ),
)
def test_headers_survive(arrays: list[ArrayInfo], features: list[FeatureIndexInfo]) -> None:
    names = {a.name for a in arrays}
    header = Header(tuple(arrays), tuple(f for f in features if f.name not in names))
    assert Header.from_bytes(header.to_bytes()) == header
    assert Header.from_bytes(header.to_bytes() + b"more") == header


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
