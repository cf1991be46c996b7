"""The seams of loading: what a loader takes, what makes tensors of its batches, what feeds it.

Each has one suite in ``tests/conformance`` that every implementation passes.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Protocol, Self, TypeAlias, TypeVar, runtime_checkable

import numpy as np

if TYPE_CHECKING:
    from hbx_gpu._storage.readers import Reader

Rows: TypeAlias = Sequence[int] | np.ndarray
"""Row numbers of one batch, as a sampler or a user gives them."""
TensorBatch: TypeAlias = dict[str, Any]
"""What a training loop receives: tensors by name, columns that are not numbers, dicts of either by space."""
Widths: TypeAlias = int | Mapping[str, int]
"""Number of columns; by space for multimodal datasets."""

BatchT_co = TypeVar("BatchT_co", covariant=True)
BatchT_contra = TypeVar("BatchT_contra", contravariant=True)
OutT_co = TypeVar("OutT_co", covariant=True)
MadeT = TypeVar("MadeT")


@runtime_checkable
class Collate(Protocol[BatchT_contra, OutT_co]):
    """Makes what a training loop receives of a batch. May be called on several threads at once.

    Attributes
    ----------
    sparse
        Whether it makes CSR tensors of sparse batches.
    on_device
        Whether it makes tensors on a GPU.
    """

    @property
    def sparse(self) -> bool: ...

    @property
    def on_device(self) -> bool: ...

    def __call__(self, batch: BatchT_contra) -> OutT_co:
        """What the training loop receives."""

    def nbytes(self, n_rows: int, n_features: Any, /) -> int:
        """Bytes that it allocates for a batch of so many rows, as far as it can tell; else 0."""

    def set_epoch(self, epoch: int) -> None:
        """Learn which epoch comes next, where what is made depends on it."""


class Collating:
    """What most collates have in common: dense tensors on the host, of sizes that they do not tell."""

    @property
    def sparse(self) -> bool:
        return False

    @property
    def on_device(self) -> bool:
        return False

    def nbytes(self, n_rows: int, n_features: Any, /) -> int:  # noqa: ARG002
        """See :class:`Collate`."""
        return 0

    def set_epoch(self, epoch: int) -> None:
        """See :class:`Collate`."""


@runtime_checkable
class Feed(Protocol[MadeT, OutT_co]):
    """Makes windows of batches, on several threads at once, and hands them over one by one, in order.

    Attributes
    ----------
    one_batch_per_window
        Whether batches of one window could not be told apart.
    """

    one_batch_per_window: bool

    def checked(self, batches: Sequence[Rows]) -> list[np.ndarray]:
        """Row numbers of several batches as the other methods take them; looked at here and nowhere else.

        Raises
        ------
        IndexError
            A row number is out of range.
        """

    def nbytes(self, selections: Sequence[np.ndarray]) -> list[int]:
        """Bytes that each batch takes up until it is handed over, as far as that can be told."""

    def make(self, selections: Sequence[np.ndarray]) -> list[MadeT]:
        """One entry per batch of a window; called on threads of the loader."""

    def deliver(self, made: MadeT) -> OutT_co:
        """What the consumer receives for an entry, and owns from then on; called on its thread."""

    def set_epoch(self, epoch: int) -> None:
        """Learn which epoch comes next."""


AnyCollate: TypeAlias = Collate[Any, Any]
AnyFeed: TypeAlias = Feed[Any, Any]


@runtime_checkable
class Loadable(Protocol[BatchT_co]):
    """What a loader takes: cells by row number, read batch by batch.

    Methods that take `selections` take row numbers that `checked` has returned.
    """

    @property
    def n_features(self) -> Widths:
        """Width of dense matrices of the rows."""

    @property
    def columns(self) -> Mapping[str, np.ndarray]:
        """Metadata columns of all rows that batches carry."""

    def __len__(self) -> int: ...

    def __getitems__(self, rows: Rows) -> BatchT_co:
        """One batch, as worker processes of torch ask for it."""

    def checked(self, batches: Sequence[Rows]) -> list[np.ndarray]:
        """Row numbers of several batches, int64 in ``[0, len(self))``; see :meth:`Feed.checked`."""

    def read_rows(self, selections: Sequence[np.ndarray]) -> Sequence[BatchT_co]:
        """Several batches under one plan."""

    def rows_nbytes(self, selections: Sequence[np.ndarray]) -> list[int]:
        """Bytes of each of several batches, metadata aside."""

    def with_row_numbers(self) -> Loadable[BatchT_co]:
        """This dataset with row numbers as metadata column ``index`` of its batches."""

    def with_wide_columns(self) -> Loadable[BatchT_co]:
        """This dataset with sparse batches of which CSR tensors are made without a copy."""

    def collate_with(self, collate: AnyCollate) -> AnyCollate:
        """A collate for its batches from one for batches of cells."""

    def feed_with(self, make: Callable[[Any], AnyFeed]) -> AnyFeed:
        """A feed of it on a device, from what makes one for datasets of cells."""


@runtime_checkable
class Chunked(Protocol):
    """A dataset whose stored chunks can be read in other ways, and kept."""

    @property
    def reader_kind(self) -> str:
        """``"mmap"`` or ``"preadv"``: how compressed bytes are read unless something else is asked for."""

    def __len__(self) -> int: ...

    def read_rows(self, selections: Sequence[np.ndarray]) -> Sequence[Any]:
        """See :meth:`Loadable.read_rows`."""

    def open_reader(self, kind: str) -> Reader:
        """A reader of its chunks: ``"mmap"``, ``"preadv"`` or ``"pinned"``."""

    def reading_with(self, reader: Reader) -> Self:
        """This dataset with another reader of its chunks; everything else is shared."""

    def needed_chunks(self) -> np.ndarray:
        """int64. Chunks that any row needs, in an order whose beginning serves whole rows."""
