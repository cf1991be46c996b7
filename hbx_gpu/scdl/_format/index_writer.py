"""Feature index folders, written: obs and var tables become Arrow columns, blocks, streamed parquet."""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from hbx_gpu.errors import InvalidDataError
from hbx_gpu.scdl._format.frames import Columns, as_frame, cast, iter_parquet, joined_type, plain
from hbx_gpu.scdl._format.header import FeatureIndexInfo
from hbx_gpu.scdl._format.layout import ENDS, INDEX_VERSION, LABELS, LABELS_JSON, LAYOUT_VERSION, block_file

if TYPE_CHECKING:
    import pandas as pd


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


def _missing(value: object) -> bool:
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
        for i, block in enumerate(self._blocks):
            _join(block, self._folder / block_file(i, len(self._blocks)))
        sizes, labels = [block.n_rows for block in self._blocks], [block.label for block in self._blocks]
        return _finish(self._folder, sizes, labels)

    def _write(self, table: pa.Table) -> Path:
        path = self._scratch / f"{self._folder.name}_{next(self._count)}.parquet"
        pq.write_table(table, path)
        return path


def _without_missing_codes(table: pa.Table) -> pa.Table:
    """Categories with missing values as plain text: SCDL reads such a value as the last category."""
    for i, column in enumerate(table.columns):
        if pa.types.is_dictionary(column.type) and column.null_count:
            table = table.set_column(i, table.column_names[i], plain(column))
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
    a, b = plain(a), plain(b)
    if a.type != b.type:
        common = joined_type([a.type, b.type])
        if common is None:
            return False
        a, b = cast(a, common), cast(b, common)
    if pa.types.is_floating(a.type):
        x, y = a.to_numpy(), b.to_numpy()
        return bool(((x == y) | ((x != x) & (y != y))).all())
    return bool(a.equals(b))


def _merge(block: pa.Schema, new: pa.Schema) -> pa.Schema | None:
    """One schema for both, columns in the order of the new one; None if they must stay apart."""
    if set(block.names) != set(new.names):
        return None
    fields = []
    for name in new.names:
        common = joined_type([block.field(name).type, new.field(name).type])
        if common is None:
            return None
        fields.append(pa.field(name, common))
    return pa.schema(fields)


def _join(block: _Block, path: Path) -> None:
    """One parquet file from the pieces of a block, one row group in memory at a time."""
    if len(block.pieces) == 1:
        block.pieces[0].rename(path)
        return
    with pq.ParquetWriter(path, block.schema) as writer:
        for piece in block.pieces:
            for table in iter_parquet(piece):
                columns = [cast(table[column.name], column.type) for column in block.schema]
                writer.write_table(pa.table(columns, schema=block.schema))
            piece.unlink()


def write_feature_index(
    folder: Path, blocks: Iterable[tuple[int, Columns]], labels: Sequence[object] | None = None
) -> FeatureIndexInfo:
    """Write a feature index folder.

    Parameters
    ----------
    folder
        New or empty; its name is the name of the index (``var_features``, ``obs_features``).
    blocks
        Per block its number of rows (cells) and its columns: a Frame, a mapping of arrays or an Arrow table.
        They are not merged; :class:`VariableFeatureIndex` and :class:`ObservedFeatureIndex` do that.
    labels
        Per block a text, a path or None.

    Returns
    -------
    FeatureIndexInfo
        The record for the header.

    Raises
    ------
    FileExistsError
        The folder holds an index: files of a smaller one beside its own mislead the real package.
    InvalidDataError
        A column that parquet cannot hold.
    """
    folder.mkdir(parents=True, exist_ok=True)
    if any(folder.iterdir()):
        raise FileExistsError(f"{folder} is not empty; a feature index is written into a new folder")
    frames = [(int(n_rows), as_frame(columns)) for n_rows, columns in blocks]
    texts = ["" if label is None else str(label) for label in labels or [None] * len(frames)]
    if len(texts) != len(frames):
        raise ValueError(f"expected {len(frames)} labels, found {len(texts)}")
    for i, (_, frame) in enumerate(frames):
        pq.write_table(frame.table(), folder / block_file(i, len(frames)))
    return _finish(folder, [n_rows for n_rows, _ in frames], texts)


def _finish(folder: Path, sizes: Sequence[int], labels: Sequence[str]) -> FeatureIndexInfo:
    """Write all but the tables of blocks of so many rows; returns the record for the header."""
    np.save(folder / ENDS, np.array([-1, *itertools.accumulate(sizes)], np.int64))
    # Never objects, which would be a pickle; the real package has an empty float64 array without blocks.
    np.save(folder / LABELS, np.array(labels, np.str_) if labels else np.empty(0))
    # Release 0.1.3 reads the one file, later ones the other.
    (folder / LABELS_JSON).write_text(json.dumps([label or None for label in labels]))
    np.save(folder / INDEX_VERSION, np.array(LAYOUT_VERSION))
    files = [
        ENDS,
        LABELS,
        LABELS_JSON,
        INDEX_VERSION,
        *(block_file(i, len(sizes)) for i in range(len(sizes))),
    ]
    return FeatureIndexInfo(folder.name, sum(sizes), tuple(f"{folder.name}/{file}" for file in files))
