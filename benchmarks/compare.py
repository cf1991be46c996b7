"""This loader and its peers on the same data in one run: ``python -m benchmarks.compare``.

Every peer converts the source in its own way and runs in its own interpreter (``--python NAME=PATH``). A peer
that does not import, convert or run is skipped with its reason; one that delivers wrong rows is reported.
``docs/benchmarks.md`` says how and why.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks import mixing
from benchmarks.common import conditions
from benchmarks.datasets import SPECS, Data, blocks, copied, write
from benchmarks.peers import annbatch, annloader, homeobox, in_place, memory, ours, scdataset, scdl, slaf
from benchmarks.peers.protocol import Peer, Variant, bytes_below
from hbx_gpu._bench.tables import spread, write_json

LAYOUTS = ("csr", "dense")
PEERS: dict[str, Peer] = {
    module.PEER.name: module.PEER
    for module in (ours, homeobox, annbatch, in_place, scdl, scdataset, slaf, annloader, memory)
}
_ROOT = Path(__file__).resolve().parents[1]
# Seconds that a conversion, or one process of measurements, may take before its peer is given up.
_TIMEOUT = {"probe": 120, "prepare": 1_800, "verify": 300, "measure": 600}
# Seconds of an epoch whose rows are all checked; slower peers are checked on what they delivered until then.
_VERIFY_SECONDS = 10.0


class PeerFailure(Exception):
    """A peer's program did not do what it was asked; the message is its last words."""


@dataclass(frozen=True)
class Contender:
    """One variant of one peer."""

    peer: Peer
    key: str

    @property
    def name(self) -> str:
        """What ``--only`` and the JSON call it."""
        return f"{self.peer.name}:{self.key}"

    @property
    def variant(self) -> Variant:
        """Its label and settings."""
        return self.peer.variants[self.key]


def ask(options: argparse.Namespace, peer: Peer, *arguments: object) -> list[dict[str, Any]]:
    """Run a peer's program in its interpreter; the JSON lines it prints.

    Raises
    ------
    PeerFailure
        It failed, or took too long.
    """
    python = options.python.get(peer.name, sys.executable)
    command = [python, "-m", f"benchmarks.peers.{peer.name}", *map(str, arguments)]
    limit = _TIMEOUT[str(arguments[0])]
    try:
        done = subprocess.run(
            command, cwd=_ROOT, capture_output=True, text=True, timeout=limit, check=False, errors="replace"
        )
    except OSError as error:
        raise PeerFailure(f"{python}: {error.strerror}") from None
    except subprocess.TimeoutExpired:
        raise PeerFailure(f"{arguments[0]} took longer than {limit} s") from None
    if done.returncode:
        said = (done.stderr or done.stdout).strip().splitlines()
        raise PeerFailure(said[-1] if said else f"{arguments[0]} ended with status {done.returncode}")
    return [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]


def generate(options: argparse.Namespace) -> tuple[Data, str]:
    """The source of the run, written unless a run before left it there, and a line that describes it."""
    from tqdm import tqdm

    if options.data in SPECS:
        model = SPECS[options.data]()
        genes = [f"gene_{k}" for k in range(model.n_genes)]
        rows: Iterator[Any] = blocks(model, options.cells, options.seed)
        name, what, total = f"{options.data}-{options.cells}-{options.seed}", model.describe(), options.cells
    else:
        genes, rows = copied(Path(options.data), options.cells_given)
        name, what, total = (
            f"{Path(options.data).stem}-{options.cells_given or 'all'}",
            str(options.data),
            None,
        )
    folder = options.work / name
    facts = folder / "source.json"
    if not facts.exists():
        with tqdm(total=total, unit="cell", desc="generating" if total else "copying") as bar:
            data = write(folder, genes, rows, bar.update)
        write_json(facts, {"n_cells": data.n_cells, "n_genes": data.n_genes, "nnz": data.nnz})
    found = json.loads(facts.read_text())
    data = Data(folder / "source.h5ad", folder / "truth.npy", **found)
    share = data.nnz / (data.n_cells * data.n_genes)
    return (
        data,
        f"{what}; {data.n_cells:,} cells, {data.nnz / data.n_cells:,.0f} nonzeros per cell ({share:.1%})",
    )


