"""The feed of sparse rows that are staged on the host and decoded on a GPU.

A feed's `make` runs on the loader's threads, several at a time; `deliver` on the consumer's thread, batch by
batch in order. What a feed delivers belongs to the consumer.
"""

from __future__ import annotations

import threading
import warnings
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from itertools import accumulate, pairwise
from typing import TYPE_CHECKING, Generic, Protocol, TypeAlias, TypeVar

import numpy as np

from hbx_gpu._collates import (
    DenseCollate,
)
from hbx_gpu._datasets.cells import CellDataset
from hbx_gpu._datasets.stored import AnyStored, joined
from hbx_gpu._float16 import may_overflow, say_overflow, was_said
from hbx_gpu._protocols import Rows, TensorBatch
from hbx_gpu._tensors import check_columns, gathered
from hbx_gpu.loader_stats import stage

if TYPE_CHECKING:
    from torch import Tensor

    from hbx_gpu._engine.device import DeviceEngine, Pending
    from hbx_gpu._engine.device.backend import Backend, Event, Slot
    from hbx_gpu._engine.device.staged_plan import Staged
    from hbx_gpu._loading.options import LoaderOptions
    from hbx_gpu._source import RowTable

Cut: TypeAlias = "Callable[[int, int], Tensor | list[Tensor]]"
"""Returns what the rows [first, last) of a window become: a tensor, or one for each row."""
DatasetT = TypeVar("DatasetT", bound=AnyStored)
StagedT = TypeVar("StagedT")
# Estimates for the budget: of a nonzero in a sparse tensor (int32 and int64 column, float32), and of its
# compressed bytes in page-locked and device memory.
_CSR_BYTES = 16
STAGED_BYTES = 4


class SlotFeed(Generic[DatasetT]):
    """What feeds of a device have in common: their dataset, and slots that are used again.

    Parameters
    ----------
    dataset, backend
        Dataset to read, and the device.
    """

    one_batch_per_window = False

    def __init__(self, dataset: DatasetT, backend: Backend) -> None:
        from torch.utils.data import get_worker_info

        if get_worker_info() is not None:
            raise RuntimeError(
                "a loader on a GPU runs on threads: make it in the training process, not in a worker"
            )
        check_columns([*dataset.columns, "index"])
        self._dataset: DatasetT = dataset
        self._backend = backend
        self._may_overflow = True  # in float16
        # Staging memory that no window uses now. Windows in flight bound its number, the loader bounds those.
        self._free: deque[Slot] = deque()
        self._submitting = threading.Lock()

    def checked(self, batches: Sequence[Rows]) -> list[np.ndarray]:
        """See :class:`~hbx_gpu._protocols.Feed`."""
        return self._dataset.checked(batches)

    def nbytes(self, selections: Sequence[np.ndarray]) -> list[int]:
        """See :class:`~hbx_gpu._protocols.Feed`."""
        return [self._nbytes(rows) for rows in selections]

    def set_epoch(self, epoch: int) -> None:
        """See :class:`~hbx_gpu._protocols.Feed`; rows are the same in every epoch."""

    def _slot(self) -> Slot:
        try:
            return self._free.popleft()
        except IndexError:
            return self._new_slot()

    def _new_slot(self) -> Slot:
        from hbx_gpu._engine.device.backend import Slot

        return Slot(self._backend)

    def _nbytes(self, rows: np.ndarray) -> int:
        """Bytes that the batch of `rows` takes up."""
        raise NotImplementedError


class Metadata(Protocol):
    """The metadata of a window's rows on their way to the device."""

    def pack(self, slot: Slot) -> None:
        """Put what crosses into page-locked memory."""

    def send(self, slot: Slot, backend: Backend) -> list[Tensor]:
        """Order what brings it to tensors; return these."""

    def batch(self, first: int, last: int) -> TensorBatch:
        """The columns of rows [first, last)."""


