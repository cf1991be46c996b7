"""The position of an iteration, and the number of ranks that its batches are dealt to."""

from __future__ import annotations

import hashlib
import operator
import os
import sys
from dataclasses import dataclass

import numpy as np

from hbx_gpu.sampler._rounds import Edges

BLOCKS, WINDOWS, CELLS, POOL, QUEUES, DRAWS, SPLITS, ARRIVALS = range(1, 9)
"""What the streams of random numbers of one epoch are for; two streams share nothing."""


@dataclass(frozen=True, slots=True)
class EpochKey:
    """Where the randomness of one epoch comes from."""

    seed: int
    epoch: int

    def stream(self, *what: int) -> np.random.SeedSequence:
        """The randomness for one purpose, such as ``stream(WINDOWS, 3)``; without a purpose the main one."""
        return np.random.SeedSequence([self.seed, self.epoch], spawn_key=what)

    def rng(self) -> np.random.Generator:
        """A generator of the main stream in its first state."""
        return np.random.default_rng(self.stream())


@dataclass(slots=True)
class Progress:
    """One iteration: the order it walks, from which cell on, and how many batches it has yielded.

    `start` counts cells of the global order, which does not depend on the number of ranks that walk it;
    `world_size` and `num_workers` are those the order was made for, `dealt_to` the number of ranks that
    `edges` are for. `before` counts the batches of a rank before `start`, among `before_for` ranks (0: not
    counted yet); `loaded` says that a state was the origin.
    """

    seed: int
    epoch: int
    world_size: int
    num_workers: int
    start: int = 0
    before: int = 0
    before_for: int = 0
    loaded: bool = False
    begun: bool = False
    yielded: int = 0
    done: bool = False
    edges: Edges | None = None
    dealt_to: int = 0
    total: int = 0

    def key(self) -> EpochKey:
        """Where the randomness of the epoch comes from."""
        return EpochKey(self.seed, self.epoch)


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


def checked_rank(rank: int | None, world_size: int | None) -> tuple[int, int] | None:
    """Rank and number of ranks as given, or an error that says what is wrong; None if neither was given."""
    if (rank is None) != (world_size is None):
        raise ValueError(
            f"pass both rank and world_size, or neither; got rank={rank}, world_size={world_size}"
        )
    if rank is None or world_size is None:
        return None
    world_size = at_least("world_size", world_size, 1)
    if not 0 <= operator.index(rank) < world_size:
        raise ValueError(f"rank must lie in 0 .. {world_size - 1} (world_size={world_size}), got {rank}")
    return operator.index(rank), world_size


_LAUNCHERS = (("RANK", "WORLD_SIZE"), ("SLURM_PROCID", "SLURM_STEP_NUM_TASKS"))
"""Where launchers name the rank and the number of ranks: torchrun and Ray Train, and Slurm's srun.

Slurm also says SLURM_NTASKS in a batch script that runs alone; the number of tasks of a step is that of the
processes which srun started.
"""


def distributed_rank() -> tuple[int, int]:
    """Rank and number of ranks of torch.distributed, else as the launcher says, else of a single process."""
    # Whoever initialized torch.distributed has imported it.
    dist = sys.modules.get("torch.distributed")
    if dist is not None and dist.is_available() and dist.is_initialized():
        return dist.get_rank(), dist.get_world_size()
    for of_rank, of_world in _LAUNCHERS:
        rank, world_size = os.environ.get(of_rank, ""), os.environ.get(of_world, "")
        if rank.isdecimal() and world_size.isdecimal() and int(rank) < int(world_size):
            return int(rank), int(world_size)
    return 0, 1


def caller_depth() -> int:
    """Return the stack level, as `warnings.warn` counts, of the first frame outside this package."""
    frame, depth = sys._getframe(1), 1
    while frame.f_back is not None and frame.f_globals.get("__name__", "").startswith("hbx_gpu."):
        frame, depth = frame.f_back, depth + 1
    return depth
