"""Transforms of counts in dense batches: plain data that describe the steps, which engines carry out."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from hbx_gpu.errors import InvalidDataError


@dataclass(frozen=True, slots=True)
class Transform:
    """One step, applied to every value of a row.

    Attributes
    ----------
    target_sum
        Multiply a row so that its values sum to this; None leaves them.
    log1p
        Then take ``log(1 + x)``.
    """

    target_sum: float | None = None
    log1p: bool = False


def normalize_total(target_sum: float = 1e4) -> Transform:
    """Scale each cell to `target_sum`, as scanpy's ``normalize_total``; an empty cell stays zero.

    The total is taken over the columns of the batch: with a panel, over the panel. A batch with values that
    are not counts is an error (InvalidDataError).
    """
    if not target_sum > 0:
        raise ValueError(f"target_sum must be positive, got {target_sum}")
    return Transform(target_sum=float(target_sum))


def not_counts(where: str) -> InvalidDataError:
    """Make the error for a transform of values that are not counts.

    Parameters
    ----------
    where
        Name of the matrix that holds the values.
    """
    return InvalidDataError(
        f"{where}: normalize_total and log1p are for counts, but some values are negative or no whole "
        "numbers. Choose the layer that holds counts, or leave the transform out and treat the values in the "
        "training loop"
    )


log1p = Transform(log1p=True)
"""``log(1 + x)`` of every value, which must be a count, as for :func:`normalize_total`."""


def chain(steps: Transform | Sequence[Transform] | None) -> Transform:
    """One step that does all of `steps` in order.

    Raises
    ------
    ValueError
        The steps are in another order than normalize_total, then log1p.
    TypeError
        A step is not a Transform, for example a function.
    """
    if steps is None:
        return Transform()
    if isinstance(steps, Transform):
        return steps
    target_sum, log = None, False
    for step in steps if isinstance(steps, Sequence) else [steps]:
        if not isinstance(step, Transform):
            raise TypeError(
                "transform takes normalize_total(1e4), log1p or a list of both, because they are carried out "
                f"while rows are decoded; got {step!r}. For a function of yours, pass convert=function"
            )
        if log:
            raise ValueError("log1p must come last: what it returns is no longer counts")
        if step.target_sum is not None:
            target_sum = step.target_sum  # of two, the later one decides the sum
        log = step.log1p
    return Transform(target_sum, log)
