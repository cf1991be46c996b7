"""Draws with replacement in proportion to weights of cells or of labels."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Self, TypedDict, Unpack

import numpy as np
from numpy.typing import ArrayLike

from hbx_gpu.sampler._codes import checked_codes
from hbx_gpu.sampler._draws import CellWeights, DrawnOrder, Draws, LabelDraws
from hbx_gpu.sampler._epoch import EpochSampler
from hbx_gpu.sampler._orders import EpochOrder
from hbx_gpu.sampler._position import EpochKey, at_least
from hbx_gpu.sampler._rounds import Even, batch_sizes
from hbx_gpu.sampler._runs import as_array
from hbx_gpu.sampler._selection import LabelTable

_AT_ONCE = 1 << 22  # weights that are looked at together


class Options(TypedDict, total=False):
    """Arguments of :class:`WeightedCellSampler` besides weights and batch size."""

    n_samples: int | None
    replacement: bool
    seed: int | None
    drop_last: bool
    num_workers: int
    rank: int | None
    world_size: int | None


class WeightedCellSampler(EpochSampler):
    """Independent draws in proportion to weights.

    Parameters
    ----------
    weights
        Float (n_cells,), finite, not negative, in any scale. A cell of weight 0 is never drawn. Arrays of
        float32 and float64 are used as they are; nothing else is kept for each cell.
    batch_size, seed, drop_last, num_workers, rank, world_size
        As in :class:`CellSampler`.
    n_samples
        Draws per epoch; by default as many as there are cells of positive weight.
    replacement
        False: no cell twice in an epoch; the earlier of two draws still favors the heavier cell. With weights
        of cells, each epoch then takes memory and time that grow with the number of cells; with weights of
        labels (:meth:`balanced`, :meth:`by_label`) it does not.

    Raises
    ------
    ValueError
        A weight is negative or not finite, all weights are 0, or `n_samples` without replacement is larger
        than the number of cells of positive weight.
    """

    def __init__(
        self,
        weights: ArrayLike | LabelDraws,
        batch_size: int = 1024,
        n_samples: int | None = None,
        replacement: bool = True,
        *,
        seed: int | None = None,
        drop_last: bool = False,
        num_workers: int = 0,
        rank: int | None = None,
        world_size: int | None = None,
    ) -> None:
        self._draws: Draws = weights if isinstance(weights, LabelDraws) else _checked_weights(weights)
        self.replacement = bool(replacement)
        most = self._draws.n_drawable
        self._n_epoch = most if n_samples is None else at_least("n_samples", n_samples, 0)
        if self._n_epoch > most and (not replacement or most == 0):
            raise ValueError(
                f"n_samples={self._n_epoch} without replacement, but {most} cells have a positive weight; "
                "lower n_samples or pass replacement=True"
            )
        super().__init__(
            batch_size=batch_size,
            seed=seed,
            drop_last=drop_last,
            num_workers=num_workers,
            rank=rank,
            world_size=world_size,
        )

    @classmethod
    def balanced(cls, labels: ArrayLike, batch_size: int = 1024, **options: Unpack[Options]) -> Self:
        """Every label equally likely in every draw.

        Parameters
        ----------
        labels
            Integer (n_cells,), label codes as in ``dataset.columns``. Cells of code -1 (missing) are never
            drawn.
        batch_size, options
            As in the constructor.

        Returns
        -------
        WeightedCellSampler
            By default an epoch has as many draws as there are cells that can be drawn.
        """
        table = LabelTable.of(checked_codes("labels", labels))
        return cls(LabelDraws.of(table, np.ones(len(table.labels))), batch_size, **options)

    @classmethod
    def by_label(
        cls,
        labels: ArrayLike,
        weights: Mapping[int, float],
        batch_size: int = 1024,
        **options: Unpack[Options],
    ) -> Self:
        """Draw a label in proportion to its weight, and then one of its cells, each equally likely.

        Parameters
        ----------
        labels
            Integer (n_cells,), label codes as in ``dataset.columns``. Cells of code -1 (missing) are never
            drawn.
        weights
            Label code -> weight, finite, not negative, in any scale. Labels that are not named are never
            drawn.
        batch_size, options
            As in the constructor.

        Returns
        -------
        WeightedCellSampler
            By default an epoch has as many draws as there are cells that can be drawn.

        Raises
        ------
        ValueError
            A weight is negative or not finite, all weights are 0, or no cell has a label that has a weight.
        """
        table = LabelTable.of(checked_codes("labels", labels))
        for code, weight in weights.items():
            if not (np.isfinite(weight) and weight >= 0):
                raise ValueError(f"weights must be finite and not negative; that of label {code} is {weight}")
            if weight and code not in table.given:
                raise ValueError(f"label {code} has a weight, but no cell has this code")
        of_label = np.array([weights.get(int(label), 0.0) for label in table.given], np.float64)
        if not of_label.any():
            raise ValueError(f"all {len(weights)} weights are 0: there is nothing to draw")
        _check_sum(sum(of_label.tolist()))
        return cls(LabelDraws.of(table, of_label), batch_size, **options)

    def _sizes(self, key: EpochKey) -> Even:  # noqa: ARG002 - the same in every epoch
        return batch_sizes(self._n_epoch, self.batch_size, drop_last=self.drop_last)

    def _order(self, key: EpochKey, lanes: int) -> EpochOrder:  # noqa: ARG002 - draws have no locality
        if self.replacement or self._n_epoch == 0:
            return DrawnOrder(self._draws, key)
        return self._draws.once(self._n_epoch, key)

    def _identity(self) -> dict[str, object]:
        return {
            "n_samples": self._n_epoch,
            "replacement": self.replacement,
            "weights": self._draws.digest(),
        }


def _checked_weights(weights: ArrayLike) -> CellWeights:
    every = as_array("weights", weights)
    if every.dtype not in (np.float32, np.float64):
        every = every.astype(np.float64)
    if every.ndim != 1:
        raise ValueError(f"weights must be one-dimensional, got shape {every.shape}")
    for begin in range(0, len(every), _AT_ONCE):
        part = every[begin : begin + _AT_ONCE]
        if not (np.isfinite(part) & (part >= 0)).all():
            bad = np.flatnonzero(~(np.isfinite(every) & (every >= 0)))
            raise ValueError(
                f"weights must be finite and not negative; {len(bad)} of {len(every)} are not, "
                f"the first is {every[bad[0]]} at position {bad[0]}"
            )
    with np.errstate(over="ignore"):
        draws = CellWeights.of(every)
    _check_sum(float(draws.before[-1]))
    if len(every) and not draws.n_drawable:
        raise ValueError(f"all {len(every)} weights are 0: there is nothing to draw")
    return draws


def _check_sum(total: float) -> None:
    """Refuse weights whose sum is infinite: all draws would be of the last cell."""
    if not math.isfinite(total):
        raise ValueError("the sum of the weights is too large for float64; divide them by the largest one")
