"""What each order does to the composition of batches: ``python -m benchmarks.orders``.

Label entropy of batches against batches of the same size drawn uniformly, on a made-up atlas whose groups
differ in their labels. Index arithmetic only: no data is read.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.common import conditions
from benchmarks.mixing import entropies
from hbx_gpu._bench.machine import describe
from hbx_gpu._bench.tables import table, write_json
from hbx_gpu.sampler import (
    BalancedCellSampler,
    CellSampler,
    EpochSampler,
    GroupedCellSampler,
    WeightedCellSampler,
)

Make = Callable[..., EpochSampler]


@dataclass(frozen=True)
class MadeUpAtlas:
    """Group and label of every cell, in stored order."""

    groups: np.ndarray
    labels: np.ndarray
    n_groups: int
    n_labels: int

    @classmethod
    def generate(
        cls, cells: int, groups: int, labels: int, *, concentration: float, sort: bool
    ) -> MadeUpAtlas:
        """Log-normal group sizes; label shares of each group from a Dirichlet distribution.

        A small `concentration` gives each group few labels of its own. `sort` stores the cells of a group
        label after label, as files put together from clusters or plates are; otherwise at random.
        """
        rng = np.random.default_rng(0)
        of_cell = np.sort(rng.choice(groups, cells, p=_shares(rng.lognormal(sigma=1.0, size=groups))))
        shares = rng.dirichlet(np.full(labels, concentration), groups)
        label = np.concatenate(
            [rng.choice(labels, n, p=shares[g]) for g, n in enumerate(np.bincount(of_cell, minlength=groups))]
        )
        if sort:
            label = label[np.lexsort((label, of_cell))]
        return cls(of_cell, label, groups, labels)


def _shares(weights: np.ndarray) -> np.ndarray:
    result: np.ndarray = weights / weights.sum()
    return result


def _of_runs(codes: np.ndarray, size: int, n_codes: int) -> np.ndarray:
    """Entropy in bits of each run of `size` codes; what is left at the end does not count."""
    n_runs = len(codes) // size
    return entropies(codes[: n_runs * size], np.full(n_runs, size), n_codes)


def orders(atlas: MadeUpAtlas) -> dict[str, Make]:
    """The orders compared, by the words for the table."""

    def cells(**options: Any) -> Make:
        return lambda **o: CellSampler(atlas.groups, **options, **o)

    return {
        "none": cells(locality="none"),
        "block, 16 x 1,024": cells(locality="block", block_size=16, blocks_per_window=1024),
        "block, 64 x 256 (default)": cells(locality="block"),
        "block, 512 x 32": cells(locality="block", block_size=512, blocks_per_window=32),
        "block, 64 x 16": cells(locality="block", blocks_per_window=16),
        "group, 1 worker": cells(locality="group"),
        "group, 8 workers": cells(locality="group", num_workers=8),
        "stored (shuffle=False)": cells(locality="none", shuffle=False),
        "weighted, balanced labels": lambda **o: WeightedCellSampler.balanced(atlas.labels, **o),
        "balanced batches": lambda **o: BalancedCellSampler(atlas.labels, **o),
        "grouped by label": lambda **o: GroupedCellSampler(atlas.labels, **o),
    }


def measure(make: Make, atlas: MadeUpAtlas, *, batch_size: int, epochs: int, span: int) -> dict[str, float]:
    """Entropies of an order, each divided by the mean entropy of uniform draws of as many cells."""
    sampler = make(batch_size=batch_size, seed=0)
    ratios: dict[str, list[np.ndarray]] = {"label": [], "group": [], "label_span": []}
    planning, seen = 0.0, 0
    uniform = np.random.default_rng(1).permutation(len(atlas.groups))
    for epoch in range(epochs):
        sampler.set_epoch(epoch)
        clock = time.perf_counter()
        batches = list(sampler.batches())
        planning += time.perf_counter() - clock
        seen += len(np.unique(np.concatenate(batches)))
        # Batches of one size only: entropy grows with the number of cells it is taken over.
        size = int(np.median([len(batch) for batch in batches]))
        order = np.concatenate([batch for batch in batches if len(batch) == size])
        for name, codes, n_codes, run in (
            ("label", atlas.labels, atlas.n_labels, size),
            ("group", atlas.groups, atlas.n_groups, size),
            ("label_span", atlas.labels, atlas.n_labels, size * span),
        ):
            if len(order) >= run:
                ratio = _of_runs(codes[order], run, n_codes) / _of_runs(codes[uniform], run, n_codes).mean()
                ratios[name].append(ratio)
    joined = {name: np.concatenate(parts) if parts else np.array([np.nan]) for name, parts in ratios.items()}
    return {
        "label_entropy": float(joined["label"].mean()),
        "label_entropy_p5": float(np.percentile(joined["label"], 5)),
        "group_entropy": float(joined["group"].mean()),
        "label_entropy_span": float(joined["label_span"].mean()),
        "batch_size": float(size),
        "cells_seen": seen / epochs / len(atlas.groups),
        "batches": float(len(batches)),
        "seconds_per_epoch": planning / epochs,
    }


def main(argv: Sequence[str] | None = None) -> int:
    """Measure and print; returns the exit status."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.orders", description=__doc__)
    parser.add_argument("--cells", type=int, default=400_000)
    parser.add_argument("--groups", type=int, default=24)
    parser.add_argument("--labels", type=int, default=30)
    parser.add_argument("--concentration", type=float, default=0.1)
    parser.add_argument("--batch-size", type=int, default=1024)
    parser.add_argument("--span", type=int, default=16, help="consecutive batches taken together")
    parser.add_argument("--epochs", type=int, default=3)
    parser.add_argument("--out", type=Path, default=Path("demo/benchmarks"))
    options = parser.parse_args(argv)
    found = conditions()
    results: dict[str, dict[str, dict[str, float]]] = {}
    for stored, sort in (("labels mixed within a group", False), ("labels sorted within a group", True)):
        atlas = MadeUpAtlas.generate(
            options.cells, options.groups, options.labels, concentration=options.concentration, sort=sort
        )
        results[stored] = {
            name: measure(
                make, atlas, batch_size=options.batch_size, epochs=options.epochs, span=options.span
            )
            for name, make in orders(atlas).items()
        }
        print(f"stored order: {stored}; entropy / entropy of a uniform draw of as many cells")
        print(
            table(
                ("order", "label", "5th pct", f"over {options.span}", "group", "batch", "cells seen"),
                [
                    (
                        name,
                        f"{r['label_entropy']:.2f}",
                        f"{r['label_entropy_p5']:.2f}",
                        "-" if np.isnan(r["label_entropy_span"]) else f"{r['label_entropy_span']:.2f}",
                        f"{r['group_entropy']:.2f}",
                        f"{r['batch_size']:,.0f}",
                        f"{r['cells_seen']:.0%}",
                    )
                    for name, r in results[stored].items()
                ],
            ),
            end="\n\n",
        )
    sizes = np.bincount(atlas.groups)
    print(
        f"{options.cells:,} cells in {options.groups} groups of {sizes.min():,} to {sizes.max():,} "
        f"(log-normal), {options.labels} labels, Dirichlet({options.concentration}) shares per group, "
        f"batch size {options.batch_size:,}, {options.epochs} epochs, seed 0"
    )
    print(describe(found))
    write_json(
        options.out / "orders.json",
        {
            "conditions": found,
            "options": {key: str(value) for key, value in vars(options).items()},
            "results": results,
        },
    )
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
