"""The subcommand `hbx-gpu verify`: whether an atlas or another store is whole."""

from __future__ import annotations

import argparse
import time
from pathlib import Path

from hbx_gpu._advice import from_command
from hbx_gpu._commands.executors import add_threads_or_workers, check_threads, workers
from hbx_gpu._commands.links import FLAGS, add_allow_links
from hbx_gpu._commands.places import add_snapshot, add_storage_options, argument
from hbx_gpu._progress import bar, line
from hbx_gpu._remote.places import AnyPath

_SHOWN = 10


def add_parser(
    commands: argparse._SubParsersAction[argparse.ArgumentParser], common: argparse.ArgumentParser
) -> None:
    """Add the subcommand to a parser's."""
    parser = commands.add_parser(
        "verify",
        parents=[common],
        help="say whether an atlas or another store is whole",
        description="Check tables, metadata and pointers, where each chunk lies, and the checksum of each "
        "chunk; the content of chunks without a checksum is checked instead. Nothing is written without "
        "--clean. The exit status is 1 if something is damaged.",
    )
    parser.add_argument(
        "path", type=argument, metavar="PATH", help="an atlas or any store of hbx_gpu.open, or its address"
    )
    levels = parser.add_mutually_exclusive_group()
    levels.add_argument(
        "--fast", action="store_true", help="read no chunk: tables, metadata, pointers, sizes, shard indexes"
    )
    levels.add_argument(
        "--full", action="store_true", help="check the content of every chunk, and every column number"
    )
    add_snapshot(parser)
    parser.add_argument(
        "--clean",
        action="store_true",
        help="first finish or remove what interrupted writers left: uploads, unfinished files, notes; an "
        "error if another process is writing",
    )
    add_threads_or_workers(parser, "read and decode")
    add_allow_links(parser)
    add_storage_options(parser)
    parser.set_defaults(command=run, if_interrupted="nothing was changed")


def run(args: argparse.Namespace) -> int:
    """Print a line per dataset, and what is damaged; 1 if anything is."""
    from hbx_gpu._devices import cores
    from hbx_gpu._remote.lookup import size_below
    from hbx_gpu._verify.dataset import Level
    from hbx_gpu._verify.leftovers import clean
    from hbx_gpu._verify.stores import verify

    check_threads(args)
    if args.clean:
        with from_command(FLAGS):
            for sentence in clean(args.path, allow_links=args.allow_links) or ["nothing was left to clean"]:
                line(sentence)
    level: Level = "fast" if args.fast else "full" if args.full else "checksums"
    total = args.path.stat().st_size if _is_local_file(args.path) else size_below(args.path)
    begin, whole, damaged, done = time.perf_counter(), 0, 0, 0
    with from_command(FLAGS), workers(args) as executor, bar("B", "verify") as progress:

        def moved(n: int) -> None:
            nonlocal done
            done += n
            progress(done, max(total, done))

        verdicts = verify(
            args.path,
            level,
            version=args.snapshot,
            allow_links=args.allow_links,
            threads=args.threads or cores(),
            progress=moved,
            executor=executor,
        )
        for verdict in verdicts:
            if verdict.damage:
                damaged += 1
                line(f"{verdict.name}: DAMAGED")
                for damage in verdict.damage[:_SHOWN]:
                    line(f"  {damage}")
                if len(verdict.damage) > _SHOWN:
                    line(f"  and {len(verdict.damage) - _SHOWN} more")
            else:
                whole += 1
                line(f"{verdict.name}: whole, {verdict.cells:,} cells")
    took = time.perf_counter() - begin
    line(f"{whole} whole, {damaged} damaged; {done / 1e6:,.1f} MB of chunks read in {took:.1f} s")
    return int(bool(damaged))


def _is_local_file(path: AnyPath) -> bool:
    """Whether a store is one file on a local disk."""
    return isinstance(path, Path) and path.is_file()
