"""The feed of tokens that a device makes of rows that it has decoded."""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import TYPE_CHECKING

import numpy as np

from hbx_gpu._datasets.cells import CellDataset
from hbx_gpu._loading.feeds.device import STAGED_BYTES, Columns, DecodedBytes, SlotFeed
from hbx_gpu._loading.token_collate import TokenCollate
from hbx_gpu._protocols import TensorBatch
from hbx_gpu._tensors import check_columns, gathered
from hbx_gpu.loader_stats import stage
from hbx_gpu.tokens._compile import renamed
from hbx_gpu.tokens._device.batch import DeviceTokens, FlatRows, Made, Wanted
from hbx_gpu.tokens._encode import aux_ids, front_ids

if TYPE_CHECKING:
    from torch import Tensor

    from hbx_gpu._engine.device import FlatCsr, Pending, StagedPlan
    from hbx_gpu._engine.device.backend import Backend, Event, Slot
    from hbx_gpu._loading.options import LoaderOptions

_ELEMENT_BYTES = 12 + 12  # of an element in the flat CSR, and as a known gene


@dataclass(slots=True)
class _Window:
    """Batches decoded under one plan; `slot` is given up when the first of them is delivered."""

    pending: Pending
    event: Event
    slot: Slot | None
    free: deque[Slot]
    tensors: list[Tensor]
    columns: Columns

    def give_back(self) -> None:
        """Give the staging memory up, if that has not been done."""
        slot, self.slot = self.slot, None
        if slot is not None:
            self.free.append(slot)

    __del__ = give_back


@dataclass(frozen=True, slots=True)
class _Tokens:
    """Rows [first, last) of a window: one batch."""

    window: _Window
    made: Made
    first: int
    last: int


class TokenFeed(SlotFeed[CellDataset]):
    """Tokens of sparse rows, which are decoded and tokenized on a device.

    Parameters
    ----------
    dataset, backend
        Dataset to read, and the device.
    collate
        Makes the same tokens on the host; says what is wanted.
    options
        Form of the batches, and how stored bytes reach the device; see
        :class:`~hbx_gpu._loading.feeds.device.DeviceFeed`.
    """

    def __init__(
        self, dataset: CellDataset, backend: Backend, collate: TokenCollate, options: LoaderOptions
    ) -> None:
        from hbx_gpu._loading.residency.device import DeviceChunks

        if len(dataset.layers) > 1:
            dataset = dataset.with_layers(dataset.layer)
        super().__init__(dataset, backend)
        self._collate = collate
        self._tokens = DeviceTokens(collate.compiled, collate.options, backend)
        check_columns([*self._tokens.names, *dataset.columns, "index"])
        self._engine = dataset.device_engine(backend, decode=options.decode)
        self.chunks = DeviceChunks(dataset, self._engine, options)
        self._decoded = DecodedBytes(self._engine)
        # Memory that inputs of batches cross from, and their status comes back to.
        self._sides: deque[Slot] = deque()

    def set_epoch(self, epoch: int) -> None:
        """See :class:`~hbx_gpu._protocols.Feed`."""
        self._collate.set_epoch(epoch)

    def _nbytes(self, rows: np.ndarray) -> int:
        elements = int(self._dataset.row_index.at(rows).length.sum(dtype=np.int64))
        tokens = self._collate.nbytes(len(rows), self._dataset.n_features)
        staged = elements * (STAGED_BYTES + _ELEMENT_BYTES)
        return tokens + staged + self._decoded.of(self._dataset.row_index, rows)

    def _new_slot(self) -> Slot:
        return self.chunks.slot()

    def make(self, selections: Sequence[np.ndarray]) -> list[_Tokens]:
        """See :class:`~hbx_gpu._protocols.Feed`."""
        selection = np.concatenate([*selections, np.empty(0, np.int64)])
        bounds = np.cumsum([0, *map(len, selections)]).tolist()
        columns = Columns(self._dataset, selection)
        wanted = [self._wanted(rows) for rows in selections]
        made: list[Made] = []

        def tokens(flat: FlatCsr) -> list[Tensor]:
            for (first, last), one in zip(pairwise(bounds), wanted, strict=True):
                rows = FlatRows(
                    flat.indices, flat.values[0], flat.offsets + np.uint64(8 * first), flat.types[0],
                    flat.plan.n_elements, np.diff(flat.plan.offsets[first : last + 1]),
                )  # fmt: skip
                made.append(self._tokens.order(rows, one, self._side()))
            return [tensor for one in made for tensor in one.tensors]

        slot = self._slot()
        try:
            staging: StagedPlan = self.chunks.stage_on_host(selection, slot)
            with stage("copy"):
                columns.pack(slot)
            with stage("decode") as ordering, self._submitting:
                try:
                    pending = self._engine.submit_flat(staging, slot, tokens)
                    sent = columns.send(slot, self._backend)
                    ordering.nbytes = sum(x.numel() * x.element_size() for x in pending.tensors)
                finally:
                    slot.busy = self._backend.event()  # whatever was ordered before an error
        except BaseException:
            self._free.append(slot)
            raise
        assert slot.busy is not None
        window = _Window(pending, slot.busy, slot, self._free, [*pending.tensors, *sent], columns)
        return [
            _Tokens(window, one, first, last)
            for (first, last), one in zip(pairwise(bounds), made, strict=True)
        ]

    def deliver(self, made: _Tokens) -> TensorBatch:
        """See :class:`~hbx_gpu._protocols.Feed`."""
        window = made.window
        window.event.wait()
        if window.slot is not None:
            try:
                window.pending.check()
            finally:
                window.give_back()
        try:
            tokens = renamed(self._collate.compiled, made.made.result())
        finally:
            self._sides.append(made.made.slot)
        self._backend.hand_over(window.event, window.tensors)
        return {**tokens, **window.columns.batch(made.first, made.last)}

    def _side(self) -> Slot:
        from hbx_gpu._engine.device.backend import Slot

        try:
            return self._sides.popleft()
        except IndexError:
            return Slot(self._backend)

    def _wanted(self, rows: np.ndarray) -> Wanted:
        """What tokens of a batch depend on beside its counts."""
        collate = self._collate
        compiled = collate.compiled
        wanted = {name: self._dataset.columns[name] for name in compiled.recipe.obs_columns}
        metadata = gathered(wanted, self._dataset.categories, rows)
        obs = {**metadata, **collate.obs_of(metadata)}
        return Wanted(
            rows, front_ids(compiled, obs, len(rows)), collate.seed, collate.epoch,
            int(rows[0]) if len(rows) else 0, collate.where, aux_ids(compiled, obs, len(rows)),
        )  # fmt: skip
