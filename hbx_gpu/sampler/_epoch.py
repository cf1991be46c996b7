"""Who gets which batch of an epoch, and where a run stands: ranks, rounds, seeds, resuming.

Orders live in :mod:`hbx_gpu.sampler`; nothing here knows what a group or a label is.
"""

from __future__ import annotations

import hashlib
import heapq
import logging
import operator
import secrets
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np

_TorchSampler: Any
try:
    from torch.utils.data import Sampler as _TorchSampler
except ImportError:  # orders are plain NumPy; only the isinstance check of torch users is lost
    _TorchSampler = object

logger = logging.getLogger("hbx_gpu.sampler")

_STATE_VERSION = 1
_STATE_KEYS = ("version", "order", "seed", "epoch", "cells", "world_size", "num_workers")


class EpochSampler(_TorchSampler):
    """An order cut into batches, dealt to ranks in rounds, resumable at every round.

    Global batch ``p`` of an epoch belongs to rank ``p % world_size``; a round is `world_size`
    consecutive batches, one for each rank.

    A subclass sets ``_n_epoch`` (cells that one epoch is made of) before it calls this constructor
    and defines three methods:

    - ``_sizes(rng)``: int64 (n_batches,), cells per batch in the order of time, each at least 1;
    - ``_cells(rng, lanes)``: int64, the cells of those batches one after the other. It may be longer than
      the sizes add up to; what lies beyond is never handed out;
    - ``_identity()``: what must be equal for a state to make sense, by name.

    Both methods get a generator in the same fresh state, a function of (seed, epoch) alone.

    Attributes
    ----------
    batch_size, drop_last, num_workers, rank, world_size
        As given, or as found in torch.distributed.
    seed
        The seed in use. Without one, a new seed is drawn for each iteration.
    epoch
        Set by :meth:`set_epoch`.
    """

    #: The last round re-cuts single batches instead of the cells of all of them together.
    _cut_inside_batches: ClassVar[bool] = False
    _n_epoch: int

    def __init__(
        self,
        *,
        batch_size: int,
        seed: int | None,
        drop_last: bool,
        num_workers: int,
        rank: int | None,
        world_size: int | None,
        random: bool = True,
    ) -> None:
        self.batch_size = at_least("batch_size", batch_size, 1)
        self.num_workers = at_least("num_workers", num_workers, 0)
        self.drop_last = bool(drop_last)
        self.rank, self.world_size = _find_rank(rank, world_size)
        if seed is None and random and self.world_size > 1:
            raise ValueError(
                f"seed=None with world_size={self.world_size}: every rank would draw its own order; "
                "pass the same seed on all ranks"
            )
        self._draws_seeds = seed is None and random
        self.seed = 0 if seed is None else at_least("seed", seed, 0)
        self.epoch = 0
        self._pending: _Progress | None = self._fresh()
        self._progress = self._pending
        n_cells = self._n_epoch if self.drop_last else int(self._sizes(self._pending.rng()).sum())
        if 0 < n_cells < self.world_size:
            raise ValueError(
                f"{n_cells} cells cannot be shared among {self.world_size} ranks: "
                "each rank needs at least one; use fewer ranks"
            )
        self._warn_of_loss()

    def set_epoch(self, epoch: int) -> None:
        """Choose the epoch of the next iteration.

        Naming the epoch that is set already changes nothing, so that a training loop may call this right
        after :meth:`load_state_dict` without losing its place. Any other epoch starts from its beginning.
        """
        epoch = at_least("epoch", epoch, 0)
        if epoch != self.epoch:
            self.epoch = epoch
            self._pending = self._fresh()

    def __len__(self) -> int:
        """Batches of this rank: in a resumed epoch what remains of it, until that iteration has ended."""
        progress = self._pending or self._progress
        if progress.done:
            progress = _Progress(self.seed, self.epoch, 0, self.world_size, self._lane_workers)
        return (len(self._edges(progress)) - 1) // self.world_size

    @property
    def n_dropped(self) -> int:
        """Cells that no rank gets in the epoch at hand."""
        return self._n_epoch - int(self._edges(self._pending or self._progress)[-1])

    def __iter__(self) -> Iterator[tuple[int, ...]]:
        # A generator on purpose: DataLoader with workers calls iter() twice and reads only the second,
        # so a resumed position may be taken up at the first next() only.
        for batch in self.batches():
            yield tuple(batch.tolist())

    def batches(self) -> Iterator[np.ndarray]:
        """This rank's batches as int64 arrays. Unlike ``iter()``, the call itself begins the iteration."""
        progress, self._pending = self._pending or self._fresh(), None
        self._progress = progress
        return self._walk(progress)

    def state_dict(self, delivered: int | None = None) -> dict[str, Any]:
        """Where this run stands, as plain ints and strings.

        Parameters
        ----------
        delivered
            Batches of this rank that the consumer has received since this iteration began. Loaders that read
            ahead must say so; by default it is what the sampler has yielded. Not looked at while the next
            iteration is still to begin (after :meth:`set_epoch` or :meth:`load_state_dict`).

        Returns
        -------
        dict
            Ranks move in step, so the state of any rank is the state of all; load one state on every rank.
        """
        progress = self._pending or self._progress
        rounds = progress.yielded
        if delivered is not None and self._pending is None:
            rounds = operator.index(delivered)
        if not 0 <= rounds <= progress.yielded:
            raise ValueError(
                f"delivered={rounds}, but this iteration has yielded {progress.yielded} batches; "
                "count from the beginning of the iteration at hand"
            )
        edges = self._edges(progress)
        # A finished epoch is finished on any number of ranks, whatever this number had to leave out.
        ended = rounds == (len(edges) - 1) // self.world_size
        return {
            "version": _STATE_VERSION,
            "order": self._fingerprint(),
            "seed": progress.seed,
            "epoch": progress.epoch,
            "cells": progress.total if ended else int(edges[rounds * self.world_size]),
            "world_size": progress.world_size,
            "num_workers": progress.num_workers,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue where `state` was taken, on any number of ranks and workers.

        The first iteration afterwards is what remains of the epoch in progress, in the very order the saved
        run would have gone through (its seed included); later iterations are whole epochs with this
        sampler's own lanes. A state taken at the end of an epoch leaves an empty remainder.

        Raises
        ------
        ValueError
            If the state is no sampler state, or belongs to another order: the message names each difference.
        """
        missing = [key for key in _STATE_KEYS if key not in state]
        if missing or state["version"] != _STATE_VERSION:
            raise ValueError(
                f"not a sampler state of version {_STATE_VERSION}: "
                + (f"it lacks {', '.join(missing)}" if missing else f"it has version {state['version']}")
            )
        mine, theirs = self._fingerprint(), state["order"]
        differing = [
            f"{name} (saved {theirs.get(name, 'nothing')}, here {mine.get(name, 'nothing')})"
            for name in sorted({*mine, *theirs})
            if mine.get(name) != theirs.get(name)
        ]
        if differing:
            raise ValueError(
                "this state belongs to another order; build the sampler as it was saved, or start the epoch "
                "anew without the state. Different: " + "; ".join(differing)
            )
        self.seed = at_least("seed of the state", state["seed"], 0)
        self.epoch = at_least("epoch of the state", state["epoch"], 0)
        progress = _Progress(
            self.seed,
            self.epoch,
            at_least("cells of the state", state["cells"], 0),
            at_least("world_size of the state", state["world_size"], 1),
            at_least("num_workers of the state", state["num_workers"], 1),
        )
        left = int(self._sizes(progress.rng()).sum()) - progress.start
        if left < 0:
            raise ValueError(
                f"the state has consumed {progress.start} cells, {-left} more than the epoch has"
            )
        self._pending = progress
        if left and len(self._edges(progress)) == 1:
            logger.warning(
                "%d cells remain of epoch %d, too few for %d ranks: they are left out",
                left,
                self.epoch,
                self.world_size,
            )

    def _sizes(self, rng: np.random.Generator) -> np.ndarray:
        raise NotImplementedError

    def _cells(self, rng: np.random.Generator, lanes: int) -> np.ndarray:
        raise NotImplementedError

    def _identity(self) -> dict[str, Any]:
        raise NotImplementedError

    @property
    def _lane_workers(self) -> int:
        return max(1, self.num_workers)

    def _fresh(self) -> _Progress:
        if self._draws_seeds:
            self.seed = secrets.randbits(63)
        return _Progress(self.seed, self.epoch, 0, self.world_size, self._lane_workers)

    def _edges(self, progress: _Progress) -> np.ndarray:
        """Where each batch handed out begins and ends in the epoch's cells: (rounds * world_size + 1,)."""
        if progress.edges is None:
            sizes = self._sizes(progress.rng())
            progress.total = int(sizes.sum())
            progress.edges = cut_rounds(
                sizes,
                start=progress.start,
                world_size=self.world_size,
                drop_last=self.drop_last,
                inside=self._cut_inside_batches,
            )
        return progress.edges

    def _walk(self, progress: _Progress) -> Iterator[np.ndarray]:
        edges = self._edges(progress)
        cells = self._cells(progress.rng(), progress.world_size * progress.num_workers)
        for p in range(self.rank, len(edges) - 1, self.world_size):
            progress.yielded += 1
            # A copy, so that a batch kept by the consumer does not keep the whole epoch.
            yield cells[edges[p] : edges[p + 1]].copy()
        progress.done = True

    def _fingerprint(self) -> dict[str, Any]:
        # Computed once: it hashes arrays of one entry per cell, and a state may be taken at every step.
        if not hasattr(self, "_order_id"):
            self._order_id = {
                "sampler": type(self).__name__,
                "batch_size": self.batch_size,
                "drop_last": self.drop_last,
                **self._identity(),
            }
        return dict(self._order_id)

    def _warn_of_loss(self) -> None:
        if self.rank == 0 and self.n_dropped:
            logger.warning(
                "%s leaves %d of %d cells out of every epoch (batch_size=%d, drop_last=%s, world_size=%d)",
                type(self).__name__,
                self.n_dropped,
                self._n_epoch,
                self.batch_size,
                self.drop_last,
                self.world_size,
            )


@dataclass(slots=True)
class _Progress:
    """One iteration: the order it walks, from which cell on, and how many batches it has yielded.

    `start` counts cells of the global order, which does not depend on the number of ranks that walk it;
    `world_size` and `num_workers` are those the order was made for.
    """

    seed: int
    epoch: int
    start: int
    world_size: int
    num_workers: int
    yielded: int = 0
    done: bool = False
    edges: np.ndarray | None = None
    total: int = 0

    def rng(self) -> np.random.Generator:
        return np.random.default_rng(np.random.SeedSequence([self.seed, self.epoch]))


def cut_rounds(
    sizes: np.ndarray, *, start: int, world_size: int, drop_last: bool, inside: bool = False
) -> np.ndarray:
    """Cut what follows cell `start` into rounds of one batch for each rank.

    Batches stay as they are, but for the last round: where batches are fewer than ranks, their cells are
    shared out evenly, or dropped with `drop_last`. Fewer cells than ranks are pooled with the round before,
    which then makes two rounds of smaller batches; where batches hold one cell, one round of up to two.

    Parameters
    ----------
    sizes
        int64 (n_batches,), cells per batch in the order of time.
    inside
        Share out by cutting single batches, so that none mixes the cells of two (label-pure batches).

    Returns
    -------
    numpy.ndarray
        int64 (rounds * world_size + 1,), positions in the epoch's cells; ``[start]`` if nothing can be dealt.
    """
    edges = np.concatenate([np.zeros(1, np.int64), np.cumsum(sizes, dtype=np.int64)])
    if start:
        edges = np.concatenate([[start], edges[np.searchsorted(edges, start, side="right") :]])
    full, rest = divmod(len(edges) - 1, world_size)
    keep = full * world_size
    if rest == 0 or drop_last:
        return edges[: keep + 1]
    n_pieces = world_size
    if edges[-1] - edges[keep] < world_size:
        if full == 0:
            return edges[:1]
        keep -= world_size
        if edges[-1] - edges[keep] >= 2 * world_size:
            n_pieces *= 2
    last = edges[keep:]
    if inside and n_pieces >= len(last) - 1:
        pieces = _cut_each(last, n_pieces)
    else:
        pieces = last[0] + (last[-1] - last[0]) * np.arange(n_pieces + 1) // n_pieces
    return np.concatenate([edges[:keep], pieces])


def _cut_each(edges: np.ndarray, n_pieces: int) -> np.ndarray:
    """Refine `edges` to n_pieces intervals, always halving on where the pieces are largest."""
    sizes = np.diff(edges).tolist()
    parts = [1] * len(sizes)
    heap = [(-size, i) for i, size in enumerate(sizes)]
    heapq.heapify(heap)
    for _ in range(n_pieces - len(sizes)):
        _, i = heap[0]
        parts[i] += 1
        heapq.heapreplace(heap, (-sizes[i] / parts[i], i))
    cuts = [
        lo + size * np.arange(n) // n for lo, size, n in zip(edges[:-1].tolist(), sizes, parts, strict=True)
    ]
    return np.concatenate([*cuts, edges[-1:]])


def batch_sizes(n_cells: int, batch_size: int, *, drop_last: bool) -> np.ndarray:
    """Sizes of the batches that n_cells are cut into, the last one partial or dropped."""
    full, rest = divmod(n_cells, batch_size)
    sizes = np.full(full + bool(rest and not drop_last), batch_size, np.int64)
    if rest and not drop_last:
        sizes[-1] = rest
    return sizes


def at_least(name: str, value: int, minimum: int) -> int:
    """`value` as an int, or an error that names it."""
    try:
        number = operator.index(value)
    except TypeError:
        raise TypeError(f"{name} must be an integer, got {value!r}") from None
    if number < minimum:
        raise ValueError(f"{name} must be at least {minimum}, got {number}")
    return number


def digest(*arrays: np.ndarray) -> str:
    """A short name for the content of arrays, for comparing states."""
    state = hashlib.blake2b(digest_size=8)
    for array in arrays:
        state.update(f"{array.dtype.str}{array.shape}".encode())
        state.update(np.ascontiguousarray(array).data)
    return state.hexdigest()


def _find_rank(rank: int | None, world_size: int | None) -> tuple[int, int]:
    if (rank is None) != (world_size is None):
        raise ValueError(
            f"pass both rank and world_size, or neither; got rank={rank}, world_size={world_size}"
        )
    if rank is None or world_size is None:
        # Whoever initialised torch.distributed has imported it.
        dist = sys.modules.get("torch.distributed")
        if dist is None or not (dist.is_available() and dist.is_initialized()):
            return 0, 1
        return dist.get_rank(), dist.get_world_size()
    world_size = at_least("world_size", world_size, 1)
    if not 0 <= operator.index(rank) < world_size:
        raise ValueError(f"rank must lie in 0 .. {world_size - 1} (world_size={world_size}), got {rank}")
    return operator.index(rank), world_size
