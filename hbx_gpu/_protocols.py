"""The protocols of loading: `Loadable` (what a loader takes), `Collate` and `Feed`.

Each protocol has a suite in ``tests/conformance`` that every implementation passes.
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
"""A batch for a training loop: tensors and other columns by name, or such dicts by feature space."""
Widths: TypeAlias = int | Mapping[str, int]
"""Number of columns; for multimodal datasets, the number for each space."""

BatchT_co = TypeVar("BatchT_co", covariant=True)
BatchT_contra = TypeVar("BatchT_contra", contravariant=True)
OutT_co = TypeVar("OutT_co", covariant=True)
MadeT = TypeVar("MadeT")


@runtime_checkable
class Collate(Protocol[BatchT_contra, OutT_co]):
    """Turns a batch into what a training loop receives. It may be called on several threads at once.

    Attributes
    ----------
    sparse
        Whether the collate makes CSR tensors of sparse batches.
    on_device
        Whether the collate makes tensors on a GPU.
    """

    @property
    def sparse(self) -> bool: ...

    @property
    def on_device(self) -> bool: ...

    def __call__(self, batch: BatchT_contra) -> OutT_co:
        """Return what the training loop receives."""

    def nbytes(self, n_rows: int, n_features: Any, /) -> int:
        """Return the bytes that are allocated for a batch of `n_rows` rows; 0 if that is not known."""

    def set_epoch(self, epoch: int) -> None:
        """Set the epoch that comes next; random augmentations, for example, depend on it."""


class Collating:
    """Base of most collates: they make dense tensors on the host, and do not tell sizes in advance."""

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
        Whether every window must hold one batch, because the feed cannot tell batches of a window apart.
    """

    one_batch_per_window: bool

    def checked(self, batches: Sequence[Rows]) -> list[np.ndarray]:
        """Check the row numbers of several batches; return them in the form that the other methods take.

        Raises
        ------
        IndexError
            A row number is out of range.
        """

    def nbytes(self, selections: Sequence[np.ndarray]) -> list[int]:
        """Return the bytes that each batch takes up until it is handed over, as far as that is known."""

    def make(self, selections: Sequence[np.ndarray]) -> list[MadeT]:
        """Make one entry per batch of a window; called on threads of the loader."""

    def deliver(self, made: MadeT) -> OutT_co:
        """Return what the consumer receives and owns for an entry; called on the consumer's thread."""

    def set_epoch(self, epoch: int) -> None:
        """Set the epoch that comes next."""


AnyCollate: TypeAlias = Collate[Any, Any]
CollateFunction: TypeAlias = Callable[[Any], Any]
"""A function of the user's that turns a batch into what the training loop receives."""
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
        """Read several batches under one plan."""

    def rows_nbytes(self, selections: Sequence[np.ndarray]) -> list[int]:
        """Return the bytes of each of several batches, without metadata."""

    def with_row_numbers(self) -> Loadable[BatchT_co]:
        """This dataset with row numbers as metadata column ``index`` of its batches."""

    def with_wide_columns(self) -> Loadable[BatchT_co]:
        """Return this dataset with sparse batches that become CSR tensors without a copy."""

    def collate_with(self, collate: AnyCollate) -> AnyCollate:
        """Adapt a collate for batches of cells to this dataset's batches."""

    def feed_with(self, make: Callable[[AnyLoadable], AnyFeed]) -> AnyFeed:
        """Make a feed of this dataset on a device; `make` makes a feed of a dataset of cells."""


AnyLoadable: TypeAlias = Loadable[Any]
"""A dataset of any batches."""


@runtime_checkable
class Chunked(Protocol):
    """A dataset whose stored chunks can be read in other ways, and kept."""

    @property
    def reader_kind(self) -> str:
        """``"mmap"`` or ``"preadv"``: how compressed bytes are read unless something else is asked for."""

    def __len__(self) -> int: ...

    def read_rows(self, selections: Sequence[np.ndarray]) -> Sequence[object]:
        """See :meth:`Loadable.read_rows`."""

    def open_reader(self, kind: str) -> Reader:
        """A reader of its chunks: ``"mmap"``, ``"preadv"`` or ``"pinned"``."""

    def reading_with(self, reader: Reader) -> Self:
        """This dataset with another reader of its chunks; everything else is shared."""

    def needed_chunks(self) -> np.ndarray:
        """Return the chunks that any row needs, int64, in an order whose beginning serves whole rows."""
