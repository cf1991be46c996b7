"""Where each row of a dataset lies, in a few bytes per row.

Rows of one stored matrix mostly come in the order in which they are stored. A *run* of such rows has one
source and one start; each row of it adds its length and, where rows of the matrix are left out, the gap
before it. The place of a row follows from the sum of what comes before it, and every `BLOCK` rows the sum is
written down. :meth:`CompactIndex.at` looks rows up in compiled code; :meth:`CompactIndex.plain` says what is
right.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np

from hbx_gpu._source import GroupRuns, RowIndex, RowTable

BLOCK = 64
_AT_ONCE = 1 << 20  # rows that are looked at together
_BLOCKS_AT_ONCE = 1 << 14
_RUN_BYTES = 20
_PLAIN_BYTES = 16
_GAPS = (np.uint8, np.uint16, np.uint32)


@dataclass(frozen=True, slots=True, eq=False)
class CompactIndex:
    """The places of rows as runs; a :class:`~hbx_gpu._source.RowTable`.

    Attributes
    ----------
    run_first
        int64, (n_runs + 1,). First row of each run; the last entry is the number of rows.
    run_source, run_start
        int32 and int64, (n_runs,). Source of each run, and first element of its first row.
    block_run, block_start
        int32 and int64, (n_blocks,). Run and first element of the first row of each `BLOCK` rows.
    lengths
        Unsigned, (n,). Number of elements of each row, in the smallest type that holds all.
    gaps
        Unsigned, (n,). Elements between a row and the one before it in its run; empty where there are none.
    """

    run_first: np.ndarray
    run_source: np.ndarray
    run_start: np.ndarray
    block_run: np.ndarray
    block_start: np.ndarray
    lengths: np.ndarray
    gaps: np.ndarray

    def __len__(self) -> int:
        return len(self.lengths)

    @property
    def nbytes(self) -> int:
        """Bytes of all arrays."""
        return sum(array.nbytes for array in self.arrays().values())

    def arrays(self) -> dict[str, np.ndarray]:
        """The arrays by name, from which the same index can be made."""
        return {name: getattr(self, name) for name in self.__slots__}

    def at(self, rows: np.ndarray) -> RowIndex:
        """Places of some rows.

        Parameters
        ----------
        rows
            int64 (k,), each in ``[0, n)``.
        """
        from hbx_gpu._plan.index_numba import look_up

        return RowIndex(
            *look_up(
                rows, self.run_first, self.run_source, self.run_start, self.block_run, self.block_start,
                self.lengths, self.gaps,
            )
        )  # fmt: skip

    def slice(self, begin: int, end: int) -> RowIndex:
        """Places of the rows ``range(begin, end)``."""
        return self.at(np.arange(begin, min(end, len(self))))

    def plain(self) -> RowIndex:
        """Places of all rows, 16 bytes each, in NumPy."""
        counts = np.diff(self.run_first)
        step = self.lengths.astype(np.int64)
        gaps = self.gaps.astype(np.int64) if len(self.gaps) else np.zeros(len(self), np.int64)
        moved = np.cumsum(step) - step + np.cumsum(gaps)  # from the first row of all
        origin = self.run_start - moved[self.run_first[:-1]]
        return RowIndex(
            np.repeat(self.run_source, counts),
            moved + np.repeat(origin, counts),
            self.lengths.astype(np.int32),
        )

    @property
    def source(self) -> np.ndarray:
        """int32, (n,). Source of each row, made anew at each call."""
        return np.repeat(self.run_source, np.diff(self.run_first))

    @property
    def start(self) -> np.ndarray:
        """int64, (n,). First element of each row, made anew at each call."""
        return self.plain().start

    @property
    def length(self) -> np.ndarray:
        """int32, (n,). Number of elements of each row, made anew at each call."""
        return self.lengths.astype(np.int32)

    def outermost(self) -> RowIndex:
        """Places of the first and the last row of each run; those of the others ascend between them."""
        first, last = self.run_first[:-1], self.run_first[1:] - 1
        # In NumPy, because every dataset is asked for this, and compiled code takes long to load.
        begin = np.maximum(first, last // BLOCK * BLOCK)
        start = np.where(begin > first, self.block_start[begin // BLOCK], self.run_start)
        start += _sums(self.lengths, begin, last)
        if len(self.gaps):
            start += _sums(self.gaps, begin + 1, last + 1)
        return RowIndex(
            np.concatenate([self.run_source, self.run_source]),
            np.concatenate([self.run_start, start]),
            np.concatenate([self.lengths[first], self.lengths[last]]).astype(np.int32),
        )

    def groups(self) -> GroupRuns:
        """The source of each row, as runs."""
        changed = np.flatnonzero(np.diff(self.run_source, prepend=np.int32(-2)))
        return GroupRuns(self.run_source[changed], np.append(self.run_first[changed], len(self)))


def compacted(rows: RowTable) -> RowTable:
    """The same rows as a compact index, or as they are where that would take more memory."""
    if isinstance(rows, CompactIndex):
        return rows if rows.nbytes < _PLAIN_BYTES * len(rows) else rows.plain()
    maker = IndexMaker()
    for begin in range(0, len(rows), _AT_ONCE):
        part = rows.slice(begin, begin + _AT_ONCE)
        maker.add(part.source, part.start, part.length)
    index = maker.finish()
    return index if index.nbytes < _PLAIN_BYTES * len(rows) else rows


@dataclass(slots=True)
class IndexMaker:
    """Makes a :class:`CompactIndex` of rows that come part by part, in no more memory than it takes."""

    _lengths: list[np.ndarray] = field(default_factory=lambda: [np.empty(0, np.uint8)])
    _gaps: list[np.ndarray] = field(default_factory=lambda: [np.empty(0, np.uint8)])
    _breaks: list[np.ndarray] = field(default_factory=lambda: [np.empty(0, np.int64)])
    _sources: list[np.ndarray] = field(default_factory=lambda: [np.empty(0, np.int32)])
    _starts: list[np.ndarray] = field(default_factory=lambda: [np.empty(0, np.int64)])
    _n: int = 0
    _last: tuple[int, int] = (-2, 0)

    def add(self, source: np.ndarray, start: np.ndarray, length: np.ndarray) -> None:
        """Add rows after those that were added before; the arrays are not kept.

        Parameters
        ----------
        source, start, length
            As in :class:`~hbx_gpu._source.RowIndex`.
        """
        if not len(source):
            return
        ends = start + length
        gaps = np.empty(len(source), np.int64)
        gaps[0] = start[0] - self._last[1]
        np.subtract(start[1:], ends[:-1], out=gaps[1:])
        apart = np.empty(len(source), bool)
        apart[0] = source[0] != self._last[0]
        np.not_equal(source[1:], source[:-1], out=apart[1:])
        apart |= gaps.view(np.uint64) > np.iinfo(np.uint32).max  # a gap below 0 is a large number here
        gaps[apart] = 0
        breaks = np.flatnonzero(apart)
        self._breaks.append(breaks + self._n)
        self._sources.append(source[breaks].astype(np.int32))
        self._starts.append(start[breaks].astype(np.int64))
        self._lengths.append(_smallest(length))
        self._gaps.append(_smallest(gaps))
        self._n += len(source)
        self._last = int(source[-1]), int(ends[-1])

    def finish(self) -> CompactIndex:
        """The index of all rows that were added; the maker is empty afterwards."""
        lengths = _joined(self._lengths)
        first = np.append(np.concatenate(self._breaks), self._n)
        source, start = np.concatenate(self._sources), np.concatenate(self._starts)
        gaps = _joined(self._gaps)
        wide = [_n_above(gaps, int(np.iinfo(kind).max)) for kind in _GAPS]
        costs = [
            _RUN_BYTES * n + np.dtype(kind).itemsize * self._n for n, kind in zip(wide, _GAPS, strict=True)
        ]
        costs.append(_RUN_BYTES * int(np.count_nonzero(gaps)))  # no gaps at all: each begins a run
        best = int(np.argmin(costs))
        limit = int(np.iinfo(_GAPS[best]).max) if best < len(_GAPS) else 0
        blocks = np.arange(0, self._n, BLOCK)
        of_block, of_row = _before(lengths, gaps, first[:-1])
        origin = start - of_row
        block_start = of_block + origin[np.searchsorted(first, blocks, "right") - 1]
        split_at = np.flatnonzero(gaps > limit) if _n_above(gaps, limit) else np.empty(0, np.int64)
        if len(split_at):
            # Rows that begin a run because the gap before them is wide.
            of_run = np.searchsorted(first, split_at, "right") - 1
            split_start = _before(lengths, gaps, split_at)[1] + origin[of_run]
            order = np.argsort(np.concatenate([first[:-1], split_at]), kind="stable")
            source = np.concatenate([source, source[of_run]])[order]
            start = np.concatenate([start, split_start])[order]
            first = np.append(np.concatenate([first[:-1], split_at])[order], self._n)
            gaps[split_at] = 0
        gaps = gaps.astype(_GAPS[best]) if best < len(_GAPS) else np.empty(0, np.uint8)
        block_run = (np.searchsorted(first, blocks, "right") - 1).astype(np.int32)
        self.__init__()  # type: ignore[misc]
        return CompactIndex(first, source, start, block_run, block_start, lengths, gaps)


def _smallest(values: np.ndarray) -> np.ndarray:
    """The values, none of which is negative, in the smallest unsigned type that holds them."""
    return values.astype(np.min_scalar_type(int(values.max(initial=0))))


def _n_above(values: np.ndarray, limit: int) -> int:
    return 0 if limit >= np.iinfo(values.dtype).max else int(np.count_nonzero(values > limit))


def _joined(parts: list[np.ndarray]) -> np.ndarray:
    """The parts end to end; the list is emptied while they are copied."""
    whole = np.zeros(sum(map(len, parts)), np.result_type(*parts))
    at = 0
    parts.reverse()
    while parts:
        part = parts.pop()
        if part.any():  # pages of zeros that nobody writes take no memory, and there are mostly no gaps
            whole[at : at + len(part)] = part
        at += len(part)
    return whole


def _sums(values: np.ndarray, begin: np.ndarray, end: np.ndarray) -> np.ndarray:
    """int64, (k,). Sum of ``values[begin:end]`` of each of k stretches of at most `BLOCK` values."""
    found = np.zeros(len(begin), np.int64)
    for i in range(BLOCK):
        inside = np.flatnonzero(begin + i < end)
        if not len(inside):
            break
        found[inside] += values[begin[inside] + i]
    return found


def _before(lengths: np.ndarray, gaps: np.ndarray, rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """How many elements and gaps come before every `BLOCK`-th row, and before each of `rows`, ascending."""
    of_block, of_row = np.empty(-(-len(lengths) // BLOCK), np.int64), np.empty(len(rows), np.int64)
    total = 0
    for begin in range(0, len(lengths), BLOCK * _BLOCKS_AT_ONCE):
        part = slice(begin, begin + BLOCK * _BLOCKS_AT_ONCE)
        step, gap = lengths[part].astype(np.int64), gaps[part]
        moved = np.cumsum(step)
        moved += total
        if gap.any():
            moved += np.cumsum(gap, dtype=np.int64)
        total = int(moved[-1])
        moved -= step
        of_block[begin // BLOCK : -(-(begin + len(step)) // BLOCK)] = moved[::BLOCK]
        mine = slice(*np.searchsorted(rows, [begin, begin + len(step)]).tolist())
        of_row[mine] = moved[rows[mine] - begin]
    return of_block, of_row
