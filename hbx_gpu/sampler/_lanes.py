"""Which batches a worker gets one after the other, so that it stays with a group as long as it can."""

from __future__ import annotations

import heapq
from dataclasses import dataclass
from typing import Self

import numpy as np

from hbx_gpu.sampler._runs import ranges


@dataclass(frozen=True, slots=True)
class LaneQueues:
    """The order of :func:`pack_lanes` as runs of consecutive batches, a few for each group and lane.

    Attributes
    ----------
    n_batches
        Number of batches.
    lane_begins
        int64 (n_lanes + 1,). Where the runs of each lane begin.
    turn
        int64 (n_runs,). Turn of the lane at which a run begins; ascending within a lane.
    batch
        int64 (n_runs,). First batch of each run.
    """

    n_batches: int
    lane_begins: np.ndarray
    turn: np.ndarray
    batch: np.ndarray

    @classmethod
    def pack(cls, n_batches: np.ndarray, lanes: int, *, queue_ranks: np.ndarray) -> Self:
        """Pack batches as :func:`pack_lanes` does."""
        total = int(n_batches.sum())
        lane_of = _lane_of(n_batches, lanes)
        queue = np.lexsort((queue_ranks, lane_of))
        queue = queue[n_batches[queue] > 0]
        lane, count = lane_of[queue], n_batches[queue]
        first = (np.cumsum(n_batches) - n_batches)[queue]
        queued = np.bincount(lane_of, weights=n_batches, minlength=lanes).astype(np.int64)
        turn = np.cumsum(count) - count - (np.cumsum(queued) - queued)[lane]
        turns = total // lanes + (np.arange(lanes) < total % lanes)

        # What a queue holds beyond its turns, run by run in the order in which it moves.
        beyond = np.minimum(count, np.maximum(turn + count - turns[lane], 0))
        moved = np.flatnonzero(beyond)
        longest_first = np.argsort(np.argsort(-np.maximum(queued - turns, 0), kind="stable"))
        moved = moved[np.lexsort((turn[moved], longest_first[lane[moved]]))]
        from_batch, n_moved = (first + count - beyond)[moved], beyond[moved]

        # Cut where a run ends or where a lane has all its turns.
        lacking = np.maximum(turns - queued, 0)
        begins, fills = np.cumsum(n_moved) - n_moved, np.cumsum(lacking) - lacking
        cuts = np.unique(np.concatenate([begins, fills[lacking > 0]]))
        run = np.searchsorted(begins, cuts, "right") - 1
        to_lane = np.searchsorted(fills + lacking, cuts, "right")
        kept = beyond < count
        lane = np.concatenate([lane[kept], to_lane])
        turn = np.concatenate([turn[kept], queued[to_lane] + cuts - fills[to_lane]])
        batch = np.concatenate([first[kept], from_batch[run] + cuts - begins[run]])
        order = np.lexsort((turn, lane))
        return cls(total, np.searchsorted(lane[order], np.arange(lanes + 1)), turn[order], batch[order])

    def batch_at(self, position: int) -> int:
        """Which batch comes at a position of the order in time."""
        turn, lane = divmod(position, len(self.lane_begins) - 1)
        begin, end = self.lane_begins[lane], self.lane_begins[lane + 1]
        run = int(begin + np.searchsorted(self.turn[begin:end], turn, "right")) - 1
        return int(self.batch[run]) + turn - int(self.turn[run])


def pack_lanes(n_batches: np.ndarray, lanes: int, *, queue_ranks: np.ndarray) -> np.ndarray:
    """Order batches in time so that every lane (worker of a rank) stays with a group as long as it can.

    Groups go to lanes greedily, the largest first, each to the lane with the fewest batches so far (the
    lowest on ties); a lane's queue is group after group. Position p of the result is lane ``p % lanes``'s
    turn. Lanes have equally many turns, so what a queue holds beyond its turns, taken from its end, goes to
    lanes that would run dry, the longest queue first: a single huge group ends up on all lanes.

    Parameters
    ----------
    n_batches
        Integer (n_groups,), full batches of each group; a group's batches are numbered consecutively.
    queue_ranks
        Integer (n_groups,): groups of a lowest rank come first in their lane's queue.

    Returns
    -------
    numpy.ndarray
        int64 (n_batches.sum(),), numbers of batches in the order of time.
    """
    total = int(n_batches.sum())
    lane_of = _lane_of(n_batches, lanes)
    queue = np.lexsort((queue_ranks, lane_of))
    batches = ranges((np.cumsum(n_batches) - n_batches)[queue], n_batches[queue])
    queued = np.bincount(lane_of, weights=n_batches, minlength=lanes).astype(np.int64)
    turns = total // lanes + (np.arange(lanes) < total % lanes)
    lane = np.repeat(np.arange(lanes), queued)
    turn = ranges(np.zeros_like(queued), queued)

    over = np.maximum(queued - turns, 0)
    longest_first = np.argsort(-over, kind="stable")
    ends = np.cumsum(queued)
    moved = ranges((ends - over)[longest_first], over[longest_first])
    lacking = np.maximum(turns - queued, 0)
    lane[moved] = np.repeat(np.arange(lanes), lacking)
    turn[moved] = ranges(queued, lacking)

    order = np.empty(total, np.int64)
    order[turn * lanes + lane] = batches
    return order


def _lane_of(n_batches: np.ndarray, lanes: int) -> np.ndarray:
    """Lane of each group: the largest group first, each to the lane with the fewest batches so far."""
    lane_of = np.zeros(len(n_batches), np.int64)
    loads = [(0, lane) for lane in range(lanes)]
    for group in np.argsort(-n_batches, kind="stable").tolist():
        load, emptiest = loads[0]
        lane_of[group] = emptiest
        heapq.heapreplace(loads, (load + int(n_batches[group]), emptiest))
    return lane_of
