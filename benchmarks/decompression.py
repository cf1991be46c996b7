"""General codecs decoded on host threads and by nvCOMP: ``python -m benchmarks.decompression``.

One synthetic CSR matrix, written once per codec with a CRC32C after each chunk. Two measurements of each:
whole epochs of the loader (cells/s), and one window of rows on one thread, split into what the host does
(measure, decode or copy) and what the device does (upload, decompress, kernels). Windows are checked against
the CPU's.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.common import conditions
from benchmarks.datasets import SpecA
from hbx_gpu._bench.machine import describe
from hbx_gpu._bench.tables import spread, table, write_json
from hbx_gpu._devices import resolve
from hbx_gpu._engine.device.backend import Slot
from hbx_gpu._loading.make import device_loader, make_loader
from hbx_gpu._loading.options import LoaderOptions
from hbx_gpu._source import RowIndex, Source
from hbx_gpu._storage.metadata import read_layout
from hbx_gpu.dataloader import CellDataset
from hbx_gpu.errors import DeviceUnavailableError
from hbx_gpu.sampler import CellSampler

CODECS = ("zstd", "lz4", "gzip", "blosc")
PLACES = ("host", "device")
_CHUNKS_PER_SHARD = 64
_BLOCK_ROWS = 1_024  # drawn at a time


def _compressor(codec: str) -> Any:
    from zarr.codecs import BloscCodec, GzipCodec, ZstdCodec
    from zarr.codecs.numcodecs import LZ4

    made: dict[str, Callable[[], Any]] = {
        "zstd": lambda: ZstdCodec(level=3),
        "lz4": LZ4,
        "gzip": lambda: GzipCodec(level=5),
        "blosc": lambda: BloscCodec(cname="lz4", shuffle="shuffle"),
    }
    return made[codec]()


def written(folder: Path, codec: str, cells: int, genes: int, chunk: int) -> CellDataset:
    """The matrix in one codec; made when it is not there yet."""
    import zarr
    from zarr.codecs import BytesCodec, Crc32cCodec

    rng, spec = np.random.default_rng(0), SpecA(genes)
    blocks = [spec.draw(rng, min(_BLOCK_ROWS, cells - at)) for at in range(0, cells, _BLOCK_ROWS)]
    lengths = np.concatenate([np.diff(block.indptr) for block in blocks])
    root = folder / f"decompression-{codec}-{cells}-{genes}-{chunk}"
    arrays = {
        "indices": np.concatenate([block.indices for block in blocks]).astype(np.uint32),
        "counts": np.concatenate([block.values for block in blocks]).astype(np.uint32),
    }
    for name, data in arrays.items():
        if (root / name / "complete").exists():
            continue
        array = zarr.create_array(
            store=str(root / name), shape=data.shape, dtype=data.dtype, fill_value=0, overwrite=True,
            chunks=(chunk,), shards=(chunk * _CHUNKS_PER_SHARD,), filters=None, serializer=BytesCodec(),
            compressors=[_compressor(codec), Crc32cCodec()],
        )  # fmt: skip
        array[:] = data
        (root / name / "complete").touch()
    source = Source(
        name=codec,
        index=read_layout(root / "indices", f"{codec}/indices"),
        layers={"counts": read_layout(root / "counts", f"{codec}/counts")},
        remap=np.arange(genes, dtype=np.int32),
    )
    start = (np.cumsum(lengths) - lengths).astype(np.int64)
    rows = RowIndex(np.zeros(cells, np.int32), start, lengths.astype(np.int32))
    uids = np.array([f"gene{i}" for i in range(genes)], dtype=object)
    return CellDataset([source], rows, layer="counts", n_features=genes, feature_uids=uids)


def epochs(
    dataset: CellDataset, backend: Any, decode: str, batch: int, repeat: int, finish: Callable[[], object]
) -> list[float]:
    """Cells/s of whole epochs in random order, dense float32, after one more; no backend: on the CPU."""
    sampler = CellSampler(dataset.groups_np, batch_size=batch, seed=0, locality="none", num_workers=0)
    if backend is None:
        loader = make_loader(dataset, sampler, layout="dense", executor="direct")
    else:
        loader = device_loader(dataset, sampler, backend, LoaderOptions(layout="dense", decode=decode))
    found = []
    with loader:
        for number in range(repeat + 1):
            loader.set_epoch(number)
            clock, cells = time.perf_counter(), 0
            for made in loader:
                cells += len(made["index"])
            finish()
            found.append(cells / (time.perf_counter() - clock))
    return found[1:]


def window(
    dataset: CellDataset, backend: Any, decode: str, rows: np.ndarray, repeat: int
) -> dict[str, list[float]]:
    """Seconds of one window's steps, after one more; raises where its rows are not those of the CPU."""
    engine, slot = dataset.device_engine(backend, decode=decode), Slot(backend)
    steps: dict[str, list[float]] = {"host": [], "device": []}
    for _ in range(repeat + 1):
        plan, slab = dataset.read(rows)
        clock = time.perf_counter()
        staging = engine.measure(plan, slab, layout="csr")
        engine.pack(staging, slot)
        packed = time.perf_counter()
        indices, (values,), _ = engine.submit_csr(staging, slot).result()
        steps["host"].append(packed - clock)
        steps["device"].append(time.perf_counter() - packed)
    expected = dataset[rows]
    if not (
        np.array_equal(indices.cpu().numpy(), expected.indices)
        and np.array_equal(values.cpu().numpy(), expected.values)
    ):
        raise AssertionError(f"decode={decode!r}: other rows than on the CPU")
    return {name: seconds[1:] for name, seconds in steps.items()}


