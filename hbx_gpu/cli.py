"""The command `hbx-gpu`: fill an atlas, rewrite its arrays, say what it holds and how fast it loads."""

from __future__ import annotations

import argparse
import logging
import os
import sys
from collections.abc import Callable, Sequence

from hbx_gpu._commands import (
    bench,
    convert,
    doctor,
    info,
    ingest,
    prefetch,
    remove,
    repack,
    stats,
    verify,
)
from hbx_gpu._commands.places import use_storage_options
from hbx_gpu._progress import NoteHandler
from hbx_gpu._version import __version__

# Heavy imports happen in the commands, so that --help and --version answer at once.
_CODECS = "hbx_gpu.rowpack, homeobox.bitpacking (which Homeobox reads), zstd, blosc, gzip, none"


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command line; returns the exit status: 0 for success, 1 for an error, 130 when interrupted."""
    args = _parser().parse_args(argv)
    logging.basicConfig(
        format="hbx-gpu: %(message)s",
        level=logging.INFO if args.debug else logging.WARNING,
        handlers=[NoteHandler()],
    )
    command: Callable[[argparse.Namespace], int] = args.command
    try:
        use_storage_options(args)
        return command(args)
    except KeyboardInterrupt:
        print(f"hbx-gpu: interrupted; {args.if_interrupted}", file=sys.stderr)
        return 130
    except BrokenPipeError:
        # The reader of our output has closed the pipe; nothing more may be written, not even at exit.
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
    repack.add_parser(commands, common, _CODECS)
    info.add_parser(commands, common)
    remove.add_parser(commands, common)
    convert.add_parser(commands, common)
    prefetch.add_parser(commands, common)
    bench.add_parser(commands, common)
    doctor.add_parser(commands, common)
    verify.add_parser(commands, common)
    stats.add_parser(commands, common)
    return parser


if __name__ == "__main__":
    sys.exit(main())
