"""Keep resident chunks, verified once, in memory that kernels reach, with areas for other chunks.

The memory is one allocation, so that one base address serves resident chunks and those staged beside them.
Chunks come in blocks: the HbxRun of its rowpack chunks, then the chunks, each at a multiple of 16 bytes.
"""

from __future__ import annotations

import threading
from collections import deque
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import numpy as np

from hbx_gpu._codecs.rowpack_numba import describe_status
from hbx_gpu._engine.device.backend import DeviceBuffer, Memory, NoRoom, Part, Slot
from hbx_gpu._engine.device.records import RUN
from hbx_gpu._engine.device.staged_plan import DECODED, PACKED_32, PACKED_64, RAW, ROWPACK, Resident
from hbx_gpu._engine.device.stager import Stager
from hbx_gpu._engine.device.staging_kernels import RANGE, copy_ranges, whole_runs
from hbx_gpu._plan.rows import BatchPlan
from hbx_gpu._storage.chunks import Extents
from hbx_gpu._storage.kvikio import PAGE
from hbx_gpu._storage.readers import Reader, Slab

if TYPE_CHECKING:
    from hbx_gpu._engine.device import DeviceEngine
    from hbx_gpu._storage.kvikio import KvikioReader

MAX_ARENA = (1 << 36) - 256
"""Bytes that kernels address from one base: places of payload are counted in 16 bytes, in 32 bits."""
_AREA_ALIGN = 256