def measure(
    dataset: CellDataset, backend: Any, batch: int, repeat: int, finish: Callable[[], object]
) -> dict[str, Any]:
    """Everything of one codec."""
    rows = np.random.default_rng(1).permutation(len(dataset))[:batch]
    found: dict[str, Any] = {"cells_per_s": {}, "window_s": {}}
    for place in PLACES:
        steps = window(dataset, backend, place, rows, repeat)
        found["window_s"][place] = {name: spread(seconds) for name, seconds in steps.items()}
        found["cells_per_s"][place] = spread(epochs(dataset, backend, place, batch, repeat, finish))
    found["cells_per_s"]["cpu"] = spread(epochs(dataset, None, "host", batch, repeat, finish))
    return found


def rows_of(codec: str, found: dict[str, Any]) -> list[tuple[str, ...]]:
    """Lines of the table."""
    lines = []
    for place in (*PLACES, "cpu"):
        rate = found["cells_per_s"][place]
        steps = found["window_s"].get(place)
        where = {"host": "GPU, decode='host'", "device": "GPU, decode='device'", "cpu": "CPU loader"}[place]
        lines.append(
            (
                f"{codec}, {where}",
                f"{rate['median']:,.0f} ({rate['min']:,.0f} .. {rate['max']:,.0f})",
                *(f"{1e3 * steps[name]['median']:.2f}" if steps else "" for name in ("host", "device")),
            )
        )
    return lines


def main(argv: Sequence[str] | None = None) -> int:
    """Measure and print; returns the exit status: 2 without a GPU or nvCOMP."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.decompression", description=__doc__)
    parser.add_argument("--cells", type=int, default=20_000)
    parser.add_argument("--genes", type=int, default=20_000)
    parser.add_argument("--chunk", type=int, default=40_960, help="elements per chunk")
    parser.add_argument("--batch", type=int, default=1024)
    parser.add_argument("--repeat", type=int, default=3)
    parser.add_argument("--codecs", nargs="+", choices=CODECS, default=list(CODECS))
    parser.add_argument("--data", type=Path, default=Path("demo/benchmark-data"))
    parser.add_argument("--out", type=Path, default=Path("demo/gpu"))
    options = parser.parse_args(argv)
    try:
        gpu = resolve("cuda")
        assert gpu is not None
        from hbx_gpu._engine.device.cuda import CudaBackend

        backend = CudaBackend(gpu)
        backend.decompressor()
    except DeviceUnavailableError as missing:
        print(missing)
        return 2
    import torch

    backend.warm_up()
    results, lines = {}, []
    for codec in options.codecs:
        dataset = written(options.data, codec, options.cells, options.genes, options.chunk)
        results[codec] = measure(dataset, backend, options.batch, options.repeat, torch.cuda.synchronize)
        lines += rows_of(codec, results[codec])
    machine = conditions(gpu)
    text = "\n".join(
        (
            table(("", "cells/s", "host, ms per window", "device, ms per window"), lines),
            f"{options.cells:,} cells; {SpecA(options.genes).describe()}; uint32, {options.chunk:,} elements "
            f"per chunk, CRC32C; batches of {options.batch:,} random cells, dense float32; page cache warm, "
            f"median of {options.repeat} (range) after one more; a window is one batch's rows as CSR, on one "
            "thread",
            describe(machine),
        )
    )
    print(text)
    options.out.mkdir(parents=True, exist_ok=True)
    (options.out / "decompression.txt").write_text(text + "\n")
    write_json(options.out / "decompression.json", {"conditions": machine, "codecs": results})
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
