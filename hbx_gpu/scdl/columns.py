"""The columns of one feature block: in memory, in a parquet file, or several of them one below the other."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from hbx_gpu.errors import CorruptDataError, InvalidDataError


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

    def value(self, name: str, row: int) -> Any:
        """One element of a column: a NumPy scalar, a text or None."""
        return decoded(self.arrow(name).slice(row, 1))[0]

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

    def __init__(self, columns: Mapping[str, Any]) -> None:
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

    def value(self, name: str, row: int) -> Any:
        column = self._columns[name]
        return super().value(name, row) if isinstance(column, pa.ChunkedArray) else column[row]


def decoded(column: pa.ChunkedArray) -> np.ndarray:
    """A column as NumPy array: text as objects, None where it is missing; missing numbers as NaN."""
    if pa.types.is_dictionary(column.type):
        # `to_numpy` of a dictionary makes its last value of a missing one.
        column = column.cast(column.type.value_type)
    return column.to_numpy()


def _stored_form(column: Any) -> Any:
    if isinstance(column, pa.Array):
        return pa.chunked_array([column])
    return column if isinstance(column, pa.ChunkedArray) else np.asarray(column)


class StoredFrame(Frame):
    """Columns in a parquet file; each is read when it is first asked for, and kept in Arrow's form.

    Parameters
    ----------
    file
        The parquet file; its footer is read at first use.

    Raises
    ------
    CorruptDataError
        At first use: the file is missing or is no parquet file.
    """

    def __init__(self, file: Path) -> None:
        self.file = file
        self._schema: pa.Schema | None = None
        self._n_rows = 0
        self._columns: dict[str, pa.ChunkedArray] = {}

    def _open(self) -> pq.ParquetFile:
        try:
            return pq.ParquetFile(self.file)
        except FileNotFoundError:
            raise CorruptDataError(
                f"{self.file} is missing: expected one parquet file per feature block. Restore it, or "
                "convert the source again"
            ) from None
        except (pa.ArrowException, OSError) as error:
            raise CorruptDataError(f"{self.file} cannot be read as parquet: {error}") from None

    def _footer(self) -> pa.Schema:
        if self._schema is None:
            with self._open() as parquet:
                self._schema, self._n_rows = parquet.schema_arrow, parquet.metadata.num_rows
        return self._schema

    @property
    def names(self) -> list[str]:  # type: ignore[override]
        return list(self._footer().names)

    @property
    def n_rows(self) -> int:
        return self._n_rows if self._footer().names else 0

    def arrow(self, name: str) -> pa.ChunkedArray:
        if name not in self._columns:
            if name not in self._footer().names:
                raise KeyError(name)
            try:
                with self._open() as parquet:
                    self._columns[name] = parquet.read(columns=[name]).column(0)
            except (pa.ArrowException, OSError) as error:
                raise CorruptDataError(f"{self.file}, column {name!r}: {error}") from None
        return self._columns[name]

    def __getstate__(self) -> dict[str, Any]:
        return {"file": self.file}

    def __setstate__(self, state: dict[str, Any]) -> None:
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
        chunks = [chunk for part in self.parts for chunk in part.arrow(name).cast(kind).chunks]
        return pa.chunked_array(chunks, type=kind)


def common_type(types: Sequence[pa.DataType], name: str) -> pa.DataType:
    """The type that holds columns of several types, with NumPy's promotion among numbers.

    Raises
    ------
    InvalidDataError
        Text and numbers.
    """
    known = [t for t in dict.fromkeys(types) if not pa.types.is_null(t)]
    if len(known) <= 1:
        return known[0] if known else pa.null()
    plain = [t.value_type if pa.types.is_dictionary(t) else t for t in known]
    if all(pa.types.is_string(t) or pa.types.is_large_string(t) for t in plain):
        return pa.string() if all(pa.types.is_string(t) for t in plain) else pa.large_string()
    if all(pa.types.is_integer(t) or pa.types.is_floating(t) or pa.types.is_boolean(t) for t in plain):
        return pa.from_numpy_dtype(np.result_type(*(t.to_pandas_dtype() for t in plain)))
    raise InvalidDataError(
        f"column {name!r} is {' in one place and '.join(map(str, known))} in another; rename the column or "
        "convert it in one of the sources"
    )


def as_frame(columns: Any) -> Frame:
    """A Frame of a Frame, a mapping of arrays or an Arrow table."""
    if isinstance(columns, Frame):
        return columns
    if isinstance(columns, pa.Table):
        return MemoryFrame(dict(zip(columns.column_names, columns.columns, strict=True)))
    return MemoryFrame(columns)
