"""Archives one below the other, in one archive: also how a single one is rewritten."""

from __future__ import annotations

import os
import shutil
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Protocol

import numpy as np
import pyarrow as pa

from hbx_gpu._progress import Progress, checked
from hbx_gpu.errors import CorruptDataError
from hbx_gpu.scdl._format.archive import Archive, open_archive
from hbx_gpu.scdl._format.features import ObservedFeatureIndex, VariableFeatureIndex
from hbx_gpu.scdl._format.frames import Frame, StoredFrame
from hbx_gpu.scdl._format.names import read_obs_names, read_var_names
from hbx_gpu.scdl._format.neighbors import NeighborsUnusableError, NeighborTable
from hbx_gpu.scdl._format.values import Tolerance, check_dtype, widest
from hbx_gpu.scdl._writing.writer import ArchiveWriter, check_target

# Values that are copied at once.
COPY_SIZE = 10 * 1024 * 1024
_MOST_ROWS = 1 << 20


class Annotated(Protocol):
    """What an archive says of its rows and columns: an `Archive`, or what was kept of one in an atlas."""

    path: Path
    n_rows: int

    @property
    def var(self) -> VariableFeatureIndex:
        """Gene columns by row block."""
        ...

    @property
    def obs(self) -> ObservedFeatureIndex | None:
        """Cell columns by row block; None without any."""
        ...

    @property
    def bounds(self) -> np.ndarray:
        """Row bounds of the gene blocks, (n_blocks + 1,)."""
        ...

    @property
    def neighbors(self) -> NeighborTable | None:
        """Stored neighbors; None without any."""
        ...


def concat_archives(
    parts: Sequence[str | os.PathLike[str] | Archive],
    output: str | os.PathLike[str],
    *,
    data_dtype: str | None = None,
    tolerance: Tolerance | None = None,
    overwrite: bool = False,
    destroy: bool = False,
    copy_size: int = COPY_SIZE,
    progress: Progress | None = None,
) -> None:
    """Write the rows of several archives into one, in their order.

    Column numbers stay, each with the genes of its rows; neighbors are shifted to their new row numbers.
    The new archive appears at once and whole; the parts are left alone. One of them may be the output. Files
    and metadata keys that are not SCDL's come from the output if it is a part, else from the first part.

    Parameters
    ----------
    parts
        Archives, by path or opened. Any release and any dtypes; one may occur several times.
    output
        Folder of the new archive.
    data_dtype
        Dtype of the values. By default the widest of the parts, which must be all integers or all floats;
        ``auto`` for the smallest that holds all values exactly.
    tolerance
        What happens to values that the dtype does not hold.
    overwrite
        Whether an archive at the output may be replaced.
    destroy
        Remove the folders of the parts when the new archive is in its place.
    copy_size
        Values that are copied at once.
    progress
        Called with the rows done and their total.

    Raises
    ------
    FileExistsError
        The output exists and may not be replaced.
    ValueError
        No parts; integers mixed with floats; values that the dtype does not hold.
    CorruptDataError
        A part cannot be read.
    """
    progress = checked(progress)
    if not parts:
        raise ValueError("expected at least one archive, found none")
    if copy_size < 1:
        raise ValueError(f"expected a copy size of at least 1, found {copy_size}")
    if data_dtype is not None:
        check_dtype(data_dtype)
    check_target(output, overwrite=overwrite, foreign=True)
    archives = [part if isinstance(part, Archive) else open_archive(part) for part in parts]
    target = Path(output).resolve()
    inplace = any(archive.path.resolve() == target for archive in archives)
    dtype = data_dtype or widest([archive.data.dtype for archive in archives]).name
    total = sum(archive.n_rows for archive in archives)
    any_obs = any(_has_obs(archive) for archive in archives)
    with ArchiveWriter(
        output,
        n_columns=max(int(np.iinfo(archive.indices.dtype).max) for archive in archives) + 1,
        data_dtype=dtype,
        tolerance=tolerance,
        overwrite=overwrite,
        extras_from=target if inplace else archives[0].path,
    ) as writer:
        for archive in archives:
            append_neighbors(writer, archive, copy_size)
            append_frames(writer, archive, any_obs=any_obs)
            _append_source(writer, archive)
            for done in _append_rows(writer, archive, copy_size):
                progress(done, total)
    if destroy:
        for path in {archive.path.resolve() for archive in archives} - {target}:
            shutil.rmtree(path)


