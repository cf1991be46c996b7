"""The subcommand `hbx-gpu stats`: means, variances, medians and variable features of an atlas or a store."""

from __future__ import annotations

import argparse
import contextlib
from collections.abc import Callable, Iterator
from concurrent.futures import Executor, ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING

from hbx_gpu._advice import from_command
from hbx_gpu._commands.executors import add_threads_or_workers, check_threads, positive, workers
from hbx_gpu._commands.links import FLAGS, add_allow_links
from hbx_gpu._commands.places import add_snapshot, add_storage_options, argument
from hbx_gpu._paths import argument as local_argument
from hbx_gpu._progress import Progress, bar, line

if TYPE_CHECKING:
    import pandas as pd

    from hbx_gpu.statistics import Statistics

_FLAGS = FLAGS | {
    "feature_space": "--field",
    "field_name": "--field",
    "layer": "--layer",
    "obs_table_name": "--table",
    "by": "--by",
}
_SHOWN = 10
_SUFFIXES = (".parquet", ".csv", ".json", ".npz")


def add_parser(
    commands: argparse._SubParsersAction[argparse.ArgumentParser], common: argparse.ArgumentParser
) -> None:
    """Add the subcommand to a parser's."""
    parser = commands.add_parser(
        "stats",
        parents=[common],
        help="compute means, variances, medians and highly variable features",
        description="Read all cells once and report for each feature: cells that measure it, nonzero cells, "
        "sum, mean, variance, and the nonzero median of counts per 10,000. An atlas keeps the result, and "
        "the next call reads it.",
    )
    parser.add_argument(
        "path", type=argument, metavar="PATH", help="an atlas or any store of hbx_gpu.open, or its address"
    )
    parser.add_argument("--by", metavar="COLUMN", help="statistics of each value of an obs column")
    parser.add_argument("--where", metavar="SQL", help="condition on obs columns: \"organ = 'lung'\"")
    parser.add_argument(
        "--hvg", type=positive, metavar="N", help="find the N most variable features (flavor seurat_v3)"
    )
    parser.add_argument(
        "--batch-key", metavar="COLUMN", help="with --hvg: rank features within each value of an obs column"
    )
    parser.add_argument(
        "--out",
        type=_output,
        metavar="FILE",
        help="write the table to a file: .parquet, .csv or .json; .npz is read by Statistics.load",
    )
    parser.add_argument("--field", metavar="NAME", help="feature space, where there are several")
    parser.add_argument("--layer", metavar="NAME", help="layer (default: that of the feature space)")
    parser.add_argument("--table", metavar="NAME", help="obs table of an atlas, where there are several")
    add_snapshot(parser)
    add_threads_or_workers(parser, "read and count")
    add_allow_links(parser)
    add_storage_options(parser)
    parser.set_defaults(command=run, if_interrupted="nothing was written")


def _output(text: str) -> Path:
    path = local_argument(text)
    if path.suffix not in _SUFFIXES:
        raise argparse.ArgumentTypeError(
            f"expected a file name that ends in {', '.join(_SUFFIXES)}, got {text!r}"
        )
    if not path.parent.is_dir():
        raise argparse.ArgumentTypeError(f"there is no folder {path.parent}; make it first")
    return path


def run(args: argparse.Namespace) -> int:
    """Compute, and print a summary or write a table."""
    check_threads(args)
    if args.batch_key is not None and args.hvg is None:
        raise ValueError("--batch-key is for --hvg N; pass both")
    if args.hvg is not None and args.out is not None and args.out.suffix == ".npz":
        raise ValueError("an .npz file holds no choice of features; leave --hvg out, or write a .parquet")
    with from_command(_FLAGS), _executor(args) as executor, bar("cells", "stats") as progress:
        compute = _computation(args, executor, progress)
        found = compute(args.by)
        line(_summary(found))
        variable = None
        if args.hvg is not None:
            basis = found if args.batch_key in (None, args.by) else compute(args.batch_key)
            variable = basis.highly_variable(args.hvg, batch_key=args.batch_key)
            names = ", ".join(map(str, variable.index[:_SHOWN]))
            line(f"{len(variable):,} highly variable features, the first of them: {names}")
    if args.out is not None:
        _write(args.out, found, variable)
        line(f"written to {args.out}")
    return 0


@contextlib.contextmanager
def _executor(args: argparse.Namespace) -> Iterator[Executor | None]:
    """The executor that the options ask for; None for a thread per core."""
    with workers(args) as executor:
        if executor is not None or args.threads is None:
            yield executor
            return
        with ThreadPoolExecutor(args.threads) as threads:
            yield threads


def _computation(
    args: argparse.Namespace, executor: Executor | None, progress: Progress
) -> Callable[[str | None], Statistics]:
    """From a column to the statistics by it."""
    from hbx_gpu._inplace.stores import is_atlas

    if is_atlas(args.path) or args.snapshot is not None or args.table is not None:
        from hbx_gpu.atlas import RaggedAtlas

        atlas = RaggedAtlas.checkout(args.path, args.snapshot, allow_links=args.allow_links)
        query = atlas.query(args.table).where(args.where)

        def of_atlas(by: str | None) -> Statistics:
            return query.statistics(
                by, feature_space=args.field, layer=args.layer, executor=executor, progress=progress
            )

        return of_atlas
    import hbx_gpu
    from hbx_gpu._inplace.cells import Cells

    cells = hbx_gpu.open(args.path, allow_links=args.allow_links)
    assert isinstance(cells, Cells)  # it is not an atlas
    if args.where is not None:
        cells = cells.where(args.where)

    def of_stores(by: str | None) -> Statistics:
        return cells.statistics(
            by, feature_space=args.field, layer=args.layer or "X", executor=executor, progress=progress
        )

    return of_stores


def _summary(found: Statistics) -> str:
    n, expressed = len(found.feature_uids), int((found.nonzero > 0).sum())
    groups = f"{len(found.groups):,} group{'s' * (len(found.groups) != 1)}"
    parts = f" in {groups} by {found.by!r}" if found.by is not None else ""
    medians = "exact" if found.median_error == 0 else f"within {found.median_error:.1%}"
    return (
        f"{found.n_cells:,} cells{parts}, {n:,} features, {expressed:,} of them nonzero in some cell; "
        f"{int(found.nonzero.sum()):,} nonzero values, {len(found.medians):,} medians ({medians})"
    )


def _write(path: Path, found: Statistics, variable: pd.DataFrame | None) -> None:
    """Write a table, as the suffix says."""
    if path.suffix == ".npz":
        found.save(path)
        return
    frame = found.to_pandas()
    if variable is not None:
        columns = [name for name in variable.columns if name not in ("means", "variances")]
        frame = frame.join(variable[columns])
        frame["highly_variable"] = frame["variances_norm"].notna()
    frame = frame.reset_index()
    if path.suffix == ".parquet":
        frame.to_parquet(path, index=False)
    elif path.suffix == ".csv":
        frame.to_csv(path, index=False)
    else:
        frame.to_json(path, orient="records", double_precision=15)
