"""Turn CSR rows into dense rows on the host: in any float width, with counts transformed in the same pass."""

from __future__ import annotations

import numpy as np

from hbx_gpu._buffers import BufferPool
from hbx_gpu._engine.host.dense_kernels import BFLOAT16, FLOAT16, NATIVE, add_rows, convert_rows
from hbx_gpu._float16 import FIRST_INFINITE, say_overflow
from hbx_gpu.batch import SparseBatch
from hbx_gpu.transforms import Transform, not_counts

FORMATS = {"float32": NATIVE, "float64": NATIVE, "bfloat16": BFLOAT16, "float16": FLOAT16}
"""Dense dtypes. The 16-bit ones are made as bit patterns in uint16: NumPy has no bfloat16, and numba cannot
add float16."""


def _are_counts(values: np.ndarray) -> bool:
    """Whether all values are whole numbers of at least 0."""
    if values.dtype.kind == "u" or not len(values):
        return True
    if values.dtype.kind != "f":
        return bool(values.min() >= 0)
    return bool(np.isfinite(values).all() and values.min() >= 0 and (np.floor(values) == values).all())


def densify(
    batch: SparseBatch,
    *,
    dtype: str = "float32",
    transform: Transform | None = None,
    pool: BufferPool | None = None,
) -> np.ndarray:
    """Return a sparse batch as a dense matrix; columns that repeat within a row are summed.

    Values that are too large for float16 become infinite in it, with a warning.

    Parameters
    ----------
    batch
        Rows of a sparse feature space.
    dtype
        dtype of the output, a key of `FORMATS`.
    transform
        Transform to apply to the sums before they are rounded to `dtype`.
    pool
        Pool that the memory of the output comes from.

    Returns
    -------
    ndarray
        (n_rows, n_features), C order. float32 or float64; float16 as such; bfloat16 as uint16 bit patterns.

    Raises
    ------
    ValueError
        The dtype is unknown, or a column lies outside the matrix.
    InvalidDataError
        There is a transform, and values are not counts.
    """
    if dtype not in FORMATS:
        raise ValueError(f"dense batches come as {', '.join(FORMATS)}; got {dtype!r}")
    transform = transform or Transform()
    kind = FORMATS[dtype]
    stored = np.dtype(np.uint16) if kind != NATIVE else np.dtype(dtype)
    shape = (len(batch), batch.n_features)
    out = (pool.empty if pool else np.empty)(shape, stored)
    target_sum = transform.target_sum or 0.0
    # numba cannot add float16.
    values = batch.values if batch.values.dtype != np.float16 else batch.values.astype(np.float32)
    if transform != Transform() and not _are_counts(batch.values):
        raise not_counts("the batch's layer")
    if kind == NATIVE and not transform.log1p:
        bad = add_rows(batch.offsets, batch.indices, values, target_sum, out)
    else:
        tile = np.zeros(batch.n_features, np.float32)
        sums = np.empty(int(np.diff(batch.offsets).max(initial=0)), np.float32)
        bad, largest = convert_rows(
            batch.offsets,
            batch.indices,
            values,
            target_sum,
            transform.log1p,
            kind,
            tile,
            sums,
            out,
        )
        if largest >= FIRST_INFINITE:
            say_overflow(float(largest))
    if bad >= 0:
        raise ValueError(f"row {bad} of the batch has a column outside [0, {batch.n_features})")
    return out.view(np.float16) if kind == FLOAT16 else out
