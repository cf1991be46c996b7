"""How a loader is measured: the commands every peer program answers, and the checks of what it delivers.

``python -m benchmarks.peers.NAME probe | prepare | measure | verify`` prints JSON. Needs Python 3.10 and
NumPy; a peer imports its own packages inside its functions.
"""

from __future__ import annotations

import argparse
import contextlib
import itertools
import json
import os
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from importlib import metadata
from pathlib import Path
from typing import Any, Union

import numpy as np

from benchmarks.jobs import peak_rss

# Rows of a timed batch that are compared with the truth after the clock has stopped.
_CHECKED_ROWS = 256
# A measurement whose loader buffers a lot may need longer than it was given, but not longer than this factor.
_PATIENCE = 12.0
# The first batches of a process are timed apart: what somebody waits who starts a run.
_FIRST = 100
# A rate counts as steady when a window of measuring is within this share of the one before; windows at most.
_STEADY, _WINDOWS = 0.1, 10


@dataclass(frozen=True)
class Csr:
    """Delivered rows: row i is ``indices[indptr[i]:indptr[i + 1]]``, indptr may start above 0."""

    indptr: np.ndarray
    indices: np.ndarray
    values: np.ndarray

    def __len__(self) -> int:
        return len(self.indptr) - 1


# Rows as a loader delivers them; dense ones are (rows, genes).
Rows = Union[Csr, np.ndarray]  # noqa: UP007  (evaluated by Python 3.10)


@dataclass(frozen=True)
class Variant:
    """One way to run a peer.

    Attributes
    ----------
    label
        Name in tables.
    order
        ``random``: every cell is drawn uniformly; ``stream``: blocks of cells stay together to some degree;
        ``floor``: no loader, the cost of memory.
    settings
        What was chosen and who recommends it, one sentence.
    data
        What it reads, as a path from the peer's folder, where variants read different stores. Its size is
        reported then.
    """

    label: str
    order: str
    settings: str
    data: str = ""


@dataclass(frozen=True)
class Task:
    """What a peer is asked to open."""

    work: Path
    variant: str
    batch: int
    layout: str
    seed: int = 0


@dataclass(frozen=True)
class Loader:
    """An opened peer.

    Attributes
    ----------
    n_cells
        Cells of an epoch.
    epoch
        Maps the number of an epoch to its batches.
    window
        Cells it reads in one go, before it delivers the first of them: measuring stops on their border.
    lingers
        An epoch that is abandoned keeps threads busy or leaves rows behind: warm up with a whole one.
    checks
        False where what is delivered is not rows (floors).
    columns
        Gene ids of its columns, where it keeps another order than the source.
    close
        Stops what would go on in the background.
    """

    n_cells: int
    epoch: Callable[[int], Iterator[Rows]]
    window: int = 1
    lingers: bool = False
    checks: bool = True
    columns: Callable[[], Sequence[str]] | None = None
    close: Callable[[], None] = lambda: None


@dataclass(frozen=True)
class Peer:
    """A loader of the comparison.

    Attributes
    ----------
    name
        What ``--python NAME=...`` and ``--only`` call it.
    packages
        Distributions whose versions are reported; the first is what gets imported.
    imports
        Modules that must import for the peer to run.
    prepare
        Converts a source .h5ad into the folder given; returns the bytes a user would keep on disk.
    open
        Opens what `prepare` left.
    variants
        By key.
    of_datasets
        Whether `prepare` makes its data of several datasets, which may have their genes in different orders.
    """

    name: str
    packages: tuple[str, ...]
    imports: tuple[str, ...]
    prepare: Callable[[Path, Path, Mapping[str, str]], int]
    open: Callable[[Task], Loader]
    variants: Mapping[str, Variant] = field(default_factory=dict)
    of_datasets: bool = False


# --- what prepare functions share --------------------------------------------------------------------


