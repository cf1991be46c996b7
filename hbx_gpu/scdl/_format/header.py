"""The header of an archive, from bytes and text and back. Knows nothing of the files that it names."""

from __future__ import annotations

import json
import struct
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from hbx_gpu._untrusted import read_small
from hbx_gpu.errors import CorruptDataError, UnsupportedError
from hbx_gpu.scdl._format.layout import HEADER

MAGIC = b"SCDL"
VERSION = (0, 1, 0)
ARRAYS = ("DATA", "ROWPTR", "COLPTR")
"""Names of the arrays, in the order in which they are written."""
DTYPE_CODES = {
    "uint8": 1,
    "uint16": 2,
    "uint32": 3,
    "uint64": 4,
    "float16": 5,
    "float32": 6,
    "float64": 7,
    "string": 8,
    "fixed_string": 9,
}
_DTYPE_NAMES = {code: name for name, code in DTYPE_CODES.items()}
_NETWORK_ORDER = 1
_MEMMAP_BACKEND = 1
_MAX_NAME = 1024
# In exports.
_ENDIANNESS, _BACKEND = "NETWORK", "MEMMAP_V0"
_VERSION_PARTS = ("major", "minor", "point")


@dataclass(frozen=True, slots=True)
class ArrayInfo:
    """What the header says of one array.

    Attributes
    ----------
    name
        One of `ARRAYS`; others are read and never written.
    length
        Number of elements. The real package does not keep it up to date.
    dtype
        One of the keys of `DTYPE_CODES`.
    shape
        None unless the header has one; the real package writes none.
    """

    name: str
    length: int
    dtype: str
    shape: tuple[int, ...] | None = None


@dataclass(frozen=True, slots=True)
class FeatureIndexInfo:
    """What the header says of one feature index folder: its rows and its files, relative to the archive."""

    name: str
    length: int
    files: tuple[str, ...]
    dtype: str = "string"
    shape: tuple[int, ...] | None = None


@dataclass(frozen=True, slots=True)
class Header:
    """The header of an archive.

    Attributes
    ----------
    arrays, features
        In stored order. Lengths and file lists may be stale in good archives; dtypes too, see
        :mod:`hbx_gpu.scdl._format.archive`.
    version
        Major, minor, point of the schema.
    """

    arrays: tuple[ArrayInfo, ...]
    features: tuple[FeatureIndexInfo, ...] = ()
    version: tuple[int, int, int] = VERSION

    def array(self, name: str) -> ArrayInfo | None:
        """The record of one array, or None."""
        return next((a for a in self.arrays if a.name == name), None)

    def feature_index(self, name: str) -> FeatureIndexInfo | None:
        """The record of one feature index, or None."""
        return next((f for f in self.features if f.name == name), None)

    def dtype(self, name: str) -> np.dtype | None:
        """The dtype of one array; None where the header does not name the array or gives it a text dtype."""
        info = self.array(name)
        if info is None or "string" in info.dtype:
            return None
        return np.dtype(info.dtype)

    @property
    def nbytes(self) -> int:
        """Bytes of the header as stored."""
        return len(self.to_bytes())

    def save(self, path: str | Path) -> None:
        """Write the header to a file of its own; archives rebuild theirs from their arrays."""
        Path(path).write_bytes(self.to_bytes())

    # The names that bionemo-scdl gives to what is above and below.

    def get_array(self, name: str) -> ArrayInfo | None:
        """The record of one array, or None."""
        return self.array(name)

    def get_feature_index(self, name: str) -> FeatureIndexInfo | None:
        """The record of one feature index, or None."""
        return self.feature_index(name)

    def calculate_total_size(self) -> int:
        """Bytes of the header as stored."""
        return self.nbytes

    def serialize(self) -> bytes:
        """The header as stored; see :meth:`to_bytes`."""
        return self.to_bytes()

    @classmethod
    def deserialize(cls, data: bytes) -> Header:
        """The header that bytes hold; see :meth:`from_bytes`."""
        return cls.from_bytes(data)

    @classmethod
    def load(cls, file_path: str | Path) -> Header:
        """The header in a file; see :func:`read_header`."""
        return read_header(file_path)

    def to_dict(self) -> dict[str, object]:
        """The header as plain values, by the names that bionemo-scdl's exports use."""
        return {
            "version": dict(zip(_VERSION_PARTS, self.version, strict=True)),
            "endianness": _ENDIANNESS,
            "backend": _BACKEND,
            "arrays": [_exported(array) for array in self.arrays],
            "feature_indices": [_exported(index) for index in self.features],
        }

    def to_json(self) -> str:
        """The header as JSON, as bionemo-scdl exports it."""
        return json.dumps(self.to_dict(), indent=2)

    def to_yaml(self) -> str:
        """The header as YAML in block style with sorted keys, as bionemo-scdl exports it."""
        values = {**self.to_dict(), "version": ".".join(map(str, self.version))}
        import yaml

        result: str = yaml.safe_dump(values, default_flow_style=False)
        return result

    @classmethod
    def from_json(cls, text: str) -> Header:
        """A header from its JSON export.

        Raises
        ------
        CorruptDataError
            The text is not such an export; the message names the field.
        """
        try:
            return _imported(json.loads(text))
        except ValueError as error:
            raise CorruptDataError(f"the text is not a header in JSON: {error}") from None

    @classmethod
    def from_yaml(cls, text: str) -> Header:
        """A header from its YAML export.

        Raises
        ------
        CorruptDataError
            As :meth:`from_json`.
        """
        import yaml

        try:
            return _imported(yaml.safe_load(text))
        except (yaml.YAMLError, ValueError) as error:
            raise CorruptDataError(f"the text is not a header in YAML: {error}") from None

    def to_bytes(self) -> bytes:
        """The header as stored.

        Raises
        ------
        ValueError
            Names that are empty, repeated or longer than 1,024 bytes; a major version above 0; shapes
            with dimensions below 1.
        """
        _check(self)
        out = [MAGIC, struct.pack(">4BII", *self.version, _NETWORK_ORDER, _MEMMAP_BACKEND, len(self.arrays))]
        for array in self.arrays:
            out += [_text(array.name), struct.pack(">QI", array.length, DTYPE_CODES[array.dtype])]
            out.append(_shape(array.shape))
        out.append(struct.pack(">I", len(self.features)))
        for index in self.features:
            out += [_text(index.name), struct.pack(">QI", index.length, DTYPE_CODES[index.dtype])]
            out += [struct.pack(">I", len(index.files)), *map(_text, index.files), _shape(index.shape)]
        return b"".join(out)

    @classmethod
    def from_bytes(cls, raw: bytes, *, where: str = HEADER) -> Header:
        """Parse a header. What follows its end is ignored; the feature index part may be absent.

        Raises
        ------
        CorruptDataError
            The bytes are not a header of this layout; the message names field and offset.
        UnsupportedError
            A major schema version above 0.
        """
        cursor = _Cursor(raw, where)
        if (magic := cursor.take(4, "magic")) != MAGIC:
            raise CorruptDataError(f"{where}: expected the magic {MAGIC!r} at offset 0, found {magic!r}")
        major, minor, point, order = struct.unpack(">4B", cursor.take(4, "version"))
        if major != VERSION[0]:
            raise UnsupportedError(
                f"{where}: schema version {major}.{minor}.{point}; this release reads major version "
                f"{VERSION[0]}. Open the archive with a release that knows it"
            )
        backend = cursor.uint32("backend")
        for field, found, known in (
            ("endianness", order, _NETWORK_ORDER),
            ("backend", backend, _MEMMAP_BACKEND),
        ):
            if found != known:
                raise CorruptDataError(f"{where}: expected {field} {known}, found {found}")
        arrays = tuple(cursor.array() for _ in range(cursor.count("array count")))
        # Files that end after the arrays are valid.
        indices = range(cursor.count("feature index count")) if cursor.left else ()
        header = cls(arrays, tuple(cursor.feature_index() for _ in indices), (major, minor, point))
        try:
            _check(header)
        except ValueError as error:
            raise CorruptDataError(f"{where}: {error}") from None
        return header


