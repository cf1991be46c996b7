"""`make demo`: from .h5ad files to a trained model, and what it cost. A program, so it prints.

Without files it writes two synthetic datasets first.
"""

from __future__ import annotations

import argparse
import hashlib
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from hbx_gpu import cli
from hbx_gpu.atlas import RaggedAtlas
from hbx_gpu.atlas._query.encoders import is_categorical
from hbx_gpu.dataloader import CellDataset, make_loader, sparse_to_dense_collate
from hbx_gpu.sampler import CellSampler
from hbx_gpu.synthetic import write_demo_pair

if TYPE_CHECKING:
    import torch

# Columns that a user most likely wants to predict, best first.
_LABEL_HINTS = ("cell_type", "celltype", "cell type", "cluster", "leiden", "louvain", "label")
_MAX_CLASSES = 200
# Columns that every atlas has; they name rows, not kinds of cells.
_NO_LABELS = ("uid", "dataset_uid")


def main(argv: Sequence[str] | None = None) -> int:
    """Run the demo; returns the exit status."""
    options = _parse(argv)
    out = Path(options.out)
    out.mkdir(parents=True, exist_ok=True)

    files = [Path(name) for name in options.files] or synthetic_files(out, options.cells, options.genes)
    atlas_path = atlas_for(files, out, own=bool(options.files))
    print(f"\n# hbx-gpu ingest {' '.join(map(str, files))} --atlas {atlas_path}")
    status = cli.main(["ingest", *map(str, files), "--atlas", str(atlas_path)])
    if status:
        return status
    print(f"\n# hbx-gpu info {atlas_path}")
    status = cli.main(["info", str(atlas_path)])
    if status:
        return status

    dataset, label = open_dataset(atlas_path, options.label)
    print(f"\n# training on {dataset}")
    trace = train(dataset, label, epochs=options.epochs, batch_size=options.batch_size, seed=options.seed)
    print(trace.report())
    picture = out / "throughput.png"
    draw(trace, picture)
    print(f"picture: {picture}")
    return 0


def _parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m hbx_gpu.demo", description=__doc__)
    parser.add_argument("files", nargs="*", metavar="H5AD", help="files to ingest; none: synthetic data")
    parser.add_argument("--out", default="demo", help="folder for data, atlas and picture (default: demo)")
    parser.add_argument("--epochs", type=int, default=1)
    parser.add_argument("--batch-size", type=int, default=256)
    parser.add_argument("--label", help="obs column to predict (default: found by its number of categories)")
    parser.add_argument("--cells", type=int, default=20_000, help="cells of the synthetic data")
    parser.add_argument("--genes", type=int, default=2_000, help="genes of each synthetic dataset")
    parser.add_argument("--seed", type=int, default=0)
    return parser.parse_args(argv)


def synthetic_files(out: Path, n_cells: int, n_genes: int) -> list[Path]:
    """Two synthetic datasets under `out`, written unless a run before left them there."""
    from tqdm import tqdm

    folder = out / f"synthetic-{n_cells}x{n_genes}"
    files = [folder / f"synthetic_{name}.h5ad" for name in "ab"]
    if not all(path.exists() for path in files):
        first = n_cells * 3 // 5
        with tqdm(total=n_cells, unit="cell", unit_scale=True, desc="writing synthetic data") as bar:
            write_demo_pair(folder, n_obs=(first, n_cells - first), n_vars=n_genes, progress=bar.update)
    return files


def atlas_for(files: Sequence[Path], out: Path, *, own: bool) -> Path:
    """Where the atlas of exactly these files belongs: a second run finds it, and no other mixes in.

    Parameters
    ----------
    files
        What it will hold.
    out
        The demo's folder.
    own
        True for a user's files: their atlas is named by their paths, sizes and times of change.
    """
    if not own:
        return out / f"atlas{files[0].parent.name.removeprefix('synthetic')}"
    print_of = hashlib.sha256()
    for path in files:
        # A missing file is the ingest's to report.
        stat = path.stat() if path.exists() else None
        print_of.update(f"{path.resolve()}|{stat and (stat.st_size, stat.st_mtime_ns)}\n".encode())
    return out / f"atlas-{files[0].stem}-{print_of.hexdigest()[:8]}"


