"""The command `hbx-gpu`: fill an atlas, rewrite its arrays, say what it holds and how fast it loads."""

from __future__ import annotations

import argparse
import logging
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

from hbx_gpu import __version__
from hbx_gpu._commands import bench, convert, ingest

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
        print(f"hbx-gpu: error: {ingest.error_text(error)}", file=sys.stderr)
        return 1


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="hbx-gpu", description="Atlases of single-cell data for training.")
    parser.add_argument("--version", action="version", version=f"hbx-gpu {__version__}")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    common = argparse.ArgumentParser(add_help=False)
    common.add_argument("--debug", action="store_true", help="show tracebacks and details")

    ingest.add_parser(commands, common, _CODECS)
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


def _repack(args: argparse.Namespace) -> int:
    from tqdm import tqdm

    from hbx_gpu.atlas import repack
    from hbx_gpu.atlas._upkeep.summary import describe_repack

    with tqdm(desc="repack", unit=" values", unit_scale=True, file=sys.stderr, mininterval=0.2) as bar:

        def show(done: int, total: int) -> None:
            bar.total = total
            bar.update(done - bar.n)

        report = repack(args.atlas, args.codec, progress=show)
    print(describe_repack(report))
    return 0


def _info(args: argparse.Namespace) -> int:
    from hbx_gpu.atlas import Snapshot
    from hbx_gpu.atlas._upkeep.summary import describe

    print(describe(Snapshot.open(args.path, args.snapshot)))
    return 0


if __name__ == "__main__":
    sys.exit(main())
