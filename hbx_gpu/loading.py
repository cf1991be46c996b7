"""`make_loader`: from a dataset, an order and a device to one iterable of batches."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Any, cast

import numpy as np

from hbx_gpu.collates import DenseCollate, check_columns, sparse_to_csr_collate
from hbx_gpu.devices import resolve
from hbx_gpu.transforms import Transform, chain

if TYPE_CHECKING:
    from hbx_gpu.engine.device.backend import Backend
    from hbx_gpu.engine.device.staged import Layout
    from hbx_gpu.feeds import Feed
    from hbx_gpu.loader import CellLoader
    from hbx_gpu.pipeline import DaliOptions

EXECUTORS = ("auto", "dali", "direct")

_LOG = logging.getLogger(__name__)
_told: set[str] = set()
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
    executor: str = "auto",
    io: str | None = None,
    residency: str = "none",
    **kwargs: Any,
) -> CellLoader:
    """Iterate batches of `dataset` in the order of `sampler`, read and decoded ahead.

    Parameters
    ----------
    dataset
        What to load: a dataset, or what has ``to_cell_dataset``, such as an SCDL archive.
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
    executor
        Who hands batches over: ``"direct"``, a queue; ``"dali"``, a DALI pipeline, which takes longer and
        gives the same batches; ``"auto"``, DALI where it is installed, a `layout` is given and no worker
        processes are asked for, said once in the log. :func:`hbx_gpu.pipeline.cell_pipeline` adds DALI
        operators.
    io
        How stored bytes are read: ``"mmap"``, ``"pinned"`` (``preadv``; on a GPU into page-locked memory),
        ``"kvikio"`` (a GPU only: whole chunks to its memory), ``"auto"``, which measures those on the
        dataset's own files. None: ``"mmap"`` on a GPU, as the dataset was opened elsewhere.
    residency
        Where chunks stay between batches: ``"none"``, ``"host"``, ``"device"``, or ``"auto"``, which decides
        by size. Without a GPU: the page cache, or a copy on the heap. Needs num_workers 0, as `io` does.
    **kwargs
        ``num_workers``: 0 = threads of this process, > 0 = that many spawned, persistent torch workers.
        ``threads``: threads when num_workers is 0 (default: the cores this process may use).
        ``window``: batches under one plan when num_workers is 0 (default: as many as make 4,096 rows).
        ``residency_budget``: bytes that may stay. ``residency_load``, on a GPU: ``"start"`` (default: all
        chunks before the first batch) or ``"touch"`` (each when it is first needed).
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
        a GPU without layout, or with worker processes. An unknown executor; DALI without layout, or with
        worker processes.
    DeviceUnavailableError
        A GPU or DALI was asked for by name and cannot be used; says what is missing.
    """
    options: dict[str, Any] = {"device": device, "layout": layout, "dtype": dtype, "transform": transform}
    options |= {"memory_budget": memory_budget, "io": io, "residency": residency, **kwargs}
    if _through_dali(executor, sampler, **options):
        from hbx_gpu.pipeline import DaliOptions

        return build_loader(dataset, sampler, collate_fn, dali=DaliOptions(), **options)
    return build_loader(dataset, sampler, collate_fn, **options)


def _through_dali(
    executor: str, sampler: Any, *, device: Any, layout: str | None, num_workers: int | None = None, **_: Any
) -> bool:
    """Whether batches go through DALI; raises where they cannot and were to."""
    if executor not in EXECUTORS:
        raise ValueError(f"executor must be one of {', '.join(map(repr, EXECUTORS))}, got {executor!r}")
    if executor == "direct":
        return False
    if executor == "dali":
        from hbx_gpu.pipeline import require

        if layout is None:
            raise ValueError(
                'DALI carries tensors: say layout="dense" or layout="csr" instead of a collate_fn'
            )
        require()
        return True
    if layout is None:
        return False
    if num_workers is None and str(device) == "cpu":
        num_workers = int(getattr(sampler, "num_workers", 0))
    if num_workers:
        return False
    from hbx_gpu.pipeline import missing

    reason = missing()
    said = f"directly: {reason}" if reason else 'through DALI; executor="direct" does without it'
    if said not in _told:
        _told.add(said)
        _LOG.info("hbx_gpu hands batches over %s", said)
    return reason is None


def build_loader(
    dataset: Any,
    sampler: Any,
    collate_fn: Callable[[Any], Any] | None = None,
    *,
    device: Any,
    layout: str | None,
    dtype: str,
    transform: Transform | Sequence[Transform] | None,
    memory_budget: int | None = None,
    io: str | None = None,
    residency: str = "none",
    residency_budget: int | None = None,
    residency_load: str = "start",
    dali: DaliOptions | None = None,
    **kwargs: Any,
) -> CellLoader:
    """:func:`make_loader` once it is known who hands batches over: DALI, or nobody else."""
    from hbx_gpu.feeds import HostFeed

    dataset = cells_of(dataset)
    if layout is not None:
        if collate_fn is not None:
            raise ValueError("layout and collate_fn both say what a batch becomes; give one of them")
        collate_fn = _collate_for(layout, dtype, chain(transform))
        if hasattr(dataset, "collate_with"):  # batches of pairs
            collate_fn = dataset.collate_with(collate_fn)
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
            io=io,
            residency=residency,
            residency_budget=residency_budget,
            residency_load=residency_load,
            dali=dali and replace(dali, device_id=gpu),
            **kwargs,
        )
    memory_budget = _HOST_BUDGET if memory_budget is None else memory_budget
    if layout is not None:
        dataset = IndexedDataset(dataset)
    elif transform is not None or dtype != "float32":
        raise ValueError('dtype and transform belong to layout="dense"; a collate_fn makes its own')
    if io is not None or residency != "none":
        workers = kwargs.get("num_workers")
        if workers or (workers is None and dali is None and getattr(sampler, "num_workers", 0)):
            raise ValueError(
                "io and residency are about memory of this process, which worker processes do not share: say "
                "num_workers=0"
            )
        kwargs["num_workers"] = 0
        kwargs["feed"] = HostFeed(
            dataset,
            collate_fn or _as_it_is,
            io=io,
            residency=residency,
            residency_budget=residency_budget,
            threads=kwargs.get("threads"),
        )
    return _loader(dali, dataset, sampler, collate_fn, memory_budget=memory_budget, **kwargs)


def _as_it_is(batch: Any) -> Any:
    return batch


def _loader(
    dali: DaliOptions | None, *args: Any, num_workers: int | None = None, **kwargs: Any
) -> CellLoader:
    from hbx_gpu.loader import CellLoader

    if dali is None:
        return CellLoader(*args, num_workers=num_workers, **kwargs)
    from hbx_gpu.pipeline import CellPipeline

    if num_workers:
        raise ValueError(
            "batches of worker processes do not go through DALI: leave num_workers at 0, or say "
            'executor="direct"'
        )
    return CellPipeline(*args, num_workers=0, dali=dali, **kwargs)


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
    io: str | None = None,
    residency: str = "none",
    residency_budget: int | None = None,
    residency_load: str = "start",
    dali: DaliOptions | None = None,
    **kwargs: Any,
) -> CellLoader:
    """:func:`make_loader` on a backend: threads stage, the device decodes."""
    from hbx_gpu.feeds import DeviceFeed

    if num_workers:
        raise ValueError(
            "worker processes cannot hand over tensors on a GPU; leave num_workers at 0: reading and staging "
            "run on threads, whose number `threads` sets"
        )
    dataset = cells_of(dataset)
    make_feed = partial(
        DeviceFeed,
        backend=backend,
        layout=cast("Layout", layout),  # _collate_for knows no others
        dtype=dtype,
        transform=transform or Transform(),
        reader=reader,
        io=io,
        residency=residency,
        residency_budget=residency_budget,
        residency_load=residency_load,
        threads=threads,
    )
    feed: Feed = dataset.feed_with(make_feed) if hasattr(dataset, "feed_with") else make_feed(dataset)
    return _loader(
        dali,
        dataset,
        sampler,
        num_workers=0,
        threads=threads,
        window=window,
        memory_budget=memory_budget,
        feed=feed,
        **kwargs,
    )


def cells_of(dataset: Any) -> Any:
    """The dataset of cells that something makes of itself (an SCDL archive, a query), or what was given."""
    return getattr(dataset, "to_cell_dataset", lambda: dataset)()


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