class StagedFeed(SlotFeed[DatasetT], Generic[DatasetT, StagedT]):
    """Batches whose stored bytes are staged on the loader's threads and decoded on a device.

    Subclasses define `_stage` and `_submit`, which decide the form of the batches.
    """

    def make(self, selections: Sequence[np.ndarray]) -> list[_Made]:
        """Read and stage on this thread, order copy and decoding, wait for nothing on the device."""
        selection = joined(selections)
        columns = self._columns(selection)
        slot = self._slot()
        try:
            staging = self._stage(selection, slot)
            with stage("copy"):
                columns.pack(slot)
            with stage("decode") as ordering, self._submitting:
                try:
                    pending, tensors, cut = self._submit(staging, slot)
                    overflow = self._overflow(tensors)
                    tensors = [*tensors, *columns.send(slot, self._backend)]
                    ordering.nbytes = sum(x.numel() * x.element_size() for x in tensors)
                finally:
                    slot.busy = self._backend.event()  # whatever was ordered before an error
        except BaseException:
            self._free.append(slot)
            raise
        window = _Window(pending, slot.busy, slot, self._free, tensors, cut, columns, overflow)
        ends = accumulate(map(len, selections), initial=0)
        return [_Made(window, first, last) for first, last in pairwise(ends)]

    def deliver(self, made: _Made) -> TensorBatch:
        """Tensors that the caller's current stream may use; raises what the kernels found."""
        window = made.window
        if window.slot is not None:
            window.event.wait()
            try:
                window.pending.check()
            finally:
                window.give_back()
            if window.overflow is not None and bool(window.overflow):
                say_overflow()
        self._backend.hand_over(window.event, window.tensors)
        return {"X": window.x(made.first, made.last), **window.columns.batch(made.first, made.last)}

    def _overflow(self, tensors: Sequence[Tensor]) -> Tensor | None:
        """Order the search for infinite float16 values: a bool tensor; None where there can be none."""
        import torch

        half = [x for x in tensors if x.dtype == torch.float16]
        if not half or not self._may_overflow or was_said():
            return None
        with self._backend.on_decode_stream():
            return half[-1].isinf().any()

    def _columns(self, selection: np.ndarray) -> Metadata:
        """The metadata of rows."""
        return Columns(self._dataset, selection)

    def _stage(self, selection: np.ndarray, slot: Slot) -> StagedT:
        """Plan rows, bring what they need, and pack what of it crosses."""
        raise NotImplementedError

    def _submit(self, staging: StagedT, slot: Slot) -> tuple[Pending, list[Tensor], Cut]:
        """Order what makes the rows: it, the tensors they lie in, and what cuts a batch out of these."""
        raise NotImplementedError


