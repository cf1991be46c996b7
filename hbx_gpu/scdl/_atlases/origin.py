"""Keeps the parts of an archive that the tables of an atlas cannot hold, so that converting back is exact.

``scdl_origin/`` in an atlas holds the archive's feature folders, names and neighbors as they were, and
``origin.json``: the snapshot that was taken right after the conversion, and the archive's dtypes. It speaks
for that snapshot only; whatever is added to the atlas later comes from its own tables.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
from dataclasses import asdict, dataclass, fields
from functools import cached_property
from pathlib import Path
from reprlib import repr as shown

import numpy as np

from hbx_gpu._untrusted import check_tree, parse_json, read_small
from hbx_gpu.errors import CorruptDataError
from hbx_gpu.scdl._format import names
from hbx_gpu.scdl._format.archive import Archive
from hbx_gpu.scdl._format.features import ObservedFeatureIndex, VariableFeatureIndex, var_folder
from hbx_gpu.scdl._format.layout import METADATA, NEIGHBOR_FILES, OBS_FEATURES, OLD_FEATURES, VAR_FEATURES
from hbx_gpu.scdl._format.neighbors import NeighborTable, open_neighbors
from hbx_gpu.scdl._format.values import DATA_DTYPES
from hbx_gpu.scdl._writing.writer import read_metadata

FOLDER = "scdl_origin"
_RECORD = "origin.json"
_KEPT = (VAR_FEATURES, OLD_FEATURES, OBS_FEATURES, names.FOLDER, METADATA, *NEIGHBOR_FILES)
# Least and greatest number of each count in the record; columns are stored in 1 to 8 bytes.
_COUNTS = {"snapshot": (0, 2**63 - 1), "n_rows": (0, 2**63 - 1), "n_columns": (1, 2**64)}


@dataclass(frozen=True, slots=True)
class _Record:
    snapshot: int
    n_rows: int
    layer: str
    data_dtype: str
    n_columns: int


class Origin:
    """The archive that an atlas was made of, without its matrix; in the shape of an `Archive`.

    Attributes
    ----------
    path
        Folder with the parts that were kept.
    n_rows, data_dtype, n_columns
        Number of rows of the archive, dtype of its values, and upper bound of its column numbers.
    layer
        Layer of the atlas that holds the values.
    """

    def __init__(self, path: Path, record: _Record) -> None:
        self.path, self.n_rows, self.layer = path, record.n_rows, record.layer
        self.data_dtype, self.n_columns = record.data_dtype, record.n_columns

    @cached_property
    def var(self) -> VariableFeatureIndex:
        """Gene columns."""
        return VariableFeatureIndex.load(var_folder(self.path))

    @cached_property
    def obs(self) -> ObservedFeatureIndex | None:
        """Cell columns."""
        folder = self.path / OBS_FEATURES
        return ObservedFeatureIndex.load(folder) if folder.is_dir() else None

    @property
    def bounds(self) -> np.ndarray:
        """Row bounds of the gene blocks."""
        return self.var.bounds

    @cached_property
    def neighbors(self) -> NeighborTable | None:
        """Stored neighbors."""
        return open_neighbors(self.path, self.n_rows)

    @cached_property
    def metadata(self) -> dict[str, object]:
        """Content of `metadata.json`."""
        return read_metadata(self.path)


def keep(archive: Archive, atlas: Path, snapshot: int, layer: str) -> None:
    """Store the parts of an archive that the tables of an atlas do not hold."""
    folder, temporary = atlas / FOLDER, atlas / f".{FOLDER}.new"
    for path in (folder, temporary):
        shutil.rmtree(path, ignore_errors=True)
    temporary.mkdir()
    for name in _KEPT:
        source = archive.path / name
        if source.is_dir():
            shutil.copytree(source, temporary / name)
        elif source.is_file():
            shutil.copyfile(source, temporary / name)
    n_columns = int(np.iinfo(archive.indices.dtype).max) + 1
    record = _Record(snapshot, archive.n_rows, layer, archive.data.dtype.name, n_columns)
    (temporary / _RECORD).write_text(json.dumps(asdict(record)) + "\n")
    os.rename(temporary, folder)


def find(atlas: Path, snapshot: int, *, allow_links: bool = False) -> Origin | None:
    """The kept parts of the archive from which a snapshot was converted; None if there was none.

    Raises
    ------
    CorruptDataError
        The record cannot be read.
    UnsafePathError
        The folder holds something else than files and folders, or links lead out of the atlas.
    """
    file = atlas / FOLDER / _RECORD
    if not file.parent.is_dir():
        return None
    # As in an archive: a FIFO would be waited for, a link could show the content of another file.
    check_tree(file.parent, links=allow_links, root=atlas)
    with contextlib.suppress(FileNotFoundError):
        try:
            record = _parse(parse_json(read_small(file), file))
        except CorruptDataError as error:
            raise CorruptDataError(
                f"{file} is damaged: {error}. Remove the folder {FOLDER}: the atlas is complete without it"
            ) from None
        return Origin(file.parent, record) if record.snapshot == snapshot else None
    return None


def _parse(document: object) -> _Record:
    expected = {field.name for field in fields(_Record)}
    if not isinstance(document, dict) or set(document) != expected:
        raise CorruptDataError(f"an object with {sorted(expected)} is expected, found {shown(document)}")
    for name, (first, last) in _COUNTS.items():
        if type(document[name]) is not int or not first <= document[name] <= last:
            raise CorruptDataError(f"{name} is {shown(document[name])}, expected {first} to {last}")
    if not isinstance(document["layer"], str):
        raise CorruptDataError(f"layer is {shown(document['layer'])}, expected a name")
    if document["data_dtype"] not in DATA_DTYPES:
        raise CorruptDataError(
            f"data_dtype is {shown(document['data_dtype'])}, expected one of {DATA_DTYPES}"
        )
    return _Record(**document)
