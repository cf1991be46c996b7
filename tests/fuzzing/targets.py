"""Small stores whose files are damaged: how all of one is read, and which files have a checksum."""

from __future__ import annotations

import shutil
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
    family
        Targets of one family run one after the other in one process, families side by side.
    share
        Part of the cases that it gets, in percent; at least one in 200 of all cases, however slow it is.
    build
        Makes the store in a new folder.
    read
        Everything in it that rows are made of.
    files
        Glob patterns of files that are damaged -> whether a checksum covers them, so that a wrong number is a
        fault. Each pattern gets the same number of cases.
    """

    name: str
    family: str
    share: float
    build: Callable[[Path], None]
    read: Callable[[Path], Content]
    files: dict[str, bool]


def _group(codec: str, dtype: str) -> Target:
    offsets: list[np.ndarray] = []

    def build(folder: Path) -> None:
        from tests.engine.checked_groups import write

        write(folder, codec, dtype)

    def read(folder: Path) -> Content:
        from tests.engine.checked_groups import N_ROWS, opened, rows_of

        if not offsets:
            offsets.append(rows_of())
        batch = opened(folder, offsets[0])[np.arange(N_ROWS)]
        return np.asarray(batch.indices), np.asarray(batch.values), np.asarray(batch.offsets)

    files = {"csr/indices/c/0": True, "csr/layers/counts/c/0": True, "csr/**/zarr.json": False}
    family = (
        "chunks" if dtype == "uint32" and codec in ("hbx_gpu.rowpack", "homeobox.bitpacking") else "codecs"
    )
    return Target(f"{codec} {dtype}", family, 8.5, build, read, files)


def _build_archive(folder: Path) -> None:
    from hbx_gpu.scdl._writing.convert import ConvertOptions, convert_h5ad
    from tests.security.stores import anndata

    data = anndata(1)
    data.obsp["next_cell_ids"] = _ring(data.n_obs)
    file = folder.parent / f"{folder.name}.h5ad"
    data.write_h5ad(file)
    convert_h5ad(file, folder, options=ConvertOptions(neighbor_key="next_cell_ids"))


def _ring(n: int) -> object:
    import scipy.sparse as sp

    return sp.csr_matrix((np.ones(n, "f4"), (np.arange(n), (np.arange(n) + 1) % n)), (n, n))


def _build_old_archive(folder: Path) -> None:
    """As releases up to 0.1.2 left them: genes in another folder, labels in a pickle."""
    _build_archive(folder)
    shutil.move(folder / "var_features", folder / "features")
    (folder / "features" / "labels.json").unlink(missing_ok=True)
    np.save(folder / "features" / "labels.npy", np.array([Path("a.h5ad")], object), allow_pickle=True)


def _read_archive(folder: Path) -> Content:
    from hbx_gpu.scdl._format.archive import open_archive
    from hbx_gpu.scdl._format.names import read_obs_names, read_var_names

    archive = open_archive(folder)
    values, columns, offsets = archive.gather(np.arange(archive.n_rows))
    found: list[np.ndarray] = [values.astype("f8"), columns, offsets]
    for index in (archive.var, archive.obs):
        if index is not None and len(index):
            found += [np.asarray(index.frames[0][name]).astype(str) for name in index.frames[0].names]
    names = (read_obs_names(folder, archive.n_rows), *read_var_names(folder, len(archive.n_vars)))
    found += [np.asarray(some).astype(str) for some in names if some is not None]
    if (neighbors := archive.neighbors) is not None:
        neighbors.check()
        found += [np.asarray(neighbors.indptr), np.asarray(neighbors.indices), np.asarray(neighbors.weights)]
    return tuple(found)


_ARCHIVE = ("*.npy", "*.json", "*/*.npy", "*/*.parquet")


def _build_atlas(folder: Path) -> None:
    from tests.security.stores import make_atlas

    make_atlas(folder)


def _read_atlas(folder: Path) -> Content:
    from tests.security.stores import read

    return read(folder)


_ATLAS = {
    "lance_db/**/*.lance": True,
    "lance_db/**/*.manifest": True,
    ".hbx_gpu/snapshots/*": True,
    "zarr_store/**/c/0": True,
    "zarr_store/**/csr/**/zarr.json": False,
}


def _build_journal(folder: Path) -> None:
    """An atlas with one note of each kind that a killed writer leaves."""
    from hbx_gpu.atlas._catalog.journal import GroupNote, IngestNote, Journal, RemoveNote, RepackNote

    _build_atlas(folder)
    group = GroupNote("a/b", "gene_expression", "gene_expression", "c", ("gene",))
    ingest = IngestNote("d", "cells", ("e",), (group,), {"cells": ("age",)}, ("registry",), ("f",))
    for note in (ingest, RepackNote("a/b", "g"), RemoveNote("h", "i", (("gene_expression", "c"),))):
        Journal(folder).write(note)


def _read_journal(folder: Path) -> Content:
    from hbx_gpu.atlas._catalog.journal import Journal

    journal = Journal(folder)
    return (np.array([repr([*journal.notes(), *journal.repacks(), *journal.removals()])]),)


def _read_names(folder: Path) -> Content:
    from hbx_gpu.atlas._catalog.names import Names

    return (np.array([repr(Names.load(folder))]),)


def _build_zarr(version: int) -> Callable[[Path], None]:
    def build(folder: Path) -> None:
        import anndata

        from tests.security.stores import anndata as cells

        before = anndata.settings.zarr_write_format
        anndata.settings.zarr_write_format = version
        try:
            cells(1).write_zarr(folder)
        finally:
            anndata.settings.zarr_write_format = before

    return build


def _read_store(folder: Path) -> Content:
    import hbx_gpu

    dataset = hbx_gpu.open(folder).to_cell_dataset(metadata_columns=["cell_type"])
    batch: Any = dataset[np.arange(len(dataset))]
    columns = batch.metadata or {}
    named = [np.asarray(columns[name]).astype(str) for name in sorted(columns)]
    return np.asarray(batch.indices), np.asarray(batch.values), np.asarray(batch.offsets), *named


def targets(names: Sequence[str] = ()) -> list[Target]:
    """All targets, or those whose names contain one of `names`."""
    from hbx_gpu.atlas._writing.arrays import codec_names

    found = [_group(codec, "uint32") for codec in codec_names()] + [_group("zstd", "float32")]
    new, old = dict.fromkeys([*_ARCHIVE, "header.sch"], False), dict.fromkeys(_ARCHIVE, False)
    found += [
        Target("scdl archive", "archives", 12, _build_archive, _read_archive, new),
        Target(
            "scdl archive, old",
            "archives",
            8,
            _build_old_archive,
            _read_archive,
            old,
        ),
        Target("atlas", "atlas", 5, _build_atlas, _read_atlas, _ATLAS),
        Target("atlas, its names", "chunks", 2, _build_atlas, _read_names, {"hbx_gpu.json": False}),
        Target("atlas, its notes", "chunks", 4, _build_journal, _read_journal, {".hbx_gpu/*.json": False}),
    ]
    for version in (2, 3):
        build = _build_zarr(version)
        files = (
            {"X/*/.zarray": False, "X/*/0": False, "**/.zattrs": False}
            if version == 2
            else {"X/*/zarr.json": False, "X/*/c/0": False, "zarr.json": False}
        )
        tables = {"obs/**/*": False, "var/**/*": False}
        found.append(Target(f"AnnData zarr {version}", "stores", 4, build, _read_store, files | tables))
    return [t for t in found if not names or any(name in t.name for name in names)]


def share_out(chosen: Sequence[Target], cases: int) -> dict[str, int]:
    """Target -> its cases, a multiple of its kinds of files."""
    total = sum(target.share for target in chosen)
    least = cases // 200
    counts = {target.name: max(round(cases * target.share / total), least) for target in chosen}
    return {t.name: -(-counts[t.name] // len(t.files)) * len(t.files) for t in chosen}


def files_of(target: Target, folder: Path) -> dict[str, list[Path]]:
    """Pattern -> files of a store that was built."""
    found = {
        pattern: [path for path in sorted(folder.glob(pattern)) if path.is_file()] for pattern in target.files
    }
    assert all(found.values()), f"{target.name}: nothing to damage in {folder}: {found}"
    return found


def quiet() -> None:
    """Damage is said in the log and in warnings, case after case."""
    import logging

    logging.disable(logging.CRITICAL)
    warnings.simplefilter("ignore")