SCDLHeader = Header
"""The header under the name that bionemo-scdl gives to it."""


def read_header(path: str | Path) -> Header:
    """Read a header file.

    Raises
    ------
    FileNotFoundError
        No such file.
    CorruptDataError, UnsupportedError
        As :meth:`Header.from_bytes`.
    """
    return Header.from_bytes(read_small(path), where=str(path))


def archive_header(
    lengths: dict[str, int], dtypes: Mapping[str, npt.DTypeLike], features: Iterable[FeatureIndexInfo] = ()
) -> Header:
    """The header of an archive of three arrays.

    Parameters
    ----------
    lengths, dtypes
        By name in the header.
    features
        As :func:`hbx_gpu.scdl._format.features.write_feature_index` returned them: genes first, then cells.
    """
    arrays = tuple(ArrayInfo(name, lengths[name], np.dtype(dtypes[name]).name) for name in ARRAYS)
    return Header(arrays, tuple(features))


def validate_header_compatibility(one: Header, other: Header) -> bool:
    """Whether two headers can be merged: schemas of one major version, and no name in both."""
    names = _names(one) + _names(other)
    return one.version[0] == other.version[0] and len(set(names)) == len(names)


def merge_headers(one: Header, other: Header) -> Header:
    """One header with the records of both, and the later of their versions.

    Raises
    ------
    ValueError
        They have names in common, or schemas of different major versions.
    """
    if not validate_header_compatibility(one, other):
        raise ValueError(
            "headers that are merged have schemas of one major version and no name in common; found versions "
            f"{one.version} and {other.version}, names {_names(one)} and {_names(other)}"
        )
    return Header(one.arrays + other.arrays, one.features + other.features, max(one.version, other.version))


def _records(header: Header) -> list[ArrayInfo | FeatureIndexInfo]:
    return [*header.arrays, *header.features]


def _names(header: Header) -> list[str]:
    return [record.name for record in _records(header)]


