"""How many bytes the pages of a parquet column decompress to, from their headers: Arrow makes room for them.

Arrow trusts a page header with up to 2 GiB, whatever the footer says, and asking its reader for the column
chunks of a damaged footer ends the process in some releases. Both are Thrift structs in the compact protocol,
which are parsed here. Formats: "Parquet file format" and parquet.thrift of Apache Parquet, "Thrift compact
protocol" of Apache Thrift.
"""

from __future__ import annotations

import io
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO, TypeAlias

from hbx_gpu._untrusted import open_regular
from hbx_gpu.errors import CorruptDataError

FOOTER_BYTES = 64 << 20
"""Largest footer that is parsed."""
_MAGIC = b"PAR1"
_HEADER_BYTES = 64 << 10  # of a page, its statistics included
_DEPTH = 16
# Types of the compact protocol.
_TRUE, _FALSE, _BYTE, _DOUBLE, _BINARY, _LIST, _SET, _STRUCT = 1, 2, 3, 7, 8, 9, 10, 12
# Fields of FileMetaData, RowGroup, ColumnChunk, ColumnMetaData and PageHeader.
_ROW_GROUPS, _COLUMNS = 4, 1
_FILE_PATH, _META = 1, 3
_COMPRESSED, _DATA_OFFSET, _DICTIONARY_OFFSET = 7, 9, 11
_PAGE_UNCOMPRESSED, _PAGE_COMPRESSED = 2, 3

Struct: TypeAlias = dict[int, Any]
"""Fields of a struct by number; readers expect a type of each, and take a TypeError for damage."""


def check_pages(file: Path, column: int, most: list[int]) -> None:
    """Refuse a column whose pages claim more bytes than its rows can have.

    Parameters
    ----------
    file
        The parquet file.
    column
        Position of a column without nested fields.
    most
        For each row group, the bytes that the column may have there.

    Raises
    ------
    CorruptDataError
        The column claims more, or its pages do not lie where the footer says.
    """
    try:
        with open(open_regular(file), "rb") as stream:
            groups = _footer(stream)
            if len(groups) != len(most):
                raise ValueError(f"{len(groups)} row groups, {len(most)} expected")
            for group, limit in zip(groups, most, strict=True):
                chunk = group[_COLUMNS][column]
                if _FILE_PATH in chunk:
                    raise ValueError(f"column {column} lies in another file, {chunk[_FILE_PATH][:100]!r}")
                claimed = 0
                for nbytes in _pages(stream, chunk[_META]):
                    claimed += nbytes
                    if claimed > limit:
                        raise ValueError(
                            f"pages of column {column} claim {claimed:,} bytes, at most {limit:,} are read"
                        )
    except (ValueError, KeyError, IndexError, TypeError, EOFError, RecursionError, OverflowError) as error:
        raise CorruptDataError(
            f"{file} cannot be read as parquet: {error}; the file is damaged, restore it or convert the "
            "source again"
        ) from error


def _footer(stream: BinaryIO) -> list[Struct]:
    size = os.fstat(stream.fileno()).st_size
    stream.seek(max(size - 8, 0))
    tail = stream.read(8)
    length = int.from_bytes(tail[:4], "little")
    if tail[4:] != _MAGIC or length > min(size - 8, FOOTER_BYTES):
        raise ValueError(f"a footer of {length:,} bytes in a file of {size:,}")
    stream.seek(size - 8 - length)
    footer = _Thrift(stream.read(length)).struct(_DEPTH)
    groups: list[Struct] = footer[_ROW_GROUPS]
    return groups


def _pages(stream: BinaryIO, meta: Struct) -> Iterator[int]:
    """Bytes of each page of a column chunk when it is decompressed."""
    at = meta[_DATA_OFFSET]
    if (dictionary := meta.get(_DICTIONARY_OFFSET, 0)) > 0:  # some writers store 0 where there is none
        at = min(at, dictionary)
    end = at + meta[_COMPRESSED]
    if at < 0 or meta[_COMPRESSED] < 0 or end > os.fstat(stream.fileno()).st_size:
        raise ValueError(f"a column at bytes {at} to {end}, beyond the file")
    while at < end:
        stream.seek(at)
        thrift = _Thrift(stream.read(min(_HEADER_BYTES, end - at)))
        header = thrift.struct(_DEPTH)
        uncompressed, compressed = header[_PAGE_UNCOMPRESSED], header[_PAGE_COMPRESSED]
        if min(uncompressed, compressed) < 0:
            raise ValueError(f"a page of {compressed} bytes, {uncompressed} decompressed")
        yield uncompressed
        at += thrift.at + compressed


class _Thrift:
    """Parses structs of the compact protocol: field number -> value; unknown fields are parsed and kept."""

    def __init__(self, raw: bytes) -> None:
        self._stream, self._size = io.BytesIO(raw), len(raw)

    @property
    def at(self) -> int:
        """Bytes parsed so far."""
        return self._stream.tell()

    def struct(self, depth: int) -> Struct:
        if not depth:
            raise ValueError("structs are nested too deeply")
        found: Struct = {}
        number = 0
        while head := self._byte():
            step, kind = head >> 4, head & 15
            number = number + step if step else self._zigzag()
            found[number] = kind == _TRUE if kind in (_TRUE, _FALSE) else self._value(kind, depth)
        return found

    def _value(self, kind: int, depth: int) -> Any:
        if kind in (_TRUE, _FALSE, _BYTE):  # inside lists, booleans take a byte
            return self._byte()
        if kind < _DOUBLE:
            return self._zigzag()
        if kind == _DOUBLE:
            return self._take(8)
        if kind == _BINARY:
            return self._take(self._varint())
        if kind in (_LIST, _SET):
            head = self._byte()
            n = head >> 4 if head >> 4 < 15 else self._varint()
            if n > self._size:
                raise ValueError(f"a list of {n:,} elements in {self._size:,} bytes")
            return [self._value(head & 15, depth) for _ in range(n)]
        if kind == _STRUCT:
            return self.struct(depth - 1)
        raise ValueError(f"type {kind} is not expected")

    def _byte(self) -> int:
        return self._take(1)[0]

    def _take(self, n: int) -> bytes:
        found = self._stream.read(n) if n <= self._size else b""
        if len(found) != n:
            raise ValueError("metadata end early")
        return found

    def _varint(self) -> int:
        value = shift = 0
        while True:
            byte = self._byte()
            value |= (byte & 127) << shift
            shift += 7
            if byte < 128:
                return value
            if shift > 63:
                raise ValueError("a number of more than 64 bits")

    def _zigzag(self) -> int:
        value = self._varint()
        return value >> 1 ^ -(value & 1)