class FreeList:
    """Parts of a stretch of memory, first fit; neighbors that come back are joined.

    Parameters
    ----------
    memory
        Memory that the parts belong to.
    begin, end
        The stretch, as offsets; whole multiples of 256 are handed out.
    """

    def __init__(self, memory: Memory, begin: int, end: int) -> None:
        self._base = memory.address
        begin = -(-begin // _AREA_ALIGN) * _AREA_ALIGN
        self._free = [(begin, end)] if end > begin else []
        self._lock = threading.Lock()

    def take(self, nbytes: int) -> Part:
        """A free part of at least that size; raises NoRoom."""
        nbytes = -(-nbytes // _AREA_ALIGN) * _AREA_ALIGN
        with self._lock:
            for i, (begin, end) in enumerate(self._free):
                if end - begin >= nbytes:
                    self._free[i : i + 1] = [(begin + nbytes, end)] if end - begin > nbytes else []
                    return Part(self._base + begin, nbytes)
        raise NoRoom

    def give(self, part: Part) -> None:
        """Take a part back."""
        begin = part.address - self._base
        with self._lock:
            joined: list[tuple[int, int]] = []
            for a, b in sorted([*self._free, (begin, begin + part.nbytes)]):
                if joined and joined[-1][1] == a:
                    joined[-1] = (joined[-1][0], b)
                else:
                    joined.append((a, b))
            self._free = joined


@dataclass(frozen=True, slots=True)
class _Block:
    """Chunks that are loaded together.

    Attributes
    ----------
    chunks, kind, extents
        Global numbers, what happens to them, where they are stored; absent chunks are left out.
    held
        int64, (k,). Bytes of each that stay.
    at
        int64, (k,). Places of the chunks in the block, after `n_runs` HbxRun.
    """

    chunks: np.ndarray
    kind: np.ndarray
    extents: Extents
    held: np.ndarray
    at: np.ndarray
    n_runs: int
    nbytes: int


def with_slack(capacity: int) -> int:
    """Bytes of memory for so many bytes of chunks: blocks are padded."""
    return -(-(capacity + capacity // 64 + (1 << 16)) // _AREA_ALIGN) * _AREA_ALIGN if capacity else 0


class ChunkStore:
    """Chunks of one dataset in memory that kernels reach. Safe to use from many threads.

    Parameters
    ----------
    engine
        Engine that decodes the chunks.
    reader
        Reader of stored bytes.
    capacity
        Bytes for resident chunks, as `resident_sizes` counts them.
    area_bytes
        Bytes beside them, for what batches stage and decode; of device memory only.
    memory
        ``"device"``, or ``"host"``: page-locked, and kernels read it over the bus. There, chunks of general
        codecs do not stay: nothing would be saved.
    direct
        Reader that brings stored bytes to device memory directly; chunks of general codecs go through the
        host.

    Attributes
    ----------
    areas
        For slots; None in host memory.
    full
        Whether a chunk found no room.
    """

    def __init__(
        self,
        engine: DeviceEngine,
        reader: Reader,
        *,
        capacity: int,
        area_bytes: int = 0,
        memory: Literal["device", "host"] = "device",
        direct: KvikioReader | None = None,
    ) -> None:
        self._engine, self._stager, self._backend = engine, engine.stager, engine.backend
        self._reader, self._direct = reader, direct
        self._capacity, self._end = capacity, with_slack(capacity)
        nbytes = max(_AREA_ALIGN, self._end + (area_bytes if memory == "device" else 0))
        if nbytes > MAX_ARENA:
            raise ValueError(f"kernels address {MAX_ARENA} bytes at most, {nbytes} are asked for")
        self._host: np.ndarray | None = None
        self.areas: FreeList | None = None
        if memory == "host":
            self._host, address = self._backend.mapped_buffer(nbytes)
            self._arena: Memory = Part(address, nbytes)
        else:
            self._buffer: DeviceBuffer = self._backend.device_buffer(nbytes)
            self._arena = self._buffer
            self._backend.event().wait()  # whoever had this memory before is done with it
            self.areas = FreeList(self._arena, self._end, nbytes)
        n_chunks = int(self._stager.table.chunk_base[-1])
        # Untouched pages of zeros take no memory: places are kept plus 1, 0 = not here.
        self._at, self._run, self._held = (np.zeros(n_chunks, np.int64) for _ in range(3))
        self._claimed = np.zeros(n_chunks, bool)
        self._used, self._next = 0, 0  # bytes of chunks; where the next block begins
        self._lock = threading.Lock()
        self._bounces: deque[Slot] = deque()
        self.full = False

    @property
    def nbytes(self) -> int:
        """Bytes of resident chunks and their records."""
        return self._used

    def lookup(self, plan: BatchPlan) -> Resident:
        """Return which chunks of a plan are in this store, and their places."""
        at = self._at[plan.chunks] - 1
        return Resident(self._arena, at, self._run[plan.chunks], self._held[plan.chunks])

    def runs(self, chunks: np.ndarray) -> np.ndarray | None:
        """Number of the run of every chunk, 0 for those not in `chunks`; None if one of these is not here."""
        if not (self._at[chunks] > 0).all():
            return None
        runs = np.zeros(len(self._run), np.uint32)
        runs[chunks] = self._run[chunks]
        return runs

    @property
    def arena(self) -> Memory:
        """Memory that holds the chunks."""
        return self._arena

    @property
    def host_range(self) -> tuple[int, int]:
        """Addresses that chunks have in host memory: the first, and the one after the last."""
        if self._host is None:
            return 0, 0
        begin = int(self._host.ctypes.data)
        return begin, begin + len(self._host)

    def slab(self, plan: BatchPlan) -> Slab:
        """Stored bytes of those chunks of a plan that are in host memory; address 0 for the others."""
        if self._host is None:
            none = np.zeros(len(plan.chunks), np.int64)
            return Slab(none.astype(np.uint64), none, self)
        at = self._at[plan.chunks]
        address = np.uint64(self._host.ctypes.data) + (at - 1).astype(np.uint64)
        return Slab(np.where(at > 0, address, np.uint64(0)), self._held[plan.chunks], self._host)

    def load(self, chunks: np.ndarray) -> int:
        """Bring those of `chunks` that are not here, as many as there is room for, the first first.

        Returns
        -------
        int
            Bytes that they take.

        Raises
        ------
        CorruptChunkError
            A checksum, a header or a size is wrong, or a chunk does not decode.
        """
        if self._direct is not None:
            array = np.searchsorted(self._stager.table.chunk_base, chunks, "right") - 1
            decoded = self._stager.kinds[array] == DECODED
            if decoded.any() and not decoded.all():  # they come by another way
                return self.load(chunks[~decoded]) + self.load(chunks[decoded])
        with self._lock:
            chunks = chunks[~self._claimed[chunks]]
            self._claimed[chunks] = True
        sizes = resident_sizes(self._stager, chunks, decoded=self._host is None)
        with self._lock:
            room = min(self._capacity - self._used, self._end - self._next)
            fit = int(np.searchsorted(np.cumsum(sizes), room, "right"))
            block = self._block(chunks[:fit])
            # Blocks begin where their records may.
            begin = self._next
            self._next += -(-block.nbytes // _AREA_ALIGN) * _AREA_ALIGN
            self._used += block.nbytes
            self._claimed[chunks[fit:]] = False
            self.full = self.full or fit < len(chunks)
        if not len(block.chunks):
            return 0
        self._fill(block, begin)
        self._run[block.chunks] = begin // RUN.itemsize + np.cumsum(block.kind == ROWPACK) - 1
        self._held[block.chunks] = block.held
        # Places are written last: other threads go by them, and what they order comes after the upload.
        self._at[block.chunks] = begin + block.at + 1
        return block.nbytes

    def borrow(self, plan: BatchPlan, resident: Resident, slot: Slot) -> Resident:
        """Bring chunks of a plan that are not resident for one batch; `slot` gives them back.

        Raises
        ------
        NoRoom
            They are too many.
        """
        # Of general codecs less crosses when they are decoded on the host.
        missing = np.flatnonzero((resident.at < 0) & (self._stager.kinds[plan.chunk_array] != DECODED))
        block = self._block(plan.chunks[missing])
        if not len(block.chunks) or self.areas is None:
            return resident
        part = self.areas.take(block.nbytes)
        slot.borrowed.append(part)
        begin = part.address - self._arena.address
        self._fill(block, begin)
        where = missing[np.searchsorted(plan.chunks[missing], block.chunks)]
        at, run, held = resident.at.copy(), resident.run.copy(), resident.nbytes.copy()
        at[where], held[where] = begin + block.at, block.held
        run[where] = begin // RUN.itemsize + np.cumsum(block.kind == ROWPACK) - 1
        return Resident(self._arena, at, run, held)

    def _block(self, chunks: np.ndarray) -> _Block:
        extents = self._engine.directory.extents(chunks)
        kind, held = _held_bytes(self._stager, chunks, extents, decoded=self._host is None)
        stays = held >= 0
        chunks, kind, held = chunks[stays], kind[stays], held[stays]
        extents = Extents(extents.file[stays], extents.offset[stays], extents.nbytes[stays])
        n_runs = int((kind == ROWPACK).sum())
        padded = -(-held // 16) * 16
        at = RUN.itemsize * n_runs + np.cumsum(padded) - padded
        return _Block(chunks, kind, extents, held, at, n_runs, RUN.itemsize * n_runs + int(padded.sum()))

    def _fill(self, block: _Block, begin: int) -> None:
        """Bring a block to its place; later launches find it there."""
        if self._host is not None:
            host = self._host[begin : begin + block.nbytes]
            self._read(block, host)
            self._describe(block, host, block.at, begin, host)
            return
        try:
            slot = self._bounces.popleft()
        except IndexError:
            slot = Slot(self._backend)
        try:
            if self._direct is not None and (block.kind != DECODED).all():
                self._fill_directly(block, begin, slot, self._direct)
            else:
                slot.reserve(block.nbytes, 0)
                host = slot.host[: block.nbytes]
                self._read(block, host)
                self._describe(block, host, block.at, begin, host)
                self._backend.upload(host, Part(self._arena.address + begin, block.nbytes))
        finally:  # whatever was ordered before an error
            slot.busy = self._backend.event()
            self._bounces.append(slot)

    def _fill_directly(self, block: _Block, begin: int, slot: Slot, direct: KvikioReader) -> None:
        """Stored bytes land in device memory as they lie in files; from there to places that kernels take.

        They come back to the host once, to be verified there.
        """
        backend, placed = self._backend, direct.place(block.extents)
        slot.reserve(block.n_runs * RUN.itemsize, placed.size + PAGE, placed.size)
        assert slot.device is not None
        skip = -slot.device.address % PAGE
        direct.read_into(placed, slot.device.array(skip, placed.size))
        landed = slot.device.address + skip
        for source, at, nbytes in zip(
            placed.at.tolist(), block.at.tolist(), block.held.tolist(), strict=True
        ):
            backend.move(landed + source, self._arena.address + begin + at, nbytes)
        seen = slot.side[: placed.size]
        backend.download(landed, seen)
        backend.event().wait()
        runs = slot.host[: block.n_runs * RUN.itemsize]
        self._describe(block, seen, placed.at, begin, runs)
        if len(runs):
            backend.upload(runs, Part(self._arena.address + begin, len(runs)))

    def _read(self, block: _Block, host: np.ndarray) -> None:
        """Stored bytes, decoded where the codec is a general one, to their places in `host`."""
        slab = self._reader.read(block.extents)
        decoded = block.kind == DECODED
        ranges = np.empty(len(block.chunks), RANGE)
        ranges["source"], ranges["target"], ranges["nbytes"] = slab.address, block.at, block.held
        copied = ranges[~decoded & (block.held > 0)]
        if slab.copy is not None:
            slab.copy(copied, host)
        else:
            copy_ranges(copied, np.uint64(0), np.uint64(host.ctypes.data))
        for i in np.flatnonzero(decoded):
            chunk = int(block.chunks[i])
            array = int(np.searchsorted(self._stager.table.chunk_base, chunk, "right")) - 1
            try:
                skipped = self._engine.directory.skipped_filters(chunk)
                elements = self._stager.codecs[array].decode(slab.view(int(i)), skipped)
            except ValueError as error:
                raise self._engine.directory.error(chunk, error) from error
            at = int(block.at[i])
            host[at : at + elements.nbytes] = np.ascontiguousarray(elements).view(np.uint8)

    def _describe(
        self, block: _Block, host: np.ndarray, at: np.ndarray, begin: int, runs: np.ndarray
    ) -> None:
        """Verify the chunks that lie at `at` in `host`; write their records to the front of `runs`."""
        stager, directory = self._stager, self._engine.directory
        plan = _plan_of(block.chunks, stager.table.chunk_base)
        slab = Slab(np.uint64(host.ctypes.data) + at.astype(np.uint64), block.extents.nbytes, host)
        slab = stager.checks.without_tails(plan, slab, block.kind == DECODED)
        stager.checks.raw_sizes(plan, slab, np.flatnonzero(block.kind == RAW))
        jobs = np.flatnonzero(block.kind == ROWPACK)
        stager.checks.rowpack_checksums(plan, slab, jobs)
        array, status = plan.chunk_array[jobs], np.zeros(len(jobs), np.int64)
        records = runs[: block.n_runs * RUN.itemsize].view(RUN)
        whole_runs(
            slab.address[jobs], slab.nbytes[jobs], stager.elements[array], stager.itemsize[array],
            begin + block.at[jobs], records, status,
        )  # fmt: skip
        if status.any():
            j = int(np.flatnonzero(status)[0])
            raise directory.error(int(block.chunks[jobs[j]]), describe_status(int(status[j])))


def resident_sizes(stager: Stager, chunks: np.ndarray, *, decoded: bool) -> np.ndarray:
    """Bytes that chunks take in a store.

    Parameters
    ----------
    stager
        Knows how they are stored.
    chunks
        int64, (k,). Global numbers.
    decoded
        Whether chunks of general codecs stay, as elements.

    Returns
    -------
    ndarray
        int64, (k,). Record and padding included; 0 for chunks that are absent or do not stay.
    """
    kind, held = _held_bytes(stager, chunks, stager.directory.extents(chunks), decoded=decoded)
    return np.where(held >= 0, -(-held // 16) * 16 + RUN.itemsize * (kind == ROWPACK), 0)


def _held_bytes(
    stager: Stager, chunks: np.ndarray, extents: Extents, *, decoded: bool
) -> tuple[np.ndarray, np.ndarray]:
    """(kind, bytes that stay) of chunks; -1 bytes of those that are absent or do not stay."""
    array = np.searchsorted(stager.table.chunk_base, chunks, "right") - 1
    kind, held = stager.kinds[array], extents.nbytes.copy()
    packed = (kind == PACKED_32) | (kind == PACKED_64)
    held[packed] = np.minimum(held, (stager.packed_bytes + stager.tails)[array])[packed]
    held[kind == DECODED] = (stager.elements * stager.itemsize)[array][kind == DECODED] if decoded else -1
    held[extents.nbytes < 0] = -1
    return kind, held


def _plan_of(chunks: np.ndarray, chunk_base: np.ndarray) -> BatchPlan:
    """A plan of chunks and no rows, for checks that take one."""
    none = np.empty(0, np.int64)
    array = np.searchsorted(chunk_base, chunks, "right") - 1
    return BatchPlan(
        source=none.astype(np.int32),
        offsets=np.zeros(1, np.int64),
        chunks=chunks,
        chunk_array=array,
        piece_ptr=np.zeros(len(chunks) + 1, np.int64),
        piece_row=none,
        piece_skip=none,
        piece_count=none,
        piece_out=none,
    )
