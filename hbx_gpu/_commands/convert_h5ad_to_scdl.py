"""The command `convert_h5ad_to_scdl`: .h5ad files become one archive."""

from __future__ import annotations

import argparse
import logging
import os
import sys
import time
import warnings
from collections.abc import Sequence
from concurrent.futures import Executor
from pathlib import Path
from typing import Any

from hbx_gpu._advice import from_command
from hbx_gpu._commands.executors import chosen_executor
from hbx_gpu._commands.places import add_storage_options, argument, use_storage_options
from hbx_gpu._paths import argument as local_argument
from hbx_gpu._progress import NoteHandler, bar, note
from hbx_gpu._remote.places import Place
from hbx_gpu._version import __version__
from hbx_gpu.errors import UnsupportedError

# Heavy imports happen in the functions, so that --help and --version answer at once.
_PROGRAM = "convert_h5ad_to_scdl"
_DTYPES = "uint8, uint16, uint32, uint64, float16, float32, float64, or auto for the smallest exact one"


# Python's parameters, as the options of this command.
_FLAGS = {
    name: f"--{name.replace('_', '-')}"
    for name in (
        "matrix",
        "use_X_not_raw",
        "allow_normalized",
        "allow_loss",
        "require_shared_genes",
        "data_dtype",
        "data_dtype_tolerance",
        "overwrite",
        "neighbor_key",
        "load_neighbors",
    )
}


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command line; returns the exit status: 0 for success, 1 for an error, 130 when interrupted."""
    args = _parser().parse_args(argv)
    logging.basicConfig(
        format=f"{_PROGRAM}: %(message)s",
        level=logging.INFO if args.debug else logging.WARNING,
        handlers=[NoteHandler()],
    )
    try:
        use_storage_options(args)
        with from_command(_FLAGS), warnings.catch_warnings():
            if not args.debug:
                warnings.showwarning = _show_warning
            return _convert(args)
    except KeyboardInterrupt:
        print(f"{_PROGRAM}: interrupted; {args.save_path} is as it was", file=sys.stderr)
        return 130
    except Exception as error:
        if args.debug:
            raise
        from hbx_gpu.errors import HbxError

        known = isinstance(error, HbxError | OSError | ValueError | RuntimeError)
        text = str(error) if known else f"{type(error).__name__}: {error}"
        print(f"{_PROGRAM}: error: {text}", file=sys.stderr)
        return 1


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog=_PROGRAM,
        description="Convert .h5ad files into one SCDL archive, in the order of their paths.",
        allow_abbrev=False,
    )
    parser.add_argument("--version", action="version", version=f"{_PROGRAM} (hbx_gpu {__version__})")

    def add(name: str, **kwargs: Any) -> None:
        # SCDL's documents write some flags with underscores, its program all with hyphens.
        spellings = dict.fromkeys([f"--{name}", f"--{name.replace('-', '_')}"])
        parser.add_argument(*spellings, **kwargs)

    add(
        "data-path",
        required=True,
        type=local_argument,
        metavar="DIR",
        help="folder that is searched for .h5ad files, subfolders included; or one file",
    )
    add(
        "save-path",
        required=True,
        type=argument,
        metavar="DIR",
        help="the archive to make, or its address in object storage",
    )
    add(
        "num-workers",
        type=int,
        default=4,
        metavar="N",
        help="processes of --use-mp [4]; without it, files come one after the other: HDF5 lets one thread in",
    )
    add(
        "use-mp",
        action="store_true",
        help="convert several files at once, in processes, and join the results",
    )
    add(
        "dask",
        metavar="ADDRESS",
        help="convert the files on the workers of a Dask cluster, which need the same paths: tcp://HOST:8786",
    )
    add("data-dtype", metavar="DTYPE", help=f"dtype of the values: {_DTYPES} [float32]")
    add(
        "data-dtype-tolerance",
        type=float,
        default=1e-08,
        metavar="X",
        help="largest change of a value that counts as none [1e-08]",
    )
    add("allow-loss", action="store_true", help="store values that the dtype does not hold, with a warning")
    add(
        "paginated-load-cutoff",
        type=int,
        default=10_000,
        metavar="MIB",
        help="files from this size on are read in blocks of at most --load-block-row-size rows [10000]",
    )
    add("load-block-row-size", type=int, default=1_000_000, metavar="N", help="see above [1000000]")
    add("use-X-not-raw", action="store_true", help="take X; by default raw.X where a file has it, else X")
    add(
        "matrix",
        metavar="NAME",
        help="matrix to take: X, raw, a layer, or auto (the one that holds counts); not --use-X-not-raw",
    )
    add("allow-normalized", action="store_true", help="accept values that are not counts, also beside counts")
    add(
        "require-shared-genes",
        type=float,
        metavar="FRACTION",
        help="refuse files that share less than this fraction of the smaller set of genes with those before "
        "them; by default a fraction below one half is only reported",
    )
    add("load-neighbors", action="store_true", help="take the neighbors of the cells too")
    add("neighbor-key", default="next_cell_ids", metavar="KEY", help="their key in obsp [next_cell_ids]")
    add("overwrite", action="store_true", help="replace an archive at the save path; by default refused")
    add_storage_options(parser)
    add("debug", action="store_true", help="show tracebacks and details")
    return parser


def _convert(args: argparse.Namespace) -> int:
    from hbx_gpu.scdl._api.collection import find_h5ad
    from hbx_gpu.scdl._writing.uploading import local_target
    from hbx_gpu.scdl._writing.writer import check_target

    begin = time.perf_counter()
    if not isinstance(args.save_path, Place):
        check_target(args.save_path, overwrite=args.overwrite)
    files = find_h5ad(args.data_path)
    if args.dask is not None and args.use_mp:
        raise ValueError("--dask and --use-mp both say where files are converted; give one of them")
    if args.dask is not None and isinstance(args.save_path, Place):
        raise UnsupportedError(
            f"{args.save_path}: --dask makes an archive on a disk that its workers share; leave it out, or "
            "convert to a folder and copy that"
        )
    args.workers = args.num_workers if args.use_mp else 1
    n_bytes = sum(file.stat().st_size for file in files)
    with (
        local_target(args.save_path, overwrite=args.overwrite) as target,
        chosen_executor(args, len(files), n_bytes) as executor,
    ):
        n_rows = _convert_files(files, target, args, executor)
    seconds = time.perf_counter() - begin
    print(f"{args.save_path}: {n_rows:,} cells from {len(files)} file(s) in {seconds:.1f} s")
    return 0


def _convert_files(
    files: Sequence[Path], target: str | os.PathLike[str], args: argparse.Namespace, executor: Executor | None
) -> int:
    from hbx_gpu.scdl._api.many import convert_folder
    from hbx_gpu.scdl._format.values import Tolerance
    from hbx_gpu.scdl._writing.convert import ConvertOptions, convert_h5ad_files

    options = ConvertOptions(
        matrix=args.matrix,
        use_X_not_raw=args.use_X_not_raw,
        allow_normalized=args.allow_normalized,
        paginated_load_cutoff=args.paginated_load_cutoff,
        load_block_row_size=args.load_block_row_size,
        require_shared_genes=args.require_shared_genes,
        neighbor_key=args.neighbor_key if args.load_neighbors else None,
    )
    tolerance = Tolerance(args.data_dtype_tolerance, args.allow_loss)
    if executor is not None:
        with bar(" files") as show:
            return convert_folder(
                args.data_path,
                target,
                executor,
                options=options,
                data_dtype=args.data_dtype,
                tolerance=tolerance,
                overwrite=args.overwrite,
                progress=show,
            )
    with bar(" cells") as show:
        added = convert_h5ad_files(
            files,
            target,
            options=options,
            data_dtype=args.data_dtype,
            tolerance=tolerance,
            overwrite=args.overwrite,
            progress=show,
        )
    return sum(conversion.n_rows for conversion in added)


def _show_warning(message: Warning | str, *_: object, **__: object) -> None:
    note(f"{_PROGRAM}: warning: {message}")


if __name__ == "__main__":
    sys.exit(main())
