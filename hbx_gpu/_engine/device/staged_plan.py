"""The sizes and places of a staged plan: what is copied to the device, what is resident, and where."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal, Protocol, TypeAlias

import numpy as np

from hbx_gpu._engine.device.backend import Memory
from hbx_gpu._plan.rows import BatchPlan
from hbx_gpu._storage.readers import Slab

Layout: TypeAlias = Literal["csr", "dense"]

ROWPACK, PACKED_32, PACKED_64, STREAMS, RAW, DECODED, ABSENT, ELEMENTS = range(8)
"""What happens to a chunk: blocks of it cross; it crosses whole, words of 4 or 8 bytes; its compressed
streams cross; stored elements cross; elements decoded on the host cross; nothing is stored, copies of its
fill value cross; its elements are resident."""
PARTS = ("packed32", "packed64", "streams", "copies", "shuffles", "pieces", "plains")
"""Parts of the status words that are about chunks, causes before what follows from them."""

ANY, UNSORTED = 0, 1
"""The first status words: what all others have in common; whether columns of a row do not ascend."""


@dataclass(frozen=True, slots=True)
class Resident:
    """Chunks of a plan that lie whole in memory that kernels reach.

    Attributes
    ----------
    arena
        Memory that holds the chunks; the number of a run counts HbxRun records from its start.
    at
        int64, (n_chunks,). Place of each chunk of the plan in the arena; -1: not there.
    run
        int64, (n_chunks,). Number of its run, where it is a rowpack chunk.
    nbytes
        int64, (n_chunks,). Bytes there: as stored, or of the decoded elements of a general codec.
    """

    arena: Memory
    at: np.ndarray
    run: np.ndarray
    nbytes: np.ndarray


class Staged(Protocol):
    """A batch that is ready for its launches, whether the host made its plan or the device is to make it.

    Attributes
    ----------
    n_rows, n_elements
        Rows of the batch, and elements before columns are dropped.
    others
        As in :class:`StagedPlan`.
    """

    @property
    def n_rows(self) -> int: ...
    @property
    def n_elements(self) -> int: ...
    @property
    def at(self) -> dict[str, int]: ...
    @property
    def counts(self) -> dict[str, int]: ...
    @property
    def tables(self) -> dict[str, np.ndarray]: ...
    @property
    def fused(self) -> list[bool]: ...
    @property
    def host_bytes(self) -> int: ...
    @property
    def staged_bytes(self) -> int: ...
    @property
    def arena_bytes(self) -> int: ...
    @property
    def flat_bytes(self) -> int: ...
    @property
    def status_bytes(self) -> int: ...
    @property
    def resident(self) -> Resident | None: ...
    @property
    def opened(self) -> Opened | None: ...

    def first_word(self, part: str) -> int:
        """Number of the first status word of a part."""

    def records(self, name: str) -> int:
        """Number of records of a table."""

    def bounds(self, first: int, last: int) -> tuple[int, int]:
        """Where the elements of the rows [first, last) begin and end."""


@dataclass(slots=True)
class StagedPlan:
    """One plan, measured: how much room it takes, and all that `pack` puts there.

    Attributes
    ----------
    plan, slab
        The plan and the slab that were measured. The slab's memory must stay until `pack` has returned.
    host_bytes, arena_bytes
        Room needed in the page-locked buffer and in the arena.
    status_bytes
        Bytes of the status words.
    tables
        Record arrays by name, `at` says where each lies. Those of kernels' records, and ``offsets``: int64,
        (n_rows + 1,), and, where there are no column indices, ``sources``: int32, (n_rows,), the plan's.
    at
        Offset of every table, of ``outputs`` and ``total`` (left to the engine), ``status``, and of the
        scratch ``flat<role>`` (a flat CSR of all elements, values of 8 bytes at most) and ``kept``.
    counts
        Number of status words of each part, in their order: `PARTS` and ``rows``, after `ANY` and `UNSORTED`.
    jobs
        For each of `PARTS`: chunks of the plan, and the number of status words of each.
    flat_bytes
        Arena that it takes to hold the flat CSR as well.
    fused
        Per layer: whether its dense rows can be made without a flat CSR.
    resident
        Chunks that are in device memory already; None: everything is staged.
    staged_bytes
        Bytes at the front of the buffer that hold chunk bytes and their runs. If there are resident chunks,
        they must lie in the arena of these.
    area_bytes
        Room needed in that arena: the staged bytes and what is decoded there.
    opened
        Chunks whose compressed streams cross; None: there are none.
    rowpack_ranges, ranges
        Copies of the runs of rowpack chunks, and of what else crosses as it is stored.
    copied_to, n_copied
        Buffer that the first `n_copied` of the former have been made to already; None: none has.
    staged
        bool, (pieces,). Which of the pieces' runs are among the staged ones; None without resident chunks.
    """

    plan: BatchPlan
    slab: Slab
    host_bytes: int = 0
    arena_bytes: int = 0
    status_bytes: int = 0
    flat_bytes: int = 0
    tables: dict[str, np.ndarray] = field(default_factory=dict)
    at: dict[str, int] = field(default_factory=dict)
    counts: dict[str, int] = field(default_factory=dict)
    jobs: dict[str, tuple[np.ndarray, np.ndarray]] = field(default_factory=dict)
    fused: list[bool] = field(default_factory=list)
    piece_row: np.ndarray = field(default_factory=lambda: np.empty(0, np.int64))
    ranges: list[np.ndarray] = field(default_factory=list)
    decode: list[tuple[int, np.ndarray]] = field(default_factory=list)
    fills: list[tuple[int, np.ndarray]] = field(default_factory=list)
    resident: Resident | None = None
    staged_bytes: int = 0
    area_bytes: int = 0
    opened: Opened | None = None
    staged: np.ndarray | None = None
    rowpack_ranges: np.ndarray = field(default_factory=lambda: np.empty(0, np.uint8))
    copied_to: np.ndarray | None = None
    n_copied: int = 0

    @property
    def n_rows(self) -> int:
        return self.plan.n_rows

    @property
    def n_elements(self) -> int:
        return self.plan.n_elements

    def records(self, name: str) -> int:
        """See :class:`Staged`."""
        return len(self.tables[name])

    def bounds(self, first: int, last: int) -> tuple[int, int]:
        """See :class:`Staged`."""
        return int(self.plan.offsets[first]), int(self.plan.offsets[last])

    def there(self, jobs: np.ndarray) -> np.ndarray:
        """Return whether each of the chunks `jobs` of the plan is resident."""
        if self.resident is None:
            return np.zeros(len(jobs), bool)
        there: np.ndarray = self.resident.at[jobs] >= 0
        return there

    def first_word(self, part: str) -> int:
        """Number of the first status word of a part."""
        names = list(self.counts)
        return 2 + sum(self.counts[name] for name in names[: names.index(part)])

    def chunk_of(self, part: str, number: int) -> int:
        """Chunk of the plan that a status word of a part is about."""
        jobs, words = self.jobs[part]
        return int(jobs[np.searchsorted(np.cumsum(words), number, side="right")])


class Cursor:
    """Hands out places one after the other."""

    def __init__(self, at: int) -> None:
        self.at = at

    def take(self, nbytes: int, align: int = 16) -> int:
        begin = round_up(self.at, align)
        self.at = begin + nbytes
        return begin

    def take_each(self, nbytes: np.ndarray, align: int) -> np.ndarray:
        sizes = -(-nbytes // align) * align
        begin = self.take(int(sizes.sum()), align)
        result: np.ndarray = begin + np.cumsum(sizes) - sizes
        return result


def round_up(x: int, step: int) -> int:
    """The next multiple of `step`."""
    return -(-x // step) * step


@dataclass(frozen=True, slots=True)
class Opened:
    """Chunks taken apart, and where their parts lie and go.

    Attributes
    ----------
    tables
        ``streams``, ``stream_targets``: uint64, places of compressed streams and of what they hold;
        ``stream_bytes``, ``stream_sizes``: uint64, bytes of both; ``stream_actual``, ``stream_states``: to
        be written. ``copies``, ``shuffles``: HbxBlock. Places in scratch count from its start.
    jobs
        Chunks, in the order of the tables, and per chunk the number of entries in each of ``streams``,
        ``copies`` and ``shuffles``.
    calls
        (algorithm, first stream, streams).
    out
        int64, (n_chunks,). Where each decoded chunk begins in scratch.
    scratch
        Bytes of it.
    begin, nbytes, place
        int64. Of every stream, stored ones too: address relative to its chunk, bytes, staged place;
        `owner` is its chunk's number in `jobs`.
    """

    tables: dict[str, np.ndarray]
    jobs: np.ndarray
    counts: dict[str, np.ndarray]
    calls: list[tuple[str, int, int]]
    out: np.ndarray
    scratch: int
    begin: np.ndarray
    nbytes: np.ndarray
    place: np.ndarray
    owner: np.ndarray

    def shift_scratch(self, base: int) -> None:
        """Add where scratch begins to all places in it."""
        self._shift(("to",), ("from", "to"), base)
        self.tables["stream_targets"] += np.uint64(base)

    def shift_all(self, base: int) -> None:
        """Add where the arena's area begins to all places."""
        self._shift(("from", "to"), ("from", "to"), base)
        self.tables["streams"] += np.uint64(base)
        self.tables["stream_targets"] += np.uint64(base)

    def _shift(self, copies: Sequence[str], shuffles: Sequence[str], base: int) -> None:
        for name, places in (("copies", copies), ("shuffles", shuffles)):
            for place in places:
                self.tables[name][place] += np.uint64(base)
