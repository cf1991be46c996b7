"""What an ingest of many files does anywhere, in any process: look at a file, and write its group.

Both need the file and, to write, a staging folder that the process shares with the coordinator. Neither reads
a table of the atlas; this module and what it imports must not import lancedb, which takes a worker a second.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import shutil
import uuid
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pyarrow as pa

from hbx_gpu._advice import from_command
from hbx_gpu._h5ad.choice import MatrixChoice
from hbx_gpu._h5ad.files import AnnDataGroup
from hbx_gpu._identity.choice import FeatureChoice
from hbx_gpu._identity.tables import FeatureTable
from hbx_gpu._stores.source import open_source
from hbx_gpu.atlas._ingest.cells import Dataset, ObsNames, cell_rows
from hbx_gpu.atlas._ingest.inputs import choose_for, from_h5ad, hash_file
from hbx_gpu.atlas._ingest.joining import Joined
from hbx_gpu.atlas._ingest.obs_edits import ObsEdits
from hbx_gpu.atlas._ingest.parts import MatrixPart, Storage, Tick
from hbx_gpu.atlas._model.spaces import FeatureSpace
from hbx_gpu.errors import InvalidDataError

GROUP, CELLS, FEATURES = "group", "cells.arrow", "features.arrow"
"""Names in the folder that :func:`write_file` fills."""


@dataclass(frozen=True)
class Where:
    """How any process finds a file and speaks about it.

    Attributes
    ----------
    path
        The file, or the folder of a store.
    allow_links
        Follow links that lead out of it.
    flags
        Options in messages, as the user's command spells them; None for a user of Python.
    """

    path: Path
    allow_links: bool = False
    flags: Mapping[str, str] | None = None

    def spelling(self) -> contextlib.AbstractContextManager[None]:
        """A context in which messages name options as the user does."""
        return contextlib.nullcontext() if self.flags is None else from_command(self.flags)


@dataclass(frozen=True)
class Look:
    """What one file holds, without its values.

    Attributes
    ----------
    matrix
        Matrix to read.
    words
        The same with what it holds, where that was looked at.
    n_cells
        Number of its rows.
    features
        Columns that may identify its features; of files with the same `vocabulary`, one is enough.
    vocabulary
        Hash of `features`.
    obs_columns
        Names of the columns of obs.
    sha256
        Of the file.
    stamp
        Size and time of the last change, by which another file under the same name is noticed.
    """

    matrix: str
    words: str
    n_cells: int
    features: FeatureTable
    vocabulary: str
    obs_columns: tuple[str, ...]
    sha256: str
    stamp: tuple[int, int]


def look_at(where: Where, wanted: str | None, counts: bool) -> Look:
    """Look at a file.

    Parameters
    ----------
    where
        The file.
    wanted
        Matrix that the user names.
    counts
        Whether counts are wanted where none is named.

    Raises
    ------
    InvalidDataError
        It holds no such matrix, no cells or no features.
    """
    stamp = _stamp(where.path)
    with where.spelling(), open_source(where.path, allow_links=where.allow_links) as file:
        matrix, words, features = look_at_matrix(file, wanted, counts=counts)
        n_cells, obs_columns = file.matrix(matrix).shape[0], tuple(file.obs_columns())
    features = features.alone()
    digest = hashlib.sha256()
    for name in features.columns:
        digest.update(f"{name}\0{features.texts(name)}\0".encode("utf-8", "surrogatepass"))
    return Look(
        matrix,
        words,
        n_cells,
        features,
        digest.hexdigest(),
        obs_columns,
        hash_file(where.path),
        stamp,
    )


def look_at_matrix(file: AnnDataGroup, wanted: str | None, *, counts: bool) -> tuple[str, str, FeatureTable]:
    """The matrix to read of an open file, that matrix in words, and the features that it has.

    Raises
    ------
    InvalidDataError
        It has no such matrix, or no cells or features: adding it is refused, so its features have no say in
        how those of others are identified.
    """
    chosen: MatrixChoice | None = choose_for(file, wanted, counts=counts)
    name = wanted or (chosen.name if chosen else "X")
    if 0 in (shape := file.matrix(name).shape):
        what = "cells" if not shape[0] else "features"
        raise InvalidDataError(
            f"{file.source}, matrix {name!r} has no {what} ({shape[0]} x {shape[1]}): nothing to ingest"
        )
    return name, str(chosen) if chosen else name, FeatureTable.of_frame(file.var(name), file.source)


@dataclass(frozen=True)
class WriteTask:
    """One file to be written, and everything about the atlas that this needs.

    Attributes
    ----------
    where, look
        The file, and what was seen of it; without its features, which every task would carry.
    staging
        Folder of the ingest, which exists as long as somebody waits for the result.
    dataset_uid
        Uid of the dataset.
    field_name, space
        Pointer column, and the space it points into.
    layer
        Layer to write.
    choice
        How the features are identified.
    positions
        int32, (n_features,). Features of the file in the order of the registry; None where they lie so.
    new_features
        int32. Numbers of the features, in the file, that the registry lacks.
    names, edits
        What names of obs columns have to heed, and what the user changes about them.
    storage, allow_rounding
        As of `MatrixPart`.
    """

    where: Where
    look: Look
    staging: Path
    dataset_uid: str
    field_name: str
    space: FeatureSpace
    layer: str
    choice: FeatureChoice
    positions: np.ndarray | None
    new_features: np.ndarray
    names: ObsNames
    edits: ObsEdits
    storage: Storage
    allow_rounding: bool = False


@dataclass(frozen=True)
class Written:
    """The result of a task: files in a folder of its own, which another run of the same task does not touch.

    Attributes
    ----------
    folder
        Holds the group, and tables of the obs rows with their pointers and of the new features.
    identity
        See `Part`.
    source_name
        As recorded with the dataset.
    n_cells
        Number of obs rows.
    """

    folder: Path
    identity: Mapping[str, str] = field(default_factory=dict)
    source_name: str = ""
    n_cells: int = 0


def write_file(task: WriteTask, tick: Tick = lambda _: None) -> Written:
    """Write the group of one file, its obs rows and its new features into a new folder.

    Parameters
    ----------
    task
        What is to be written.
    tick
        Called with the number of cells done, where the caller is in this process.

    Raises
    ------
    InvalidDataError
        The file breaks a rule, or has changed since it was looked at.
    FileNotFoundError
        The staging folder is gone, because nobody waits for the result any more.
    """
    folder = task.staging / uuid.uuid4().hex
    folder.mkdir()  # without its parents: a task that outlives its ingest must not bring the folder back
    try:
        with task.where.spelling():
            return _write(task, folder, tick)
    except BaseException:
        shutil.rmtree(folder, ignore_errors=True)
        raise


def _write(task: WriteTask, folder: Path, tick: Tick) -> Written:
    look = task.look
    if _stamp(task.where.path) != look.stamp:
        raise InvalidDataError(
            f"{task.where.path} was changed while it was being ingested; ingest it again once it is complete"
        )
    with open_source(task.where.path, allow_links=task.where.allow_links) as file:
        data = from_h5ad(file, look.matrix, sha256=look.sha256)
        ids = task.choice.ids(FeatureTable.of_frame(data.var, data.source))
        part = MatrixPart(
            task.field_name,
            task.field_name,
            task.space,
            data,
            {task.layer: data.matrix},
            [data.matrix_name],
            task.choice,
            ids,
            task.allow_rounding,
        )
        assert part.features is not None
        features = part.features.table(task.new_features)
        if task.positions is not None:
            positions = task.positions
            part.order_features(lambda _space, _ids: positions)
        dataset = Dataset([part], Joined(part.ids, (np.arange(len(part.ids)),)), data.source)
        rows = cell_rows(dataset, task.dataset_uid, task.names, winner=None, edits=task.edits)
        scratch = folder / "scratch"
        scratch.mkdir()
        keep = np.ones(len(part.ids), bool)
        pointers = part.write(folder / GROUP, scratch, keep, task.storage, tick)
        shutil.rmtree(scratch)
    save_table(folder / CELLS, rows.append_column(task.field_name, pointers))
    save_table(folder / FEATURES, features)
    return Written(folder, dict(part.identity), part.source_name, len(part.ids))


def save_table(path: Path, table: pa.Table) -> None:
    """Write a table for :func:`load_table`."""
    with pa.OSFile(os.fspath(path), "wb") as sink, pa.ipc.new_file(sink, table.schema) as writer:
        writer.write_table(table)


def load_table(path: Path) -> pa.Table:
    """A table that :func:`save_table` wrote; in memory, so that the file may go."""
    with pa.OSFile(os.fspath(path), "rb") as source:
        return pa.ipc.open_file(source).read_all()


def _stamp(path: Path) -> tuple[int, int]:
    found = path.stat()
    return found.st_size, found.st_mtime_ns
