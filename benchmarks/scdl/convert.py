"""A .h5ad file becomes an SCDL archive: time and peak memory, ours against bionemo-scdl's paginated path.

``python -m benchmarks.scdl convert``; bionemo-scdl runs in its own interpreter (``--python PATH``). The
archives are compared byte by byte.
"""

from __future__ import annotations

import argparse
import filecmp
import os
import shutil
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.jobs import in_process, peak_rss

LOADERS = {
    "hbx_gpu": "hbx_gpu",
    "paginated": "bionemo-scdl, paginated",
    "regular": "bionemo-scdl, regular",
}
_FILES = ("data.npy", "col_ptr.npy", "row_ptr.npy")


def convert(how: str, source: str, target: str, rows: int) -> dict[str, Any]:
    """Convert within this process; imports are not timed."""
    if how == "hbx_gpu":
        from hbx_gpu.scdl import SingleCellMemMapDataset
    else:
        from bionemo.scdl.io.single_cell_memmap_dataset import SingleCellMemMapDataset  # type: ignore[no-redef]
    imported = peak_rss()
    options: dict[str, Any] = {"load_block_row_size": rows}
    if how != "regular":
        options["paginated_load_cutoff"] = 0
    clock = time.perf_counter()
    dataset = SingleCellMemMapDataset(target, source, use_X_not_raw=True, **options)
    dataset.save()
    return {"seconds": time.perf_counter() - clock, "peak_rss": peak_rss(), "import_rss": imported}


def main(argv: Sequence[str] | None = None) -> int:
    """Convert with each, compare, print; returns the exit status: 1 where the archives differ."""
    options = _parse(argv)
    from benchmarks.common import conditions
    from hbx_gpu._bench.machine import describe
    from hbx_gpu._bench.tables import spread, table, write_json

    source = _source(options)
    hows = [how for how in options.how if how == "hbx_gpu" or options.python]
    runs: list[dict[str, Any]] = []
    differing: set[str] = set()
    for repeat in range(options.repeats):
        for how in hows:
            target = options.folder.absolute() / f"converted-{how}"
            shutil.rmtree(target, ignore_errors=True)
            job = {"how": how, "source": str(source), "target": str(target), "rows": options.rows}
            python = sys.executable if how == "hbx_gpu" else options.python
            runs.append(
                {**job, "repeat": repeat, **in_process("benchmarks.scdl.convert:convert", job, python=python)}
            )
        differing |= _differing([options.folder.absolute() / f"converted-{how}" for how in hows])
    here = conditions()
    print(describe(here))
    print(f"{source} ({source.stat().st_size / 1e9:.2f} GB), {options.rows:,} rows per page\n")
    lines = []
    for how in hows:
        mine = [run for run in runs if run["how"] == how]
        took = spread([run["seconds"] for run in mine])
        rss = max(run["peak_rss"] for run in mine)
        above = max(run["peak_rss"] - run["import_rss"] for run in mine)
        times = f"{took['min']:.1f}-{took['max']:.1f}"
        lines.append(
            [LOADERS[how], f"{took['median']:.1f}", times, f"{rss / 1e6:,.0f}", f"{above / 1e6:,.0f}"]
        )
    print(table(["converter", "seconds", "range", "peak RSS MB", "above imports MB"], lines))
    print(f"\nfiles that differ: {sorted(differing) or 'none'}")
    if options.out:
        write_json(options.out, {"conditions": here, "runs": runs, "differing": sorted(differing)})
    return int(bool(differing))


def _source(options: argparse.Namespace) -> Path:
    if options.input is not None:
        found: Path = options.input.absolute()
        return found
    from tqdm import tqdm

    from hbx_gpu.synthetic import Uniform, write_h5ad

    path = options.folder.absolute() / f"convert-{options.cells}x{options.genes}.h5ad"
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = path.with_suffix(".part")
        with tqdm(total=options.cells, unit="cell", desc="generating") as bar:
            model = Uniform(options.genes, options.density)
            write_h5ad(temporary, options.cells, options.genes, seed=0, model=model, compression=None,
                       progress=bar.update)  # fmt: skip
        temporary.rename(path)
    result: Path = path
    return result


def _differing(folders: Sequence[Path]) -> set[str]:
    first, *others = folders
    return {
        f"{other.name}/{name}"
        for other in others
        for name in _FILES
        if not filecmp.cmp(first / name, other / name, shallow=False)
    }


def _parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.scdl convert", description=__doc__)
    parser.add_argument("--input", type=Path, help="a .h5ad file with sparse X; else one is made")
    parser.add_argument("--cells", type=int, default=100_000)
    parser.add_argument("--genes", type=int, default=20_000)
    parser.add_argument("--density", type=float, default=0.07)
    parser.add_argument("--rows", type=int, default=1_000_000, help="rows per page of the paginated path")
    parser.add_argument("--how", nargs="+", choices=list(LOADERS), default=["hbx_gpu", "paginated"])
    parser.add_argument("--python", default=os.environ.get("HBX_SCDL_PYTHON"), metavar="PATH",
                        help="interpreter with bionemo-scdl; by default HBX_SCDL_PYTHON")  # fmt: skip
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--folder", type=Path, default=Path("demo"), help="where made data go")
    parser.add_argument("--out", type=Path, metavar="JSON")
    return parser.parse_args(argv)