def prepare(options: argparse.Namespace, peer: Peer, data: Data) -> dict[str, Any]:
    """Probe and convert; what is known of the peer. A conversion with the same packages and options is kept.

    Raises
    ------
    PeerFailure
        It does not import, or cannot convert the source.
    """
    (found,) = ask(options, peer, "probe")
    chosen = {"groups": str(options.groups), "codec": options.codec or "", "gene_orders": options.gene_orders}
    work = work_folder(options, peer, data)
    record = work.with_suffix(".json")
    asked = {"versions": found["versions"], "options": chosen}
    if record.exists() and not options.fresh:
        kept = json.loads(record.read_text())
        if {key: kept[key] for key in asked} == asked:
            return {**kept, **found}
    record.unlink(missing_ok=True)
    if work.exists():
        import shutil

        shutil.rmtree(work)
    settings = [part for key, value in chosen.items() for part in ("--option", f"{key}={value}")]
    (made,) = ask(options, peer, "prepare", "--source", data.h5ad, "--work", work, *settings)
    write_json(record, {**made, **asked})
    return {**made, **found}


def work_folder(options: argparse.Namespace, peer: Peer, data: Data) -> Path:
    """Folder of a peer's conversion; peers that are made of datasets have one per order of genes."""
    mixed = peer.of_datasets and options.gene_orders == "mixed"
    return data.h5ad.parent / (f"{peer.name}-mixed" if mixed else peer.name)


def _opening(
    options: argparse.Namespace, contender: Contender, data: Data, layouts: Sequence[str]
) -> list[object]:
    return ["--source", data.h5ad, "--work", work_folder(options, contender.peer, data),
            "--variant", contender.key, "--layout", *layouts, "--seed", options.seed]  # fmt: skip


def check(options: argparse.Namespace, contender: Contender, data: Data) -> dict[str, Any]:
    """Hold an epoch's rows against the source, and measure how they are mixed."""
    if contender.variant.order == "floor":
        return {}
    truth = np.load(data.truth)
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "delivered.npz"
        batch = min(options.mixing_batch, data.n_cells)
        (answer,) = ask(options, contender.peer, "verify", *_opening(options, contender, data, ["csr"]),
                        "--batch-size", batch, "--seconds", _VERIFY_SECONDS, "--out", out)  # fmt: skip
        with np.load(out) as delivered:
            found, sizes = delivered["found"], delivered["sizes"]
    rows = mixing.rows_of(found, truth)
    wrong, missing = differences(found, truth)
    result: dict[str, Any] = {"checked": len(found), "of": len(truth), "wrong": wrong}
    if answer["complete"]:
        result["missing"] = missing
    if not (rows < 0).any():
        result["mixing"] = mixing.quality(rows, sizes, len(truth))
    return result


def differences(found: np.ndarray, truth: np.ndarray) -> tuple[int, int]:
    """Rows delivered that the source has not, or not that often; rows of the source not delivered."""
    values, which = np.unique(np.concatenate((found, truth)), return_inverse=True)
    surplus = np.bincount(which[: len(found)], minlength=len(values))
    surplus -= np.bincount(which[len(found) :], minlength=len(values))
    return int(surplus[surplus > 0].sum()), int(-surplus[surplus < 0].sum())


