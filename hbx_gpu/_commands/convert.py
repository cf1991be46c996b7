"""`hbx-gpu convert`: archive to atlas, atlas or .h5ad to archive, told apart by what the source is."""

from __future__ import annotations

import argparse
import contextlib
import time
import warnings
from collections.abc import Iterator
from pathlib import Path

from hbx_gpu._advice import from_command
from hbx_gpu._commands import links
from hbx_gpu._commands.executors import add_executor_options, chosen_executor
from hbx_gpu._commands.matrices import file_and_matrix, matrix_named
from hbx_gpu._commands.places import add_storage_options, argument, is_atlas
from hbx_gpu._progress import Progress, bar, note
from hbx_gpu._remote.options import options_of
from hbx_gpu._remote.places import AnyPath, Place, parse
from hbx_gpu._stores.kinds import is_mudata, split_modality
from hbx_gpu.errors import InvalidDataError, UnsupportedError


def add_parser(
    commands: argparse._SubParsersAction[argparse.ArgumentParser], common: argparse.ArgumentParser
) -> None:
    """Add the subcommand to those of `hbx-gpu`."""
    parser = commands.add_parser(
        "convert",
        parents=[common],
        help="turn an SCDL archive into an atlas, an atlas or a file of cells into an archive",
        description="Turn an SCDL archive into an atlas, or an atlas, an AnnData, a 10x or a loom store, or "
        "a folder of .h5ad files into an SCDL archive. "
        "Nothing is lost on the way: columns in their order, repeats, explicit zeros and dtypes come back.",
    )
    parser.add_argument(
        "source",
        type=argument,
        metavar="SOURCE",
        help="an SCDL archive, an atlas, or an .h5ad, zarr, 10x Genomics or loom store; one modality of a "
        "MuData as FILE.h5mu:MODALITY; a folder of .h5ad files, which become one archive in the order of "
        "their paths; or an address: an atlas is read where it lies, all else is copied to a disk first",
    )
    parser.add_argument(
        "target", type=argument, metavar="TARGET", help="the atlas or archive to make, or its address"
    )
    parser.add_argument(
        "--layer",
        metavar="NAME",
        help="to an atlas: the layer to write (by default counts, if values are whole numbers, else "
        "log_normalized); from an atlas: the layer to read; from a file: the matrix to read: X, raw, a "
        "layer, or auto (default), which takes the one that holds counts, as hbx-gpu ingest does: X, else "
        "raw, else a layer called counts. SOURCE may name it too: FILE:raw, FILE:layers/counts",
    )
    parser.add_argument(
        "--feature-id-column",
        "--feature-id",
        dest="feature_id",
        metavar="NAME",
        help="to an atlas: column of var that identifies a gene across the files of an archive, "
        "'unique_names' for the names with repeats numbered (a, a-1, ...); by default chosen for all of them "
        "together: as the atlas has them, ids of a database, else the names",
    )
    parser.add_argument(
        "--strip-versions",
        action="store_true",
        help="to an atlas: drop the versions of Ensembl ids: ENSG....15",
    )
    parser.add_argument(
        "--require-shared-genes",
        type=float,
        metavar="FRACTION",
        help="to an atlas: refuse a block that shares less than this fraction of the smaller set of genes "
        "with the atlas and the blocks before it; by default a fraction below one half is only reported",
    )
    parser.add_argument(
        "--codec", metavar="NAME", help="compression of a new atlas; hbx_gpu.rowpack by default"
    )
    parser.add_argument(
        "--data-dtype",
        metavar="NAME",
        help="dtype of the archive's values, uint8 to uint64, float16 to float64, or auto for the smallest "
        "exact one; by default that of the archive an atlas was made of, else auto",
    )
    parser.add_argument("--union", action="store_true", help="from an atlas: one block with all genes")
    parser.add_argument("--keep-uids", action="store_true", help="from an atlas: write uids as obs columns")
    parser.add_argument(
        "--allow-loss", action="store_true", help="accept values that the dtype does not hold"
    )
    parser.add_argument(
        "--allow-normalized", action="store_true", help="from a file: accept values that are not counts"
    )
    parser.add_argument("--overwrite", action="store_true", help="replace an archive at TARGET")
    add_executor_options(parser, "convert the files of a folder")
    links.add_allow_links(parser)
    add_storage_options(parser)
    parser.set_defaults(
        command=_convert,
        if_interrupted="an archive is as it was before; an atlas has the finished blocks, run it again",
    )


