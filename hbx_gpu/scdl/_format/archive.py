"""An archive opened read-only: memory maps with the true dtypes, its row blocks, and lazily all the rest.

Which file is right where they disagree, and what is refused, is decided here. Nothing is written or created,
no file can call code, and the cost does not depend on the number of cells.
"""

from __future__ import annotations

import os
import re
import warnings
from functools import cached_property
from pathlib import Path
from typing import Literal

import numpy as np
import numpy.typing as npt

from hbx_gpu._paths import checked
from hbx_gpu._remote.places import is_remote
from hbx_gpu._untrusted import NO_LINK, check_tree, parse_json, read_small
from hbx_gpu.errors import CorruptDataError, RemotePathError
from hbx_gpu.scdl._format.dtype_evidence import contradiction, sample, value_dtype
from hbx_gpu.scdl._format.features import ObservedFeatureIndex, VariableFeatureIndex, var_folder
from hbx_gpu.scdl._format.header import Header, read_header
from hbx_gpu.scdl._format.layout import (
    COL_PTR,
    DATA,
    ENDS,
    HEADER,
    METADATA,
    OBS_FEATURES,
    OLD_FEATURES,
    ROW_PTR,
    VERSION,
)
from hbx_gpu.scdl._format.neighbors import NeighborTable, open_neighbors

# Without a header.
_ASSUMED: dict[str, np.dtype] = {ROW_PTR: np.dtype("u8"), COL_PTR: np.dtype("u4"), DATA: np.dtype("f4")}
_WIDTHS = (1, 2, 4, 8)
# Pointers are checked in stretches of so many rows, when their first row is read.
_STRETCH = 1 << 20
# Columns from here on, where fewer genes are recorded, are narrower ones taken together.
_MOST_GENES = 1 << 16
# An archive of more values is not searched for columns beyond its recorded genes.
_MEASURED = 1 << 28


class IncompleteArchiveError(CorruptDataError, FileNotFoundError):
    """A file that every finished archive has is missing."""

    __str__ = Exception.__str__


