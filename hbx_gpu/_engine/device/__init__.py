"""The device engine: plan and bytes in, CSR or dense rows in device memory out.

The host finds and packs the bytes that cross; kernels decode, remap and scatter. The caller owns the slots
that batches in flight are staged in; nothing here waits for the device but `Pending.check`.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from functools import cache, partial
from typing import TYPE_CHECKING

import numpy as np

from hbx_gpu._engine.device import status
from hbx_gpu._engine.device.backend import Backend, Slot
from hbx_gpu._engine.device.compressed import chosen
from hbx_gpu._engine.device.launches import DENSE_KERNELS, CsrTensors, FlatCsr, Launches, Pending
from hbx_gpu._engine.device.planned import PlannedLaunches, PlannedRows
from hbx_gpu._engine.device.records import SOURCE, element_type
from hbx_gpu._engine.device.staged_plan import ANY, PARTS, Layout, Resident, Staged, StagedPlan
from hbx_gpu._engine.device.stager import Stager
from hbx_gpu._plan.rows import BatchPlan, SourceTable
from hbx_gpu._storage.chunks import ChunkDirectory
from hbx_gpu._storage.readers import Slab
from hbx_gpu.transforms import Transform, not_counts

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["DENSE_KERNELS", "DeviceEngine", "FlatCsr", "Pending", "StagedPlan"]


class _Slots(threading.local):
    """The slot of the calling thread, for batches that are made at once."""

    slot: Slot | None = None


class DeviceEngine:
    """Decode, remap and densify on a device. Safe to use from many threads.

    `measure`, `pack` and a `submit` make one batch; a slot carries it from `pack` to `Pending.check`.
    `csr` and `dense` do all of it at once.

    Parameters
    ----------
    table
        Vectors of the dataset's Sources.
    directory
        Their chunks; its arrays are numbered as in `table`.
    dtypes
        Output dtype of each layer.
    backend
        The device.
    decode
        Where chunks of general codecs (zstd, lz4, gzip, zlib, blosc) are decoded: ``"auto"``, ``"host"`` or
        ``"device"``. The latter trusts chunks without a CRC32C, although nvCOMP's behavior is undefined for
        damaged ones.

    Raises
    ------
    UnsupportedError
        No kernel takes a stored dtype or an output dtype.
    DeviceUnavailableError
        ``decode="device"`` was given, and there is no decompressor for the device.
    """

    def __init__(
        self,
        table: SourceTable,
        directory: ChunkDirectory,
        dtypes: Sequence[np.dtype],
        backend: Backend,
        *,
        decode: str = "auto",
    ) -> None:
        self.table, self.directory, self.dtypes, self.backend = table, directory, list(dtypes), backend
        self._names = [dtype.name for dtype in self.dtypes]
        self._types = [element_type(dtype, f"layer {k}") for k, dtype in enumerate(self.dtypes)]
        self.stager = Stager(table, directory, dtypes, chosen(directory.layouts, decode, backend))
        self._slots = _Slots()
        # Whether rows are sorted for sparse tensors: where remaps do not ascend, and once a batch has shown
        # that stored rows do not.
        self._sorts = not _remaps_ascend(table)
        self._upload_constants()

    @property
    def drops(self) -> bool:
        """Whether the number of a plan's elements is known only when they were decoded."""
        return self.table.drops

    def measure(
        self,
        plan: BatchPlan,
        slab: Slab,
        *,
        layout: Layout | None = None,
        resident: Resident | None = None,
        host: np.ndarray | None = None,
    ) -> StagedPlan:
        """Decide what crosses for a plan and how much room it takes; see :meth:`Stager.measure`."""
        return self.stager.measure(plan, slab, layout=layout, resident=resident, host=host)

    def pack(self, staging: StagedPlan, slot: Slot) -> None:
        """Copy what crosses to the slot's page-locked buffer; the slab is not needed afterwards.

        Raises
        ------
        CorruptChunkError
            A chunk that is decoded on the host does not decode.
        NoRoom
            What is staged or decoded beside resident chunks finds no place in their arena.
        """
        slot.reserve(staging.host_bytes, staging.arena_bytes, area_bytes=staging.area_bytes)
        area = None
        if staging.resident is not None and staging.area_bytes:
            area = slot.area.address - staging.resident.arena.address
        self.stager.pack(staging, slot.host, area)

    def submit_csr(
        self,
        staging: Staged,
        slot: Slot,
        *,
        value_dtypes: Sequence[str] | None = None,
        canonical: bool = False,
    ) -> Pending:
        """Order upload and kernels that make the rows of a packed plan in CSR form.

        Parameters
        ----------
        value_dtypes
            dtype of each layer's values, where it is not to be the engine's.
        canonical
            Make what sparse tensors want: int64 columns, ascending within a row. Rows in which a column
            repeats stay as they are, and so does the first batch of a dataset whose rows are stored in no
            order; `Pending.ascending` says so.

        Returns
        -------
        Pending
            The batch in the making; its result is ``(indices, [values per layer], offsets)``: int32 or int64
            (nnz,), (nnz,) each, int64 (n_rows + 1,).
        """
        import torch

        self._remember(staging, partial(self.submit_csr, value_dtypes=value_dtypes, canonical=canonical))
        backend = self.backend
        dtypes, types = self._names, self._types
        if value_dtypes is not None:
            dtypes = list(value_dtypes)
            types = [element_type_of(dtype) for dtype in dtypes]
        n = staging.n_elements
        sorts = canonical and self._sorts
        indices = backend.empty(n, "int64" if sorts else "int32")
        offsets = backend.empty(staging.n_rows + 1, "int64")
        values = [backend.empty(n, dtype) for dtype in dtypes]
        batch = self._launches(staging, slot, types, flat=sorts or self.table.drops)
        batch.decode([indices, *values])
        if self.table.drops:
            batch.count_kept(offsets)
        else:
            batch.send_offsets(offsets)
        if sorts:
            batch.sort(indices, values, offsets, self.table.n_features)
            return batch.finish([indices, *values, offsets])
        if self.table.drops:
            batch.compact(indices, values, offsets)
        batch.see_order(indices, offsets)
        if canonical:
            with backend.on_decode_stream():
                indices = indices.to(torch.int64)
        return batch.finish([indices, *values, offsets], seen=self._see if canonical else None)

    def _see(self, ascending: bool) -> None:
        """Sort from now on, once a batch was found that does not ascend."""
        self._sorts |= not ascending

    def submit_flat(
        self, staging: StagedPlan, slot: Slot, then: Callable[[FlatCsr], Sequence[Tensor]]
    ) -> Pending:
        """Order what brings all elements of a packed plan to scratch, then further work on them.

        Parameters
        ----------
        then
            Orders kernels that read the elements; returns the tensors that those write.

        Returns
        -------
        Pending
            The batch in the making, with these tensors.
        """
        batch = self._launches(staging, slot, self._types, flat=True)
        batch.decode([])
        return batch.finish(list(then(batch.flat(staging.plan))))

    def submit_dense(
        self,
        staging: Staged,
        slot: Slot,
        dtype: str = "float32",
        transform: Transform | None = None,
        layer: int = 0,
    ) -> Pending:
        """Order upload and kernels that make dense rows of one layer of a packed plan.

        Parameters
        ----------
        dtype
            A key of `DENSE_KERNELS`.
        transform
            Done to the sums of repeated columns, before rounding to `dtype`.
        layer
            Which one.

        Returns
        -------
        Pending
            The batch in the making; its result is one tensor, (n_rows, n_features).

        Raises
        ------
        ValueError
            Unknown dtype, or the plan was measured for CSR only.
        """
        if dtype not in DENSE_KERNELS:
            raise ValueError(f"dense batches come as {', '.join(DENSE_KERNELS)}; got {dtype!r}")
        if not staging.fused:
            raise ValueError("the plan was measured for CSR; measure it with layout=None or 'dense'")
        transform = transform or Transform()
        self._remember(staging, partial(self.submit_dense, dtype=dtype, transform=transform, layer=layer))
        out = self.backend.empty((staging.n_rows, self.table.n_features), dtype)
        fused = staging.fused[layer] and dtype != "float64"
        batch = self._launches(staging, slot, self._types, flat=not fused)
        if fused:
            batch.rowpack_dense(out, dtype, transform, layer)
        else:
            batch.decode([])
            batch.densify(out, dtype, transform, layer)
        return batch.finish([out])

    def submit_rows(
        self, staging: StagedPlan, slot: Slot, shape: tuple[int, ...], *, placed: bool
    ) -> Pending:
        """Order upload and kernels that bring the values of a packed plan without column indices to rows.

        Parameters
        ----------
        shape
            Shape of the result. Elements that no piece of the plan fills are 0.
        placed
            Whether rows are brought to their columns by way of the table's remaps (output column -> column of
            the row); else the plan says where every element goes.

        Returns
        -------
        Pending
            The batch in the making; its result is one tensor of the first layer's dtype.
        """
        import torch

        out = self.backend.empty(shape, self.dtypes[0].name)
        batch = self._launches(staging, slot, self._types, flat=placed)
        if placed:
            batch.decode([])
            batch.place_columns(out)
            return batch.finish([out])
        if staging.plan.piece_count.sum() < staging.plan.n_elements:
            with self.backend.on_decode_stream():
                out.view(-1).view(torch.uint8).zero_()  # of all dtypes: torch fills few unsigned ones
        batch.decode([out])
        return batch.finish([out])

    def csr(self, plan: BatchPlan, slab: Slab) -> CsrTensors:
        """Rows of `plan` in CSR form, as tensors; otherwise as the host engine's `csr`."""
        staging, slot = self._packed(plan, slab, "csr")
        result = self._received(self.submit_csr(staging, slot))
        assert isinstance(result, tuple)
        return result

    def dense(
        self,
        plan: BatchPlan,
        slab: Slab,
        dtype: str = "float32",
        transform: Transform | None = None,
        layer: int = 0,
    ) -> object:
        """Dense rows of `plan`, as a tensor (n_rows, n_features); otherwise as `densify` on the host."""
        staging, slot = self._packed(plan, slab, "dense")
        return self._received(self.submit_dense(staging, slot, dtype, transform, layer))

    def _packed(self, plan: BatchPlan, slab: Slab, layout: Layout) -> tuple[StagedPlan, Slot]:
        slot = self._slots.slot
        if slot is None:
            slot = self._slots.slot = Slot(self.backend)
        staging = self.measure(plan, slab, layout=layout)
        self.pack(staging, slot)
        return staging, slot

    def _received(self, pending: Pending) -> Tensor | CsrTensors:
        """The result, for the caller's current stream."""
        result = pending.result()
        self.backend.hand_over(pending.event, pending.tensors)
        return result

    def _launches(self, staging: Staged, slot: Slot, types: Sequence[int], *, flat: bool) -> Launches:
        launches = PlannedLaunches if isinstance(staging, PlannedRows) else Launches
        return launches(
            self.backend, self._columns, types, self._raise_for, staging, slot,
            flat=flat, first_role=self.table.first_role,
        )  # fmt: skip

    @staticmethod
    def _remember(staging: Staged, submit: Callable[[StagedPlan, Slot], Pending]) -> None:
        """Note how a batch is submitted, in case it has to be planned again on the host."""
        if isinstance(staging, PlannedRows):
            staging.submit = submit

    def _upload_constants(self) -> None:
        """Sources and remaps: the same for all batches, so they cross once."""
        table = self.table
        sources = np.zeros(len(table.remap_start), SOURCE)
        sources["remap_start"], sources["remap_length"] = table.remap_start, table.remap_length
        sources["identity"] = table.identity
        nbytes = max(16, sources.nbytes + table.remap.nbytes)
        slot = self._constants = Slot(self.backend)
        slot.reserve(nbytes, nbytes)
        assert slot.device is not None
        slot.host[: sources.nbytes] = sources.view(np.uint8)
        slot.host[sources.nbytes :][: table.remap.nbytes] = table.remap.view(np.uint8)
        self.backend.upload(slot.host[:nbytes], slot.device)
        slot.busy = self.backend.event()
        # Arguments of every kernel that looks columns up.
        self._columns = (
            np.uint64(slot.device.address),
            np.uint32(len(sources)),
            np.uint64(slot.device.address + sources.nbytes),
            np.uint64(len(table.remap)),
        )

    def _raise_for(self, staging: Staged, words: np.ndarray) -> None:
        """Raise what the status words of a batch say, if they say anything."""
        if not words[ANY]:
            return
        if isinstance(staging, PlannedRows):
            staging.raise_again()
        else:
            self._raise_for_plan(staging, words)
        raise RuntimeError(
            f"a kernel refused what the host told it to do (status {words[ANY]:#x}); this is a bug of "
            "hbx_gpu, please report it"
        )

    def _raise_for_plan(self, staging: Staged, words: np.ndarray) -> None:
        """Raise what the status words of a plan that the host made say about chunks and values."""
        assert isinstance(staging, StagedPlan)
        for part in PARTS:
            begin = staging.first_word(part)
            found = np.flatnonzero(words[begin : begin + staging.counts[part]])
            if not len(found):
                continue
            bits = int(words[begin + found[0]])
            c = staging.chunk_of(part, int(found[0]))
            if bits & status.BAD_PLACE:
                break
            if bits & ~status.BAD_COLUMN:
                reason = status.describe_status(bits)
                raise self.directory.error(int(staging.plan.chunks[c]), reason)
            raise self.stager.checks.column_error(staging.plan, c)
        begin = staging.first_word("rows")
        if (words[begin : begin + staging.counts["rows"]] & status.NOT_COUNTS).any():
            raise not_counts("the dataset's layer")


@cache
def element_type_of(name: str) -> int:
    """Number of the element type of a dtype's name."""
    return element_type(np.dtype(name), "a batch")


def _remaps_ascend(table: SourceTable) -> bool:
    """Whether every remap leaves the columns it keeps in ascending order."""
    for first, length in {*zip(table.remap_start.tolist(), table.remap_length.tolist(), strict=True)}:
        remap = table.remap[first : first + length]
        if (np.diff(remap[remap >= 0]) <= 0).any():
            return False
    return True
