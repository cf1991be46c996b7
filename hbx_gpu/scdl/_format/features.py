"""Feature indices: which gene (var) or cell (obs) columns belong to which rows, as a folder and in memory."""

from __future__ import annotations

import io
import operator
import os
from bisect import bisect_right
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Self

import numpy as np
import pyarrow as pa

from hbx_gpu._untrusted import read_small
from hbx_gpu.errors import CorruptDataError
from hbx_gpu.scdl._format.frames import Frame, JoinedFrame, StoredFrame, as_frame, cast, common_type
from hbx_gpu.scdl._format.index_writer import write_feature_index
from hbx_gpu.scdl._format.labels import read_labels
from hbx_gpu.scdl._format.layout import ENDS, LAYOUT_VERSION, OLD_FEATURES, VAR_FEATURES, block_file
from hbx_gpu.scdl._format.selection import ObservedRow, ObservedRows


def are_dicts_equal(one: Mapping[str, object], other: Mapping[str, object]) -> bool:
    """Whether frames have the same columns, in any order, with equal elements; a NaN equals nothing."""
    return set(one) == set(other) and all(
        np.array_equal(np.asarray(one[name]), np.asarray(other[name])) for name in one
    )


def var_folder(archive: Path) -> Path:
    """Folder of the genes of an archive, whichever release wrote it."""
    folder, old = archive / VAR_FEATURES, archive / OLD_FEATURES
    return old if old.is_dir() and not folder.is_dir() else folder


class FeatureIndex:
    """Blocks of consecutive rows, each with the columns that hold for them and the label of their source.

    Attributes
    ----------
    bounds
        int64, (n_blocks + 1,). Block ``b`` covers rows ``bounds[b]`` to ``bounds[b + 1] - 1``.
    frames, labels
        Per block; a label is the path of the file that the rows came from, or None.
    """

    def __init__(self) -> None:
        self._ends: list[int] = []
        self.frames: list[Frame] = []
        self.labels: list[object] = []

    @property
    def bounds(self) -> np.ndarray:
        """int64, (n_blocks + 1,)."""
        return np.array([0, *self._ends], np.int64)

    def __len__(self) -> int:
        return len(self.frames)

    def version(self) -> str:
        """The release whose layout is written."""
        return LAYOUT_VERSION

    def number_of_rows(self) -> int:
        """Number of rows of all blocks."""
        return self._ends[-1] if self._ends else 0

    def column_dims(self) -> list[int]:
        """Per block: number of genes (var) or of columns (obs)."""
        return [self._dims(frame) for frame in self.frames]

    def number_of_values(self) -> list[int]:
        """Per block: rows times `column_dims`; ``[0]`` without blocks."""
        sizes = np.diff(self.bounds).tolist()
        return [n * dims for n, dims in zip(sizes, self.column_dims(), strict=True)] or [0]

    def number_vars_at_row(self, row: int) -> int:
        """Number of genes (var) or of columns (obs) of one row."""
        return self._dims(self.frames[self.block_of(row)])

    def block_of(self, row: int) -> int:
        """The block of a row.

        Raises
        ------
        IndexError
            The row does not exist; negative row numbers are not allowed.
        """
        row = operator.index(row)
        if row < 0:
            raise IndexError(f"Row index {row} is not valid. It must be non-negative.")
        if not self.frames:
            raise IndexError("There are no features to lookup")
        if row >= self._ends[-1]:
            raise IndexError(f"Row index {row} is larger than number of rows ({self._ends[-1]}).")
        return bisect_right(self._ends, row)

    def lookup(self, row: int, select_features: Sequence[str] | None = None) -> tuple[list[Any], object]:
        """The columns of a row.

        Parameters
        ----------
        row
            0 to `number_of_rows` - 1.
        select_features
            Names of columns, None for all in stored order.

        Returns
        -------
        values
            Per column: the array of its genes (var), or the value of this cell (obs).
        label
            The label of the block.

        Raises
        ------
        IndexError
            Not a row.
        ValueError
            No such column; names those that there are.
        """
        block = self.block_of(row)
        frame = self.frames[block]
        names = frame.names if select_features is None else list(select_features)
        if unknown := [name for name in names if name not in frame.names]:
            raise ValueError(
                f"Provided feature column {', '.join(map(repr, unknown))} in select_features not present in "
                f"dataset. It has: {', '.join(map(repr, frame.names)) or 'no column'} (block {block})"
            )
        return [self._value(block, name, int(row)) for name in names], self.labels[block]

    def _dims(self, frame: Frame) -> int:
        raise NotImplementedError

    def _value(self, block: int, name: str, row: int) -> object:
        raise NotImplementedError

    def _append(self, n_rows: int, frame: Frame, label: object) -> None:
        raise NotImplementedError

    def _add_block(self, n_rows: int, frame: Frame, label: object) -> None:
        self._ends.append(self.number_of_rows() + n_rows)
        self.frames.append(frame)
        self.labels.append(label)

    def concat(self, other_row_index: FeatureIndex) -> Self:
        """Append the blocks of another index, in place.

        Parameters
        ----------
        other_row_index
            An index of the same kind.

        Raises
        ------
        TypeError
            The other is an index of another kind.
        InvalidDataError
            Columns that cannot be joined; nothing was changed then.
        """
        other = other_row_index
        if type(other) is not type(self):
            raise TypeError(f"expected {type(self).__name__}, found {type(other).__name__}")
        joined = type(self)()
        joined._ends, joined.frames, joined.labels = list(self._ends), list(self.frames), list(self.labels)
        sizes = np.diff(other.bounds).tolist()
        for n_rows, frame, label in zip(sizes, other.frames, other.labels, strict=True):
            joined._append(n_rows, frame, label)
        self._ends, self.frames, self.labels = joined._ends, joined.frames, joined.labels
        return self

    def save(self, datapath: str | os.PathLike[str]) -> None:
        """Write the index into a folder that is new or empty."""
        write_feature_index(
            Path(datapath), zip(np.diff(self.bounds).tolist(), self.frames, strict=True), self.labels
        )

    @classmethod
    def load(cls, datapath: str | os.PathLike[str]) -> Self:
        """Open the index in a folder; columns are read when they are asked for.

        Parameters
        ----------
        datapath
            ``var_features``, ``obs_features`` or (up to 0.1.2) ``features`` of an archive.

        Raises
        ------
        FileNotFoundError
            No index in that folder.
        CorruptDataError
            Its files contradict each other.
        """
        folder = Path(datapath)
        ends = _read_ends(folder / ENDS)
        present = set(os.listdir(folder))
        files = [block_file(b, len(ends)) for b in range(len(ends))]
        if missing := [name for name in files if name not in present]:
            raise CorruptDataError(
                f"{folder}: {ENDS} names {len(ends)} blocks, but {', '.join(missing[:5])} "
                f"{'is' if len(missing) == 1 else 'are'} missing. Restore the folder, or convert the source "
                "again"
            )
        index = cls()
        index._ends = ends
        # Only files of this block count: a smaller one's may be left over beside them.
        index.frames = [StoredFrame(folder / name) for name in files]
        index.labels = list(read_labels(folder, len(ends)))
        return index


