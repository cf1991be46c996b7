"""The only writer of archives: it streams them beside their target and moves them there in one step."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import TracebackType
from typing import BinaryIO

import numpy as np
import pyarrow as pa

from hbx_gpu._advice import option
from hbx_gpu._paths import checked
from hbx_gpu._untrusted import parse_json, read_small
from hbx_gpu._version import __version__
from hbx_gpu.errors import CorruptDataError, InvalidDataError
from hbx_gpu.scdl._format import names
from hbx_gpu.scdl._format.header import archive_header
from hbx_gpu.scdl._format.index_writer import FeatureFolder
from hbx_gpu.scdl._format.layout import (
    COL_PTR,
    DATA,
    HEADER,
    LAYOUT_VERSION,
    METADATA,
    NEIGHBOR_FILES,
    OBS_FEATURES,
    ROW_PTR,
    VAR_FEATURES,
    VERSION,
    FileNames,
)
from hbx_gpu.scdl._format.values import DEFAULT_DTYPE, Range, Tolerance, check_dtype, smallest_unsigned
from hbx_gpu.scdl._writing.new_folder import NewFolder

# What may lie in an archive and is written anew; everything else belongs to somebody else.
OWN_FILES = {*FileNames, *(f"{file}.tmp" for file in (DATA, ROW_PTR, COL_PTR)), names.FOLDER}
# Elements that are converted at once when a file is rewritten.
_PIECE = 1 << 20


class ArchiveWriter:
    """Writes an archive as its rows come; a context manager that puts it in its place when all went well.

    Until then the target is as it was, and after an error, an interrupt or a kill it stays so. Rows, genes
    and cells may come in any order relative to each other, each in the order of the rows.

    Parameters
    ----------
    target
        Folder of the archive.
    n_columns
        Upper bound of column indices; determines the width in which they are stored.
    data_dtype
        Dtype of the stored values, one of `values.DATA_DTYPES`, or ``auto`` for the smallest one that
        holds all values exactly.
    tolerance
        What happens to values that the dtype does not hold.
    overwrite
        Whether an archive at the target may be replaced.
    extras_from
        Archive whose foreign files and metadata keys are taken over.

    Raises
    ------
    FileExistsError
        The target exists and may not be replaced, or holds files that belong to no archive.
    """

    def __init__(
        self,
        target: str | os.PathLike[str],
        *,
        n_columns: int,
        data_dtype: str | None = DEFAULT_DTYPE,
        tolerance: Tolerance | None = None,
        overwrite: bool = False,
        extras_from: str | os.PathLike[str] | None = None,
    ) -> None:
        dtype = check_dtype(data_dtype)
        self._overwrite = overwrite
        self._extras_from = None if extras_from is None else Path(extras_from)
        check_target(target, overwrite=overwrite, foreign=extras_from is not None)
        self._staging = NewFolder(target)
        self.target, folder = self._staging.target, self._staging.folder
        self._open = contextlib.ExitStack()
        self._open.callback(self._staging.discard)
        with _closed_on_error(self._open):
            self._data = self._open.enter_context(_ValuesFile(folder / DATA, dtype, tolerance or Tolerance()))
            self._columns = self._open.enter_context(open(folder / COL_PTR, "wb"))  # noqa: SIM115
            self._pointers = self._open.enter_context(open(self._staging.scratch / ROW_PTR, "wb"))  # noqa: SIM115
            self._names = names.NamesWriter(folder)
        self._n_columns = n_columns
        self._column_dtype = smallest_unsigned(max(n_columns - 1, 0))
        self._var = FeatureFolder(folder / VAR_FEATURES, self._staging.scratch)
        self._obs = FeatureFolder(folder / OBS_FEATURES, self._staging.scratch)
        self._neighbors: _Neighbors | None = None
        self._sources: list[dict[str, object]] = []
        self.n_rows = 0
        self.n_values = 0

    @property
    def scratch(self) -> Path:
        """Existing folder for temporary files; goes with the writer."""
        return self._staging.scratch

    def __enter__(self) -> ArchiveWriter:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        with self._open:
            if error is None:
                self._finish()
                self._staging.publish(replace=self._overwrite)

    def append_rows(
        self, indptr: np.ndarray, indices: np.ndarray, values: np.ndarray, *, where: str = "the matrix"
    ) -> None:
        """The next rows, as a CSR block.

        Parameters
        ----------
        indptr
            (n + 1,), from 0.
        indices, values
            (nnz,). Kept in their order, repeats and explicit zeros included.
        where
            Description of the values, used in error messages.

        Raises
        ------
        InvalidDataError
            A column out of range, arrays that disagree, a value that the dtype does not hold.
        """
        if int(indptr[-1]) != len(indices) or len(indices) != len(values):
            raise InvalidDataError(
                f"{where}: indptr ends at {int(indptr[-1])}, but there are {len(indices)} indices and "
                f"{len(values)} values"
            )
        if len(indices) and not 0 <= int(indices.min()) <= int(indices.max()) < self._n_columns:
            raise InvalidDataError(
                f"{where}: columns {int(indices.min())} to {int(indices.max())}, expected 0 to "
                f"{self._n_columns - 1}"
            )
        self._data.append(values, where)
        _write(self._columns, indices.astype(self._column_dtype, copy=False))
        _write(self._pointers, np.asarray(indptr[1:]).astype(np.uint64) + np.uint64(self.n_values))
        self.n_rows += len(indptr) - 1
        self.n_values += len(indices)

    def append_var(
        self, table: pa.Table, n_rows: int, *, label: str, gene_names: Sequence[str] | None = None
    ) -> None:
        """The genes of the next `n_rows` rows; one block with the ones before if they are the same.

        Parameters
        ----------
        table
            One row per gene.
        n_rows
            Rows that have these genes.
        label
            File that they come from.
        gene_names
            Their names, where known.
        """
        if self._var.append_var(table, n_rows, label, gene_names):
            self._names.append_var(self._var.n_blocks - 1, gene_names)

    def append_obs(
        self, tables: Iterator[pa.Table], n_rows: int, *, label: str, cell_names: pa.Array | None = None
    ) -> None:
        """The next `n_rows` cells.

        Parameters
        ----------
        tables
            Their columns, in pieces of one schema.
        n_rows
            Rows of all pieces.
        label
            File that they come from.
        cell_names
            string, (n_rows,). Their names, where known.
        """
        self._obs.append_obs(tables, n_rows, label)
        self._names.append_obs(cell_names, n_rows)

    def append_neighbors(
        self, indptr: np.ndarray, indices: np.ndarray, weights: np.ndarray, *, first_row: int
    ) -> None:
        """Neighbors of some rows; rows that are left out have none.

        Parameters
        ----------
        indptr, indices, weights
            A CSR block, `indptr` from 0; indices are row numbers in the whole archive.
        first_row
            Its first row in the archive, not before the end of the last block.
        """
        if self._neighbors is None:
            self._neighbors = self._open.enter_context(_Neighbors(self._staging.folder))
        self._neighbors.append(indptr, indices, weights, first_row)

    def add_source(self, file: str, n_rows: int, matrix: str) -> None:
        """Record where the next `n_rows` rows come from."""
        self._sources.append({"file": file, "rows": n_rows, "matrix": matrix})

    def add_sources(self, sources: list[dict[str, object]]) -> None:
        """Record where the next rows come from, as `metadata.json` of another archive has it."""
        self._sources += sources

    def _finish(self) -> None:
        self._check()
        folder = self._staging.folder
        self._data.finish()
        _pad(self._columns, self._column_dtype)
        self._columns.close()
        self._pointers.close()
        pointer_dtype = self._write_pointers(folder / ROW_PTR)
        if self._neighbors is not None:
            self._neighbors.finish(self.n_rows)
        indices = (self._var.finish(), self._obs.finish())
        self._names.close()
        header = archive_header(
            {"DATA": self.n_values, "ROWPTR": self.n_rows + 1, "COLPTR": self.n_values},
            {"DATA": self._data.dtype, "ROWPTR": pointer_dtype, "COLPTR": self._column_dtype},
            indices,
        )
        (folder / HEADER).write_bytes(header.to_bytes())
        extras = {} if self._extras_from is None else carry_extras(self._extras_from, folder)
        own = {"num_rows": self.n_rows, "writer": f"hbx_gpu {__version__}", "sources": self._sources}
        (folder / METADATA).write_text(json.dumps({**extras, **own}))
        (folder / VERSION).write_text(json.dumps(LAYOUT_VERSION))

    def _check(self) -> None:
        counts = {"var": self._var.n_rows, "obs": self._obs.n_rows}
        if self._neighbors is not None:
            counts["neighbors"] = max(self._neighbors.n_rows, self.n_rows)
        # An archive without cell table is legal; one whose table is too short is not.
        wrong = {k: n for k, n in counts.items() if n != self.n_rows and not (k == "obs" and n == 0)}
        if wrong:
            raise InvalidDataError(f"{self.target}: expected {self.n_rows} rows in all parts, found {wrong}")

    def _write_pointers(self, path: Path) -> np.dtype:
        dtype = smallest_unsigned(self.n_values)
        with open(path, "wb") as out:
            _write(out, np.zeros(1, dtype))
            for piece in _pieces(self._staging.scratch / ROW_PTR, np.dtype(np.uint64)):
                _write(out, piece.astype(dtype))
        return dtype


@contextlib.contextmanager
def _closed_on_error(stack: contextlib.ExitStack) -> Iterator[None]:
    try:
        yield
    except BaseException:
        stack.close()
        raise


class _ValuesFile(contextlib.AbstractContextManager["_ValuesFile"]):
    """`data.npy` in the making; rewritten in a wider dtype when ``auto`` finds values that need it."""

    def __init__(self, path: Path, dtype: str, tolerance: Tolerance) -> None:
        self._path, self._tolerance = path, tolerance
        self._range = Range() if dtype == "auto" else None
        self.dtype = self._range.dtype() if self._range is not None else np.dtype(dtype)
        self._file: BinaryIO = open(path, "wb")  # noqa: SIM115  closed by __exit__

    def append(self, values: np.ndarray, where: str) -> None:
        if self._range is not None:
            self._range.add(values)
            self._widen(self._range.dtype(), where)
        _write(self._file, self._tolerance.cast(values, self.dtype, where))

    def _widen(self, dtype: np.dtype, where: str) -> None:
        if dtype == self.dtype:
            return
        self._file.close()
        wider = self._path.with_name(self._path.name + ".wider")
        self._file = open(wider, "wb")  # noqa: SIM115  closed by __exit__
        for piece in _pieces(self._path, self.dtype):
            _write(self._file, self._tolerance.cast(piece, dtype, where))
        os.replace(wider, self._path)
        self.dtype = dtype

    def finish(self) -> None:
        _pad(self._file, self.dtype)
        self._file.close()

    def __exit__(self, *error: object) -> None:
        self._file.close()


class _Neighbors(contextlib.AbstractContextManager["_Neighbors"]):
    """The three neighbor files in the making."""

    def __init__(self, folder: Path) -> None:
        self._open = contextlib.ExitStack()
        self._indptr, self._indices, self._values = (
            self._open.enter_context(open(folder / name, "wb"))  # noqa: SIM115
            for name in NEIGHBOR_FILES
        )
        _write(self._indptr, np.zeros(1, np.uint64))
        self._n_links = 0
        self.n_rows = 0

    def append(self, indptr: np.ndarray, indices: np.ndarray, weights: np.ndarray, first_row: int) -> None:
        self._skip_to(first_row)
        if len(indices) and int(indices.max()) > np.iinfo(np.uint32).max:
            raise InvalidDataError(
                f"neighbor {int(indices.max())} needs more than the 32 bits that an archive has for it; "
                "split the data into several archives"
            )
        _write(self._indptr, np.asarray(indptr[1:]).astype(np.uint64) + np.uint64(self._n_links))
        _write(self._indices, indices.astype(np.uint32))
        with np.errstate(over="ignore"):
            _write(self._values, weights.astype(np.float32))
        self.n_rows += len(indptr) - 1
        self._n_links += len(indices)

    def _skip_to(self, row: int) -> None:
        if row < self.n_rows:
            raise ValueError(f"neighbors of row {row} come after those of row {self.n_rows - 1}")
        _write(self._indptr, np.full(row - self.n_rows, self._n_links, np.uint64))
        self.n_rows = row

    def finish(self, n_rows: int) -> None:
        self._skip_to(n_rows)
        _pad(self._indices, np.dtype(np.uint32))
        _pad(self._values, np.dtype(np.float32))
        self._open.close()

    def __exit__(self, *error: object) -> None:
        self._open.close()


def allocate(target: str | os.PathLike[str], *, n_rows: int, n_elements: int) -> None:
    """Make an archive with room for `n_elements` values in `n_rows` rows, all zero, without genes and cells.

    Raises
    ------
    FileExistsError
        The target exists.
    """
    check_target(target, overwrite=False)
    staging = NewFolder(target)
    try:
        folder = staging.folder
        dtypes: dict[str, np.dtype] = {
            "DATA": np.dtype("f4"),
            "ROWPTR": np.dtype("u8"),
            "COLPTR": np.dtype("u4"),
        }
        lengths = {"DATA": n_elements, "ROWPTR": n_rows + 1, "COLPTR": n_elements}
        for name, file in (("DATA", DATA), ("ROWPTR", ROW_PTR), ("COLPTR", COL_PTR)):
            with open(folder / file, "wb") as out:
                out.truncate(lengths[name] * dtypes[name].itemsize)
        indices = [
            FeatureFolder(folder / name, staging.scratch).finish() for name in (VAR_FEATURES, OBS_FEATURES)
        ]
        (folder / HEADER).write_bytes(archive_header(lengths, dtypes, indices).to_bytes())
        (folder / METADATA).write_text(json.dumps({"num_rows": n_rows}))
        (folder / VERSION).write_text(json.dumps(LAYOUT_VERSION))
        staging.publish(replace=False)
    finally:
        staging.discard()


def copy_archive(source: str | os.PathLike[str], target: str | os.PathLike[str]) -> None:
    """Copy an archive as it is; the copy appears at once and whole.

    Raises
    ------
    FileExistsError
        The target exists.
    """
    check_target(target, overwrite=False)
    staging = NewFolder(target)
    try:
        for path in sorted(Path(source).rglob("*")):
            # Contents only: the source may be read-only.
            copy = staging.folder / path.relative_to(source)
            copy.mkdir() if path.is_dir() else shutil.copyfile(path, copy)
        staging.publish(replace=False)
    finally:
        staging.discard()


def check_target(target: str | os.PathLike[str], *, overwrite: bool, foreign: bool = False) -> None:
    """Refuse a target that must not be replaced.

    Parameters
    ----------
    target
        Where an archive is to be made.
    overwrite
        Whether an archive there may be replaced.
    foreign
        Whether foreign files in the target are allowed, because they are taken over.

    Raises
    ------
    FileExistsError
        The target must not be replaced; the message says why.
    """
    path = Path(checked(target))
    if not os.path.lexists(path):
        return
    if not overwrite:
        raise FileExistsError(
            f"Output directory already exists: {path}. Open it without a source, choose another path, or "
            f"replace it with {option('overwrite', 'True')}"
        )
    others = (
        sorted(p.name for p in path.iterdir() if p.name not in OWN_FILES) if path.is_dir() else [path.name]
    )
    if others and not foreign:
        raise FileExistsError(
            f"{path} is to be replaced, but holds what belongs to no SCDL archive: {others[:5]}; move it "
            "away, or choose another path"
        )


def carry_extras(source: Path, folder: Path) -> dict[str, object]:
    """Take over files that do not belong to the format; returns the metadata of `source`."""
    for path in source.iterdir():
        if path.name in OWN_FILES:
            continue
        if path.is_dir() and not path.is_symlink():
            shutil.copytree(path, folder / path.name, symlinks=True)
        else:
            shutil.copy2(path, folder / path.name, follow_symlinks=False)
    return read_metadata(source)


def read_metadata(archive: str | os.PathLike[str]) -> dict[str, object]:
    """Content of an archive's `metadata.json`; empty if that is missing or no JSON object."""
    file = Path(archive) / METADATA
    try:
        found = parse_json(read_small(file), file)
    except (OSError, CorruptDataError):
        return {}
    return found if isinstance(found, dict) else {}


def _write(file: BinaryIO, array: np.ndarray) -> None:
    file.write(np.ascontiguousarray(array).data)


def _pad(file: BinaryIO, dtype: np.dtype) -> None:
    """One zero where there would be nothing: a file without bytes cannot be mapped, SCDL fails on it."""
    if not file.tell():
        _write(file, np.zeros(1, dtype))


def _pieces(path: Path, dtype: np.dtype) -> Iterator[np.ndarray]:
    left = path.stat().st_size // dtype.itemsize
    with open(path, "rb") as file:
        while left:
            # As much as there is: `fromfile` allocates what it is asked for.
            piece = np.fromfile(file, dtype, min(left, _PIECE))
            left -= len(piece)
            yield piece
