"""What very many files and cells cost: ``python -m benchmarks.scale PART``.

Each measurement is made in a process of its own. ``--beside FOLDER`` measures the package of another checkout
with the same code, for the figures of an earlier version beside those of this one.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.common import DataSpec, conditions, prepare
from hbx_gpu._bench.machine import describe
from hbx_gpu._bench.tables import table, write_json

ROOT = Path(__file__).resolve().parents[1]
_PART_ROWS = 1_000_000
_BATCH = 64  # files that an ingest commits together, and reports then
_BYTES = 1e6


def main(argv: Sequence[str] | None = None) -> int:
    """Run one part; returns the exit status."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.scale", description=__doc__)
    parts = parser.add_subparsers(dest="part", required=True)
    one = parts.add_parser("sampler", help="what orders cost: made, first batch, resumed, each batch, memory")
    one.add_argument("--cells", type=int, nargs="+", default=[10_000_000, 100_000_000, 1_000_000_000])
    one.add_argument("--beside-cells", type=int, nargs="*", default=[10_000_000, 100_000_000])
    one.add_argument("--groups", type=int, default=1_000)
    one.add_argument("--batch-size", type=int, default=1_024)
    one.add_argument("--orders", nargs="+", default=["none", "block", "group", "balanced", "weighted"])
    two = parts.add_parser("opening", help="an atlas opened by several ranks at once: seconds and memory")
    two.add_argument("--cells", type=int, default=100_000_000)
    two.add_argument("--ranks", type=int, default=2)
    two.add_argument("--data", type=Path, default=Path("demo/benchmark-data"))
    two.add_argument("--groups", type=int, default=1)
    three = parts.add_parser("ingest", help="very many small files: what each costs, early and late")
    four = parts.add_parser("workers", help="files per second with one and two processes")
    for part, files, cells in ((three, 5_000, 200), (four, 8, 50_000)):
        part.add_argument("--files", type=int, default=files)
        part.add_argument("--cells", type=int, default=cells)
        part.add_argument("--genes", type=int, default=2_000)
        part.add_argument("--data", type=Path, default=Path("demo/benchmark-data"))
    four.add_argument("--workers", type=int, nargs="+", default=[1, 2])
    for part in (one, two):
        part.add_argument("--beside", type=Path, help="another checkout, whose package is measured too")
        part.add_argument("--out", type=Path, default=Path("demo/benchmarks"))
    job = parts.add_parser("job", help="one measurement, in this process")
    job.add_argument("function", choices=["order_costs", "opened"])
    job.add_argument("arguments", type=json.loads)
    options = parser.parse_args(argv)
    if options.part == "job":
        measure: Any = {"order_costs": order_costs, "opened": opened}[options.function]
        print(json.dumps(measure(**options.arguments)))
        return 0
    return {"sampler": sampler, "opening": opening, "ingest": ingest, "workers": workers}[options.part](
        options
    )


def _measured(function: str, folder: Path, **arguments: object) -> dict[str, Any]:
    """What a function of this module returns in a process whose package is that of `folder`."""
    return _finished(_begun(function, folder, {}, **arguments))


def _begun(
    function: str, folder: Path, environment: dict[str, str], **arguments: object
) -> subprocess.Popen[str]:
    # This file by its path, because the other checkout need not have it.
    return subprocess.Popen(
        [sys.executable, __file__, "job", function, json.dumps(arguments)],
        env={**os.environ, "PYTHONPATH": str(folder), "PYTHONSAFEPATH": "1", **environment},
        stdout=subprocess.PIPE,
        text=True,
    )


def _finished(process: subprocess.Popen[str]) -> dict[str, Any]:
    out, _ = process.communicate()
    if process.returncode:
        raise RuntimeError(f"a measurement failed with status {process.returncode}")
    found: dict[str, Any] = json.loads(out.splitlines()[-1])
    return found


def _memory() -> dict[str, int]:
    """Bytes that only this process holds, and those it shares with files or other processes."""
    import psutil

    found = psutil.Process().memory_full_info()
    return {"own": int(found.uss), "shared": int(found.rss - found.uss)}


# Orders


