"""The settings to measure, one per line of the table, and the reasons why some are left out."""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import TYPE_CHECKING

from hbx_gpu.errors import UnsupportedError

if TYPE_CHECKING:
    from hbx_gpu._datasets.cells import CellDataset
    from hbx_gpu.sampler import CellSampler

ORDERS = ("random", "stream", "block", "group")
CACHES = ("warm", "cold")


@dataclass(frozen=True)
class Setting:
    """One way to load.

    Attributes
    ----------
    layout, dtype, executor, residency, io
        As :func:`hbx_gpu.make_loader` takes them; dtype of dense batches only.
    order
        ``"random"``: a uniform permutation; ``"stream"``: stored order; ``"block"``, ``"group"``: these
        localities of :class:`~hbx_gpu.sampler.CellSampler`.
    cache
        Whether files are in the page cache when the clock starts.
    """

    layout: str = "dense"
    dtype: str = "float32"
    order: str = "random"
    batch: int = 1024
    executor: str = "direct"
    residency: str = "none"
    io: str | None = None
    cache: str = "warm"

    def describe(self) -> str:
        """A line of the table."""
        what = self.layout if self.layout == "csr" else f"dense {self.dtype}"
        where = "cold" if self.cache == "cold" else f"residency {self.residency}"
        if self.cache == "warm" and self.residency == "none":
            where = "page cache"
        return f"{what}, {self.order}, batch {self.batch:,}, {self.executor}, {where}"

    def loader_options(self) -> dict[str, object]:
        """Keywords of :func:`hbx_gpu.make_loader`."""
        options: dict[str, object] = {
            "layout": self.layout,
            "executor": self.executor,
            "residency": self.residency,
            "io": self.io,
        }
        if self.layout == "dense":
            options["dtype"] = self.dtype
        return options

    def sampler(self, dataset: CellDataset, seed: int) -> CellSampler:
        """The order, over all cells of a dataset."""
        from hbx_gpu.sampler import CellSampler

        locality = self.order if self.order in ("block", "group") else "none"
        return CellSampler(
            dataset.groups_np,
            batch_size=self.batch,
            seed=seed,
            shuffle=self.order != "stream",
            locality=locality,
            num_workers=0,
        )


def executors(asked: Sequence[str]) -> tuple[list[str], list[str]]:
    """Executors to measure, and what is said of those left out; ``"auto"``: all that are installed."""
    if "auto" not in asked:
        return list(asked), []
    if importlib.util.find_spec("nvidia") and importlib.util.find_spec("nvidia.dali"):
        return ["direct", "dali"], []
    return ["direct"], ["DALI: not installed (pip install 'hbx_gpu[dali]')"]


def combinations(
    *,
    layouts: Sequence[str],
    dtypes: Sequence[str],
    orders: Sequence[str],
    batches: Sequence[int],
    executors: Sequence[str],
    residencies: Sequence[str],
    io: str | None,
    caches: Sequence[str],
) -> list[Setting]:
    """All settings that make sense: CSR has one dtype, and a cold cache nothing resident."""
    shapes = [
        (layout, dtype) for layout in layouts for dtype in (dtypes if layout == "dense" else ["float32"])
    ]
    return [
        Setting(layout, dtype, order, batch, executor, residency, io, cache)
        for cache, residency, executor, (layout, dtype), order, batch in product(
            caches, residencies, executors, shapes, orders, batches
        )
        if cache == "warm" or residency == residencies[0]
    ]


def open_dataset(
    path: Path, field: str | None = None, layer: str | None = None, *, allow_links: bool = False
) -> CellDataset:
    """A dataset over all cells of what lies at `path`: whatever :func:`hbx_gpu.open` opens.

    Parameters
    ----------
    path
        The store.
    field
        Pointer field of an atlas, or modality of MuData; may be left out where there is one.
    layer
        Matrix to read; the default one if None. An archive has one only.
    allow_links
        Follow links that lead out of the store, which are refused otherwise.

    Raises
    ------
    FileNotFoundError
        Nothing is there.
    InvalidDataError
        Nothing that is known.
    UnsupportedError
        A dense matrix.
    """
    from hbx_gpu._datasets.dense import DenseCellDataset
    from hbx_gpu._inplace.opening import open as open_stores
    from hbx_gpu._inplace.stores import is_archive

    if is_archive(path):
        from hbx_gpu.scdl._format.archive import open_archive
        from hbx_gpu.scdl._sources.cells import to_cell_dataset

        return to_cell_dataset(open_archive(path, allow_links=allow_links))
    query = open_stores(path, allow_links=allow_links)
    dataset = query.to_cell_dataset(field) if layer is None else query.to_cell_dataset(field, layer)
    if isinstance(dataset, DenseCellDataset):
        raise UnsupportedError(
            f"{dataset.feature_space!r} of {path} is dense; bench measures sparse matrices, chosen with "
            "--field or --layer"
        )
    return dataset
