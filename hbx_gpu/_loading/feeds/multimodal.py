"""Feeds of a device for rows of dense spaces, for what the host decodes, and for several modalities."""

from __future__ import annotations

import contextlib
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from itertools import pairwise
from typing import TYPE_CHECKING, Any

import numpy as np

from hbx_gpu._collates import (
    LayersCollate,
    MatrixCollate,
    MeasuredTensors,
    MultimodalCollate,
    check_spaces,
    dense_to_tensor_collate,
)
from hbx_gpu._datasets.cells import CellDataset
from hbx_gpu._datasets.dense import DenseCellDataset
from hbx_gpu._loading.feeds.device import DecodedBytes, DeviceFeed, StagedFeed
from hbx_gpu._loading.feeds.host import tell_epoch
from hbx_gpu._tensors import check_columns
from hbx_gpu.errors import UnsupportedError
from hbx_gpu.stats import stage

if TYPE_CHECKING:
    from hbx_gpu._datasets.multimodal import MultimodalCellDataset
    from hbx_gpu._engine.device import DeviceEngine, Pending, Staging
    from hbx_gpu._engine.device.backend import Backend, Event, Slot
    from hbx_gpu._engine.device.rows import DenseRows

_ALIGNMENT = 16
PRESENT = "present of "
"""Column of a part that says which cells have the modality named behind it."""


class CopiedFeed:
    """Batches that the host makes, copied to a device in one piece per window.

    For what no device kernel decodes: boxes of images, arrays whose chunks do not span their trailing axes,
    codecs that are left to the host, images that are transformed, matrices computed at load.

    Parameters
    ----------
    dataset, collate
        What is read, and what makes tensors of each batch.
    backend
        The device.
    """

    one_batch_per_window = False

    def __init__(self, dataset: Any, collate: Callable[[Any], dict[str, Any]], backend: Backend) -> None:
        check_columns([*dataset.columns, "index"])
        self._dataset, self._collate, self._backend = dataset, collate, backend
        self._free: deque[Slot] = deque()

    def make(self, selections: list[np.ndarray]) -> list[_Copied]:
        """See :class:`hbx_gpu._loading.feeds.host.Feed`."""
        import torch

        from hbx_gpu._engine.device.backend import Slot

        batches = self._dataset.read_batches(selections)
        for batch, rows in zip(batches, selections, strict=True):
            batch.metadata = {**(batch.metadata or {}), "index": self._dataset.row_numbers(rows)}
        on_device = getattr(self._collate, "on_device", False)
        with self._backend.on_decode_stream() if on_device else contextlib.nullcontext():
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
            self._backend.send(slot.side[: places[-1]], buffer)
            slot.busy = self._backend.event()
        event = slot.busy
        self._free.append(slot)  # whoever takes it waits for the copy
        sent = iter(
            buffer[at : at + tensor.nbytes].view(tensor.dtype).view(tensor.shape)
            for tensor, at in zip(tensors, places, strict=False)
        )
        return [_Copied(event, buffer, _replaced(batch, sent)) for batch in made]

    def deliver(self, made: _Copied) -> dict[str, Any]:
        """See :class:`hbx_gpu._loading.feeds.host.Feed`."""
        there = [value for value in made.batch.values() if getattr(value, "is_cuda", False)]
        self._backend.hand_over(made.event, [made.buffer, *there])
        return made.batch

    def set_epoch(self, epoch: int) -> None:
        """See :class:`hbx_gpu._loading.feeds.host.HostFeed`."""
        tell_epoch(self._collate, epoch)

    def nbytes(self, rows: np.ndarray) -> int:
        """See :class:`hbx_gpu._loading.feeds.host.Feed`: on the host, and as much on the device."""
        return 2 * int(self._dataset.batch_nbytes(rows))


@dataclass(frozen=True, slots=True)
class _Copied:
    """A batch whose tensors lie in a device buffer that `event` says is written."""

    event: Event
    buffer: Any
    batch: dict[str, Any]


def _parts(tensor: Any) -> tuple[Any, ...]:
    """Dense tensors that a tensor consists of."""
    import torch

    if tensor.layout is torch.sparse_csr:
        return tensor.crow_indices(), tensor.col_indices(), tensor.values()
    return (tensor,)


