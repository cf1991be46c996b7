"""read_layout: fill values in every spelling, and complaints that name file, array and what is wrong."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import zarr

from hbx_gpu._storage import metadata, read_layout
from hbx_gpu.errors import CorruptDataError, UnsupportedCodecError

SHARDING: dict[str, Any] = {
    "name": "sharding_indexed",
    "configuration": {
        "chunk_shape": [2],
        "codecs": [{"name": "bytes", "configuration": {"endian": "little"}}],
        "index_codecs": [{"name": "bytes", "configuration": {"endian": "little"}}, {"name": "crc32c"}],
    },
}
BYTES = {"name": "bytes", "configuration": {"endian": "little"}}


def v3(**changes: Any) -> dict[str, Any]:
    document = {
        "zarr_format": 3,
        "node_type": "array",
        "shape": [10],
        "data_type": "float32",
        "chunk_grid": {"name": "regular", "configuration": {"chunk_shape": [4]}},
        "chunk_key_encoding": {"name": "default", "configuration": {"separator": "/"}},
        "fill_value": 0,
        "codecs": [BYTES],
        "attributes": {},
    } | changes
    return {key: value for key, value in document.items() if value is not ...}


def v2(**changes: Any) -> dict[str, Any]:
    return {
        "zarr_format": 2,
        "shape": [10],
        "chunks": [4],
        "dtype": "<i4",
        "order": "C",
        "fill_value": 0,
        "filters": None,
        "compressor": None,
    } | changes


def put(path: Path, document: Any, name: str = "zarr.json") -> Path:
    (path / name).write_text(document if isinstance(document, str) else json.dumps(document))
    return path


@pytest.mark.parametrize(
    ("dtype", "fill"),
    [
        ("float32", "NaN"),
        ("float16", "Infinity"),
        ("float64", "-Infinity"),
        ("float32", "0x7fc00000"),
        ("float32", "0xffc00000"),
        ("float64", "0x7ff8000000000000"),
        ("float16", "0x3c00"),
        ("float32", 1),
        ("float64", 0.1),
        ("bool", True),
        ("int64", -(2**63)),
        ("uint64", 2**64 - 1),
    ],
)
def test_fill_values_are_those_of_zarr(tmp_path: Path, dtype: str, fill: Any) -> None:
    layout: Any = read_layout(put(tmp_path, v3(data_type=dtype, fill_value=fill)))
    expected = zarr.open_array(tmp_path, mode="r").fill_value
    assert layout.fill_value.dtype == dtype
    assert layout.fill_value.tobytes() == expected.tobytes()


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"node_type": "group"}, CorruptDataError, "node_type is 'group', an array is expected"),
        ({"zarr_format": 4}, CorruptDataError, "zarr_format is 4, 3 is expected"),
        ({"shape": ...}, CorruptDataError, "key 'shape' is missing; it has attributes, chunk_grid"),
        ({"shape": [-1]}, CorruptDataError, r"shape is \[-1\], integers >= 0"),
        ({"shape": [2.5]}, CorruptDataError, r"shape is \[2.5\]"),
        ({"shape": "ten"}, CorruptDataError, "shape is 'ten'"),
        ({"shape": [10, 3]}, CorruptDataError, r"chunk_shape is \[4\], 2 integers >= 1"),
        ({"data_type": "complex64"}, UnsupportedCodecError, "data_type 'complex64' .*float32"),
        ({"data_type": {"name": "numpy.datetime64"}}, UnsupportedCodecError, "numpy.datetime64"),
        ({"fill_value": "many"}, CorruptDataError, "fill_value 'many' is neither NaN"),
        (
            {"data_type": "uint8", "fill_value": 300},
            CorruptDataError,
            "fill_value 300 is not a value of uint8",
        ),
        ({"data_type": "int8", "fill_value": 1.5}, CorruptDataError, "fill_value 1.5 is not a value"),
        (
            {"data_type": "int8", "fill_value": None},
            CorruptDataError,
            "fill_value None is not a value of int8",
        ),
        (
            {"data_type": "int8", "fill_value": float("inf")},
            CorruptDataError,
            "fill_value inf is not a value of int8",
        ),
        ({"chunk_grid": {"name": "rectilinear"}}, UnsupportedCodecError, "chunk grid 'rectilinear'"),
        ({"chunk_grid": [4]}, CorruptDataError, r"chunk_grid holds \[4\]"),
        ({"chunk_key_encoding": {"name": "fanout"}}, UnsupportedCodecError, "chunk_key_encoding 'fanout'"),
        (
            {"chunk_key_encoding": {"name": "default", "configuration": {"separator": "-"}}},
            CorruptDataError,
            "separator is '-'",
        ),
        ({"storage_transformers": [{"name": "x"}]}, UnsupportedCodecError, "storage_transformers"),
        ({"shape": [1 << 63]}, CorruptDataError, "integers >= 0 are expected"),
        ({"codecs": []}, CorruptDataError, r"codecs is \[\], a list of codecs is expected"),
        ({"codecs": [{"configuration": {}}]}, CorruptDataError, "an object with name"),
        ({"codecs": [SHARDING, {"name": "crc32c"}]}, UnsupportedCodecError, "sharding_indexed among other"),
        ({"codecs": [SHARDING]}, None, ""),
        (
            {"codecs": [{**SHARDING, "configuration": {**SHARDING["configuration"], "chunk_shape": [3]}}]},
            CorruptDataError,
            r"inner chunk_shape \(3,\) does not divide the shard shape \(4,\)",
        ),
        (
            {"codecs": [{**SHARDING, "configuration": {**SHARDING["configuration"], "codecs": [SHARDING]}}]},
            UnsupportedCodecError,
            "sharding_indexed inside sharding_indexed",
        ),
        (
            {"codecs": [{**SHARDING, "configuration": {**SHARDING["configuration"], "index_location": 3}}]},
            CorruptDataError,
            "index_location is 3",
        ),
    ],
)
def test_v3_complaints(
    tmp_path: Path, changes: dict[str, Any], error: type[Exception] | None, message: str
) -> None:
    put(tmp_path, v3(**changes))
    if error is None:
        assert read_layout(tmp_path).sharded
        return
    with pytest.raises(error, match=message) as caught:
        read_layout(tmp_path, "set0/counts")
    assert "'set0/counts'" in str(caught.value)
    assert str(tmp_path / "zarr.json") in str(caught.value)


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"dtype": "<U4"}, UnsupportedCodecError, "dtype '<U4'"),
        ({"dtype": "|O"}, UnsupportedCodecError, r"dtype '\|O'"),
        ({"dtype": "nonsense"}, UnsupportedCodecError, "dtype 'nonsense'"),
        ({"dtype": [["a", "<i4"]]}, UnsupportedCodecError, "dtype"),
        ({"order": "X"}, CorruptDataError, "order is 'X'"),
        ({"dimension_separator": "-"}, CorruptDataError, "separator is '-'"),
        ({"compressor": {"level": 1}}, CorruptDataError, "has no id"),
        ({"filters": 5}, CorruptDataError, "filters are 5, a list or null"),
        ({"chunks": [0]}, CorruptDataError, r"chunks is \[0\], 1 integers >= 1"),
        ({"zarr_format": 3}, CorruptDataError, "zarr_format is 3, 2 is expected"),
    ],
)
def test_v2_complaints(tmp_path: Path, changes: dict[str, Any], error: type[Exception], message: str) -> None:
    put(tmp_path, v2(**changes), ".zarray")
    with pytest.raises(error, match=message) as caught:
        read_layout(tmp_path)
    assert ".zarray" in str(caught.value)


def test_v2_fill_value_null_is_what_zarr_reads(tmp_path: Path) -> None:
    put(tmp_path, v2(fill_value=None), ".zarray")
    assert read_layout(tmp_path).fill_value == zarr.open_array(tmp_path, mode="r")[0]


def test_broken_json_names_file_and_place(tmp_path: Path) -> None:
    put(tmp_path, '{"shape": [1,')
    with pytest.raises(CorruptDataError, match=r"zarr\.json is not JSON: .*line 1 column"):
        read_layout(tmp_path)
    put(tmp_path, "[1]")
    with pytest.raises(CorruptDataError, match="hold a list"):
        read_layout(tmp_path)
    (tmp_path / "zarr.json").write_bytes(b"\xff\xfe")
    with pytest.raises(CorruptDataError, match="not JSON"):
        read_layout(tmp_path)


def test_nothing_there_says_what_is(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"neither zarr\.json nor \.zarray; .* holds nothing"):
        read_layout(tmp_path)
    (tmp_path / "csr").mkdir()
    with pytest.raises(FileNotFoundError, match="the directory holds csr"):
        read_layout(tmp_path, "set0")
    with pytest.raises(FileNotFoundError, match="that directory does not exist"):
        read_layout(tmp_path / "no")
    (tmp_path / "file").write_text("")
    with pytest.raises(FileNotFoundError, match="that path is a file"):
        read_layout(tmp_path / "file")


def test_names_and_bare_codec_names(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    put(tmp_path, v3(data_type="uint8", codecs=["bytes"]))
    layout = read_layout(tmp_path, absent_is_fill=False)
    assert layout.codecs == ({"name": "bytes", "configuration": {}},)
    assert (layout.name, layout.path) == (tmp_path.name, str(tmp_path))
    assert not layout.absent_is_fill
    assert layout.dtype == np.uint8
    monkeypatch.chdir(tmp_path.parent)
    assert read_layout(tmp_path.name).path == str(tmp_path)


def test_documents_that_differ_in_the_shape_are_parsed_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    parsed: list[str] = []
    plain = metadata._parse

    def parse(path: str, text: bytes) -> dict[str, object]:
        parsed.append(path)
        return plain(path, text)

    monkeypatch.setattr(metadata, "_parse", parse)
    monkeypatch.setattr(metadata, "_like", {})
    documents: list[dict[str, Any] | str] = [v3(shape=[n]) for n in (100, 7, 100, 101, 3)]
    documents += [v3(shape=[5], attributes={"shape": [6]}), v3(shape=[4, 4]), v3(shape=[0]), v3(shape=[5])]
    documents += [
        json.dumps(v3(shape=[5])).replace("[5]", found) for found in ("[05]", "[5,]", "[5.0]", "[ 5 ]")
    ]
    documents += [json.dumps(v3(shape=[5])).replace("shape", "sh\\u0061pe", 1), v3(shape=[5], more={})]
    # The later of two shapes counts, and this one is spelled so that a search does not find it.
    documents += 2 * [json.dumps(v3(shape=[4]))[:-1] + ', "sh\\u0061pe": [8]}']

    def outcome(folder: Path) -> object:
        try:
            return read_layout(folder, "a", within=tmp_path)
        except (CorruptDataError, UnsupportedCodecError) as error:
            return type(error), str(error)

    for number, document in enumerate(documents):
        folder = tmp_path / str(number)
        folder.mkdir()
        found = outcome(put(folder, document))
        with monkeypatch.context() as fresh:
            fresh.setattr(metadata, "_like", {})
            before = parsed[:]
            assert outcome(folder) == found
            parsed[:] = before
    assert [Path(path).parent.name for path in parsed[:2]] == ["0", "3"]
    assert len(parsed) == len(documents) - 5
