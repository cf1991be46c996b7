"""Any map-style dataset of the user's, as what a loader takes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Protocol, Self, runtime_checkable

import numpy as np

from hbx_gpu._datasets.base import Dataset
from hbx_gpu._protocols import Loadable, Rows
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
    """A dataset that the loader knows nothing of: batches one by one, of a size that nobody can tell.

    Parameters
    ----------
    dataset
        With ``__getitems__``, or ``__getitem__`` for one row, whose list is the batch.
    """

    n_features = 0
    columns: Mapping[str, np.ndarray] = {}

    def __init__(self, dataset: MapStyle | Batched) -> None:
        self.dataset = dataset

    def __len__(self) -> int:
        return 0 if isinstance(self.dataset, Batched) else len(self.dataset)

    def checked(self, batches: Sequence[Rows]) -> list[np.ndarray]:
        """The batches as they are: their elements are keys of the user's."""
        return list(batches)  # type: ignore[arg-type]

    def read_rows(self, selections: Sequence[np.ndarray]) -> list[object]:
        """See :meth:`Dataset.read_rows`."""
        if isinstance(self.dataset, Batched):
            return [self.dataset.__getitems__(rows) for rows in selections]
        return [[self.dataset[row] for row in rows] for rows in selections]

    def rows_nbytes(self, selections: Sequence[np.ndarray]) -> list[int]:
        """Zeros."""
        return [0] * len(selections)

    def with_row_numbers(self) -> Self:
        """Raises UnsupportedError: what makes tensors of its batches is the user's business."""
        raise UnsupportedError(
            f"layout= is for the datasets of hbx_gpu; pass a collate_fn for a {type(self.dataset).__name__}"
        )


@runtime_checkable
class HasCells(Protocol):
    """What makes a dataset of cells of itself: an SCDL archive, a query."""

    def to_cell_dataset(self) -> Dataset[Any]:
        """The dataset."""


def loadable(dataset: object) -> Loadable[Any]:
    """What a loader was given, as it takes it."""
    if isinstance(dataset, HasCells):
        return dataset.to_cell_dataset()
    return dataset if isinstance(dataset, Loadable) else PlainDataset(dataset)  # type: ignore[arg-type]
