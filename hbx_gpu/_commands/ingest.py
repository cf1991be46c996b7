"""The subcommand `hbx-gpu ingest`: files one by one, or several modalities of the same cells together."""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, TypedDict

from hbx_gpu._advice import from_command
from hbx_gpu._commands import links
from hbx_gpu._commands.executors import add_executor_options, chosen_executor
from hbx_gpu._commands.ingest_jobs import Job, jobs_of, pairs
from hbx_gpu._commands.places import add_storage_options, argument, is_atlas, is_empty
from hbx_gpu._paths import argument as local_argument
from hbx_gpu._progress import bar, line
from hbx_gpu._stores.kinds import is_mudata

if TYPE_CHECKING:
    from hbx_gpu.atlas import RaggedAtlas
    from hbx_gpu.atlas._ingest.commit import IngestReport
    from hbx_gpu.atlas._ingest.identity import GivenColumn
    from hbx_gpu.atlas._ingest.plan import FilePlan
    from hbx_gpu.atlas._ingest.reports import FileReport

# Heavy imports happen in the functions, so that --help answers at once.
_EXAMPLES = """\
examples:
  hbx-gpu ingest a.h5ad b.h5ad --atlas A
  hbx-gpu ingest a.h5ad:raw b.h5ad:layers/counts c.h5ad --atlas A
  hbx-gpu ingest *.h5ad --atlas A --workers 8
  hbx-gpu ingest FOLDER --atlas A
  hbx-gpu ingest cite.h5mu --atlas A
  hbx-gpu ingest --atlas A --modality rna=a.h5ad --modality protein=b.h5ad
  hbx-gpu ingest --atlas A --modality rna=a.h5ad --modality tiles=tiles.zarr --tiles-table cells.csv
"""


