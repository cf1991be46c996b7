"""The loader end to end on a GPU, from the page cache to tensors: ``python -m benchmarks.device``.

Cells/s of whole epochs in every layout, beside the same loader on the CPU and beside what bounds it: the link
(a copy of as many staged bytes from page-locked memory) and the memory (a copy of as many output bytes on the
device).
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.common import DataSpec, conditions, prepare
from hbx_gpu._bench import limits
from hbx_gpu._bench.machine import describe
from hbx_gpu._bench.settings import open_dataset
from hbx_gpu._bench.tables import spread, table, write_json
from hbx_gpu._devices import resolve
from hbx_gpu._engine.device.backend import Slot
from hbx_gpu._loading.make import device_loader, make_loader
from hbx_gpu._loading.options import LoaderOptions
from hbx_gpu.dataloader import CellDataset
from hbx_gpu.errors import DeviceUnavailableError
from hbx_gpu.sampler import CellSampler
from hbx_gpu.transforms import Transform


@dataclass(frozen=True)
class Setting:
    """One way to load."""

    layout: str
    dtype: str = "float32"
    transform: Transform | None = None
    locality: str = "none"
    reader: str = "mmap"

    def describe(self) -> str:
        """A line of the table."""
        what = self.layout if self.layout == "csr" else f"dense {self.dtype}"
        steps = ", normalize + log1p" if self.transform else ""
        return f"{what}{steps}, {self.locality}, {self.reader}"


NORMALIZED = Transform(target_sum=1e4, log1p=True)
SETTINGS = (
    Setting("dense"),
    Setting("dense", "bfloat16"),
    Setting("dense", "bfloat16", NORMALIZED),
    Setting("dense", "bfloat16", NORMALIZED, "group"),
    Setting("dense", "bfloat16", NORMALIZED, "none", "pinned"),
    Setting("csr"),
)


def loader_for(dataset: CellDataset, backend: Any, setting: Setting, batch: int) -> Any:
    """A loader on a backend; None: on the CPU."""
    sampler = CellSampler(
        dataset.groups_np, batch_size=batch, seed=0, locality=setting.locality, num_workers=0
    )
    options: dict[str, Any] = {"layout": setting.layout}
    if setting.layout == "dense":
        options |= {"dtype": setting.dtype, "transform": setting.transform}
    if backend is None:
        return make_loader(dataset, sampler, **options)
    return device_loader(dataset, sampler, backend, LoaderOptions.of(io=setting.reader, **options))


def epoch_rate(loader: Any, number: int, finish: Any) -> float:
    """Cells/s of one epoch whose batches are dropped as they come; `finish` waits for the device."""
    loader.set_epoch(number)
    cells = 0
    clock = time.perf_counter()
    for batch in loader:
        cells += len(batch["index"])
    finish()
    return cells / (time.perf_counter() - clock)


def differences(dataset: CellDataset, backend: Any, batch: int) -> int:
    """Elements in which the device's first dense batch differs from the CPU's."""
    setting = Setting("dense")
    found = next(iter(loader_for(dataset, backend, setting, batch)))["X"].cpu()
    expected = next(iter(loader_for(dataset, None, setting, batch)))["X"]
    return int((found != expected).sum())


def staged_bytes(dataset: CellDataset, backend: Any, rows: int) -> int:
    """Bytes that cross the link for `rows` random cells."""
    selection = np.random.default_rng(0).permutation(len(dataset))[:rows]
    engine = dataset.device_engine(backend)
    plan, slab = dataset.read(selection)
    staging = engine.measure(plan, slab)
    engine.pack(staging, Slot(backend))
    return int(staging.host_bytes)


def main(argv: Sequence[str] | None = None) -> int:
    """Measure and print; returns the exit status: 1 for wrong values, 2 without a GPU."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.device", description=__doc__)
    parser.add_argument("--cells", type=int, default=100_000)
    parser.add_argument("--genes", type=int, default=20_000)
    parser.add_argument("--batch-sizes", type=int, nargs="+", default=[512, 4096])
    parser.add_argument("--repeat", type=int, default=3)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--data", type=Path, default=Path("demo/benchmark-data"))
    parser.add_argument("--out", type=Path, default=Path("demo/gpu"))
    options = parser.parse_args(argv)
    try:
        gpu = resolve(options.device)
    except DeviceUnavailableError as missing:
        print(missing)
        return 2
    if gpu is None:
        parser.error("--device must name a GPU")
    import torch

    from hbx_gpu._engine.device.cuda import CudaBackend

    spec = DataSpec(cells=options.cells, genes=options.genes)
    data = prepare(options.data, spec)
    dataset = open_dataset(data.atlas, "gene_expression")
    backend = CudaBackend(gpu)
    backend.warm_up()
    wrong = differences(dataset, backend, 512)
    speed = limits.bandwidth(gpu, 1)
    assert speed.link is not None
    rows, results = [], []
    for batch in options.batch_sizes:
        crossing = staged_bytes(dataset, backend, batch)
        bounds = {
            "link_cells_per_s": batch * speed.link / crossing,
            "memory_cells_per_s": speed.copy / (4 * dataset.n_features),
            "staged_bytes_per_cell": crossing / batch,
        }
        for setting in SETTINGS:
            rates = {}
            for place, where in (("gpu", backend), ("cpu", None)):
                with loader_for(dataset, where, setting, batch) as loader:
                    epoch_rate(loader, 0, torch.cuda.synchronize)
                    found = [epoch_rate(loader, 1 + k, torch.cuda.synchronize) for k in range(options.repeat)]
                rates[place] = spread(found)
            results.append({"batch": batch, "setting": setting.describe(), **rates, **bounds})
            rows.append(
                (
                    f"{setting.describe()}, batch {batch:,}",
                    *(
                        f"{rates[p]['median']:,.0f} ({rates[p]['min']:,.0f} .. {rates[p]['max']:,.0f})"
                        for p in rates
                    ),
                    f"{bounds['link_cells_per_s']:,.0f}",
                    f"{bounds['memory_cells_per_s']:,.0f}",
                )
            )
    machine = conditions(gpu)
    noted: dict[str, Any] = {**machine, "wrong_elements": wrong}
    text = "\n".join(
        (
            table(("cells/s", "GPU", "CPU", "limit: link", "limit: float32 copy"), rows),
            f"{spec.describe()}; page cache warm, whole epochs, median of {options.repeat} (range) after one "
            f"more; first batch equal to the CPU's but for {wrong} elements",
            describe(machine),
        )
    )
    print(text)
    options.out.mkdir(parents=True, exist_ok=True)
    (options.out / "device.txt").write_text(text + "\n")
    write_json(
        options.out / "device.json",
        {"conditions": noted, "spec": spec.describe(), "runs": results},
    )
    return int(wrong > 0)


if __name__ == "__main__":
    raise SystemExit(main())