class DeviceFeed(StagedFeed[CellDataset, "Staged"]):
    """Batches of sparse rows, decoded on a device.

    Parameters
    ----------
    dataset
        A sparse dataset.
    backend
        The device.
    options
        Form of the batches, how stored bytes reach page-locked memory (``"mmap"`` copies them out of the page
        cache, ``"pinned"`` reads them with ``preadv``, ``"kvikio"`` brings whole chunks to device memory,
        ``"auto"`` measures; default: ``"mmap"``), which chunks stay where, and where those of general codecs
        are decoded.
    """

    def __init__(self, dataset: CellDataset, backend: Backend, options: LoaderOptions) -> None:
        from hbx_gpu._loading.residency.device import DeviceChunks

        super().__init__(dataset, backend)
        self._engine = dataset.device_engine(backend, decode=options.decode)
        self._layout = options.one_layout
        self._dtype, self._transform = options.one_dtype, options.steps
        self._may_overflow = may_overflow(self._transform)
        self.chunks = DeviceChunks(dataset, self._engine, options)
        self.chunks.plan_on_device()
        self._decoded = DecodedBytes(self._engine)
        # Whether batches of a window could not be told apart before the device has counted.
        self.one_batch_per_window = self._layout == "csr" and self._engine.drops

    def _nbytes(self, rows: np.ndarray) -> int:
        elements = int(self._dataset.row_index.at(rows).length.sum(dtype=np.int64))
        if self._layout == "dense":
            out = DenseCollate(self._dtype).nbytes(len(rows), self._dataset.n_features)
        else:
            out = elements * _CSR_BYTES
        return out + elements * STAGED_BYTES + self._decoded.of(self._dataset.row_index, rows)

    def _new_slot(self) -> Slot:
        return self.chunks.slot()

    def _columns(self, selection: np.ndarray) -> Metadata:
        from hbx_gpu._engine.device.planned import PlannedColumns

        if self.chunks.index is not None and len(selection):
            return PlannedColumns(self.chunks.index, selection)
        return super()._columns(selection)

    def _stage(self, selection: np.ndarray, slot: Slot) -> Staged:
        return self.chunks.stage(selection, slot)

    def _submit(self, staging: Staged, slot: Slot) -> tuple[Pending, list[Tensor], Cut]:
        if self._layout == "dense":
            pending = self._engine.submit_dense(staging, slot, self._dtype, self._transform)
            (x,) = pending.tensors

            def dense(first: int, last: int) -> Tensor:
                return x[first:last]

            return pending, [x], dense
        pending = self._engine.submit_csr(staging, slot, value_dtypes=["float32"], canonical=True)
        return pending, *self._csr(pending, staging, self._dataset.n_features)

    def _csr(self, pending: Pending, staging: Staged, width: int) -> tuple[list[Tensor], Cut]:
        """Return the tensors of a window, and the function that cuts sparse tensors from them."""
        import torch

        indices, values, offsets = pending.tensors

        def cut(first: int, last: int) -> Tensor:
            # Without drops the plan knows the bounds; with them a window is one batch, counted by now.
            a, b = (0, pending.nnz) if self._engine.drops else staging.bounds(first, last)
            _hear_that_csr_is_in_beta()
            rows = offsets[first : last + 1]
            x = torch.sparse_csr_tensor(
                rows - a if a else rows,
                indices[a:b],
                values[a:b],
                size=(last - first, width),
                check_invariants=False,  # checked by the kernels
            )
            return x if pending.ascending else _canonical(x)

        return [indices, values, offsets], cut


