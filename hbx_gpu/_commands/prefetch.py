"""The command line of `hbx-gpu prefetch`. Prints, as commands do."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from hbx_gpu._advice import from_command
from hbx_gpu._commands.links import FLAGS, add_allow_links
from hbx_gpu._commands.places import add_storage_options, argument

_FLAGS = FLAGS | {"layer": "--layer", "field_name": "--field", "obs_table_name": "--table"}


def add_parser(
    commands: argparse._SubParsersAction[argparse.ArgumentParser], common: argparse.ArgumentParser
) -> None:
    """Add the command to the parser of `hbx-gpu`."""
    parser = commands.add_parser(
        "prefetch",
        parents=[common],
        help="bring the cells of a query from object storage to a local disk, before they are loaded",
        description="Fill the cache of a later training run: the same folder is given there as cache='DIR'. "
        "What the cache has already is not fetched again.",
    )
    parser.add_argument(
        "path",
        type=argument,
        metavar="ADDRESS",
        help="an atlas or a store in object storage; --where selects cells",
    )
    parser.add_argument("--cache", type=Path, required=True, metavar="DIR", help="folder of the cache")
    parser.add_argument(
        "--cache-bytes",
        type=int,
        metavar="N",
        help="bytes that the cache may take (default: half of the free space)",
    )
    parser.add_argument("--where", metavar="SQL", help="cells to bring, by their obs columns (default: all)")
    parser.add_argument("--table", metavar="NAME", help="obs table, where an atlas has several")
    parser.add_argument("--field", metavar="NAME", help="feature space, where there are several")
    parser.add_argument(
        "--layer",
        metavar="NAME",
        help="layer (default: that of the feature space of an atlas, X of a store)",
    )
    add_allow_links(parser)
    add_storage_options(parser)
    parser.set_defaults(command=_prefetch, if_interrupted="what was fetched stays in the cache")


def _prefetch(args: argparse.Namespace) -> int:
    from tqdm import tqdm

    import hbx_gpu
    from hbx_gpu._datasets.stored import StoredDataset
    from hbx_gpu._inplace.cells import Cells
    from hbx_gpu._storage.prefetch import prefetch
    from hbx_gpu.atlas import AtlasQuery, RaggedAtlas
    from hbx_gpu.errors import UnsupportedError

    with from_command(_FLAGS):
        options = {"cache": args.cache, "cache_bytes": args.cache_bytes, "allow_links": args.allow_links}
        query: Cells | AtlasQuery
        if args.table is not None:
            query = RaggedAtlas.checkout_latest(args.path, **options).query(args.table)
        else:
            query = hbx_gpu.open(args.path, **options)
        if args.where is not None:
            query = query.where(args.where)
        dataset = (
            query.to_cell_dataset(field_name=args.field, layer=args.layer)
            if isinstance(query, AtlasQuery)
            else query.to_cell_dataset(args.field, args.layer or "X")
        )
        if not isinstance(dataset, StoredDataset):
            raise UnsupportedError(f"{dataset!r} has no chunks of its own; choose another --field")
        chunks = dataset.needed_chunks()
        with tqdm(unit="B", unit_scale=True, desc="prefetch", file=sys.stderr, disable=None) as bar:
            found = prefetch(dataset.directory, chunks, bar.update)
    print(
        f"{len(dataset):,} cells: {found.chunks:,} chunks, {found.nbytes:,} bytes are in {args.cache}; "
        f"{found.moved:,} bytes came from {args.path}"
    )
    return 0
