"""`header.sch`: the binary header of an archive, from bytes and back. Knows nothing of the files it names."""

from __future__ import annotations

import struct
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from hbx_gpu.errors import CorruptDataError, UnsupportedError

MAGIC = b"SCDL"
VERSION = (0, 1, 0)
HEADER_FILE = "header.sch"
# Name in the header -> file in the archive.
ARRAY_FILES = {
    "DATA": "data.npy",
    "ROWPTR": "row_ptr.npy",
    "COLPTR": "col_ptr.npy",
    "NEIGHBOR_INDICES": "neighbor_indices.npy",
    "NEIGHBOR_INDICES_PTR": "neighbor_indptr.npy",
    "NEIGHBOR_VALUES": "neighbor_values.npy",
}
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


@dataclass(frozen=True, slots=True)
class ArrayInfo:
    """What the header says of one array.

    Attributes
    ----------
    name
        ``DATA``, ``ROWPTR`` or ``COLPTR``: the keys of `ARRAY_FILES`.
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
        :mod:`hbx_gpu.scdl.archive`.
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

    def dtype(self, name: str) -> np.dtype[Any] | None:
        """The dtype of one array; None where the header does not name the array or gives it a text dtype."""
        info = self.array(name)
        if info is None or "string" in info.dtype:
            return None
        return np.dtype(info.dtype)

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
    def from_bytes(cls, raw: bytes, *, where: str = HEADER_FILE) -> Header:
        """Parse a header. What follows its end is ignored; the feature index part may be absent.

        Raises
        ------
        CorruptDataError
            Bytes that are no header of this layout; names field and offset.
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


def read_header(path: str | Path) -> Header:
    """Read a header file.

    Raises
    ------
    FileNotFoundError
        No such file.
    CorruptDataError, UnsupportedError
        As :meth:`Header.from_bytes`.
    """
    return Header.from_bytes(Path(path).read_bytes(), where=str(path))


def archive_header(
    lengths: dict[str, int], dtypes: dict[str, Any], features: Iterable[FeatureIndexInfo] = ()
) -> Header:
    """The header of an archive of three arrays.

    Parameters
    ----------
    lengths, dtypes
        By header name (``DATA``, ``ROWPTR``, ``COLPTR``).
    features
        As :func:`hbx_gpu.scdl.features.write_feature_index` returned them: genes first, then cells.
    """
    arrays = tuple(
        ArrayInfo(name, lengths[name], np.dtype(dtypes[name]).name) for name in ("DATA", "ROWPTR", "COLPTR")
    )
    return Header(arrays, tuple(features))


def _text(text: str) -> bytes:
    raw = text.encode()
    return struct.pack(">I", len(raw)) + raw


def _shape(shape: tuple[int, ...] | None) -> bytes:
    return b"\0" if shape is None else struct.pack(f">BI{len(shape)}I", 1, len(shape), *shape)


def _check(header: Header) -> None:
    if header.version[0] > VERSION[0]:
        raise ValueError(f"expected schema major version {VERSION[0]}, found {header.version[0]}")
    records: list[ArrayInfo | FeatureIndexInfo] = [*header.arrays, *header.features]
    names = [record.name for record in records]
    for name in names:
        if not 0 < len(name.encode()) <= _MAX_NAME:
            raise ValueError(f"expected names of 1 to {_MAX_NAME} bytes, found {name[:40]!r}")
    if repeated := sorted({name for name in names if names.count(name) > 1}):
        raise ValueError(f"expected every name once, found {repeated} several times")
    for record in records:
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
                f"{self.where}: {field} before offset {self.at} is no UTF-8 text"
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
