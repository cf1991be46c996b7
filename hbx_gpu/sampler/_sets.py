"""Sets of cells of one label combination, all of one size, and a matched control beside each cell."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from hbx_gpu.sampler._position import digest
from hbx_gpu.sampler._runs import ranges, shuffle_runs


@dataclass(frozen=True, slots=True)
class Pools:
    """Controls to draw from.

    Attributes
    ----------
    of
        int64 (n_targets,). Pool of each target.
    cells
        int64. Controls, pool after pool.
    sizes
        int64 (n_pools,). Controls of each pool.
    """

    of: np.ndarray
    cells: np.ndarray
    sizes: np.ndarray

    def draw(self, targets: np.ndarray, rng: np.random.Generator | None) -> np.ndarray:
        """A control for each position of a target: at random, or without a generator in turns."""
        pool = self.of[targets]
        sizes = self.sizes[pool]
        if rng is None:
            which = np.arange(len(targets)) % sizes
        else:
            which = (rng.random(len(targets)) * sizes).astype(np.int64)
        drawn: np.ndarray = self.cells[(np.cumsum(self.sizes) - self.sizes)[pool] + which]
        return drawn


@dataclass(frozen=True, slots=True)
class Sets:
    """How targets are cut into sets, and sets put into batches.

    Attributes
    ----------
    targets
        int64 (n_targets,). Cells, combination after combination.
    counts
        int64 (n_combinations,). Cells of each combination.
    size, per_batch
        Cells of a set, and sets of a batch.
    full_only
        Leave out the last batch if it has fewer sets.
    pools
        Where the controls come from; None: batches have no controls.
    """

    targets: np.ndarray
    counts: np.ndarray
    size: int
    per_batch: int
    full_only: bool
    pools: Pools | None

    @property
    def n_sets(self) -> int:
        """Sets of an epoch."""
        n = int((-(-self.counts // self.size)).sum())
        return n - n % self.per_batch if self.full_only else n

    @property
    def rows_per_set(self) -> int:
        """Rows that a set adds to a batch."""
        return self.size * (1 if self.pools is None else 2)

    def batch_sizes(self) -> np.ndarray:
        """int64. Rows of each batch."""
        full, rest = divmod(self.n_sets, self.per_batch)
        n_sets: np.ndarray = np.array([self.per_batch] * full + [rest] * bool(rest), np.int64)
        return n_sets * self.rows_per_set

    def rows(self, rng: np.random.Generator | None) -> np.ndarray:
        """int64. Rows of the epoch's batches: of each batch its cells, then their controls in the same order.

        Sets that are short are filled up with cells of their own, drawn again. Without a generator nothing
        is shuffled, and short sets begin again with their first cell.
        """
        positions = np.arange(len(self.targets))
        ends = np.cumsum(self.counts)
        if rng is not None:
            shuffle_runs(positions, ends, rng)
        n_each = -(-self.counts // self.size)
        first = np.repeat(ends - self.counts, n_each) + self.size * ranges(np.zeros_like(n_each), n_each)
        held = np.minimum(np.repeat(ends, n_each) - first, self.size)
        if rng is not None:
            order = rng.permutation(len(first))
            first, held = first[order], held[order]
        first, held = first[: self.n_sets], held[: self.n_sets]
        place = np.broadcast_to(np.arange(self.size), (len(first), self.size)).copy()
        if rng is None:
            place %= held[:, None]
        else:
            short = np.flatnonzero(held < self.size)
            again = (rng.random((len(short), self.size)) * held[short, None]).astype(np.int64)
            place[short] = np.where(place[short] < held[short, None], place[short], again)
        chosen = positions[first[:, None] + place]
        cells: np.ndarray = self.targets[chosen]
        if self.pools is None:
            return cells.reshape(-1)
        controls = self.pools.draw(chosen.reshape(-1), rng).reshape(chosen.shape)
        batches = range(0, len(chosen), self.per_batch)
        parts = [part[k : k + self.per_batch].reshape(-1) for k in batches for part in (cells, controls)]
        return np.concatenate(parts) if parts else np.empty(0, np.int64)

    def identity(self) -> dict[str, object]:
        """What states compare."""
        pools = () if self.pools is None else (self.pools.of, self.pools.cells, self.pools.sizes)
        return {
            "labels": digest(self.targets, self.counts),
            "set_size": self.size,
            "sets_per_batch": self.per_batch,
            "controls": digest(*pools),
        }