def _exported(record: ArrayInfo | FeatureIndexInfo) -> dict[str, object]:
    files = {"index_files": list(record.files)} if isinstance(record, FeatureIndexInfo) else {}
    shape = None if record.shape is None else list(record.shape)
    dtype = f"{record.dtype.upper()}_ARRAY"
    return {"name": record.name, "length": record.length, "dtype": dtype, **files, "shape": shape}


def _imported(values: Any) -> Header:
    try:
        version = values["version"]
        parts = version.split(".") if isinstance(version, str) else [version[part] for part in _VERSION_PARTS]
        major, minor, point = map(int, parts)
        if (values["endianness"], values["backend"]) != (_ENDIANNESS, _BACKEND):
            raise ValueError(f"expected endianness {_ENDIANNESS} and backend {_BACKEND}")
        header = Header(
            tuple(ArrayInfo(**_record(array)) for array in values["arrays"]),
            tuple(
                FeatureIndexInfo(files=tuple(map(str, index["index_files"])), **_record(index))
                for index in values["feature_indices"]
            ),
            (major, minor, point),
        )
    except (KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"a field is missing or of another kind ({error!r})") from None
    _check(header)
    return header


def _record(values: dict[str, Any]) -> dict[str, Any]:
    dtype = str(values["dtype"]).removesuffix("_ARRAY").lower()
    if dtype not in DTYPE_CODES:
        raise ValueError(
            f"dtype {values['dtype']!r} is none of {[f'{name.upper()}_ARRAY' for name in DTYPE_CODES]}"
        )
    shape = None if values["shape"] is None else tuple(map(int, values["shape"]))
    return {"name": str(values["name"]), "length": int(values["length"]), "dtype": dtype, "shape": shape}


def _text(text: str) -> bytes:
    raw = text.encode()
    return struct.pack(">I", len(raw)) + raw


def _shape(shape: tuple[int, ...] | None) -> bytes:
    return b"\0" if shape is None else struct.pack(f">BI{len(shape)}I", 1, len(shape), *shape)


def _check(header: Header) -> None:
    if header.version[0] > VERSION[0]:
        raise ValueError(f"expected schema major version {VERSION[0]}, found {header.version[0]}")
    names = _names(header)
    for name in names:
        if not 0 < len(name.encode()) <= _MAX_NAME:
            raise ValueError(f"expected names of 1 to {_MAX_NAME} bytes, found {name[:40]!r}")
    if repeated := sorted({name for name in names if names.count(name) > 1}):
        raise ValueError(f"expected every name once, found {repeated} several times")
    for record in _records(header):
        if record.shape is not None and any(n < 1 for n in record.shape):
            raise ValueError(f"expected dimensions of at least 1 for {record.name!r}, found {record.shape}")


class _Cursor:
    """Reads fields one after the other; every error names the field and its offset."""

    def __init__(self, raw: bytes, where: str) -> None:
        self.raw, self.where, self.at = raw, where, 0

    @property
    def left(self) -> int:
        return len(self.raw) - self.at

    def take(self, n: int, field: str) -> bytes:
        if n > self.left:
            raise CorruptDataError(
                f"{self.where}: expected {n} bytes of {field} at offset {self.at}, found the end of the file "
                f"({len(self.raw)} bytes)"
            )
        self.at += n
        return self.raw[self.at - n : self.at]

    def uint32(self, field: str) -> int:
        return int.from_bytes(self.take(4, field), "big")

    def count(self, field: str) -> int:
        n = self.uint32(field)
        # Every record has more than one byte: a larger count cannot be true.
        if n > self.left:
            raise CorruptDataError(f"{self.where}: {field} {n} at offset {self.at - 4} exceeds the file")
        return n

    def text(self, field: str) -> str:
        try:
            return self.take(self.uint32(f"length of {field}"), field).decode()
        except UnicodeDecodeError:
            raise CorruptDataError(
                f"{self.where}: {field} before offset {self.at} is not UTF-8 text"
            ) from None

    def dtype(self, name: str) -> str:
        code = self.uint32(f"dtype of {name}")
        if code not in _DTYPE_NAMES:
            raise CorruptDataError(
                f"{self.where}: dtype code {code} of {name!r} at offset {self.at - 4} is none of "
                f"{_DTYPE_NAMES}"
            )
        return _DTYPE_NAMES[code]

    def shape(self, name: str) -> tuple[int, ...] | None:
        if not self.take(1, f"shape flag of {name}")[0]:
            return None
        return tuple(self.uint32(f"shape of {name}") for _ in range(self.count(f"dimensions of {name}")))

    def array(self) -> ArrayInfo:
        name = self.text("array name")
        length = int.from_bytes(self.take(8, f"length of {name}"), "big")
        dtype = self.dtype(name)
        return ArrayInfo(name, length, dtype, self.shape(name))

    def feature_index(self) -> FeatureIndexInfo:
        name = self.text("feature index name")
        length = int.from_bytes(self.take(8, f"length of {name}"), "big")
        dtype = self.dtype(name)
        files = tuple(self.text(f"file name of {name}") for _ in range(self.count(f"file count of {name}")))
        return FeatureIndexInfo(name, length, files, dtype, self.shape(name))
