"""`make_loader`: from a dataset, an order and a device to one iterable of batches."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Any, TypeAlias, cast

import numpy as np

from hbx_gpu._collates import (
    DenseCollate,
    ImagesCollate,
    LayersCollate,
    MatrixCollate,
    MultimodalCollate,
    dense_to_tensor_collate,
    sparse_to_csr_collate,
)
from hbx_gpu._devices import dali_missing, require_dali, resolve, say_once
from hbx_gpu._tensors import check_columns
from hbx_gpu.transforms import Transform, chain

if TYPE_CHECKING:
    from hbx_gpu._datasets.dense import DenseCellDataset
    from hbx_gpu._datasets.multimodal import MultimodalCellDataset
    from hbx_gpu._engine.device.backend import Backend
    from hbx_gpu._loading.dali.options import DaliOptions
    from hbx_gpu._loading.feeds.host import Feed
    from hbx_gpu._loading.loader import CellLoader
    from hbx_gpu.images import ImageTransform, TileCollate

Steps: TypeAlias = Transform | Sequence[Transform]
Images: TypeAlias = "ImageTransform | TileCollate"
EXECUTORS = ("auto", "dali", "direct")

_LOG = logging.getLogger(__name__)
_HOST_BUDGET = 512 << 20
_DEVICE_BUDGET = 4 << 30


def make_loader(
    dataset: Any,
    sampler: Any = None,
    collate_fn: Callable[[Any], Any] | None = None,
    *,
    batch_size: int | None = None,
    shuffle: bool | None = None,
    drop_last: bool | None = None,
    seed: int | None = None,
    device: Any = "cpu",
    layout: str | Mapping[str, str] | None = None,
    dtype: str | Mapping[str, str] = "float32",
    transform: Steps | Mapping[str, Steps] | None = None,
    memory_budget: int | None = None,
    executor: str = "auto",
    io: str | None = None,
    residency: str = "none",
    images: Images | Mapping[str, Images] | None = None,
    image_seed: int | None = None,
    **kwargs: Any,
) -> CellLoader:
    """Iterate batches of `dataset` in the order of `sampler`, read and decoded ahead.

    Parameters
    ----------
    dataset
        What to load: a dataset, what has ``to_cell_dataset``, such as an SCDL archive, or a torch ``Subset``,
        ``random_split`` or ``ConcatDataset`` of these, whose rows are numbered as torch does.
    sampler
        Yields the row numbers of each batch: a :class:`~hbx_gpu.sampler.CellSampler`, any torch batch
        sampler, or a torch sampler of rows, such as ``RandomSampler``. None: a CellSampler of the dataset.
        Its `num_workers`, if it has one, is the default below.
    batch_size, shuffle, drop_last, seed
        Of the CellSampler that is made where there is no `sampler` (default: 1,024 rows, not shuffled).
        Beside a sampler of rows `batch_size` and `drop_last` only.
    collate_fn
        Applied to every batch; None hands out the batch objects themselves.
    device
        Where batches are decoded and handed out: ``"cpu"``, ``"cuda"``, ``"cuda:N"``, a ``torch.device``,
        or ``"auto"`` for a GPU where one can be used and the CPU elsewhere. A GPU needs `layout`. Batches
        hold the same numbers on every device.
    layout
        Instead of a collate_fn: dicts with ``X`` (``"dense"``: a tensor of `dtype` after `transform`;
        ``"csr"``: a sparse float32 tensor), ``index`` (int64 row numbers) and the metadata columns, on
        `device`. Of a multimodal dataset: one for all its sparse spaces, or by space; batches are those of
        :class:`MultimodalCollate`. Dense spaces and tiles have ``"dense"`` only.
    dtype, transform
        See :class:`DenseCollate`; for ``layout="dense"``. By space for a multimodal dataset. Tiles keep their
        dtype, and transforms are for sparse spaces.
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
    images
        What is done to tiles, boxes or encoded images on their way, by DALI: an
        :class:`~hbx_gpu.images.ImageTransform`, or a :class:`~hbx_gpu.images.TileCollate` for more say in it;
        by space for a multimodal dataset. Tiles are then (n, C, H, W) tensors, zeros for cells without one.
        Needs a layout, and num_workers 0.
    image_seed
        Of what is drawn for images, with epoch and cell (default: the sampler's seed, or 0).
    **kwargs
        ``num_workers``: 0 = threads of this process, > 0 = that many spawned, persistent torch workers.
        ``threads``: threads when num_workers is 0 (default: the cores this process may use).
        ``window``: batches under one plan when num_workers is 0 (default: as many as make 4,096 rows).
        ``residency_budget``: bytes that may stay. ``residency_load``, on a GPU: ``"start"`` (default: all
        chunks before the first batch) or ``"touch"`` (each when it is first needed). ``decode``, on a GPU:
        where chunks of zstd, lz4, gzip, zlib and blosc are decoded: ``"host"``, ``"device"`` (nvCOMP), or
        ``"auto"`` (default: by nvCOMP where they carry a CRC32C); see docs/gpu.md.
        Anything else goes to ``torch.utils.data.DataLoader``.

    Returns
    -------
    CellLoader
        A ``torch.utils.data.DataLoader`` with ``state_dict``, ``load_state_dict``, ``set_epoch`` and
        ``close``. An error of a thread or worker is raised by the next ``next()``.

    Raises
    ------
    ValueError
        `batch_size`, `shuffle`, `drop_last` or `seed` beside a sampler of batches, which decides these.
        Both layout and collate_fn; an unknown layout or dtype; dtype or transform without ``layout="dense"``;
        a GPU without layout, or with worker processes. An unknown executor; DALI without layout, or with
        worker processes.
    DeviceUnavailableError
        A GPU or DALI was asked for by name and cannot be used; says what is missing.
    """
    from hbx_gpu._loading.splits import order_for, unwrapped

    dataset = unwrapped(dataset)
    sampler = order_for(
        dataset, sampler, batch_size=batch_size, shuffle=shuffle, drop_last=drop_last, seed=seed
    )
    options: dict[str, Any] = {"device": device, "layout": layout, "dtype": dtype, "transform": transform}
    options |= {"memory_budget": memory_budget, "io": io, "residency": residency, **kwargs}
    options |= {"images": images, "image_seed": image_seed}
    if _through_dali(executor, sampler, **options):
        from hbx_gpu._loading.dali.options import DaliOptions

        return build_loader(dataset, sampler, collate_fn, dali=DaliOptions(), **options)
    return build_loader(dataset, sampler, collate_fn, **options)


def _through_dali(
    executor: str, sampler: Any, *, device: Any, layout: Any, num_workers: int | None = None, **_: Any
) -> bool:
    """Whether batches go through DALI; raises where they cannot and were to."""
    if executor not in EXECUTORS:
        raise ValueError(f"executor must be one of {', '.join(map(repr, EXECUTORS))}, got {executor!r}")
    if executor == "direct":
        return False
    if executor == "dali":
        if layout is None:
            raise ValueError(
                'DALI carries tensors: say layout="dense" or layout="csr" instead of a collate_fn'
            )
        require_dali(instead='executor="auto" hands them over directly where there is no DALI')
        return True
    if layout is None:
        return False
    if num_workers is None and str(device) == "cpu":
        num_workers = int(getattr(sampler, "num_workers", 0))
    if num_workers:
        return False
    reason = dali_missing()
    said = f"directly: {reason}" if reason else 'through DALI; executor="direct" does without it'
    say_once(_LOG, logging.INFO, f"hbx_gpu hands batches over {said}")
    return reason is None


def build_loader(
    dataset: Any,
    sampler: Any,
    collate_fn: Callable[[Any], Any] | None = None,
    *,
    device: Any,
    layout: str | Mapping[str, str] | None,
    dtype: str | Mapping[str, str],
    transform: Steps | Mapping[str, Steps] | None,
    memory_budget: int | None = None,
    io: str | None = None,
    residency: str = "none",
    residency_budget: int | None = None,
    residency_load: str = "start",
    decode: str = "auto",
    images: Images | Mapping[str, Images] | None = None,
    image_seed: int | None = None,
    dali: DaliOptions | None = None,
    **kwargs: Any,
) -> CellLoader:
    """:func:`make_loader` once it is known who hands batches over: DALI, or nobody else."""
    from hbx_gpu._engine.device.general import check_decode
    from hbx_gpu._loading.feeds.host import HostFeed

    check_decode(decode)  # on the CPU it says nothing else
    dataset = cells_of(dataset)
    gpu = resolve(device)
    if images is not None:
        images = _image_collates(dataset, sampler, images, image_seed, gpu, layout, kwargs)
    if layout is not None:
        if collate_fn is not None:
            raise ValueError("layout and collate_fn both say what a batch becomes; give one of them")
        collate_fn = _collate_for(dataset, layout, dtype, transform, images)
        if hasattr(dataset, "collate_with"):  # batches of pairs
            collate_fn = dataset.collate_with(collate_fn)
    if gpu is not None:
        from hbx_gpu._engine.device.cuda import CudaBackend

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
            transform=transform,
            memory_budget=_DEVICE_BUDGET if memory_budget is None else memory_budget,
            io=io,
            residency=residency,
            residency_budget=residency_budget,
            residency_load=residency_load,
            decode=decode,
            images=images,
            dali=dali and replace(dali, device_id=gpu),
            **kwargs,
        )
    memory_budget = _HOST_BUDGET if memory_budget is None else memory_budget
    dataset = _columns_for(dataset, collate_fn)
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


def _columns_for(dataset: Any, collate: Any) -> Any:
    """The dataset, with columns as sparse tensors want them where those are made."""
    from hbx_gpu._datasets.cells import CellDataset

    if isinstance(collate, MultimodalCollate):
        csr = [
            name
            for name, part in getattr(dataset, "datasets", {}).items()
            if type(part) is CellDataset and collate.options_of(name)["layout"] == "csr"
        ]
        return dataset.with_wide_columns(csr) if csr else dataset
    if getattr(collate, "collate", collate) is sparse_to_csr_collate:
        return getattr(dataset, "with_wide_columns", lambda: dataset)()
    return dataset


def _as_it_is(batch: Any) -> Any:
    return batch


def _loader(
    dali: DaliOptions | None, *args: Any, num_workers: int | None = None, **kwargs: Any
) -> CellLoader:
    from hbx_gpu._loading.loader import CellLoader

    if dali is None:
        return CellLoader(*args, num_workers=num_workers, **kwargs)
    from hbx_gpu._loading.dali.loader import CellPipeline

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
    layout: str | Mapping[str, str],
    dtype: str | Mapping[str, str] = "float32",
    transform: Steps | Mapping[str, Steps] | None = None,
    memory_budget: int = _DEVICE_BUDGET,
    num_workers: int = 0,
    threads: int | None = None,
    window: int | None = None,
    reader: str = "mmap",
    io: str | None = None,
    residency: str = "none",
    residency_budget: int | None = None,
    residency_load: str = "start",
    decode: str = "auto",
    images: Any = None,
    dali: DaliOptions | None = None,
    **kwargs: Any,
) -> CellLoader:
    """:func:`make_loader` on a backend: threads stage, the device decodes."""
    from hbx_gpu._loading.feeds.device import DeviceFeed

    if num_workers:
        raise ValueError(
            "worker processes cannot hand over tensors on a GPU; leave num_workers at 0: reading and staging "
            "run on threads, whose number `threads` sets"
        )
    from hbx_gpu._loading.feeds.multimodal import MultimodalFeed, cells_feed

    dataset = cells_of(dataset)
    collate = _collate_for(dataset, layout, dtype, transform, images)
    make_feed = partial(
        DeviceFeed,
        backend=backend,
        reader=reader,
        io=io,
        residency=residency,
        residency_budget=residency_budget,
        residency_load=residency_load,
        decode=decode,
        threads=threads,
    )
    if isinstance(collate, MultimodalCollate):
        feed: Feed = MultimodalFeed(dataset, collate, make_feed, backend, decode=decode)
    else:
        options = {"layout": layout, "dtype": dtype, "transform": chain(cast("Steps | None", transform))}

        def cells(part: Any) -> Feed:
            made: Feed = cells_feed(part, make_feed, backend, collate, decode=decode, **options)
            return made

        feed = dataset.feed_with(cells) if hasattr(dataset, "feed_with") else cells(dataset)
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
        return self._indexed(self.dataset.__getitems__(rows), self.dataset.row_numbers(rows))

    def read_batches(self, batches: Sequence[Sequence[int] | np.ndarray]) -> list[Any]:
        """See :meth:`CellDataset.read_batches`."""
        from hbx_gpu._datasets.cells import row_numbers_of

        _, batches = row_numbers_of(self.dataset, batches)
        found = self.dataset.read_batches(batches)
        return [self._indexed(batch, rows) for batch, rows in zip(found, batches, strict=True)]

    @staticmethod
    def _indexed(batch: Any, rows: np.ndarray) -> Any:
        check_columns([*(batch.metadata or {}), "index"])
        batch.metadata = {**(batch.metadata or {}), "index": rows}
        return batch


def _collate_for(
    dataset: Any,
    layout: str | Mapping[str, str],
    dtype: str | Mapping[str, str],
    transform: Steps | Mapping[str, Steps] | None,
    images: Any = None,
) -> Callable[[Any], Any]:
    """What makes the batches of a `layout` on the host."""
    from hbx_gpu._datasets.dense import DenseCellDataset
    from hbx_gpu._datasets.multimodal import MultimodalCellDataset

    if isinstance(dataset, MultimodalCellDataset):
        return _multimodal_collate(dataset, layout, dtype, transform, images)
    by_space = [setting for setting in (layout, dtype, transform) if isinstance(setting, Mapping)]
    if by_space:
        raise ValueError(f"settings by space are for multimodal datasets; got {by_space[0]!r}")
    steps = chain(cast("Steps | None", transform))
    if isinstance(dataset, DenseCellDataset):
        return _dense_collate(dataset, layout, dtype, steps, images)
    collate = _sparse_collate(cast(str, layout), cast(str, dtype), steps)
    return LayersCollate(collate) if len(getattr(dataset, "layers", ())) > 1 else collate


def _dense_collate(
    dataset: DenseCellDataset, layout: Any, dtype: Any, steps: Transform, images: Any
) -> Callable[[Any], Any]:
    from hbx_gpu._engine.host.dense import FORMATS

    what = f"{dataset.feature_space!r} is a dense space"
    if layout != "dense":
        raise ValueError(f'{what}: say layout="dense", not {layout!r}')
    if steps != Transform():
        raise ValueError(f"{what}; transforms are for counts of sparse ones")
    if images is not None:
        return ImagesCollate(images)
    if dataset.is_matrix:
        if dtype not in FORMATS:
            raise ValueError(f"dense batches come as {', '.join(FORMATS)}; got {dtype!r}")
        return LayersCollate(MatrixCollate(dtype))
    if dtype != "float32":
        raise ValueError(
            f"{what} of arrays, which keep their dtype; ask for another where the dataset is made: "
            "to_cell_dataset(..., dtype=), or in an ImageTransform"
        )
    return LayersCollate(dense_to_tensor_collate)


def _multimodal_collate(
    dataset: MultimodalCellDataset,
    layout: str | Mapping[str, str],
    dtype: str | Mapping[str, str],
    transform: Steps | Mapping[str, Steps] | None,
    images: Any,
) -> MultimodalCollate:
    from hbx_gpu._datasets.dense import DenseCellDataset

    sparse = [name for name, part in dataset.datasets.items() if not isinstance(part, DenseCellDataset)]
    if transform is not None and not isinstance(transform, Mapping):
        raise ValueError(f"say which space to transform, of {sparse}: transform={{space: steps}}")
    matrices = [name for name, part in dataset.datasets.items() if getattr(part, "kind", "") != "arrays"]
    for what, setting, known in (
        ("layout", layout, sparse),
        ("dtype", dtype, matrices),
        ("transform", transform, sparse),
    ):
        if strangers := sorted(set(setting if isinstance(setting, Mapping) else ()) - set(known)):
            raise ValueError(f"{what} was given for {strangers}; spaces that have one: {known}")
    for name in set(dtype.values() if isinstance(dtype, Mapping) else [dtype]):
        _sparse_collate("dense", name, Transform())
    steps = {name: chain(given) for name, given in (transform or {}).items()}
    collate = MultimodalCollate(layout, dtype, steps, images)
    for name in sparse:
        options = collate.options_of(name)
        _sparse_collate(**options)
    return collate


def _image_collates(
    dataset: Any,
    sampler: Any,
    images: Images | Mapping[str, Images],
    seed: int | None,
    gpu: int | None,
    layout: Any,
    options: dict[str, Any],
) -> Any:
    """What is done to images, ready to be called; by space for a multimodal dataset."""
    from hbx_gpu._datasets.dense import DenseCellDataset
    from hbx_gpu._datasets.multimodal import MultimodalCellDataset

    if layout is None:
        raise ValueError('images are made into tensors: say layout="dense" instead of a collate_fn')
    if options.get("num_workers"):
        raise ValueError(
            "worker processes do not learn of the epoch, which decides what is drawn for images: leave "
            "num_workers at 0"
        )
    options["num_workers"] = 0
    several = isinstance(dataset, MultimodalCellDataset)
    if several != isinstance(images, Mapping):
        raise ValueError("images of a multimodal dataset are given by space, those of other datasets are not")
    parts = dataset.datasets if isinstance(dataset, MultimodalCellDataset) else {"": dataset}
    if seed is None:
        seed = int(getattr(sampler, "seed", None) or 0)
    found = {}
    for name, wanted in (images if isinstance(images, Mapping) else {"": images}).items():
        part = parts.get(name)
        if not isinstance(part, DenseCellDataset) or part.is_matrix:
            having = [n for n, p in parts.items() if isinstance(p, DenseCellDataset) and not p.is_matrix]
            raise ValueError(
                f"images were given for {name!r}, which holds none; spaces with images: {having}"
                if several
                else f"images were given for {dataset!r}, which holds none"
            )
        found[name] = _tile_collate(wanted, part, seed, gpu)
    return found if several else found[""]


def _tile_collate(wanted: Images, part: DenseCellDataset, seed: int, gpu: int | None) -> TileCollate:
    from hbx_gpu.images import TileCollate

    if isinstance(wanted, TileCollate):
        return wanted
    shape = part.per_cell_shape
    # The loader runs several batches side by side.
    return TileCollate(
        wanted,
        seed=seed,
        device_id=gpu,
        num_threads=1,
        tile_shape=shape if shape is not None and len(shape) == 3 else None,
    )


def _sparse_collate(layout: str, dtype: str, transform: Transform) -> Callable[[Any], dict[str, Any]]:
    from hbx_gpu._engine.host.dense import FORMATS

    if layout == "dense":
        if dtype not in FORMATS:
            raise ValueError(f"dense batches come as {', '.join(FORMATS)}; got {dtype!r}")
        return DenseCollate(dtype, transform)
    if layout != "csr":
        raise ValueError(f'layout must be "dense" or "csr", got {layout!r}')
    if transform != Transform() or dtype != "float32":
        raise ValueError('layout="csr" gives float32 values as stored; transform and dtype need "dense"')
    return sparse_to_csr_collate
