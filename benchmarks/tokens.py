"""Tokens of published models from an atlas, everything included: ``python -m benchmarks.tokens``.

Whole epochs in random order through a loader on one thread: read, decode, tokens, padding and masks; and the
same rows as CSR, which is where tokens begin. Cells per second of processor time, of all threads of the
process together; recipes take turns in one process; the median of the rounds, after one to warm up.

``--reference PACKAGE=INTERPRETER`` runs a published package's own code instead, in an interpreter that has
it, beside our recipe on the same cells, and compares what both make; the status is 1 where that differs.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.common import DataSpec, conditions, prepare
from benchmarks.token_peers import PEERS, compare
from hbx_gpu import SparseBatch
from hbx_gpu._bench.machine import describe
from hbx_gpu._bench.settings import open_dataset
from hbx_gpu._bench.tables import spread, table, write_json
from hbx_gpu.tokens import (
    Recipe,
    cellarium_gpt,
    geneformer_v2,
    nicheformer,
    scgpt,
    state_se,
    tahoe_x1,
    transcriptformer,
    uce,
)


def _special(genes: list[str], **ids: int) -> dict[str, int]:
    return {**{gene: i + 16 for i, gene in enumerate(genes)}, **{f"<{name}>": i for name, i in ids.items()}}


def _medians(genes: list[str]) -> dict[str, float]:
    """Positive numbers spread as published medians are: most between 1 and 7."""
    drawn = np.random.default_rng(0).lognormal(1.0, 0.7, len(genes))
    return dict(zip(genes, drawn.tolist(), strict=True))


def _geneformer(genes: list[str], **options: Any) -> Recipe:
    return geneformer_v2(_special(genes, pad=0, mask=1, cls=2, eos=3), _medians(genes), **options)


def _uce(genes: list[str]) -> Recipe:
    number = {gene: i for i, gene in enumerate(genes)}
    chromosomes = {gene: i % 24 for gene, i in number.items()}
    return uce(number, chromosomes, {gene: i * 7919 % 1_000_003 for gene, i in number.items()})


RECIPES: dict[str, Callable[[list[str]], Recipe]] = {
    "Geneformer V2, 4,096": _geneformer,
    "Geneformer V2, 4,096, hidden 15 %": lambda genes: _geneformer(genes, mlm=0.15),
    "Nicheformer, 4,096": lambda genes: nicheformer(genes, _medians(genes)),
    "scGPT, 1,200, one": lambda genes: scgpt(_special(genes, pad=0, cls=1), side="one", mask=0.4),
    "scGPT, 1,200, both": lambda genes: scgpt(_special(genes, pad=0, cls=1), side="both", mask=0.4),
    "Tahoe-x1, 1,024": lambda genes: tahoe_x1(_special(genes, pad=0, cls=1), mask=0.5),
    "TranscriptFormer, 2,047": lambda genes: transcriptformer(_special(genes, pad=5), pad="<pad>"),
    "UCE, 1,024 draws": _uce,
    "State SE, 2,048": lambda genes: state_se(_special(genes)),
    "CellariumGPT, 1,025": lambda genes: cellarium_gpt(genes, length=1025),
}


def cells_per_second(loader: Any, epoch: int) -> float:
    """Cells per second of processor time in one epoch."""
    loader.set_epoch(epoch)
    n, begin = 0, time.process_time()
    for batch in loader:
        n += len(batch["index"])
    return n / (time.process_time() - begin)


def _references(chosen: Sequence[str], rows: SparseBatch, genes: Sequence[str], out: Path) -> int:
    """Packages beside ours on the same cells; 1 if what they make differs."""
    found = []
    for entry in chosen:
        package, _, interpreter = entry.partition("=")
        if package not in PEERS or not interpreter:
            raise SystemExit(
                f"--reference: expected one of {', '.join(PEERS)} and =INTERPRETER, got {entry!r}"
            )
        found.append(compare(package, interpreter, rows, genes))
    header = ("package", "its cells/s", "ours", "ratio", "what it makes of the cells, nothing sampled")
    print(table(header, [each.line for each in found]))
    nnz = len(rows.indices) / max(len(rows), 1)
    print(
        f"{len(rows)} cells of {len(genes):,} genes, {nnz:,.0f} nonzeros each, in memory; cells per second "
        "of processor time, one thread: the fastest of 3 calls of the package, of 5 of ours"
    )
    machine = conditions()
    print(describe(machine))
    write_json(
        out / "token-references.json", {"conditions": machine, "results": [asdict(each) for each in found]}
    )
    return int(any(each.differs for each in found))


def main(argv: Sequence[str] | None = None) -> int:
    """Measure and print; returns the exit status."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.tokens", description=__doc__)
    parser.add_argument("--cells", type=int, default=8_000)
    parser.add_argument("--genes", type=int, default=20_000)
    parser.add_argument("--density", type=float, default=0.075, help="share of genes that a cell expresses")
    parser.add_argument("--rows", type=int, default=256, help="of a batch")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument(
        "--reference", action="append", default=[], metavar="PACKAGE=INTERPRETER",
        help=f"compare with a package: {', '.join(PEERS)}",
    )  # fmt: skip
    parser.add_argument("--compared", type=int, default=256, help="cells to compare with packages")
    parser.add_argument("--models", nargs="+", choices=list(RECIPES), default=list(RECIPES))
    parser.add_argument("--data", type=Path, default=Path("demo/benchmark-data"))
    parser.add_argument("--out", type=Path, default=Path("demo/benchmarks"))
    options = parser.parse_args(argv)

    from tqdm import tqdm

    from hbx_gpu.dataloader import make_loader
    from hbx_gpu.sampler import CellSampler

    spec = DataSpec(cells=options.cells, genes=options.genes, density=options.density)
    dataset = open_dataset(prepare(options.data, spec).atlas, "gene_expression")
    genes = [str(uid) for uid in dataset.feature_uids]
    if options.reference:
        rows = dataset.__getitems__(np.arange(min(options.compared, len(dataset))))
        return _references(options.reference, rows, genes, options.out)

    def loader(**choices: Any) -> Any:
        order = CellSampler(dataset.groups_np, batch_size=options.rows, seed=0)
        return make_loader(dataset, order, executor="direct", threads=1, **choices)

    loaders = {"CSR, no tokens": loader(layout="csr")}
    for name in options.models:
        loaders[name] = loader(layout="tokens", tokens=RECIPES[name](genes))
    found: dict[str, list[float]] = {name: [] for name in loaders}
    with tqdm(total=(options.rounds + 1) * len(loaders), unit="epoch", desc="tokens") as bar:
        for k in range(options.rounds + 1):
            for name in list(loaders)[:: 1 if k % 2 else -1]:
                figure = cells_per_second(loaders[name], k)
                if k:
                    found[name].append(figure)
                bar.update()
    for one in loaders.values():
        one.close()
    results = {name: spread(values) for name, values in found.items()}
    lines = [
        (name, *(f"{each[part]:,.0f}" for part in ("median", "min", "max"))) for name, each in results.items()
    ]
    machine = conditions()
    print(table(("cells per second of processor time", "median", "least", "most"), lines))
    print(
        f"{spec.describe()}; batches of {options.rows} random rows, padded to the longest, page cache warm, "
        f"one thread, median of {options.rounds} epochs"
    )
    print(describe(machine))
    write_json(options.out / "tokens.json", {"conditions": machine, "results": results})
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
