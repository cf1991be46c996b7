"""The subcommand `hbx-gpu repack`: the arrays of an atlas in another codec or row order."""

from __future__ import annotations

import argparse

from hbx_gpu._advice import from_command
from hbx_gpu._commands.executors import add_executor_options, chosen_executor
from hbx_gpu._commands.links import FLAGS, add_allow_links
from hbx_gpu._commands.places import add_storage_options, argument
from hbx_gpu._progress import bar
from hbx_gpu._remote.places import AnyPath, Place
from hbx_gpu._remote.stores import walk

_FLAGS = {**FLAGS, "codec": "--codec", "order_features": "--order-features"}


def add_parser(
    commands: argparse._SubParsersAction[argparse.ArgumentParser],
    common: argparse.ArgumentParser,
    codecs: str,
) -> None:
    """Add the subcommand to a parser's; `codecs` lists the codecs for the help."""
    parser = commands.add_parser(
        "repack",
        parents=[common],
        help="rewrite the arrays of an atlas in another codec or row order",
        description="Rewrite index and layers of all sparse groups in place, one group after the other. "
        "Cells, genes and snapshots stay as they are. May be interrupted; run it again to go on.",
    )
    parser.add_argument(
        "atlas", type=argument, metavar="ATLAS", help="the atlas, or its address; also one that Homeobox made"
    )
    parser.add_argument(
        "--codec", metavar="NAME", help=f"compression: {codecs}; needed unless rows are to be ordered"
    )
    parser.add_argument(
        "--order-features",
        action="store_true",
        help="order the values of each cell as the atlas numbers its genes, so that loaders of sparse "
        "batches need not sort them; may take more space (default: keep the order)",
    )
    add_executor_options(parser)
    add_allow_links(parser)
    add_storage_options(parser)
    parser.set_defaults(command=run, if_interrupted="every group is whole; run the command again to go on")


def run(args: argparse.Namespace) -> int:
    """Rewrite the atlas and print what happened to its groups."""
    from hbx_gpu.atlas import repack
    from hbx_gpu.atlas._upkeep.summary import describe_repack

    n_groups, n_bytes = _size(args.atlas / "zarr_store")
    with (
        from_command(_FLAGS),
        chosen_executor(args, n_groups, n_bytes) as executor,
        bar(" values", "repack") as show,
    ):
        report = repack(
            args.atlas,
            args.codec,
            order_features=args.order_features,
            executor=executor,
            allow_links=args.allow_links,
            progress=show,
        )
    print(describe_repack(report))
    return 0


def _size(store: AnyPath) -> tuple[int, int]:
    """Number of groups, and their bytes."""
    if isinstance(store, Place):
        sizes = {path: info.nbytes for path, info in walk(store)}
        n_groups = sum(path.count("/") == 2 and path.endswith("/zarr.json") for path in sizes)
        return n_groups, sum(sizes.values())
    groups = [path.parent for path in store.glob("*/*/zarr.json")]
    return len(groups), sum(path.stat().st_size for group in groups for path in group.rglob("*"))
