"""Loaders whose batches go through a DALI pipeline with operators of the user, and batches for JAX."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from hbx_gpu._devices import require_dali
from hbx_gpu._loading.dali.loader import CellPipeline
from hbx_gpu._loading.loader import CellLoader
from hbx_gpu._loading.options import DaliOptions, Graph, LoaderOptions

if TYPE_CHECKING:
    from hbx_gpu.transforms import Transform

__all__ = ["CellPipeline", "DaliOptions", "Graph", "cell_pipeline", "jax_batches"]


def cell_pipeline(
    dataset: object,
    sampler: object,
    *,
    device: object = "cpu",
    layout: str = "dense",
    dtype: str = "float32",
    transform: Transform | list[Transform] | None = None,
    graph: Graph | None = None,
    prefetch_queue_depth: int = 2,
    num_threads: int | None = None,
    seed: int | None = None,
    **kwargs: object,
) -> CellPipeline:
    """A loader whose batches go through a DALI pipeline, and through DALI operators of yours.

    Parameters
    ----------
    dataset, sampler, device, layout, dtype, transform
        As for :func:`hbx_gpu.dataloader.make_loader`.
    graph
        Called with the fields of a batch as DALI ``DataNode`` s by name; returns those that come out: a dict
        (what the fields of a batch are called), or a tuple (batches are tuples then). A field has one sample
        per batch, without layout: ``X`` (n_rows, n_features), metadata (n_rows,), ``index``. A sparse batch
        is ``X.indices``, ``X.values`` and ``X.offsets``, and becomes a tensor again if all three come out.
        Metadata that are not numbers do not go through DALI; they keep their place in the dict. A graph
        cannot be combined with ``dtype="bfloat16"``, which DALI does not have. None: fields pass unchanged.
    prefetch_queue_depth
        Batches inside DALI that the consumer has not received. They come on top of `memory_budget`: on the
        CPU twice, as DALI copies what it hands out.
    num_threads
        DALI's own threads (default: the cores this process may use).
    seed
        Seed of DALI's random operators, which also depend on epoch and rank (default: the sampler's seed).
    **kwargs
        As for :func:`hbx_gpu.dataloader.make_loader`.

    Returns
    -------
    CellPipeline
        Iterate it for torch tensors, hand it to :func:`jax_batches`, or take :meth:`CellPipeline.pipeline`
        for a plugin of DALI's.

    Raises
    ------
    DeviceUnavailableError
        DALI or the device cannot be used; says what is missing.
    ValueError
        Options that do not go together, as for :func:`hbx_gpu.dataloader.make_loader`.
    """
    from hbx_gpu._loading.make import build_loader

    if graph is not None and dtype == "bfloat16":
        raise ValueError(
            "DALI has no bfloat16, so a graph would compute on its bits; ask for float32 or float16 and turn "
            'the batch into bfloat16 after the graph: batch["X"].bfloat16()'
        )
    require_dali(instead="make_loader hands batches over without it")
    dali = DaliOptions(graph, prefetch_queue_depth, num_threads, seed)
    options = LoaderOptions.of(layout=layout, dtype=dtype, transform=transform, dali=dali, **kwargs)
    loader = build_loader(dataset, sampler, None, device, options)
    assert isinstance(loader, CellPipeline)
    return loader


def jax_batches(loader: CellLoader) -> Iterator[Any]:
    """Batches of any loader with a `layout` as JAX arrays, without a copy where JAX takes the memory.

    Yields
    ------
    dict, or tuple
        As the loader's, with ``jax.Array`` for dense tensors and ``jax.experimental.sparse.BCSR`` for sparse
        ones. JAX makes 64-bit numbers 32-bit, by a copy, unless ``jax_enable_x64`` is set. Anything else
        stays as it is.
    """
    import torch
    from jax import dlpack
    from jax.experimental import sparse

    def converted(value: object) -> object:
        if not isinstance(value, torch.Tensor):
            return value
        if value.layout is not torch.sparse_csr:
            return dlpack.from_dlpack(value)
        parts = value.values(), value.col_indices(), value.crow_indices()
        return sparse.BCSR(tuple(map(dlpack.from_dlpack, parts)), shape=tuple(value.shape))

    for batch in loader:
        if not isinstance(batch, dict):
            yield tuple(map(converted, batch))
        else:
            yield {name: converted(value) for name, value in batch.items()}
