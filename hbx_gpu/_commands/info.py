"""The subcommand `hbx-gpu info`: what an atlas or another store holds."""

from __future__ import annotations

import argparse

from hbx_gpu._advice import from_command
from hbx_gpu._commands.links import FLAGS, add_allow_links
from hbx_gpu._commands.places import add_snapshot, add_storage_options, argument, is_empty
from hbx_gpu._remote.lookup import is_file
from hbx_gpu._remote.places import AnyPath


def add_parser(
    commands: argparse._SubParsersAction[argparse.ArgumentParser], common: argparse.ArgumentParser
) -> None:
    """Add the subcommand to a parser's."""
    parser = commands.add_parser("info", parents=[common], help="show what atlases or other stores hold")
    parser.add_argument(
        "paths",
        nargs="+",
        type=argument,
        metavar="PATH",
        help="an atlas or any store of hbx_gpu.open, or its address; several are described in turn",
    )
    add_snapshot(parser)
    add_allow_links(parser)
    add_storage_options(parser)
    parser.set_defaults(command=run, if_interrupted="nothing was changed")


def _is_something(path: AnyPath) -> bool:
    """Whether there is anything; what is missing or empty may have been meant to be an atlas."""
    return is_file(path) or not is_empty(path)


def run(args: argparse.Namespace) -> int:
    """Print a summary of each path."""
    with from_command(FLAGS):
        for number, path in enumerate(args.paths):
            print(("\n" if number else "") + _described(path, args.snapshot, args.allow_links), flush=True)
    return 0


def _described(path: AnyPath, snapshot: int | None, allow_links: bool) -> str:
    from hbx_gpu._inplace.stores import is_atlas, open_stores

    if snapshot is None and _is_something(path) and not is_atlas(path):
        from hbx_gpu._inplace.summary import describe_stores

        return describe_stores(open_stores([path], allow_links=allow_links))
    from hbx_gpu.atlas import Snapshot
    from hbx_gpu.atlas._upkeep.summary import describe

    return describe(Snapshot.open(path, snapshot, allow_links=allow_links))
