"""The order that a loader follows: that of our samplers or of any batch sampler, and how it is resumed."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator, Mapping, Sized
from typing import Any, Protocol, runtime_checkable

import numpy as np
from numpy.typing import ArrayLike

from hbx_gpu._loading.sampler_attributes import OfEpochs, batch_size_of, drops_last

_STATE_KEYS = ("epoch", "batches", "rows")


@runtime_checkable
class Order(Protocol):
    """Batches of row numbers, epoch after epoch; :class:`~hbx_gpu.sampler.EpochSampler` is one."""

    epoch: int

    @property
    def n_done(self) -> int:
        """Batches of the epoch that were handed over before the current iteration began."""

    @property
    def resumed(self) -> bool:
        """Whether the next iteration continues from a loaded state."""

    def batches(self) -> Iterator[np.ndarray]:
        """Begin an iteration: int64 row numbers of each batch."""

    def __iter__(self) -> Iterator[list[int]]: ...

    def set_epoch(self, epoch: int) -> None:
        """Choose the epoch of the next iteration."""

    def state_dict(self, delivered: int | None = None) -> dict[str, object]:
        """Return the state after the consumer has received `delivered` batches of this iteration."""

    def load_state_dict(self, state: Mapping[str, object]) -> None:
        """Continue from a state with the next iteration."""


@runtime_checkable
class Ranked(Protocol):
    """A sampler that yields what one rank of several gets, as torch's ``DistributedSampler`` does."""

    rank: int
    num_replicas: int


@runtime_checkable
class _OverRows(Protocol):
    """A batch sampler that takes the rows of its batches from another sampler."""

    sampler: object


def cannot_be_iterated(sampler: object) -> TypeError:
    """The error for a sampler that yields nothing."""
    return TypeError(f"a sampler yields row numbers, and a {type(sampler).__name__} cannot be iterated")


class GivenOrder:
    """The batches of a torch batch sampler, or of any iterable of lists of row numbers.

    Such an order cannot begin in the middle. To continue, it is iterated again from its beginning, and
    batches that were done are skipped. A digest of the row numbers tells whether it is the same order.

    Parameters
    ----------
    sampler
        Batches of row numbers, which can be iterated any number of times.
    """

    def __init__(self, sampler: Iterable[ArrayLike]) -> None:
        self.sampler = sampler
        self.epoch = 0
        self._skip, self._digest = 0, ""
        self.resumed = False
        self._begun: tuple[int, int] | None = None  # epoch and first batch of the running or last iteration
        self._digests: list[str] = []
        self._ended = False

    @property
    def batch_size(self) -> int | None:
        """Batch size of the sampler; None if it does not tell."""
        return batch_size_of(self.sampler)

    @property
    def drop_last(self) -> bool:
        """Whether the sampler drops a partial batch, if it tells."""
        return drops_last(self.sampler)

    @property
    def rows(self) -> object:
        """The sampler of rows inside a batch sampler; None where there is none."""
        return self.sampler.sampler if isinstance(self.sampler, _OverRows) else None

    @property
    def ranked(self) -> Ranked | None:
        """The batch sampler, or the sampler of rows inside it, that knows its rank; None if neither does."""
        return next((found for found in (self.sampler, self.rows) if isinstance(found, Ranked)), None)

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
            self.resumed = False
        self.epoch = epoch
        for sampler in (self.sampler, self.rows):
            if isinstance(sampler, OfEpochs):
                sampler.set_epoch(epoch)

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
        self._digests, self._ended, self.resumed = [expected], False, False
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
        self.resumed = True


def _row_numbers(batch: ArrayLike) -> np.ndarray:
    if np.ndim(batch) == 0:
        raise ValueError(
            f"the sampler yields row numbers one by one (the first is {batch!r}), not batches of them: pass "
            "batch_size= beside it, or a batch sampler such as hbx_gpu.sampler.CellSampler"
        )
    return np.asarray(batch, dtype=np.int64)


def _name(sampler: object) -> str:
    return type(sampler).__name__
