"""Dense datasets stored in many ways, and their batches by way of the host and of a device."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
import zarr

from hbx_gpu._collates import ArrayCollate, LayersCollate, MatrixCollate
from hbx_gpu._loading.feeds.multimodal import cells_feed
from hbx_gpu._loading.make import device_loader
from hbx_gpu._loading.options import LoaderOptions
from hbx_gpu._source import BoxIndex, ObsColumns, RowIndex, Source
from hbx_gpu._storage.metadata import read_layout
from hbx_gpu.dataloader import DenseCellDataset, make_loader
from hbx_gpu.testing._stored import compressors
from tests.emulation.backend import EmulatedBackend
from tests.emulation.streams import StreamBackend
from tests.kernels.conftest import on_gpu

CODECS = (
    "zstd", "lz4", "gzip", "zlib", "blosc", "blosc-lz4-bits", "blosc-zstd-bytes", "blosc-zlib", "none",
)  # fmt: skip
CHECKSUMMED = ("zstd+crc32c", "lz4+crc32c", "gzip+crc32c", "blosc+crc32c", "blosc-lz4-bits+crc32c")
THOROUGH = ("zstd+crc32c", "blosc", "none")  # with every dtype
LEFT_TO_THE_HOST = ("blosc-blosclz",)
DTYPES = ("uint8", "uint16", "int64", "float32", "float64", "bool")
FILL = 1
WIDTH = 9
N = 17  # rows of each source
LARGE = {"int64": 2.0**62, "uint32": 2.0**32}
DECODES = ("host", "auto", "device")


def backend_called(name: str) -> Any:
    if name == "emulated":
        return EmulatedBackend()
    if name == "streams":
        return StreamBackend(0.001)
    on_gpu()
    from hbx_gpu._engine.device.cuda import CudaBackend

    return CudaBackend(0)


def values(shape: tuple[int, ...], dtype: str, seed: int) -> np.ndarray:
    """Half of them compress; the fourth chunk of four rows holds the fill value only."""
    rng = np.random.default_rng(seed)
    found = rng.integers(0, 2 if dtype == "bool" else 200, shape)
    found[: len(found) // 2] //= 50
    found[12:16] = FILL
    return found.astype(dtype)


def stored(
    folder: Path, name: str, data: np.ndarray, codec: str, chunk: tuple[int, ...], per_shard: int = 0
) -> Any:
    """An array, written and opened."""
    written = zarr.create_array(
        store=str(folder / name),
        shape=data.shape,
        dtype=data.dtype,
        chunks=chunk,
        shards=(chunk[0] * per_shard, *chunk[1:]) if per_shard else None,
        compressors=compressors(codec, "none", data.itemsize),
        filters=None,
        fill_value=data.dtype.type(FILL),
    )
    written[...] = data
    return read_layout(folder / name, name)


def opened(
    folder: Path,
    arrays: list[np.ndarray],
    codec: str | list[str],
    *,
    remaps: list[np.ndarray] | None = None,
    rows: RowIndex | BoxIndex | None = None,
    n_features: int = 0,
    positions: bool = True,
    layers: dict[str, str] | None = None,
    chunk_of: Callable[[np.ndarray], tuple[int, ...]] = lambda a: (4, *a.shape[1:]),
    **options: Any,
) -> DenseCellDataset:
    """A dataset over arrays, every second one sharded; `layers`: more of them, by name their dtypes."""
    codecs = [codec] * len(arrays) if isinstance(codec, str) else codec
    sources = []
    for i, (data, own) in enumerate(zip(arrays, codecs, strict=True)):
        made = {
            name: stored(folder, f"g{i}/layers/{name}", x, own, chunk_of(x), 3 * (i % 2))
            for name, x in {"raw": data, **{k: data.astype(t) for k, t in (layers or {}).items()}}.items()
        }
        remap = np.empty(0, np.int32) if remaps is None else remaps[i]
        sources.append(Source(f"g{i}", None, made, remap))
    if rows is None:
        rows = shuffled([len(data) for data in arrays])
    n = len(rows)
    return DenseCellDataset(
        sources,
        rows if isinstance(rows, BoxIndex) else BoxIndex.of_rows(rows),
        positions=positions,
        layer=["raw", *(layers or {})],
        n_features=n_features,
        feature_uids=np.arange(n_features).astype(str).astype(object),
        obs=ObsColumns({"number": np.arange(n) * 3, "name": np.arange(n).astype(str).astype(object)}),
        **options,
    )


def shuffled(sizes: list[int], absent: int = 5) -> RowIndex:
    """All rows of the sources, and some cells that lack the modality."""
    source = np.repeat([*range(len(sizes)), -1], [*sizes, absent])
    start = np.concatenate([*(np.arange(n) for n in sizes), np.zeros(absent, int)])
    order = np.random.default_rng(4).permutation(len(source))
    source, start = source[order].astype(np.int32), start[order].astype(np.int64)
    return RowIndex(source, start, (source >= 0).astype(np.int32))


def panel(seed: int, n: int) -> np.ndarray:
    """Local columns to output columns; some dropped."""
    rng = np.random.default_rng(seed)
    remap = rng.permutation(n + WIDTH)[:n].astype(np.int32)
    return np.where(remap < WIDTH, remap, -1).astype(np.int32)


def matrix(folder: Path, codec: Any, dtype: str, **options: Any) -> DenseCellDataset:
    """Columns where they are stored."""
    own = np.arange(WIDTH, dtype=np.int32)
    arrays = [values((N, WIDTH), dtype, i) for i in range(2)]
    return opened(folder, arrays, codec, remaps=[own, own.copy()], n_features=WIDTH, **options)


def partial_panel(folder: Path, codec: Any, dtype: str, **options: Any) -> DenseCellDataset:
    """Columns in other places, some nowhere, some missing."""
    widths = [WIDTH + 4, 3, WIDTH]
    arrays = [values((N, m), dtype, i) for i, m in enumerate(widths)]
    remaps = [panel(1, widths[0]), panel(2, 3), np.arange(WIDTH, dtype=np.int32)]
    return opened(folder, arrays, codec, remaps=remaps, n_features=WIDTH, **options)


def tiles(folder: Path, codec: Any, dtype: str, **options: Any) -> DenseCellDataset:
    """Of one shape."""
    return opened(folder, [values((N, 2, 3, 4), dtype, i) for i in range(2)], codec, **options)


def slabs(folder: Path, codec: Any, dtype: str, **options: Any) -> DenseCellDataset:
    """Three positions each, over the borders of chunks."""
    source = np.array([0, 1, -1, 0, 1, 1], np.int32)
    lower = np.array([[0], [3], [0], [10], [14], [2]])
    rows = BoxIndex(source, lower, np.full((6, 1), 3))
    arrays = [values((N, 5), dtype, i) for i in range(2)]
    return opened(folder, arrays, codec, rows=rows, positions=False, **options)


def encoded(folder: Path, codec: Any, dtype: str, **options: Any) -> DenseCellDataset:
    """Stretches of any length, over many chunks, some without elements."""
    source = np.array([0, 1, -1, 0, 1, 0, 1, 0], np.int32)
    start = np.array([0, 3, 0, 10, 55, 57, 0, 20])
    length = np.array([9, 40, 0, 0, 5, 3, 60, 1], np.int32)
    arrays = [values((60,), dtype, i) for i in range(2)]
    return opened(folder, arrays, codec, rows=RowIndex(source, start, length), positions=False, **options)


def tiles_of_two_shapes(folder: Path, codec: Any, dtype: str, **options: Any) -> DenseCellDataset:
    """Lists."""
    return opened(folder, [values((N, 2, 3), dtype, 0), values((N, 4), dtype, 1)], codec, **options)


KINDS = {made.__name__: made for made in (matrix, partial_panel, tiles, slabs, encoded, tiles_of_two_shapes)}


def batches_for(dataset: Any) -> list[list[int]]:
    """Every row, some again and again, and a batch of none but absent ones."""
    rng = np.random.default_rng(0)
    n = len(dataset)
    found = [part.tolist() for part in np.array_split(rng.permutation(n), 5)]
    absent = np.flatnonzero(np.asarray(dataset.groups_np) == -1).tolist()
    return [*found, rng.integers(0, n, 2 * n).tolist(), [n - 1] * 3, *([absent] if absent else [])]


def on_cpu(value: Any) -> Any:
    """A batch with dense tensors as arrays, masks made."""
    if isinstance(value, torch.Tensor):
        value = (value.to_dense() if value.layout is torch.sparse_csr else value).cpu()
        return value.view(torch.uint16).numpy() if value.dtype == torch.bfloat16 else value.numpy()
    if isinstance(value, list):
        return [on_cpu(entry) for entry in value]
    if hasattr(value, "items"):
        return {name: on_cpu(entry) for name, entry in value.items()}
    return value


def same(found: Any, expected: Any, where: str = "batch") -> None:
    assert type(found) is type(expected), where
    if isinstance(expected, dict):
        assert sorted(found) == sorted(expected), where
        for name in expected:
            same(found[name], expected[name], f"{where}[{name!r}]")
    elif isinstance(expected, list):
        assert len(found) == len(expected), where
        for i, entry in enumerate(expected):
            same(found[i], entry, f"{where}[{i}]")
    else:
        np.testing.assert_array_equal(found, expected, err_msg=where)
        assert (found.dtype, found.shape) == (expected.dtype, expected.shape), where


def brought(loader: Any, backend: Any = None) -> list[Any]:
    found = []
    try:
        for batch in loader:
            if isinstance(backend, StreamBackend):
                backend.consumer.synchronize()
            found.append(on_cpu(batch))
    finally:
        loader.close()
    return found


def on_host(dataset: Any, batches: list[list[int]], **options: Any) -> list[Any]:
    return brought(make_loader(dataset, batches, layout="dense", executor="direct", num_workers=0, **options))


def on_device(
    dataset: Any, batches: list[list[int]], backend: Any, decode: str, **options: Any
) -> tuple[list[Any], Any]:
    """Batches, and the feed they came from."""
    loader = device_loader(
        dataset,
        batches,
        backend,
        LoaderOptions.of(layout="dense", decode=decode, threads=2, window=3, **options),
    )
    return brought(loader, backend), loader.feed


def feed_of(dataset: Any, decode: str = "device", backend: Any = None, collate: Any = None) -> Any:
    if collate is None:
        collate = LayersCollate(MatrixCollate() if dataset.is_matrix else ArrayCollate())
    return cells_feed(
        dataset, backend or EmulatedBackend(), collate, LoaderOptions(layout="dense", decode=decode)
    )


def shape_of(dataset: DenseCellDataset) -> tuple[int, ...]:
    return dataset.sources[0].layers["raw"].shape
