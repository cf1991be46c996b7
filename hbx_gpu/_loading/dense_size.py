"""Refuses dense batches that memory cannot hold, with the arithmetic, before the first one is made."""

from __future__ import annotations

from hbx_gpu._devices import free_host_memory
from hbx_gpu._loading.sampler_attributes import batch_size_of
from hbx_gpu._protocols import AnyCollate
from hbx_gpu.errors import ResourceError


def check_dense_batch(collate: AnyCollate, n_features: object, order: object) -> None:
    """Refuse a dense layout if a single batch is larger than the memory that is free.

    Parameters
    ----------
    collate
        What makes the batches.
    n_features
        Width of the dataset; a mapping for several modalities.
    order
        The sampler; one that does not tell its batch size is not judged.

    Raises
    ------
    ResourceError
        The batch does not fit; the message says how large it is and why.
    """
    n_rows = batch_size_of(order)
    if n_rows is None:
        return
    needed, free = collate.nbytes(n_rows, n_features), free_host_memory()
    if needed <= free:
        return
    product = f"{n_rows:,} rows"
    if isinstance(n_features, int) and n_features:
        product += f" x {n_features:,} features x {needed // (n_rows * n_features)} bytes"
    raise ResourceError(
        f"a dense batch of {product} takes {needed / 1e9:,.1f} GB, and {free / 1e9:,.1f} GB of memory are "
        "free: make the batches smaller, select fewer features with query.features(...), or load CSR "
        "batches, which hold stored values only"
    )
