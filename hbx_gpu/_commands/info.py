"""The subcommand `hbx-gpu info`: what an atlas or another store holds."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from hbx_gpu._advice import from_command
from hbx_gpu._commands.links import FLAGS, add_allow_links
from hbx_gpu._paths import argument as local_argument


def add_parser(commands: Any, common: argparse.ArgumentParser) -> None:
    """Add the subcommand to a parser's."""
    parser = commands.add_parser("info", parents=[common], help="say what an atlas or another store holds")
    parser.add_argument(
        "path", type=local_argument, metavar="PATH", help="an atlas or any store of hbx_gpu.open"
    )
    parser.add_argument(
        "--version",
        dest="snapshot",
        type=int,
        metavar="N",
        help="snapshot of an atlas; by default the newest",
    )
    add_allow_links(parser)
    parser.set_defaults(command=run, if_interrupted="nothing was changed")


def _is_something(path: Path) -> bool:
    """Whether there is anything; what is missing or empty may have been meant to be an atlas."""
    return path.is_file() or (path.is_dir() and any(path.iterdir()))


def run(args: argparse.Namespace) -> int:
    """Print the summary of a snapshot, or of another store."""
    from hbx_gpu._inplace.stores import is_atlas
    from hbx_gpu.atlas import Snapshot
    from hbx_gpu.atlas._upkeep.summary import describe

    if args.snapshot is None and _is_something(args.path) and not is_atlas(args.path):
        from hbx_gpu._inplace.stores import open_stores
        from hbx_gpu._inplace.summary import describe_stores

        with from_command(FLAGS):
            print(describe_stores(open_stores([args.path], allow_links=args.allow_links)))
        return 0
    with from_command(FLAGS):
        print(describe(Snapshot.open(args.path, args.snapshot, allow_links=args.allow_links)))
    return 0
