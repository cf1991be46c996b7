"""Feeds of a device for dense rows, for batches that the host decodes, and for several modalities."""

from __future__ import annotations

import contextlib
from collections import deque
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import TYPE_CHECKING, Any

import numpy as np

from hbx_gpu._collates import (
    ArrayCollate,
    LayersCollate,
    MatrixCollate,
    MeasuredTensors,
    MultimodalCollate,
    check_spaces,
)
from hbx_gpu._datasets.cells import CellDataset
from hbx_gpu._datasets.dense import DenseCellDataset
from hbx_gpu._datasets.plain import PlainDataset
from hbx_gpu._loading.feeds.device import Cut, DatasetT, DecodedBytes, DeviceFeed, StagedFeed
from hbx_gpu._loading.feeds.tokens import TokenFeed
from hbx_gpu._loading.token_collate import TokenCollate
from hbx_gpu._protocols import AnyCollate, AnyFeed, AnyLoadable, Collate, Rows, TensorBatch
from hbx_gpu.errors import UnsupportedError
from hbx_gpu.loader_stats import stage

if TYPE_CHECKING:
    from torch import Tensor

    from hbx_gpu._datasets.multimodal import MultimodalCellDataset
    from hbx_gpu._engine.device import DeviceEngine, Pending, StagedPlan
    from hbx_gpu._engine.device.backend import Backend, Event, Slot
    from hbx_gpu._engine.device.rows import DenseRows
    from hbx_gpu._loading.options import LoaderOptions

_ALIGNMENT = 16
PRESENT = "present of "
"""Prefix of the columns of a part that say which cells have a modality; its name follows."""


