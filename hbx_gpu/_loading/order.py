"""The order that a loader follows: that of our samplers or of any batch sampler, and how it is resumed."""

from __future__ import annotations

import hashlib
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sized
from typing import Any, Protocol, runtime_checkable

import numpy as np
from torch.utils.data import DistributedSampler

_STATE_KEYS = ("epoch", "batches", "rows")


@runtime_checkable
class Order(Protocol):
    """Batches of row numbers, epoch after epoch; :class:`~hbx_gpu.sampler.EpochSampler` is one."""

    epoch: int

    @property
    def n_done(self) -> int:
        """Batches of the epoch that were handed over before the current iteration began."""

    def batches(self) -> Iterator[np.ndarray]:
        """Begin an iteration: int64 row numbers of each batch."""

    def __iter__(self) -> Iterator[list[int]]: ...

    def set_epoch(self, epoch: int) -> None:
        """Choose the epoch of the next iteration."""

    def state_dict(self, delivered: int | None = None) -> dict[str, object]:
        """Return the state after the consumer has received `delivered` batches of this iteration."""

    def load_state_dict(self, state: Mapping[str, object]) -> None:
        """Continue from a state with the next iteration."""


def as_order(sampler: Any) -> Order:
    """Return `sampler` itself if it is an order, or an order over a batch sampler."""
    if isinstance(sampler, Batches):
        return sampler.order
    return sampler if isinstance(sampler, Order) else GivenOrder(sampler)


class GivenOrder:
    """The batches of a torch batch sampler, or of any iterable of lists of row numbers.

    Such an order cannot begin in the middle. To continue, it is iterated again from its beginning, and
    batches that were done are skipped. A digest of the row numbers tells whether it is the same order.

    Parameters
    ----------
    sampler
        Batches of row numbers, which can be iterated any number of times.
    """

    def __init__(self, sampler: Iterable[Any]) -> None:
        self.sampler = sampler
        self.epoch = 0
        self._skip, self._digest = 0, ""
        self._begun: tuple[int, int] | None = None  # epoch and first batch of the running or last iteration
        self._digests: list[str] = []
        self._ended = False

    @property
    def batch_size(self) -> int | None:
        """Batch size of the sampler; None if it does not tell."""
        return getattr(self.sampler, "batch_size", None)

    @property
    def drop_last(self) -> bool:
        """Whether the sampler drops a partial batch, if it tells."""
        return bool(getattr(self.sampler, "drop_last", False))

    @property
    def n_done(self) -> int:
        """See :class:`Order`."""
        return self._skip if self._begun is None else self._begun[1]

    def __len__(self) -> int:
        if not isinstance(self.sampler, Sized):
            raise TypeError(f"a {type(self.sampler).__name__} does not tell how many batches it has")
        return len(self.sampler)

    def set_epoch(self, epoch: int) -> None:
        """See :class:`Order`; the sampler, and the sampler of rows inside it, are told too."""
        if epoch != self.epoch:
            self._skip, self._digest, self._begun = 0, "", None
        self.epoch = epoch
        for sampler in (self.sampler, getattr(self.sampler, "sampler", None)):
            told = getattr(sampler, "set_epoch", None)
            if callable(told):
                told(epoch)

    def __iter__(self) -> Iterator[list[int]]:
        for rows in self.batches():
            yield rows.tolist()

    def batches(self) -> Iterator[np.ndarray]:
        """See :class:`Order`.

        Raises
        ------
        ValueError
            The batches before the position differ from those of the saved run, or the sampler yields single
            row numbers instead of batches.
        """
        skip, expected = self._skip, self._digest
        self._begun, self._skip, self._digest = (self.epoch, skip), 0, ""
        self._digests, self._ended = [expected], False
        return self._walk(skip, expected, self._digests)

    def _walk(self, skip: int, expected: str, digests: list[str]) -> Iterator[np.ndarray]:
        digest, done = "", 0
        for batch in self.sampler:
            rows = _row_numbers(batch)
            digest = hashlib.blake2b(digest.encode() + rows.tobytes(), digest_size=8).hexdigest()
            done += 1
            if done <= skip:
                if done == skip and digest != expected:
                    raise ValueError(self._another_order(skip))
                continue
            digests.append(digest)
            yield rows
        if done < skip:
            raise ValueError(self._another_order(skip))
        if digests is self._digests:
            self._ended = True

    def _another_order(self, skip: int) -> str:
        return (
            f"the state was taken after {skip} batches, but those batches of this {_name(self.sampler)} hold "
            "other rows now. Use hbx_gpu.sampler.CellSampler, whose order follows from seed and epoch, or "
            "give the sampler a generator with the seed that it had"
        )

    def state_dict(self, delivered: int | None = None) -> dict[str, object]:
        """See :class:`Order`."""
        if self._begun is None:
            return {"epoch": self.epoch, "batches": self._skip, "rows": self._digest}
        epoch, skip = self._begun
        n = len(self._digests) - 1 if delivered is None else delivered
        length = len(self) if isinstance(self.sampler, Sized) else None
        if skip + n == length or (self._ended and n == len(self._digests) - 1):
            return {"epoch": epoch + 1, "batches": 0, "rows": ""}
        return {"epoch": epoch, "batches": skip + n, "rows": self._digests[n]}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """See :class:`Order`."""
        if missing := [key for key in _STATE_KEYS if key not in state]:
            raise ValueError(
                f"this state belongs to another kind of sampler (it lacks {', '.join(missing)}); load it "
                f"where the same kind of sampler is used, not into a {_name(self.sampler)}"
            )
        self.set_epoch(int(state["epoch"]))
        self._skip, self._digest, self._begun = int(state["batches"]), str(state["rows"]), None