@dataclass(frozen=True)
class Source:
    """A plain CSR .h5ad, read in slices."""

    path: Path

    def shape(self) -> tuple[int, int]:
        """Cells, genes."""
        import h5py

        with h5py.File(self.path) as file:
            n_cells, n_genes = (int(n) for n in file["X"].attrs["shape"])
        return n_cells, n_genes

    def rows(self, first: int, last: int) -> Any:
        """scipy CSR matrix of the cells [first, last), float32."""
        import h5py
        from scipy import sparse

        with h5py.File(self.path) as file:
            x = file["X"]
            indptr = x["indptr"][first : last + 1].astype(np.int64)
            low, high = int(indptr[0]), int(indptr[-1])
            parts = x["data"][low:high], x["indices"][low:high], indptr - low
        return sparse.csr_matrix(parts, shape=(last - first, self.shape()[1]), dtype=np.float32)

    def genes(self) -> list[str]:
        """Gene ids."""
        import h5py

        with h5py.File(self.path) as file:
            index = file["var"][file["var"].attrs["_index"]]
            # anndata writes an index of pandas 3 as a group: values, and a mask of which none is set.
            values = index["values"] if isinstance(index, h5py.Group) else index
            return [name.decode() for name in values[:]]

    def groups(self, count: int) -> list[tuple[int, int]]:
        """Borders of `count` datasets of about equal size."""
        edges = np.linspace(0, self.shape()[0], count + 1).astype(int).tolist()
        return list(itertools.pairwise(edges))

    def datasets(self, options: Mapping[str, str]) -> Iterator[tuple[int, Any, list[str]]]:
        """What an atlas is made of: of each dataset its first cell, its rows, and the genes of its columns.

        ``groups`` of `options` is their number. With ``gene_orders`` "mixed" every dataset after the first
        has its genes in another order, as datasets of different laboratories have.
        """
        genes = self.genes()
        for number, (first, last) in enumerate(self.groups(int(options.get("groups", 1)))):
            rows, names = self.rows(first, last), genes
            if number and options.get("gene_orders", "one") == "mixed":
                order = np.random.default_rng([7, number]).permutation(len(genes))
                rows, names = rows[:, order].tocsr(), [genes[k] for k in order]
                rows.sort_indices()
            yield first, rows, names


def bytes_below(path: Path) -> int:
    """Bytes of a file, or of all files below a folder."""
    files = path.rglob("*") if path.is_dir() else [path]
    return sum(file.stat().st_size for file in files if file.is_file())


def shuffled_batches(n_cells: int, batch: int, seed: int, epoch: int) -> Iterator[np.ndarray]:
    """Row numbers of a uniformly shuffled epoch, for peers that leave the order to the caller."""
    order = np.random.default_rng([seed, epoch]).permutation(n_cells)
    for first in range(0, n_cells, batch):
        yield order[first : first + batch]


# --- what was delivered ------------------------------------------------------------------------------


def gene_weights(n_genes: int) -> np.ndarray:
    """uint64 (n_genes,): well mixed odd numbers (SplitMix64 of the column)."""
    z = (np.arange(n_genes, dtype=np.uint64) + np.uint64(1)) * np.uint64(0x9E3779B97F4A7C15)
    z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return (z ^ (z >> np.uint64(31))) | np.uint64(1)


def fingerprints(rows: Rows, weights: np.ndarray) -> np.ndarray:
    """uint64 (rows,): one number per row that its nonzeros alone decide, whatever their order or layout.

    The sum, modulo 2**64, of weight[column] * (bits of the value as float32). Two different rows collide with
    a probability near 2**-64; stored zeros count as absent.
    """
    if isinstance(rows, np.ndarray):
        found = [(np.flatnonzero(row), row) for row in rows]
        indptr = np.concatenate(([0], np.cumsum([len(columns) for columns, _ in found], dtype=np.int64)))
        indices = np.concatenate([columns for columns, _ in found])
        values = np.concatenate([row[columns] for columns, row in found])
    else:
        start, end = int(rows.indptr[0]), int(rows.indptr[-1])
        indptr = np.asarray(rows.indptr).astype(np.int64) - start
        indices, values = np.asarray(rows.indices)[start:end], np.asarray(rows.values)[start:end]
    bits = np.ascontiguousarray(values, dtype=np.float32).view(np.uint32).astype(np.uint64)
    sums = np.zeros(len(indices) + 1, np.uint64)
    np.cumsum(weights[indices] * bits, out=sums[1:])
    return sums[indptr[1:]] - sums[indptr[:-1]]


def column_weights(loader: Loader, genes: Sequence[str]) -> np.ndarray:
    """:func:`gene_weights` of the source's genes, in the order of the loader's columns."""
    weights = gene_weights(len(genes))
    if loader.columns is None:
        return weights
    place = {name: k for k, name in enumerate(genes)}
    return weights[[place[name] for name in loader.columns()]]


def unknown_rows(found: np.ndarray, truth: np.ndarray) -> int:
    """How many delivered rows are not rows of the source."""
    return int((~np.isin(found, truth)).sum())


# --- measuring ---------------------------------------------------------------------------------------