def _read_ends(file: Path) -> list[int]:
    try:
        raw = read_small(file)
        stored = np.load(io.BytesIO(raw), allow_pickle=False)
    except FileNotFoundError:
        raise FileNotFoundError(f"{file} is missing: {file.parent} is not a complete feature index") from None
    except Exception as error:  # NumPy parses the header as Python, and fails in as many ways
        raise CorruptDataError(f"{file} cannot be read: {error}") from None
    if stored.ndim != 1 or stored.dtype.kind not in "iu" or not len(stored) or stored[0] != -1:
        raise CorruptDataError(
            f"{file}: expected -1 and the end row of every block, found {stored.dtype} {stored.shape} "
            f"{stored.ravel()[:5].tolist()}"
        )
    ends = [int(end) for end in stored[1:]]
    if any(b < a for a, b in zip([0, *ends], ends, strict=False)):
        raise CorruptDataError(f"{file}: expected end rows in ascending order, found {ends[:20]}")
    return ends


class VariableFeatureIndex(FeatureIndex):
    """The gene columns (`.var`) of every block of rows."""

    def append_features(self, n_obs: int, features: object, label: object = None) -> None:
        """Add rows with their gene columns; they join the last block if its columns are the same.

        Parameters
        ----------
        n_obs
            Number of rows (cells).
        features
            Column name -> array with one element per gene.
        label
            Where the rows came from.

        Raises
        ------
        TypeError
            `features` is not a mapping.
        ValueError
            Columns of different lengths.
        """
        self._append(int(n_obs), as_frame(features), label)

    def _append(self, n_rows: int, frame: Frame, label: object) -> None:
        if self.frames and are_dicts_equal(self.frames[-1], frame):
            self._ends[-1] += n_rows
        else:
            self._add_block(n_rows, frame, label)

    def _dims(self, frame: Frame) -> int:
        return frame.n_rows

    def _value(self, block: int, name: str, row: int) -> object:  # noqa: ARG002
        return self.frames[block][name]


