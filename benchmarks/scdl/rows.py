"""Rows of an SCDL archive as CSR batches, ours against bionemo-scdl: ``python -m benchmarks.scdl rows``.

Same archive, same run, taking turns; bionemo-scdl runs in its own interpreter (``--python PATH``). Every
batch kept for checking is compared with the bytes of the archive.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.common import conditions
from benchmarks.jobs import in_process
from benchmarks.peers.protocol import Csr, fingerprints, gene_weights
from benchmarks.scdl.rows_loader import LOADERS
from hbx_gpu._bench.machine import describe
from hbx_gpu._bench.tables import spread, table, write_json

_LABELS = {
    "ours": "hbx_gpu, SparseBatch",
    "ours-csr": 'hbx_gpu, layout="csr"',
    "scdl": "bionemo-scdl",
    "scdl-workers": "bionemo-scdl, 2 workers",
}


def prepare(folder: Path, cells: int, genes: int, density: float) -> Path:
    """An archive of generated counts in float32, unless a run before left it there."""
    from tqdm import tqdm

    from hbx_gpu.scdl._writing.convert import convert_h5ad
    from hbx_gpu.synthetic import Uniform, write_h5ad

    home = folder / f"scdl-cells{cells}-genes{genes}-density{density}"
    archive = home / "archive"
    if archive.exists():
        return archive
    home.mkdir(parents=True, exist_ok=True)
    source = home / "source.h5ad"
    with tqdm(total=cells, unit="cell", desc="generating") as bar:
        write_h5ad(source, cells, genes, seed=0, model=Uniform(genes, density), compression=None,
                   progress=bar.update)  # fmt: skip
    convert_h5ad(source, archive)
    return archive


def row_fingerprints(archive: Path, out: Path) -> int:
    """Fingerprint of every row, from the archive's bytes; returns the number of rows."""
    from hbx_gpu.scdl import open_archive

    opened = open_archive(archive)
    if len(opened.bounds) != 2:
        raise SystemExit(
            f"{archive}: rows of one block of genes can be compared, it has {len(opened.bounds) - 1}"
        )
    weights = gene_weights(opened.width(0))
    parts = []
    for first in range(0, opened.n_rows, 4096):
        pointers = opened.indptr[first : first + 4097].astype(np.int64)
        span = slice(int(pointers[0]), int(pointers[-1]))
        rows = Csr(pointers - pointers[0], opened.indices[span], opened.data[span])
        parts.append(fingerprints(rows, weights))
    np.save(out, np.concatenate(parts))
    return opened.n_rows


def measure(options: argparse.Namespace, loader: str, order: str, batch: int, truth: Path) -> dict[str, Any]:
    """One loader at one setting, in a process of its own."""
    python = options.python if loader.startswith("scdl") else sys.executable
    job = {"loader": loader, "order": order, "batch": batch, "archive": str(options.archive),
           "truth": str(truth), "seconds": options.seconds, "warmup": options.warmup}  # fmt: skip
    return in_process("benchmarks.scdl.rows_loader:measure", job, python=python)


def main(argv: Sequence[str] | None = None) -> int:
    """Measure, print and write; returns the exit status: 1 if any row was wrong."""
    options = _parse(argv)
    if options.archive is None:
        options.archive = prepare(options.folder, options.cells, options.genes, options.density)
    options.archive = options.archive.absolute()
    truth = options.folder.absolute() / "scdl_rows_truth.npy"
    truth.parent.mkdir(parents=True, exist_ok=True)
    n_rows = row_fingerprints(options.archive, truth)
    loaders = [name for name in options.loaders if options.python or not name.startswith("scdl")]
    runs: list[dict[str, Any]] = []
    for repeat in range(options.repeats):
        for order in options.orders:
            for batch in options.batch:
                for loader in loaders:  # in turns: what else the machine does hits all of them
                    runs.append({**measure(options, loader, order, batch, truth), "repeat": repeat})
    here = conditions()
    print(describe(here))
    print(
        f"{options.archive}: {n_rows:,} rows; {options.repeats} runs of {options.seconds:g} s each after "
        f"{options.warmup:g} s of warm-up\n"
    )
    summary = _summary(runs)
    print(_table(summary))
    if options.out is not None:
        write_json(options.out, {"conditions": here, "rows": n_rows, "summary": summary, "runs": runs})
    wrong = sum(run["wrong_rows"] for run in runs)
    print(f"\n{sum(run['checked_rows'] for run in runs):,} rows checked, {wrong} wrong")
    return int(wrong > 0)


def _summary(runs: list[dict[str, Any]]) -> list[dict[str, Any]]:
    keys = dict.fromkeys((run["order"], run["batch"], run["loader"]) for run in runs)
    found = []
    for order, batch, loader in keys:
        mine = [r for r in runs if (r["order"], r["batch"], r["loader"]) == (order, batch, loader)]
        found.append(
            {
                "order": order,
                "batch": batch,
                "loader": loader,
                "cells_per_s": spread([r["cells_per_s"] for r in mine]),
                "cells_per_cpu_s": max((r["cells"] / r["cpu_s"] for r in mine if r["cpu_s"]), default=None),
                "peak_rss": max(r["peak_rss"] for r in mine),
            }
        )
    return sorted(found, key=lambda row: (row["order"], row["batch"], LOADERS.index(row["loader"])))


def _table(summary: list[dict[str, Any]]) -> str:
    best: dict[tuple[str, int], float] = {}
    for row in summary:
        if row["loader"].startswith("scdl"):
            key = row["order"], row["batch"]
            best[key] = max(best.get(key, 0.0), row["cells_per_s"]["median"])
    lines = []
    for row in summary:
        rate, peer = row["cells_per_s"], best.get((row["order"], row["batch"]))
        lines.append(
            [
                _LABELS[row["loader"]],
                row["order"],
                str(row["batch"]),
                f"{rate['median']:,.0f}",
                f"{rate['min']:,.0f}-{rate['max']:,.0f}",
                f"{rate['median'] / peer:.1f}x" if peer else "",
                f"{row['cells_per_cpu_s']:,.0f}" if row["cells_per_cpu_s"] else "",
                f"{row['peak_rss'] / 1e6:,.0f}",
            ]
        )
    header = [
        "loader",
        "order",
        "batch",
        "cells/s",
        "range",
        "vs fastest bionemo-scdl",
        "cells/CPU s",
        "peak RSS MB",
    ]
    return table(header, lines)


def _parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.scdl rows", description=__doc__)
    parser.add_argument("--archive", type=Path, help="an archive with one block of genes; else one is made")
    parser.add_argument("--cells", type=int, default=40_000)
    parser.add_argument("--genes", type=int, default=20_000)
    parser.add_argument("--density", type=float, default=0.07)
    parser.add_argument("--python", default=os.environ.get("HBX_SCDL_PYTHON"), metavar="PATH",
                        help="interpreter with bionemo-scdl; by default HBX_SCDL_PYTHON")  # fmt: skip
    parser.add_argument("--loaders", nargs="+", choices=LOADERS, default=list(LOADERS))
    parser.add_argument(
        "--orders", nargs="+", choices=("random", "sequential"), default=["random", "sequential"]
    )
    parser.add_argument("--batch", type=int, nargs="+", default=[64, 512, 4096])
    parser.add_argument("--seconds", type=float, default=3.0)
    parser.add_argument("--warmup", type=float, default=3.0, help="seconds before the clock starts")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--folder", type=Path, default=Path("demo"), help="where made data go")
    parser.add_argument("--out", type=Path, metavar="JSON")
    return parser.parse_args(argv)