class DecodedBytes:
    """Device memory that chunks take which are decoded whole there (homeobox.bitpacking, general codecs)."""

    def __init__(self, engine: DeviceEngine) -> None:
        from hbx_gpu._engine.device.staged_plan import PACKED_32, PACKED_64

        stager, self._table = engine.stager, engine.table
        whole = np.isin(stager.kinds, (PACKED_32, PACKED_64)) | stager.decompresses
        nbytes = np.where(whole, stager.elements * stager.itemsize, 0)
        self._of_source = nbytes.reshape(-1, self._table.n_roles).sum(axis=1)
        self._any = bool(whole.any())

    def of(self, rows: RowTable, selection: np.ndarray) -> int:
        """Bytes for the rows `selection`: the chunks of their first and last elements."""
        if not self._any:
            return 0
        places = rows.at(selection)
        source, start, length = places.source, places.start, places.length
        filled = (source >= 0) & (length > 0)
        source, start, length = source[filled].astype(np.int64), start[filled], length[filled]
        array = source * self._table.n_roles
        first, elements = self._table.chunk_base[array], self._table.chunk_elements[array]
        touched = np.concatenate([first + start // elements, first + (start + length - 1) // elements])
        array = np.searchsorted(self._table.chunk_base, np.unique(touched), "right") - 1
        return int(self._of_source[array // self._table.n_roles].sum())


@dataclass(frozen=True, slots=True)
class _Made:
    """Rows [first, last) of a window: one batch."""

    window: _Window
    first: int
    last: int


@dataclass(slots=True)
class _Window:
    """Batches decoded under one plan: what the device was told to do and what it writes.

    Attributes
    ----------
    pending, event
        Batch that the engine makes, and the event after all work that was ordered for it.
    slot, free
        Staging memory, given up when the first batch is delivered or nobody can ask for one any more; and
        where it goes. Whoever takes it from there waits until the device is done with it.
    tensors
        Tensors that the device writes, as allocated.
    x
        Cuts the batch of rows [first, last) out of them.
    columns
        Metadata.
    overflow
        Tensor that says whether float16 values became infinite; None where they cannot.
    """

    pending: Pending
    event: Event
    slot: Slot | None
    free: deque[Slot]
    tensors: list[Tensor]
    x: Cut
    columns: Metadata
    overflow: Tensor | None = None

    def give_back(self) -> None:
        """Give the staging memory up, if that has not been done."""
        slot, self.slot = self.slot, None
        if slot is not None:
            self.free.append(slot)

    __del__ = give_back


class _Described(Protocol):
    """A dataset with metadata."""

    @property
    def columns(self) -> Mapping[str, np.ndarray]: ...

    @property
    def categories(self) -> Mapping[str, np.ndarray]: ...


class Columns:
    """Metadata of a window's rows: numbers go to the device in one piece, anything else stays NumPy."""

    def __init__(self, dataset: _Described, selection: np.ndarray) -> None:
        found = gathered(dataset.columns, dataset.categories, selection) | {"index": selection}
        self._names = list(found)
        self._kept = {name: column for name, column in found.items() if column.dtype.kind not in "iuf"}
        self._sent = {name: np.ascontiguousarray(c) for name, c in found.items() if c.dtype.kind in "iuf"}
        sizes = [-(-column.nbytes // 8) * 8 for column in self._sent.values()]
        self._places = [0, *np.cumsum(sizes).tolist()]
        self._tensors: dict[str, Tensor] = {}

    def pack(self, slot: Slot) -> None:
        """Copy to page-locked memory."""
        slot.reserve(0, 0, self._places[-1])
        for column, at in zip(self._sent.values(), self._places, strict=False):
            slot.side[at : at + column.nbytes] = column.view(np.uint8)

    def send(self, slot: Slot, backend: Backend) -> list[Tensor]:
        """Order the copy; the tensor it goes to."""
        import torch

        buffer = backend.empty(self._places[-1], "uint8")
        backend.send(slot.side[: self._places[-1]], buffer)
        for (name, column), at in zip(self._sent.items(), self._places, strict=False):
            self._tensors[name] = buffer[at : at + column.nbytes].view(getattr(torch, column.dtype.name))
        return [buffer]

    def batch(self, first: int, last: int) -> TensorBatch:
        """The columns of rows [first, last)."""
        found: dict[str, np.ndarray | Tensor] = {**self._kept, **self._tensors}
        return {name: found[name][first:last] for name in self._names}


@cache
def _hear_that_csr_is_in_beta() -> None:
    """Make one sparse tensor with warnings off: torch says that they are in beta once in a process."""
    import torch

    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Sparse", category=UserWarning)
        torch.sparse_csr_tensor([0, 0], [], [], size=(1, 1), check_invariants=False)


def _canonical(x: Tensor) -> Tensor:
    """Columns ascending and unique within rows; needed where columns repeat, and waits for the device."""
    import torch

    columns, counts = x.col_indices(), x.crow_indices().diff()
    rows = torch.arange(len(counts), device=columns.device)
    rows = torch.repeat_interleave(rows, counts, output_size=len(columns))
    places = torch.stack((rows, columns))
    # Said to be unsorted: a CSR tensor converted as it stands would count as sorted.
    coo = torch.sparse_coo_tensor(places, x.values(), x.shape, check_invariants=False, is_coalesced=False)
    return coo.coalesce().to_sparse_csr()
