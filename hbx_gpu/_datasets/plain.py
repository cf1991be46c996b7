"""Make any map-style dataset of the user a `Loadable`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Protocol, Self, runtime_checkable

import numpy as np

from hbx_gpu._datasets.base import Dataset
from hbx_gpu._protocols import AnyLoadable, Loadable, Rows
from hbx_gpu.errors import UnsupportedError


class MapStyle(Protocol):
    """Rows one by one."""

    def __getitem__(self, row: int, /) -> object: ...

    def __len__(self) -> int: ...


@runtime_checkable
class Batched(Protocol):
    """Rows of a whole batch at once, as torch asks for them where it can."""

    def __getitems__(self, rows: Rows, /) -> object: ...


class PlainDataset(Dataset[object]):
    """A dataset of the user: it is read batch by batch, and the bytes of a batch are not known in advance.

    Parameters
    ----------
    dataset
        Dataset with ``__getitems__``, or with ``__getitem__`` for one row, in which case a batch is a list.
    """

    n_features = 0
    columns: Mapping[str, np.ndarray] = {}

    def __init__(self, dataset: MapStyle | Batched) -> None:
        self.dataset = dataset

    def __len__(self) -> int:
        return 0 if isinstance(self.dataset, Batched) else len(self.dataset)

    def checked(self, batches: Sequence[Rows]) -> list[np.ndarray]:
        """Return the batches as they are, because their elements are keys of the user's dataset."""
        return list(batches)  # type: ignore[arg-type]

    def read_rows(self, selections: Sequence[np.ndarray]) -> list[object]:
        """See :meth:`Dataset.read_rows`."""
        if isinstance(self.dataset, Batched):
            return [self.dataset.__getitems__(rows) for rows in selections]
        return [[self.dataset[row] for row in rows] for rows in selections]

    def rows_nbytes(self, selections: Sequence[np.ndarray]) -> list[int]:
        """Return zeros, because sizes are not known."""
        return [0] * len(selections)

    def with_row_numbers(self) -> Self:
        """Raises UnsupportedError: what makes tensors of its batches is the user's business."""
        raise UnsupportedError(
            f"layout= is for the datasets of hbx_gpu; pass a collate_fn for a {type(self.dataset).__name__}"
        )


@runtime_checkable
class HasCells(Protocol):
    """An object that can return a dataset of cells, such as an SCDL archive or a query."""

    def to_cell_dataset(self) -> Dataset[Any]:
        """Return the dataset."""


def loadable(dataset: object) -> AnyLoadable:
    """Return `dataset` itself or an adapter of it as a `Loadable`."""
    if isinstance(dataset, HasCells):
        return dataset.to_cell_dataset()
    return dataset if isinstance(dataset, Loadable) else PlainDataset(dataset)  # type: ignore[arg-type]
