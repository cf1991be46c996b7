"""Decide where the chunks of a dataset stay between batches, and keep them in host memory.

The chunks that stay are chosen from the query, within a budget of bytes; the order of rows plays no role.
"""

from __future__ import annotations

import logging
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, TypeVar

import numpy as np

from hbx_gpu._advice import option
from hbx_gpu._devices import cores, free_host_memory
from hbx_gpu._protocols import AnyLoadable, Chunked
from hbx_gpu._storage.choice import choose
from hbx_gpu._storage.chunks import Extents
from hbx_gpu._storage.readers import Reader, Slab
from hbx_gpu.errors import UnsupportedError

if TYPE_CHECKING:
    from hbx_gpu._loading.options import LoaderOptions

LoadableT = TypeVar("LoadableT", bound=AnyLoadable)

LOAD_BYTES = 32 << 20
"""Bytes that each thread loads at a time."""
DEVICE_SHARE = 0.5
"""Part of the free device memory that chunks and what is staged beside them may take without a budget.

The model, its gradients and its activations are allocated later and need the rest.
"""
SHARE = 0.8
"""Share of free memory that chunks may take if no budget is given."""
_LOG = logging.getLogger(__name__)


def fitting(sizes: np.ndarray, budget: int) -> int:
    """Return how many chunks from the beginning of a list fit a budget in bytes."""
    return int(np.searchsorted(np.cumsum(sizes), budget, "right"))


def decide(
    residency: str,
    *,
    device_bytes: int,
    host_bytes: int,
    free_device: int,
    free_host: int,
    budget: int | None,
) -> tuple[str, str]:
    """Return the residency that ``"auto"`` stands for, and the reason.

    Parameters
    ----------
    residency
        One of :data:`~hbx_gpu._loading.options.RESIDENCIES`; others than ``"auto"`` stay what they are.
    device_bytes, host_bytes
        Bytes that all chunks of the query take in device memory and in host memory.
    free_device, free_host
        Free bytes of device memory and of host memory.
    budget
        Bytes that chunks may take; None: `SHARE` of the free memory.
    """
    if residency != "auto":
        return residency, "asked for"
    on_device = int(DEVICE_SHARE * free_device) if budget is None else min(budget, free_device)
    # Page-locked memory is not available to any other process, so only half as much is used.
    on_host = int(SHARE / 2 * free_host) if budget is None else min(budget, free_host)
    if device_bytes <= on_device:
        return "device", f"{_size(device_bytes)} of chunks fit {_size(on_device)} of device memory"
    if host_bytes <= on_host:
        return "host", (
            f"{_size(device_bytes)} of chunks exceed {_size(on_device)} of device memory and fit "
            f"{_size(on_host)} of page-locked memory"
        )
    return "none", (
        f"{_size(host_bytes)} of chunks exceed {_size(on_device)} of device and {_size(on_host)} of "
        "page-locked memory; they come through the page cache"
    )


