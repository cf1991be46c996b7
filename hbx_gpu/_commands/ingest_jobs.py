"""What a command line of `hbx-gpu ingest` asks for: one job for each dataset to add."""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from hbx_gpu._commands.matrices import file_and_matrix, matrix_named
from hbx_gpu._commands.places import is_atlas
from hbx_gpu._stores.kinds import is_mudata, split_modality

# Options for one matrix, and the option that does the same for several.
_SINGLE = {"layer": "--layer-of", "target_layer": "--layer-of", "field": "the names of the modalities"}
_SEVERAL = ("join", "obs_from", "layer_of", "tiles_table", "barcodes")


@dataclass(frozen=True)
class Job:
    """One dataset to add: a file, or modalities by name.

    Attributes
    ----------
    label
        The dataset, in messages.
    paths
        All files and folders that are read.
    file
        A file of one matrix, or a MuData; None where each modality has a file of its own.
    given
        Modality -> its file, where they are named one by one.
    layer
        Matrix to read of a file of one matrix; None: the one that holds counts.
    """

    label: str
    paths: Sequence[Path]
    file: Path | None
    given: Mapping[str, str]
    layer: str | None = None

    @property
    def several(self) -> bool:
        """Whether there are several modalities."""
        return bool(self.given) or (self.file is not None and is_mudata(self.file))


def jobs_of(args: argparse.Namespace) -> list[Job]:
    """Jobs of a command line, which ends with its usage where options do not go together."""
    given = dict(pairs(args, "--modality", args.modality))
    args.files = [file for path in args.files for file in _files_of(path)]
    for file in args.files:
        if modality := split_modality(file)[1]:
            args.parser.error(f"{file} is a modality; name it with --modality {modality}={file}")
    mu = [file for file in args.files if is_mudata(file)]
    if not args.files and not given:
        args.parser.error("name files, or modalities with --modality NAME=PATH")
    if given and args.files and (len(args.files) > 1 or not mu):
        args.parser.error("--modality goes with at most one FILE, a MuData; name others as modalities")
    unfit = [f"--{name.replace('_', '-')}" for name in _SEVERAL if getattr(args, name)]
    if unfit and not (given or mu):
        args.parser.error(f"{', '.join(unfit)}: for modalities only (--modality, or a MuData: .h5mu or zarr)")
    if given or mu:
        for name, instead in _SINGLE.items():
            if getattr(args, name):
                option = f"--{name.replace('_', '-')}"
                args.parser.error(f"{option} is for one matrix; with modalities use {instead}")
    if given:
        file = args.files[0] if args.files else None
        label = str(file) if file else ", ".join(f"{name}={path}" for name, path in given.items())
        paths = [split_modality(path)[0] for path in given.values()]
        return [Job(label, paths + ([file] if file else []), file, given)]
    jobs: list[Job] = []
    for path in args.files:
        file, matrix = file_and_matrix(path)
        if any(job.file == file for job in jobs):
            args.parser.error(f"{file} is given twice; one matrix of a file makes one dataset")
        jobs.append(Job(str(file), [file], file, {}, matrix_named(matrix or args.layer)))
    return jobs


def _files_of(path: Path) -> list[Path]:
    """The .h5ad and .h5mu files below a folder, in the order of their paths; anything else as it is."""
    from hbx_gpu._stores.source import is_other_store

    if not path.is_dir() or is_mudata(path) or is_other_store(path) or is_atlas(path):
        return [path]
    found = sorted(file for file in path.rglob("*") if file.suffix in (".h5ad", ".h5mu") and file.is_file())
    return found or [path]


def pairs(args: argparse.Namespace, option: str, values: Sequence[str]) -> list[tuple[str, str]]:
    """Split the values NAME=VALUE of an option, each name once."""
    found: list[tuple[str, str]] = []
    for value in values:
        name, equals, rest = value.partition("=")
        if not (name and equals and rest):
            args.parser.error(f"{option} {value}: expected NAME=VALUE")
        if name in dict(found):
            args.parser.error(f"{option}: {name} is given twice")
        found.append((name, rest))
    return found