def sampler(options: argparse.Namespace) -> int:
    """Measure orders of many cells."""
    rows, runs = [], []
    for where, folder, sizes in (
        ("here", ROOT, options.cells),
        ("beside", options.beside, options.beside_cells),
    ):
        for cells in sizes if folder else []:
            for order in options.orders:
                arguments = {"order": order, "cells": cells, "groups": options.groups}
                run = _measured("order_costs", folder, batch_size=options.batch_size, **arguments)
                runs.append({"package": where, **arguments, **run})
                rows.append(
                    (
                        where,
                        order,
                        f"{cells:,}",
                        *(f"{run[key]:.3f}" for key in ("build_s", "first_s", "resume_s")),
                        f"{run['batch_s'] * 1e6:,.0f}",
                        f"{run['own'] / _BYTES:,.0f}",
                    )
                )
    heading = ("package", "order", "cells", "made, s", "first batch, s", "resumed, s", "batch, us", "MB")
    found = conditions()
    print(table(heading, rows))
    print(
        f"{options.groups} groups side by side, 50 labels, batches of {options.batch_size}; processor time; "
        f"MB: memory of its own beside the arrays it was given\n{describe(found)}"
    )
    write_json(options.out / "scale-sampler.json", {"conditions": found, "runs": runs})
    return 0


