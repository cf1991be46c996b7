"""The subcommand `hbx-gpu info`: what an atlas holds."""

from __future__ import annotations

import argparse
from typing import Any

from hbx_gpu._advice import from_command
from hbx_gpu._commands.links import FLAGS, add_allow_links
from hbx_gpu._paths import argument as local_argument


def add_parser(commands: Any, common: argparse.ArgumentParser) -> None:
    """Add the subcommand to a parser's."""
    parser = commands.add_parser("info", parents=[common], help="say what an atlas holds")
    parser.add_argument("path", type=local_argument, metavar="PATH", help="the atlas")
    parser.add_argument(
        "--version", dest="snapshot", type=int, metavar="N", help="snapshot; the newest by default"
    )
    add_allow_links(parser)
    parser.set_defaults(command=run, if_interrupted="nothing was changed")


def run(args: argparse.Namespace) -> int:
    """Print the summary of a snapshot."""
    from hbx_gpu.atlas import Snapshot
    from hbx_gpu.atlas._upkeep.summary import describe

    with from_command(FLAGS):
        print(describe(Snapshot.open(args.path, args.snapshot, allow_links=args.allow_links)))
    return 0