def open_dataset(atlas_path: Path, label: str | None) -> tuple[CellDataset, str | None]:
    """All cells of the latest snapshot, with the label to predict.

    Parameters
    ----------
    atlas_path
        The atlas.
    label
        An obs column, or None to have one chosen.

    Returns
    -------
    The dataset, and the label in its metadata; None where no column can serve.
    """
    atlas = RaggedAtlas.checkout_latest(str(atlas_path))
    schema = atlas.query().limit(0).to_arrow().schema
    names = [field.name for field in schema if is_categorical(field.type) and field.name not in _NO_LABELS]
    if label is not None and label not in names:
        raise SystemExit(
            f"--label {label}: no obs column of categories has that name; there are: {names or 'none'}"
        )
    candidates = names if label is None else [label]
    dataset = atlas.query().to_cell_dataset("gene_expression", layer="counts", metadata_columns=candidates)
    label = label or choose_label(dataset.categories)
    if candidates != [label]:
        columns = [label] if label else None
        dataset = atlas.query().to_cell_dataset("gene_expression", layer="counts", metadata_columns=columns)
    assert isinstance(dataset, CellDataset)  # gene expression is sparse
    return dataset, label


def choose_label(categories: Mapping[str, Sequence[object] | np.ndarray]) -> str | None:
    """The column to predict: 2 to 200 categories, one that sounds like a cell type first; None without any.

    Parameters
    ----------
    categories
        Vocabulary of each candidate column, in the atlas's order.
    """
    usable = [name for name, values in categories.items() if 2 <= len(values) <= _MAX_CLASSES]
    hinted = [name for hint in _LABEL_HINTS for name in usable if name.lower().startswith(hint)]
    return next(iter(hinted + usable), None)


@dataclass
class Trace:
    """What an epoch cost, batch by batch."""

    task: str
    loss_name: str
    cells: list[int] = field(default_factory=list)
    waited: list[float] = field(default_factory=list)
    trained: list[float] = field(default_factory=list)
    loss: list[float] = field(default_factory=list)
    hits: list[float] = field(default_factory=list)
    largest_class: float = 0.0

    @property
    def seconds(self) -> np.ndarray:
        """float64, (n_batches,). Time of each batch, waiting and training together."""
        result: np.ndarray = np.array(self.waited) + np.array(self.trained)
        return result

    @property
    def rate(self) -> float:
        """Cells per second over everything."""
        result: float = sum(self.cells) / max(self.seconds.sum(), 1e-9)
        return result

    @property
    def steady_rate(self) -> float:
        """Cells per second over the second half of the time; over everything where that has no batch."""
        ends = np.cumsum(self.seconds)
        late = ends > ends[-1] / 2
        if late.all():
            return self.rate
        begin = ends[~late][-1]
        result: float = np.array(self.cells)[late].sum() / max(ends[-1] - begin, 1e-9)
        return result

    @property
    def wait_share(self) -> float:
        """Share of the time that the model waited for data."""
        result: float = sum(self.waited) / max(self.seconds.sum(), 1e-9)
        return result

    def report(self) -> str:
        """What was learned and what it cost, in four lines."""
        last = min(10, len(self.loss))
        lines = [
            f"task: {self.task}",
            f"{self.loss_name}: {self.loss[0]:.3f} in the first batch, "
            f"{np.mean(self.loss[-last:]):.3f} over the last {last}",
        ]
        if self.hits:
            lines.append(
                f"accuracy over the last {last} batches: {np.mean(self.hits[-last:]):.1%} "
                f"(always the largest class: {self.largest_class:.1%})"
            )
        lines.append(
            f"{sum(self.cells):,} cells in {self.seconds.sum():.1f} s, the first batch after "
            f"{self.seconds[0]:.1f} s; {self.steady_rate:,.0f} cells/s in the second half of the time. The "
            f"model waited for data {self.wait_share:.1%} of the time"
        )
        return "\n".join(lines)


def train(dataset: CellDataset, label: str | None, *, epochs: int, batch_size: int, seed: int) -> Trace:
    """Train a small model on every cell, and keep time.

    Parameters
    ----------
    dataset
        Cells to train on, `label` among its metadata columns.
    label
        Column of codes to predict; None trains an autoencoder instead.
    epochs, batch_size, seed
        As usual.
    """
    import torch
    from tqdm import tqdm

    if not len(dataset):
        raise SystemExit("the atlas holds no cells to train on")
    torch.manual_seed(seed)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    model, trace = _model(dataset, label)
    model.to(device)
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
    sampler = CellSampler(dataset.groups_np, batch_size=batch_size, seed=seed, locality="none")
    # Kernels compile at their first call, once per machine; that time is not part of an epoch.
    sparse_to_dense_collate(dataset[: min(8, len(dataset))])
    with (
        make_loader(dataset, sampler, collate_fn=sparse_to_dense_collate, num_workers=0) as loader,
        tqdm(total=epochs * len(dataset), unit="cell", unit_scale=True, desc="training") as bar,
    ):
        for epoch in range(epochs):
            loader.set_epoch(epoch)
            clock = time.perf_counter()
            for batch in loader:
                arrived = time.perf_counter()
                x = batch["X"].to(device)
                loss, hits = _step(model, optimizer, x, None if label is None else batch[label].to(device))
                done = time.perf_counter()
                trace.cells.append(len(x))
                trace.waited.append(arrived - clock)
                trace.trained.append(done - arrived)
                trace.loss.append(loss)
                if hits is not None:
                    trace.hits.append(hits)
                bar.update(len(x))
                bar.set_postfix(loss=f"{loss:.3f}", refresh=False)
                clock = time.perf_counter()
    return trace


