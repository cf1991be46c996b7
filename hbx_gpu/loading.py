"""`make_loader`: from a dataset, an order and a device to one iterable of batches."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from hbx_gpu.collates import DenseCollate, check_columns, sparse_to_csr_collate
from hbx_gpu.devices import resolve
from hbx_gpu.transforms import Transform, chain

if TYPE_CHECKING:
    from hbx_gpu.engine.device.backend import Backend
    from hbx_gpu.loader import CellLoader

_HOST_BUDGET = 512 << 20
_DEVICE_BUDGET = 4 << 30


def make_loader(
    dataset: Any,
    sampler: Any,
    collate_fn: Callable[[Any], Any] | None = None,
    *,
    device: Any = "cpu",
    layout: str | None = None,
    dtype: str = "float32",
    transform: Transform | Sequence[Transform] | None = None,
    memory_budget: int | None = None,
    **kwargs: Any,
) -> CellLoader:
    """Iterate batches of `dataset` in the order of `sampler`, read and decoded ahead.

    Parameters
    ----------
    dataset
        What to load.
    sampler
        Yields the row numbers of each batch: a :class:`~hbx_gpu.sampler.CellSampler`, or any torch
        batch sampler. Its `num_workers`, if it has one, is the default below.
    collate_fn
        Applied to every batch; None hands out the batch objects themselves.
    device
        Where batches are decoded and handed out: ``"cpu"``, ``"cuda"``, ``"cuda:N"``, a ``torch.device``,
        or ``"auto"`` for a GPU where one can be used and the CPU elsewhere. A GPU needs `layout`. Batches
        hold the same numbers on every device.
    layout
        Instead of a collate_fn: dicts with ``X`` (``"dense"``: a tensor of `dtype` after `transform`;
        ``"csr"``: a sparse float32 tensor), ``index`` (int64 row numbers) and the metadata columns, on
        `device`.
    dtype, transform
        See :class:`DenseCollate`; for ``layout="dense"`` only.
    memory_budget
        Bytes that batches made ahead of the consumer may take up, when num_workers is 0 (default: 512 MiB,
        on a GPU 4 GiB of its memory). One batch is always made, whatever its size.
    **kwargs
        ``num_workers``: 0 = threads of this process, > 0 = that many spawned, persistent torch workers.
        ``threads``: threads when num_workers is 0 (default: the cores this process may use).
        ``window``: batches under one plan when num_workers is 0 (default: as many as make 4,096 rows).
        ``reader``, on a GPU: how stored bytes reach page-locked memory, ``"mmap"`` (default: copied out of
        the page cache) or ``"pinned"`` (read with ``preadv``: for storage that is slow to its first byte).
        Anything else goes to ``torch.utils.data.DataLoader``.

    Returns
    -------
    CellLoader
        A ``torch.utils.data.DataLoader`` with ``state_dict``, ``load_state_dict``, ``set_epoch`` and
        ``close``. An error of a thread or worker is raised by the next ``next()``.

    Raises
    ------
    ValueError
        `batch_size`, `shuffle`, `drop_last` or `batch_sampler` among the keywords: the sampler decides these.
        Both layout and collate_fn; an unknown layout or dtype; dtype or transform without ``layout="dense"``;
        a GPU without layout, or with worker processes.
    DeviceUnavailableError
        A GPU was asked for by name and cannot be used; says what is missing.
    """
    from hbx_gpu.loader import CellLoader

    if layout is not None:
        if collate_fn is not None:
            raise ValueError("layout and collate_fn both say what a batch becomes; give one of them")
        collate_fn = _collate_for(layout, dtype, chain(transform))
    gpu = resolve(device)
    if gpu is not None:
        from hbx_gpu.engine.device.cuda import CudaBackend

        if layout is None:
            raise ValueError(
                'on a GPU batches are tensors from the start: say layout="dense" or layout="csr"'
            )
        backend = CudaBackend(gpu)
        backend.warm_up()
        return device_loader(
            dataset,
            sampler,
            backend,
            layout=layout,
            dtype=dtype,
            transform=chain(transform),
            memory_budget=_DEVICE_BUDGET if memory_budget is None else memory_budget,
            **kwargs,
        )
    memory_budget = _HOST_BUDGET if memory_budget is None else memory_budget
    if layout is not None:
        dataset = IndexedDataset(dataset)
    elif transform is not None or dtype != "float32":
        raise ValueError('dtype and transform belong to layout="dense"; a collate_fn makes its own')
    return CellLoader(dataset, sampler, collate_fn, memory_budget=memory_budget, **kwargs)


def device_loader(
    dataset: Any,
    sampler: Any,
    backend: Backend,
    *,
    layout: str,
    dtype: str = "float32",
    transform: Transform | None = None,
    memory_budget: int = _DEVICE_BUDGET,
    num_workers: int = 0,
    threads: int | None = None,
    window: int | None = None,
    reader: str = "mmap",
    **kwargs: Any,
) -> CellLoader:
    """:func:`make_loader` on a backend: threads stage, the device decodes."""
    from hbx_gpu.feeds import DeviceFeed
    from hbx_gpu.loader import CellLoader, default_window

    if num_workers:
        raise ValueError(
            "worker processes cannot hand over tensors on a GPU; leave num_workers at 0: reading and staging "
            "run on threads, whose number `threads` sets"
        )
    feed = DeviceFeed(
        dataset, backend, layout=layout, dtype=dtype, transform=transform or Transform(), reader=reader
    )
    return CellLoader(
        dataset,
        sampler,
        num_workers=0,
        threads=threads,
        window=window or (1 if feed.one_batch_per_window else default_window(sampler)),
        memory_budget=memory_budget,
        feed=feed,
        **kwargs,
    )


class IndexedDataset:
    """A dataset whose batches carry their row numbers as metadata column ``index``."""

    def __init__(self, dataset: Any) -> None:
        self.dataset = dataset

    def __getattr__(self, name: str) -> Any:
        if name == "dataset" or name.startswith("__"):  # while it is being unpickled
            raise AttributeError(name)
        return getattr(self.dataset, name)

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitems__(self, rows: Sequence[int] | np.ndarray) -> Any:
        return self._indexed(self.dataset.__getitems__(rows), rows)

    def read_batches(self, batches: Sequence[Sequence[int] | np.ndarray]) -> list[Any]:
        """See :meth:`CellDataset.read_batches`."""
        return [
            self._indexed(*found) for found in zip(self.dataset.read_batches(batches), batches, strict=True)
        ]

    def _indexed(self, batch: Any, rows: Sequence[int] | np.ndarray) -> Any:
        check_columns([*(batch.metadata or {}), "index"])
        batch.metadata = {**(batch.metadata or {}), "index": self.dataset.row_numbers(rows)}
        return batch


def _collate_for(layout: str, dtype: str, transform: Transform) -> Callable[[Any], Any]:
    from hbx_gpu.engine.host.dense import FORMATS

    if layout == "dense":
        if dtype not in FORMATS:
            raise ValueError(f"dense batches come as {', '.join(FORMATS)}; got {dtype!r}")
        return DenseCollate(dtype, transform)
    if layout != "csr":
        raise ValueError(f'layout must be "dense" or "csr", got {layout!r}')
    if transform != Transform() or dtype != "float32":
        raise ValueError('layout="csr" gives float32 values as stored; transform and dtype need "dense"')
    return sparse_to_csr_collate
