"""The command `hbx-gpu`: fill an atlas, rewrite its arrays, say what it holds and how fast it loads."""

from __future__ import annotations

import argparse
import logging
import os
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from hbx_gpu import __version__
from hbx_gpu.bench import command as bench
from hbx_gpu.scdl import convert_command as convert

if TYPE_CHECKING:
    from hbx_gpu.atlas import RaggedAtlas

# Heavy imports happen in the commands, so that --help and --version answer at once.
_CODECS = "hbx_gpu.rowpack, homeobox.bitpacking (which Homeobox reads), zstd, blosc, gzip, none"


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command line; returns the exit status: 0 for success, 1 for an error, 130 when interrupted."""
    args = _parser().parse_args(argv)
    logging.basicConfig(format="hbx-gpu: %(message)s", level=logging.INFO if args.debug else logging.WARNING)
    command: Callable[[argparse.Namespace], int] = args.command
    try:
        return command(args)
    except KeyboardInterrupt:
        print(f"hbx-gpu: interrupted; {args.if_interrupted}", file=sys.stderr)
        return 130
    except BrokenPipeError:
        # Whoever read our output has enough of it; nothing more may be written, not even on exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except Exception as error:
        if args.debug:
            raise
        print(f"hbx-gpu: error: {_text(error)}", file=sys.stderr)
        return 1


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="hbx-gpu", description="Atlases of single-cell data for training.")
    parser.add_argument("--version", action="version", version=f"hbx-gpu {__version__}")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    common = argparse.ArgumentParser(add_help=False)
    common.add_argument("--debug", action="store_true", help="show tracebacks and details")

    ingest = commands.add_parser("ingest", parents=[common], help="add .h5ad files to an atlas")
    ingest.add_argument("files", nargs="+", type=Path, metavar="FILE", help=".h5ad files, one dataset each")
    ingest.add_argument(
        "--atlas", required=True, type=Path, metavar="PATH", help="the atlas; made if it is not there"
    )
    ingest.add_argument("--layer", metavar="NAME", help="matrix to read: X (default), raw, or a layer")
    ingest.add_argument(
        "--target-layer",
        default="counts",
        metavar="NAME",
        help="layer to write: counts (default), log_normalized, tpm",
    )
    ingest.add_argument(
        "--feature-id-column",
        metavar="NAME",
        help="column of var with the feature ids, 'index' for the names; by default the names if they are "
        "unique, else gene_ids or the like",
    )
    ingest.add_argument(
        "--codec",
        metavar="NAME",
        help=f"compression: {_CODECS}; by default as in the atlas before, hbx_gpu.rowpack in a new one",
    )
    ingest.add_argument("--field", metavar="NAME", help="pointer column to fill, gene_expression by default")
    ingest.add_argument("--table", metavar="NAME", help="obs table to add to; needed if there are several")
    ingest.add_argument("--chunk-size", type=int, metavar="N", help="values per compressed chunk")
    ingest.add_argument("--shard-size", type=int, metavar="N", help="values per stored object")
    ingest.add_argument(
        "--allow-rounding", action="store_true", help="let float layers lose precision to float32"
    )
    ingest.add_argument(
        "--no-snapshot", action="store_true", help="leave optimize and snapshot to a later run"
    )
    ingest.set_defaults(command=_ingest, if_interrupted="the file in work was not added")

    repack = commands.add_parser(
        "repack",
        parents=[common],
        help="rewrite the arrays of an atlas in another codec",
        description="Rewrite index and layers of all sparse groups in place, one group after the other. "
        "Cells, genes and snapshots stay as they are. May be interrupted; run it again to go on.",
    )
    repack.add_argument("atlas", type=Path, metavar="ATLAS", help="the atlas; also one that Homeobox made")
    repack.add_argument("--codec", required=True, metavar="NAME", help=f"compression: {_CODECS}")
    repack.set_defaults(
        command=_repack, if_interrupted="every group is whole; run the command again to go on"
    )

    info = commands.add_parser("info", parents=[common], help="say what an atlas holds")
    info.add_argument("path", type=Path, metavar="PATH", help="the atlas")
    info.add_argument(
        "--version", dest="snapshot", type=int, metavar="N", help="snapshot; the newest by default"
    )
    info.set_defaults(command=_info, if_interrupted="nothing was changed")
    convert.add_parser(commands, common)
    bench.add_parser(commands, common)
    return parser


def _ingest(args: argparse.Namespace) -> int:
    atlas = _open(args)
    added, failure = 0, None
    for file in args.files:
        try:
            added += _add(atlas, file, args)
        except Exception as error:
            if args.debug:
                raise
            failure = error if str(file) in str(error) else _FileError(f"{file}: {_text(error)}")
            break
    if not args.no_snapshot and (added or _has_news(atlas)):
        atlas.optimize()
        version = atlas.snapshot()
        rows = int(atlas.list_versions(atlas.path)["total_rows"].iloc[-1])
        print(f"snapshot {version}: {rows:,} cells in {atlas.path}")
    if failure is not None:
        raise failure
    return 0


class _FileError(Exception):
    """An error whose message did not name the file."""


def _open(args: argparse.Namespace) -> RaggedAtlas:
    from hbx_gpu.atlas import RaggedAtlas, create_or_open_atlas
    from hbx_gpu.errors import InvalidDataError

    missing = [str(file) for file in args.files if not file.exists()]
    if missing:
        # Before anything is made: a misspelt name should not leave an empty atlas behind.
        raise InvalidDataError(f"no such file: {', '.join(missing)}")
    if (args.atlas / "lance_db").is_dir():
        return RaggedAtlas.open(args.atlas)
    return create_or_open_atlas(args.atlas, cell_table_name=args.table or "cells", codec=args.codec)


def _add(atlas: RaggedAtlas, file: Path, args: argparse.Namespace) -> int:
    from tqdm import tqdm

    begin = time.perf_counter()
    with tqdm(desc=file.name, unit=" cells", unit_scale=True, file=sys.stderr, mininterval=0.2) as bar:

        def show(done: int, total: int) -> None:
            bar.total = total
            bar.update(done - bar.n)

        n = atlas.add_from_h5ad(
            file,
            layer=args.layer,
            zarr_layer=args.target_layer,
            feature_id_column=args.feature_id_column,
            codec=args.codec,
            field_name=args.field,
            obs_table=args.table,
            chunk_shape=args.chunk_size,
            shard_shape=args.shard_size,
            allow_rounding=args.allow_rounding,
            exist_ok=True,
            progress=show,
        )
    if n:
        print(f"{file}: {n:,} cells added in {time.perf_counter() - begin:.1f} s")
    else:
        print(f"{file}: already ingested, skipped")
    return n


def _has_news(atlas: RaggedAtlas) -> bool:
    """Whether an earlier run left cells that no snapshot has."""
    versions = atlas.list_versions(atlas.path)
    stored = sum(atlas.catalogue.obs(table).count_rows() for table in atlas.obs_tables)
    return stored > (0 if versions.empty else int(versions["total_rows"].iloc[-1]))


def _repack(args: argparse.Namespace) -> int:
    from tqdm import tqdm

    from hbx_gpu.atlas import repack
    from hbx_gpu.atlas.summary import describe_repack

    with tqdm(desc="repack", unit=" values", unit_scale=True, file=sys.stderr, mininterval=0.2) as bar:

        def show(done: int, total: int) -> None:
            bar.total = total
            bar.update(done - bar.n)

        report = repack(args.atlas, args.codec, progress=show)
    print(describe_repack(report))
    return 0


def _info(args: argparse.Namespace) -> int:
    from hbx_gpu.atlas import Snapshot
    from hbx_gpu.atlas.summary import describe

    print(describe(Snapshot.open(args.path, args.snapshot)))
    return 0


def _text(error: Exception) -> str:
    from hbx_gpu.errors import HbxError

    known = isinstance(error, HbxError | OSError | ValueError | _FileError)
    return str(error) if known else f"{type(error).__name__}: {error}"


if __name__ == "__main__":
    sys.exit(main())
