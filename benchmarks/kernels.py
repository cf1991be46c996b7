"""Kernels on a GPU, beside a device-to-device copy of the same bytes: `python -m benchmarks.kernels`.

Every case is checked against NumPy before it is timed. Needs a GPU and numpy, numba, cupy; nothing is read
from disk, nothing crosses the bus while the clock runs. Times are medians over replays of a CUDA graph of
many launches whose outputs rotate over more memory than the cache holds.
"""

from __future__ import annotations

import argparse
import importlib.util
import statistics
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict
from functools import partial
from importlib import metadata
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.kernel_cases import CHUNK, DATA, FLOATS, Batch, Bench, Case, Knobs, cut, draw
from hbx_gpu._bench import tables
from hbx_gpu._engine.device import sources

MISSING = 2
"""Exit status where there is no GPU to measure."""
FAILED = 1
_RESERVED_SHARED = 16 << 10  # static shared memory of kernels, as the engine leaves it
_STATIC_SHARED = 48 << 10  # more dynamic shared memory must be asked for
_GRAPH_SECONDS = 4e-3
_MAX_LAUNCHES = 200
_DEVICE_TO_DEVICE = 3  # cudaMemcpyKind
_VERSIONS = ("numpy", "numba", "cupy-cuda13x", "cupy-cuda12x", "torch")


def missing() -> str:
    """What keeps the kernels from running here; empty if nothing does."""
    if importlib.util.find_spec("cupy") is None:
        return "cupy is not installed (pip install 'hbx_gpu[gpu]')"
    import cupy

    try:
        count = cupy.cuda.runtime.getDeviceCount()
    except (cupy.cuda.runtime.CUDARuntimeError, ImportError, OSError) as error:
        return f"cupy finds no GPU: {error}"
    return "" if count else "cupy finds no GPU"