def add_parser(
    commands: argparse._SubParsersAction[argparse.ArgumentParser],
    common: argparse.ArgumentParser,
    codecs: str,
) -> None:
    """Add the subcommand to a parser's; `codecs` lists the codecs for the help."""
    parser = commands.add_parser(
        "ingest",
        parents=[common],
        help="add AnnData, MuData, 10x and loom stores, images and fragments to an atlas",
        epilog=_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "files",
        nargs="*",
        type=local_argument,
        metavar="FILE[:MATRIX]",
        help=".h5ad, .h5mu, AnnData or MuData zarr, annbatch, 10x Genomics or loom stores, one dataset each; "
        "FILE:raw and FILE:layers/counts name the matrix of one file, where files differ; a folder stands "
        "for the .h5ad and .h5mu files in it and its subfolders",
    )
    parser.add_argument(
        "--atlas",
        required=True,
        type=argument,
        metavar="PATH",
        help="the atlas, or its address in object storage; made if it is not there",
    )
    parser.add_argument(
        "--layer",
        metavar="NAME",
        help="matrix to read, for FILEs without :MATRIX: X, raw, a layer, or auto (default), which takes "
        "the one that holds counts: X, else raw, else a layer called counts",
    )
    parser.add_argument(
        "--target-layer",
        metavar="NAME",
        help="layer to write: counts (default), log_normalized, tpm, or another one of the feature space",
    )
    parser.add_argument(
        "--feature-id-column",
        action="append",
        default=[],
        metavar="[NAME=]COLUMN",
        help="column of var with the feature ids (of one modality), 'index' for the names, 'unique_names' "
        "for the names with repeats numbered (a, a-1, ...). By default chosen for all files together: as the "
        "atlas has them, else ids of a database, else the names",
    )
    parser.add_argument(
        "--strip-versions", action="store_true", help="drop the versions of Ensembl ids: ENSG....15"
    )
    parser.add_argument(
        "--require-shared-genes",
        type=float,
        metavar="FRACTION",
        help="refuse a file that shares less than this fraction of the smaller set of features with the "
        "atlas and the files before it; by default a fraction below one half is only reported",
    )
    parser.add_argument(
        "--obs-type",
        action="append",
        default=[],
        metavar="NAME=TYPE",
        help="store an obs column as int, float, bool, str or datetime; repeat for more",
    )
    parser.add_argument(
        "--drop-obs", action="append", default=[], metavar="NAME", help="leave an obs column out; repeatable"
    )
    parser.add_argument(
        "--rename-obs",
        action="append",
        default=[],
        metavar="OLD=NEW",
        help="store an obs column under another name; repeat for more",
    )
    parser.add_argument(
        "--codec",
        metavar="NAME",
        help=f"compression: {codecs}; by default as in the atlas before, hbx_gpu.rowpack in a new one",
    )
    parser.add_argument("--field", metavar="NAME", help="pointer column to fill, gene_expression by default")
    parser.add_argument("--table", metavar="NAME", help="obs table to add to; needed if there are several")
    parser.add_argument("--chunk-size", type=int, metavar="N", help="values per compressed chunk")
    parser.add_argument("--shard-size", type=int, metavar="N", help="values per stored object")
    parser.add_argument(
        "--allow-rounding", action="store_true", help="let float layers lose precision to float32"
    )
    parser.add_argument(
        "--replace",
        action="store_true",
        help="put a file in the place of the dataset that was made of it, of a file of that name, or of the "
        "same cells; snapshots that were taken before keep what they had",
    )
    parser.add_argument(
        "--accept-duplicates",
        action="store_true",
        help="add cells that are in the atlas already, from another file",
    )
    add_executor_options(parser)
    parser.add_argument(
        "--no-snapshot", action="store_true", help="leave optimize and snapshot to a later run"
    )
    links.add_allow_links(parser)
    add_storage_options(parser)
    several = parser.add_argument_group("several modalities of the same cells, joined by cell id")
    several.add_argument(
        "--modality",
        action="append",
        default=[],
        metavar="NAME=PATH",
        help="repeat for each: rna, protein, image_features, atac, tiles, images, encoded, a feature space "
        "or a pointer column; PATH is an .h5ad file, MUDATA:MODALITY, a fragments file, or images (with "
        "--tiles-table). Beside one MuData FILE it adds to its modalities or replaces them",
    )
    several.add_argument(
        "--join",
        choices=("inner", "outer", "exact"),
        help="cells to keep: those of any matrix (outer, default), those that all modalities have (inner), "
        "or all, which must be the same in each modality (exact)",
    )
    several.add_argument(
        "--obs-from", metavar="NAME", help="modality whose obs columns count where others differ"
    )
    several.add_argument(
        "--layer-of",
        action="append",
        default=[],
        metavar="NAME:LAYER=MATRIX",
        help="layer to write and matrix to read, repeat for more: protein:dsb_normalized=layers/dsb",
    )
    several.add_argument(
        "--tiles-table",
        action="append",
        default=[],
        metavar="[NAME=]TABLE",
        help="table of cells and images: cell_id, and tile, or file, or y0, y1, x0, x1",
    )
    several.add_argument(
        "--barcodes", metavar="FILE", help="barcodes of the fragments file that are cells, one per line"
    )
    parser.set_defaults(
        command=_ingest,
        parser=parser,
        if_interrupted="each file was added whole or not at all",
    )


# Python's parameters, as the options of this command.
_FLAGS = links.FLAGS | {
    "feature_id_column": "--feature-id-column",
    "strip_versions": "--strip-versions",
    "require_shared_genes": "--require-shared-genes",
    "obs_types": "--obs-type",
    "drop_obs": "--drop-obs",
    "rename_obs": "--rename-obs",
    "layer": "--layer",
    "zarr_layer": "--target-layer",
    "allow_rounding": "--allow-rounding",
    "field_name": "--field",
    "obs_table": "--table",
    "join": "--join",
    "obs_from": "--obs-from",
    "replace": "--replace",
    "accept_duplicates": "--accept-duplicates",
}
_FLAGS_OF_SEVERAL = _FLAGS | {"layers": "--layer-of {}"}


def _ingest(args: argparse.Namespace) -> int:
    jobs = jobs_of(args)
    with from_command(_FLAGS_OF_SEVERAL if any(job.several for job in jobs) else _FLAGS):
        return _ingest_jobs(args, jobs)


