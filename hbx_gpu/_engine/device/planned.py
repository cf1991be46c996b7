"""Rows planned on the device: a batch is the upload of its row numbers, and launches.

Where all chunks that a dataset needs lie in memory that kernels reach, the row index and the metadata columns
lie in device memory too. `plan_rows` then makes there what plan and staging of the host make elsewhere; the
host does nothing per row but to add up how many elements there are. Only after kernels have refused something
does the host plan the batch anew, as it does for chunks that are not resident, to say what was wrong.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Protocol

import numpy as np

from hbx_gpu._codecs.rowpack_format import BLOCK
from hbx_gpu._engine.device.backend import Backend, DeviceBuffer, Part, Slot
from hbx_gpu._engine.device.launches import Launches, Pending
from hbx_gpu._engine.device.records import ARRAY, COLUMN, OUTPUT, PIECE, SEGMENT
from hbx_gpu._engine.device.staged_plan import ROWPACK, Cursor, Resident, StagedPlan
from hbx_gpu._engine.device.stager import FUSED_BYTES, WIDEST, Stager
from hbx_gpu._plan.rows import INDEX_ROLE, SourceTable
from hbx_gpu.transforms import Transform

if TYPE_CHECKING:
    from torch import Tensor

    from hbx_gpu._engine.device.staged_plan import Opened

MOST_SLOTS = 8
"""Most chunks of an array that a row may lie in; every row of a batch has records for as many."""
_BLOCK = 256
_MAX_GRID = 1 << 16
_SCAN_BLOCK = 1024
_ROWS = 1 << 20  # rows of a dataset that cross together
_HEAD_BYTES = 8  # of status words that come back: ANY and UNSORTED
_NULL = np.uint64(0)


class Spans(Protocol):
    """Where each row of a dataset lies, in the arrays of a :class:`~hbx_gpu._source.RowIndex`."""

    def __len__(self) -> int: ...
    @property
    def source(self) -> np.ndarray: ...
    @property
    def start(self) -> np.ndarray: ...
    @property
    def length(self) -> np.ndarray: ...


class DeviceIndex:
    """The row index of a dataset, the runs of its chunks and its metadata columns in device memory.

    Parameters
    ----------
    backend
        The device.
    stager
        Knows how the dataset's arrays are stored.
    rows
        Where each row lies.
    runs
        The run of every chunk that a row needs; its number counts HbxRun records from the start of the arena.
    resident
        Arena that holds the chunks.
    columns
        Metadata columns, or None for row numbers. Columns that are not numbers stay on the host.
    new_slot, stage_on_host
        Make a slot, and plan and stage row numbers as if there were no such index; called where kernels have
        refused a batch.
    """

    def __init__(
        self,
        backend: Backend,
        stager: Stager,
        rows: Spans,
        runs: np.ndarray,
        resident: Resident,
        columns: Mapping[str, np.ndarray | None],
        new_slot: Callable[[], Slot],
        stage_on_host: Callable[[np.ndarray, Slot], StagedPlan],
    ) -> None:
        self.new_slot, self.stage_on_host = new_slot, stage_on_host
        table = stager.table
        self.resident, self.n_rows, self.n_roles = resident, len(rows), table.n_roles
        row_source, row_start, self._lengths = rows.source, rows.start, rows.length
        self.slots = _slots(table, row_source, row_start, self._lengths)
        # Kept where a row may lack this modality, and so has no elements whatever its length says.
        self._sources = row_source if len(rows) and int(row_source.min()) < 0 else None
        self.fused = [_fused(stager, layer) for layer in range(len(stager.dtypes))]
        self._owned: list[DeviceBuffer] = []
        slot = Slot(backend)
        source = self._bring(backend, slot, row_source, np.int32)
        start = self._bring(backend, slot, row_start, np.int64)
        length = self._bring(backend, slot, self._lengths, np.int32)
        arrays = np.zeros(len(table.chunk_elements), ARRAY)
        arrays["first_chunk"], arrays["elements"] = table.chunk_base[:-1], table.chunk_elements
        arrays["n_chunks"] = np.diff(table.chunk_base)
        n_rows, n_sources = np.uint64(self.n_rows), np.uint32(len(table.remap_start))
        runs_at = self._bring(backend, slot, runs, np.uint32)
        self.spans = (source, start, length, n_rows)
        self.lengths = (source, length, n_rows, n_sources)
        self.arrays = (
            self._bring(backend, slot, arrays, ARRAY), n_sources, np.uint32(self.n_roles),
            runs_at, np.uint64(len(runs)),
        )  # fmt: skip
        self._bring_columns(backend, slot, columns)
        slot.wait()
        self._places: dict[int, _Places] = {}

    def _bring(self, backend: Backend, slot: Slot, values: np.ndarray, dtype: np.dtype | type) -> np.uint64:
        """Copy an array to device memory, part by part; returns its address."""
        dtype = np.dtype(dtype)
        buffer = backend.device_buffer(max(16, len(values) * dtype.itemsize))
        backend.event().wait()  # whoever had this memory before is done with it
        self._owned.append(buffer)
        for begin in range(0, len(values), _ROWS):
            part = np.ascontiguousarray(values[begin : begin + _ROWS], dtype).view(np.uint8)
            slot.reserve(len(part), 0)
            slot.host[: len(part)] = part
            at = begin * dtype.itemsize
            backend.upload(slot.host[: len(part)], Part(buffer.address + at, len(part)))
            slot.busy = backend.event()
        return np.uint64(buffer.address)

    def _bring_columns(self, backend: Backend, slot: Slot, columns: Mapping[str, np.ndarray | None]) -> None:
        """Bring metadata columns; wide ones come first in a batch, so that each is aligned to its values."""
        import torch

        self.names = list(columns)
        self.kept = {k: c for k, c in columns.items() if c is not None and c.dtype.kind not in "iuf"}
        sent = {k: c for k, c in columns.items() if k not in self.kept}
        dtypes = {k: np.dtype(np.int64) if c is None else c.dtype for k, c in sent.items()}
        order = sorted(sent, key=lambda name: -dtypes[name].itemsize)
        records = np.zeros(len(order), COLUMN)
        self.offsets: dict[str, tuple[int, int, torch.dtype]] = {}  # bytes per row before it, of it, dtype
        self.row_bytes = 0
        for record, name in zip(records, order, strict=True):
            column, dtype = sent[name], dtypes[name]
            if column is not None:
                record["data"] = self._bring(backend, slot, column, dtype)
            record["at"], record["size"] = self.row_bytes, dtype.itemsize
            self.offsets[name] = self.row_bytes, dtype.itemsize, getattr(torch, dtype.name)
            self.row_bytes += dtype.itemsize
        self.columns = (self._bring(backend, slot, records, COLUMN), np.uint32(len(records)))

    def stage(self, rows: np.ndarray, slot: Slot) -> PlannedRows:
        """Put what crosses for a batch into a slot's page-locked buffer.

        Parameters
        ----------
        rows
            int64, (n,). Row numbers, at least one.
        slot
            A free slot.
        """
        n = len(rows)
        places = self._places.get(n)
        if places is None:
            if len(self._places) > 64:  # of orders whose batches all differ in size
                self._places.clear()
            places = self._places[n] = _Places(self, n)
        lengths = self._lengths[rows]
        if self._sources is not None:
            lengths = np.where(self._sources[rows] >= 0, lengths, 0)
        staged = PlannedRows(self, rows, lengths, int(lengths.sum(dtype=np.int64)), places)
        slot.reserve(places.host_bytes, places.end)
        slot.host[: rows.nbytes] = rows.view(np.uint8)
        status = places.at["status"]
        slot.host[status : status + _HEAD_BYTES] = 0
        return staged


def can_plan(stager: Stager, rows: Spans) -> bool:
    """Whether the device can plan rows of a dataset whose chunks all lie in memory that kernels reach."""
    table = stager.table
    if table.first_role != INDEX_ROLE or not (stager.kinds == ROWPACK).all():
        return False
    return _slots(table, rows.source, rows.start, rows.length) <= MOST_SLOTS


def index_nbytes(rows: Spans, columns: Mapping[str, np.ndarray]) -> int:
    """Bytes of device memory that the index of so many rows takes, about: runs of chunks are left out."""
    return 16 * len(rows) + sum(column.nbytes for column in columns.values() if column.dtype.kind in "iuf")


def _slots(table: SourceTable, source: np.ndarray, start: np.ndarray, length: np.ndarray) -> int:
    """Most chunks of one array that any row lies in, at least 1."""
    most = 1
    for begin in range(0, len(source), _ROWS):
        part = slice(begin, begin + _ROWS)
        filled = (source[part] >= 0) & (length[part] > 0)
        if not filled.any():
            continue
        group, first = source[part][filled].astype(np.int64), start[part][filled]
        last = first + length[part][filled] - 1
        for role in range(table.n_roles):
            size = table.chunk_elements[group * table.n_roles + role]
            most = max(most, int((last // size - first // size).max()) + 1)
    return most


def _fused(stager: Stager, layer: int) -> bool:
    """Whether dense rows of a layer can be made without a flat CSR: see `cut_segments`."""
    table = stager.table
    index, values = (np.arange(len(table.remap_start)) * table.n_roles + role for role in (0, layer + 1))
    sizes = table.chunk_elements[index], table.chunk_elements[values]
    aligned = (sizes[0] == sizes[1]) | ((sizes[0] % BLOCK == 0) & (sizes[1] % BLOCK == 0))
    narrow = (stager.itemsize[index] <= FUSED_BYTES) & (stager.itemsize[values] <= FUSED_BYTES)
    return bool((aligned & narrow).all())


class _Places:
    """Where everything but elements lies in the device memory of a batch of `n` rows."""

    def __init__(self, index: DeviceIndex, n: int) -> None:
        pieces, segments = n * index.n_roles * index.slots, n * (2 * index.slots - 1)
        cursor = Cursor(0)
        self.at = {"rows": cursor.take(8 * n)}
        self.at["outputs"] = cursor.take(OUTPUT.itemsize * index.n_roles)
        self.at["total"] = cursor.take(8)
        self.at["status"] = cursor.take(4 * (2 + pieces + n))
        # What lies after the first status words is made on the device.
        self.host_bytes = self.at["status"] + 16
        self.at["pieces"] = cursor.take(PIECE.itemsize * pieces, 32)
        place, ptr = cursor.take(SEGMENT.itemsize * segments), cursor.take(4 * (n + 1))
        for layer in range(index.n_roles - 1):  # a batch is made of one of them
            self.at[f"segments{layer}"], self.at[f"row_ptr{layer}"] = place, ptr
        self.at["lengths"] = self.at["kept"] = cursor.take(8 * n)
        self.at["offsets"] = cursor.take(8 * (n + 1))
        self.end = cursor.at
        self.counts = {
            "packed32": 0, "packed64": 0, "streams": 0, "copies": 0, "shuffles": 0, "pieces": pieces,
            "plains": 0, "rows": n,
        }  # fmt: skip
        self.first_words = {"pieces": 2, "rows": 2 + pieces}
        self.records = {"pieces": pieces, **{f"segments{k}": segments for k in range(index.n_roles - 1)}}


class PlannedRows:
    """A batch whose plan is made on the device; see :class:`~hbx_gpu._engine.device.staged_plan.Staged`.

    Attributes
    ----------
    index, rows
        The index, and int64, (n_rows,), row numbers of it.
    """

    staged_bytes, status_bytes = 0, _HEAD_BYTES
    opened: Opened | None = None

    def __init__(
        self, index: DeviceIndex, rows: np.ndarray, lengths: np.ndarray, n_elements: int, places: _Places
    ) -> None:
        self.index, self.rows, self._lengths = index, rows, lengths
        self.n_rows, self.n_elements = len(rows), n_elements
        self.fused, self.resident = index.fused, index.resident
        self._places, self.at = places, dict(places.at)
        self.counts, self.host_bytes = places.counts, places.host_bytes
        self.tables: dict[str, np.ndarray] = {}
        self.arena_bytes = places.end
        cursor = Cursor(places.end)
        for role in range(index.n_roles):
            itemsize = 4 if role == INDEX_ROLE else WIDEST
            self.at[f"flat{role}"] = cursor.take(itemsize * n_elements, 256)
        self.flat_bytes = cursor.at
        self.submit: Callable[[StagedPlan, Slot], Pending] | None = None

    def raise_again(self) -> None:
        """Plan the batch on the host and make it, which raises what is wrong with its chunks or values."""
        if self.submit is not None:
            slot = self.index.new_slot()
            self.submit(self.index.stage_on_host(self.rows, slot), slot).check()

    def first_word(self, part: str) -> int:
        """See :class:`~hbx_gpu._engine.device.staged_plan.Staged`."""
        return self._places.first_words[part]

    def records(self, name: str) -> int:
        """See :class:`~hbx_gpu._engine.device.staged_plan.Staged`."""
        return self._places.records[name]

    def bounds(self, first: int, last: int) -> tuple[int, int]:
        """See :class:`~hbx_gpu._engine.device.staged_plan.Staged`."""
        if (first, last) == (0, self.n_rows):
            return 0, self.n_elements
        before = int(self._lengths[:first].sum(dtype=np.int64))
        return before, before + int(self._lengths[first:last].sum(dtype=np.int64))


class PlannedLaunches(Launches):
    """Launches of a batch whose plan is made on the device."""

    _staging: PlannedRows
    _layer, _needs_offsets = 0, False

    def decode(self, outputs: Sequence[Tensor]) -> None:
        """See :meth:`Launches.decode`; where a row's elements go is found on the device too."""
        self._needs_offsets = True
        super().decode(outputs)

    def rowpack_dense(self, out: Tensor, dtype: str, transform: Transform, layer: int) -> None:
        """See :meth:`Launches.rowpack_dense`."""
        self._layer = layer + 1
        super().rowpack_dense(out, dtype, transform, layer)

    def _upload(self, outputs: np.ndarray) -> None:
        """Row numbers cross; the rest of what the host stages elsewhere is made of them."""
        super()._upload(outputs)
        staging, at = self._staging, self._at
        n = staging.n_rows
        index, any_word = staging.index, at("status")
        rows = (at("rows"), np.uint32(n))
        grid = min(-(-n // _BLOCK), _MAX_GRID)
        offsets = _NULL
        if self._needs_offsets:
            lengths, offsets = at("lengths"), at("offsets")
            self._backend.launch("plan_lengths", grid, _BLOCK, (*rows, *index.lengths, lengths, any_word))
            self._backend.launch("scan_kept", 1, _SCAN_BLOCK, (lengths, np.uint32(n), offsets))
        status, row_status = (
            any_word + np.uint64(4 * staging.first_word(part)) for part in ("pieces", "rows")
        )
        made = (offsets, np.uint32(index.slots), at("pieces"), status, row_status)
        segments = (np.uint32(self._layer), at("segments0"), at("row_ptr0"), any_word)
        self._backend.launch(
            "plan_rows", grid, _BLOCK, (*rows, *index.spans, *index.arrays, *made, *segments)
        )

    def send_offsets(self, offsets: Tensor) -> None:
        """Where each row begins, as found on the device."""
        nbytes = 8 * (self._staging.n_rows + 1)
        self._backend.move(int(self._at("offsets")), int(offsets.data_ptr()), nbytes)


class PlannedColumns:
    """Metadata of a batch, gathered on the device; see `Columns` of the feeds for the other way."""

    def __init__(self, index: DeviceIndex, rows: np.ndarray) -> None:
        self._index, self._rows = index, rows
        self._kept = {name: column[rows] for name, column in index.kept.items()}
        self._tensors: dict[str, Tensor] = {}

    def pack(self, slot: Slot) -> None:
        """There is nothing to pack."""

    def send(self, slot: Slot, backend: Backend) -> list[Tensor]:
        """Order the gathering; the tensor that it writes."""
        index, n = self._index, len(self._rows)
        buffer = backend.empty(n * index.row_bytes, "uint8")
        if index.offsets:
            assert slot.device is not None
            rows = (np.uint64(slot.device.address), np.uint32(n), np.uint64(index.n_rows))
            grid = min(-(-n * len(index.offsets) // _BLOCK), _MAX_GRID)
            backend.launch("gather_columns", grid, _BLOCK, (*rows, *index.columns, buffer))
        for name, (at, itemsize, dtype) in index.offsets.items():
            self._tensors[name] = buffer[at * n : (at + itemsize) * n].view(dtype)
        return [buffer]

    def batch(self, first: int, last: int) -> dict[str, np.ndarray | Tensor]:
        """The columns of rows [first, last)."""
        found: dict[str, np.ndarray | Tensor] = {**self._kept, **self._tensors}
        return {name: found[name][first:last] for name in self._index.names}