def kind_of(path: Path) -> str:
    """``atlas``, ``archive``, ``file`` or ``folder``, one of .h5ad files.

    Raises
    ------
    InvalidDataError
        None of them is there.
    """
    if (path / "lance_db").is_dir():
        return "atlas"
    if path.is_dir() and ((path / "row_ptr.npy").exists() or (path / "header.sch").exists()):
        return "archive"
    if (path.is_file() and path.suffix == ".h5ad") or is_mudata(split_modality(path)[0]):
        return "file"
    from hbx_gpu._h5ad.foreign import describe_path
    from hbx_gpu._stores.source import is_other_store

    if is_other_store(path):
        return "file"
    if path.is_dir() and next(path.rglob("*.h5ad"), None) is not None:
        return "folder"

    there = (describe_path(path) or "it is none of these") if path.exists() else "nothing is there"
    raise InvalidDataError(
        f"expected an SCDL archive (a folder with row_ptr.npy), an atlas (a folder with lance_db), a .h5ad "
        f"file or a folder of them at {path}; {there}"
    )


def _convert(args: argparse.Namespace) -> int:
    named = args.source
    if isinstance(named, Place) and args.dask is not None:
        raise UnsupportedError(
            f"{named}: --dask converts files that its workers share; leave it out, or copy "
            "them to a shared disk"
        )
    begin = time.perf_counter()
    with _source(named) as args.source:
        n, said = _converted(args)
        if said:
            print(said.replace(str(args.source), str(named)))
    took = time.perf_counter() - begin
    done = f"{n:,} cells of {named} in {took:.1f} s"
    print(f"{args.target}: {done if n else f'all cells of {named} are in it already'}")
    return 0


@contextlib.contextmanager
def _source(path: AnyPath) -> Iterator[AnyPath]:
    """The source as conversions take it: atlases where they lie, everything else on a local disk."""
    if not isinstance(path, Place) or is_atlas(path):
        yield path
        return
    name, colon, part = path.name.partition(":")
    from hbx_gpu._remote.downloads import local_copy  # which imports numpy, and help is to be quick

    # The options of the command line were remembered for the address with the name of the matrix.
    where = parse(path.parent / name, options_of(path.url)) if colon else path
    with local_copy(where) as copy:
        yield copy.with_name(f"{copy.name}:{part}") if colon else copy


def _converted(args: argparse.Namespace) -> tuple[int, str]:
    """The number of cells, and a line about the choices that were made."""
    matrix, kind = None, "atlas"
    if not isinstance(args.source, Place):
        args.source, matrix = file_and_matrix(args.source)
        kind = kind_of(args.source)
    if matrix and args.layer:
        raise InvalidDataError(f"SOURCE names the matrix {matrix} and --layer {args.layer}; give one of them")
    args.layer = matrix_named(matrix or args.layer)
    _refuse_unused(args, kind)
    convert = {"archive": _to_atlas, "atlas": _from_atlas, "file": _from_file, "folder": _from_folder}[kind]
    used = {name: flag for name, flag in _FLAGS.items() if _attribute(flag) in _USED[kind]}
    with from_command(used), warnings.catch_warnings():
        warnings.simplefilter("always", UserWarning)
        warnings.showwarning = _say
        with bar(" files" if kind == "folder" else " cells", args.source.name) as progress:
            return convert(args, progress)


def _attribute(flag: str) -> str:
    """Where argparse keeps an option."""
    return {"--feature-id-column": "feature_id"}.get(flag, flag.removeprefix("--").replace("-", "_"))


def _say(message: Warning | str, *_: object, **__: object) -> None:
    note(f"hbx-gpu: warning: {message}")


# Python's parameters, as the options of this command.
_FLAGS = links.FLAGS | {
    "feature_id": "--feature-id-column",
    "feature_id_column": "--feature-id-column",
    "strip_versions": "--strip-versions",
    "require_shared_genes": "--require-shared-genes",
    "layer": "--layer",
    "zarr_layer": "--layer",
    "matrix": "--layer",
    "codec": "--codec",
    "data_dtype": "--data-dtype",
    "allow_loss": "--allow-loss",
    "allow_rounding": "--allow-loss",
    "allow_normalized": "--allow-normalized",
    "overwrite": "--overwrite",
    "union": "--union",
}
_FROM_FILES = {"layer", "data_dtype", "allow_loss", "allow_normalized", "allow_links", "overwrite"}
_USED = {
    "archive": {
        "layer",
        "feature_id",
        "strip_versions",
        "require_shared_genes",
        "codec",
        "allow_loss",
        "allow_links",
    },
    "atlas": {"layer", "data_dtype", "union", "keep_uids", "allow_loss", "allow_links", "overwrite"},
    "file": _FROM_FILES,
    "folder": _FROM_FILES | {"require_shared_genes", "workers", "dask"},
}


