"""obs and var tables on their way into a feature index folder: Arrow columns, blocks, streamed parquet."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from hbx_gpu.errors import InvalidDataError
from hbx_gpu.scdl.header import FeatureIndexInfo

if TYPE_CHECKING:
    import pandas as pd

# Release of SCDL whose layout is written; programs that compare versions expect one of theirs.
LAYOUT_VERSION = "0.1.3"


def to_table(frame: pd.DataFrame, *, index_name: str, source: str) -> pa.Table:
    """Columns of a data frame; its index, as a column, if there are none.

    Strings become string columns, categories of strings too, dictionary encoded and in their order (plain
    where values are missing); other categories the type of their values. Missing values are null; columns
    of mixed kinds, text.

    Parameters
    ----------
    frame
        obs or var.
    index_name
        Name of the column for the index.
    source
        For messages.

    Raises
    ------
    InvalidDataError
        Two columns have one name.
    """
    if not frame.columns.size:
        return pa.table({index_name: pa.array([str(name) for name in frame.index], pa.string())})
    names = [str(name) for name in frame.columns]
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        raise InvalidDataError(f"{source}: several columns are named {twice}; rename them, names must differ")
    return pa.table({name: _column(frame.iloc[:, i]) for i, name in enumerate(names)})


def _column(values: pd.Series) -> pa.Array:
    import pandas as pd

    if isinstance(values.dtype, pd.CategoricalDtype):
        categories = values.cat.categories
        if all(isinstance(category, str) for category in categories):
            codes = pa.array(values.cat.codes.to_numpy(), mask=values.isna().to_numpy())
            return pa.DictionaryArray.from_arrays(
                codes, pa.array(list(categories), pa.string()), ordered=bool(values.cat.ordered)
            )
        values = values.astype(object if values.isna().any() else categories.dtype)
    try:
        array = pa.array(values, from_pandas=True)
    except (pa.ArrowInvalid, pa.ArrowTypeError, pa.ArrowNotImplementedError):
        # Mixed objects, which parquet cannot hold either.
        array = pa.array([None if _missing(v) else str(v) for v in values], pa.string())
    if isinstance(array, pa.ChunkedArray):
        array = array.combine_chunks()
    return pc.cast(array, pa.string()) if pa.types.is_large_string(array.type) else array


def _missing(value: Any) -> bool:
    return value is None or value != value


@dataclass
class _Block:
    """Consecutive rows that share a table (var) or its columns (obs)."""

    n_rows: int
    label: str
    schema: pa.Schema
    pieces: list[Path] = field(default_factory=list)


class FeatureFolder:
    """Writes a feature index folder block by block; only file names and schemas stay in memory.

    Parameters
    ----------
    folder
        The index folder; made by :meth:`finish`.
    scratch
        Existing folder for unfinished files on the same file system.
    """

    def __init__(self, folder: Path, scratch: Path) -> None:
        self._folder, self._scratch = folder, scratch
        self._blocks: list[_Block] = []
        self._count = itertools.count()
        self._last_var: tuple[pa.Table, Sequence[str] | None] | None = None

    @property
    def n_rows(self) -> int:
        """Rows of all blocks."""
        return sum(block.n_rows for block in self._blocks)

    @property
    def n_blocks(self) -> int:
        """Number of blocks so far."""
        return len(self._blocks)

    def append_var(self, table: pa.Table, n_rows: int, label: str, names: Sequence[str] | None) -> bool:
        """The features of the next `n_rows` cells; False where they are those of the cells before.

        They are if the columns agree in name and value (missing equals missing) whatever their order, and
        so do the names where both are known.
        """
        table = _without_missing_codes(table)
        if self._last_var is not None and _same_features(self._last_var, (table, names)):
            self._blocks[-1].n_rows += n_rows
            return False
        self._last_var = table, names
        self._blocks.append(_Block(n_rows, label, table.schema, [self._write(table)]))
        return True

    def append_obs(self, tables: Iterator[pa.Table], n_rows: int, label: str) -> None:
        """The next cells, as tables of one schema; they join the block before if that has the same columns.

        Columns of numbers join as NumPy promotes them, others only if they are of one kind.
        """
        if not n_rows:
            return
        for i, table in enumerate(map(_without_missing_codes, tables)):
            merged = _merge(self._blocks[-1].schema, table.schema) if self._blocks else None
            if merged is not None:
                self._blocks[-1].schema = merged
            elif i == 0:
                self._blocks.append(_Block(0, label, table.schema))
            else:
                raise ValueError(f"pieces of one table differ: {self._blocks[-1].schema} and {table.schema}")
            self._blocks[-1].pieces.append(self._write(table))
        self._blocks[-1].n_rows += n_rows

    def finish(self) -> FeatureIndexInfo:
        """Write the folder; returns its record for the header."""
        self._folder.mkdir()
        digits = len(str(len(self._blocks)))
        tables = [f"dataframe_{i:0{digits}d}.parquet" for i in range(len(self._blocks))]
        for block, file in zip(self._blocks, tables, strict=True):
            _join(block, self._folder / file)
        ends = np.cumsum([block.n_rows for block in self._blocks], dtype=np.int64)
        np.save(self._folder / "cumulative_sum_index.npy", np.concatenate([[-1], ends]).astype(np.int64))
        # Strings only, so that no reader has to unpickle anything.
        labels = np.array([block.label for block in self._blocks]) if self._blocks else np.empty(0)
        np.save(self._folder / "labels.npy", labels)
        np.save(self._folder / "version.npy", np.array(LAYOUT_VERSION))
        files = ["cumulative_sum_index.npy", "labels.npy", "version.npy", *tables]
        name = self._folder.name
        return FeatureIndexInfo(name, self.n_rows, tuple(f"{name}/{file}" for file in files))

    def _write(self, table: pa.Table) -> Path:
        path = self._scratch / f"{self._folder.name}_{next(self._count)}.parquet"
        pq.write_table(table, path)
        return path


def _without_missing_codes(table: pa.Table) -> pa.Table:
    """Categories with missing values as plain text: SCDL reads such a value as the last category."""
    for i, column in enumerate(table.columns):
        if pa.types.is_dictionary(column.type) and column.null_count:
            table = table.set_column(i, table.column_names[i], _plain(column))
    return table


def _same_features(
    a: tuple[pa.Table, Sequence[str] | None], b: tuple[pa.Table, Sequence[str] | None]
) -> bool:
    (table, names), (other, other_names) = a, b
    if set(table.column_names) != set(other.column_names) or len(table) != len(other):
        return False
    if names is not None and other_names is not None and list(names) != list(other_names):
        return False
    if not table.num_columns:
        # Nothing tells whether unnamed features without columns are the same ones.
        return names is not None and other_names is not None
    return all(_equal(table[name], other[name]) for name in table.column_names)


def _equal(a: pa.ChunkedArray, b: pa.ChunkedArray) -> bool:
    a, b = _plain(a), _plain(b)
    if a.type != b.type:
        common = _promote(a.type, b.type)
        if common is None:
            return False
        a, b = _cast(a, common), _cast(b, common)
    if pa.types.is_floating(a.type):
        x, y = a.to_numpy(), b.to_numpy()
        return bool(((x == y) | ((x != x) & (y != y))).all())
    return bool(a.equals(b))


def _plain(column: pa.ChunkedArray) -> pa.ChunkedArray:
    return column.cast(column.type.value_type) if pa.types.is_dictionary(column.type) else column


def _merge(block: pa.Schema, new: pa.Schema) -> pa.Schema | None:
    """One schema for both, columns in the order of the new one; None if they must stay apart."""
    if set(block.names) != set(new.names):
        return None
    fields = []
    for name in new.names:
        common = _promote(block.field(name).type, new.field(name).type)
        if common is None:
            return None
        fields.append(pa.field(name, common))
    return pa.schema(fields)


def _promote(a: pa.DataType, b: pa.DataType) -> pa.DataType | None:
    if a == b or pa.types.is_null(b):
        return a
    if pa.types.is_null(a):
        return b
    if _is_text(a) and _is_text(b):
        both = pa.types.is_dictionary(a) and pa.types.is_dictionary(b)
        return pa.dictionary(pa.int32(), pa.string()) if both else pa.string()
    if all(pa.types.is_boolean(t) or pa.types.is_integer(t) or pa.types.is_floating(t) for t in (a, b)):
        return pa.from_numpy_dtype(np.promote_types(a.to_pandas_dtype(), b.to_pandas_dtype()))
    return None


def _is_text(kind: pa.DataType) -> bool:
    kind = kind.value_type if pa.types.is_dictionary(kind) else kind
    return pa.types.is_string(kind) or pa.types.is_large_string(kind)


def _cast(column: pa.ChunkedArray, kind: pa.DataType) -> pa.ChunkedArray:
    if pa.types.is_boolean(column.type) and pa.types.is_floating(kind):
        column = column.cast(pa.uint8())
    return column.cast(kind, safe=False)


def _join(block: _Block, path: Path) -> None:
    """One parquet file from the pieces of a block, one row group in memory at a time."""
    if len(block.pieces) == 1:
        block.pieces[0].rename(path)
        return
    with pq.ParquetWriter(path, block.schema) as writer:
        for piece in block.pieces:
            for table in iter_parquet(piece):
                columns = [_cast(table[column.name], column.type) for column in block.schema]
                writer.write_table(pa.table(columns, schema=block.schema))
            piece.unlink()


def iter_parquet(path: Path) -> Iterator[pa.Table]:
    """The row groups of a parquet file; at least one table, with its schema."""
    file = pq.ParquetFile(path)
    if not file.num_row_groups:
        yield file.schema_arrow.empty_table()
    for i in range(file.num_row_groups):
        yield file.read_row_group(i)
