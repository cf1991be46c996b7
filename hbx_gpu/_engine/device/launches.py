"""The kernel launches that turn one uploaded batch into tensors, and the status that they report."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, TypeAlias

import numpy as np

from hbx_gpu._engine.device.backend import Argument, Backend, DeviceBuffer, Event, Part, Slot, Streams
from hbx_gpu._engine.device.records import ELEMENT_TYPES, OUTPUT, RUN
from hbx_gpu._engine.device.staged_plan import ANY, UNSORTED, Staged
from hbx_gpu._plan.rows import BatchPlan
from hbx_gpu.transforms import Transform

if TYPE_CHECKING:
    from torch import Tensor

CsrTensors: TypeAlias = "tuple[Tensor, list[Tensor], Tensor]"
"""Columns, values of each layer and offsets of CSR rows."""
_Arguments: TypeAlias = tuple[Argument, ...]
DENSE_KERNELS = {"float32": "f32", "float16": "f16", "bfloat16": "bf16", "float64": "f64"}
"""Dense dtype -> ending of the names of its kernels."""
_BLOCK = 256
_WARPS = _BLOCK // 32
_SCAN_BLOCK = 1024
_MAX_GRID = 1 << 16
_SET_BYTES = 8  # of shared memory per word of 32 columns, for sorting
TILE_SLACK = 16
"""Bytes of shared memory beside a tile, in which rows of any width stand as aligned as in the output."""
_SLICE = 16 << 10  # bytes of a shuffled block that a block of threads takes at a time
_NOWHERE = np.uint64(0)


@dataclass(frozen=True, slots=True)
class FlatCsr:
    """All elements of a plan in device memory, before dropped ones are removed; it lasts as long as the slot.

    Attributes
    ----------
    indices, offsets
        Addresses: int32, -1 where a remap drops the column; int64 (n_rows + 1,).
    values, types
        Address of each layer's values, and their types by number.
    plan
        The plan.
    """

    indices: np.uint64
    offsets: np.uint64
    values: list[np.uint64]
    types: list[int]
    plan: BatchPlan


class Pending:
    """A batch that the device is making. Its slot must not be used for another one before `check`.

    Attributes
    ----------
    tensors
        Tensors as allocated: ``[indices, *values, offsets]``, of which `nnz` elements count, or ``[rows]``.
    event
        Event after all work that was ordered for the batch.
    nnz
        Number of elements; known after `check`.
    ascending
        Whether columns ascend strictly in every row; CSR only, known after `check`.
    """

    def __init__(
        self,
        tensors: list[Tensor],
        event: Event,
        staging: Staged,
        slot: Slot,
        raise_for: Callable[[Staged, np.ndarray], None],
        *,
        counted: bool,
        seen: Callable[[bool], None] | None = None,
    ) -> None:
        self.tensors, self.event = tensors, event
        self.nnz, self.ascending = staging.n_elements, False
        self._staging, self._slot, self._raise_for, self._counted = staging, slot, raise_for, counted
        self._seen = seen

    def check(self) -> None:
        """Wait for the device, and look at what it reported.

        Raises
        ------
        CorruptChunkError
            A chunk does not decode, or holds a column number its Source does not have.
        """
        self.event.wait()
        begin = self._staging.at["status"]
        words = self._slot.host[begin : begin + self._staging.status_bytes].view(np.uint32)
        self._raise_for(self._staging, words)
        self.ascending = not words[UNSORTED]
        if self._seen is not None:
            self._seen(self.ascending)
        if self._counted:
            self.nnz = int(_total(self._staging, self._slot).view(np.int64)[0])

    def result(self) -> Tensor | CsrTensors:
        """`check`, then ``(indices, [values], offsets)`` of a CSR batch, or the dense rows."""
        self.check()
        if len(self.tensors) == 1:
            return self.tensors[0]
        indices, *values, offsets = self.tensors
        return indices[: self.nnz], [v[: self.nnz] for v in values], offsets


def _total(staging: Staged, slot: Slot) -> np.ndarray:
    """Where the number of elements comes back."""
    return slot.host[staging.at["total"] :][:8]


class Launches:
    """Orders the work of one packed batch on a backend's streams; one after the other, none waits.

    Parameters
    ----------
    backend
        The device.
    columns
        Arguments for looking columns up: Sources, their number, remap, its entries.
    types
        Element type of each layer's values.
    first_role
        See :class:`~hbx_gpu._plan.rows.SourceTable`.
    raise_for
        Raises what status words say.
    staging, slot
        The batch, packed.
    flat
        Elements go to a flat CSR in the arena, not to outputs.
    """

    def __init__(
        self,
        backend: Backend,
        columns: tuple[np.generic, ...],
        types: Sequence[int],
        raise_for: Callable[[Staged, np.ndarray], None],
        staging: Staged,
        slot: Slot,
        *,
        flat: bool,
        first_role: int = 0,
    ) -> None:
        self._backend, self._columns, self._types = backend, columns, list(types)
        self._first_role = first_role
        self._raise_for = raise_for
        self._staging, self._slot, self._flat = staging, slot, flat
        self._arena_bytes = staging.flat_bytes if flat else staging.arena_bytes
        slot.reserve(0, self._arena_bytes)
        assert slot.device is not None
        self._device: DeviceBuffer = slot.device
        self._counted = False

    def decode(self, outputs: Sequence[Tensor]) -> None:
        """Upload, and bring all elements of the plan to `outputs` (indices, values) or the flat CSR."""
        records = np.zeros(1 + len(self._types), OUTPUT)
        first = self._first_role
        records["address"][first:] = (
            [self._device.address + self._staging.at[f"flat{role}"] for role in range(first, len(records))]
            if self._flat
            else [tensor.data_ptr() for tensor in outputs]
        )
        records["elements"][first:] = self._staging.n_elements
        records["type"] = [ELEMENT_TYPES["int32"], *self._types]
        self._upload(records)
        for part, kernel, word in (
            ("packed32", "bitpacking_decode_u32", 4),
            ("packed64", "bitpacking_decode_u64", 8),
        ):
            self._bitpacking(part, kernel, word)
        self._decompress()
        outputs_at = (self._at("outputs"), np.uint32(len(records)))
        if n_pieces := self._count("pieces"):
            pieces = (*self._runs(), *self._table("pieces"))
            self._launch("rowpack_csr", -(-n_pieces // _WARPS), pieces, self._columns, outputs_at, "pieces")
        if n_plains := self._count("plains"):
            plains = self._table("plains")
            self._launch("gather_pieces", -(-n_plains // _WARPS), plains, self._columns, outputs_at, "plains")

    def flat(self, plan: BatchPlan) -> FlatCsr:
        """Where `decode` brings the elements of `plan`, which was staged, if to no outputs."""
        values = [self._at(f"flat{layer + 1}") for layer in range(len(self._types))]
        return FlatCsr(self._at("flat0"), self._at("offsets"), values, list(self._types), plan)

    def count_kept(self, offsets: Tensor) -> None:
        """Offsets of the elements of the flat CSR that no remap drops; their number comes back."""
        plan, backend, at = self._staging, self._backend, self._at
        n_rows, n = np.uint32(plan.n_rows), np.uint64(plan.n_elements)
        grid = min(max(1, -(-plan.n_rows // _WARPS)), _MAX_GRID)
        backend.launch("count_kept", grid, _BLOCK, (at("flat0"), n, at("offsets"), n_rows, at("kept")))
        backend.launch("scan_kept", 1, _SCAN_BLOCK, (at("kept"), n_rows, offsets))
        total = _total(self._staging, self._slot)
        backend.download(int(offsets.data_ptr()) + 8 * plan.n_rows, total)
        self._counted = True

    def compact(self, indices: Tensor, values: Sequence[Tensor], offsets: Tensor) -> None:
        """Bring the elements of the flat CSR that no remap drops to outputs, in stored order."""
        plan, at = self._staging, self._at
        n_rows, n = np.uint32(plan.n_rows), np.uint64(plan.n_elements)
        flat = (at("flat0"), at("offsets"), n_rows, n)
        grid = min(max(1, -(-plan.n_rows // _WARPS)), _MAX_GRID)
        for layer, tensor in enumerate(values):
            moved = indices if layer == 0 else _NOWHERE
            itemsize = np.uint32(tensor.element_size())
            target = (offsets, moved, at(f"flat{layer + 1}"), tensor, itemsize, n)
            self._backend.launch("compact_rows", grid, _BLOCK, (*flat, *target))

    def sort(self, indices: Tensor, values: Sequence[Tensor], offsets: Tensor, n_features: int) -> None:
        """Bring the elements of the flat CSR that no remap drops to outputs, each row by ascending column.

        `indices` is int64. `offsets` are sent where nothing is dropped, counted where something is.
        """
        plan, at = self._staging, self._at
        n_rows, n = np.uint32(plan.n_rows), np.uint64(plan.n_elements)
        flat = (at("flat0"), at("offsets"), n_rows, n)
        words = max(1, min(-(-n_features // 32), self._backend.max_shared // _SET_BYTES))
        tiles = (np.uint32(n_features), np.uint32(words), at("status") + np.uint64(4 * UNSORTED))
        for layer, tensor in enumerate(values):
            moved = indices if layer == 0 else _NOWHERE
            itemsize = np.uint32(tensor.element_size())
            target = (offsets, moved, at(f"flat{layer + 1}"), tensor, itemsize, n)
            grid = min(max(1, plan.n_rows), _MAX_GRID)
            self._backend.launch("sort_rows", grid, _BLOCK, (*flat, *target, *tiles), _SET_BYTES * words)

    def send_offsets(self, offsets: Tensor) -> None:
        """The plan's own offsets, where nothing is dropped."""
        at = self._staging.at["offsets"]
        self._backend.send(self._slot.host[at : at + 8 * (self._staging.n_rows + 1)], offsets)

    def see_order(self, indices: Tensor, offsets: Tensor) -> None:
        """Note whether columns ascend in every row of the outputs."""
        n_rows = self._staging.n_rows
        grid = min(max(1, -(-n_rows // _WARPS)), _MAX_GRID)
        sizes = (np.uint32(n_rows), np.uint64(self._staging.n_elements))
        unsorted = self._at("status") + np.uint64(4 * UNSORTED)
        self._backend.launch("csr_ascending", grid, _BLOCK, (indices, offsets, *sizes, unsorted))

    def rowpack_dense(self, out: Tensor, dtype: str, transform: Transform, layer: int) -> None:
        """Upload, and go from rowpack chunks to dense rows in one kernel."""
        self._upload(np.zeros(0, OUTPUT))
        tables = (*self._runs(), *self._table("pieces"), *self._table(f"segments{layer}"))
        rows = (self._at(f"row_ptr{layer}"), np.uint32(self._staging.n_rows))
        self._dense("rowpack_dense_", out, dtype, transform, (*tables, *rows, *self._columns), "pieces")

    def densify(self, out: Tensor, dtype: str, transform: Transform, layer: int) -> None:
        """From the flat CSR to dense rows."""
        plan = self._staging
        values = (self._at(f"flat{layer + 1}"), np.uint32(self._types[layer]), np.uint64(plan.n_elements))
        rows = (self._at("offsets"), np.uint32(plan.n_rows))
        self._dense("densify_", out, dtype, transform, (self._at("flat0"), *values, *rows), "rows")

    def place_columns(self, out: Tensor) -> None:
        """From flat values to rows in which every column has its place; 0 where a row has none there."""
        n_rows, n_features = (int(n) for n in out.shape)
        if not n_rows or not n_features:
            return
        n_elements = np.uint64(self._staging.n_elements)
        rows = (self._at("flat1"), n_elements, self._at("offsets"), self._at("sources"), np.uint32(n_rows))
        target = (out, np.uint32(n_features), np.uint32(out.element_size()))
        grid = min(-(-n_rows // _WARPS), _MAX_GRID)
        args: _Arguments = (*rows, *self._columns, *target, *self._status("rows"))
        self._backend.launch("place_columns", grid, _BLOCK, args)

    def finish(self, tensors: list[Tensor], seen: Callable[[bool], None] | None = None) -> Pending:
        """Ask for the status words; the slot is busy until they are there. `seen` hears of `ascending`."""
        staging, slot = self._staging, self._slot
        # They come back to where they lie in the page-locked buffer: the upload has read it by then.
        begin = staging.at["status"]
        self._backend.download(int(self._at("status")), slot.host[begin : begin + staging.status_bytes])
        slot.busy = self._backend.event()
        return Pending(tensors, slot.busy, staging, slot, self._raise_for, counted=self._counted, seen=seen)

    def _upload(self, outputs: np.ndarray) -> None:
        self._put("outputs", outputs)
        if self._staging.opened is not None:  # which libraries want as addresses
            base, _ = self._arena()
            for name in ("streams", "stream_targets"):
                self._put(name, self._staging.tables[name] + base)
        host = self._slot.host[: self._staging.host_bytes]
        if self._staging.resident is None:
            self._backend.upload(host, self._device)
            return
        # Chunk bytes go beside the resident chunks, tables to where they would lie after chunk bytes.
        first = self._staging.staged_bytes
        if first:
            self._backend.upload(host[:first], self._slot.area)
        self._backend.upload(host[first:], Part(self._device.address + first, self._device.nbytes - first))

    def _put(self, name: str, values: np.ndarray) -> None:
        """Write a table to where it is staged."""
        at = self._staging.at[name]
        self._slot.host[at : at + values.nbytes] = values.view(np.uint8)

    def _decompress(self) -> None:
        """Compressed streams to scratch, what is stored beside them, and shuffled blocks in order."""
        opened, at = self._staging.opened, self._at
        if opened is None:
            return
        for algorithm, first, n in opened.calls:
            sizes = opened.tables["stream_sizes"][first : first + n].astype(np.int64)
            streams = Streams(
                sources=int(at("streams")) + 8 * first,
                source_bytes=int(at("stream_bytes")) + 8 * first,
                targets=int(at("stream_targets")) + 8 * first,
                target_bytes=int(at("stream_sizes")) + 8 * first,
                actual=int(at("stream_actual")) + 8 * first,
                states=int(at("stream_states")) + 4 * first,
                sizes=sizes,
            )
            self._backend.decompressor().decompress(algorithm, streams)
        if n := self._count("streams"):
            found = (at("stream_states"), at("stream_actual"), at("stream_sizes"), np.uint32(n))
            grid = min(-(-n // _BLOCK), _MAX_GRID)
            self._backend.launch("check_streams", grid, _BLOCK, (*found, *self._status("streams")))
        for part in ("copies", "shuffles"):
            if n := self._count(part):
                slices = -(-int(opened.tables[part]["nbytes"].max()) // _SLICE)
                table = (*self._table(part), np.uint32(slices))
                self._launch("unshuffle_blocks", n * slices, table, (), (), part)

    def _bitpacking(self, part: str, kernel: str, word: int) -> None:
        if not self._count(part):
            return
        jobs = self._staging.tables[part]
        # Two words per block of 128 in shared memory, and the chunk itself where it fits.
        max_blocks = -(-int(jobs["n_words"].max()) // 128) * (word // 4)
        room = max(0, self._backend.max_shared - 8 * max_blocks) // 16 * 16
        stage = min(int(jobs["nbytes"].max()) // 16 * 16 + 32, room)
        sizes = (np.uint32(max_blocks), np.uint32(stage))
        self._launch(kernel, len(jobs), self._table(part), sizes, (), part, shared=8 * max_blocks + stage)

    def _dense(
        self, kernel: str, out: Tensor, dtype: str, transform: Transform, args: _Arguments, part: str
    ) -> None:
        n_rows, n_features = (int(n) for n in out.shape)
        if not n_rows or not n_features:
            return
        number = 8 if dtype == "float64" else 4
        tile = n_features
        if tile * number + TILE_SLACK > self._backend.max_shared:
            # Whole multiples of 16 bytes of every dtype: tiles after the first begin as aligned as rows do.
            tile = max(1, (self._backend.max_shared - TILE_SLACK) // (8 * number) * 8)
        shape = (out, np.uint32(n_features), np.uint32(tile))
        steps = (np.float64(transform.target_sum or 0.0), np.uint32(transform.log1p))
        arena = () if part == "rows" else self._arena()
        self._backend.launch(
            kernel + DENSE_KERNELS[dtype],
            min(n_rows, _MAX_GRID),
            _BLOCK,
            (*arena, *args, *shape, *steps, *self._status(part)),
            number * tile + TILE_SLACK,
        )

    def _launch(
        self,
        kernel: str,
        grid: int,
        first: _Arguments,
        second: _Arguments,
        third: _Arguments,
        part: str,
        shared: int = 0,
    ) -> None:
        args = (*self._arena(), *first, *second, *third, *self._status(part))
        self._backend.launch(kernel, min(grid, _MAX_GRID), _BLOCK, args, shared)

    def _arena(self) -> tuple[np.uint64, np.uint64]:
        """Memory that holds all chunk bytes of the batch."""
        if (resident := self._staging.resident) is not None:
            return np.uint64(resident.arena.address), np.uint64(resident.arena.nbytes)
        return np.uint64(self._device.address), np.uint64(self._arena_bytes)

    def _at(self, name: str) -> np.uint64:
        return np.uint64(self._device.address + self._staging.at[name])

    def _runs(self) -> tuple[np.uint64, np.uint32]:
        """HbxRun of staged chunks; with resident ones all of the arena, by which theirs are numbered."""
        if (resident := self._staging.resident) is not None:
            return np.uint64(resident.arena.address), np.uint32(resident.arena.nbytes // RUN.itemsize)
        return self._table("runs")

    def _table(self, name: str) -> tuple[np.uint64, np.uint32]:
        return self._at(name), np.uint32(self._staging.records(name))

    def _count(self, part: str) -> int:
        return self._staging.counts[part]

    def _status(self, part: str) -> tuple[np.uint64, np.uint64]:
        """Words of a part, and the one that sums them up."""
        status = self._at("status")
        return status + np.uint64(4 * self._staging.first_word(part)), status + np.uint64(4 * ANY)