def measure(
    options: argparse.Namespace, contenders: Sequence[Contender], data: Data, failures: dict[str, str]
) -> list[dict[str, Any]]:
    """All settings `repeat` times, one repeat of all after the other; medians and ranges."""
    from tqdm import tqdm

    runs: dict[tuple[str, str, int], list[dict[str, Any]]] = {}
    # CSR first: what a process has peaked at stays its peak.
    layouts = [layout for layout in LAYOUTS if layout in options.layouts]
    with tqdm(total=options.repeat * len(contenders), unit="run", desc="measuring") as bar:
        for number in range(options.repeat):
            # Each repeat starts elsewhere: nobody always runs in the wake of the same neighbor.
            shift = number * len(contenders) // options.repeat
            for contender in [*contenders[shift:], *contenders[:shift]]:
                bar.set_postfix_str(contender.name)
                if contender.name not in failures:
                    try:
                        answers = ask(options, contender.peer, "measure",
                                      *_opening(options, contender, data, layouts),
                                      "--batch-size", *options.batch_sizes, "--seconds", options.seconds,
                                      "--truth", data.truth)  # fmt: skip
                    except PeerFailure as failure:
                        failures[contender.name] = f"measuring: {failure}"
                        bar.write(f"{contender.variant.label}: {failures[contender.name]}")
                        answers = []
                    for answer in answers:
                        key = contender.name, answer["layout"], answer["batch"]
                        runs.setdefault(key, []).append(answer)
                bar.update()
    return [_summary(*key, found) for key, found in runs.items()]


def _summary(contender: str, layout: str, batch: int, found: Sequence[dict[str, Any]]) -> dict[str, Any]:
    keys = (
        "cells_per_s",
        "cells_per_cpu_s",
        "first_batch_s",
        "first_batches_s",
        "first_batches",
        "peak_rss",
        "import_rss",
    )
    measured = [key for key in keys if key in found[0]]
    return {
        "contender": contender,
        "layout": layout,
        "batch": batch,
        **{key: spread([run[key] for run in found]) for key in measured},
        "steady": all(run["steady"] for run in found),
        "wrong_rows": sum(run.get("wrong_rows", 0) for run in found),
        "checked_rows": sum(run.get("checked_rows", 0) for run in found),
        "runs": list(found),
    }


def _size(
    options: argparse.Namespace, contender: Contender, data: Data, stores: dict[str, dict[str, Any]]
) -> int:
    """Bytes on disk of what a contender reads."""
    if not contender.variant.data:
        return int(stores[contender.peer.name]["bytes"])
    return bytes_below(work_folder(options, contender.peer, data) / contender.variant.data)


def _load(folder: Path) -> None:
    """Bring all files below `folder` into the page cache."""
    for file in folder.rglob("*"):
        if file.is_file():
            with file.open("rb") as stream:
                while stream.read(1 << 24):
                    pass


def chosen(only: Sequence[str]) -> list[Contender]:
    """Contenders named by peer or peer:variant; all when none is named.

    Raises
    ------
    SystemExit
        A name stands for nothing.
    """
    every = [Contender(peer, key) for peer in PEERS.values() for key in peer.variants]
    names = {contender.name for contender in every} | set(PEERS)
    for name in only:
        if name not in names:
            raise SystemExit(f"--only {name}: no such loader; there are {', '.join(sorted(names))}")
    return [c for c in every if not only or c.name in only or c.peer.name in only]