def _model(dataset: CellDataset, label: str | None) -> tuple[torch.nn.Module, Trace]:
    from torch import nn

    n = dataset.n_features
    if label is None:
        layers = nn.Sequential(nn.Linear(n, 64), nn.ReLU(), nn.Linear(64, n))
        return layers, Trace(
            "autoencoder of log1p counts (no obs column has 2 to 200 categories)", "squared error"
        )
    codes = dataset.columns[label]
    sizes = np.bincount(codes[codes >= 0])
    layers = nn.Sequential(nn.Linear(n, 128), nn.ReLU(), nn.Linear(128, len(dataset.categories[label])))
    trace = Trace(f"predict {label!r} ({len(dataset.categories[label])} categories)", "cross-entropy")
    trace.largest_class = sizes.max() / max(sizes.sum(), 1)
    return layers, trace


def _step(
    model: torch.nn.Module, optimizer: torch.optim.Optimizer, x: torch.Tensor, label: torch.Tensor | None
) -> tuple[float, float | None]:
    """One optimizer step; loss and, for a classifier, share of right answers."""
    import torch
    from torch.nn import functional

    x = torch.log1p(x * (1e4 / x.sum(dim=1, keepdim=True).clamp(min=1)))
    y = model(x)
    if label is None:
        loss = functional.mse_loss(y, x)
        hits = None
    else:
        # Cells without a label (code -1) train nothing.
        known = (label >= 0).sum().clamp(min=1)
        loss = functional.cross_entropy(y, label, ignore_index=-1, reduction="sum") / known
        hits = float((y.argmax(dim=1) == label).sum() / known)
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    return loss.item(), hits


def draw(trace: Trace, path: Path) -> None:
    """Picture of throughput and loss over the seconds of training, as PNG."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt
    from matplotlib.ticker import FuncFormatter

    ends = np.cumsum(trace.seconds)
    figure, (top, bottom) = plt.subplots(
        2, 1, figsize=(9, 5.6), sharex=True, height_ratios=(2, 1), layout="constrained"
    )
    # Batches arrive in bursts: what is drawn is how many arrive in each of some equal stretches of time.
    edges = np.linspace(0, ends[-1], min(30, len(ends)) + 1)
    width = edges[1]
    rates = np.histogram(ends, edges, weights=trace.cells)[0] / width
    waited = np.minimum(np.histogram(ends, edges, weights=trace.waited)[0] / width, 1)
    blue, red = "#2f6f9f", "#c2571a"
    top.stairs(rates, edges, fill=True, color=blue, alpha=0.25)
    top.stairs(rates, edges, color=blue, linewidth=1.6, label="cells trained on per second")
    half = ends[-1] / 2
    top.hlines(
        trace.steady_rate,
        half,
        ends[-1],
        color=blue,
        linestyle="--",
        label=f"steady speed, of the second half: {trace.steady_rate:,.0f}",
    )
    top.axvline(ends[0], color="#3a3a3a", linestyle=":", label=f"first batch: {ends[0]:.1f} s")
    top.set_ylabel("cells/s")
    top.set_ylim(bottom=0)
    top.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.0f}"))
    share = top.twinx()
    share.stairs(100 * waited, edges, color=red, linewidth=1.2, label="time waiting for data, %")
    share.set_ylim(0, 100)
    share.set_ylabel("waiting, %", color=red)
    share.tick_params(axis="y", colors=red)
    lines = [line for axis in (top, share) for line in axis.get_legend_handles_labels()[0]]
    top.legend(handles=lines, loc="lower center", bbox_to_anchor=(0.5, 1.0), ncols=2, frameon=False)

    bottom.plot(ends, trace.loss, color="#3a3a3a", linewidth=1)
    bottom.set_ylabel(trace.loss_name)
    bottom.set_ylim(bottom=0)
    bottom.set_xlabel("seconds")
    bottom.set_xlim(0, ends[-1])
    for axis in (top, bottom):
        axis.grid(alpha=0.25)
        axis.spines[["top", "right"]].set_visible(False)
    share.spines["top"].set_visible(False)
    figure.suptitle(trace.task)
    figure.savefig(path, dpi=130)
    plt.close(figure)


if __name__ == "__main__":
    sys.exit(main())
