"""Stage a plan: compute which bytes of its chunks are copied to the device, then pack them into one buffer.

A staged buffer begins with the bytes of chunks, followed by the tables of records that tell kernels what
lies where, and the words they report to. Behind it, in device memory only, is room for what is decoded
there. Of chunks that are resident no bytes cross, only records. Everything here is a pass over whole arrays;
nothing touches a device.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

from hbx_gpu._buffers import BufferPool
from hbx_gpu._codecs.bitpacking_numba import max_encoded_size
from hbx_gpu._codecs.chain import ChunkCodec
from hbx_gpu._codecs.containers import Compression, Contents
from hbx_gpu._codecs.rowpack_numba import describe_status
from hbx_gpu._engine.device.compressed import lay_out
from hbx_gpu._engine.device.records import BLOCK, OUTPUT, PACKED, PIECE, PLAIN, RUN, SEGMENT, element_type
from hbx_gpu._engine.device.staged_plan import (
    ABSENT,
    DECODED,
    ELEMENTS,
    PACKED_32,
    PACKED_64,
    PARTS,
    RAW,
    ROWPACK,
    STREAMS,
    Cursor,
    Layout,
    Resident,
    StagedPlan,
    round_up,
)
from hbx_gpu._engine.device.staging_kernels import RANGE, copy_ranges, cut_segments, size_runs
from hbx_gpu._engine.verify import ChunkChecks
from hbx_gpu._plan.rows import INDEX_ROLE, BatchPlan, SourceTable
from hbx_gpu._source import ArrayLayout
from hbx_gpu._storage.chunks import ChunkDirectory
from hbx_gpu._storage.readers import Slab
from hbx_gpu.errors import CorruptChunkError

MAX_WORDS = 1 << 16
"""Words of a homeobox.bitpacking chunk that the device decodes; it needs shared memory for every block."""
FUSED_BYTES = 4
"""Widest elements that go from rowpack to dense rows without CSR in between."""
WIDEST = 8
"""Bytes that are kept free for an element of a flat CSR."""
_NONE = np.empty(0, np.int64)


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
    compressions
        Compression of each array whose chunks are decompressed on the device, None for the other arrays. None
        instead of the list if there are no such arrays.

    Attributes
    ----------
    kinds, codecs, itemsize, elements, packed_bytes
        For every array: what happens to its chunks, the codec that decodes them, bytes per element, elements
        per chunk, and the bytes of a bitpacking chunk that have a meaning.
    decompresses
        bool, (n_arrays,). Whether the device decompresses their chunks, where these do not stay there.
    leaves_to_host
        bool, (n_arrays,). Whether the host decodes all of their chunks.

    Raises
    ------
    UnsupportedError
        An array of elements that kernels do not take.
    """

    def __init__(
        self,
        table: SourceTable,
        directory: ChunkDirectory,
        dtypes: Sequence[np.dtype],
        compressions: Sequence[Compression | None] | None = None,
    ) -> None:
        self.table, self.directory, self.dtypes = table, directory, list(dtypes)
        layouts = directory.layouts
        self.codecs = ChunkCodec.several(layouts)
        self.kinds = np.array([_kind(la, co) for la, co in zip(layouts, self.codecs, strict=True)], np.int64)
        taken = np.isin(self.kinds, (RAW, PACKED_32, PACKED_64))
        self.tails = np.where(taken, [codec.tail for codec in self.codecs], 0).astype(np.int64)
        self.checks = ChunkChecks(table, directory, self.tails.tolist())
        self._compressions = list(compressions or [None] * len(layouts))
        self.decompresses = np.array([c is not None for c in self._compressions], bool)
        self.leaves_to_host = (self.kinds == DECODED) & ~self.decompresses
        self.itemsize = np.array([layout.dtype.itemsize for layout in layouts], np.int64)
        self.elements = np.array([math.prod(layout.chunk_shape) for layout in layouts], np.int64)
        self._type = np.array([element_type(la.dtype, f"array {la.name!r}") for la in layouts], np.uint32)
        # Bytes after the last block of a bitpacking chunk are ignored, so they need not be copied.
        words = [co.bitpacking or 4 for co in self.codecs]
        n_words = self.elements * self.itemsize // words
        self.packed_bytes = np.array([max_encoded_size(*size) for size in zip(n_words, words, strict=True)])
        self._pool = BufferPool()

    def measure(
        self,
        plan: BatchPlan,
        slab: Slab,
        *,
        layout: Layout | None = None,
        resident: Resident | None = None,
        host: np.ndarray | None = None,
    ) -> StagedPlan:
        """Decide what crosses for the rows of a plan, and how much room that takes; exact.

        Parameters
        ----------
        plan, slab
            As for the host engine's `csr`.
        layout
            Layout of the batch, which saves room if it is known; None for either one.
        resident
            Chunks that need not cross; of these the slab may say anything.
        host
            Buffer that the plan will probably be packed into: what of rowpack chunks fits there is copied at
            once. Nobody may read it any more.

        Raises
        ------
        CorruptChunkError
            A checksum, a header or a directory is wrong, or an object is missing that cannot be.
        """
        slab = self.checks.without_tails(plan, slab, None if resident is None else resident.at >= 0)
        staging = StagedPlan(plan, slab, resident=resident)
        kind = np.where(slab.address == 0, ABSENT, self.kinds[plan.chunk_array])
        if resident is not None:
            here = self.kinds[plan.chunk_array]
            here[(here == RAW) | (here == DECODED)] = ELEMENTS
            kind = np.where(resident.at >= 0, here, kind)
        contents = self._opened(plan, slab, kind)
        jobs = [
            np.flatnonzero(kind == k) if n else _NONE
            for k, n in enumerate(np.bincount(kind, minlength=ELEMENTS + 1).tolist())
        ]
        cursor = Cursor(self._rowpack(staging, jobs[ROWPACK], host))
        data = [self._packed(staging, jobs[k], k, cursor) for k in (PACKED_32, PACKED_64)]
        jobs[STREAMS], begin = self._streams(staging, jobs[STREAMS], contents, cursor)
        data += [begin, self._raw(staging, jobs[RAW], cursor), self._decoded(staging, jobs[DECODED], cursor)]
        data += [self._absent(staging, jobs[ABSENT], cursor), self._held(staging, jobs[ELEMENTS])]
        plain = np.concatenate(jobs[PACKED_32:])
        staging.tables["plains"] = self._plains(staging, plain, np.concatenate(data))
        if self.table.first_role != INDEX_ROLE:
            staging.tables["sources"] = plan.source
        elif layout != "csr":
            self._segments(staging, kind)
        staging.tables["offsets"] = plan.offsets
        self._lay_out(staging, cursor, layout)
        return staging

    def pack(self, staging: StagedPlan, host: np.ndarray, area: int | None = None) -> None:
        """Put everything that crosses into `host`, but the outputs' table. To be called once.

        Parameters
        ----------
        staging
            From `measure`, of this stager.
        host
            uint8, 16-byte aligned, (>= host_bytes,).
        area
            Where `area_bytes` are free in the arena of resident chunks, a multiple of 64; None where nothing
            is to lie there.

        Raises
        ------
        CorruptChunkError
            A chunk that is decoded on the host does not decode.
        """
        if len(host) < staging.host_bytes:
            raise ValueError(f"packing takes {staging.host_bytes} bytes, the buffer holds {len(host)}")
        self._settle(staging, area)
        target = np.uint64(_address(host))
        done = (
            staging.n_copied if staging.copied_to is not None and _address(staging.copied_to) == target else 0
        )
        for ranges in (staging.rowpack_ranges[done:], *staging.ranges):
            if not len(ranges):
                continue
            if staging.slab.copy is not None:
                staging.slab.copy(ranges, host)
            else:
                copy_ranges(ranges, np.uint64(0), target)
        for c, ranges in staging.decode:
            array = int(staging.plan.chunk_array[c])
            try:
                skipped = self.directory.skipped_filters(int(staging.plan.chunks[c]))
                decoded = np.ascontiguousarray(self.codecs[array].decode(staging.slab.view(c), skipped))
            except ValueError as error:
                raise self._error(staging.plan, c, error) from error
            copy_ranges(ranges, np.uint64(_address(decoded)), target)
        for at, values in staging.fills:
            _put(host, at, values)
        for name, table in staging.tables.items():
            _put(host, staging.at[name], table)
        host[staging.at["status"] :][: staging.status_bytes] = 0

    def _settle(self, staging: StagedPlan, area: int | None) -> None:
        """Add to places in staged bytes and scratch where these lie in the arena of resident chunks."""
        if area is None:
            return
        tables, base = staging.tables, np.uint64(area)
        for name in ("records", "payload", "patches"):
            tables["runs"][name] += base
        if staging.staged is not None:
            tables["pieces"]["run"][staging.staged] += np.uint32((area + staging.at["runs"]) // RUN.itemsize)
        for name in ("packed32", "packed64"):
            tables[name]["data"][~staging.there(staging.jobs[name][0])] += base
            tables[name]["out"] += base
        if staging.opened is not None:
            staging.opened.shift_all(area)
        jobs, n_pieces = staging.jobs["plains"]
        last = int(n_pieces[self._moves(staging, jobs)].sum())
        tables["plains"]["data"][:last] += base

    def _moves(self, staging: StagedPlan, jobs: np.ndarray) -> np.ndarray:
        """Which chunks lie, as elements, in staged bytes or scratch; all of these stand before the others."""
        packed = np.isin(self.kinds[staging.plan.chunk_array[jobs]], (PACKED_32, PACKED_64))
        result: np.ndarray = packed | ~staging.there(jobs)
        return result

    def _rowpack(self, staging: StagedPlan, jobs: np.ndarray, host: np.ndarray | None) -> int:
        """Runs and pieces of rowpack chunks; returns the bytes they take, from byte 0 on."""
        plan, slab, resident = staging.plan, staging.slab, staging.resident
        there = staging.there(jobs)
        self.checks.rowpack_checksums(plan, slab, jobs[~there])
        held = np.full(len(jobs), -1) if resident is None else np.where(there, resident.run[jobs], -1)
        array = plan.chunk_array[jobs]
        source, role = self.table.roles(array)
        n = int((plan.piece_ptr[jobs + 1] - plan.piece_ptr[jobs]).sum())
        runs, ranges = self._pool.empty(n, RUN), self._pool.empty(3 * n, RANGE)
        pieces, piece_row = self._pool.empty(n, PIECE), self._pool.empty(n, np.int64)
        status = np.zeros(len(jobs), np.int64)
        if slab.copy is not None:  # addresses may lie on storage that is slow to its first byte
            host = None
        target, capacity = (np.uint64(0), 0) if host is None else (np.uint64(_address(host)), len(host))
        n_runs, nbytes, n_copied = size_runs(
            jobs, slab.address, slab.nbytes, self.elements[array], self.itemsize[array], source, role, held,
            plan.piece_ptr, plan.piece_skip, plan.piece_count, plan.piece_out, plan.piece_row,
            target, capacity, runs, ranges, pieces, piece_row, status,
        )  # fmt: skip
        if status.any():
            j = int(np.flatnonzero(status)[0])
            raise self._error(plan, int(jobs[j]), describe_status(int(status[j])))
        staging.tables["runs"], staging.tables["pieces"] = runs[:n_runs], pieces
        staging.piece_row = piece_row
        staging.rowpack_ranges = ranges[: 3 * n_runs]
        staging.copied_to, staging.n_copied = host, 3 * int(n_copied)
        n_pieces = plan.piece_ptr[jobs + 1] - plan.piece_ptr[jobs]
        staging.jobs["pieces"] = (jobs, n_pieces)
        if resident is not None and n_runs:
            staging.staged = np.repeat(~there, n_pieces)
        return int(nbytes)

    def _packed(self, staging: StagedPlan, jobs: np.ndarray, kind: int, cursor: Cursor) -> np.ndarray:
        """Whole homeobox.bitpacking chunks; returns where pieces begin, from the scratch they decode to."""
        plan, slab = staging.plan, staging.slab
        name, word = ("packed32", 4) if kind == PACKED_32 else ("packed64", 8)
        if not len(jobs):
            staging.tables[name], staging.jobs[name] = np.empty(0, PACKED), (jobs, jobs)
            return _NONE
        pieces, job = _pieces_of(plan, jobs)
        array = plan.chunk_array[jobs]
        there, resident = staging.there(jobs), staging.resident
        itemsize, nbytes = self.itemsize[array], np.minimum(slab.nbytes[jobs], self.packed_bytes[array])
        begin = plan.piece_skip[pieces] * itemsize[job]
        end = begin + plan.piece_count[pieces] * itemsize[job]
        records = np.zeros(len(jobs), PACKED)
        records["data"][~there] = cursor.take_each(nbytes[~there], 16)
        if resident is not None:
            records["data"][there] = resident.at[jobs[there]]
            nbytes = np.where(there, resident.nbytes[jobs], nbytes)
        records["nbytes"] = nbytes
        records["n_words"] = self.elements[array] * itemsize // word
        first = np.flatnonzero(np.diff(job, prepend=-1))
        records["first_word"] = np.minimum.reduceat(begin, first) // word
        records["last_word"] = -(-np.maximum.reduceat(end, first) // word)
        # Decoded chunks lie after all that is staged, whose end is not known yet: `_lay_out` adds it.
        scratch = Cursor(0)
        records["out"] = scratch.take_each(records["n_words"].astype(np.int64) * word, 16)
        staging.tables[name] = records
        staging.jobs[name] = (jobs, np.ones(len(jobs), np.int64))
        ranges = _ranges(slab.address[jobs], records["data"], nbytes)
        staging.ranges.append(ranges[~there])
        result: np.ndarray = records["out"][job].astype(np.int64) + begin
        return result

    def _opened(self, plan: BatchPlan, slab: Slab, kind: np.ndarray) -> dict[int, Contents]:
        """Take chunks apart that the device decompresses, by number; these become STREAMS in `kind`."""
        found: dict[int, Contents] = {}
        for c in np.flatnonzero((kind == DECODED) & self.decompresses[plan.chunk_array]).tolist():
            compression = self._compressions[int(plan.chunk_array[c])]
            assert compression is not None
            try:
                contents = compression.open(slab.view(c))
            except CorruptChunkError as error:
                raise self._error(plan, c, error.reason) from error
            if contents is not None:
                found[c] = contents
        kind[list(found)] = STREAMS
        return found

    def _streams(
        self, staging: StagedPlan, jobs: np.ndarray, contents: dict[int, Contents], cursor: Cursor
    ) -> tuple[np.ndarray, np.ndarray]:
        """Chunks as compressed streams; returns them in order, and where pieces begin, from scratch."""
        plan, slab, tables = staging.plan, staging.slab, staging.tables
        if not len(jobs):
            tables["streams"] = np.empty(0, np.uint64)
            tables["copies"] = tables["shuffles"] = np.empty(0, BLOCK)
            staging.jobs |= dict.fromkeys(("streams", "copies", "shuffles"), (jobs, jobs))
            return jobs, _NONE
        array = plan.chunk_array[jobs]
        sizes = self.elements[array] * self.itemsize[array]
        opened = staging.opened = lay_out(jobs, [contents[c] for c in jobs.tolist()], sizes, cursor)
        jobs = opened.jobs
        tables |= opened.tables
        staging.jobs |= {part: (jobs, counts) for part, counts in opened.counts.items()}
        source = slab.address[jobs][opened.owner] + opened.begin.astype(np.uint64)
        staging.ranges.append(_ranges(source, opened.place, opened.nbytes))
        pieces, job = _pieces_of(plan, jobs)
        begin, _ = self._extent(plan, pieces, plan.chunk_array[jobs][job])
        return jobs, opened.out[job] + begin

    def _raw(self, staging: StagedPlan, jobs: np.ndarray, cursor: Cursor) -> np.ndarray:
        """Elements of chunks that are stored as they are; returns where each piece begins."""
        if not len(jobs):
            return _NONE
        plan, slab = staging.plan, staging.slab
        pieces, job = _pieces_of(plan, jobs)
        array = plan.chunk_array[jobs]
        self.checks.raw_sizes(plan, slab, jobs)
        begin, nbytes = self._extent(plan, pieces, array[job])
        place = cursor.take_each(nbytes, 8)
        staging.ranges.append(_ranges(slab.address[jobs][job] + begin.astype(np.uint64), place, nbytes))
        return place

    def _decoded(self, staging: StagedPlan, jobs: np.ndarray, cursor: Cursor) -> np.ndarray:
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

    def _absent(self, staging: StagedPlan, jobs: np.ndarray, cursor: Cursor) -> np.ndarray:
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
        result: np.ndarray = place[job]
        return result

    def _held(self, staging: StagedPlan, jobs: np.ndarray) -> np.ndarray:
        """Elements of resident chunks; returns where each piece begins, in the arena they lie in."""
        resident = staging.resident
        if not len(jobs) or resident is None:
            return _NONE
        pieces, job = _pieces_of(staging.plan, jobs)
        begin, _ = self._extent(staging.plan, pieces, staging.plan.chunk_array[jobs][job])
        result: np.ndarray = resident.at[jobs][job] + begin
        return result

    def _extent(
        self, plan: BatchPlan, pieces: np.ndarray, array: np.ndarray
    ) -> tuple[np.ndarray, np.ndarray]:
        """(first byte inside the decoded chunk, bytes) of pieces of arrays."""
        itemsize = self.itemsize[array]
        return plan.piece_skip[pieces] * itemsize, plan.piece_count[pieces] * itemsize

    def _plains(self, staging: StagedPlan, jobs: np.ndarray, data: np.ndarray) -> np.ndarray:
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
        records["source"], records["role"] = self.table.roles(array)
        staging.jobs["plains"] = (jobs, plan.piece_ptr[jobs + 1] - plan.piece_ptr[jobs])
        return records

    def _segments(self, staging: StagedPlan, kind: np.ndarray) -> None:
        """Pairs of index and value pieces of every layer, where rows can go dense without CSR between."""
        plan = staging.plan
        role = plan.chunk_array % self.table.n_roles
        narrow = (kind == ROWPACK) & (self.itemsize[plan.chunk_array] <= FUSED_BYTES)
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

    def _lay_out(self, staging: StagedPlan, cursor: Cursor, layout: Layout | None) -> None:
        """Give every table its place, and the scratch its place after what is staged."""
        plan, at, tables = staging.plan, staging.at, staging.tables
        at["runs"] = cursor.take(tables["runs"].nbytes, RUN.itemsize)
        staging.staged_bytes = round_up(cursor.at, 16)
        at["outputs"] = cursor.take(OUTPUT.itemsize * (1 + len(self.dtypes)))
        for name, table in tables.items():
            if name != "runs":
                at[name] = cursor.take(table.nbytes)
        staging.counts = {part: len(tables[part]) for part in PARTS} | {"rows": plan.n_rows}
        staging.status_bytes = 4 * (2 + sum(staging.counts.values()))
        at["total"] = cursor.take(8)
        at["status"] = cursor.take(staging.status_bytes)
        staging.host_bytes = round_up(cursor.at, 16)

        scratch = Cursor(staging.host_bytes if staging.resident is None else staging.staged_bytes)
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
        if staging.opened is not None:
            begin = scratch.take(staging.opened.scratch, 16)
            jobs = staging.opened.jobs
            n = int((plan.piece_ptr[jobs + 1] - plan.piece_ptr[jobs]).sum())
            staging.opened.shift_scratch(begin)
            tables["plains"]["data"][first : first + n] += np.uint64(begin)
        if staging.resident is not None:
            staging.area_bytes, scratch = round_up(scratch.at, 16), Cursor(staging.host_bytes)
        staging.arena_bytes = round_up(scratch.at, 16)
        for role in range(self.table.first_role, 1 + len(self.dtypes)):
            itemsize = 4 if role == INDEX_ROLE else WIDEST
            at[f"flat{role}"] = scratch.take(itemsize * plan.n_elements, 256)
        at["kept"] = scratch.take(8 * plan.n_rows)
        staging.flat_bytes = round_up(scratch.at, 16)
        if (layout != "dense" and self.table.drops) or not all(staging.fused):
            staging.arena_bytes = staging.flat_bytes

    def _error(self, plan: BatchPlan, c: int, reason: str | Exception) -> CorruptChunkError:
        return self.directory.error(int(plan.chunks[c]), reason)


def _kind(layout: ArrayLayout, codec: ChunkCodec) -> int:
    n, dtype = math.prod(layout.chunk_shape), layout.dtype
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
