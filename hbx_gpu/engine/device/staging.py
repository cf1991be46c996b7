"""What of a plan's chunks crosses to the device, and where it lies: sizes first, then one packed buffer.

A staged buffer begins with the bytes of chunks, followed by the tables of records that tell kernels what
lies where, and the words they report to. Behind it, in device memory only, is room for what is decoded
there. Everything here is a pass over whole arrays; nothing touches a device.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal, TypeAlias

import numpy as np

from hbx_gpu.buffers import BufferPool
from hbx_gpu.codecs.bitpacking_numba import max_encoded_size
from hbx_gpu.codecs.chain import ChunkCodec
from hbx_gpu.codecs.rowpack_numba import describe_status
from hbx_gpu.engine.device.records import PACKED, PIECE, PLAIN, RUN, SEGMENT, element_type
from hbx_gpu.engine.device.staging_kernels import RANGE, copy_ranges, cut_segments, size_runs
from hbx_gpu.engine.verify import ChunkChecks
from hbx_gpu.errors import CorruptChunkError
from hbx_gpu.plan import INDEX_ROLE, BatchPlan, SourceTable
from hbx_gpu.source import ArrayLayout
from hbx_gpu.storage.chunks import ChunkDirectory
from hbx_gpu.storage.readers import Slab

Layout: TypeAlias = Literal["csr", "dense"]

ROWPACK, PACKED_32, PACKED_64, RAW, DECODED, ABSENT = range(6)
"""What happens to a chunk: blocks of it cross; it crosses whole, words of 4 or 8 bytes; stored elements
cross; elements decoded on the host cross; nothing is stored, copies of its fill value cross."""
MAX_WORDS = 1 << 16
"""Words of a homeobox.bitpacking chunk that the device decodes; it needs shared memory for every block."""
FUSED_BYTES = 4
"""Widest elements that go from rowpack to dense rows without CSR in between."""
PARTS = ("packed32", "packed64", "pieces", "plains")
"""Parts of the status words that are about chunks, causes before what follows from them."""

ANY, UNSORTED = 0, 1
"""The first status words: what all others have in common; whether columns of a row do not ascend."""
_WIDEST = 8
_NONE = np.empty(0, np.int64)


@dataclass(slots=True)
class Staging:
    """One plan, measured: how much room it takes, and all that `pack` puts there.

    Attributes
    ----------
    plan, slab
        What was measured. The slab's memory must stay until `pack` has returned.
    host_bytes, arena_bytes
        Room needed in the page-locked buffer and in the arena.
    status_bytes
        Of the status words.
    tables
        Record arrays by name, `at` says where each lies. Those of kernels' records, and ``offsets``: int64,
        (n_rows + 1,), the plan's.
    at
        Offset of every table, of ``outputs`` and ``total`` (left to the engine), ``status``, and of the
        scratch ``flat<role>`` (a flat CSR of all elements, values of 8 bytes at most) and ``kept``.
    counts
        Status words of each part, in their order: `PARTS` and ``rows``, behind `ANY` and `UNSORTED`.
    jobs
        For each of `PARTS`: chunks of the plan, and the number of status words of each.
    flat_bytes
        Arena that it takes to hold the flat CSR as well.
    fused
        Per layer: whether its dense rows can be made without a flat CSR.
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

    def first_word(self, part: str) -> int:
        """Number of the first status word of a part."""
        names = list(self.counts)
        return 2 + sum(self.counts[name] for name in names[: names.index(part)])

    def chunk_of(self, part: str, number: int) -> int:
        """Chunk of the plan that a status word of a part is about."""
        jobs, words = self.jobs[part]
        return int(jobs[np.searchsorted(np.cumsum(words), number, side="right")])


