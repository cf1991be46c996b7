"""Deal the batches of an epoch to ranks, and save and resume positions.

The other modules of :mod:`hbx_gpu.sampler` define orders; this one knows nothing of groups or labels.
"""

from __future__ import annotations

import logging
import operator
import secrets
import warnings
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np

from hbx_gpu.sampler._orders import EpochOrder
from hbx_gpu.sampler._position import (
    EpochKey,
    Progress,
    at_least,
    caller_depth,
    checked_rank,
    distributed_rank,
)
from hbx_gpu.sampler._rounds import Edges, Sizes, cut, least_per_rank, n_smaller, total

if TYPE_CHECKING:
    from torch.utils.data import Sampler

    _TorchSampler = Sampler[list[int]]
else:
    try:
        from torch.utils.data import Sampler as _TorchSampler
    except ImportError:  # orders are plain NumPy; only the isinstance check of torch users is lost
        _TorchSampler = object

logger = logging.getLogger("hbx_gpu.sampler")

_STATE_VERSION = 3
_STATE_KEYS = ("version", "order", "seed", "epoch", "cells", "batches", "world_size", "num_workers")


class EpochSampler(_TorchSampler):
    """An order cut into batches, dealt to ranks in rounds, resumable at every round.

    Global batch ``p`` of an epoch belongs to rank ``p % world_size``; a round is `world_size`
    consecutive batches, one for each rank.

    A subclass sets ``_n_epoch`` (cells that one epoch is made of) before it calls this constructor
    and defines three methods:

    - ``_sizes(key)``: cells per batch in the order of time, each at least 1: :class:`~._rounds.Even`, or
      int64 (n_batches,);
    - ``_order(key, lanes)``: an :class:`~hbx_gpu.sampler._orders.EpochOrder` of the cells of those batches.
      It may be longer than the sizes add up to; what lies beyond is never handed out;
    - ``_identity()``: what must be equal for a state to make sense, by name.

    The key is the only source of randomness, a function of (seed, epoch) alone.

    Attributes
    ----------
    batch_size, drop_last, num_workers
        The arguments of these names.
    seed
        The seed in use. Without one, a new seed is drawn for each iteration; several ranks, which must agree,
        take 0.
    epoch
        Epoch of the running or the next iteration.
    """

    #: The last round re-cuts single batches instead of the cells of all of them together.
    _cut_inside_batches: ClassVar[bool] = False
    #: Several ranks leave out an incomplete last round, because batches cannot be cut.
    _whole_batches: bool = False
    _n_epoch: int
    _order_id: dict[str, object] | None = None

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
        self._given_rank = checked_rank(rank, world_size)
        self._draws_seeds = seed is None and random
        self.seed = 0 if seed is None else at_least("seed", seed, 0)
        self.epoch = 0
        self._next_seed: int | None = None
        self._told_of_loss = self._told_of_single_cells = False
        self._pending: Progress | None = self._fresh()
        self._progress = self._pending
        self._check_world()

    @property
    def rank(self) -> int:
        """The rank given, else that of torch.distributed, else that of the launcher, else 0."""
        return self._rank_and_world()[0]

    @property
    def world_size(self) -> int:
        """The number of ranks given, else that of torch.distributed, else that of the launcher, else 1."""
        return self._rank_and_world()[1]

    def _rank_and_world(self) -> tuple[int, int]:
        return self._given_rank or distributed_rank()

    @property
    def resumed(self) -> bool:
        """Whether the next iteration continues from a loaded state."""
        return self._pending is not None and self._pending.loaded

    @property
    def n_done(self) -> int:
        """Batches of this rank in the epoch that came before the iteration at hand, in a run that was saved.

        On another number of ranks than there, as many as make up the whole epoch together with the rest.
        """
        return self._before(self._at_hand())

    def set_epoch(self, epoch: int) -> None:
        """Choose the epoch of the next iteration.

        Naming the epoch that is set already changes nothing, so that a training loop may call this right
        after :meth:`load_state_dict` without losing its place. Any other epoch starts from its beginning; if
        that drops a position that was loaded and not used yet, a warning says so.
        """
        epoch = at_least("epoch", epoch, 0)
        if epoch == self.epoch:
            return
        if self.resumed:
            assert self._pending is not None
            warnings.warn(
                f"set_epoch({epoch}) drops the position that was loaded from a state: epoch {self.epoch}, "
                f"after {self._pending.start:,} cells. To continue there, begin the loop with the epoch of "
                "the state: for epoch in range(loader.epoch, n_epochs): loader.set_epoch(epoch)",
                stacklevel=caller_depth(),
            )
        self.epoch = epoch
        self._pending = self._fresh()

    def __len__(self) -> int:
        """Batches of this rank in the whole epoch; in a resumed one, with those that came before."""
        progress = self._at_hand()
        if progress.done:
            progress = self._fresh_at(self.seed)
        return self._before(progress) + self._n_rounds(progress)

    @property
    def n_dropped(self) -> int:
        """Cells that no rank gets in the epoch at hand."""
        return self._n_epoch - self._edges(self._at_hand())[-1]

    def __iter__(self) -> Iterator[list[int]]:
        # A generator on purpose: DataLoader with workers calls iter() twice and reads only the second,
        # so a resumed position may be taken up at the first next() only.
        for batch in self.batches():
            yield batch.tolist()

    def batches(self) -> Iterator[np.ndarray]:
        """This rank's batches as int64 arrays. Unlike ``iter()``, the call itself begins the iteration."""
        self._check_world()
        if self._pending is None:
            self._pending = self._fresh()
        progress = self._at_hand()
        edges, rank = self._edges(progress), self.rank
        progress.begun, self._pending, self._progress = True, None, progress
        return self._walk(progress, edges, rank)

    def state_dict(self, delivered: int | None = None) -> dict[str, object]:
        """Return the position of this run as plain ints and strings.

        Once all batches of an epoch were delivered, the state is that of the next epoch at its beginning,
        whether or not the iteration has ended.

        Parameters
        ----------
        delivered
            Batches of this rank that the consumer has received since this iteration began. Loaders that read
            ahead must pass it; by default it is what the sampler has yielded. Ignored while the next
            iteration is still to begin (after :meth:`set_epoch` or :meth:`load_state_dict`).

        Returns
        -------
        dict
            Ranks move in step, so the state of any rank is the state of all; load one state on every rank.
        """
        progress = self._at_hand()
        rounds = progress.yielded
        if delivered is not None and self._pending is None:
            rounds = operator.index(delivered)
        if not 0 <= rounds <= progress.yielded:
            raise ValueError(
                f"delivered={rounds}, but this iteration has yielded {progress.yielded} batches; "
                "count from the beginning of the iteration at hand"
            )
        position = {
            "seed": progress.seed,
            "epoch": progress.epoch,
            "cells": self._edges(progress)[rounds * progress.dealt_to],
            "batches": self._before(progress) + rounds,
            "world_size": progress.world_size,
            "num_workers": progress.num_workers,
        }
        # A finished epoch is finished on any number of ranks, whatever this number had to leave out.
        if self._pending is None and rounds == self._n_rounds(progress):
            after = self._fresh_at(self._seed_to_come(), progress.epoch + 1)
            position = {
                "seed": after.seed,
                "epoch": after.epoch,
                "cells": 0,
                "batches": 0,
                "world_size": after.world_size,
                "num_workers": after.num_workers,
            }
        return {"version": _STATE_VERSION, "order": self._fingerprint(), **position}

    def load_state_dict(self, state: Mapping[str, object]) -> None:
        """Continue where `state` was taken, on any number of ranks and workers.

        The first iteration afterwards is what remains of the epoch in progress, in the very order the saved
        run would have gone through (its seed included); later iterations are whole epochs with this
        sampler's own lanes.

        Raises
        ------
        ValueError
            The state is not a sampler's, or it belongs to another order; the message names each difference.
        """
        progress = self._checked(state)
        self.seed, self.epoch = progress.seed, progress.epoch
        self._pending = progress
        left = progress.total - progress.start
        if left and not self._n_rounds(progress):
            logger.warning(
                "%d cells remain of epoch %d, too few for %d ranks: they are left out",
                left,
                self.epoch,
                self.world_size,
            )

    def _checked(self, state: Mapping[str, Any]) -> Progress:
        """The position that a state describes, or an error that says why it cannot be continued."""
        if "order" in state and state.get("version") != _STATE_VERSION:
            raise ValueError(
                f"this sampler state has version {state.get('version')}, and this release of hbx_gpu "
                f"continues version {_STATE_VERSION} only; continue with the release that saved it, or start "
                "the epoch anew without the state"
            )
        if missing := [key for key in _STATE_KEYS if key not in state]:
            raise ValueError(
                f"this state belongs to another kind of sampler (it lacks {', '.join(missing)}); load it "
                f"where the same kind of sampler is used, not into a {type(self).__name__}"
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
        progress = Progress(
            seed=at_least("seed of the state", state["seed"], 0),
            epoch=at_least("epoch of the state", state["epoch"], 0),
            start=at_least("cells of the state", state["cells"], 0),
            before=at_least("batches of the state", state["batches"], 0),
            world_size=at_least("world_size of the state", state["world_size"], 1),
            num_workers=at_least("num_workers of the state", state["num_workers"], 1),
            loaded=True,
        )
        progress.total = total(self._sizes(progress.key()))
        if progress.start > progress.total:
            raise ValueError(
                f"the state has consumed {progress.start} cells, {progress.start - progress.total} more "
                "than the epoch has"
            )
        return progress

    def _sizes(self, key: EpochKey) -> Sizes:
        raise NotImplementedError

    def _order(self, key: EpochKey, lanes: int) -> EpochOrder:
        raise NotImplementedError

    def _identity(self) -> dict[str, object]:
        raise NotImplementedError

    @property
    def _lane_workers(self) -> int:
        return max(1, self.num_workers)

    def _fresh(self) -> Progress:
        """The next epoch from its beginning, with a new seed if none was given."""
        self.seed, self._next_seed = self._seed_to_come(), None
        return self._fresh_at(self.seed)

    def _seed_to_come(self) -> int:
        if not self._draws_seeds:
            return self.seed
        if self.world_size > 1:
            return 0
        if self._next_seed is None:
            self._next_seed = secrets.randbits(63)
        return self._next_seed

    def _fresh_at(self, seed: int, epoch: int | None = None) -> Progress:
        return Progress(
            seed=seed,
            epoch=self.epoch if epoch is None else epoch,
            world_size=self.world_size,
            num_workers=self._lane_workers,
        )

    def _at_hand(self) -> Progress:
        """The iteration to come, if it was chosen, or else the last one."""
        if self._pending is None:
            return self._progress
        if not self._pending.loaded and self._pending.world_size != self.world_size:
            self._pending = self._fresh()  # torch.distributed was initialized after this was made
        return self._pending

    def _edges(self, progress: Progress) -> Edges:
        """Where each batch handed out begins and ends in the epoch's cells: rounds * world_size + 1 edges."""
        world_size = progress.dealt_to if progress.begun else self.world_size
        if progress.edges is None or progress.dealt_to != world_size:
            sizes = self._sizes(progress.key())
            progress.total, progress.dealt_to = total(sizes), world_size
            progress.edges = cut(
                sizes,
                start=progress.start,
                world_size=world_size,
                drop_last=self.drop_last or (self._whole_batches and world_size > 1),
                inside=self._cut_inside_batches,
            )
        return progress.edges

    def _before(self, progress: Progress) -> int:
        """Batches of a rank before the position at which an iteration began, counted for the ranks it has."""
        if not progress.loaded or progress.start == 0:
            return 0
        self._edges(progress)
        if progress.before_for != progress.dealt_to:
            whole = self._fresh_at(progress.seed, progress.epoch)
            whole.begun, whole.dealt_to = progress.begun, progress.dealt_to
            progress.before = max(0, self._n_rounds(whole) - self._n_rounds(progress))
            progress.before_for = progress.dealt_to
        return progress.before

    def _n_rounds(self, progress: Progress) -> int:
        return (len(self._edges(progress)) - 1) // progress.dealt_to

    def _walk(self, progress: Progress, edges: Edges, rank: int) -> Iterator[np.ndarray]:
        order = self._order(progress.key(), progress.world_size * progress.num_workers)
        for p in range(rank, len(edges) - 1, progress.dealt_to):
            progress.yielded += 1
            yield order.cells(edges[p], edges[p + 1])
        progress.done = True

    def _fingerprint(self) -> dict[str, object]:
        # Computed once: it hashes arrays of one entry per cell, and a state may be taken at every step.
        if self._order_id is None:
            self._order_id = {
                "sampler": type(self).__name__,
                "batch_size": self.batch_size,
                "drop_last": self.drop_last,
                **self._identity(),
            }
        return dict(self._order_id)

    def _check_world(self) -> None:
        """Raise an error for more ranks than there are cells for; warn once about what `drop_last` drops."""
        world_size, progress = self.world_size, self._pending or self._fresh_at(self.seed)
        if progress.loaded:
            return
        sizes = self._sizes(progress.key())
        n_cells = self._n_epoch if self.drop_last else total(sizes)
        least = least_per_rank(sizes, world_size)
        if 0 < n_cells < least * world_size:
            raise ValueError(
                f"{n_cells} cells cannot be shared among {world_size} ranks: each rank needs at least {least}"
                f"{' (with batch_size=1, one is enough)' if least > 1 else ''}; use fewer ranks"
            )
        single = n_smaller(sizes, least)
        if self._cut_inside_batches and self.rank == 0 and single and not self._told_of_single_cells:
            self._told_of_single_cells = True
            logger.warning(
                "%d batches of %s hold a single cell, because their labels have no other: on several ranks "
                "these cells are joined to batches of other labels. Give them the label -1 to leave them out",
                single,
                type(self).__name__,
            )
        if self.rank == 0 and self.n_dropped and not self._told_of_loss:
            self._told_of_loss = True
            logger.warning(
                "%s leaves %d of %d cells out of every epoch (batch_size=%d, drop_last=%s, world_size=%d)",
                type(self).__name__,
                self.n_dropped,
                self._n_epoch,
                self.batch_size,
                self.drop_last,
                world_size,
            )
