"""Fragments of a batch to counts per region: checks and memory; the loops are in `kernels`."""

from __future__ import annotations

import numpy as np

from hbx_gpu._buffers import POOL
from hbx_gpu.batch import SparseBatch
from hbx_gpu.chromatin._regions import COUNTS, Regions
from hbx_gpu.errors import CorruptDataError, InvalidDataError

LAYERS = ("starts", "lengths")
"""Layers that a batch of fragments must hold besides the chromosomes in its indices."""


def count_fragments(batch: SparseBatch, matrix: Regions) -> SparseBatch:
    """Count the fragments of every row over regions.

    Parameters
    ----------
    batch
        Rows of fragments: `indices` are chromosome numbers, `layers` holds `LAYERS`.
    matrix
        Regions over those chromosomes; says what counts (:class:`Bins`). Fragments
        outside of all regions, on chromosomes without any and without length are not counted.

    Returns
    -------
    SparseBatch
        `indices` int32, ascending and each once within a row; `values` uint32.

    Raises
    ------
    InvalidDataError
        The batch lacks a layer.
    CorruptDataError
        A chromosome number that the regions do not know.
    """
    starts, lengths = fragment_layers(batch)
    _check_chromosomes(batch.indices, matrix.n_chromosomes)
    from hbx_gpu.chromatin import _kernels as kernels

    fragments = (batch.indices, starts, lengths, batch.offsets)
    mode, lookup = COUNTS.index(matrix.count), matrix.lookup()
    offsets = np.zeros(len(batch) + 1, np.int64)
    line = np.empty(2 * int(np.diff(batch.offsets).max(initial=0)) + 64, np.int32)
    indices, values = _room(2 * len(batch.indices) + 64)
    row = kernels.count_rows(0, *fragments, mode, *lookup, line, indices, values, offsets)
    while row < len(batch):  # very narrow bins, or many overlapping peaks
        done = int(offsets[row])
        full, (indices, values) = (indices, values), _room(2 * len(indices))
        indices[:done], values[:done] = full[0][:done], full[1][:done]
        line = np.empty(2 * len(line), np.int32)
        row = kernels.count_rows(row, *fragments, mode, *lookup, line, indices, values, offsets)
    number = int(offsets[-1])
    if 2 * number < len(indices):  # few peaks hold few fragments: do not keep the rest as long as the batch
        full, (indices, values) = (indices, values), _room(number)
        indices[:], values[:] = full[0][:number], full[1][:number]
    return SparseBatch(
        indices=indices[:number],
        values=values[:number],
        offsets=offsets,
        n_features=matrix.n_features,
        metadata=batch.metadata,
    )


def _room(number: int) -> tuple[np.ndarray, np.ndarray]:
    return POOL.empty(number, np.int32), POOL.empty(number, np.uint32)


def fragment_layers(batch: SparseBatch) -> tuple[np.ndarray, np.ndarray]:
    """Return the starts and lengths of a batch of fragments.

    Raises
    ------
    InvalidDataError
        The batch lacks one of them.
    """
    if missing := [name for name in LAYERS if name not in batch.layers]:
        raise InvalidDataError(
            f"a batch of fragments needs the layers {list(LAYERS)}; {missing} missing in "
            f"{sorted(batch.layers)}: read both, with layer={list(LAYERS)}"
        )
    return batch.layers["starts"], batch.layers["lengths"]


def _check_chromosomes(indices: np.ndarray, n_chromosomes: int) -> None:
    if len(indices) and (indices.min() < 0 or indices.max() >= n_chromosomes):
        raise CorruptDataError(
            f"fragments name chromosomes {indices.min()} to {indices.max()}, but the regions were laid over "
            f"{n_chromosomes}; lay them over the names of this dataset's columns"
        )