class Archive:
    """An opened archive; made by :func:`open_archive`.

    Attributes
    ----------
    path
        The folder.
    data, indices, indptr
        (nnz,), (nnz,), (n_rows + 1,). Values, columns and row pointers: read-only memory maps, in stored
        dtypes. Columns count within the genes of the row's block, may be unsorted and may repeat in a row.
    n_rows, nnz
        Rows and values that the pointers span.
    var, obs
        Feature indices; `obs` is None in archives without one (up to release 0.1.2).
    bounds
        int64, (n_blocks + 1,). Gene block ``b`` covers rows ``bounds[b]`` to ``bounds[b + 1] - 1``.
    header
        As stored (its lengths and dtypes may be stale), or None.
    metadata
        Content of `metadata.json`; its row count may be stale.
    version
        Release that wrote the archive, as it says, or an empty string.
    allow_links
        Whether links that lead out of the folder are followed.
    """

    def __init__(
        self,
        path: Path,
        *,
        data_dtype: str | None = None,
        writable: bool = False,
        allow_links: bool = False,
    ) -> None:
        self.path = path
        self.allow_links = allow_links
        # A FIFO would be waited for, a device read without end; what is written goes through no link.
        check_tree(path, links=allow_links and not writable, remedy=NO_LINK if writable else None)
        self._mode: Literal["r", "r+"] = "r+" if writable else "r"
        self.metadata = _read_metadata(path)
        self.version = _read_version(path)
        _refuse_unfinished(path)
        self.header = _read_header(path)
        self.var, old_layout = _open_var(path)
        # Only these wrote values in any dtype of their source.
        self._old = old_layout or re.match(r"0\.(0|1\.[012])(\.|$)", self.version) is not None
        self.bounds = self.var.bounds
        self.indptr = self._open_pointers()
        self.n_rows = len(self.indptr) - 1
        self.nnz = int(self.indptr[-1])
        self._checked = np.zeros(-(-max(self.n_rows, 1) // _STRETCH), bool)
        self._check_pointers(0)
        self.indices = self._open_columns()
        self.data = self._open_values(data_dtype)
        # Slicing a memmap object costs several times as much.
        self._values, self._columns = np.asarray(self.data), np.asarray(self.indices)
        self._pointers = np.asarray(self.indptr)
        self._override = data_dtype
        self._obs = _open_obs(path, self.n_rows)

    def __getstate__(self) -> dict[str, object]:
        # Workers map the files themselves.
        return {"path": self.path, "data_dtype": self._override, "allow_links": self.allow_links}

    def __setstate__(self, state: dict[str, object]) -> None:
        with warnings.catch_warnings():
            # The warning was given when it was first opened.
            warnings.simplefilter("ignore", UserWarning)
            self.__init__(**state)  # type: ignore[misc]

    @property
    def obs(self) -> ObservedFeatureIndex | None:
        """The cell columns; None without them.

        Raises
        ------
        CorruptDataError
            The columns belong to another number of cells.
        """
        if self._obs is not None and len(self._obs) and self._obs.number_of_rows() != self.n_rows:
            raise CorruptDataError(_obs_mismatch(self.path, self._obs, self.n_rows))
        return self._obs

    @cached_property
    def neighbors(self) -> NeighborTable | None:
        """The stored neighbors, None without their files.

        Raises
        ------
        NeighborsUnusableError
            The files are damaged or made for another number of cells.
        """
        return open_neighbors(self.path, self.n_rows)

    @cached_property
    def n_vars(self) -> list[int]:
        """Genes per block as recorded; columns may exceed them, see :meth:`width`."""
        return self.var.column_dims()

    @cached_property
    def _widths(self) -> dict[int, int]:
        return {}

    def width(self, block: int) -> int:
        """Columns of a dense row of a block: its recorded genes, or more where columns exceed them.

        The real package stores `raw.X` beside the genes of a smaller `X`. The block's columns are searched
        once for the largest, in archives of up to 2**28 values; larger ones are taken to be as recorded.
        """
        if block not in self._widths:
            width = self.n_vars[block]
            start, stop = (int(self.indptr[row]) for row in self.bounds[block : block + 2])
            if self.nnz <= _MEASURED:
                for first in range(start, stop, _STRETCH):
                    width = max(width, int(self.indices[first : min(first + _STRETCH, stop)].max()) + 1)
            self._widths[block] = width
        return self._widths[block]

    def block_of(self, rows: npt.ArrayLike) -> np.ndarray:
        """int64, like `rows`. The gene block of each row; rows must be in range."""
        result: np.ndarray = np.searchsorted(self.bounds, rows, side="right") - 1
        return result

    @cached_property
    def max_width(self) -> int:
        """The widest of all blocks, as :meth:`width` has them; 0 without blocks."""
        return max((self.width(block) for block in range(len(self.n_vars))), default=0)

    def segment(self, row: int) -> tuple[int, int]:
        """First and last + 1 element of a row in `data` and `indices`; `row` must be in range.

        Raises
        ------
        CorruptDataError
            The row pointers around the row descend.
        """
        self._check_pointers(row)
        return int(self._pointers[row]), int(self._pointers[row + 1])

    def row(self, row: int) -> tuple[np.ndarray, np.ndarray]:
        """Values and columns of a row: read-only views in stored dtypes; otherwise as :meth:`segment`."""
        start, stop = self.segment(row)
        return self._values[start:stop], self._columns[start:stop]

    def gather(self, rows: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Rows in any order, as CSR.

        Parameters
        ----------
        rows
            Integers in range.

        Returns
        -------
        values, columns
            (nnz of the rows,), stored dtypes, copies.
        offsets
            int64, (n + 1,).
        """
        rows = np.asarray(rows, np.int64)
        for stretch in np.unique(rows // _STRETCH).tolist():
            self._check_pointers(stretch * _STRETCH)
        starts = self._pointers[rows].astype(np.int64)
        offsets = np.zeros(len(rows) + 1, np.int64)
        np.cumsum(self._pointers[rows + 1].astype(np.int64) - starts, out=offsets[1:])
        places = np.arange(offsets[-1]) + np.repeat(starts - offsets[:-1], np.diff(offsets))
        return self._values[places], self._columns[places], offsets

    def check_pointers(self) -> None:
        """Check all row pointers, which reading does only around the rows it reads.

        Raises
        ------
        CorruptDataError
            They descend somewhere; names the row.
        """
        for row in range(0, max(self.n_rows, 1), _STRETCH):
            self._check_pointers(row)

    def _check_pointers(self, row: int) -> None:
        stretch = row // _STRETCH
        if self._checked[stretch]:
            return
        first = stretch * _STRETCH
        pointers = self.indptr[first : first + _STRETCH + 1]
        descents = np.flatnonzero(pointers[1:] < pointers[:-1])
        if len(descents) or int(pointers[-1]) > self.nnz:
            at = first + (int(descents[0]) if len(descents) else len(pointers) - 2)
            raise CorruptDataError(
                f"{self.path / ROW_PTR}: expected ascending pointers up to {self.nnz}, found "
                f"{self.indptr[at]} and then {self.indptr[at + 1]} at row {at}; the file is damaged, convert "
                "the source again"
            )
        self._checked[stretch] = True

    def _stated(self, name: str) -> np.dtype | None:
        dtype = self.header.dtype(name) if self.header is not None else None
        return dtype if dtype is None or name == "DATA" or dtype.kind == "u" else None

    def _open_pointers(self) -> np.ndarray:
        file = self.path / ROW_PTR
        size = _size(file)
        stated = self._stated("ROWPTR") or _ASSUMED[ROW_PTR]
        if len(self.var):
            expected = self.var.number_of_rows() + 1
            width, rest = divmod(size, expected)
            found = f"{size} bytes, which are {size / stated.itemsize:.12g} pointers of {stated}"
            # Releases widen pointers without telling the header; none narrows them.
            if rest or width not in _WIDTHS or (self._stated("ROWPTR") and width < stated.itemsize):
                raise CorruptDataError(
                    f"{file}: expected {expected} row pointers ({expected - 1} rows in "
                    f"{var_folder(self.path) / ENDS}), found {found}. {_advice(file)}"
                )
            dtype = np.dtype(f"u{width}")
        else:
            dtype = stated
            if size % dtype.itemsize or not size:
                raise CorruptDataError(
                    f"{file}: expected pointers of {dtype}, found {size} bytes. {_advice(file)}"
                )
        pointers = np.memmap(file, dtype, mode=self._mode)
        if int(pointers[0]) != 0 or int(pointers[-1]) < int(pointers[len(pointers) // 2]):
            raise CorruptDataError(
                f"{file}: expected {dtype} pointers that ascend from 0, found {pointers[0]} first and "
                f"{pointers[-1]} last. {_advice(file)}"
            )
        if dtype != stated and self.header is not None:
            _say(
                f"{file}: the header says {stated}, but {len(pointers)} pointers take {size} bytes: "
                f"they are {dtype}"
            )
        return pointers

    def _open_columns(self) -> np.ndarray:
        file = self.path / COL_PTR
        size = _size(file)
        stated = self._stated("COLPTR") or _ASSUMED[COL_PTR]
        if not self.nnz:
            return self._no_values(file, size, stated)
        width, rest = divmod(size, self.nnz)
        known = self._stated("COLPTR") is not None or self._old
        if rest or width not in _WIDTHS or (known and width < stated.itemsize):
            raise CorruptDataError(
                f"{file}: expected {self.nnz} columns (the last entry of {ROW_PTR}), found {size} bytes, "
                f"which are {size / stated.itemsize:.12g} of {stated}. {_advice(file)}"
            )
        columns = np.memmap(file, np.dtype(f"u{width}"), mode=self._mode)
        if width != stated.itemsize or self.header is None:
            self._check_width(file, columns, stated)
        return columns

    def _check_width(self, file: Path, columns: np.ndarray, stated: np.dtype) -> None:
        """Columns of another width than stated are believed only where they are columns of genes."""
        genes = max(self.n_vars, default=0)
        too_narrow = genes - 1 > np.iinfo(columns.dtype).max
        seen = sample(columns)
        # The upper halves of wider columns are zeros; column 0 itself is rarely that frequent.
        halves = genes > 8 and (seen == 0).mean() > 0.25
        # As expected, they may exceed recorded genes (raw.X beside those of X), but not like joined ones.
        most = genes if columns.dtype != stated else max(genes, _MOST_GENES)
        if too_narrow or halves or int(seen.max()) >= most:
            raise CorruptDataError(
                f"{file}: its size makes the columns {columns.dtype} "
                f"({'the header says' if self.header is not None else 'expected without a header is'} "
                f"{stated}), and they are unlikely to be columns of {genes} genes. {_advice(file)}"
            )
        if self.header is not None:
            _say(f"{file}: the header says {stated}, but {self.nnz} columns are {columns.dtype}")

    def _open_values(self, override: str | None) -> np.ndarray:
        file = self.path / DATA
        size = _size(file)
        stated = self._stated("DATA")
        if not self.nnz:
            return self._no_values(file, size, np.dtype(override) if override else stated or _ASSUMED[DATA])
        if override is not None:
            dtype = np.dtype(override)
            if size != self.nnz * dtype.itemsize:
                raise CorruptDataError(
                    f"{file}: expected {self.nnz * dtype.itemsize} bytes for {self.nnz} values of the "
                    f"data_dtype asked for, {dtype}, found {size}"
                    f"{f' (the header says {stated})' if stated else ''}. Open without data_dtype"
                )
            if reason := contradiction(np.memmap(file, np.uint8, mode=self._mode), dtype):
                raise ValueError(
                    f"{file}: data_dtype {dtype} was asked for, but {reason}; open without data_dtype"
                )
            return np.memmap(file, dtype, mode=self._mode)
        raw = np.memmap(file, np.uint8, mode=self._mode) if size else np.empty(0, np.uint8)
        dtype, notice = value_dtype(raw, self.nnz, stated, old=self._old, where=str(file))
        if notice:
            _say(notice)
        return np.memmap(file, dtype, mode=self._mode)

    def _no_values(self, file: Path, size: int, dtype: np.dtype) -> np.ndarray:
        """The array of an archive whose pointers are all 0: one element of padding, or room to be filled."""
        if len(self.var) and size not in (0, *_WIDTHS):
            raise CorruptDataError(
                f"{file}: expected no values (the last entry of {ROW_PTR} is 0), found {size} bytes. "
                f"{_advice(file)}"
            )
        if len(self.var) or size < dtype.itemsize:
            return np.empty(0, dtype)
        return np.memmap(file, dtype, mode=self._mode, shape=(size // dtype.itemsize,))


def local_archive(path: str | os.PathLike[str]) -> str | os.PathLike[str]:
    """The path of an archive whose files are mapped into memory, without ``file://``.

    Raises
    ------
    RemotePathError
        It is an address.
    """
    if is_remote(path):
        raise RemotePathError(
            f"{os.fspath(path)} is in object storage, and archives are opened here by mapping local files: "
            "read the cells where they lie with hbx_gpu.open(url), make an archive there with hbx-gpu "
            "convert, or copy this one to a local disk"
        )
    return checked(path) if os.fspath(path).startswith("file:") else path


def open_archive(
    path: str | os.PathLike[str],
    *,
    data_dtype: str | None = None,
    writable: bool = False,
    allow_links: bool = False,
) -> Archive:
    """Open an archive that is there, for reading only.

    Parameters
    ----------
    path
        The folder.
    data_dtype
        Dtype of the stored values, where you know better than header and values.
    writable
        Map the files for writing, to fill an archive that was made with room only.
    allow_links
        Follow links that lead out of the folder. Nothing is written through them in any case.

    Raises
    ------
    FileNotFoundError
        No such folder; or (`IncompleteArchiveError`) a file is missing that a finished archive has.
    CorruptDataError
        Files disagree in a way that leaves more than one possible content.
    UnsupportedError
        A header of a later major version.
    UnsafePathError
        A link that leads out of the folder; a FIFO, a socket or a device in it.
    RemotePathError
        The path is an address; :func:`hbx_gpu.open` reads archives in object storage.

    Warns
    -----
    UserWarning
        The header is missing or wrong, and what was established instead.
    """
    folder = Path(os.path.abspath(local_archive(path)))
    if not folder.is_dir():
        raise FileNotFoundError(f"expected the folder of an SCDL archive, found nothing at {folder}")
    return Archive(folder, data_dtype=data_dtype, writable=writable, allow_links=allow_links)


def _say(notice: str) -> None:
    warnings.warn(notice, UserWarning, stacklevel=4)


def _size(file: Path) -> int:
    try:
        return file.stat().st_size
    except FileNotFoundError:
        raise IncompleteArchiveError(
            f"The mmap file at {file} is missing: the archive is damaged or unfinished. Restore it, or "
            "convert the source again"
        ) from None


def _advice(file: Path) -> str:
    if Path(f"{file}.tmp").exists():
        return f"{file.name}.tmp beside it is the good copy of an interrupted dtype change: restore it"
    return "An interrupted conversion or concatenation leaves such files: restore or convert them again"


def _refuse_unfinished(path: Path) -> None:
    """Leftovers of an interrupted dtype change: the file beside may be any part of what it should be."""
    for name in (ROW_PTR, COL_PTR, DATA):
        copy = path / f"{name}.tmp"
        if copy.exists():
            found = f"{_size(path / name)} bytes" if (path / name).exists() else "nothing"
            raise CorruptDataError(
                f"{path}: a dtype change or concatenation was interrupted. {copy.name} ({_size(copy)} bytes) "
                f"is the good copy of {name} ({found}): move it to {name}, and open again; the other files "
                "are checked against it then"
            )


def _read_metadata(path: Path) -> dict[str, object]:
    file = path / METADATA
    try:
        found = parse_json(read_small(file), file)
    except FileNotFoundError:
        raise IncompleteArchiveError(
            f"the metadata file {file} does not exist: a conversion was stopped before it was complete, or "
            "this is not an SCDL archive. Remove the folder and convert the source again"
        ) from None
    return found if isinstance(found, dict) else {}


def _read_version(path: Path) -> str:
    try:
        found = parse_json(read_small(path / VERSION), path / VERSION)
    except (OSError, CorruptDataError):
        return ""
    return found if isinstance(found, str) else ""


def _read_header(path: Path) -> Header | None:
    file = path / HEADER
    try:
        header = read_header(file)
    except FileNotFoundError:
        _say(f"SCDL header missing at {file}: dtypes are established from the sizes of the files")
        return None
    except CorruptDataError as error:
        _say(f"Failed to load SCDL header ({error}): dtypes are established from the sizes of the files")
        return None
    return header


def _open_var(path: Path) -> tuple[VariableFeatureIndex, bool]:
    """The gene index, and whether it lies where releases up to 0.1.2 put it."""
    folder = var_folder(path)
    if not folder.is_dir():
        raise IncompleteArchiveError(
            f"{path} has neither var_features nor features: the number of rows and the genes are not known. "
            "Restore the folder, or convert the source again"
        )
    try:
        return VariableFeatureIndex.load(folder), folder.name == OLD_FEATURES
    except FileNotFoundError as error:
        raise IncompleteArchiveError(f"{error}; restore it, or convert the source again") from None


def _open_obs(path: Path, n_rows: int) -> ObservedFeatureIndex | None:
    folder = path / OBS_FEATURES
    if not folder.is_dir():
        return None
    try:
        obs = ObservedFeatureIndex.load(folder)
    except FileNotFoundError as error:
        raise IncompleteArchiveError(f"{error}; restore it, or convert the source again") from None
    if len(obs) and obs.number_of_rows() != n_rows:
        _say(_obs_mismatch(path, obs, n_rows))
    return obs


def _obs_mismatch(path: Path, obs: ObservedFeatureIndex, n_rows: int) -> str:
    return (
        f"{path / OBS_FEATURES}: cell columns of {obs.number_of_rows()} rows, but the archive has "
        f"{n_rows}: they cannot be used. Restore the folder, or convert the source again"
    )