class _Cursor:
    """Hands out places one behind the other."""

    def __init__(self, at: int) -> None:
        self.at = at

    def take(self, nbytes: int, align: int = 16) -> int:
        begin = _up(self.at, align)
        self.at = begin + nbytes
        return begin

    def take_each(self, nbytes: np.ndarray, align: int) -> np.ndarray:
        sizes = -(-nbytes // align) * align
        begin = self.take(int(sizes.sum()), align)
        return begin + np.cumsum(sizes) - sizes


class Stager:
    """Measures plans and packs them. Safe to use from many threads.

    Parameters
    ----------
    table
        Vectors of the dataset's Sources.
    directory
        Their chunks; its arrays are numbered as in `table`.
    dtypes
        Output dtype of each layer.

    Raises
    ------
    UnsupportedError
        An array of elements that kernels do not take.
    """

    def __init__(self, table: SourceTable, directory: ChunkDirectory, dtypes: Sequence[np.dtype]) -> None:
        self.table, self.directory, self.dtypes = table, directory, list(dtypes)
        self.checks = ChunkChecks(table, directory)
        layouts = directory.layouts
        self._codecs = [ChunkCodec(layout) for layout in layouts]
        self._kind = np.array([_kind(la, co) for la, co in zip(layouts, self._codecs, strict=True)], np.int64)
        self._itemsize = np.array([layout.dtype.itemsize for layout in layouts], np.int64)
        self._elements = np.array([layout.chunk_shape[0] for layout in layouts], np.int64)
        self._type = np.array([element_type(la.dtype, f"array {la.name!r}") for la in layouts], np.uint32)
        # Bytes behind the last block of a bitpacking chunk are ignored, so they need not cross.
        words = [co.bitpacking or 4 for co in self._codecs]
        n_words = self._elements * self._itemsize // words
        self._packed_bytes = np.array([max_encoded_size(*size) for size in zip(n_words, words, strict=True)])
        self._pool = BufferPool()

    def measure(self, plan: BatchPlan, slab: Slab, *, layout: Layout | None = None) -> Staging:
        """Decide what crosses for the rows of a plan, and how much room that takes; exact.

        Parameters
        ----------
        plan, slab
            As for the host engine's `csr`.
        layout
            What will be made of it; None: either. Only saves room.

        Raises
        ------
        CorruptChunkError
            A checksum, a header or a directory is wrong, or an object is missing that cannot be.
        """
        staging = Staging(plan, slab)
        kind = np.where(slab.address == 0, ABSENT, self._kind[plan.chunk_array])
        jobs = [
            np.flatnonzero(kind == k) if n else _NONE
            for k, n in enumerate(np.bincount(kind, minlength=ABSENT + 1).tolist())
        ]
        cursor = _Cursor(self._rowpack(staging, jobs[ROWPACK]))
        data = [self._packed(staging, jobs[k], k, cursor) for k in (PACKED_32, PACKED_64)]
        data += [self._raw(staging, jobs[RAW], cursor), self._decoded(staging, jobs[DECODED], cursor)]
        data += [self._absent(staging, jobs[ABSENT], cursor)]
        plain = np.concatenate(jobs[PACKED_32:])
        staging.tables["plains"] = self._plains(staging, plain, np.concatenate(data))
        if layout != "csr":
            self._segments(staging, kind)
        staging.tables["offsets"] = plan.offsets
        self._lay_out(staging, cursor, layout)
        return staging

    def pack(self, staging: Staging, host: np.ndarray) -> None:
        """Put everything that crosses into `host`, but the outputs' table.

        Parameters
        ----------
        staging
            From `measure`, of this stager.
        host
            uint8, 16-byte aligned, (>= host_bytes,).

        Raises
        ------
        CorruptChunkError
            A chunk that is decoded on the host does not decode.
        """
        if len(host) < staging.host_bytes:
            raise ValueError(f"packing takes {staging.host_bytes} bytes, the buffer holds {len(host)}")
        target = np.uint64(_address(host))
        for ranges in staging.ranges:
            if staging.slab.copy is not None:
                staging.slab.copy(ranges, host)
            else:
                copy_ranges(ranges, np.uint64(0), target)
        for c, ranges in staging.decode:
            array = int(staging.plan.chunk_array[c])
            try:
                decoded = np.ascontiguousarray(self._codecs[array].decode(staging.slab.view(c)))
            except ValueError as error:
                raise self._error(staging.plan, c, getattr(error, "reason", str(error))) from error
            copy_ranges(ranges, np.uint64(_address(decoded)), target)
        for at, values in staging.fills:
            _put(host, at, values)
        for name, table in staging.tables.items():
            _put(host, staging.at[name], table)
        host[staging.at["status"] :][: staging.status_bytes] = 0

    def _rowpack(self, staging: Staging, jobs: np.ndarray) -> int:
        """Runs and pieces of rowpack chunks; returns the bytes they take, from byte 0 on."""
        plan, slab = staging.plan, staging.slab
        self.checks.rowpack_checksums(plan, slab, jobs)
        array = plan.chunk_array[jobs]
        source, role = np.divmod(array, self.table.n_roles)
        n = int((plan.piece_ptr[jobs + 1] - plan.piece_ptr[jobs]).sum())
        runs, ranges = self._pool.empty(n, RUN), self._pool.empty(3 * n, RANGE)
        pieces, piece_row = self._pool.empty(n, PIECE), self._pool.empty(n, np.int64)
        status = np.zeros(len(jobs), np.int64)
        n_runs, nbytes = size_runs(
            jobs, slab.address, slab.nbytes, self._elements[array], self._itemsize[array], source, role,
            plan.piece_ptr, plan.piece_skip, plan.piece_count, plan.piece_out, plan.piece_row,
            runs, ranges, pieces, piece_row, status,
        )  # fmt: skip
        if status.any():
            j = int(np.flatnonzero(status)[0])
            raise self._error(plan, int(jobs[j]), describe_status(int(status[j])))
        staging.tables["runs"], staging.tables["pieces"] = runs[:n_runs], pieces
        staging.piece_row = piece_row
        staging.ranges.append(ranges[: 3 * n_runs])
        staging.jobs["pieces"] = (jobs, plan.piece_ptr[jobs + 1] - plan.piece_ptr[jobs])
        return int(nbytes)

    def _packed(self, staging: Staging, jobs: np.ndarray, kind: int, cursor: _Cursor) -> np.ndarray:
        """Whole homeobox.bitpacking chunks; returns where pieces begin, from the scratch they decode to."""
        plan, slab = staging.plan, staging.slab
        name, word = ("packed32", 4) if kind == PACKED_32 else ("packed64", 8)
        if not len(jobs):
            staging.tables[name], staging.jobs[name] = np.empty(0, PACKED), (jobs, jobs)
            return _NONE
        pieces, job = _pieces_of(plan, jobs)
        array = plan.chunk_array[jobs]
        itemsize, nbytes = self._itemsize[array], np.minimum(slab.nbytes[jobs], self._packed_bytes[array])
        begin = plan.piece_skip[pieces] * itemsize[job]
        end = begin + plan.piece_count[pieces] * itemsize[job]
        records = np.zeros(len(jobs), PACKED)
        records["data"] = cursor.take_each(nbytes, 16)
        records["nbytes"] = nbytes
        records["n_words"] = self._elements[array] * itemsize // word
        first = np.flatnonzero(np.diff(job, prepend=-1))
        records["first_word"] = np.minimum.reduceat(begin, first) // word
        records["last_word"] = -(-np.maximum.reduceat(end, first) // word)
        # Decoded chunks lie behind all that is staged, whose end is not known yet: `_lay_out` adds it.
        scratch = _Cursor(0)
        records["out"] = scratch.take_each(records["n_words"].astype(np.int64) * word, 16)
        staging.tables[name] = records
        staging.jobs[name] = (jobs, np.ones(len(jobs), np.int64))
        staging.ranges.append(_ranges(slab.address[jobs], records["data"], nbytes))
        return records["out"][job].astype(np.int64) + begin

    def _raw(self, staging: Staging, jobs: np.ndarray, cursor: _Cursor) -> np.ndarray:
        """Elements of chunks that are stored as they are; returns where each piece begins."""
        if not len(jobs):
            return _NONE
        plan, slab = staging.plan, staging.slab
        pieces, job = _pieces_of(plan, jobs)
        array = plan.chunk_array[jobs]
        expected = self._elements[array] * self._itemsize[array]
        for c in jobs[slab.nbytes[jobs] != expected]:
            layout = self.directory.layouts[int(plan.chunk_array[c])]
            raise self._error(
                plan,
                int(c),
                f"{slab.nbytes[c]} bytes stored, {layout.chunk_shape[0]} elements of {layout.dtype} expected",
            )
        begin, nbytes = self._extent(plan, pieces, array[job])
        place = cursor.take_each(nbytes, 8)
        staging.ranges.append(_ranges(slab.address[jobs][job] + begin.astype(np.uint64), place, nbytes))
        return place

    def _decoded(self, staging: Staging, jobs: np.ndarray, cursor: _Cursor) -> np.ndarray:
        """Elements of chunks that `pack` decodes; returns where each piece begins."""
        if not len(jobs):
            return _NONE
        plan = staging.plan
        pieces, job = _pieces_of(plan, jobs)
        begin, nbytes = self._extent(plan, pieces, plan.chunk_array[jobs][job])
        place = cursor.take_each(nbytes, 8)
        ranges = _ranges(begin, place, nbytes)
        last = np.searchsorted(job, np.arange(len(jobs)), side="right")
        for c, a, b in zip(jobs, np.append(0, last[:-1]), last, strict=False):
            staging.decode.append((int(c), ranges[a:b]))
        return place

    def _absent(self, staging: Staging, jobs: np.ndarray, cursor: _Cursor) -> np.ndarray:
        """One stretch of fill values per array, as long as its longest piece; where each piece begins."""
        if not len(jobs):
            return _NONE
        plan = staging.plan
        pieces, job = _pieces_of(plan, jobs)
        fills = [self.checks.fill_value(plan, int(c)) for c in jobs]
        place = np.zeros(len(jobs), np.int64)
        arrays = plan.chunk_array[jobs]
        for array in np.unique(arrays):
            members = np.flatnonzero(arrays == array)
            longest = int(plan.piece_count[pieces[arrays[job] == array]].max())
            values = np.full(longest, fills[members[0]], self.directory.layouts[array].dtype)
            place[members] = cursor.take(values.nbytes)
            staging.fills.append((int(place[members[0]]), values))
        return place[job]

    def _extent(
        self, plan: BatchPlan, pieces: np.ndarray, array: np.ndarray
    ) -> tuple[np.ndarray, np.ndarray]:
        """(first byte inside the decoded chunk, bytes) of pieces of arrays."""
        itemsize = self._itemsize[array]
        return plan.piece_skip[pieces] * itemsize, plan.piece_count[pieces] * itemsize

    def _plains(self, staging: Staging, jobs: np.ndarray, data: np.ndarray) -> np.ndarray:
        """HbxPlain of all pieces of `jobs`, whose elements begin at `data`."""
        if not len(jobs):
            staging.jobs["plains"] = (jobs, jobs)
            return np.empty(0, PLAIN)
        plan = staging.plan
        pieces, job = _pieces_of(plan, jobs)
        array = plan.chunk_array[jobs][job]
        records = np.empty(len(pieces), PLAIN)
        records["data"], records["out"] = data, plan.piece_out[pieces]
        records["count"], records["type"] = plan.piece_count[pieces], self._type[array]
        records["source"], records["role"] = np.divmod(array, self.table.n_roles)
        staging.jobs["plains"] = (jobs, plan.piece_ptr[jobs + 1] - plan.piece_ptr[jobs])
        return records

    def _segments(self, staging: Staging, kind: np.ndarray) -> None:
        """Pairs of index and value pieces of every layer, where rows can go dense without CSR between."""
        plan = staging.plan
        role = plan.chunk_array % self.table.n_roles
        narrow = (kind == ROWPACK) & (self._itemsize[plan.chunk_array] <= FUSED_BYTES)
        pieces = staging.tables["pieces"]
        for layer in range(len(self.dtypes)):
            n = -1
            if narrow[(role == INDEX_ROLE) | (role == layer + 1)].all():
                segments = self._pool.empty(len(pieces), SEGMENT)
                row_ptr = np.empty(plan.n_rows + 1, np.uint32)
                n = cut_segments(pieces, staging.piece_row, layer + 1, plan.n_rows, segments, row_ptr)
            staging.fused.append(n >= 0)
            if n >= 0:
                staging.tables[f"segments{layer}"] = segments[:n]
                staging.tables[f"row_ptr{layer}"] = row_ptr

    def _lay_out(self, staging: Staging, cursor: _Cursor, layout: Layout | None) -> None:
        """Give every table its place, and the scratch behind what is staged."""
        plan, at, tables = staging.plan, staging.at, staging.tables
        at["outputs"] = cursor.take(24 * self.table.n_roles)
        for name, table in tables.items():
            at[name] = cursor.take(table.nbytes)
        staging.counts = {part: len(tables[part]) for part in PARTS} | {"rows": plan.n_rows}
        staging.status_bytes = 4 * (2 + sum(staging.counts.values()))
        at["total"] = cursor.take(8)
        at["status"] = cursor.take(staging.status_bytes)
        staging.host_bytes = _up(cursor.at, 16)

        scratch = _Cursor(staging.host_bytes)
        first = 0
        for name, word in (("packed32", 4), ("packed64", 8)):
            records, (jobs, _) = tables[name], staging.jobs[name]
            if not len(jobs):
                continue
            # The same places as in `_packed`, now with their beginning.
            begin = int(scratch.take_each(word * records["n_words"].astype(np.int64), 16)[0])
            n = int((plan.piece_ptr[jobs + 1] - plan.piece_ptr[jobs]).sum())
            records["out"] += np.uint64(begin)
            tables["plains"]["data"][first : first + n] += np.uint64(begin)
            first += n
        staging.arena_bytes = _up(scratch.at, 16)
        for role in range(self.table.n_roles):
            itemsize = 4 if role == INDEX_ROLE else _WIDEST
            at[f"flat{role}"] = scratch.take(itemsize * plan.n_elements, 256)
        at["kept"] = scratch.take(8 * plan.n_rows)
        staging.flat_bytes = _up(scratch.at, 16)
        if (layout != "dense" and self.table.drops) or not all(staging.fused):
            staging.arena_bytes = staging.flat_bytes

    def _error(self, plan: BatchPlan, c: int, reason: str) -> CorruptChunkError:
        return self.directory.error(int(plan.chunks[c]), reason)


def _kind(layout: ArrayLayout, codec: ChunkCodec) -> int:
    n, dtype = layout.chunk_shape[0], layout.dtype
    if codec.rowpack == dtype.itemsize and dtype.kind == "u":
        return ROWPACK
    word = codec.bitpacking
    if word and n * dtype.itemsize % word == 0 and n * dtype.itemsize // word <= MAX_WORDS:
        return PACKED_32 if word == 4 else PACKED_64
    return RAW if codec.is_raw else DECODED


def _pieces_of(plan: BatchPlan, jobs: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Numbers of the pieces of chunks, chunk after chunk, and to which of `jobs` each belongs."""
    begin = plan.piece_ptr[jobs]
    n = plan.piece_ptr[jobs + 1] - begin
    job = np.repeat(np.arange(len(jobs)), n)
    return np.arange(len(job)) + (begin - np.cumsum(n) + n)[job], job


def _ranges(source: np.ndarray, target: np.ndarray, nbytes: np.ndarray) -> np.ndarray:
    ranges = np.empty(len(source), RANGE)
    ranges["source"], ranges["target"], ranges["nbytes"] = source, target, nbytes
    return ranges


def _put(host: np.ndarray, at: int, values: np.ndarray) -> None:
    host[at : at + values.nbytes] = values.view(np.uint8)


def _address(array: np.ndarray) -> int:
    return int(array.__array_interface__["data"][0])


def _up(x: int, step: int) -> int:
    return -(-x // step) * step
