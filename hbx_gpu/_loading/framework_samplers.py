"""What frameworks see of a loader's order: a batch sampler and a sampler of rows.

Frameworks look at these two to find out whether a loader shuffles and whether it knows of ranks, tell them
the epoch, and put others in their place.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Iterator, Sized
from typing import Protocol, runtime_checkable

import numpy as np
from torch.utils.data import BatchSampler, DistributedSampler, RandomSampler, Sampler, SequentialSampler

from hbx_gpu._loading.order import GivenOrder, Order, cannot_be_iterated
from hbx_gpu._loading.sampler_attributes import batch_size_of, drops_last
from hbx_gpu._source import GroupRuns
from hbx_gpu.sampler import CellSampler, EpochSampler, NeighborSampler


class Rows(Sampler[int]):
    """The rows of an order, one by one.

    Parameters
    ----------
    order
        The order whose rows the sampler yields.
    """

    def __init__(self, order: Order) -> None:
        self.order = order
        self._ahead_of_framework = 0

    def __iter__(self) -> Iterator[int]:
        for batch in self.order:
            yield from batch

    def __len__(self) -> int:
        rows = self.order.rows if isinstance(self.order, GivenOrder) else None
        if not isinstance(rows, Sized):
            raise TypeError("rows are counted in batches: take len() of the loader or of its batch_sampler")
        return len(rows)

    def set_epoch(self, epoch: int) -> None:
        """Hear the epoch of the next iteration from a framework.

        Lightning's Trainer counts on after a checkpoint was loaded, while Fabric counts from 0 in each
        process. So an epoch before that of a loaded state does not drop the position. If the framework
        iterates under that number, its next numbers are taken relative to it.
        """
        if self.order.resumed:
            self._ahead_of_framework = max(0, self.order.epoch - epoch)
            if self._ahead_of_framework:
                return
        self.order.set_epoch(epoch + self._ahead_of_framework)


class RandomRows(Rows, RandomSampler):
    """The rows of an order from a ``RandomSampler``: frameworks put one that knows of ranks in its place."""

    def __init__(self, order: Order, given: RandomSampler) -> None:
        # One namespace: accelerate gives the sampler that it sees a generator, so that processes draw alike.
        self.__dict__ = vars(given)
        super().__init__(order)


class SequentialRows(Rows, SequentialSampler):
    """The rows of an order from a ``SequentialSampler``; see :class:`RandomRows`."""

    def __init__(self, order: Order, given: SequentialSampler) -> None:
        self.__dict__ = vars(given)
        super().__init__(order)


class RankSampler(Rows, DistributedSampler[int]):
    """The rows of this rank: frameworks do not replace such a sampler.

    It needs no process group. The order finds its ranks when an iteration begins.
    """

    @property
    def epoch(self) -> int:  # type: ignore[override]
        """Epoch of the order."""
        return self.order.epoch

    @property
    def rank(self) -> int:  # type: ignore[override]
        """Rank of the order."""
        return self._rank_and_world()[0]

    @property
    def num_replicas(self) -> int:  # type: ignore[override]
        """Number of ranks of the order."""
        return self._rank_and_world()[1]

    def _rank_and_world(self) -> tuple[int, int]:
        if isinstance(self.order, GivenOrder):
            ranked = self.order.ranked
            return (0, 1) if ranked is None else (ranked.rank, ranked.num_replicas)
        if isinstance(self.order, EpochSampler | NeighborSampler):
            return self.order.rank, self.order.world_size
        return 0, 1


def shown(order: Order) -> Rows:
    """Return the sampler of rows that frameworks shall see of an order.

    An order of a torch sampler that does not know of ranks is shown as what it is, because every rank would
    get all of its rows otherwise.
    """
    if not isinstance(order, GivenOrder) or order.ranked is not None:
        return RankSampler(order)
    if isinstance(order.rows, RandomSampler):
        return RandomRows(order, order.rows)
    if isinstance(order.rows, SequentialSampler):
        return SequentialRows(order, order.rows)
    return Rows(order)


class Batches:
    """The `batch_sampler` of a loader, with the attributes that frameworks look for.

    Lightning, for example, calls `set_epoch` on its `sampler` only, and makes another object of this class
    from a sampler when it predicts, when it overfits some batches, and where the ranks are not known.

    Parameters
    ----------
    sampler
        Sampler of rows: :class:`Rows` of an order, or one that a framework put in its place. Of the latter, a
        ``SequentialSampler`` is dealt to ranks; any other one must know its rank itself.
    batch_size, drop_last
        Rows of a batch, and whether a partial batch is dropped. Warns where an order leaves rows out and
        `drop_last` does not ask for it.

    Raises
    ------
    ValueError
        A framework put another sampler in the place of one that does not tell its batch size.
    """

    def __init__(self, sampler: Sampler[int], batch_size: int | None = None, drop_last: bool = False) -> None:
        self.batch_size = batch_size
        self.drop_last = drop_last
        self._in_dataset_order: int | None = None  # number of rows, where a framework asked for this order
        self.order = self._order_of(sampler)
        self.sampler: Sampler[int] = sampler if isinstance(sampler, Rows) else shown(self.order)
        self._followed: Sampler[int] = self.sampler

    @classmethod
    def of(cls, order: Order) -> Batches:
        """The batches of an order."""
        return cls(shown(order), batch_size_of(order), drops_last(order))

    def within(self, rows: np.ndarray | None) -> Batches:
        """Return the same batches in the order of the dataset, but of these rows only.

        Parameters
        ----------
        rows
            Row numbers that the replaced sampler drew from; None: all.
        """
        if rows is None or self._in_dataset_order is None or self.batch_size is None:
            return self
        groups = GroupRuns.one(self._in_dataset_order)
        some = CellSampler(groups, self.batch_size, False, None, self.drop_last, rows=np.sort(rows))
        return Batches(shown(some), self.batch_size, self.drop_last)

    def _order_of(self, sampler: Sampler[int]) -> Order:
        if isinstance(sampler, Rows):
            if drops_last(sampler.order) and not self.drop_last:
                warnings.warn(
                    "the sampler leaves out the last rows of an epoch, and so will what is predicted from "
                    "it: make it with drop_last=False",
                    stacklevel=3,
                )
            return sampler.order
        if self.batch_size is None:
            raise ValueError(
                f"a framework put a {type(sampler).__name__} in the place of this loader's sampler, which "
                "does not tell its batch_size: give make_loader a CellSampler, which knows of ranks, or a "
                "batch sampler with the attributes batch_size and drop_last"
            )
        if isinstance(sampler, SequentialSampler):
            self._in_dataset_order = len(sampler)
            return CellSampler(
                GroupRuns.one(len(sampler)), self.batch_size, shuffle=False, drop_last=self.drop_last
            )
        return GivenOrder(BatchSampler(sampler, self.batch_size, self.drop_last))

    def _follow(self) -> Order:
        """The order, made anew if a framework assigned another sampler."""
        if self.sampler is not self._followed:
            self.order = self._order_of(self.sampler)
            self._followed = self.sampler
        return self.order

    def __iter__(self) -> Iterator[list[int]]:
        return iter(self._follow())

    def __len__(self) -> int:
        return len(self._follow())  # type: ignore[arg-type]

    def set_epoch(self, epoch: int) -> None:
        """Choose the epoch of the next iteration."""
        self._follow().set_epoch(epoch)


@runtime_checkable
class HasOrder(Protocol):
    """:class:`Batches`, or what a framework put around them with all of their attributes."""

    order: Order


def as_order(sampler: object, *, inner: bool = False) -> Order:
    """Return `sampler` itself if it is an order, or an order over a batch sampler.

    Parameters
    ----------
    sampler
        An order, :class:`Batches`, or any sampler of batches.
    inner
        Whether to look into what a framework put around :class:`Batches` too.
    """
    if isinstance(sampler, Batches) or (inner and isinstance(sampler, HasOrder)):
        return sampler.order
    if isinstance(sampler, Order):
        return sampler
    if not isinstance(sampler, Iterable):
        raise cannot_be_iterated(sampler)
    return GivenOrder(sampler)
