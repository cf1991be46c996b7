"""The columns of one feature block: in memory, in a parquet file, or several of them one below the other."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TypeAlias

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from hbx_gpu import _arrow
from hbx_gpu._untrusted import check_regular
from hbx_gpu.errors import CorruptDataError, InvalidDataError
from hbx_gpu.scdl._format.parquet_pages import check_pages

MAX_ROWS = 1 << 31
"""Largest number of rows of one feature block."""
LIMITS = {"thrift_string_size_limit": 64 << 20, "thrift_container_size_limit": 1 << 20}
"""Size limits of a parquet footer; a footer that needs more memory is refused."""
_ROW_BYTES, _SPARE_BYTES = 1 << 12, 64 << 20
# A column of one value takes next to nothing; one page for so many rows is what writers make of it.
_ROWS_PER_BYTE, _SPARE_ROWS = 1 << 12, 1 << 24


class Frame(Mapping[str, np.ndarray]):
    """Columns of equal length: a mapping of name -> NumPy array, each array made when it is asked for.

    Text arrives as an object array with None where it is missing, missing numbers as NaN.

    Attributes
    ----------
    names
        Column names, in stored order.
    n_rows
        Length of the columns; 0 without columns.
    """

    names: list[str]

    @property
    def n_rows(self) -> int:
        """Length of the columns."""
        raise NotImplementedError

    def arrow(self, name: str) -> pa.ChunkedArray:
        """One column as stored: null where a value is missing, dictionaries where it has categories."""
        raise NotImplementedError

    def __getitem__(self, name: str) -> np.ndarray:
        return decoded(self.arrow(name))

    def take(self, name: str, rows: np.ndarray) -> pa.ChunkedArray:
        """Some elements of a column, in the order asked for."""
        return self.arrow(name).take(pa.array(rows))

    def has_missing(self, name: str) -> bool:
        """Whether a value of a column is missing."""
        return bool(self.arrow(name).null_count > 0)

    def rows(self, name: str, rows: np.ndarray) -> np.ndarray:
        """Some elements of a column, in the order asked for, in the dtype of the whole column."""
        found = decoded(self.take(name, rows))
        if found.dtype.kind in "biu" and self.has_missing(name):
            return found.astype(object if found.dtype.kind == "b" else np.float64)
        return found

    def value(self, name: str, row: int) -> object:
        """One element of a column: a NumPy scalar, a bool, a text or None."""
        return self.rows(name, np.array([row]))[0]

    def table(self) -> pa.Table:
        """All columns as stored."""
        return pa.table({name: self.arrow(name) for name in self.names})

    def __iter__(self) -> Iterator[str]:
        return iter(self.names)

    def __len__(self) -> int:
        return len(self.names)


class MemoryFrame(Frame):
    """Columns in memory.

    Parameters
    ----------
    columns
        Name -> NumPy array, Arrow array, or anything that `numpy.asarray` takes.

    Raises
    ------
    TypeError
        Not a mapping.
    ValueError
        Columns of different lengths.
    """

    def __init__(self, columns: Mapping[str, object]) -> None:
        if not isinstance(columns, Mapping):
            raise TypeError(
                f"expected a dict of column name -> array, found {type(columns).__name__}; "
                "a pandas frame becomes one by {name: frame[name].to_numpy() for name in frame}"
            )
        self._columns = {str(name): _stored_form(column) for name, column in columns.items()}
        self.names = list(self._columns)
        lengths = {name: len(column) for name, column in self._columns.items()}
        if len(set(lengths.values())) > 1:
            raise ValueError(f"expected columns of equal length, found {lengths}")

    @property
    def n_rows(self) -> int:
        return next((len(column) for column in self._columns.values()), 0)

    def arrow(self, name: str) -> pa.ChunkedArray:
        column = self._columns[name]
        if isinstance(column, pa.ChunkedArray):
            return column
        try:
            return pa.chunked_array([pa.array(column, from_pandas=True)])
        except (pa.ArrowInvalid, pa.ArrowTypeError, pa.ArrowNotImplementedError) as error:
            raise InvalidDataError(
                f"column {name!r} holds values that have no common type ({error}); make them all text or all "
                "numbers first"
            ) from None

    def __getitem__(self, name: str) -> np.ndarray:
        column = self._columns[name]
        return decoded(column) if isinstance(column, pa.ChunkedArray) else column

    def value(self, name: str, row: int) -> object:
        column = self._columns[name]
        return super().value(name, row) if isinstance(column, pa.ChunkedArray) else column[row]


def decoded(column: pa.ChunkedArray) -> np.ndarray:
    """A column as NumPy array: text as objects, None where it is missing; missing numbers as NaN."""
    # `to_numpy` of a dictionary makes its last value of a missing one.
    result: np.ndarray = plain(column).to_numpy()
    return result


def _stored_form(column: object) -> pa.ChunkedArray | np.ndarray:
    if isinstance(column, pa.Array):
        return pa.chunked_array([column])
    return column if isinstance(column, pa.ChunkedArray) else np.asarray(column)


class StoredFrame(Frame):
    """Columns in a parquet file; what is asked for of them is read, and kept in Arrow's form.

    Single elements cost the row group that they are in, not the column.

    Parameters
    ----------
    file
        The parquet file; its footer is read at first use.

    Raises
    ------
    CorruptDataError
        At first use: the file is missing or is not a parquet file.
    """

    def __init__(self, file: Path) -> None:
        self.file = file
        self._schema: pa.Schema | None = None
        self._edges = np.zeros(1, np.int64)  # rows before each row group, and all
        self._columns: dict[str, pa.ChunkedArray] = {}
        self._groups: dict[tuple[str, int], pa.ChunkedArray] = {}
        self._checked: set[str] = set()
        self._missing: dict[str, bool] = {}

    def _open(self, texts: Sequence[str] = ()) -> pq.ParquetFile:
        """The open file; columns `texts` are read as dictionaries."""
        try:
            check_regular(self.file, self.file.stat())
            with self._decoding("the footer"):
                return pq.ParquetFile(self.file, read_dictionary=list(texts), **LIMITS)
        except FileNotFoundError:
            raise CorruptDataError(
                f"{self.file} is missing: expected one parquet file per feature block. Restore it, or "
                "convert the source again"
            ) from None
        except (pa.ArrowException, OSError) as error:
            raise CorruptDataError(f"{self.file} cannot be read as parquet: {error}") from None

    def _footer(self) -> pa.Schema:
        if self._schema is None:
            with self._open() as parquet, self._decoding("the footer"):
                footer = parquet.metadata
                sizes = [footer.row_group(i).num_rows for i in range(footer.num_row_groups)]
                self._check_sizes(footer, sizes)
                self._edges = np.array([0, *itertools.accumulate(sizes)], np.int64)
                self._schema = parquet.schema_arrow
        return self._schema

    @property
    def names(self) -> list[str]:  # type: ignore[override]
        return list(self._footer().names)

    @property
    def n_rows(self) -> int:
        return int(self._edges[-1]) if self._footer().names else 0

    def arrow(self, name: str) -> pa.ChunkedArray:
        if name not in self._columns:
            self._columns[name] = self._read(name, None)
            self._groups = {key: group for key, group in self._groups.items() if key[0] != name}
        return self._columns[name]

    def take(self, name: str, rows: np.ndarray) -> pa.ChunkedArray:
        names, n_groups = self._footer().names, len(self._edges) - 1
        group = np.searchsorted(self._edges, rows, side="right") - 1
        needed, place = np.unique(group, return_inverse=True)
        few = 0 < 2 * len(needed) <= n_groups
        if name in self._columns or name not in names or not few:
            return super().take(name, rows)
        for i in needed.tolist():
            if (name, i) not in self._groups:
                self._groups[name, i] = self._read(name, i)
        parts = [self._groups[name, i] for i in needed.tolist()]
        before = np.array([0, *itertools.accumulate(map(len, parts))])[place]
        chunks = [chunk for part in parts for chunk in part.chunks]
        return pa.chunked_array(chunks).take(pa.array(rows - self._edges[group] + before))

    def has_missing(self, name: str) -> bool:
        if name not in self._missing:
            place = self._footer().names.index(name)
            with self._open() as parquet, self._decoding("the footer"):
                footer = parquet.metadata
                groups = [footer.row_group(i).column(place) for i in range(footer.num_row_groups)]
            known = all(g.path_in_schema == name and g.is_stats_set for g in groups)
            counts = [g.statistics.null_count for g in groups if known and g.statistics.has_null_count]
            counted = known and len(counts) == len(groups)
            self._missing[name] = any(counts) if counted else super().has_missing(name)
        return self._missing[name]

    def _read(self, name: str, group: int | None) -> pa.ChunkedArray:
        """A column, or its part in one row group."""
        if name not in self._footer().names:
            raise KeyError(name)
        self._check_column(name)
        with self._decoding(f"column {name!r}"), self._open(self._texts([name])) as parquet:
            return self._decoded(parquet, [name], group).column(0)

    def pieces(self) -> Iterator[pa.Table]:
        """The row groups one after the other; at least one table, with the schema."""
        names = self._footer().names
        if len(self._edges) < 2:
            yield self._footer().empty_table()
            return
        for name in names:
            self._check_column(name)
        with self._open(self._texts(names)) as parquet:
            for group in range(len(self._edges) - 1):
                with self._decoding(f"row group {group}"):
                    table = self._decoded(parquet, names, group)
                yield table

    def _texts(self, names: Sequence[str]) -> list[str]:
        """Columns of text, read as dictionaries: a text that is stored once may be meant in every row."""
        kinds = {name: self._footer().field(name).type for name in names}
        return [n for n, kind in kinds.items() if pa.types.is_string(kind) or pa.types.is_large_string(kind)]

    def _decoded(self, parquet: pq.ParquetFile, names: Sequence[str], group: int | None) -> pa.Table:
        whole = group is None
        found = parquet.read(names) if whole else parquet.read_row_group(group, names)
        found.validate(full=True)
        for name in names:
            kind, column = self._footer().field(name).type, found.column(name)
            if column.type != kind:
                self._check_length(column, name)
                found = found.set_column(found.column_names.index(name), name, column.cast(kind))
        return found

    def _check_column(self, name: str) -> None:
        """Refuse pages that claim bytes without end, once."""
        if name in self._checked:
            return
        fields = list(self._footer())
        place = self._footer().names.index(name)
        first = sum(_n_leaves(field.type) for field in fields[:place])
        most = [_most(rows) for rows in np.diff(self._edges).tolist()]
        for leaf in range(first, first + _n_leaves(fields[place].type)):
            check_pages(self.file, leaf, most)
        self._checked.add(name)

    def _check_length(self, column: pa.ChunkedArray, name: str) -> None:
        """Refuse text that repeats without end."""
        claimed, most = 0, _most(len(column))
        for chunk in column.chunks:
            lengths = pc.fill_null(pc.binary_length(chunk.dictionary), 0).take(chunk.indices)
            claimed += pc.sum(lengths.cast(pa.int64())).as_py() or 0
        if claimed > most:
            raise CorruptDataError(
                f"{self.file}: {len(column):,} texts of column {name!r} have {claimed:,} bytes, at most "
                f"{most:,} are read; the file is damaged, restore it or convert the source again"
            )

    @contextmanager
    def _decoding(self, what: str) -> Iterator[None]:
        """Whatever Arrow raises about damaged bytes, as one error."""
        try:
            yield
        except (CorruptDataError, FileNotFoundError):
            raise
        except (pa.ArrowException, OSError, MemoryError, ValueError, OverflowError) as error:
            raise CorruptDataError(f"{self.file} cannot be read as parquet, {what}: {error}") from None

    def _check_sizes(self, footer: pq.FileMetaData, sizes: Sequence[int]) -> None:
        """Refuse what cannot be: few bytes may claim rows, and text in rows, without end."""
        rows, size = sum(sizes), self.file.stat().st_size
        most = min(MAX_ROWS, _SPARE_ROWS + _ROWS_PER_BYTE * size)
        if min(sizes, default=0) < 0 or rows > most:
            raise CorruptDataError(
                f"{self.file}: {rows:,} rows in {size:,} bytes; at most {most:,} are read. The file is "
                "damaged, restore it or convert the source again"
            )
        # Of row groups: asking a damaged footer for its columns ends the process in some releases of Arrow.
        claimed = sum(footer.row_group(i).total_byte_size for i in range(footer.num_row_groups))
        most = _SPARE_BYTES + (_most(rows) - _SPARE_BYTES) * max(footer.num_columns, 1)
        if claimed > most:
            raise CorruptDataError(
                f"{self.file}: {rows:,} rows in {footer.num_columns} columns claim {claimed:,} bytes, at "
                f"most {most:,} are read; the file is damaged, restore it or convert the source again"
            )

    def __getstate__(self) -> dict[str, Path]:
        return {"file": self.file}

    def __setstate__(self, state: dict[str, Path]) -> None:
        self.__init__(state["file"])  # type: ignore[misc]


class JoinedFrame(Frame):
    """Frames with the same column names one below the other; the last one gives the order of columns.

    Raises
    ------
    InvalidDataError
        A column is text in one frame and numbers in another.
    """

    def __init__(self, parts: Sequence[Frame]) -> None:
        self.parts: list[Frame] = []
        for part in parts:
            self.parts += part.parts if isinstance(part, JoinedFrame) else [part]
        self.names = list(self.parts[-1].names)
        # Found here, before anyone writes.
        self._types = {
            name: common_type([part.arrow(name).type for part in self.parts], name) for name in self.names
        }

    @property
    def n_rows(self) -> int:
        return sum(part.n_rows for part in self.parts)

    def arrow(self, name: str) -> pa.ChunkedArray:
        kind = self._types[name]
        chunks = [chunk for part in self.parts for chunk in cast(part.arrow(name), kind).chunks]
        return pa.chunked_array(chunks, type=kind)


def common_type(types: Sequence[pa.DataType], name: str) -> pa.DataType:
    """The type that holds columns of several types, as :func:`joined_type`.

    Raises
    ------
    InvalidDataError
        There is none: text and numbers.
    """
    known = list(dict.fromkeys(types))
    common = joined_type(known)
    if common is None:
        raise InvalidDataError(
            f"column {name!r} is {' in one place and '.join(map(str, known))} in another; rename the "
            "column or convert it in one of the sources"
        )
    return common


def joined_type(types: Sequence[pa.DataType]) -> pa.DataType | None:
    """The type that holds columns of several types, numbers promoted as in NumPy; None without one."""
    common = _arrow.common_type(types)
    if common is not None and pa.types.is_dictionary(common) and any(map(pa.types.is_null, types)):
        # SCDL reads a missing value among categories as the last category.
        return common.value_type
    return common


def cast(column: pa.ChunkedArray, kind: pa.DataType) -> pa.ChunkedArray:
    """A column in a type that :func:`joined_type` found; large numbers are rounded, as NumPy does."""
    if pa.types.is_boolean(column.type) and pa.types.is_floating(kind):
        column = column.cast(pa.uint8())
    return column.cast(kind, safe=False)


def plain(column: pa.ChunkedArray) -> pa.ChunkedArray:
    """A column without dictionaries."""
    return column.cast(column.type.value_type) if pa.types.is_dictionary(column.type) else column


def _n_leaves(kind: pa.DataType) -> int:
    """How many columns of a parquet file hold a column of this type: one, unless it is nested."""
    if pa.types.is_dictionary(kind) or not pa.types.is_nested(kind):
        return 1
    return sum(_n_leaves(kind.field(i).type) for i in range(kind.num_fields))


def _most(rows: int) -> int:
    """Bytes that a column of so many rows may have."""
    return _SPARE_BYTES + _ROW_BYTES * max(rows, 1)


Columns: TypeAlias = "Frame | Mapping[str, object] | pa.Table"
"""Columns in any form."""


def as_frame(columns: Columns) -> Frame:
    """A Frame of a Frame, a mapping of arrays or an Arrow table."""
    if isinstance(columns, Frame):
        return columns
    if isinstance(columns, pa.Table):
        return MemoryFrame(dict(zip(columns.column_names, columns.columns, strict=True)))
    return MemoryFrame(columns)


def iter_parquet(path: Path) -> Iterator[pa.Table]:
    """The row groups of a parquet file; at least one table, with its schema."""
    file = pq.ParquetFile(path)
    if not file.num_row_groups:
        yield file.schema_arrow.empty_table()
    for i in range(file.num_row_groups):
        yield file.read_row_group(i)