def _row_numbers(batch: Any) -> np.ndarray:
    if np.ndim(batch) == 0:
        raise ValueError(
            f"the sampler yields row numbers one by one (the first is {batch!r}), not batches of them: pass "
            "batch_size= beside it, or a batch sampler such as hbx_gpu.sampler.CellSampler"
        )
    return np.asarray(batch, dtype=np.int64)


def _name(sampler: object) -> str:
    return type(sampler).__name__


class Batches:
    """The `batch_sampler` of a loader, with the attributes that frameworks look for.

    Lightning, for example, calls `set_epoch` on its `sampler` only, and makes another one of its class from
    that sampler when it predicts.

    Parameters
    ----------
    sampler
        Sampler of the rows of the order.
    batch_size, drop_last
        Batch size of the order, and whether it drops a partial batch. Warns where the order leaves rows out
        and `drop_last` does not ask for it.
    """

    def __init__(self, sampler: RankSampler, batch_size: int | None = None, drop_last: bool = False) -> None:
        if getattr(sampler.order, "drop_last", False) and not drop_last:
            warnings.warn(
                "the sampler leaves out the last rows of an epoch, and so will what is predicted from it: "
                "make it with drop_last=False",
                stacklevel=2,
            )
        self.sampler = sampler
        self.batch_size = batch_size
        self.drop_last = drop_last

    @classmethod
    def of(cls, order: Order) -> Batches:
        """The batches of an order."""
        size, drop_last = getattr(order, "batch_size", None), getattr(order, "drop_last", False)
        return cls(RankSampler(order), size, drop_last)

    @property
    def order(self) -> Order:
        """Order that the batches come from."""
        return self.sampler.order

    def __iter__(self) -> Iterator[list[int]]:
        return iter(self.order)

    def __len__(self) -> int:
        return len(self.order)  # type: ignore[arg-type]

    def set_epoch(self, epoch: int) -> None:
        """Choose the epoch of the next iteration."""
        self.order.set_epoch(epoch)


class RankSampler(DistributedSampler[int]):
    """The rows of this rank, one by one, as a sampler that frameworks recognize as distributed.

    Frameworks do not replace such a sampler, and they tell it the epoch. It needs no process group: the order
    finds its ranks when an iteration begins.

    Parameters
    ----------
    order
        The order whose rows the sampler yields.
    """

    def __init__(self, order: Order) -> None:  # the constructor of torch asks for a process group
        self.order = order

    @property
    def epoch(self) -> int:  # type: ignore[override]
        """Epoch of the order."""
        return self.order.epoch

    @property
    def rank(self) -> int:  # type: ignore[override]
        """Rank of the order, 0 if it does not know of ranks."""
        return int(getattr(self.order, "rank", 0))

    @property
    def num_replicas(self) -> int:  # type: ignore[override]
        """Number of ranks of the order, 1 if it does not know of ranks."""
        return int(getattr(self.order, "world_size", 1))

    def __iter__(self) -> Iterator[int]:
        for batch in self.order:
            yield from batch

    def __len__(self) -> int:
        raise TypeError("rows are counted in batches: take len() of the loader or of its batch_sampler")

    def set_epoch(self, epoch: int) -> None:
        """See :class:`Order`."""
        self.order.set_epoch(epoch)
