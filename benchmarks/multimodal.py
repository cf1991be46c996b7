"""A multimodal batch against the sum of its parts: ``python -m benchmarks.multimodal``.

One atlas with RNA, proteins and image tiles of the same cells. Seconds per batch of all three together, and
of each part by itself, over the same rows in the same order: read alone (``dataset[rows]``), and through the
loader. Rounds alternate, and the median of the ratio within a round counts. Page cache warm.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable, Sequence
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.common import conditions
from hbx_gpu._bench.machine import describe
from hbx_gpu._bench.tables import table, write_json

SPACES = ("gene_expression", "protein_abundance", "image_tiles")


def prepare(folder: Path, *, cells: int, genes: int, proteins: int, tile: int) -> Path:
    """Ingest generated data below `folder`, unless a run before did; the atlas."""
    home = folder / f"multimodal-{cells}-{genes}-{proteins}-{tile}"
    atlas_path = home / "atlas"
    if (home / "complete").exists():
        return atlas_path
    import pandas as pd
    from anndata import AnnData

    from hbx_gpu.atlas import ImageInput, create_or_open_atlas
    from hbx_gpu.synthetic import write_h5ad

    home.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(0)
    rna = home / "rna.h5ad"
    write_h5ad(rna, cells, genes, compression=None)
    names = _obs_names(rna)
    counts = rng.negative_binomial(3, 0.05, (cells, proteins)).astype(np.uint32)
    protein = AnnData(
        counts, obs=pd.DataFrame(index=names), var=pd.DataFrame(index=[f"AB{i:04d}" for i in range(proteins)])
    )
    # Smooth pictures: noise would measure what zstd does with noise.
    wave = np.sin(np.linspace(0, 6, tile))
    phase = rng.random((cells, 3, 1, 1))
    tiles = (120 + 60 * (wave[:, None] + phase) * (wave[None, :] - phase)).clip(0, 255).astype(np.uint8)
    cells_of_tiles = pd.DataFrame({"cell_id": names, "tile": np.arange(cells)})
    atlas = create_or_open_atlas(atlas_path)
    atlas.add_multimodal(
        {"rna": rna, "protein": protein, "tiles": ImageInput(tiles, cells_of_tiles)}, join="exact"
    )
    atlas.optimize()
    atlas.snapshot()
    (home / "complete").touch()
    return atlas_path


def _obs_names(path: Path) -> np.ndarray:
    from hbx_gpu._h5ad.files import H5adFile

    with H5adFile(path) as file:
        names: np.ndarray = file.obs().index.to_numpy()
    return names


Run = Callable[[], float]


def alone(dataset: Any, order: list[np.ndarray]) -> Run:
    """Seconds per batch of reading and nothing else."""

    def run() -> float:
        begin = time.perf_counter()
        for rows in order:
            dataset.__getitems__(rows)
        return (time.perf_counter() - begin) / len(order)

    return run


def loaded(dataset: Any, order: list[np.ndarray], layout: Any) -> Run:
    """Seconds per batch of a loader, its first windows aside."""
    from hbx_gpu.dataloader import make_loader

    loader = make_loader(dataset, order, layout=layout, executor="direct", num_workers=0)

    def run() -> float:
        batches = iter(loader)
        skipped = sum(1 for _ in islice(batches, len(order) // 4))
        begin = time.perf_counter()
        n = sum(1 for _ in batches)
        assert skipped + n == len(order)
        return (time.perf_counter() - begin) / n

    return run


def compare(whole: Run, parts: Sequence[Run], repeats: int) -> dict[str, Any]:
    """Seconds per batch of the whole and of its parts, and their ratio round by round."""
    for run in (whole, *parts):
        run()  # compiles, verifies checksums, fills pools
    rounds = []
    for i in range(repeats):
        runs = [whole, *parts] if i % 2 else [*parts, whole]
        seconds = {run: run() for run in runs}
        rounds.append([seconds[whole], *(seconds[part] for part in parts)])
    medians = [statistics.median(column) for column in zip(*rounds, strict=True)]
    ratios = [row[0] / sum(row[1:]) for row in rounds]
    return {"whole": medians[0], "parts": medians[1:], "ratio": statistics.median(ratios), "ratios": ratios}


def main(argv: Sequence[str] | None = None) -> int:
    """Measure and print; returns the exit status."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.multimodal", description=__doc__)
    parser.add_argument("--cells", type=int, default=20_000)
    parser.add_argument("--genes", type=int, default=20_000)
    parser.add_argument("--proteins", type=int, default=150)
    parser.add_argument("--tile", type=int, default=32, help="pixels per side, three channels")
    parser.add_argument("--batch-sizes", type=int, nargs="+", default=[64, 512, 4096])
    parser.add_argument("--batches", type=int, default=16_384, help="cells per run, at least 8 batches")
    parser.add_argument("--repeat", type=int, default=7)
    parser.add_argument("--data", type=Path, default=Path("benchmarks/data"))
    parser.add_argument("--out", type=Path, default=None, help="folder for multimodal.json")
    args = parser.parse_args(argv)

    from hbx_gpu.atlas import RaggedAtlas

    sizes = {"cells": args.cells, "genes": args.genes, "proteins": args.proteins, "tile": args.tile}
    query = RaggedAtlas.checkout_latest(prepare(args.data, **sizes)).query
    whole = query().to_multimodal_dataset(list(SPACES))
    parts = [query().to_cell_dataset(space) for space in SPACES]
    rng = np.random.default_rng(0)
    results = []
    for size in args.batch_sizes:
        n = max(8, args.batches // size)
        order = [rng.integers(0, args.cells, size) for _ in range(n)]
        ways: dict[str, Callable[[Any], Run]] = {"alone": partial(alone, order=order)}
        for layout in ("csr", "dense"):

            def through(dataset: Any, layout: str = layout, order: list[np.ndarray] = order) -> Run:
                dense = dataset in parts[1:]
                return loaded(dataset, order, "dense" if dense else layout)

            ways[f"loader, {layout}"] = through
        for way, start in ways.items():
            found = compare(start(whole), [start(part) for part in parts], args.repeat)
            results.append({"batch": size, "way": way, **found})
    machine = conditions()
    report = {"conditions": machine, "data": sizes, "results": results}
    print(describe(machine))
    print(
        f"{args.cells:,} cells: {args.genes:,} genes, {args.proteins} proteins, tiles 3 x {args.tile} x "
        f"{args.tile} uint8; page cache warm; random rows; ms per batch"
    )
    rows = [
        [
            f"{r['way']}, batch {r['batch']}",
            f"{1e3 * r['whole']:.2f}",
            *(f"{1e3 * part:.2f}" for part in r["parts"]),
            f"{r['ratio']:.2f}",
        ]
        for r in results
    ]
    print(table(["", "together", *SPACES, "of the sum"], rows))
    if args.out is not None:
        write_json(args.out / "multimodal.json", report)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
