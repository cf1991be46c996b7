"""Whether matrices that are opened together hold values of one kind: counts, or something else."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from itertools import islice

import numpy as np

from hbx_gpu._advice import option
from hbx_gpu._h5ad.evidence import look_at
from hbx_gpu._stores.lazy import StoredArray, as_stream
from hbx_gpu._stores.matrix import StoredMatrix
from hbx_gpu._stores.store import Part, Store

_VALUES = 1 << 12
# Stores that are looked at; a mixture of thousands shows in the first of them.
_STORES = 100


def warn_of_mixture(stores: Sequence[Store], parts: Sequence[Part], layer: str) -> None:
    """Warn if some stores hold counts and others do not, from a sample of the values of each.

    Parameters
    ----------
    stores
        The stores.
    parts
        Their parts; the first of each store that has cells is looked at.
    layer
        Matrix of the parts.
    """
    if len(stores) < 2:
        return
    owner = {id(part): number for number, store in enumerate(stores) for part in store.every_part}
    per_store: dict[int, StoredMatrix] = {}
    for part in parts:
        if 0 not in part.matrix(layer).shape:
            per_store.setdefault(owner[id(part)], part.matrix(layer))
    counts: dict[bool, StoredMatrix] = {}
    for matrix in islice(per_store.values(), _STORES):
        counts.setdefault(_are_counts(matrix), matrix)
    if len(counts) == 2:
        found = [f"{counts[kind].name} holds {look_at(as_stream(counts[kind]))}" for kind in (True, False)]
        warnings.warn(
            f"matrix {layer!r} mixes kinds of values: {'; '.join(found)}. Batches hold both as they are; "
            f"open these stores apart, or name a matrix that all of them have with {option('layer')}",
            UserWarning,
            stacklevel=2,
        )


def _are_counts(matrix: StoredMatrix) -> bool:
    """Whether the first values are whole and not negative."""
    array = StoredArray(matrix.values)
    if array.dtype.kind not in "f":
        return True
    width = int(np.prod(array.shape[1:], dtype=np.int64)) or 1
    values = array[slice(0, max(1, _VALUES // width))]
    with np.errstate(invalid="ignore"):
        return bool(((values >= 0) & (np.trunc(values) == values)).all())
