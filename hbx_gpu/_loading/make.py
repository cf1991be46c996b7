"""`make_loader`: from a dataset, an order and a device to one iterable of batches."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping
from dataclasses import replace
from typing import TYPE_CHECKING

from hbx_gpu._advice import option
from hbx_gpu._collates import (
    ArrayCollate,
    CsrCollate,
    DenseCollate,
    ImagesCollate,
    LayersCollate,
    MatrixCollate,
    MultimodalCollate,
    as_collate,
)
from hbx_gpu._datasets.cells import CellDataset
from hbx_gpu._datasets.dense import DenseCellDataset
from hbx_gpu._datasets.multimodal import MultimodalCellDataset
from hbx_gpu._datasets.plain import PlainDataset, loadable
from hbx_gpu._devices import dali_missing, require_dali, resolve, say_once
from hbx_gpu._loading.dense_size import check_dense_batch
from hbx_gpu._loading.feeds.host import HostFeed
from hbx_gpu._loading.measured import MeasuredCollate, MeasuredFeed, with_groups
from hbx_gpu._loading.options import (
    DEVICE_BUDGET,
    DynamicOptions,
    Images,
    LoaderOptions,
    Operators,
    Steps,
    Tokens,
)
from hbx_gpu._loading.sampler_attributes import seed_of, workers_of
from hbx_gpu._loading.token_collate import TokenCollate
from hbx_gpu._loading.tokens import with_token_collates
from hbx_gpu._protocols import AnyCollate, AnyFeed, CollateFunction, Loadable
from hbx_gpu.images import TileCollate
from hbx_gpu.sampler import CellSampler
from hbx_gpu.transforms import Transform, chain

if TYPE_CHECKING:
    from hbx_gpu._engine.device.backend import Backend
    from hbx_gpu._loading.loader import CellLoader

EXECUTORS = ("auto", "dali", "direct")

_LOG = logging.getLogger(__name__)


def make_loader(
    dataset: object,
    sampler: object = None,
    collate_fn: CollateFunction | None = None,
    *,
    batch_size: int | None = None,
    shuffle: bool | None = None,
    drop_last: bool | None = None,
    seed: int | None = None,
    device: object = "cpu",
    layout: str | Mapping[str, str] | None = None,
    dtype: object = "float32",
    transform: Steps | Mapping[str, Steps] | None = None,
    measured: bool = False,
    memory_budget: int | None = None,
    executor: str = "auto",
    operators: Operators | None = None,
    io: str | None = None,
    residency: str = "none",
    images: Images | Mapping[str, Images] | None = None,
    image_seed: int | None = None,
    tokens: Tokens | Mapping[str, Tokens] | None = None,
    padding: str = "longest",
    pad_to_multiple_of: int | None = None,
    ids_dtype: str = "int64",
    token_seed: int | None = None,
    **kwargs: object,
) -> CellLoader:
    """Iterate batches of `dataset` in the order of `sampler`, read and decoded ahead.

    Parameters
    ----------
    dataset
        What to load: a dataset; an object with ``to_cell_dataset``, such as a query, the result of
        :func:`hbx_gpu.open` or an SCDL archive; or a torch ``Subset``, ``random_split`` or ``ConcatDataset``
        of these, whose rows are numbered as torch does.
    sampler
        Yields the row numbers of each batch: a :class:`~hbx_gpu.sampler.CellSampler`, any torch batch
        sampler, or a torch sampler of rows, such as ``RandomSampler``. None: a CellSampler of the dataset.
        Its `num_workers`, if it has one, is the default below. ``batch_sampler=`` means the same.
    batch_size, shuffle, drop_last, seed
        Arguments of the CellSampler that is made if `sampler` is None (default: 1,024 rows, not shuffled).
        With a torch sampler of rows, only `batch_size` and `drop_last` may be given.
    collate_fn
        Function that is applied to every batch; with None, batches are the dataset's own objects.
    device
        Where batches are decoded and handed out: ``"cpu"``, ``"cuda"``, ``"cuda:N"``, a ``torch.device``,
        or ``"auto"`` for a GPU where one can be used and the CPU elsewhere. A GPU needs `layout`. Batches
        hold the same numbers on every device.
    layout
        Form of the batches, instead of a collate_fn: dicts with ``X`` (``"dense"``: a tensor of `dtype` after
        `transform`; ``"csr"``: a sparse float32 tensor), ``index`` (int64 row numbers) and the metadata
        columns, on `device`. ``"tokens"``: the inputs of a model instead of ``X``, as `tokens` says. For a
        multimodal dataset, give one layout for all of its sparse spaces, or a mapping from space to layout;
        batches are those of :class:`MultimodalCollate`. Dense spaces and tiles can only be ``"dense"``.
    dtype, transform
        dtype of ``X``, by name or as torch or NumPy has it, and transform of the counts, for
        ``layout="dense"``; see :class:`DenseCollate`. They
        may be mappings by space for a multimodal dataset. Tiles keep their dtype, and transforms are for
        sparse spaces.
    measured
        Whether batches hold ``measured``, bool (n_rows, n_features): False where the dataset that a cell is
        from does not have the feature at all, so that ``X`` holds a zero which nobody counted. Needs a
        layout. Batches of a multimodal dataset always say so, by space.
    memory_budget
        Bytes that batches made ahead of the consumer may take up, when num_workers is 0 (default: 512 MiB,
        on a GPU 4 GiB of its memory). One batch is always made, whatever its size.
    executor
        How batches are handed over: ``"direct"``, by a queue; ``"dali"``, as tensors of DALI's dynamic mode,
        without a copy; ``"auto"``, by DALI where it is installed, a `layout` is given and there are no worker
        processes (the log says so once). The batches are the same.
    operators
        Function of yours that calls operators of ``nvidia.dali.experimental.dynamic`` on every batch. It gets
        the fields as DALI tensors by name (see :func:`hbx_gpu.pipeline.cell_pipeline`) and a random number
        generator of DALI's to pass to random operators, whose seed follows from `seed`, epoch, rank and
        number of the batch. It returns a dict of the fields that the batch then has. It runs one batch ahead,
        on a thread of its own; on a GPU when the batch is asked for, on the thread that asks. It needs DALI,
        and cannot be combined with ``dtype="bfloat16"``.
    io
        How stored bytes are read: ``"mmap"``; ``"pinned"`` (``preadv``; on a GPU into page-locked memory);
        ``"kvikio"`` (GPU only: whole chunks to its memory); ``"auto"``, which measures these on the dataset's
        own files. With None, it is ``"mmap"`` on a GPU, and on the CPU the way in which the dataset was
        opened.
    residency
        Where chunks stay between batches: ``"none"``, ``"host"``, ``"device"``, or ``"auto"``, which decides
        by size. Without a GPU, chunks are in the page cache or in a copy on the heap. `residency` and `io`
        need num_workers=0.
    images
        Transform of tiles, boxes or encoded images, carried out by DALI: an
        :class:`~hbx_gpu.images.ImageTransform`, or a :class:`~hbx_gpu.images.TileCollate` to set more
        options; a mapping by space for a multimodal dataset. Tiles are then (n, C, H, W) tensors, with zeros
        for cells without a tile. It needs a layout and num_workers=0.
    image_seed
        Seed of the random steps of image transforms, which also depend on epoch and cell (default: the
        sampler's seed, or 0).
    tokens
        Recipe of :mod:`hbx_gpu.tokens` for the inputs of a model, for ``layout="tokens"``; a mapping by space
        for a multimodal dataset with several sparse spaces. Batches are those of
        :func:`hbx_gpu.tokens.encode`.
    padding, pad_to_multiple_of, ids_dtype
        As for :func:`hbx_gpu.tokens.encode`.
    token_seed
        Seed of the random choices for tokens, which also depend on epoch, cell and gene (default: the
        sampler's seed, or 0).
    **kwargs
        ``num_workers``: 0 = threads of this process, > 0 = that many spawned, persistent torch workers.
        ``convert``: function that is applied to each batch just before it is handed over, for the form that a
        training loop wants.
        ``threads``: threads when num_workers is 0 (default: the cores this process may use).
        ``window``: batches under one plan when num_workers is 0 (default: at most 4,096 rows, sized by what
        is measured).
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
        `batch_size`, `shuffle`, `drop_last` or `seed` was given with a sampler of batches, which decides
        these; both layout and collate_fn were given; a layout, dtype or executor is unknown; dtype or
        transform was given without ``layout="dense"``; or a GPU or DALI was asked for without layout or with
        worker processes.
    DeviceUnavailableError
        A GPU or DALI was asked for by name and cannot be used; the message says what is missing.
    """
    from hbx_gpu._loading.splits import order_for, unwrapped

    if (batch_sampler := kwargs.pop("batch_sampler", None)) is not None:
        if sampler is not None:
            raise ValueError("sampler and batch_sampler both say which rows make a batch; pass one of them")
        sampler = batch_sampler
    dataset = unwrapped(dataset)
    sampler = order_for(
        dataset, sampler, batch_size=batch_size, shuffle=shuffle, drop_last=drop_last, seed=seed
    )
    options = LoaderOptions.of(
        layout=layout,
        dtype=dtype,
        transform=transform,
        measured=measured,
        memory_budget=memory_budget,
        io=io,
        residency=residency,
        images=images,
        image_seed=image_seed,
        tokens=tokens,
        padding=padding,
        pad_to_multiple_of=pad_to_multiple_of,
        ids_dtype=ids_dtype,
        token_seed=token_seed,
        **kwargs,
    )
    if operators is not None:
        if executor == "direct":
            raise ValueError(
                f"operators are DALI's: leave executor at 'auto', or pass {option('executor', 'dali')}"
            )
        if options.dtype == "bfloat16":
            raise ValueError(
                "DALI has no bfloat16, so operators would compute on its bits; ask for float32 or float16 "
                'and make the batch bfloat16 afterwards: batch["X"].bfloat16()'
            )
        executor = "dali" if executor == "auto" else executor
    if _through_dali(executor, sampler, device, options):
        options = replace(options, dali=DynamicOptions(operators, seed))
    return build_loader(dataset, sampler, collate_fn, device, options)


def _through_dali(executor: str, sampler: object, device: object, options: LoaderOptions) -> bool:
    """Return whether batches go through DALI; raise an error where DALI was asked for and cannot be used."""
    if executor not in EXECUTORS:
        raise ValueError(f"executor must be one of {', '.join(map(repr, EXECUTORS))}, got {executor!r}")
    if executor == "direct":
        return False
    if executor == "dali":
        if options.layout is None:
            raise ValueError(
                'DALI carries tensors: pass layout="dense" or layout="csr" instead of a collate_fn'
            )
        instead = f"{option('executor', 'auto')} hands them over directly where there is no DALI"
        require_dali(instead=instead)
        return True
    if options.layout is None:
        return False
    num_workers = options.num_workers
    if num_workers is None and str(device) == "cpu":
        num_workers = workers_of(sampler)
    if num_workers:
        return False
    reason = dali_missing()
    said = f"directly: {reason}" if reason else "as tensors of DALI's dynamic mode, without a copy"
    say_once(_LOG, logging.INFO, f"hbx_gpu hands batches over {said}")
    return reason is None


def build_loader(
    dataset: object,
    sampler: object,
    collate_fn: CollateFunction | None,
    device: object,
    options: LoaderOptions,
) -> CellLoader:
    """Do the work of :func:`make_loader` after it was decided whether DALI hands batches over."""
    given = dataset
    dataset = loadable(dataset)
    _give_lengths(sampler, dataset)
    gpu = resolve(device)
    if options.layout is not None and collate_fn is not None:
        raise ValueError("layout and collate_fn both say what a batch becomes; give one of them")
    if options.measured and options.layout is None:
        raise ValueError(
            'measured=True adds a mask to tensors: pass layout="dense" instead of a collate_fn, or call '
            "dataset.measured_masks(dataset.groups_np[rows]) yourself"
        )
    if options.images is not None:
        options = _with_image_collates(dataset, sampler, options, gpu)
    options = with_token_collates(dataset, sampler, options)
    if gpu is not None:
        from hbx_gpu._engine.device.cuda import CudaBackend

        if options.layout is None:
            raise ValueError(
                'on a GPU batches are tensors from the start: pass layout="dense" or layout="csr"'
            )
        backend = CudaBackend(gpu)
        backend.warm_up()
        if options.dali is not None:
            options = replace(options, dali=replace(options.dali, device_id=gpu))
        return device_loader(dataset, sampler, backend, options)
    if options.layout is not None:
        collate = dataset.collate_with(collate_for(dataset, options))
        if options.layout == "dense":
            check_dense_batch(collate, dataset.n_features, sampler)
        if options.measured and not isinstance(dataset, MultimodalCellDataset):
            dataset, masks = with_groups(dataset)
            collate = MeasuredCollate(collate, masks)
        dataset = dataset.with_row_numbers()
    elif options.transform is not None or options.dtype != "float32":
        raise ValueError('dtype and transform belong to layout="dense"; a collate_fn makes its own')
    else:
        collate = as_collate(collate_fn or _as_it_is)
    dataset = _columns_for(dataset, collate)
    if options.reads_on_its_own:
        workers = options.num_workers
        if workers or (workers is None and options.dali is None and workers_of(sampler)):
            raise ValueError(
                "io and residency are about memory of this process, which worker processes do not share: "
                "pass num_workers=0"
            )
        options = replace(options, num_workers=0)
    feed: AnyFeed = HostFeed(dataset, collate, options)
    whole = given if isinstance(dataset, PlainDataset) else dataset
    return _loader(whole, sampler, collate_fn or collate, feed, options)


def _columns_for(dataset: Loadable[object], collate: AnyCollate) -> Loadable[object]:
    """Return the dataset, with columns in the form of sparse tensors where the collate makes these."""
    if isinstance(collate, MultimodalCollate) and isinstance(dataset, MultimodalCellDataset):
        sparse = [name for name, part in dataset.datasets.items() if part.kind == "sparse"]
        return dataset.with_wide_columns(
            [name for name in sparse if collate.options_of(name)["layout"] == "csr"]
        )
    return dataset.with_wide_columns() if collate.sparse else dataset


def _give_lengths(sampler: object, dataset: Loadable[object]) -> None:
    """Tell a sampler that sorts cells by length how long they are, unless its maker did."""
    if isinstance(sampler, CellSampler) and sampler.needs_lengths and isinstance(dataset, CellDataset):
        sampler.take_lengths(dataset.row_lengths)


def _as_it_is(batch: object) -> object:
    return batch


def _loader(
    dataset: object, sampler: object, collate: CollateFunction, feed: AnyFeed, options: LoaderOptions
) -> CellLoader:
    if isinstance(sampler, CellSampler):
        options = replace(options, rows=sampler.rows)
    if options.dali is None:
        from hbx_gpu._loading.loader import CellLoader

        return CellLoader(dataset, sampler=sampler, collate_fn=collate, feed=feed, options=options)
    if options.num_workers:
        raise ValueError(
            "batches of worker processes do not go through DALI: leave num_workers at 0, or pass "
            f"{option('executor', 'direct')}"
        )
    options = replace(options, num_workers=0)
    if isinstance(options.dali, DynamicOptions):
        from hbx_gpu._loading.dali.dynamic import DynamicLoader

        return DynamicLoader(dataset, sampler=sampler, collate_fn=collate, feed=feed, options=options)
    from hbx_gpu._loading.dali.loader import CellPipeline

    return CellPipeline(dataset, sampler=sampler, collate_fn=collate, feed=feed, options=options)


def device_loader(dataset: object, sampler: object, backend: Backend, options: LoaderOptions) -> CellLoader:
    """Make a loader on a backend: threads stage stored bytes, and the device decodes them."""
    from hbx_gpu._loading.feeds.multimodal import MultimodalFeed, cells_feed

    if options.num_workers:
        raise ValueError(
            "worker processes cannot hand over tensors on a GPU; leave num_workers at 0: reading and staging "
            "run on threads, whose number `threads` sets"
        )
    options = replace(options, num_workers=0, memory_budget=options.memory_budget or DEVICE_BUDGET)
    cells = loadable(dataset)
    _give_lengths(sampler, cells)
    options = with_token_collates(cells, sampler, options)
    collate = collate_for(cells, options)
    if isinstance(cells, MultimodalCellDataset):
        assert isinstance(collate, MultimodalCollate)
        feed: AnyFeed = MultimodalFeed(cells, collate, backend, options)
    elif options.measured:
        cells, masks = with_groups(cells)
        feed = cells.feed_with(lambda part: cells_feed(part, backend, collate, options))
        feed = MeasuredFeed(feed, masks)
    else:
        feed = cells.feed_with(lambda part: cells_feed(part, backend, collate, options))
    return _loader(cells, sampler, collate, feed, options)


def collate_for(dataset: Loadable[object], options: LoaderOptions) -> AnyCollate:
    """Return the collate that makes batches of the option `layout` on the host."""
    if isinstance(dataset, MultimodalCellDataset):
        return _multimodal_collate(dataset, options)
    layout, dtype, steps = options.one_layout, options.one_dtype, options.steps
    if isinstance(options.tokens, TokenCollate):
        _only_tokens(dtype, steps)
        return options.tokens
    if isinstance(dataset, DenseCellDataset):
        return _dense_collate(dataset, options)
    collate = _sparse_collate(layout, dtype, steps)
    several = isinstance(dataset, CellDataset) and len(dataset.layers) > 1
    return LayersCollate(collate) if several else collate


def _only_tokens(dtype: str, steps: Transform) -> None:
    if steps != Transform() or dtype != "float32":
        raise ValueError('dtype and transform belong to layout="dense"; what tokens need is in their recipe')


def _dense_collate(dataset: DenseCellDataset, options: LoaderOptions) -> AnyCollate:
    from hbx_gpu._engine.host.dense import FORMATS

    dtype = options.one_dtype
    what = f"{dataset.feature_space!r} is a dense space"
    if options.layout != "dense":
        raise ValueError(f'{what}: pass layout="dense", not {options.layout!r}')
    if options.steps != Transform():
        raise ValueError(f"{what}; transforms are for counts of sparse ones")
    if options.images is not None:
        assert isinstance(options.images, TileCollate)
        return ImagesCollate(options.images)
    if dataset.is_matrix:
        if dtype not in FORMATS:
            raise ValueError(f"dense batches come as {', '.join(FORMATS)}; got {dtype!r}")
        return LayersCollate(MatrixCollate(dtype))
    if dtype != "float32":
        raise ValueError(
            f"{what} of arrays, which keep their dtype; ask for another where the dataset is made: "
            "to_cell_dataset(..., dtype=), or in an ImageTransform"
        )
    return LayersCollate(ArrayCollate())


def _multimodal_collate(dataset: MultimodalCellDataset, options: LoaderOptions) -> MultimodalCollate:
    layout, dtype, transform = options.layout or "dense", options.dtype, options.transform
    sparse = [name for name, part in dataset.datasets.items() if part.kind == "sparse"]
    if isinstance(layout, Mapping):  # that of other spaces is always "dense", and may be said
        others = set(dataset.datasets) - set(sparse)
        layout = {name: form for name, form in layout.items() if name not in others or form != "dense"}
    if transform is not None and not isinstance(transform, Mapping):
        raise ValueError(f"name the space to transform, of {sparse}: transform={{space: steps}}")
    matrices = [name for name, part in dataset.datasets.items() if part.kind != "arrays"]
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
    # What is done to images and tokens is a collate by now.
    images = {name: made for name, made in _by_space(options.images) if isinstance(made, TileCollate)}
    tokens = {name: made for name, made in _by_space(options.tokens) if isinstance(made, TokenCollate)}
    collate = MultimodalCollate(layout, dtype, steps, images, tokens)
    for name in sparse:
        if name in tokens:
            _only_tokens("float32", steps.get(name, Transform()))
        else:
            _sparse_collate(**collate.options_of(name))
    return collate


def _by_space(setting: object) -> Iterable[tuple[str, object]]:
    return setting.items() if isinstance(setting, Mapping) else ()


def _with_image_collates(
    dataset: Loadable[object], sampler: object, options: LoaderOptions, gpu: int | None
) -> LoaderOptions:
    """Return options whose image transforms are replaced by collates; by space for a multimodal dataset."""
    images, seed = options.images, options.image_seed
    if options.layout is None:
        raise ValueError('images are made into tensors: pass layout="dense" instead of a collate_fn')
    if options.num_workers:
        raise ValueError(
            "worker processes do not learn of the epoch, which decides what is drawn for images: leave "
            "num_workers at 0"
        )
    several = isinstance(dataset, MultimodalCellDataset)
    if several != isinstance(images, Mapping):
        raise ValueError("images of a multimodal dataset are given by space, those of other datasets are not")
    parts: Mapping[str, object] = (
        dataset.datasets if isinstance(dataset, MultimodalCellDataset) else {"": dataset}
    )
    if seed is None:
        seed = seed_of(sampler)
    found: dict[str, TileCollate] = {}
    for name, wanted in (images if isinstance(images, Mapping) else {"": images}).items():
        part = parts.get(name)
        if not isinstance(part, DenseCellDataset) or part.is_matrix or wanted is None:
            having = [n for n, p in parts.items() if isinstance(p, DenseCellDataset) and not p.is_matrix]
            raise ValueError(
                f"images were given for {name!r}, which holds none; spaces with images: {having}"
                if several
                else f"images were given for {dataset!r}, which holds none"
            )
        found[name] = _tile_collate(wanted, part, seed, gpu)
    return replace(options, images=found if several else found[""], num_workers=0)


def _tile_collate(wanted: Images, part: DenseCellDataset, seed: int, gpu: int | None) -> TileCollate:
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


def _sparse_collate(layout: str, dtype: str, transform: Transform) -> AnyCollate:
    from hbx_gpu._engine.host.dense import FORMATS

    if layout == "dense":
        if dtype not in FORMATS:
            raise ValueError(f"dense batches come as {', '.join(FORMATS)}; got {dtype!r}")
        return DenseCollate(dtype, transform)
    if layout != "csr":
        raise ValueError(f'layout must be "dense", "csr" or "tokens", got {layout!r}')
    if transform != Transform() or dtype != "float32":
        raise ValueError('layout="csr" gives float32 values as stored; transform and dtype need "dense"')
    return CsrCollate()
