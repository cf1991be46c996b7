"""The vocabulary between the rooms: stored arrays, Sources and the rows of a dataset.

The rooms that open data (atlas, scdl, stores) make these objects; plan, engine and loader use nothing else of
them.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any, NotRequired, Protocol, TypeAlias, TypedDict

import numpy as np

_AT_ONCE = 1 << 20  # rows that are looked at together


@dataclass(frozen=True, slots=True, eq=False)
class ChunkTable:
    """Where the chunks of one array lie inside a single file, as an HDF5 file lists them.

    Attributes
    ----------
    offset
        int64, (n_chunks,). First byte of each chunk in the file, chunks in C order over the grid.
    nbytes
        int64, (n_chunks,). Stored size of each chunk; -1 for a chunk that was never written.
    skipped
        uint32, (n_chunks,). Bit i is set where the i-th filter of the chain was not applied to a chunk;
        None where every chunk went through every filter.
    """

    offset: np.ndarray
    nbytes: np.ndarray
    skipped: np.ndarray | None = None


Scalar: TypeAlias = bool | int | float | np.bool | np.integer | np.floating
"""One element of an array."""
Configuration: TypeAlias = dict[str, Any]
"""Settings of a codec: JSON whose form follows from the codec's name; whoever reads one checks it."""


class Codec(TypedDict):
    """One codec of a chain, as the metadata of a zarr v3 array have it."""

    name: str
    configuration: NotRequired[Configuration]


@dataclass(frozen=True, slots=True)
class ArrayLayout:
    """Where and how one array is stored: everything needed to find and decode its chunks.

    Attributes
    ----------
    path
        Directory of the array.
    name
        Path of the array inside its store, for messages (``set0/gene_expression/csr/indices``).
    shape, dtype
        Shape and dtype of the whole array; the dtype has native byte order.
    chunk_shape
        Shape of a chunk, the unit that is compressed (the inner chunk of a sharded array).
    shard_shape
        Elements covered by one stored object; equals chunk_shape when the array is not sharded.
    codecs
        Codec chain of a chunk as in the metadata, outermost encoding step last.
    fill_value
        Value of elements whose chunk or shard is absent.
    sharded, index_at_end, index_codecs
        Whether the array is sharded, whether a shard's index is at its end, and how the index is encoded.
    key_prefix, key_separator
        The key of an object is key_prefix, then the shard's grid coordinates joined by key_separator.
    absent_is_fill
        Whether a missing object means fill value. False where the writer writes every object, so that a
        missing one is corruption.
    fingerprint
        Fingerprint of the metadata document that this layout was read from, to notice when the array is
        replaced by another one; empty where there is none.
    byte_offset
        First byte of the elements in a plain file: `path` is then a file of uncompressed elements, and chunks
        are consecutive parts of it, the last of which may be shorter. None for arrays stored as objects.
    within
        Folder that no link on the way to the array's files may lead out of; empty where links may lead
        anywhere.
    table
        Where each chunk lies in the file `path`, for arrays inside an HDF5 file. None for all others.
    watched
        True where other programs may rewrite the file `path`: its size and time of change are then compared
        with `fingerprint` whenever chunks are looked up.
    """

    path: str
    name: str
    shape: tuple[int, ...]
    dtype: np.dtype
    chunk_shape: tuple[int, ...]
    shard_shape: tuple[int, ...]
    codecs: tuple[Codec, ...]
    fill_value: Scalar = 0
    sharded: bool = False
    index_at_end: bool = True
    index_codecs: tuple[Codec, ...] = ()
    key_prefix: str = "c/"
    key_separator: str = "/"
    absent_is_fill: bool = True
    fingerprint: str = field(default="", compare=False)
    byte_offset: int | None = None
    within: str = field(default="", compare=False)
    table: ChunkTable | None = field(default=None, compare=False, repr=False)
    watched: bool = False

    def elsewhere(
        self,
        path: str,
        name: str,
        shape: tuple[int, ...],
        absent_is_fill: bool,
        fingerprint: str,
        within: str,
    ) -> ArrayLayout:
        """An array that differs from this one in these attributes only.

        `dataclasses.replace` does the same in twice the time, and an atlas has thousands of such arrays.
        """
        return ArrayLayout(
            path, name, shape, self.dtype, self.chunk_shape, self.shard_shape, self.codecs, self.fill_value,
            self.sharded, self.index_at_end, self.index_codecs, self.key_prefix, self.key_separator,
            absent_is_fill, fingerprint, self.byte_offset, within, self.table, self.watched,
        )  # fmt: skip


