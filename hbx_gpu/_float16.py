"""Says that values became infinite because float16 ends at 65,504."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

if TYPE_CHECKING:
    from hbx_gpu.transforms import Transform

_log = logging.getLogger(__name__)

FIRST_INFINITE = 65520.0
"""Smallest positive number that rounds to infinity in float16 (IEEE 754 binary16, ties to even)."""

_said: set[str] = set()


def may_overflow(transform: Transform | None) -> bool:
    """Whether counts can be infinite in float16 after a transform.

    The logarithm of one plus any float32 is below 89, and counts that are scaled to a sum stay below it.
    """
    if transform is None:
        return True
    return not transform.log1p and not 0 < (transform.target_sum or 0.0) < FIRST_INFINITE


def was_said() -> bool:
    """Whether this process has said it, so that nobody needs to look for such values any more."""
    return bool(_said)


def say_overflow(largest: float | None = None) -> None:
    """Warn, once per process, that values became infinite.

    Parameters
    ----------
    largest
        The largest such value, where it is known.
    """
    if _said:
        return
    _said.add("")
    which = "values of a batch are" if largest is None else f"a value of {largest:,.6g} is"
    _log.warning(
        "%s larger than float16 holds (65,504), so infinite in the batch; pass dtype='bfloat16' or "
        "dtype='float32', or a transform that makes values smaller, such as log1p",
        which,
    )


@contextmanager
def overflow_said(*dtypes: npt.DTypeLike) -> Iterator[None]:
    """Let :func:`say_overflow` speak instead of NumPy where casts make numbers infinite.

    Parameters
    ----------
    *dtypes
        What is cast to. Casts to others than float16 are left as they are.
    """
    if not any(np.dtype(dtype) == np.float16 for dtype in dtypes):
        yield
        return
    with np.errstate(over="call", call=lambda *_: say_overflow()):
        yield