def _tensors(value: Any) -> list[Any]:
    """All dense tensors of the host in a batch, in order."""
    import torch

    if isinstance(value, torch.Tensor):
        return [] if value.is_cuda else list(_parts(value))
    if isinstance(value, dict):
        return [tensor for entry in value.values() for tensor in _tensors(entry)]
    if isinstance(value, list):
        return [tensor for entry in value for tensor in _tensors(entry)]
    return []


def _replaced(value: Any, sent: Any) -> Any:
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


class DenseFeed(StagedFeed):
    """Rows of one layer of a dense dataset whose stored chunks cross to a device and are decoded there.

    Parameters
    ----------
    dataset, backend
        What is read, and the device.
    rows
        How its rows lie in chunks.
    engine
        Decodes them; made of the table of `rows`.
    dtype
        Of matrices; None: as the dataset has it.
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
        cls, dataset: DenseCellDataset, backend: Backend, collate: Callable[..., Any], decode: str
    ) -> DenseFeed | None:
        """The feed of a dataset of one layer; None where the host has to do with its values.

        Parameters
        ----------
        collate
            What makes tensors on the host.
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
        if decode == "host" or (dtype is None and made is not dense_to_tensor_collate):
            return None
        # bfloat16, which NumPy lacks, is rounded from float32.
        rows = DenseRows.of(dataset, "float32" if dtype == "bfloat16" else dtype)
        if rows is None:
            return None
        engine = DeviceEngine(rows.table, dataset.directory, [rows.dtype], backend, decode=decode)
        # The host keeps chunks that it has decoded, which staging does not.
        return None if engine.stager.leaves_to_host.any() else cls(dataset, backend, rows, engine, dtype)

    def nbytes(self, rows: np.ndarray) -> int:
        """As `Feed.nbytes`: rows, twice where put in place, and decoded chunks."""
        numbers = self._dataset.row_numbers(rows)
        elements = self._dataset.batch_nbytes(numbers) // self._dataset.dtype.itemsize
        out = elements * (self._rows.dtype.itemsize * (2 if self._rows.placed else 1) + 2 * self._rounds)
        stretches = self._rows.stretches(self._dataset.row_index, numbers)  # type: ignore[arg-type]
        return out + self._decoded.of(stretches, np.arange(len(numbers)))

    def _stage(self, selection: np.ndarray, slot: Slot) -> Staging:
        boxes, slab = self._dataset.read(selection)
        with stage("plan"):
            plan = self._rows.plan(boxes)  # type: ignore[arg-type]
            staging = self._engine.measure(plan, slab)
        with stage("copy") as copying:
            self._engine.pack(staging, slot)
            copying.nbytes = staging.host_bytes
        return staging

    def _submit(self, staging: Staging, slot: Slot) -> tuple[Pending, list[Any], Callable[..., Any]]:
        plan, rows = staging.plan, self._rows
        if rows.width is None and not rows.placed:
            pending = self._engine.submit_rows(staging, slot, (plan.n_elements,), placed=False)
            (flat,) = pending.tensors

            def ragged(first: int, last: int) -> list[Any]:
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

        def regular(first: int, last: int) -> Any:
            return x[first:last]

        return pending, [*pending.tensors, x], regular


class LayersFeed:
    """Several layers of a dataset on a device: each has a feed of its own; the first is ``X``.

    Parameters
    ----------
    feeds
        By layer; they deliver the same rows.
    """

    def __init__(self, feeds: Mapping[str, Any]) -> None:
        self._feeds = dict(feeds)
        self.one_batch_per_window = any(feed.one_batch_per_window for feed in feeds.values())

    def make(self, selections: list[np.ndarray]) -> list[Any]:
        """See :class:`hbx_gpu._loading.feeds.host.Feed`."""
        return list(zip(*(feed.make(selections) for feed in self._feeds.values()), strict=True))

    def deliver(self, made: Any) -> dict[str, Any]:
        """See :class:`hbx_gpu._loading.feeds.host.Feed`."""
        found = [feed.deliver(entry) for feed, entry in zip(self._feeds.values(), made, strict=True)]
        layers = {name: batch["X"] for name, batch in zip(self._feeds, found, strict=True)}
        return {**found[0], "layers": layers}

    def nbytes(self, rows: np.ndarray) -> int:
        """See :class:`hbx_gpu._loading.feeds.host.Feed`."""
        return sum(feed.nbytes(rows) for feed in self._feeds.values())