def load_all(
    load: Callable[[np.ndarray], int], chunks: np.ndarray, sizes: np.ndarray, *, threads: int, where: str
) -> None:
    """Load chunks in parts on several threads, with a progress bar on a terminal.

    Parameters
    ----------
    load
        Function that loads chunks and returns the number of bytes.
    chunks, sizes
        Chunks to load, and the bytes of each.
    where
        Name of the memory that they are loaded to, for the progress bar.
    """
    from tqdm import tqdm

    cuts = np.flatnonzero(np.diff(np.cumsum(sizes) // LOAD_BYTES)) + 1
    parts = [part for part in np.split(chunks, cuts) if len(part)]
    with (
        tqdm(
            total=int(sizes.sum()), unit="B", unit_scale=True, desc=f"chunks to {where}", file=sys.stderr,
            disable=None,
        ) as bar,
        ThreadPoolExecutor(threads, thread_name_prefix="hbx_gpu-residency") as pool,
    ):  # fmt: skip
        futures = [pool.submit(load, part) for part in parts]
        try:
            for future in futures:
                bar.update(future.result())
        except BaseException:
            for future in futures:
                future.cancel()
            raise


class HeapReader(Reader):
    """Reader that keeps a copy of stored chunks in ordinary memory, and uses another reader for the others.

    Parameters
    ----------
    reader
        Reader of the chunks that are not kept.
    chunks
        int64, (k,). Global numbers of chunks to keep, in order of preference.
    budget
        Most bytes of kept chunks.
    threads
        Number of threads that copy.
    """

    def __init__(self, reader: Reader, chunks: np.ndarray, *, budget: int, threads: int) -> None:
        super().__init__(reader.directory)
        self._reader = reader
        extents = self.directory.extents(chunks)
        sizes = -(-np.maximum(extents.nbytes, 0) // 16) * 16
        kept = fitting(sizes, budget)
        chunks, sizes = chunks[:kept], sizes[:kept]
        self._memory = np.empty(int(sizes.sum()) + 16, np.uint8)
        place = np.cumsum(sizes) - sizes + -self._memory.ctypes.data % 16
        extents = self.directory.extents(chunks)
        # Where an extent lies identifies it: one number that sorts like (file, offset).
        self._stride = int(extents.offset.max(initial=0)) + 1
        keys = self._keys(extents)
        order = np.argsort(keys, kind="stable")
        self._kept, self._place = keys[order], place[order]
        at = dict(zip(chunks.tolist(), place.tolist(), strict=True))

        def copy(part: np.ndarray) -> int:
            slab = reader.read(self.directory.extents(part))
            for i, chunk in enumerate(part.tolist()):
                if slab.nbytes[i] > 0:
                    self._memory[at[chunk] : at[chunk] + int(slab.nbytes[i])] = slab.view(i)
            return int(np.maximum(slab.nbytes, 0).sum())

        load_all(copy, chunks, sizes, threads=threads, where="memory")

    def __reduce__(self) -> tuple[object, ...]:
        raise TypeError("chunks in memory do not travel to other processes: leave num_workers at 0")

    @property
    def nbytes(self) -> int:
        """Bytes of the kept chunks."""
        return len(self._memory)

    def read(self, extents: Extents) -> Slab:
        """See :class:`Reader`."""
        keys = self._keys(extents)
        found = np.minimum(np.searchsorted(self._kept, keys), max(0, len(self._kept) - 1))
        here = (extents.nbytes > 0) & (extents.offset < self._stride)
        if len(self._kept):
            here &= self._kept[found] == keys
        else:
            here[:] = False
        address = np.zeros(len(extents), np.uint64)
        base = np.uint64(self._memory.ctypes.data)
        address[here] = base + self._place[found[here]].astype(np.uint64)
        rest = ~here
        if not rest.any():
            return Slab(address, extents.nbytes, self._memory)
        slab = self._reader.read(
            Extents(extents.file[rest], extents.offset[rest], extents.nbytes[rest], extents.share)
        )
        address[rest] = slab.address
        return Slab(address, extents.nbytes, (self._memory, slab.owner))

    def close(self) -> None:
        """See :class:`Reader`."""
        self._reader.close()

    def _keys(self, extents: Extents) -> np.ndarray:
        result: np.ndarray = extents.file.astype(np.int64) * self._stride + extents.offset
        return result


def hold_on_host(dataset: LoadableT, options: LoaderOptions) -> LoadableT:
    """Return a dataset for the CPU whose chunks stay in the page cache or on the heap, as `options` says.

    Parameters
    ----------
    dataset
        Dataset to load.
    options
        `residency`: ``"none"`` and ``"auto"`` leave chunks to the page cache, ``"host"`` and ``"device"``
        keep a copy. `io`: how files are read; None: as the dataset was opened. `residency_budget`: bytes for
        the copy; None: `SHARE` of the free memory.

    Raises
    ------
    UnsupportedError
        The dataset has no stored chunks.
    """
    residency = options.residency
    if not options.reads_on_its_own:
        return dataset
    if not isinstance(dataset, Chunked):
        raise UnsupportedError(
            f"io and residency are about the chunks of a CellDataset, and {dataset!r} has none. Leave io and "
            "residency out"
        )
    reader = _open(dataset, options)
    if residency == "auto":
        here = option("residency", "auto")
        tell(f"{here} on the CPU: 'none', the page cache keeps chunks and all processes share it")
    elif residency != "none":
        budget = options.residency_budget
        reader = HeapReader(
            reader,
            dataset.needed_chunks(),
            budget=int(SHARE * free_host_memory()) if budget is None else budget,
            threads=options.threads or cores(),
        )
        here = option("residency", residency)
        tell(f"{here} on the CPU: {_size(reader.nbytes)} of chunks copied to memory")
    return dataset.reading_with(reader)


def _open(dataset: Chunked, options: LoaderOptions) -> Reader:
    """The reader that `io` stands for on the CPU."""
    io = options.io
    if io is None:
        return dataset.open_reader(dataset.reader_kind)
    if io == "kvikio":
        raise ValueError(
            f"{option('io', 'kvikio')} brings chunks to a GPU; on the CPU pass 'mmap', 'pinned' or 'auto'"
        )
    readers = {"mmap": dataset.open_reader("mmap"), "pinned": dataset.open_reader("preadv")}
    if io == "auto":

        def reads(reader: Reader) -> Callable[[np.ndarray], object]:
            other = dataset.reading_with(reader)
            return lambda rows: other.read_rows([rows])

        candidates = {name: reads(reader) for name, reader in readers.items()}
        io = choose(candidates, len(dataset), threads=options.threads or cores())
    return readers[io]


def tell(message: str) -> None:
    """Log what was decided."""
    _LOG.info("%s", message)


def _size(nbytes: int) -> str:
    return f"{nbytes / 2**30:.1f} GiB" if nbytes >= 1 << 30 else f"{nbytes / 2**20:.1f} MiB"