@dataclass(frozen=True, slots=True)
class Source:
    """One stored matrix opened for reading.

    Attributes
    ----------
    name
        Path of the group, for messages.
    index
        1-D array of local column numbers (sparse), or None for dense matrices, images and encoded bytes.
    layers
        Value arrays by layer name, parallel to `index` (sparse: 1-D; others: any number of axes).
    remap
        int32, (n_local_features,). Local column -> output column, -1 = drop. Sources that share a
        layout share the array object.
    repeats
        True where a column may well occur many times in a row (chromosomes of fragments).
    """

    name: str
    index: ArrayLayout | None
    layers: dict[str, ArrayLayout]
    remap: np.ndarray
    repeats: bool = False


@dataclass(frozen=True, slots=True)
class RowIndex:
    """Where each row of a dataset lies: 16 bytes per row.

    Attributes
    ----------
    source
        int32, (n,). Position in the dataset's list of Sources; -1 = the row lacks this modality.
    start
        int64, (n,). First element in the Source's flat arrays (dense: position on the row axis).
    length
        int32, (n,). Number of elements (dense: 1).
    """

    source: np.ndarray
    start: np.ndarray
    length: np.ndarray

    def __len__(self) -> int:
        return len(self.source)

    def at(self, rows: np.ndarray) -> RowIndex:
        """Places of some rows, int64 (k,) or a mask of all rows."""
        return RowIndex(self.source[rows], self.start[rows], self.length[rows])

    def slice(self, begin: int, end: int) -> RowIndex:
        """Places of the rows ``range(begin, end)``, without a copy."""
        return RowIndex(self.source[begin:end], self.start[begin:end], self.length[begin:end])

    def arrays(self) -> dict[str, np.ndarray]:
        """The arrays by name, from which the same index can be made."""
        return {name: getattr(self, name) for name in self.__slots__}

    def groups(self) -> GroupRuns:
        """The source of each row, as runs."""
        return GroupRuns.of(self.source)

    def outermost(self) -> RowIndex:
        """All rows: nothing is known of one from the others."""
        return self


class RowTable(Protocol):
    """Where each row of a dataset lies, however that is kept.

    `source`, `start` and `length` are the arrays of :class:`RowIndex`; making them may take time and memory,
    so code that needs some rows only asks :meth:`at` or :meth:`slice` for them.
    """

    def __len__(self) -> int: ...

    @property
    def source(self) -> np.ndarray:
        """int32, (n,)."""

    @property
    def start(self) -> np.ndarray:
        """int64, (n,)."""

    @property
    def length(self) -> np.ndarray:
        """int32, (n,)."""

    def at(self, rows: np.ndarray) -> RowIndex:
        """Places of some rows, int64 (k,)."""

    def slice(self, begin: int, end: int) -> RowIndex:
        """Places of the rows ``range(begin, end)``."""

    def arrays(self) -> dict[str, np.ndarray]:
        """The arrays by name, from which the same index can be made."""

    def groups(self) -> GroupRuns:
        """The source of each row, as runs."""

    def outermost(self) -> RowIndex:
        """Places of some rows, of which it is known that all others lie between them in the same Source."""