def cells_feed(
    dataset: Any,
    make_feed: Callable[..., DeviceFeed],
    backend: Backend,
    collate: Callable[[Any], dict[str, Any]],
    *,
    decode: str = "auto",
    **options: Any,
) -> Any:
    """The feed of one modality: decoded on the device where it can be, else made by `collate` and copied.

    Parameters
    ----------
    dataset
        A CellDataset, or what behaves like one.
    make_feed, options
        Makes the feed of one layer of a sparse dataset.
    backend
        The device.
    collate
        What makes the same tensors on the host.
    decode
        Where chunks of dense datasets are decoded; see :class:`DenseFeed`.
    """
    if not isinstance(dataset, CellDataset):
        if not hasattr(dataset, "read_batches"):
            raise UnsupportedError(
                f"a {type(dataset).__name__} is loaded on the CPU only; a GPU takes the datasets of hbx_gpu"
            )
        return CopiedFeed(dataset, collate, backend)
    dense = isinstance(dataset, DenseCellDataset)
    feeds: dict[str, Any] = {}
    for name, part in _layers_of(dataset):
        if not dense:
            feeds[name] = make_feed(part, **options)
            continue
        feed = DenseFeed.of(part, backend, collate, decode)
        if feed is None:  # one host read serves all layers
            return CopiedFeed(dataset, collate, backend)
        feeds[name] = feed
    return LayersFeed(feeds) if len(feeds) > 1 else feeds[dataset.layer]


def _layers_of(dataset: CellDataset) -> Iterator[tuple[str, Any]]:
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
    settings
        What its spaces become.
    make_feed
        Makes the feed of one layer of a sparse dataset, told ``layout``, ``dtype`` and ``transform``.
    backend
        The device.
    decode
        See :func:`cells_feed`.
    """

    def __init__(
        self,
        dataset: MultimodalCellDataset,
        settings: MultimodalCollate,
        make_feed: Callable[..., DeviceFeed],
        backend: Backend,
        *,
        decode: str = "auto",
    ) -> None:
        check_spaces(dataset.datasets)
        self._dataset = dataset
        # Masks cross as columns of the first part, beside the labels.
        masks = {f"{PRESENT}{name}": mask.astype(np.uint8) for name, mask in dataset.present.items()}
        self._feeds: dict[str, Any] = {}
        for name, part in dataset.datasets.items():
            cells = part if self._feeds else part.with_columns(masks)
            kind = part.kind if isinstance(part, DenseCellDataset) else "sparse"
            collate = settings.collate_of(name, kind, present=part.present)
            options = settings.options_of(name)
            self._feeds[name] = cells_feed(cells, make_feed, backend, collate, decode=decode, **options)
        self.one_batch_per_window = any(
            getattr(feed, "one_batch_per_window", False) for feed in self._feeds.values()
        )

    def set_epoch(self, epoch: int) -> None:
        """See :class:`hbx_gpu._loading.feeds.host.HostFeed`."""
        for feed in self._feeds.values():
            tell_epoch(feed, epoch)

    def make(self, selections: list[np.ndarray]) -> list[Any]:
        """See :class:`hbx_gpu._loading.feeds.host.Feed`."""
        made = zip(*(feed.make(selections) for feed in self._feeds.values()), strict=True)
        return list(zip(selections, made, strict=True))

    def deliver(self, made: Any) -> dict[str, Any]:
        """See :class:`hbx_gpu._loading.feeds.host.Feed`."""
        import torch

        selection, entries = made
        found = {
            name: feed.deliver(entry)
            for (name, feed), entry in zip(self._feeds.items(), entries, strict=True)
        }
        labels = dict(next(iter(found.values())))
        index = labels["index"]
        rows = self._dataset.row_numbers(selection)
        result: dict[str, Any] = {
            "present": {name: labels.pop(f"{PRESENT}{name}").view(torch.bool) for name in found},
            "measured": MeasuredTensors(self._dataset.measured(rows), index.device),
            "index": index,
        }
        if metadata := {name: labels[name] for name in labels if name not in ("X", "layers", "index")}:
            result["metadata"] = metadata
        for name, batch in found.items():
            result[name] = {key: batch[key] for key in ("X", "layers") if key in batch}
        return result

    def nbytes(self, rows: np.ndarray) -> int:
        """See :class:`hbx_gpu._loading.feeds.host.Feed`."""
        return sum(int(feed.nbytes(rows)) for feed in self._feeds.values())