def main(argv: Sequence[str] | None = None) -> int:
    """Prepare, check, measure, report; returns the exit status (1 where a loader delivered wrong rows)."""
    from benchmarks.compare_report import draw, report

    options = _parse(argv)
    contenders = chosen(options.only)
    data, described = generate(options)
    stores: dict[str, dict[str, Any]] = {}
    failures: dict[str, str] = {}
    for peer in {contender.peer.name: contender.peer for contender in contenders}.values():
        try:
            stores[peer.name] = prepare(options, peer, data)
            print(f"{peer.name}: {stores[peer.name]['bytes'] / data.nnz:.2f} bytes per nonzero, converted in "
                  f"{stores[peer.name]['prepare_s']:.1f} s")  # fmt: skip
        except PeerFailure as failure:
            failures[peer.name] = str(failure)
            print(f"{peer.name}: skipped ({failure})")
    contenders = [contender for contender in contenders if contender.peer.name in stores]
    _load(data.h5ad.parent)
    checks: dict[str, dict[str, Any]] = {}
    for contender in contenders:
        try:
            checks[contender.name] = check(options, contender, data)
        except PeerFailure as failure:
            failures[contender.name] = f"checking: {failure}"
            print(f"{contender.variant.label}: {failures[contender.name]}")
    results = measure(options, [c for c in contenders if c.name in checks], data, failures)
    content = {
        "conditions": conditions(),
        "data": {
            "described": described,
            **asdict(data),
            "seed": options.seed,
            "groups": options.groups,
            "gene_orders": options.gene_orders,
        },
        "cache": "warm",
        "seconds": options.seconds,
        "repeat": options.repeat,
        "mixing": {"batch": options.mixing_batch, "labels": mixing.LABELS},
        "codec": options.codec,
        "stores": stores,
        "sizes": {c.name: _size(options, c, data, stores) for c in contenders},
        "contenders": {c.name: asdict(c.variant) for c in contenders},
        "checks": checks,
        "skipped": failures,
        "results": results,
    }
    write_json(options.out / "compare.json", json.loads(json.dumps(content, default=str)))
    text = report(content)
    print(text)
    (options.out / "compare.txt").write_text(text + "\n")
    if results:
        draw(content, options.out / "compare.png")
    print(f"written: {options.out}/compare.json, compare.txt{', compare.png' if results else ''}")
    wrong = [c for c, found in checks.items() if found.get("wrong")]
    wrong += [r["contender"] for r in results if r["wrong_rows"]]
    return 1 if wrong else 0


def _interpreter(text: str) -> tuple[str, str]:
    name, _, path = text.partition("=")
    if name not in PEERS or not path:
        raise argparse.ArgumentTypeError(f"{text!r} is not NAME=PATH with a name of {', '.join(PEERS)}")
    return name, path


def _parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.compare",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--data", default="A", help="A, B (docs/benchmarks.md) or an .h5ad file (default A)")
    parser.add_argument(
        "--cells", type=int, help="cells to generate or take (default 20,000, or the whole file)"
    )
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--groups", type=int, default=8, help="datasets in the atlases (ours and Homeobox's)")
    parser.add_argument("--gene-orders", choices=("mixed", "one"), default="mixed",
                        help="whether their genes come in different orders (default) or in one")  # fmt: skip
    parser.add_argument("--codec", help="codec of our atlas (default: the ingest's own)")
    parser.add_argument("--only", nargs="+", default=[], metavar="NAME",
                        help=f"of {', '.join(PEERS)}, or NAME:VARIANT")  # fmt: skip
    parser.add_argument("--python", type=_interpreter, action="append", default=[], metavar="NAME=PATH",
                        help="interpreter of a peer (default: this one); repeatable")  # fmt: skip
    parser.add_argument("--batch-sizes", type=int, nargs="+", default=[64, 512, 4_096])
    parser.add_argument("--layouts", nargs="+", choices=LAYOUTS, default=list(LAYOUTS))
    parser.add_argument("--repeat", type=int, default=3)
    parser.add_argument("--seconds", type=float, default=0.5, help="length of a window of measuring")
    parser.add_argument(
        "--mixing-batch", type=int, default=512, help="batch size at which mixing is measured"
    )
    parser.add_argument("--work", type=Path, default=Path("demo/compare-data"), help="data and conversions")
    parser.add_argument("--out", type=Path, default=Path("demo/compare"), help="where results go")
    parser.add_argument("--fresh", action="store_true", help="convert again")
    options = parser.parse_args(argv)
    options.python = dict(options.python)
    options.cells_given = options.cells
    options.cells = options.cells or 20_000
    options.work = options.work.resolve()
    if options.data not in SPECS and not Path(options.data).is_file():
        parser.error(f"--data {options.data}: neither {' nor '.join(SPECS)} nor a file")
    return options


if __name__ == "__main__":
    raise SystemExit(main())