@dataclass(frozen=True, slots=True, eq=False)
class GroupRuns:
    """The number of the stored matrix of every row, kept as runs of rows that have the same one.

    It behaves as the array that it stands for: it has a length, ``runs[rows]`` looks rows up, and
    ``numpy.asarray(runs)`` makes the array. Samplers take it in the place of the array.

    Attributes
    ----------
    codes
        Integer, (n_runs,). Number of the stored matrix of each run.
    starts
        int64, (n_runs + 1,), ascending from 0. First row of each run; the last entry is the number of rows.
    """

    codes: np.ndarray
    starts: np.ndarray

    @classmethod
    def one(cls, n_rows: int) -> GroupRuns:
        """`n_rows` rows of a single group, for orders that do not depend on groups."""
        return cls(np.zeros(1, np.int32), np.array([0, n_rows]))

    @classmethod
    def of(cls, codes: np.ndarray) -> GroupRuns:
        """The runs of an integer array (n,)."""
        starts, kept, before = [np.empty(0, np.int64)], [codes[:0]], None
        for begin in range(0, len(codes), _AT_ONCE):
            values = codes[begin : begin + _AT_ONCE]
            changed = np.flatnonzero(values[1:] != values[:-1]) + 1
            if before is None or values[0] != before:
                changed = np.concatenate([[0], changed])
            starts.append(changed + begin)
            kept.append(values[changed])
            before = values[-1]
        return cls(np.concatenate(kept), np.append(np.concatenate(starts), len(codes)).astype(np.int64))

    def __len__(self) -> int:
        return int(self.starts[-1])

    def __getitem__(self, rows: slice | np.ndarray) -> np.ndarray:
        if isinstance(rows, slice):
            rows = np.arange(*rows.indices(len(self)))
        found: np.ndarray = self.codes[np.searchsorted(self.starts, rows, "right") - 1]
        return found

    def __array__(self, dtype: np.dtype | None = None, copy: bool | None = None) -> np.ndarray:
        if copy is False:
            raise ValueError("the array of runs of groups is made, so it cannot be had without a copy")
        return np.repeat(self.codes, np.diff(self.starts)).astype(dtype or self.codes.dtype, copy=False)


@dataclass(frozen=True, slots=True)
class BoxIndex:
    """Where each row of a dataset lies in arrays of several axes.

    Attributes
    ----------
    source
        int32, (n,). Position in the dataset's list of Sources; -1 = the row lacks this modality.
    lower
        int64, (n, k). First element of the row's box on each of the k leading axes of its array; the axes
        after them are taken in full.
    size
        int64, (n, k). Elements of the row's box on each of these axes; -1 = the axis in full. It has no
        meaning where the row lacks this modality.
    """

    source: np.ndarray
    lower: np.ndarray
    size: np.ndarray

    def __len__(self) -> int:
        return len(self.source)

    def at(self, rows: np.ndarray) -> BoxIndex:
        """Boxes of some rows, int64 (k,) or a mask of all rows."""
        return BoxIndex(self.source[rows], self.lower[rows], self.size[rows])

    def arrays(self) -> dict[str, np.ndarray]:
        """The arrays by name, from which the same index can be made."""
        return {name: getattr(self, name) for name in self.__slots__}

    def groups(self) -> GroupRuns:
        """The source of each row, as runs."""
        return GroupRuns.of(self.source)

    @classmethod
    def of_rows(cls, rows: RowTable) -> BoxIndex:
        """Return the rows as boxes on the first axis."""
        return cls(rows.source, rows.start[:, None], rows.length.astype(np.int64)[:, None])


@dataclass(frozen=True, slots=True)
class ObsColumns:
    """Metadata of a dataset's rows, ready to be gathered per batch.

    Attributes
    ----------
    columns
        Name -> array of n rows: numeric as stored (a missing integer is the smallest of its dtype, a missing
        float NaN), or codes (-1 = missing) where `categories` has the name, in any signed type that holds
        them.
    categories
        Name -> vocabulary (object or bool array); code k means ``categories[name][k]``.
    """

    columns: dict[str, np.ndarray] = field(default_factory=dict)
    categories: dict[str, np.ndarray] = field(default_factory=dict)


def rows_by_source(source: np.ndarray, n_sources: int) -> list[np.ndarray]:
    """Return the row numbers of each Source, ascending, int64; rows without a Source occur nowhere."""
    order = np.argsort(source, kind="stable")
    cuts = np.searchsorted(source[order], np.arange(n_sources + 1))
    return [order[first:last] for first, last in pairwise(cuts.tolist())]
