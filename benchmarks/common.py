"""What the benchmarks share: data, conditions, measuring in a process of its own, tables."""

from __future__ import annotations

import json
import os
import platform
import statistics
import subprocess
import sys
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

# Python keeps no import of a peer or of torch up here: measured processes import what they measure.

_PACKAGES = ("hbx_gpu", "numpy", "numba", "torch", "zarr", "lancedb", "anndata", "h5py", "scipy")


@dataclass(frozen=True)
class DataSpec:
    """Generated data: n_groups datasets of equal size, every cell with the same number of nonzeros.

    Counts are 1 + the failures before a success of probability 0.3; columns are uniform. Every dataset after
    the first has its genes in another order, unless `gene_orders` is "one".
    """

    cells: int = 40_000
    genes: int = 20_000
    density: float = 0.07
    groups: int = 4
    codec: str | None = None
    gene_orders: str = "mixed"

    @property
    def rows_per_group(self) -> int:
        """Cells of each dataset."""
        return self.cells // self.groups

    def describe(self) -> str:
        """One line for tables."""
        return (
            f"{self.rows_per_group * self.groups:,} cells x {self.genes:,} genes, {self.density:.0%} nonzero "
            f"in every cell, {self.groups} datasets, {self.gene_orders} gene order"
            + "s"
            * (self.gene_orders == "mixed")
        )


@dataclass(frozen=True)
class Prepared:
    """Where generated data lie: one atlas, and the same cells in the same order as one plain .h5ad."""

    atlas: Path
    h5ad: Path


def prepare(folder: Path, spec: DataSpec) -> Prepared:
    """Generate the data of `spec` below `folder`, unless a run before left it there."""
    name = "-".join(f"{key}{value}" for key, value in asdict(spec).items())
    home = folder / name
    done = Prepared(home / "atlas", home / "whole.h5ad")
    if (home / "complete").exists():
        return done
    from anndata.experimental import concat_on_disk
    from tqdm import tqdm

    from hbx_gpu.atlas import add_from_h5ad, create_or_open_atlas
    from hbx_gpu.synthetic import Uniform, write_h5ad

    home.mkdir(parents=True, exist_ok=True)
    parts = [home / f"dataset_{k}.h5ad" for k in range(spec.groups)]
    model = Uniform(spec.genes, spec.density)
    with tqdm(total=spec.rows_per_group * spec.groups, unit="cell", desc="generating") as bar:
        for k, part in enumerate(parts):
            write_h5ad(part, spec.rows_per_group, spec.genes, seed=k, model=model, compression=None,
                       progress=bar.update)  # fmt: skip
            if k and spec.gene_orders == "mixed":
                _rename_genes(part, seed=k)
    atlas = create_or_open_atlas(done.atlas, codec=spec.codec)
    for part in tqdm(parts, unit="file", desc="ingesting"):
        add_from_h5ad(atlas, part, exist_ok=True)
    atlas.optimize()
    atlas.snapshot()
    concat_on_disk(parts, done.h5ad, index_unique="-")
    for part in parts:
        part.unlink()
    (home / "complete").touch()
    return done


def _rename_genes(path: Path, seed: int) -> None:
    """Give the columns of an .h5ad each other's names; all are drawn alike, so their order is another."""
    import h5py
    import numpy as np

    with h5py.File(path, "r+") as file:
        names = file["var"][file["var"].attrs["_index"]]
        names[:] = np.random.default_rng(seed).permutation(names[:])


def size_on_disk(path: Path) -> int:
    """Bytes of a file, or of all files below a folder."""
    files: Iterable[Path] = path.rglob("*") if path.is_dir() else [path]
    return sum(file.stat().st_size for file in files if file.is_file())


def conditions() -> dict[str, Any]:
    """What a figure needs beside it: machine, versions, commit."""
    return {
        "cpu": _cpu_model(),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "memory_gib": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30, 1),
        "system": f"{platform.system()} {platform.release()}",
        "python": platform.python_version(),
        "versions": {name: metadata.version(name) for name in _PACKAGES},
        "commit": _commit(),
    }


def _cpu_model() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    return next(
        (line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), platform.machine()
    )


def _commit() -> str:
    command = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


def describe_conditions(found: dict[str, Any]) -> str:
    """Conditions as two lines of text."""
    versions = ", ".join(f"{name} {version}" for name, version in found["versions"].items())
    return (
        f"{found['cpu']}, {found['cores']} cores, {found['memory_gib']} GiB; {found['system']}; "
        f"commit {found['commit']}\nPython {found['python']}; {versions}"
    )


def measure_in_process(module: str, job: dict[str, Any]) -> dict[str, Any]:
    """Run ``python -m module --job JSON`` and return the JSON object on its last line.

    A process of its own per measurement: its peak memory is that of the one thing measured, and no
    cache of an earlier measurement helps it.

    Raises
    ------
    RuntimeError
        The process failed; the message holds what it wrote.
    """
    command = [sys.executable, "-m", module, "--job", json.dumps(job)]
    paths = [str(Path(__file__).parents[1]), os.environ.get("PYTHONPATH", "")]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, paths))}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"{module} failed on {job}:\n{done.stderr or done.stdout}")
    result: dict[str, Any] = json.loads(done.stdout.strip().splitlines()[-1])
    return result


def peak_rss() -> int:
    """Peak resident bytes of this process, memory-mapped file pages included."""
    import resource

    kib = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return kib if sys.platform == "darwin" else kib * 1024


def spread(values: Sequence[float]) -> dict[str, float]:
    """Median and range."""
    return {"median": statistics.median(values), "min": min(values), "max": max(values)}


def table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """Columns aligned for a terminal, the first to the left, the others to the right."""
    lines = [list(header), *map(list, rows)]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    return "\n".join(
        "  ".join(
            [line[0].ljust(widths[0]), *(cell.rjust(w) for cell, w in zip(line[1:], widths[1:], strict=True))]
        ).rstrip()
        for line in lines
    )


def write_json(path: Path, content: Any) -> None:
    """Write `content` for machines, readable by people."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content, indent=2) + "\n")