def measure(
    open_loader: Callable[[Task], Loader],
    task: Task,
    seconds: float,
    source: Source,
    truth: np.ndarray,
    *,
    warm: bool = False,
    move: Mover | None = None,
) -> dict[str, Any]:
    """Time one setting: its first batches, then windows of measuring until two agree.

    The clock of a window runs from the start of an epoch, so nothing that was read ahead is free. It stops
    at the first border of what the loader reads in one go after `seconds`, or at the end of an epoch.
    ``cells_per_s`` is the mean of the last two windows, ``steady`` whether they are within 10 % of each
    other, ``windows`` holds all. ``cells_per_cpu_s`` divides the same cells by the processor time of all
    threads of this process, which other programs on the machine disturb less; it leaves out worker
    processes. `warm` tells that this process has measured before: loaders that warm up
    with a whole epoch need no other. `move` takes every batch to a device, within the time measured.
    """
    clock = time.perf_counter()
    loader = open_loader(task)
    result: dict[str, Any] = {"layout": task.layout, "batch": task.batch}
    number = 0
    if not (warm and loader.lingers):
        number = _warm_up(loader, result, clock, _PATIENCE * seconds)
    rates: list[float] = []
    per_cpu: list[float] = []
    steady = False
    while not steady and len(rates) < _WINDOWS:
        before = time.process_time()
        cells, elapsed, number, last = _window(loader, number, seconds, move)
        per_cpu.append(cells / max(time.process_time() - before, 1e-9))
        rates.append(cells / elapsed)
        steady = len(rates) > 1 and abs(rates[-1] - rates[-2]) <= _STEADY * max(rates[-2:])
    rate = sum(rates[-2:]) / len(rates[-2:])
    result.update(cells_per_s=rate, steady=steady, windows=rates, peak_rss=peak_rss())
    result["cells_per_cpu_s"] = sum(per_cpu[-2:]) / len(per_cpu[-2:])
    loader.close()
    if loader.checks:
        found = fingerprints(_head(last, _CHECKED_ROWS), column_weights(loader, source.genes()))
        result["checked_rows"] = len(found)
        result["wrong_rows"] = unknown_rows(found, truth)
        result["checksum"] = f"{int(found.sum(dtype=np.uint64)):016x}"
    return result


class Mover:
    """Takes delivered rows to a device, as their user would.

    Raises
    ------
    SystemExit
        The interpreter has no torch, or torch no such device.
    """

    def __init__(self, device: str) -> None:
        try:
            import torch

            torch.empty(1, device=device)
        except (ImportError, AssertionError, RuntimeError) as error:
            raise SystemExit(f"nothing moves to {device} here: {error}") from None
        self._torch, self._device = torch, device

    def move(self, rows: Rows) -> None:
        """Order the copy; the arrays lie in pageable memory, as the loader made them."""
        arrays = (rows,) if isinstance(rows, np.ndarray) else (rows.indptr, rows.indices, rows.values)
        for array in arrays:
            self._torch.from_numpy(np.ascontiguousarray(array)).to(self._device)

    def finish(self) -> None:
        """Wait for what was ordered."""
        if self._device.startswith("cuda"):
            self._torch.cuda.synchronize(self._device)


def _window(loader: Loader, number: int, seconds: float, move: Mover | None) -> tuple[int, float, int, Rows]:
    """One window of measuring from epoch `number` on: cells, seconds, the next epoch, the last batch."""
    cells, done, elapsed = 0, False, 0.0
    last: Rows = np.empty((0, 0))
    clock = time.perf_counter()
    while not done:
        in_epoch = 0
        epoch = loader.epoch(number)
        for last in epoch:
            cells += len(last)
            in_epoch += len(last)
            if move is not None:
                move.move(last)
            elapsed = time.perf_counter() - clock
            if elapsed >= seconds and (in_epoch % loader.window == 0 or elapsed >= _PATIENCE * seconds):
                done = True
                break
        if move is not None:
            move.finish()
        elapsed = time.perf_counter() - clock
        done = done or elapsed >= seconds
        number += 1
    _close(epoch)
    return cells, elapsed, number, last


def _warm_up(loader: Loader, result: dict[str, Any], clock: float, limit: float) -> int:
    """The first 100 batches, or what the loader delivers in `limit` seconds; returns the next epoch.

    Notes the time since `clock`, which is that of opening, to the first batch and to the last of them, and
    their number. A loader that cannot stop ends its epoch.
    """
    delivered, number = 0, 0
    while delivered < _FIRST and (not delivered or time.perf_counter() - clock < limit):
        epoch = loader.epoch(number)
        number += 1
        for _ in epoch:
            delivered += 1
            since = time.perf_counter() - clock
            if delivered == 1:
                result["first_batch_s"] = since
            if delivered <= _FIRST:
                result["first_batches_s"], result["first_batches"] = since, delivered
            if not loader.lingers and (delivered >= _FIRST or since >= limit):
                break
        _close(epoch)
    return number


def verify(loader: Loader, limit: float, genes: Sequence[str]) -> tuple[np.ndarray, np.ndarray, bool]:
    """Fingerprints of an epoch's rows in the order delivered, sizes of its batches, and whether it ended.

    Stops after `limit` seconds where an epoch takes longer.
    """
    found, sizes, complete = [], [], True
    weights = column_weights(loader, genes)
    clock = time.perf_counter()
    epoch = loader.epoch(1)
    for rows in epoch:
        found.append(fingerprints(rows, weights))
        sizes.append(len(rows))
        if time.perf_counter() - clock >= limit:
            complete = sum(sizes) == loader.n_cells
            break
    _close(epoch)
    if not sizes:
        raise SystemExit("it delivered no batch")
    return np.concatenate(found), np.array(sizes), complete