def _ingest_jobs(args: argparse.Namespace, jobs: Sequence[Job]) -> int:
    from hbx_gpu.atlas._upkeep.snapshots import has_news

    is_new = is_empty(args.atlas)
    atlas = _open(args, [path for job in jobs for path in job.paths])
    added, failure = 0, None
    if not any(job.several for job in jobs):
        added, failure = _run_files(atlas, jobs, args)
    else:
        # What files have in common is chosen over both kinds, so those of one matrix are added here too.
        try:
            plans = _plan(atlas, jobs, args)
        except Exception:
            _discard(atlas, is_new)
            raise
        for job in jobs:
            try:
                added += _run(atlas, job, args, plans)
            except Exception as error:
                if args.debug:
                    raise
                failure = error
                break
    if not args.no_snapshot and (added or has_news(atlas.catalog)):
        atlas.optimize()
        version = atlas.snapshot()
        rows = int(atlas.list_versions(atlas.catalog.root)["total_rows"].iloc[-1])
        print(f"snapshot {version}: {rows:,} cells in {atlas.url}")
    if failure is not None:
        if not added:
            _discard(atlas, is_new)
        raise failure
    return 0


def _discard(atlas: RaggedAtlas, is_new: bool) -> None:
    """Remove a new, empty atlas after its first file was refused."""
    if is_new:
        from hbx_gpu.atlas._catalog.creation import discard_empty

        with atlas.session.writing() as catalog:
            discard_empty(catalog)


def _plan(atlas: RaggedAtlas, jobs: Sequence[Job], args: argparse.Namespace) -> dict[str, FilePlan]:
    """Make the choices that concern all files together, before anything is added."""
    from hbx_gpu.atlas._ingest.plan import plan_files

    files = [job.file for job in jobs if not job.given and job.file is not None]
    return plan_files(
        atlas,
        files,
        obs_table=args.table,
        feature_id_column=_id_columns(args),
        strip_versions=args.strip_versions,
        require_shared_genes=args.require_shared_genes,
        obs_types=dict(pairs(args, "--obs-type", args.obs_type)),
        drop_obs=args.drop_obs,
        rename_obs=dict(pairs(args, "--rename-obs", args.rename_obs)),
        layers=_layers(args),
    )


def _plans_of(job: Job, plans: Mapping[str, FilePlan]) -> dict[str, FilePlan]:
    """Modality of a job -> what was chosen for it."""
    before = f"{job.file}:"
    return {key.removeprefix(before): plan for key, plan in plans.items() if key.startswith(before)}


class _FileError(Exception):
    """An error whose message did not name the file."""


def error_text(error: Exception) -> str:
    """What to tell the user of an error."""
    from hbx_gpu.errors import HbxError

    known = isinstance(error, HbxError | OSError | ValueError | _FileError)
    return str(error) if known else f"{type(error).__name__}: {error}"


def _open(args: argparse.Namespace, paths: Sequence[Path]) -> RaggedAtlas:
    from hbx_gpu.atlas import create_or_open_atlas
    from hbx_gpu.atlas._catalog.creation import is_unfinished
    from hbx_gpu.atlas._ingest.multimodal import resolve_modality
    from hbx_gpu.errors import InvalidDataError

    missing = [str(path) for path in paths if not path.exists()]
    if missing:
        # Checked before anything is created, so that a misspelled name does not leave an empty atlas.
        raise InvalidDataError(f"no such file: {', '.join(missing)}")
    table = args.table or "cells"
    named: list[tuple[str, str]] = pairs(args, "--modality", args.modality)
    for file in args.files:
        others = _modalities_of(file, args, [name for name, _ in named]) if is_mudata(file) else []
        named += [(name, f"{file}:{name}") for name in others]
        if not is_mudata(file):
            named.append(("gene_expression", str(file)))
    # One whose making was interrupted is made anew, so it needs its columns.
    exists = is_atlas(args.atlas) and not (isinstance(args.atlas, Path) and is_unfinished(args.atlas))
    fields: dict[str, str] = {}
    for name, data in named if not exists else ():
        field_name, space = resolve_modality(name, fields, table, data)
        fields[field_name] = space.name
    # Not needed for an existing atlas, because each dataset says what it adds.
    return create_or_open_atlas(
        args.atlas,
        cell_table_name=table,
        codec=None if exists else args.codec,
        pointer_fields=fields,
        allow_links=args.allow_links,
    )


def _modalities_of(file: Path, args: argparse.Namespace, given: Sequence[str]) -> list[str]:
    """Modalities of a MuData, without those that are given otherwise."""
    from hbx_gpu._stores.source import open_mudata_source
    from hbx_gpu.atlas._ingest.multimodal import SHORT_NAMES, modalities_with_matrix

    named = {SHORT_NAMES.get(name.lower(), name) for name in given}
    with open_mudata_source(file, allow_links=args.allow_links) as opened:
        return [
            name
            for name in modalities_with_matrix(opened)
            if SHORT_NAMES.get(name.lower(), name) not in named
        ]


