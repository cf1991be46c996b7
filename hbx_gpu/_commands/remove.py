"""The subcommand `hbx-gpu remove`: take a dataset out of an atlas."""

from __future__ import annotations

import argparse

from hbx_gpu._advice import from_command
from hbx_gpu._commands.links import FLAGS, add_allow_links
from hbx_gpu._commands.places import add_storage_options, argument


def add_parser(
    commands: argparse._SubParsersAction[argparse.ArgumentParser], common: argparse.ArgumentParser
) -> None:
    """Add the subcommand to a parser's."""
    parser = commands.add_parser(
        "remove",
        parents=[common],
        help="take a dataset out of an atlas",
        description="Remove the cells of a dataset, and features that no other has, and take a snapshot. "
        "Snapshots that were taken before keep what they had, so its arrays stay on disk.",
    )
    parser.add_argument("atlas", type=argument, metavar="ATLAS", help="the atlas, or its address")
    parser.add_argument(
        "dataset",
        metavar="DATASET",
        help="uid of the dataset, or the name of its file, as hbx-gpu info shows",
    )
    add_allow_links(parser)
    add_storage_options(parser)
    parser.set_defaults(command=run, if_interrupted="the next writer finishes it")


def run(args: argparse.Namespace) -> int:
    """Remove the dataset and take a snapshot."""
    from hbx_gpu.atlas import RaggedAtlas

    with from_command(FLAGS):
        atlas = RaggedAtlas.open(args.atlas, allow_links=args.allow_links)
        removed = atlas.remove_dataset(args.dataset)
        atlas.optimize()
        version = atlas.snapshot()
    print(
        f"{args.dataset}: {removed.n_cells:,} cells and {removed.n_features:,} features removed; snapshot "
        f"{version} is without them"
    )
    return 0