def _close(epoch: Iterator[Rows]) -> None:
    if hasattr(epoch, "close"):
        epoch.close()


def _head(rows: Rows, count: int) -> Rows:
    if isinstance(rows, np.ndarray):
        return rows[:count]
    return Csr(rows.indptr[: count + 1], rows.indices, rows.values)


# --- commands ----------------------------------------------------------------------------------------


def main(peer: Peer, argv: Sequence[str] | None = None) -> None:
    """Answer one command; the last line on stdout is its JSON."""
    options = _parse(peer, argv)
    # Peers chat on stdout; the answer must stand alone there.
    with contextlib.redirect_stdout(sys.stderr):
        answers = {"probe": _probe, "prepare": _prepare, "measure": _measure, "verify": _verify}[
            options.command
        ](peer, options)
    for answer in answers:
        print(json.dumps(answer))
    sys.stdout.flush()
    # Daemon threads of peers may not outlive the answer, nor turn a good one into a crash on the way out.
    sys.stderr.flush()
    os._exit(0)


def _probe(peer: Peer, options: argparse.Namespace) -> list[dict[str, Any]]:  # noqa: ARG001
    import importlib

    clock = time.perf_counter()
    for module in peer.imports:
        importlib.import_module(module)
    taken = time.perf_counter() - clock
    versions = {}
    for name in peer.packages:
        with contextlib.suppress(metadata.PackageNotFoundError):
            versions[name] = metadata.version(name)
    python = ".".join(map(str, sys.version_info[:3]))
    return [{"python": python, "versions": versions, "import_s": taken}]


def _prepare(peer: Peer, options: argparse.Namespace) -> list[dict[str, Any]]:
    clock = time.perf_counter()
    options.work.mkdir(parents=True, exist_ok=True)
    size = peer.prepare(options.source, options.work, dict(o.split("=", 1) for o in options.option))
    return [{"bytes": size, "prepare_s": time.perf_counter() - clock}]


def _tasks(options: argparse.Namespace) -> list[Task]:
    return [
        Task(options.work, options.variant, batch, layout, options.seed)
        for layout in options.layout
        for batch in sorted(options.batch_size)
    ]


def _measure(peer: Peer, options: argparse.Namespace) -> list[dict[str, Any]]:
    import importlib

    for module in peer.imports:
        importlib.import_module(module)
    imported = peak_rss()
    source, truth = Source(options.source), np.load(options.truth)
    move = Mover(options.to) if options.to else None
    return [
        {
            **measure(peer.open, task, options.seconds, source, truth, warm=number > 0, move=move),
            "import_rss": imported,
        }
        for number, task in enumerate(_tasks(options))
    ]


def _verify(peer: Peer, options: argparse.Namespace) -> list[dict[str, Any]]:
    (task,) = _tasks(options)
    found, sizes, complete = verify(peer.open(task), options.seconds, Source(options.source).genes())
    np.savez(options.out, found=found, sizes=sizes)
    return [{"rows": len(found), "complete": complete}]


def _parse(peer: Peer, argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog=f"python -m benchmarks.peers.{peer.name}")
    commands = parser.add_subparsers(dest="command", required=True)
    commands.add_parser("probe", help="versions, or a traceback where the peer does not import")
    prepare = commands.add_parser("prepare", help="convert the source; not timed")
    prepare.add_argument("--option", action="append", default=[], metavar="KEY=VALUE")
    measuring = commands.add_parser("measure", help="cells per second, one JSON line per batch size")
    measuring.add_argument(
        "--truth", type=Path, required=True, help="fingerprints of the source's rows (.npy)"
    )
    measuring.add_argument("--to", metavar="DEVICE", help="move every batch there: cuda, cuda:N, cpu")
    checking = commands.add_parser("verify", help="fingerprints of one epoch, into --out")
    checking.add_argument("--out", type=Path, required=True)
    for command in (prepare, measuring, checking):
        command.add_argument("--source", type=Path, required=True, help="uncompressed CSR .h5ad")
        command.add_argument("--work", type=Path, required=True, help="folder of the peer's own data")
    for command in (measuring, checking):
        command.add_argument("--variant", choices=sorted(peer.variants), required=True)
        command.add_argument("--batch-size", type=int, nargs="+", required=True)
        command.add_argument("--layout", choices=("csr", "dense"), nargs="+", required=True)
        command.add_argument("--seconds", type=float, required=True)
        command.add_argument("--seed", type=int, default=0)
    return parser.parse_args(argv)