class CudaDevice:
    """Launches and times on the current GPU, on one stream."""

    def __init__(self, options: Sequence[str] = ()) -> None:
        import cupy

        self._cupy, self._options = cupy, ("--std=c++17", *options)
        self._stream = cupy.cuda.Stream(non_blocking=True)
        self._functions: dict[str, Any] = {}
        attributes = cupy.cuda.Device().attributes
        self.max_shared = int(attributes["MaxSharedMemoryPerBlockOptin"]) - _RESERVED_SHARED
        self._threads = int(attributes["MaxThreadsPerMultiProcessor"])
        self.processors = int(attributes["MultiProcessorCount"])

    def describe(self) -> dict[str, Any]:
        """What the figures were measured with."""
        properties = self._cupy.cuda.runtime.getDeviceProperties(self._cupy.cuda.Device().id)
        found = {name: _version(name) for name in _VERSIONS}
        return {
            "gpu": properties["name"].decode(),
            "processors": self.processors,
            "driver": self._cupy.cuda.runtime.driverGetVersion(),
            "runtime": self._cupy.cuda.runtime.runtimeGetVersion(),
            "python": sys.version.split()[0],
            "versions": {name: version for name, version in found.items() if version},
        }

    def array(self, host: np.ndarray) -> Any:
        """A copy in device memory, at least one byte long."""
        memory = self._cupy.empty(max(1, host.nbytes), dtype=np.uint8)
        if host.nbytes:
            memory.set(np.ascontiguousarray(host).reshape(-1).view(np.uint8))
        return memory

    def empty(self, nbytes: int) -> Any:
        """Poisoned device memory."""
        memory = self._cupy.empty(max(1, nbytes), dtype=np.uint8)
        self.poison(memory)
        return memory[:nbytes]

    def address(self, memory: Any) -> int:
        """Where it begins."""
        return int(memory.data.ptr)

    def host(self, memory: Any) -> np.ndarray:
        """What it holds, once all work is done."""
        self._stream.synchronize()
        found: np.ndarray = memory.get()
        return found

    def poison(self, memory: Any) -> None:
        """Bytes that no result has: 0xA7A7... is a tiny negative float of any width, 0xA7 no count."""
        self._cupy.cuda.runtime.memset(memory.data.ptr, 0xA7, memory.nbytes)
        self._cupy.cuda.runtime.deviceSynchronize()

    def launch(self, kernel: str, grid: int, block: int, args: Sequence[Any], shared: int = 0) -> None:
        """On this device's stream."""
        function = self._function(kernel, shared)
        with self._stream:
            function((grid,), (block,), tuple(args), shared_mem=shared)

    def _function(self, kernel: str, shared: int) -> Any:
        if kernel not in self._functions:
            text = sources.source(sources.kernel_names()[kernel])
            module = self._cupy.RawModule(code=text, options=self._options, backend="nvrtc")
            self._functions[kernel] = module.get_function(kernel)
        function = self._functions[kernel]
        if shared > _STATIC_SHARED and function.max_dynamic_shared_size_bytes < shared:
            function.max_dynamic_shared_size_bytes = shared
        return function

    def seconds(self, run: Callable[[int], None], repeat: int) -> list[float]:
        """Seconds per run, `repeat` times; `run(k)` is given ascending numbers."""
        run(0)
        self._stream.synchronize()
        few = min(self._replay(self._capture(run, 4), 4, 3))
        launches = int(np.clip(_GRAPH_SECONDS / few, 4, _MAX_LAUNCHES))
        return self._replay(self._capture(run, launches), launches, repeat)

    def _capture(self, run: Callable[[int], None], launches: int) -> Any:
        with self._stream:
            self._stream.begin_capture()
            for k in range(launches):
                run(k)
            return self._stream.end_capture()

    def _replay(self, graph: Any, launches: int, repeat: int) -> list[float]:
        begin, end = self._cupy.cuda.Event(), self._cupy.cuda.Event()
        graph.launch(self._stream)
        times = []
        for _ in range(repeat):
            begin.record(self._stream)
            graph.launch(self._stream)
            end.record(self._stream)
            end.synchronize()
            times.append(self._cupy.cuda.get_elapsed_time(begin, end) * 1e-3 / launches)
        return times

    def copying(self, nbytes: int, cold_bytes: int) -> tuple[Callable[[int], None], Callable[[int], None]]:
        """(copy, fill) of `nbytes` random bytes, rotating over `cold_bytes` of targets and of origins."""
        places = max(1, -(-cold_bytes // nbytes))
        noise = np.random.default_rng(0).integers(0, 256, size=min(nbytes, 1 << 26), dtype=np.uint8)
        sample = self._cupy.asarray(noise)
        origins = [self._cupy.resize(sample, nbytes) for _ in range(places)]
        targets = [self._cupy.empty(nbytes, dtype=np.uint8) for _ in range(places)]
        runtime, stream = self._cupy.cuda.runtime, self._stream.ptr
        self._cupy.cuda.runtime.deviceSynchronize()

        def copy(k: int) -> None:
            target, origin = targets[k % places], origins[k % places]
            runtime.memcpyAsync(target.data.ptr, origin.data.ptr, nbytes, _DEVICE_TO_DEVICE, stream)

        def fill(k: int) -> None:
            runtime.memsetAsync(targets[k % places].data.ptr, 0, nbytes, stream)

        return copy, fill

    def resources(self, case: Case) -> dict[str, Any]:
        """Registers, shared and local memory of a case's kernel, and its blocks per processor."""
        function = self._function(case.kernel, case.shared)
        blocks = self._cupy.cuda.driver.occupancyMaxActiveBlocksPerMultiprocessor(
            function.kernel.ptr, case.block, case.shared
        )
        return {
            "registers": int(function.num_regs),
            "local_bytes": int(function.local_size_bytes),
            "static_shared": int(function.shared_size_bytes),
            "blocks_per_processor": int(blocks),
            "occupancy": blocks * case.block / self._threads,
        }

    def free(self) -> None:
        """Give memory nobody holds back to the driver."""
        self._stream.synchronize()
        self._cupy.get_default_memory_pool().free_all_blocks()


def _version(name: str) -> str:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return ""


def cases(bench: Bench, batch: Batch, options: argparse.Namespace) -> Iterator[Callable[[], Case]]:
    """Makers of the cases asked for, with every combination of knobs that means something to them."""
    dense = [
        Knobs(block, tile, options.stage_bytes, grid, options.cold_bytes)
        for block, tile, grid in product(options.block, options.tile_bytes, options.grid)
    ]
    others = [Knobs(block, 0, options.stage_bytes, 0, options.cold_bytes) for block in options.block]
    kinds = [(kind, transform) for transform in (False, True) for kind in options.dtypes]
    if "rowpack_dense" in options.cases:
        for knobs, (kind, transform) in product(dense, kinds):
            yield partial(bench.rowpack_dense, batch, kind, transform, knobs)
    for knobs in others:
        if "rowpack_csr" in options.cases:
            yield partial(bench.rowpack_csr, batch, knobs)
        if "bitpacking" in options.cases and len(batch.rows) == len(bench.counts.indptr) - 1:
            yield partial(bench.bitpacking, knobs)  # all chunks, whatever the batch
        if "gather" in options.cases:
            yield partial(bench.gather, batch, knobs)
        if "sort" in options.cases:
            yield partial(bench.sort, batch, knobs)
    if "densify" in options.cases:
        for knobs, (kind, transform) in product(dense, kinds):
            yield partial(bench.densify, batch, kind, transform, knobs)


class Ceiling:
    """Rates of a copy and of a fill, measured once per size on the same device."""

    def __init__(self, device: Any, repeat: int, cold_bytes: int) -> None:
        self._device, self._repeat, self._cold_bytes = device, repeat, cold_bytes
        self._known: dict[int, tuple[float, float]] = {}

    def at(self, nbytes: int) -> tuple[float, float]:
        """(bytes read and written per second of a copy, bytes written per second of a fill) of `nbytes`."""
        nbytes = max(1, nbytes)
        if nbytes not in self._known:
            copy, fill = self._device.copying(nbytes, self._cold_bytes)
            copied, filled = (
                statistics.median(self._device.seconds(run, self._repeat)) for run in (copy, fill)
            )
            self._known[nbytes] = 2 * nbytes / copied, nbytes / filled
        return self._known[nbytes]


def measure(device: Any, case: Case, ceiling: Ceiling, repeat: int) -> dict[str, Any]:
    """Check, then time one case. An AssertionError of the check becomes `error`, without figures."""
    found: dict[str, Any] = {
        "case": case.name, "cells": case.cells, "block": case.block, "shared": case.shared, "read": case.read,
        "written": case.written,
    }  # fmt: skip
    try:
        case.check()
    except AssertionError as error:
        return {**found, "error": " ".join(str(error).split())[:300]}
    times = device.seconds(case.run, repeat)
    median = statistics.median(times)
    copy, fill = ceiling.at(case.written)
    moved = case.read + case.written
    return {
        **found,
        "seconds": tables.spread(times),
        "cells_per_s": case.cells / median,
        "written_gb_per_s": case.written / median / 1e9,
        "moved_gb_per_s": moved / median / 1e9,
        "copy_gb_per_s": copy / 1e9,
        "fill_gb_per_s": fill / 1e9,
        "floor_seconds": moved / copy,
        "share_of_copy": moved / median / copy,
        **device.resources(case),
    }


def run_all(device: Any, options: argparse.Namespace) -> list[dict[str, Any]]:
    """Every case of every data set and batch size; prints a line for each as it is done."""
    ceiling = Ceiling(device, options.repeat, options.cold_bytes)
    results = []
    for name in options.data:
        counts = draw(name, options.cells, options.genes, options.density, options.seed)
        mixed = options.gene_orders == "mixed"
        bench = Bench(device, counts, options.genes, chunk=options.chunk, mixed=mixed)
        nnz = max(1, len(counts.indices))
        print(
            f"\n{name}: {options.cells:,} cells x {options.genes:,} genes, {nnz / options.cells:.0f} "
            f"nonzeros per cell; rowpack {8 * bench.rowpack.packed_bytes / nnz:.2f} bits per nonzero, "
            f"bitpacking {8 * bench.packed.packed_bytes / nnz:.2f}",
            flush=True,
        )
        order = np.random.default_rng(options.seed).permutation(options.cells)
        if "gather" in options.cases:
            bench.bitpacking(Knobs(stage_bytes=options.stage_bytes)).check()  # what is gathered
        for size in sorted({min(size, options.cells) for size in options.batch_sizes}, reverse=True):
            batch = cut(counts, order[:size], options.chunk)
            for make in cases(bench, batch, options):
                case = make()
                results.append({"data": name, **measure(device, case, ceiling, options.repeat)})
                del case
                device.free()
                print("  ".join(line(results[-1])), flush=True)
    return results


HEADER = ("case", "cells", "block", "shared", "us", "Mcells/s", "written", "moved", "copy", "fill", "of copy",
          "floor us", "regs", "blocks")  # fmt: skip
"""Rates in GB/s; `moved` = read + written; `blocks` = per multiprocessor."""


def line(result: dict[str, Any]) -> list[str]:
    """One result as cells of the table."""
    head = [
        f"{result['data']} {result['case']}",
        f"{result['cells']:,}",
        str(result["block"]),
        f"{result['shared']:,}",
    ]
    if "error" in result:
        return [*head, f"WRONG: {result['error']}", *[""] * (len(HEADER) - 5)]
    return [
        *head,
        f"{result['seconds']['median'] * 1e6:.1f}",
        f"{result['cells_per_s'] / 1e6:.2f}",
        *(
            f"{result[key]:.0f}"
            for key in ("written_gb_per_s", "moved_gb_per_s", "copy_gb_per_s", "fill_gb_per_s")
        ),
        f"{result['share_of_copy']:.0%}",
        f"{result['floor_seconds'] * 1e6:.1f}",
        str(result["registers"]),
        str(result["blocks_per_processor"]),
    ]


def write(
    folder: Path, conditions: dict[str, Any], options: argparse.Namespace, results: list[dict[str, Any]]
) -> str:
    """kernels.json and kernels.txt below `folder`; returns the text."""
    chosen = {key: str(value) if isinstance(value, Path) else value for key, value in vars(options).items()}
    content = {"conditions": conditions, "options": chosen, "defaults": asdict(Knobs()), "results": results}
    tables.write_json(folder / "kernels.json", content)
    machine = ", ".join(f"{key} {value}" for key, value in conditions.items() if key != "versions")
    versions = ", ".join(f"{name} {version}" for name, version in conditions.get("versions", {}).items())
    text = f"{machine}\n{versions}\n\n{tables.table(HEADER, map(line, results))}\n"
    (folder / "kernels.txt").write_text(text)
    return text


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.kernels", description=__doc__)
    all_cases = ("rowpack_dense", "rowpack_csr", "bitpacking", "gather", "sort", "densify")
    parser.add_argument("--data", nargs="+", choices=DATA, default=list(DATA))
    parser.add_argument("--cases", nargs="+", choices=all_cases, default=list(all_cases))
    parser.add_argument("--dtypes", nargs="+", choices=list(FLOATS), default=list(FLOATS))
    parser.add_argument("--batch-sizes", nargs="+", type=int, default=[4096, 1024, 256], help="rows")
    parser.add_argument("--cells", type=int, default=4096)
    parser.add_argument("--genes", type=int, default=20_000)
    parser.add_argument("--density", type=float, default=0.07, help="of the uniform data")
    parser.add_argument("--gene-orders", choices=("mixed", "one"), default="mixed",
                        help="whether columns come out in another order than stored (default)")  # fmt: skip
    parser.add_argument("--chunk", type=int, default=CHUNK, help="values per chunk")
    parser.add_argument("--block", nargs="+", type=int, default=[256], help="threads per block")
    parser.add_argument(
        "--tile-bytes", nargs="+", type=int, default=[0], help="shared memory per row; 0: a whole row"
    )
    parser.add_argument(
        "--grid", nargs="+", type=int, default=[0], help="blocks of dense kernels; 0: one per row"
    )
    parser.add_argument(
        "--stage-bytes", type=int, default=Knobs.stage_bytes, help="shared memory per packed chunk"
    )
    parser.add_argument(
        "--cold-bytes", type=int, default=Knobs.cold_bytes, help="memory that outputs rotate over"
    )
    parser.add_argument("--repeat", type=int, default=30, help="replays; the median counts")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--compile-option", nargs="*", default=[], help="more options for NVRTC")
    parser.add_argument(
        "--out", type=Path, default=Path("bench_results/kernels"), help="folder of the report"
    )
    return parser.parse_args(arguments)


def main(arguments: Sequence[str] | None = None) -> int:
    """Entry of the command."""
    options = parse(arguments)
    reason = missing()
    if reason:
        print(f"Kernels can only be measured on an NVIDIA GPU: {reason}", file=sys.stderr)
        return MISSING
    device = CudaDevice(options.compile_option)
    results = run_all(device, options)
    print("\n" + write(options.out, device.describe(), options, results))
    return FAILED if any("error" in result for result in results) else 0


if __name__ == "__main__":
    sys.exit(main())
