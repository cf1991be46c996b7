"""Row ids of a table, kept as runs of consecutive ones."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np


@dataclass(frozen=True, slots=True, eq=False)
class IdRuns:
    """Distinct row ids, in the order of the rows.

    Attributes
    ----------
    first
        uint64, (n_runs,). First id of each run.
    starts
        int64, (n_runs + 1,). First row of each run; the last entry is the number of rows.
    """

    first: np.ndarray
    starts: np.ndarray

    def __len__(self) -> int:
        return int(self.starts[-1])

    def __getitem__(self, rows: np.ndarray) -> np.ndarray:
        """Ids of some rows, uint64."""
        run = np.searchsorted(self.starts, rows, "right") - 1
        found: np.ndarray = self.first[run] + (rows - self.starts[run]).astype(np.uint64)
        return found

    def all(self) -> np.ndarray:
        """uint64, (n,). Ids of all rows."""
        counts = np.diff(self.starts)
        return np.repeat(self.first - self.starts[:-1].astype(np.uint64), counts) + np.arange(
            len(self), dtype=np.uint64
        )

    @property
    def ascending(self) -> bool:
        """Whether every id is larger than the one before it."""
        last = self.first + (np.diff(self.starts) - 1).astype(np.uint64)
        return bool((self.first[1:] > last[:-1]).all())


@dataclass(slots=True)
class IdMaker:
    """Makes :class:`IdRuns` of ids that come part by part."""

    _first: list[np.ndarray] = field(default_factory=lambda: [np.empty(0, np.uint64)])
    _starts: list[np.ndarray] = field(default_factory=lambda: [np.empty(0, np.int64)])
    _n: int = 0
    _next: int = -1

    def add(self, ids: np.ndarray) -> None:
        """Add ids, uint64 (k,), after those that were added before; the array is not kept."""
        if not len(ids):
            return
        begins = np.concatenate([[int(ids[0]) != self._next], ids[1:] - ids[:-1] != 1])
        at = np.flatnonzero(begins)
        self._first.append(ids[at])
        self._starts.append(at + self._n)
        self._n += len(ids)
        self._next = int(ids[-1]) + 1

    def finish(self) -> IdRuns:
        """The ids that were added."""
        starts = np.append(np.concatenate(self._starts), self._n).astype(np.int64)
        return IdRuns(np.concatenate(self._first), starts)


def id_runs(ids: np.ndarray) -> IdRuns:
    """The ids uint64 (n,) as runs."""
    maker = IdMaker()
    maker.add(ids)
    return maker.finish()
