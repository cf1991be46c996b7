"""Batches of one label combination each, with matched controls."""

from __future__ import annotations

from typing import ClassVar

import numpy as np
from numpy.typing import ArrayLike

from hbx_gpu.sampler._codes import Codes, combined_codes
from hbx_gpu.sampler._epoch import EpochSampler
from hbx_gpu.sampler._orders import HeldOrder
from hbx_gpu.sampler._position import EpochKey, at_least, digest
from hbx_gpu.sampler._runs import as_array, number, ranges, rows_by_code, shuffle_runs
from hbx_gpu.sampler._sets import Pools, Sets


class GroupedCellSampler(EpochSampler):
    """Batches of one label combination each, completed with matched controls.

    Every cell that has labels and is not a control comes exactly once per epoch. The cells of a combination
    are cut into as few batches as possible, of nearly equal size; each batch gets controls in proportion.

    Parameters
    ----------
    labels
        Integer codes: (n_cells,), (n_cells, n_labels), or a list of arrays (n_cells,). A cell with a missing
        label (-1) is in no batch, unless it is a control.
    batch_size
        Largest number of cells in a batch, controls included; 1,024 if None. Not together with `set_size`.
    controls
        Boolean (n_cells,), cells to complete batches with. They get no batches of their own, but with
        `paired` those that have labels make sets.
    match
        Codes like `labels`, for instance the donor: each control stands for one cell of its batch and shares
        this code with it. A cell whose code is missing cannot be matched: it is in no batch.
    control_fraction
        Share of controls in a batch, between 0 and 1; rounded to whole cells, at least one of each kind.
    set_size
        Cells of a set. A batch then holds sets of this size, each of one combination; a set that comes out
        short is filled up with cells of its own, drawn again.
    sets_per_batch
        Sets of a batch, 1 if None; only with `set_size`.
    paired
        Draw a control for each cell of a set, with replacement; only with `set_size` and `controls`. A batch
        is then its cells, followed by as many controls in the same order.
    drop_last
        Keep only batches of the full size; what a combination has beyond is left out, other cells of it in
        each epoch.
    shuffle, seed, num_workers, rank, world_size
        As in :class:`CellSampler`. The last round of several ranks cuts single batches into pieces of two
        cells or more, so that no batch mixes two combinations as long as batches hold four cells; a cut may
        part one control from the cell it stands for. On several ranks, the cell of a combination that has
        only one, without controls, joins another batch, and a warning says so.

    Notes
    -----
    The controls of one match code are gone through in a shuffled order, again and again: no batch holds a
    control twice unless it needs more than there are, and none is used twice before all were used once.
    """

    _cut_inside_batches: ClassVar[bool] = True

    def __init__(
        self,
        labels: Codes,
        batch_size: int | None = None,
        *,
        controls: ArrayLike | None = None,
        match: Codes | None = None,
        control_fraction: float = 0.5,
        set_size: int | None = None,
        sets_per_batch: int | None = None,
        paired: bool = False,
        shuffle: bool = True,
        seed: int | None = None,
        drop_last: bool = False,
        num_workers: int = 0,
        rank: int | None = None,
        world_size: int | None = None,
    ) -> None:
        self.shuffle = bool(shuffle)
        combination = combined_codes("labels", labels)
        n_cells = len(combination)
        is_control = np.zeros(n_cells, bool) if controls is None else as_array("controls", controls)
        if is_control.dtype != bool or is_control.shape != (n_cells,):
            raise ValueError(
                f"controls must be a boolean mask of {n_cells} cells like labels, "
                f"got {is_control.dtype} of shape {is_control.shape}"
            )
        if match is not None and controls is None:
            raise ValueError("match says what controls must share, but there are no controls; pass controls=")
        stratum = np.zeros(n_cells, np.int64) if match is None else combined_codes("match", match)
        if len(stratum) != n_cells:
            raise ValueError(f"match holds {len(stratum)} cells, labels {n_cells}")

        self.paired = bool(paired)
        _check_sets(batch_size, set_size, sets_per_batch, self.paired, controls is not None)
        batch_size = 1024 if batch_size is None else batch_size
        own = ~is_control | self.paired
        targets = np.flatnonzero((combination >= 0) & own & (stratum >= 0))
        codes, self._counts = number(combination[targets])
        self._targets = targets[rows_by_code(codes)]
        self._n_controls = 0
        if controls is not None:
            self._n_controls = _controls_per_batch(batch_size, control_fraction)
            self._set_pools(stratum, np.flatnonzero(is_control & (stratum >= 0)))
        self._sets: Sets | None = None
        if set_size is not None:
            pools = Pools(self._pool_of, self._pools, self._pool_sizes) if self.paired else None
            per_batch = at_least("sets_per_batch", 1 if sets_per_batch is None else sets_per_batch, 1)
            size = at_least("set_size", set_size, 1)
            self._sets = Sets(self._targets, self._counts, size, per_batch, bool(drop_last), pools)
            self._whole_batches = True
            batch_size = per_batch * self._sets.rows_per_set
        self._n_targets = at_least("batch_size", batch_size, 1) - self._n_controls
        self._full_only = bool(drop_last)
        if self._sets is not None:
            self._n_epoch = self._sets.n_sets * self._sets.rows_per_set
        else:
            self._n_epoch = len(targets) + int(self._cut()[2].sum())
        super().__init__(
            batch_size=batch_size,
            seed=seed,
            drop_last=drop_last,
            num_workers=num_workers,
            rank=rank,
            world_size=world_size,
            random=self.shuffle,
        )

    def _set_pools(self, stratum: np.ndarray, controls: np.ndarray) -> None:
        """Sort the controls by match code, and find for each target the pool its controls come from."""
        values = np.unique(stratum[controls])
        wanted = stratum[self._targets]
        served = np.isin(wanted, values)
        if not served.all():
            lacking = np.unique(wanted[~served])
            raise ValueError(
                f"{np.count_nonzero(~served)} labeled cells have no control to go with them: "
                f"{len(lacking)} of the match combinations hold no control cell; "
                "give these cells the label -1, or match on something coarser"
            )
        self._pool_of = np.searchsorted(values, wanted)
        pools = np.searchsorted(values, stratum[controls])
        self._pool_sizes = np.bincount(pools, minlength=len(values))
        self._pools = controls[rows_by_code(pools)]

    def _cut(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """First target, number of targets and number of controls of each batch, label after label."""
        most, counts = self._n_targets, self._counts
        used = counts - counts % most if self._full_only else counts
        parts = -(-used // most)
        each, extra = np.divmod(used, np.maximum(parts, 1))
        n_targets = np.repeat(each, parts) + (ranges(np.zeros_like(parts), parts) < np.repeat(extra, parts))
        left_out_before = np.cumsum(counts - used) - (counts - used)
        starts = np.cumsum(n_targets) - n_targets + np.repeat(left_out_before, parts)
        if self._n_controls == 0:
            return starts, n_targets, np.zeros_like(n_targets)
        n_controls = np.rint(n_targets * (self._n_controls / most)).astype(np.int64)
        return starts, n_targets, np.maximum(n_controls, 1)

    def _time_order(self, rng: np.random.Generator, n_batches: int) -> np.ndarray:
        return rng.permutation(n_batches) if self.shuffle else np.arange(n_batches)

    def _sizes(self, key: EpochKey) -> np.ndarray:
        if self._sets is not None:
            return self._sets.batch_sizes()
        _, n_targets, n_controls = self._cut()
        result: np.ndarray = (n_targets + n_controls)[self._time_order(key.rng(), len(n_targets))]
        return result

    def _order(self, key: EpochKey, lanes: int) -> HeldOrder:  # noqa: ARG002 - labels have no lanes
        return HeldOrder(self._cells(key.rng()))

    def _cells(self, rng: np.random.Generator) -> np.ndarray:
        if self._sets is not None:
            return self._sets.rows(rng if self.shuffle else None)
        starts, n_targets, n_controls = self._cut()
        order = self._time_order(rng, len(starts))
        starts, n_targets, n_controls = starts[order], n_targets[order], n_controls[order]
        positions = np.arange(len(self._targets))
        if self.shuffle:
            shuffle_runs(positions, np.cumsum(self._counts), rng)
        positions = positions[ranges(starts, n_targets)]
        targets: np.ndarray = self._targets[positions]
        if self._n_controls == 0:
            return targets
        controls = self._draw_controls(self._pool_of[positions], n_targets, n_controls, rng)
        # Controls are spread evenly, each after its target, so that a batch that is cut keeps their share and
        # match.
        sizes = n_targets + n_controls
        place = ranges(np.zeros_like(sizes), sizes)
        of, among = np.repeat(n_controls, sizes), np.repeat(sizes, sizes)
        is_control = (place + 1) * of // among > place * of // among
        cells = np.empty(len(place), np.int64)
        cells[is_control] = controls
        cells[~is_control] = targets
        return cells

    def _draw_controls(
        self, pool_of: np.ndarray, n_targets: np.ndarray, n_controls: np.ndarray, rng: np.random.Generator
    ) -> np.ndarray:
        """Controls of all batches; each stands for the target that it will follow in its batch."""
        pools, ends = self._pools.copy(), np.cumsum(self._pool_sizes)
        if self.shuffle:
            shuffle_runs(pools, ends, rng)
        j = ranges(np.zeros_like(n_controls), n_controls)
        target = -(-(j + 1) * np.repeat(n_targets, n_controls) // np.repeat(n_controls, n_controls)) - 1
        pool = pool_of[target + np.repeat(np.cumsum(n_targets) - n_targets, n_controls)]
        # The k-th time a pool is asked, it gives its k-th control, beginning anew when it is exhausted.
        asked = np.bincount(pool, minlength=len(ends))
        times = np.empty(len(pool), np.int64)
        times[rows_by_code(pool)] = ranges(np.zeros_like(asked), asked)
        result: np.ndarray = pools[(ends - self._pool_sizes)[pool] + times % self._pool_sizes[pool]]
        return result

    def _identity(self) -> dict[str, object]:
        if self._sets is not None:
            return {"shuffle": self.shuffle, **self._sets.identity()}
        pools = (self._pool_of, self._pools, self._pool_sizes) if self._n_controls else ()
        return {
            "shuffle": self.shuffle,
            "labels": digest(self._targets, self._counts),
            "controls_per_batch": self._n_controls,
            "controls": digest(*pools),
        }


def _check_sets(
    batch_size: int | None, set_size: int | None, sets_per_batch: int | None, paired: bool, controls: bool
) -> None:
    """Refuse arguments of sets that do not fit together."""
    if set_size is None:
        if sets_per_batch is not None or paired:
            raise ValueError(
                "sets_per_batch and paired are for batches of sets; pass set_size=, the cells of a set"
            )
        return
    if batch_size is not None:
        raise ValueError(
            f"batch_size={batch_size} does not go with set_size: a batch is sets_per_batch * set_size cells"
        )
    if paired != controls:
        raise ValueError(
            "sets have one control for each cell or none: pass both controls= and paired=True, or neither"
        )


def _controls_per_batch(batch_size: int, fraction: float) -> int:
    if not 0 < fraction < 1:
        raise ValueError(
            f"control_fraction must lie between 0 and 1, got {fraction}; without controls pass controls=None"
        )
    if at_least("batch_size", batch_size, 1) < 2:
        raise ValueError("batch_size must be at least 2 to hold a labeled cell and a control, got 1")
    return min(max(1, round(batch_size * fraction)), batch_size - 1)
