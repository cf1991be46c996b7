"""Which features were measured, beside the rows of a batch of one feature space."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol, Self, runtime_checkable

import numpy as np

from hbx_gpu._datasets.dense import DenseCellDataset
from hbx_gpu._protocols import AnyCollate, AnyFeed, Collating, Loadable, Rows, TensorBatch, Widths
from hbx_gpu._tensors import check_columns

if TYPE_CHECKING:
    import torch
    from torch import Tensor

MEASURED = "measured"
"""Key of the mask in a batch. Until the mask takes its place, it holds the stored matrix of each row."""


@runtime_checkable
class HasFeatures(Loadable[object], Protocol):
    """A dataset of one feature space that knows which stored matrix has which feature."""

    @property
    def n_features(self) -> int:
        """Number of columns."""

    @property
    def groups_np(self) -> np.ndarray:
        """int32, (n_cells,). Stored matrix of every row."""

    @property
    def n_groups(self) -> int:
        """Number of stored matrices."""

    def measured_masks(self, groups: np.ndarray) -> np.ndarray:
        """bool, (len(groups), n_features). Which columns a stored matrix has; none for group -1."""

    def with_columns(self, columns: Mapping[str, np.ndarray]) -> Self:
        """This dataset with more metadata columns."""


def with_groups(dataset: Loadable[object]) -> tuple[HasFeatures, Masks]:
    """The dataset with the stored matrix of each row as a column, and the masks that take its place.

    Raises
    ------
    ValueError
        The dataset has no features, or a metadata column that is called ``measured``.
    """
    arrays = isinstance(dataset, DenseCellDataset) and dataset.kind == "arrays"
    if not isinstance(dataset, HasFeatures) or arrays:
        raise ValueError(
            f"measured=True is for datasets whose columns are features, which {dataset!r} does not have: "
            "leave it out"
        )
    check_columns([*dataset.columns, MEASURED])
    # The last one belongs to group -1.
    masks = dataset.measured_masks(np.array([*range(dataset.n_groups), -1]))
    return dataset.with_columns({MEASURED: dataset.groups_np}), Masks(masks)


@dataclass(frozen=True, slots=True)
class Masks:
    """The distinct masks of a dataset.

    Attributes
    ----------
    masks
        bool, (n_groups + 1, n_features), as an array or a tensor. One of each stored matrix; the last row is
        that of cells without one.
    """

    masks: np.ndarray | Tensor

    def nbytes(self, n_rows: int) -> int:
        """Bytes of the mask of a batch."""
        return n_rows * int(self.masks.shape[1])

    def on(self, device: torch.device | str) -> Masks:
        """The masks as a tensor on a device."""
        import torch

        return Masks(torch.as_tensor(self.masks).to(device))

    def put_into(self, batch: TensorBatch) -> TensorBatch:
        """The batch with masks instead of stored matrices; both on the device of :meth:`on`."""
        return batch | {MEASURED: self.masks[batch[MEASURED].long()]}


@dataclass(frozen=True, slots=True)
class MeasuredCollate(Collating):
    """What `collate` makes of a batch, and the mask of the features that were measured."""

    collate: AnyCollate
    masks: Masks

    @property
    def sparse(self) -> bool:
        return self.collate.sparse

    @property
    def on_device(self) -> bool:
        return self.collate.on_device

    def set_epoch(self, epoch: int) -> None:
        """See :class:`~hbx_gpu._protocols.Collate`."""
        self.collate.set_epoch(epoch)

    def __call__(self, batch: object) -> TensorBatch:
        """See :class:`MeasuredCollate`."""
        return self.masks.on("cpu").put_into(self.collate(batch))

    def nbytes(self, n_rows: int, n_features: Widths, /) -> int:
        """Bytes of the mask, and of what `collate` makes."""
        return self.masks.nbytes(n_rows) + self.collate.nbytes(n_rows, n_features)


class MeasuredFeed:
    """Batches of a feed on a device, with the mask of the features that were measured.

    Parameters
    ----------
    feed
        Its batches have the stored matrix of each row as a column.
    masks
        Copied to the device once, with the first batch.
    """

    def __init__(self, feed: AnyFeed, masks: Masks) -> None:
        self._feed, self._masks = feed, masks
        self._there: Masks | None = None
        self.one_batch_per_window = feed.one_batch_per_window

    def checked(self, batches: Sequence[Rows]) -> list[np.ndarray]:
        """See :class:`~hbx_gpu._protocols.Feed`."""
        return self._feed.checked(batches)

    def nbytes(self, selections: Sequence[np.ndarray]) -> list[int]:
        """See :class:`~hbx_gpu._protocols.Feed`."""
        found = zip(self._feed.nbytes(selections), selections, strict=True)
        return [nbytes + self._masks.nbytes(len(rows)) for nbytes, rows in found]

    def make(self, selections: Sequence[np.ndarray]) -> list[object]:
        """See :class:`~hbx_gpu._protocols.Feed`."""
        return self._feed.make(selections)

    def deliver(self, made: object) -> TensorBatch:
        """See :class:`~hbx_gpu._protocols.Feed`."""
        batch: TensorBatch = self._feed.deliver(made)
        if self._there is None:
            self._there = self._masks.on(batch[MEASURED].device)
        return self._there.put_into(batch)

    def set_epoch(self, epoch: int) -> None:
        """See :class:`~hbx_gpu._protocols.Feed`."""
        self._feed.set_epoch(epoch)