class ObservedFeatureIndex(FeatureIndex):
    """The cell columns (`.obs`), one value per row."""

    def append_features(self, features: object, label: object = None) -> None:
        """Add rows by their columns; they join the last block if the names of the columns are the same.

        Parameters
        ----------
        features
            Column name -> array with one element per row. Without rows nothing is added.
        label
            Where the rows came from.

        Raises
        ------
        TypeError
            `features` is not a mapping.
        ValueError
            Columns of different lengths, or text that joins numbers.
        """
        frame = as_frame(features)
        self._append(frame.n_rows, frame, label)

    def _append(self, n_rows: int, frame: Frame, label: object) -> None:
        if not n_rows:
            return
        if self.frames and set(self.frames[-1].names) == set(frame.names):
            self.frames[-1] = JoinedFrame([self.frames[-1], frame])
            self._ends[-1] += n_rows
        else:
            self._add_block(n_rows, frame, label)

    def _dims(self, frame: Frame) -> int:
        return len(frame)

    def _value(self, block: int, name: str, row: int) -> object:
        return self._checked(block).value(name, row - (self._ends[block - 1] if block else 0))

    def _checked(self, block: int) -> Frame:
        """The frame of a block, which must have a value for each of its rows."""
        frame = self.frames[block]
        expected = self._ends[block] - (self._ends[block - 1] if block else 0)
        if len(frame) and frame.n_rows != expected:
            where = frame.file if isinstance(frame, StoredFrame) else "obs"
            raise CorruptDataError(
                f"{where}: expected {expected} rows (block {block}), found {frame.n_rows}. Restore "
                "the obs_features folder, or convert the source again"
            )
        return frame

    def column(self, name: str) -> pa.ChunkedArray:
        """One column over all rows; null in blocks that do not have it.

        Raises
        ------
        ValueError
            No block has it.
        InvalidDataError
            It is text in one block and numbers in another.
        """
        if not any(name in frame.names for frame in self.frames):
            known = ", ".join(map(repr, self.names)) or "none"
            raise ValueError(f"no obs column {name!r}; there are: {known}")
        frames = [self._checked(block) for block in range(len(self))]
        kind = common_type([f.arrow(name).type for f in frames if name in f.names], name)
        chunks: list[pa.Array] = []
        for frame, n_rows in zip(frames, np.diff(self.bounds).tolist(), strict=True):
            chunks += (
                cast(frame.arrow(name), kind).chunks if name in frame.names else [pa.nulls(n_rows, kind)]
            )
        return pa.chunked_array(chunks, type=kind)

    @property
    def names(self) -> list[str]:
        """Names of the columns of all blocks, in order of first appearance."""
        return list(dict.fromkeys(name for frame in self.frames for name in frame.names))

    def __getitem__(self, index: int | slice) -> ObservedRow | ObservedRows:
        """The columns of one row, or of rows.

        Returns
        -------
        ObservedRow or ObservedRows
            A pair as documented there. Rows arrive in the order asked for.

        Raises
        ------
        IndexError
            Not a row; -1 is the last.
        TypeError
            Neither an integer nor a slice.
        """
        if isinstance(index, slice):
            return self._rows(range(*index.indices(self.number_of_rows())))
        try:
            row = operator.index(index)
        except TypeError:
            raise TypeError(f"Index must be int or slice, found {type(index).__name__}") from None
        if not -self.number_of_rows() <= row < self.number_of_rows():
            raise IndexError(f"Row index {row} is out of range: there are {self.number_of_rows()} rows")
        row %= self.number_of_rows()
        values, label = self.lookup(row)
        return ObservedRow(values, label, self.frames[self.block_of(row)].names)

    def _rows(self, rows: range) -> ObservedRows:
        parts, labels = [], []
        # Blocks in the order in which the rows touch them.
        for block in range(len(self))[:: 1 if rows.step > 0 else -1]:
            start, stop = (int(edge) for edge in self.bounds[block : block + 2])
            local = _within(rows, start, stop)
            if not local:
                continue
            frame = self._checked(block)
            take = np.arange(local[0] - start, local[-1] - start + np.sign(local.step), local.step)
            parts.append({name: frame.rows(name, take) for name in frame.names})
            labels.append(self.labels[block])
        return ObservedRows(parts, labels)


def _within(rows: range, start: int, stop: int) -> range:
    """The part of a range of rows that lies in [start, stop)."""
    low, high = (start, stop - 1) if rows.step > 0 else (stop - 1, start)
    first = max(0, -((rows.start - low) // rows.step))
    last = min(len(rows), (high - rows.start) // rows.step + 1)
    return rows[first : max(first, last)]