def _run_files(
    atlas: RaggedAtlas, jobs: Sequence[Job], args: argparse.Namespace
) -> tuple[int, Exception | None]:
    """Add files of one matrix each; return the number of added cells, and why the first failed file did."""
    if not jobs:
        return 0, None
    files = {str(job.file): job for job in jobs}
    told = [time.perf_counter()]
    added = n_told = 0

    def say(file: FileReport) -> None:
        nonlocal added, n_told
        added, n_told = added + file.n_cells, n_told + 1
        begin, told[0] = told[0], time.perf_counter()
        if not file.n_cells:
            line(f"{file.source}: already ingested, skipped")
            return
        line(f"{file.source}: {file.n_cells:,} cells added in {told[0] - begin:.1f} s")
        if file.choice is not None:
            line(f"  matrix {file.matrix}, features by {file.choice} ({file.choice.reason})")

    n_bytes = sum(path.stat().st_size for job in jobs for path in job.paths)
    title = jobs[0].paths[0].name if len(jobs) == 1 else "ingest"
    try:
        with chosen_executor(args, len(jobs), n_bytes) as executor, bar(" cells", title) as show:
            atlas.ingest_many(
                list(files),
                executor,
                added=say,
                layer={file: job.layer for file, job in files.items()},
                zarr_layer=args.target_layer,
                field_name=args.field,
                feature_id_column=(args.feature_id_column or [None])[-1],
                **_common(args, show),
            )
    except Exception as error:
        if args.debug:
            raise
        named = n_told == len(files) or any(file in str(error) for file in files)
        return added, error if named else _FileError(f"{list(files)[n_told]}: {error_text(error)}")
    return added, None


def _run(atlas: RaggedAtlas, job: Job, args: argparse.Namespace, plans: Mapping[str, FilePlan]) -> int:
    begin = time.perf_counter()
    title = job.file.name if job.file else "modalities"
    with bar(" cells", title) as show:
        report = _add_several(atlas, job, args, show, _plans_of(job, plans)) if job.several else None
        n_cells = report.n_cells if report else _add_one(atlas, job, args, show, plans.get(str(job.file)))
    if not n_cells:
        print(f"{job.label}: already ingested, skipped")
        return 0
    print(f"{job.label}: {n_cells:,} cells added in {time.perf_counter() - begin:.1f} s")
    if report:
        _print_modalities(report)
        for name, plan in _plans_of(job, plans).items():
            print(f"  {name}: matrix {plan.matrix}, features by {plan.choice} ({plan.choice.reason})")
    elif chosen := plans.get(str(job.file)):
        print(f"  matrix {chosen.matrix}, features by {chosen.choice} ({chosen.choice.reason})")
    return n_cells


def _print_modalities(report: IngestReport) -> None:
    print(f"  {report.n_complete:,} cells have all modalities")
    for name, n in report.n_measured.items():
        lacking = report.n_cells - n
        left_out = report.n_left_out[name]
        more = [f"{lacking:,} cells lack it"] if lacking else []
        more += [f"{left_out:,} ids left out"] if left_out else []
        print(f"  {name}: {n:,} cells{', ' if more else ''}{', '.join(more)}")


class _Common(TypedDict):
    """Options that every way of adding files has."""

    codec: str | None
    obs_table: str | None
    chunk_shape: int | None
    shard_shape: int | None
    allow_rounding: bool
    strip_versions: bool
    require_shared_genes: float | None
    obs_types: Mapping[str, str]
    drop_obs: Sequence[str]
    rename_obs: Mapping[str, str]
    replace: bool
    accept_duplicates: bool
    progress: Callable[[int, int], object]


def _common(args: argparse.Namespace, show: Callable[[int, int], object]) -> _Common:
    return {
        "codec": args.codec,
        "obs_table": args.table,
        "chunk_shape": args.chunk_size,
        "shard_shape": args.shard_size,
        "allow_rounding": args.allow_rounding,
        "strip_versions": args.strip_versions,
        "require_shared_genes": args.require_shared_genes,
        "obs_types": dict(pairs(args, "--obs-type", args.obs_type)),
        "drop_obs": args.drop_obs,
        "rename_obs": dict(pairs(args, "--rename-obs", args.rename_obs)),
        "replace": args.replace,
        "accept_duplicates": args.accept_duplicates,
        "progress": show,
    }