def order_costs(order: str, cells: int, groups: int, batch_size: int) -> dict[str, float]:
    """Processor seconds and bytes of one order."""
    from hbx_gpu.sampler import BalancedCellSampler, CellSampler, WeightedCellSampler

    of_cell = np.repeat(np.arange(groups, dtype=np.int32), cells // groups)
    labels = (np.arange(cells, dtype=np.uint32) * np.uint32(2654435761) >> np.uint32(16)).astype(np.uint8)
    labels %= 50
    weights = (labels + 1).astype(np.float32) if order == "weighted" else np.empty(0, np.float32)
    if order != "weighted":
        labels = labels.astype(np.int8)

    def make() -> Any:
        if order == "balanced":
            return BalancedCellSampler(labels, batch_size, seed=1)
        if order == "weighted":
            return WeightedCellSampler(weights, batch_size, seed=1)
        return CellSampler(of_cell, batch_size, seed=1, locality=order)

    small = slice(0, 2_000)
    whole = of_cell, labels, weights
    of_cell, labels, weights = of_cell[small], labels[small], weights[small]
    next(make().batches())  # imports and compiled code
    of_cell, labels, weights = whole
    before = _memory()["own"]
    clock = time.process_time()
    made = make()
    built = time.process_time()
    batches = made.batches()
    next(batches)
    first = time.process_time()
    for _ in range(200):
        next(batches)
    later = time.process_time()
    own = _memory()["own"] - before
    state = made.state_dict()
    del batches, made
    other = make()
    resumed = time.process_time()
    other.load_state_dict(state)
    next(other.batches())
    return {
        "build_s": built - clock,
        "first_s": first - built,
        "batch_s": (later - first) / 200,
        "resume_s": time.process_time() - resumed,
        "own": own,
    }


# Opening


def opening(options: argparse.Namespace) -> int:
    """Measure an atlas of many cells."""
    atlas = str(linked_atlas(options.data, options.cells, options.groups))
    rows, runs = [], []
    for where, folder in (("here", ROOT), ("beside", options.beside)):
        if folder is None:
            continue
        environment = {"LOCAL_WORLD_SIZE": str(options.ranks)}
        ranks = [_begun("opened", folder, environment, atlas=atlas) for _ in range(options.ranks)]
        for number, run in enumerate([_finished(rank) for rank in ranks]):
            runs.append({"package": where, "rank": number, **run})
            rows.append(
                (
                    where,
                    f"{number} of {options.ranks}",
                    *(f"{run[key]:.1f}" for key in ("open_s", "first_s", "open_cpu", "first_cpu")),
                    f"{run['bytes_per_row']:.2f}",
                    *(f"{run[key] / _BYTES:,.0f}" for key in ("imported", "own", "shared", "peak")),
                )
            )
    heading = (
        "package", "rank", "open, s", "first batch, s", "open, CPU s", "first batch, CPU s", "bytes/row",
        "imports MB", "own MB", "shared MB", "peak MB",
    )  # fmt: skip
    found = conditions()
    print(table(heading, rows))
    print(
        f"{options.cells:,} rows with one label column in {options.groups:,} group(s), whose files are links "
        f"to those of one group; {options.ranks} rank(s) at once, page cache as it was\n"
        f"{describe(found)}"
    )
    write_json(options.out / "scale-opening.json", {"conditions": found, "runs": runs})
    return 0


def opened(atlas: str) -> dict[str, float]:
    """Open an atlas, read a batch and shuffle, as a rank does: seconds and bytes."""
    import resource

    from hbx_gpu.atlas import RaggedAtlas
    from hbx_gpu.dataloader import make_loader

    imported = _memory()["own"]
    clock, processor = time.perf_counter(), time.process_time()
    query = RaggedAtlas.checkout_latest(atlas).query()
    dataset: Any = query.to_cell_dataset(metadata_columns=["cell_type"])
    ready, ready_cpu = time.perf_counter(), time.process_time()
    with make_loader(dataset, batch_size=1024, shuffle=True, seed=0) as loader:
        batches = iter(loader)
        next(batches)
        first, first_cpu = time.perf_counter(), time.process_time()
        for _ in range(20):
            next(batches)
        memory = _memory()
        del batches
    index = dataset.row_index
    nbytes = sum(getattr(index, name).nbytes for name in index.__slots__)
    return {
        "open_s": ready - clock,
        "first_s": first - ready,
        "open_cpu": ready_cpu - processor,
        "first_cpu": first_cpu - ready_cpu,
        "bytes_per_row": nbytes / len(dataset),
        "imported": imported,
        **memory,
        "peak": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
    }


def linked_atlas(folder: Path, cells: int, groups: int = 1) -> Path:
    """An atlas whose rows point to one stored group, under many names and again and again.

    The groups are hard links to the files of the first one, so the disk holds its cells once.
    """
    home = folder / f"linked-{cells}-{groups}"
    atlas = home / "atlas"
    if (home / "complete").exists():
        return atlas
    import lancedb
    import pyarrow as pa

    from hbx_gpu.atlas import RaggedAtlas

    stored_cells = min(_PART_ROWS, cells // groups)
    one = prepare(folder, DataSpec(cells=stored_cells, genes=2_000, density=0.01, groups=1))
    shutil.rmtree(home, ignore_errors=True)
    home.mkdir(parents=True)
    shutil.copytree(one.atlas, atlas, symlinks=True)
    opened_atlas = RaggedAtlas.open(str(atlas))
    database = lancedb.connect(opened_atlas.db_uri)
    datasets, stored = database.open_table("datasets"), database.open_table("cells")
    dataset, part = datasets.to_arrow(), stored.to_arrow()
    place = next(name for name in part.schema.names if name.startswith("gene_expression"))
    first = dataset["zarr_group"][0].as_py()
    names = [first, *(f"{number:016x}/gene_expression" for number in range(1, groups))]
    store = atlas / "zarr_store"
    for name in names[1:]:
        shutil.copytree(store / first, store / name, copy_function=os.link)
    if groups > 1:
        rows = [
            {**dataset.to_pylist()[0], "zarr_group": name, "dataset_uid": name.partition("/")[0]}
            for name in names[1:]
        ]
        datasets.add(pa.Table.from_pylist(rows, dataset.schema))

    def parts() -> Iterator[pa.RecordBatch]:
        for copy in range(1, -(-cells // len(part))):
            rows = part.slice(0, min(len(part), cells - copy * len(part)))
            changed = {"uid": pa.array([f"{copy:04x}{number:08x}" for number in range(len(rows))])}
            name = names[copy % groups]
            if name != first:
                pointer = rows[place].combine_chunks()
                members = [pointer.field(i) for i in range(pointer.type.num_fields)]
                at = pointer.type.get_field_index("zarr_group")
                members[at] = pa.array([name] * len(rows), members[at].type)
                changed[place] = pa.StructArray.from_arrays(members, fields=list(pointer.type))
                changed["dataset_uid"] = pa.array([name.partition("/")[0]] * len(rows))
            for column, values in changed.items():
                field = rows.schema.field(column)
                rows = rows.set_column(rows.schema.get_field_index(column), field, values.cast(field.type))
            yield from rows.to_batches()

    stored.add(pa.RecordBatchReader.from_batches(part.schema, parts()))
    opened_atlas.snapshot()
    (home / "complete").touch()
    return atlas


# Ingest


def make_files(folder: Path, n_files: int, n_cells: int, n_genes: int, *, seed: int = 0) -> list[Path]:
    """Files with the same genes and cells of their own; those that are there already are kept."""
    import anndata
    import h5py
    import pandas as pd
    import scipy.sparse as sp

    folder.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(seed)
    x = sp.random(n_cells, n_genes, 0.05, "csr", dtype=np.float32, random_state=rng)
    x.data = np.ceil(x.data * 9)
    obs = pd.DataFrame(
        {
            "cell_type": pd.Categorical(rng.choice(list("abcde"), n_cells)),
            "age": rng.integers(0, 90, n_cells),
        },
        index=[f"c{i}" for i in range(n_cells)],
    )
    var = pd.DataFrame(
        {"symbol": [f"g{i}" for i in range(n_genes)]}, index=[f"ENSG{i:011d}" for i in range(n_genes)]
    )
    pattern = folder / "pattern.h5ad"
    anndata.AnnData(x, obs=obs, var=var).write_h5ad(pattern)
    paths = []
    for i in range(n_files):
        path = folder / f"{i:05d}.h5ad"
        paths.append(path)
        if path.exists():
            continue
        shutil.copy(pattern, path)
        with h5py.File(path, "r+") as file:
            names = np.array([f"f{i}c{j}" for j in range(n_cells)], object)
            del file["obs/_index"]
            made = file["obs"].create_dataset("_index", data=names, dtype=h5py.string_dtype())
            made.attrs["encoding-type"], made.attrs["encoding-version"] = "string-array", "0.2.0"
            file["X/data"][:] = rng.integers(1, 9, len(x.data)).astype(np.float32)
    return paths


def ingest(options: argparse.Namespace) -> int:
    """Measure an ingest of very many small files in one process."""
    import hbx_gpu

    home = options.data / "ingest"
    paths = make_files(home / f"{options.cells}x{options.genes}", options.files, options.cells, options.genes)
    root = home / "atlas"
    shutil.rmtree(root, ignore_errors=True)
    moments: list[float] = []
    begin, wall = time.process_time(), time.perf_counter()
    hbx_gpu.ingest_many(root, paths, added=lambda _: moments.append(time.process_time()))
    cpu, wall = time.process_time() - begin, time.perf_counter() - wall
    spans = np.diff(moments[_BATCH - 1 :: _BATCH]) / _BATCH * 1e3
    print(
        f"{len(paths):,} files of {options.cells} cells x {options.genes:,} genes, one process: "
        f"{cpu / len(paths) * 1e3:.1f} ms CPU per file, {len(paths) / wall:.1f} files/s\n"
        f"written and committed: {spans[0]:.1f} ms CPU per file in files {_BATCH} to {2 * _BATCH}, "
        f"{spans[-1]:.1f} in the last {_BATCH} (ratio {spans[-1] / spans[0]:.2f})"
    )
    for name in ("_feature_layouts", "atlas_versions", "cells", "datasets", "gene_registry"):
        folder = root / "lance_db" / f"{name}.lance"
        size = {part.name: _size(part) / len(paths) for part in sorted(folder.iterdir())}
        told = ", ".join(f"{part.lstrip('_')} {n:,.0f}" for part, n in size.items())
        print(f"table {name}: {sum(size.values()):,.0f} bytes per dataset ({told})")
    atlas = hbx_gpu.RaggedAtlas.open(root)
    atlas.optimize()
    atlas.snapshot()
    begin = time.process_time()
    dataset = hbx_gpu.RaggedAtlas.checkout_latest(root).query().to_cell_dataset("gene_expression")
    print(f"opened as a dataset of {len(dataset):,} cells: {time.process_time() - begin:.2f} s CPU")
    print(describe(conditions()))
    return 0


def workers(options: argparse.Namespace) -> int:
    """Measure how an ingest becomes faster with processes."""
    import resource
    from concurrent.futures import ProcessPoolExecutor
    from multiprocessing import get_context

    import hbx_gpu

    home = options.data / "ingest"
    paths = make_files(home / f"{options.cells}x{options.genes}", options.files, options.cells, options.genes)
    n_bytes, first, done = sum(path.stat().st_size for path in paths), 0.0, 0.0
    for n in options.workers:
        root = home / "atlas"
        shutil.rmtree(root, ignore_errors=True)
        with ProcessPoolExecutor(n, mp_context=get_context("spawn")) as executor:
            before = sum(executor.map(_ready, range(n)))
            here, begin = time.process_time(), time.perf_counter()
            hbx_gpu.ingest_many(root, paths, executor)
            took, here = time.perf_counter() - begin, time.process_time() - here
        used = resource.getrusage(resource.RUSAGE_CHILDREN)
        there = used.ru_utime + used.ru_stime - done - before
        done = used.ru_utime + used.ru_stime
        first = first or took
        print(
            f"{len(paths):,} files of {options.cells:,} cells, {n} worker(s): {took:.1f} s, "
            f"{len(paths) / took:.1f} files/s, {n_bytes / took / 1e6:.1f} MB/s read, {first / took:.2f}x; "
            f"CPU {here:.1f} s in the coordinator, {there:.1f} s in workers"
        )
    print(describe(conditions()))
    return 0


def _ready(_: int) -> float:
    """Processor seconds of a worker once it is ready; its start is not measured."""
    import hbx_gpu.atlas._ingest.tasks  # noqa: F401

    time.sleep(1)
    return time.process_time()


def _size(folder: Path) -> int:
    return sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())


if __name__ == "__main__":
    raise SystemExit(main())