def _refuse_unused(args: argparse.Namespace, kind: str) -> None:
    options = set().union(*_USED.values())
    unused = [name for name in options if getattr(args, name) and name not in _USED[kind]]
    if unused:
        flags = ", ".join(sorted(_FLAGS.get(name, "--" + name.replace("_", "-")) for name in unused))
        named = {"atlas": "an atlas", "archive": "an archive", "file": "a file of cells"}
        what = named.get(kind, "a folder of files")
        raise InvalidDataError(f"{args.source} is {what}: {flags} cannot be used for its conversion")


# Each gives the number of cells, and a line about the choices that it made.


def _to_atlas(args: argparse.Namespace, progress: Progress) -> tuple[int, str]:
    from hbx_gpu.scdl._atlases.to_atlas import archive_to_atlas

    n = archive_to_atlas(
        args.source,
        args.target,
        layer=args.layer or "auto",
        feature_id=args.feature_id,
        strip_versions=args.strip_versions,
        require_shared_genes=args.require_shared_genes,
        codec=args.codec,
        allow_loss=args.allow_loss,
        allow_links=args.allow_links,
        progress=progress,
    )
    return n, ""


def _from_atlas(args: argparse.Namespace, progress: Progress) -> tuple[int, str]:
    from hbx_gpu.scdl._atlases.from_atlas import atlas_to_archive

    n = atlas_to_archive(
        args.source,
        args.target,
        layer=args.layer,
        data_dtype=args.data_dtype,
        union=args.union,
        keep_uids=args.keep_uids,
        allow_loss=args.allow_loss,
        allow_links=args.allow_links,
        overwrite=args.overwrite,
        progress=progress,
    )
    return n, ""


def _from_file(args: argparse.Namespace, progress: Progress) -> tuple[int, str]:
    from hbx_gpu.scdl._format.values import Tolerance
    from hbx_gpu.scdl._writing.convert import ConvertOptions, convert_h5ad

    done = convert_h5ad(
        args.source,
        args.target,
        options=ConvertOptions(
            matrix=args.layer,
            choose=args.layer is None,
            allow_normalized=args.allow_normalized,
            allow_links=args.allow_links,
        ),
        data_dtype=args.data_dtype or "auto",
        tolerance=Tolerance(allow_loss=args.allow_loss),
        overwrite=args.overwrite,
        progress=progress,
    )
    return done.n_rows, f"{args.source}: matrix {done.matrix}" + (f" ({done.reason})" if done.reason else "")


def _from_folder(args: argparse.Namespace, progress: Progress) -> tuple[int, str]:
    from hbx_gpu.scdl._api.collection import find_h5ad
    from hbx_gpu.scdl._api.many import convert_folder
    from hbx_gpu.scdl._format.values import Tolerance
    from hbx_gpu.scdl._writing.convert import ConvertOptions, convert_h5ad_files
    from hbx_gpu.scdl._writing.writer import check_target

    files = find_h5ad(args.source)
    options = ConvertOptions(
        matrix=args.layer,
        choose=args.layer is None,
        allow_normalized=args.allow_normalized,
        require_shared_genes=args.require_shared_genes,
        allow_links=args.allow_links,
    )
    data_dtype, tolerance = args.data_dtype or "auto", Tolerance(allow_loss=args.allow_loss)
    n_bytes = sum(file.stat().st_size for file in files)
    remote = not isinstance(args.target, Path)
    if remote and (args.workers is not None or args.dask is not None):
        raise UnsupportedError(
            f"{args.target}: --workers and --dask make an archive on a disk; leave them out, or convert to a "
            "folder and copy it"
        )
    if not remote:
        check_target(args.target, overwrite=args.overwrite)
    with contextlib.nullcontext() if remote else chosen_executor(args, len(files), n_bytes) as executor:
        if executor is not None:
            n = convert_folder(
                args.source,
                args.target,
                executor,
                options=options,
                data_dtype=data_dtype,
                tolerance=tolerance,
                overwrite=args.overwrite,
                progress=progress,
            )
            return n, ""
    done = convert_h5ad_files(
        files,
        args.target,
        options=options,
        data_dtype=data_dtype,
        tolerance=tolerance,
        overwrite=args.overwrite,
    )
    return sum(conversion.n_rows for conversion in done), ""