class CopiedFeed:
    """Batches that the host makes, copied to a device in one piece per window.

    For what no device kernel decodes: boxes of images, arrays whose chunks do not span their trailing axes,
    codecs that are left to the host, images that are transformed, matrices computed at load.

    Parameters
    ----------
    dataset, collate
        Dataset to read, and the collate that makes tensors of each batch.
    backend
        The device.
    """

    one_batch_per_window = False

    def __init__(self, dataset: AnyLoadable, collate: Collate[Any, TensorBatch], backend: Backend) -> None:
        self._dataset, self._collate, self._backend = dataset.with_row_numbers(), collate, backend
        self._free: deque[Slot] = deque()

    def checked(self, batches: Sequence[Rows]) -> list[np.ndarray]:
        """See :class:`~hbx_gpu._protocols.Feed`."""
        return self._dataset.checked(batches)

    def make(self, selections: Sequence[np.ndarray]) -> list[_Copied]:
        """See :class:`~hbx_gpu._protocols.Feed`."""
        import torch

        from hbx_gpu._engine.device.backend import Slot

        batches = self._dataset.read_rows(selections)
        with self._backend.on_decode_stream() if self._collate.on_device else contextlib.nullcontext():
            made = [self._collate(batch) for batch in batches]
        tensors = [tensor for batch in made for tensor in _tensors(batch)]
        places = np.cumsum(
            [0, *(-(-tensor.nbytes // _ALIGNMENT) * _ALIGNMENT for tensor in tensors)]
        ).tolist()
        slot = self._free.popleft() if self._free else Slot(self._backend)
        with stage("copy") as copying:
            copying.nbytes = places[-1]
            slot.reserve(0, 0, max(1, places[-1]))
            for tensor, at in zip(tensors, places, strict=False):
                if not tensor.numel():  # torch gives these strides that no view takes
                    continue
                raw = tensor.contiguous().view(-1).view(torch.uint8).numpy()
                slot.side[at : at + tensor.nbytes] = raw
            buffer = self._backend.empty(places[-1], "uint8")
            try:
                self._backend.send(slot.side[: places[-1]], buffer)
            finally:
                slot.busy = self._backend.event()
        event = slot.busy
        self._free.append(slot)  # whoever takes it waits for the copy
        sent = iter(
            buffer[at : at + tensor.nbytes].view(tensor.dtype).view(tensor.shape)
            for tensor, at in zip(tensors, places, strict=False)
        )
        return [
            _Copied(event, buffer, {name: _replaced(value, sent) for name, value in batch.items()})
            for batch in made
        ]

    def deliver(self, made: _Copied) -> TensorBatch:
        """See :class:`~hbx_gpu._protocols.Feed`."""
        import torch

        # Tensors that are on the device already are outputs of DALI, in its memory.
        there = [value for value in made.batch.values() if isinstance(value, torch.Tensor) and value.is_cuda]
        self._backend.hand_over(made.event, [made.buffer], there)
        return made.batch

    def set_epoch(self, epoch: int) -> None:
        """See :class:`~hbx_gpu._protocols.Feed`."""
        self._collate.set_epoch(epoch)

    def nbytes(self, selections: Sequence[np.ndarray]) -> list[int]:
        """See :class:`~hbx_gpu._protocols.Feed`: on the host, and as much on the device."""
        return [2 * nbytes for nbytes in self._dataset.rows_nbytes(selections)]


@dataclass(frozen=True, slots=True)
class _Copied:
    """A batch whose tensors lie in a device buffer that `event` says is written."""

    event: Event
    buffer: Tensor
    batch: TensorBatch


def _parts(tensor: Tensor) -> tuple[Tensor, ...]:
    """Dense tensors that a tensor consists of."""
    import torch

    if tensor.layout is torch.sparse_csr:
        return tensor.crow_indices(), tensor.col_indices(), tensor.values()
    return (tensor,)


def _tensors(value: object) -> list[Tensor]:
    """All dense tensors of the host in a batch, in order."""
    import torch

    if isinstance(value, torch.Tensor):
        return [] if value.is_cuda else list(_parts(value))
    if isinstance(value, dict):
        return [tensor for entry in value.values() for tensor in _tensors(entry)]
    if isinstance(value, list):
        return [tensor for entry in value for tensor in _tensors(entry)]
    return []


def _replaced(value: object, sent: Iterator[Tensor]) -> object:
    """The batch with the tensors of :func:`_tensors` replaced, one after the other."""
    import torch

    if isinstance(value, torch.Tensor):
        if value.is_cuda:
            return value
        if value.layout is not torch.sparse_csr:
            return next(sent)
        offsets, indices, values = next(sent), next(sent), next(sent)
        return torch.sparse_csr_tensor(offsets, indices, values, size=value.shape, check_invariants=False)
    if isinstance(value, dict):
        return {name: _replaced(entry, sent) for name, entry in value.items()}
    if isinstance(value, list):
        return [_replaced(entry, sent) for entry in value]
    return value


class DenseFeed(StagedFeed[DenseCellDataset, "StagedPlan"]):
    """Rows of one layer of a dense dataset whose stored chunks cross to a device and are decoded there.

    Parameters
    ----------
    dataset, backend
        Dataset to read, and the device.
    rows
        How its rows lie in chunks.
    engine
        Decodes them; made of the table of `rows`.
    dtype
        dtype of matrices; None for that of the dataset.
    """

    def __init__(
        self,
        dataset: DenseCellDataset,
        backend: Backend,
        rows: DenseRows,
        engine: DeviceEngine,
        dtype: str | None = None,
    ) -> None:
        super().__init__(dataset, backend)
        self._engine, self._rows, self._decoded = engine, rows, DecodedBytes(engine)
        self._rounds = dtype == "bfloat16"

    @classmethod
    def of(
        cls, dataset: DenseCellDataset, backend: Backend, collate: AnyCollate, decode: str
    ) -> DenseFeed | None:
        """The feed of a dataset of one layer; None where the host has to do with its values.

        Parameters
        ----------
        collate
            Collate that makes tensors on the host.
        decode
            As for :class:`~hbx_gpu._engine.device.DeviceEngine`.

        Raises
        ------
        DeviceUnavailableError
            ``decode="device"``, and nothing here that decompresses on the device.
        """
        from hbx_gpu._engine.device import DeviceEngine
        from hbx_gpu._engine.device.rows import DenseRows

        made = collate.collate if isinstance(collate, LayersCollate) else collate
        dtype = made.dtype if isinstance(made, MatrixCollate) else None
        if decode == "host" or (dtype is None and not isinstance(made, ArrayCollate)):
            return None
        # bfloat16, which NumPy lacks, is rounded from float32.
        rows = DenseRows.of(dataset, "float32" if dtype == "bfloat16" else dtype)
        if rows is None:
            return None
        engine = DeviceEngine(rows.table, dataset.directory, [rows.dtype], backend, decode=decode)
        # The host keeps chunks that it has decoded, which staging does not.
        return None if engine.stager.leaves_to_host.any() else cls(dataset, backend, rows, engine, dtype)

    def _nbytes(self, rows: np.ndarray) -> int:
        """Rows, twice where put in place, and decoded chunks."""
        elements = self._dataset.rows_nbytes([rows])[0] // self._dataset.dtype.itemsize
        out = elements * (self._rows.dtype.itemsize * (2 if self._rows.placed else 1) + 2 * self._rounds)
        stretches = self._rows.stretches(self._dataset.row_index, rows)
        return out + self._decoded.of(stretches, np.arange(len(rows)))

    def _stage(self, selection: np.ndarray, slot: Slot) -> StagedPlan:
        boxes, slab = self._dataset.read(selection)
        with stage("plan"):
            plan = self._rows.plan(boxes)
            staging = self._engine.measure(plan, slab)
        with stage("copy") as copying:
            self._engine.pack(staging, slot)
            copying.nbytes = staging.host_bytes
        return staging

    def _submit(self, staging: StagedPlan, slot: Slot) -> tuple[Pending, list[Tensor], Cut]:
        plan, rows = staging.plan, self._rows
        if rows.width is None and not rows.placed:
            pending = self._engine.submit_rows(staging, slot, (plan.n_elements,), placed=False)
            (flat,) = pending.tensors

            def ragged(first: int, last: int) -> list[Tensor]:
                bounds = plan.offsets[first : last + 1].tolist()
                return [
                    flat[a:b].view(rows.shape_of(plan, row))
                    for row, (a, b) in enumerate(pairwise(bounds), start=first)
                ]

            return pending, [flat], ragged
        each = self._dataset.per_cell_shape or (self._dataset.n_features,)
        pending = self._engine.submit_rows(staging, slot, (plan.n_rows, *each), placed=rows.placed)
        (x,) = pending.tensors
        if self._rounds:
            with self._backend.on_decode_stream():
                x = x.bfloat16()

        def regular(first: int, last: int) -> Tensor:
            return x[first:last]

        return pending, [*pending.tensors, x], regular


class LayersFeed:
    """Several layers of a dataset on a device: each has a feed of its own; the first is ``X``.

    Parameters
    ----------
    feeds
        Feed of each layer; they all deliver the same rows.
    """

    def __init__(self, feeds: Mapping[str, AnyFeed]) -> None:
        self._feeds = dict(feeds)
        self.one_batch_per_window = any(feed.one_batch_per_window for feed in feeds.values())

    def checked(self, batches: Sequence[Rows]) -> list[np.ndarray]:
        """See :class:`~hbx_gpu._protocols.Feed`."""
        return next(iter(self._feeds.values())).checked(batches)

    def make(self, selections: Sequence[np.ndarray]) -> list[tuple[object, ...]]:
        """See :class:`~hbx_gpu._protocols.Feed`."""
        return list(zip(*(feed.make(selections) for feed in self._feeds.values()), strict=True))

    def deliver(self, made: tuple[object, ...]) -> TensorBatch:
        """See :class:`~hbx_gpu._protocols.Feed`."""
        found = [feed.deliver(entry) for feed, entry in zip(self._feeds.values(), made, strict=True)]
        layers = {name: batch["X"] for name, batch in zip(self._feeds, found, strict=True)}
        return {**found[0], "layers": layers}

    def nbytes(self, selections: Sequence[np.ndarray]) -> list[int]:
        """See :class:`~hbx_gpu._protocols.Feed`."""
        return _sums(feed.nbytes(selections) for feed in self._feeds.values())

    def set_epoch(self, epoch: int) -> None:
        """See :class:`~hbx_gpu._protocols.Feed`."""
        for feed in self._feeds.values():
            feed.set_epoch(epoch)


def _sums(sizes: Iterable[list[int]]) -> list[int]:
    """Bytes of each batch over several feeds."""
    return [sum(parts) for parts in zip(*sizes, strict=True)]


def cells_feed(
    dataset: AnyLoadable, backend: Backend, collate: AnyCollate, options: LoaderOptions
) -> AnyFeed:
    """The feed of one modality: decoded on the device where it can be, else made by `collate` and copied.

    Parameters
    ----------
    dataset
        What is read.
    backend
        The device.
    collate
        Collate that makes the same tensors on the host.
    options
        Options of one space.
    """
    if isinstance(dataset, PlainDataset):
        raise UnsupportedError(
            f"a {type(dataset.dataset).__name__} is loaded on the CPU only; "
            "a GPU takes the datasets of hbx_gpu"
        )
    feeds: dict[str, AnyFeed] = {}
    if isinstance(collate, TokenCollate):
        assert isinstance(dataset, CellDataset)  # others have no tokens
        if collate.host_only:
            return CopiedFeed(dataset, collate, backend)
        return TokenFeed(dataset, backend, collate, options)
    if isinstance(dataset, CellDataset):
        for name, cells in _layers_of(dataset):
            feeds[name] = DeviceFeed(cells, backend, options)
    elif isinstance(dataset, DenseCellDataset):
        for name, part in _layers_of(dataset):
            feed = DenseFeed.of(part, backend, collate, options.decode)
            if feed is None:  # one host read serves all layers
                return CopiedFeed(dataset, collate, backend)
            feeds[name] = feed
    else:
        return CopiedFeed(dataset, collate, backend)
    return LayersFeed(feeds) if len(feeds) > 1 else feeds[dataset.layer]


def _layers_of(dataset: DatasetT) -> Iterator[tuple[str, DatasetT]]:
    """The dataset layer by layer, metadata with the first only."""
    if len(dataset.layers) == 1:
        yield dataset.layer, dataset
        return
    part = dataset
    for name in dataset.layers:
        yield name, part.with_layers(name)
        part = dataset.without_metadata()


class MultimodalFeed:
    """Several modalities on a device.

    Parameters
    ----------
    dataset
        What is read.
    collate
        Collate of the batches, which says what each space becomes.
    backend
        The device.
    options
        Options of all spaces together; `collate` knows those of each space.
    """

    def __init__(
        self,
        dataset: MultimodalCellDataset,
        collate: MultimodalCollate,
        backend: Backend,
        options: LoaderOptions,
    ) -> None:
        check_spaces(dataset.datasets)
        self._dataset = dataset
        # Masks cross as columns of the first part, beside the labels.
        masks = {f"{PRESENT}{name}": mask.astype(np.uint8) for name, mask in dataset.present.items()}
        self._feeds: dict[str, AnyFeed] = {}
        for name, part in dataset.datasets.items():
            cells = part if self._feeds else part.with_columns(masks)
            made = collate.collate_of(name, part.kind, present=part.present)
            own = replace(options, **collate.options_of(name))
            self._feeds[name] = cells_feed(cells, backend, made, own)
        self.one_batch_per_window = any(feed.one_batch_per_window for feed in self._feeds.values())

    def checked(self, batches: Sequence[Rows]) -> list[np.ndarray]:
        """See :class:`~hbx_gpu._protocols.Feed`."""
        return self._dataset.checked(batches)

    def set_epoch(self, epoch: int) -> None:
        """See :class:`~hbx_gpu._protocols.Feed`."""
        for feed in self._feeds.values():
            feed.set_epoch(epoch)

    def make(self, selections: Sequence[np.ndarray]) -> list[tuple[np.ndarray, tuple[object, ...]]]:
        """See :class:`~hbx_gpu._protocols.Feed`."""
        made = zip(*(feed.make(selections) for feed in self._feeds.values()), strict=True)
        return list(zip(selections, made, strict=True))

    def deliver(self, made: tuple[np.ndarray, tuple[object, ...]]) -> TensorBatch:
        """See :class:`~hbx_gpu._protocols.Feed`."""
        import torch

        rows, entries = made
        found = {
            name: feed.deliver(entry)
            for (name, feed), entry in zip(self._feeds.items(), entries, strict=True)
        }
        labels = dict(next(iter(found.values())))
        index = labels["index"]
        result: TensorBatch = {
            "present": {name: labels.pop(f"{PRESENT}{name}").view(torch.bool) for name in found},
            "measured": MeasuredTensors(self._dataset.measured(rows), index.device),
            "index": index,
        }
        columns = self._dataset.columns.keys()
        if metadata := {name: labels[name] for name in labels if name in columns}:
            result["metadata"] = metadata
        others = {*columns, "index", *(f"{PRESENT}{name}" for name in found)}
        for name, batch in found.items():
            result[name] = {key: value for key, value in batch.items() if key not in others}
        return result

    def nbytes(self, selections: Sequence[np.ndarray]) -> list[int]:
        """See :class:`~hbx_gpu._protocols.Feed`."""
        return _sums(feed.nbytes(selections) for feed in self._feeds.values())