def _add_one(
    atlas: RaggedAtlas,
    job: Job,
    args: argparse.Namespace,
    show: Callable[[int, int], object],
    plan: FilePlan | None,
) -> int:
    """Add a file of one matrix that is given beside files of several; return the number of added cells."""
    assert job.file is not None
    column = args.feature_id_column
    chosen: dict[str, object] = {
        "layer": job.layer,
        "feature_id_column": column[-1] if column else None,
    }
    if plan is not None:
        chosen = {
            "layer": plan.layer,
            "feature_id_column": plan.choice,
            "obs_types": plan.edits.types,
            "drop_obs": plan.edits.drop,
            "rename_obs": plan.edits.rename,
        }
    return atlas.add_from_h5ad(
        job.file,
        zarr_layer=args.target_layer,
        field_name=args.field,
        exist_ok=True,
        **{**_common(args, show), **chosen},
    )


def _add_several(
    atlas: RaggedAtlas,
    job: Job,
    args: argparse.Namespace,
    show: Callable[[int, int], object],
    plans: Mapping[str, FilePlan],
) -> IngestReport:
    columns: GivenColumn | Mapping[str, GivenColumn] = _id_columns(args)
    if plans:
        modalities = _modalities_of(job.file, args, []) if job.file else []
        given = columns if isinstance(columns, Mapping) else dict.fromkeys(modalities, columns)
        columns = {**given, **{name: plan.choice for name, plan in plans.items()}}
    return atlas.add_multimodal(
        _modalities(atlas, job, args),
        join=args.join or "outer",
        obs_from=args.obs_from,
        layers=_layers(args),
        feature_id_column=columns,
        exist_ok=True,
        **_common(args, show),
    )


def _modalities(atlas: RaggedAtlas, job: Job, args: argparse.Namespace) -> object:
    from hbx_gpu.atlas import FragmentsInput, ImageInput
    from hbx_gpu.atlas._ingest.multimodal import resolve_modality

    if not job.given:
        return job.file
    found: dict[str, object] = {}
    if job.file is not None:
        found = {name: f"{job.file}:{name}" for name in _modalities_of(job.file, args, list(job.given))}
    table = args.table or atlas.obs_tables[0]
    fields = atlas.catalog.pointer_spaces(table)
    spaces = {name: resolve_modality(name, fields, table, path)[1] for name, path in job.given.items()}
    images = [name for name, space in spaces.items() if not space.has_features]
    tables = _tables(args, images)
    for name, path in job.given.items():
        if name in images:
            if name not in tables:
                args.parser.error(f"--modality {name}: images need --tiles-table {name}=TABLE")
            found[name] = ImageInput(path, tables[name])
        elif spaces[name].repeats:
            found[name] = FragmentsInput(path, args.barcodes)
        else:
            found[name] = path
    return found


def _tables(args: argparse.Namespace, images: Sequence[str]) -> dict[str, str]:
    tables = {}
    for value in args.tiles_table:
        name, equals, path = value.partition("=")
        if not equals or name not in images:
            if len(images) != 1:
                args.parser.error(f"--tiles-table {value}: expected NAME=TABLE, NAME one of {list(images)}")
            name, path = images[0], value
        tables[name] = path
    return tables


def _layers(args: argparse.Namespace) -> dict[str, dict[str, str]]:
    layers: dict[str, dict[str, str]] = {}
    for target, matrix in pairs(args, "--layer-of", args.layer_of):
        name, colon, layer = target.partition(":")
        if not (name and colon and layer):
            args.parser.error(f"--layer-of {target}={matrix}: expected NAME:LAYER=MATRIX")
        layers.setdefault(name, {})[layer] = matrix
    return layers


def _id_columns(args: argparse.Namespace) -> str | dict[str, str] | None:
    values = args.feature_id_column
    named = dict(value.split("=", 1) for value in values if "=" in value)
    if named and len(named) < len(values):
        args.parser.error("--feature-id-column: either one COLUMN for all modalities or NAME=COLUMN for each")
    return named or (values[-1] if values else None)
