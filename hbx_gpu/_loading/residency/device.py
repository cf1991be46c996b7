"""Get the chunks of a loader to a device: some stay there, the others are staged for each window.

Each loader has one object of this kind, which its threads share.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Literal

import numpy as np

from hbx_gpu._advice import option
from hbx_gpu._devices import cores, free_host_memory
from hbx_gpu._engine.device.backend import NoRoom, Slot
from hbx_gpu._engine.device.planned import DeviceIndex, can_plan, index_nbytes
from hbx_gpu._engine.device.staged_plan import PACKED_32, PACKED_64, Layout, Resident, Staged, StagedPlan
from hbx_gpu._engine.device.staging_kernels import copy_ranges
from hbx_gpu._engine.device.store import MAX_ARENA, ChunkStore, resident_sizes, with_slack
from hbx_gpu._loading.residency.host import (
    DEVICE_SHARE,
    SHARE,
    decide,
    fitting,
    load_all,
    tell,
)
from hbx_gpu._plan.rows import BatchPlan, needed_chunks
from hbx_gpu._storage import kvikio
from hbx_gpu._storage.choice import choose
from hbx_gpu._storage.readers import Reader, Slab
from hbx_gpu.loader_stats import stage

if TYPE_CHECKING:
    from hbx_gpu._datasets.cells import CellDataset
    from hbx_gpu._engine.device import DeviceEngine
    from hbx_gpu._loading.options import LoaderOptions

AREA_BYTES = 256 << 20
"""Least bytes next to resident chunks for what is staged or decoded, where not all chunks are resident."""
_AREA_SHARE = 8  # or the resident bytes divided by this, if that is more
_TRIAL_ROWS = 256


class DeviceChunks:
    """Provides the chunks of plans: resident ones as places in memory, others as stored bytes.

    Parameters
    ----------
    dataset, engine
        Dataset whose chunks are loaded, and the engine that decodes them.
    options
        `layout`: what the engine makes of them; `io`, `residency`, `residency_budget`, `residency_load` and
        `threads` as for :func:`hbx_gpu.dataloader.make_loader`.

    Attributes
    ----------
    residency, io
        Residency and reader that were chosen.
    store
        Store of resident chunks; None where none stay.
    in_place
        Whether kernels read page-locked memory over the bus, instead of getting blocks of it packed.
    index
        Row index in device memory, by which the device plans batches; None where the host plans them.
    """

    def __init__(
        self,
        dataset: CellDataset,
        engine: DeviceEngine,
        options: LoaderOptions,
    ) -> None:
        self._dataset, self._engine, self._threads = dataset, engine, options.threads or cores()
        self._layout: Layout = "csr" if options.layout in ("csr", "tokens") else "dense"
        self.io = self._choose(options.io or "mmap")
        self._direct = kvikio.KvikioReader(engine.directory) if self.io == "kvikio" else None
        self._reader: Reader = dataset.open_reader("mmap" if self.io == "kvikio" else self.io)
        self.in_place = False
        self.store: ChunkStore | None = None
        self.index: DeviceIndex | None = None
        self._touch = False
        self.residency, reason = self._decide(options.residency, options.residency_budget)
        if self.residency != "none":
            self._hold(options.residency_budget, options.residency_load, reason)
        elif self._direct is not None:
            # Whole chunks go straight to the device, for one batch each.
            area = min(4 * AREA_BYTES, int(DEVICE_SHARE * engine.backend.free_memory()))
            self.store = self._new_store(0, area, "device")

    def slot(self) -> Slot:
        """Staging memory for one batch in flight."""
        if self.store is None:
            return Slot(self._engine.backend)
        return Slot(self._engine.backend, areas=self.store.areas, reads=self.store)

    def plan_on_device(self) -> None:
        """Bring row index and metadata columns to the device, where all chunks lie that any row needs."""
        if (
            self.store is None
            or self.residency == "none"
            or not (self.in_place or self.residency == "device")
        ):
            return
        rows, stager = self._dataset.row_index, self._engine.stager
        runs = self.store.runs(self._chunks)
        if runs is None or not can_plan(stager, rows):
            return
        none = np.empty(0, np.int64)
        resident = Resident(self.store.arena, none, none, none)
        columns: dict[str, np.ndarray | None] = {  # codes are int64 in batches, as `gathered` has them
            name: column.astype(np.int64, copy=False) if name in self._dataset.categories else column
            for name, column in self._dataset.columns.items()
        }
        columns["index"] = None
        self.index = DeviceIndex(
            self._engine.backend, stager, rows, runs, resident, columns, self.slot, self.stage_on_host
        )

    def stage(self, selection: np.ndarray, slot: Slot) -> Staged:
        """Get rows ready for their launches; where the host plans them, read what they need and pack it.

        Parameters
        ----------
        selection
            int64, (n,). Row numbers.
        slot
            A free slot, from `slot`.
        """
        if self.index is not None and len(selection):
            slot.release()
            with stage("plan"):
                return self.index.stage(selection, slot)
        return self.stage_on_host(selection, slot)

    def stage_on_host(self, selection: np.ndarray, slot: Slot) -> StagedPlan:
        """Plan rows, read what they need, and pack the part of it that is copied to the device.

        Parameters
        ----------
        selection
            int64, (n,). Row numbers.
        slot
            A free slot, from `slot`.
        """
        slot.release()
        if self.store is not None and (self.in_place or self.residency != "host"):
            with stage("plan"):
                plan = self._dataset.plan(selection)
            try:
                return self._pack(plan, *self._bring(plan, slot), slot)
            except NoRoom:  # stream the window, as if no chunk were resident
                slot.release()
        elif self.store is None:
            return self._pack(*self._dataset.read(selection, self._reader), None, slot)
        plan = self._dataset.plan(selection)
        return self._pack(plan, self._stream(plan), None, slot)

    def _pack(self, plan: BatchPlan, slab: Slab, resident: Resident | None, slot: Slot) -> StagedPlan:
        with stage("plan"):
            staging = self._engine.measure(plan, slab, layout=self._layout, resident=resident, host=slot.host)
        with stage("copy") as copying:
            self._engine.pack(staging, slot)
            copying.nbytes = staging.host_bytes
        return staging

    def _bring(self, plan: BatchPlan, slot: Slot) -> tuple[Slab, Resident]:
        """Return the resident chunks of a plan, and the stored bytes of the others."""
        assert self.store is not None
        resident = self.store.lookup(plan)
        missing = resident.at < 0
        if self._touch and not self.store.full and missing.any():
            with stage("read") as reading:
                reading.nbytes = self.store.load(plan.chunks[missing])
            resident = self.store.lookup(plan)
        elif self.residency == "none" and missing.any():
            with stage("read"):
                resident = self.store.borrow(plan, resident, slot)
        none = np.zeros(len(plan.chunks), np.uint64)
        return self._completed(plan, Slab(none, none.astype(np.int64), self), resident.at < 0), resident

    def _stream(self, plan: BatchPlan) -> Slab:
        """Return the stored bytes of all chunks of a plan; those of resident chunks come from host memory."""
        assert self.store is not None
        slab = self.store.slab(plan)
        return self._completed(plan, slab, slab.address == 0)

    def _completed(self, plan: BatchPlan, slab: Slab, missing: np.ndarray) -> Slab:
        """Return a slab completed with the missing chunks, which are read from files."""
        if not missing.any():
            return slab
        with stage("read") as reading:
            extents = self._engine.directory.extents(plan.chunks[missing])
            extents = replace(extents, share=plan.share)
            found = self._reader.read(extents)
            reading.nbytes = int(found.nbytes[found.nbytes > 0].sum())
        address, nbytes = slab.address.copy(), slab.nbytes.copy()
        address[missing], nbytes[missing] = found.address, found.nbytes
        copy = None
        if found.copy is not None:
            assert self.store is not None
            copy = partial(_copy_both, self.store.host_range, found.copy)
        return Slab(address, nbytes, (slab, found.owner), copy)

    # -- at the start --------------------------------------------------------------------------------

    def _decide(self, residency: str, budget: int | None) -> tuple[str, str]:
        free_device, free_host = self._engine.backend.free_memory(), free_host_memory()
        sizes = {"device": 0, "host": 0}
        if residency not in ("none",):
            self._chunks = needed_chunks(self._engine.table, self._dataset.row_index)
            for memory in sizes:
                sizes[memory] = int(self._sizes(memory).sum())
        return decide(
            residency,
            device_bytes=sizes["device"],
            host_bytes=sizes["host"],
            free_device=min(free_device, MAX_ARENA),
            free_host=free_host,
            budget=budget,
        )

    def _sizes(self, memory: str) -> np.ndarray:
        return resident_sizes(self._engine.stager, self._chunks, decoded=memory == "device")

    def _hold(self, budget: int | None, load: str, reason: str) -> None:
        """Make the store, and fill it."""
        on_device = self.residency == "device"
        sizes = self._sizes(self.residency)
        most = MAX_ARENA
        if budget is None and on_device:  # room for the model: what lies beside chunks is counted too
            budget = int(DEVICE_SHARE * self._engine.backend.free_memory())
            budget = max(0, budget - index_nbytes(self._dataset.row_index, self._dataset.columns))
            most = min(most, budget)
        elif budget is None:
            budget = int(SHARE * free_host_memory())
        n = fitting(sizes, budget)
        capacity = int(sizes[:n].sum())
        area = max(AREA_BYTES, capacity // _AREA_SHARE) if self._needs_area(load, sizes, n) else 0
        if on_device and with_slack(capacity) + area > most:
            area = most // _AREA_SHARE
            n = fitting(sizes, int(0.97 * (most - area)))
            capacity = int(sizes[:n].sum())
        self.store = self._new_store(capacity, area, "device" if on_device else "host")
        self._touch = on_device and load == "touch"
        left = "" if n == len(sizes) else f", {int(sizes[n:].sum()) >> 20} MiB stream"
        stay = f"{int(sizes[:n].sum()) >> 20} MiB of chunks stay{left}"
        tell(
            f"{option('residency', self.residency)} ({reason}): {stay}"
            f"; they come {'when first needed' if self._touch else 'now'}"
        )
        if not self._touch:
            where = "device memory" if on_device else "page-locked memory"
            load_all(self.store.load, self._chunks[:n], sizes[:n], threads=self._threads, where=where)
        if not on_device:
            self.in_place = self._in_place_is_faster()

    def _needs_area(self, load: str, sizes: np.ndarray, n: int) -> bool:
        """Return whether anything will be staged or decoded next to resident chunks."""
        decoded = np.isin(self._engine.stager.kinds, (PACKED_32, PACKED_64)).any()
        return load == "touch" or n < len(sizes) or bool(decoded or (sizes == 0).any())

    def _new_store(self, capacity: int, area: int, memory: Literal["device", "host"]) -> ChunkStore:
        return ChunkStore(
            self._engine,
            self._reader,
            capacity=capacity,
            area_bytes=area,
            memory=memory,
            direct=self._direct if memory == "device" else None,
        )

    def _in_place_is_faster(self) -> bool:
        """Measure whether kernels are faster reading page-locked memory in place or getting packed blocks."""
        n = len(self._dataset)
        rows = np.random.default_rng(0).integers(0, n, min(n, _TRIAL_ROWS))
        cost: dict[bool, float] = {}
        for in_place in (False, True, False, True):  # the first time compiles
            self.in_place = in_place
            slot, begin = self.slot(), time.perf_counter()
            staging = self.stage_on_host(rows, slot)
            if in_place and staging.resident is None:
                here = option("residency", "host")
                tell(f"{here}: blocks are packed, since not all chunks can be read in place")
                return False
            packed = time.perf_counter()
            dense = self._layout == "dense"
            submit = self._engine.submit_dense if dense else self._engine.submit_csr
            submit(staging, slot).check()
            # Threads pack in parallel, while the device makes one batch after the other.
            cost[in_place] = max((packed - begin) / self._threads, time.perf_counter() - packed)
        faster = cost[True] < cost[False]
        ways = f"{1e3 * cost[True]:.2f} ms in place, {1e3 * cost[False]:.2f} ms packed"
        how = "kernels read page-locked memory in place" if faster else "blocks are packed"
        tell(f"{option('residency', 'host')}: {how} ({len(rows)} rows: {ways})")
        return faster

    def _choose(self, io: str) -> str:
        """Return the reader to use for ``io="auto"``, measured on rows of this dataset."""
        if io != "auto":
            return io
        candidates: dict[str, Callable[[np.ndarray], object]] = {
            name: partial(self._read_and_pack, self._dataset.open_reader(name)) for name in ("mmap", "pinned")
        }
        if kvikio.missing() is None:
            direct = kvikio.KvikioReader(self._engine.directory)
            candidates["kvikio"] = partial(self._read_directly, direct)
        return choose(candidates, len(self._dataset), threads=self._threads)

    def _read_and_pack(self, reader: Reader, rows: np.ndarray) -> None:
        plan, slab = self._dataset.read(rows, reader)
        staging = self._engine.measure(plan, slab, layout=self._layout)
        self._engine.stager.pack(staging, np.empty(staging.host_bytes, np.uint8))

    def _read_directly(self, direct: kvikio.KvikioReader, rows: np.ndarray) -> None:
        plan = self._dataset.plan(rows)
        placed = direct.place(self._engine.directory.extents(plan.chunks))
        slot = Slot(self._engine.backend)
        slot.reserve(0, placed.size + kvikio.PAGE)
        assert slot.device is not None
        direct.read_into(placed, slot.device.array(-slot.device.address % kvikio.PAGE, placed.size))


def _copy_both(
    held: tuple[int, int],
    copy: Callable[[np.ndarray, np.ndarray], None],
    ranges: np.ndarray,
    target: np.ndarray,
) -> None:
    """Copy ranges: from memory where their addresses lie in `held`, and with `copy` elsewhere."""
    own = (ranges["source"] >= held[0]) & (ranges["source"] < held[1])
    copy_ranges(ranges[own], np.uint64(0), np.uint64(target.ctypes.data))
    copy(ranges[~own], target)