def _append_rows(writer: ArchiveWriter, archive: Archive, copy_size: int) -> Iterator[int]:
    archive.check_pointers()
    for first, last in _runs(archive.indptr, archive.n_rows, copy_size):
        indptr = archive.indptr[first : last + 1].astype(np.int64)
        values = slice(int(indptr[0]), int(indptr[-1]))
        where = f"{archive.path}, rows {first} to {last - 1}"
        writer.append_rows(indptr - indptr[0], archive.indices[values], archive.data[values], where=where)
        yield writer.n_rows


def _runs(indptr: np.ndarray, n_rows: int, size: int) -> Iterator[tuple[int, int]]:
    """Consecutive [first, last) with at most `size` elements each, or one row that has more."""
    first = 0
    while first < n_rows:
        ends = indptr[first + 1 : first + min(size, _MOST_ROWS) + 1]
        last = first + max(1, int(np.searchsorted(ends, int(indptr[first]) + size, side="right")))
        yield first, last
        first = last


def append_frames(writer: ArchiveWriter, archive: Annotated, *, any_obs: bool) -> None:
    """Append genes and cells of an archive; without cells, rows without columns where `any_obs`."""
    if archive.var.number_of_rows() != archive.n_rows:
        raise CorruptDataError(
            f"{archive.path} has room for {archive.n_rows} rows, but the genes of only "
            f"{archive.var.number_of_rows()}: it was allocated and never filled"
        )
    gene_names = read_var_names(archive.path, len(archive.var))
    for n_rows, frame, label, names in zip(
        np.diff(archive.bounds).tolist(), archive.var.frames, archive.var.labels, gene_names, strict=True
    ):
        known = None if names is None else names.tolist()
        writer.append_var(frame.table(), n_rows, label=str(label or ""), gene_names=known)
    if not any_obs:
        return
    obs, start = archive.obs, 0
    if obs is None or not len(obs):
        writer.append_obs(iter([pa.table({})]), archive.n_rows, label=str(archive.path))
        return
    cell_names = read_obs_names(archive.path, archive.n_rows)
    for block, (n_rows, frame, label) in enumerate(
        zip(np.diff(obs.bounds).tolist(), obs.frames, obs.labels, strict=True)
    ):
        if len(frame) and frame.n_rows != n_rows:
            raise CorruptDataError(
                f"{archive.path}, obs block {block}: expected {n_rows} rows, found {frame.n_rows}; restore "
                "the obs_features folder, or convert the source again"
            )
        names = None if cell_names is None else cell_names.slice(start, n_rows)
        writer.append_obs(_pieces(frame), n_rows, label=str(label or ""), cell_names=names)
        start += n_rows


def _has_obs(archive: Annotated) -> bool:
    return archive.obs is not None and len(archive.obs) > 0


def _pieces(frame: Frame) -> Iterator[pa.Table]:
    return frame.pieces() if isinstance(frame, StoredFrame) else iter([frame.table()])


def _append_source(writer: ArchiveWriter, archive: Archive) -> None:
    sources = archive.metadata.get("sources")
    if isinstance(sources, list) and _rows(sources) == archive.n_rows:
        writer.add_sources(sources)
    else:
        # Written by another program, or rows were appended by one: better nothing than a wrong file.
        writer.add_source(str(archive.path), archive.n_rows, "")


def _rows(sources: list[object]) -> int:
    return sum(int(source.get("rows", 0)) if isinstance(source, dict) else 0 for source in sources)


def append_neighbors(writer: ArchiveWriter, archive: Annotated, copy_size: int) -> None:
    """Append the neighbors of an archive, if it has any, for the rows that come next."""
    table = _neighbors(archive)
    if table is None:
        return
    first_row = writer.n_rows
    for first, last in _runs(table.indptr, len(table), copy_size):
        indptr = table.indptr[first : last + 1].astype(np.int64)
        links = slice(int(indptr[0]), int(indptr[-1]))
        others = table.indices[links].astype(np.int64) + first_row
        writer.append_neighbors(indptr - indptr[0], others, table.weights[links], first_row=first_row + first)


def _neighbors(archive: Annotated) -> NeighborTable | None:
    try:
        if (table := archive.neighbors) is not None:
            table.check()
        return table
    except NeighborsUnusableError as error:
        warnings.warn(f"Neighbors are left out: {error}", UserWarning, stacklevel=4)
        return None
