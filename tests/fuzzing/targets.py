"""Small stores whose files are damaged: how all of one is read, and which files have a checksum."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

Content = tuple[np.ndarray, ...]


@dataclass(frozen=True)
class Target:
    """A store.

    Attributes
    ----------
    name
        For the report.
    share
        Part of the cases that it gets.
    build
        Makes the store in a new folder.
    read
        Everything in it that rows are made of.
    files
        Glob patterns of files that are damaged -> whether a checksum covers them, so that a wrong number is a
        fault.
    """

    name: str
    share: float
    build: Callable[[Path], None]
    read: Callable[[Path], Content]
    files: dict[str, bool]


def _group(codec: str, dtype: str) -> Target:
    from tests.engine.checked_groups import opened, write

    offsets: list[np.ndarray] = []

    def build(folder: Path) -> None:
        write(folder, codec, dtype)

    def read(folder: Path) -> Content:
        from tests.engine.checked_groups import N_ROWS, rows_of

        if not offsets:
            offsets.append(rows_of())
        batch = opened(folder, offsets[0])[np.arange(N_ROWS)]
        return np.asarray(batch.indices), np.asarray(batch.values), np.asarray(batch.offsets)

    metadata = dict.fromkeys(("csr/indices/zarr.json", "csr/layers/counts/zarr.json"), False)
    return Target(f"{codec} {dtype}", 0.1, build, read, {"**/c/0": True, **metadata})


def _build_archive(folder: Path) -> None:
    from hbx_gpu.scdl._writing.convert import convert_h5ad
    from tests.security.stores import anndata

    file = folder.parent / f"{folder.name}.h5ad"
    anndata(1).write_h5ad(file)
    convert_h5ad(file, folder)


def _read_archive(folder: Path) -> Content:
    from hbx_gpu.scdl._format.archive import open_archive

    archive = open_archive(folder)
    values, columns, offsets = archive.gather(np.arange(archive.n_rows))
    found: list[Any] = [values.astype("f8"), columns, offsets]
    for index in (archive.var, archive.obs):
        if index is not None and len(index):
            found += [np.asarray(index.frames[0][name]).astype(str) for name in index.frames[0].names]
    return tuple(found)


def _build_atlas(folder: Path) -> None:
    from tests.security.stores import make_atlas

    make_atlas(folder)


def _read_atlas(folder: Path) -> Content:
    from tests.security.stores import read

    return read(folder)


def _build_journal(folder: Path) -> None:
    """An atlas with one note of each kind that a killed writer leaves."""
    from hbx_gpu.atlas._catalogue.journal import GroupNote, IngestNote, Journal, RemoveNote, RepackNote

    _build_atlas(folder)
    group = GroupNote("a/b", "gene_expression", "gene_expression", "c", ("gene",))
    ingest = IngestNote("d", "cells", "e", (group,), {"cells": ("age",)}, ("registry",), ("f",))
    for note in (ingest, RepackNote("a/b", "g"), RemoveNote("h", "i", (("gene_expression", "c"),))):
        Journal(folder).write(note)


def _read_journal(folder: Path) -> Content:
    from hbx_gpu.atlas._catalogue.journal import Journal

    journal = Journal(folder)
    return (np.array([repr([*journal.notes(), *journal.repacks(), *journal.removals()])]),)


def targets(names: Sequence[str] = ()) -> list[Target]:
    """All targets, or those whose names contain one of `names`."""
    from hbx_gpu.atlas._writing.arrays import codec_names

    found = [_group(codec, "uint32") for codec in codec_names()] + [_group("zstd", "float32")]
    found.append(Target("scdl archive", 0.1, _build_archive, _read_archive, {"**/*": False}))
    found.append(
        Target(
            "atlas",
            0.008,
            _build_atlas,
            _read_atlas,
            {
                "lance_db/**/*.lance": True,
                "lance_db/**/*.manifest": True,
                "hbx_gpu.json": True,
                ".hbx_gpu/snapshots/*": True,
                "zarr_store/**/c/0": True,
            },
        )
    )
    found.append(Target("journal", 0.008, _build_journal, _read_journal, {".hbx_gpu/*.json": False}))
    return [t for t in found if not names or any(name in t.name for name in names)]


def files_of(target: Target, folder: Path) -> list[tuple[Path, str, bool]]:
    """(file, pattern, whether a checksum covers it) of a store that was built."""
    found = [
        (path, pattern, checked)
        for pattern, checked in target.files.items()
        for path in sorted(folder.glob(pattern))
        if path.is_file()
    ]
    assert found, f"{target.name}: nothing to damage in {folder}"
    return found


def quiet() -> None:
    """Damage is said in the log and in warnings, case after case."""
    import logging

    logging.disable(logging.CRITICAL)
    warnings.simplefilter("ignore")
