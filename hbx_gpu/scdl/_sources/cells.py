"""Archives as Sources: files become chunk tables, blocks share one feature axis, cells are a dataset."""

from __future__ import annotations

import os
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from hbx_gpu._datasets.cells import CellDataset
from hbx_gpu._source import ObsColumns, RowIndex, Source
from hbx_gpu._storage.plain import plain_layout
from hbx_gpu.errors import InvalidDataError, UnknownNameError
from hbx_gpu.scdl._format.archive import Archive, open_archive
from hbx_gpu.scdl._format.frames import MemoryFrame, cast, common_type
from hbx_gpu.scdl._format.layout import COL_PTR, DATA
from hbx_gpu.scdl._format.names import read_obs_names, read_var_names
from hbx_gpu.scdl._sources.axis import GeneBlock, gene_axis

if TYPE_CHECKING:
    from hbx_gpu.scdl._sources.pairs import PairedDataset

LAYER = "X"
SPACE = "gene_expression"
_PIECE = 1 << 20  # rows that are looked at together
OBS_NAME = "obs_name"
"""Metadata column with the names of the cells, of archives that know them and have no such column."""


@dataclass(frozen=True, slots=True)
class ArchiveRecipe:
    """How to open a dataset again in another process.

    Attributes
    ----------
    paths, dtypes
        The archives, and the dtypes of their values as established when they were opened first.
    metadata_columns, feature_id, strip_versions, reader
        As for :func:`to_cell_dataset`.
    allow_links
        Whether links that lead out of each archive are followed.
    """

    paths: tuple[str, ...]
    dtypes: tuple[str, ...]
    metadata_columns: tuple[str, ...]
    feature_id: str | None
    strip_versions: bool
    reader: str
    allow_links: tuple[bool, ...]

    def rebuild(self) -> CellDataset:
        """Same rows, same columns, in the same order."""
        with warnings.catch_warnings():
            # The warnings were given when they were first opened.
            warnings.simplefilter("ignore", UserWarning)
            archives = [
                open_archive(path, data_dtype=dtype, allow_links=links)
                for path, dtype, links in zip(self.paths, self.dtypes, self.allow_links, strict=True)
            ]
        return to_cell_dataset(
            archives,
            metadata_columns=list(self.metadata_columns),
            feature_id=self.feature_id,
            strip_versions=self.strip_versions,
            reader=self.reader,
        )


def to_cell_dataset(
    archives: Archive | str | os.PathLike[str] | Sequence[Archive | str | os.PathLike[str]],
    *,
    metadata_columns: Sequence[str] | None = None,
    feature_id: str | None = None,
    strip_versions: bool = False,
    require_shared_genes: float | None = None,
    reader: str = "mmap",
) -> CellDataset:
    """A dataset over the cells of archives, read in place: what loaders, samplers and engines take.

    Parameters
    ----------
    archives
        One or several, opened or as paths. Rows are numbered archive after archive.
    metadata_columns
        obs columns that batches carry, any of :func:`obs_names_of`: numbers as stored (NaN for missing ones),
        text as codes. Rows of files without the column count as missing.
    feature_id
        Column of var by which genes of different blocks are the same; see
        :func:`hbx_gpu.scdl._sources.axis.gene_axis`.
    strip_versions
        Drop the versions of Ensembl ids: ENSG00000000003.15 becomes ENSG00000000003.
    require_shared_genes
        Refuse blocks that share less than this fraction of the smaller set of genes with those before them.
        By default a fraction below one half causes a warning.
    reader
        ``"mmap"`` or ``"preadv"``.

    Returns
    -------
    CellDataset
        Layer ``X``. One Source per block of genes; its columns go to one axis for all.

    Raises
    ------
    CorruptDataError
        Row pointers that descend, or files shorter than they should be.
    InvalidDataError
        Genes of several blocks that cannot be told apart; values or columns that have no common dtype.
    UnknownNameError
        No such column.
    """
    if isinstance(archives, Archive | str | os.PathLike):
        archives = [archives]
    opened = [a if isinstance(a, Archive) else open_archive(a) for a in archives]
    blocks = [(archive, b) for archive in opened for b in range(len(_bounds(archive)) - 1)]
    axis = gene_axis(
        [_gene_block(archive, b) for archive, b in blocks],
        feature_id,
        strip_versions=strip_versions,
        require_shared=require_shared_genes,
    )
    sources = [_source(archive, b, remap) for (archive, b), remap in zip(blocks, axis.remaps, strict=True)]
    names = list(dict.fromkeys(metadata_columns or ()))
    recipe = ArchiveRecipe(
        tuple(str(archive.path.absolute()) for archive in opened),
        tuple(archive.data.dtype.name for archive in opened),
        tuple(names),
        feature_id,
        strip_versions,
        reader,
        tuple(archive.allow_links for archive in opened),
    )
    return CellDataset(
        sources,
        _row_index(opened),
        layer=LAYER,
        n_features=len(axis.uids),
        feature_uids=axis.uids,
        obs=_obs_columns(opened, names),
        recipe=recipe,
        feature_space=SPACE,
        reader=reader,
    )


def groups_of(archives: Sequence[Archive]) -> np.ndarray:
    """int32, (n,). Source of every row of :func:`to_cell_dataset`, without making it."""
    sizes = [size for archive in archives for size in np.diff(_bounds(archive)).tolist()]
    return np.repeat(np.arange(len(sizes), dtype=np.int32), sizes)


def _bounds(archive: Archive) -> np.ndarray:
    """Row bounds of the Sources of an archive: one for all rows where there are no genes."""
    return archive.bounds if len(archive.bounds) > 1 else np.array([0, archive.n_rows])


def gene_blocks(archive: Archive) -> list[GeneBlock]:
    """The blocks of an archive with what identifies their genes."""
    return [_gene_block(archive, b) for b in range(len(archive.bounds) - 1)]


def obs_names_of(archives: Sequence[Archive]) -> list[str]:
    """obs columns that at least one of the archives has, in order of first appearance."""
    found = [name for archive in archives if archive.obs is not None for name in archive.obs.names]
    if any(read_obs_names(archive.path, archive.n_rows) is not None for archive in archives):
        found.append(OBS_NAME)
    return list(dict.fromkeys(found))


def obs_column(archives: Sequence[Archive], name: str) -> pa.ChunkedArray:
    """One obs column over the rows of all archives, null where an archive or a file lacks it.

    Raises
    ------
    UnknownNameError
        None of them has it.
    InvalidDataError
        Text in one and numbers in another.
    """
    known = obs_names_of(archives)
    if name not in known:
        raise UnknownNameError(f"no obs column {name!r} in {_paths(archives)}; there are {known or 'none'}")
    parts = [_obs_part(archive, name) for archive in archives]
    kind = common_type([part.type for part in parts if part is not None], name)
    chunks: list[pa.Array] = []
    for archive, part in zip(archives, parts, strict=True):
        chunks += [pa.nulls(archive.n_rows, kind)] if part is None else cast(part, kind).chunks
    return pa.chunked_array(chunks, type=kind)


def _obs_part(archive: Archive, name: str) -> pa.ChunkedArray | None:
    if archive.obs is not None and name in archive.obs.names:
        return archive.obs.column(name)
    names = read_obs_names(archive.path, archive.n_rows) if name == OBS_NAME else None
    return None if names is None else pa.chunked_array([names])


def _paths(archives: Sequence[Archive]) -> str:
    return ", ".join(str(archive.path) for archive in archives)


def _gene_block(archive: Archive, block: int) -> GeneBlock:
    n_blocks = len(archive.bounds) - 1
    where = f"{archive.path}, block {block} of {n_blocks}"
    if not n_blocks:  # allocated and never given genes
        used = archive.indices[: archive.nnz]
        width = int(used.max()) + 1 if len(used) else 0
        return GeneBlock(where, width, width, MemoryFrame({}), None)
    names = read_var_names(archive.path, n_blocks)[block]
    n_genes, width = archive.n_vars[block], archive.width(block)
    if names is not None and len(names) != n_genes:
        names = None  # genes were added by a program that does not know of names
    if not archive.var.frames[block].names:
        n_genes = width if names is None else len(names)  # a gene table without columns counts no genes
    return GeneBlock(where, n_genes, width, archive.var.frames[block], names)


def _source(archive: Archive, block: int, remap: np.ndarray) -> Source:
    bounds = _bounds(archive)
    first, last = (int(archive.indptr[row]) for row in bounds[block : block + 2])
    layouts = [
        plain_layout(
            archive.path / file,
            array.dtype,
            last - first,
            name=f"{archive.path.name}/{file}",
            byte_offset=first * array.dtype.itemsize,
        )
        for file, array in ((COL_PTR, archive.indices), (DATA, archive.data))
    ]
    name = archive.path.name if len(bounds) == 2 else f"{archive.path.name}/block {block}"
    # Nothing in the format says that a column occurs once per row.
    return Source(name, layouts[0], {LAYER: layouts[1]}, remap, repeats=True)


def _row_index(archives: Sequence[Archive]) -> RowIndex:
    n = sum(archive.n_rows for archive in archives)
    source, start = np.empty(n, np.int32), np.empty(n, np.int64)
    length = np.empty(n, np.int32)
    row, n_sources = 0, 0
    for archive in archives:
        archive.check_pointers()
        bounds = _bounds(archive)
        for block, (first, last) in enumerate(zip(bounds[:-1].tolist(), bounds[1:].tolist(), strict=True)):
            source[row : row + last - first] = n_sources + block
            begin = int(archive.indptr[first])
            for at in range(first, last, _PIECE):
                pointers = archive.indptr[at : min(at + _PIECE, last) + 1].astype(np.int64)
                here = slice(row, row + len(pointers) - 1)
                start[here] = pointers[:-1] - begin
                length[here] = _lengths(archive, at, pointers)
                row = here.stop
        n_sources += len(bounds) - 1
    return RowIndex(source, start, length)


def _lengths(archive: Archive, first: int, pointers: np.ndarray) -> np.ndarray:
    lengths = np.diff(pointers)
    if lengths.max(initial=0) > np.iinfo(np.int32).max:
        raise InvalidDataError(
            f"{archive.path}: row {first + int(lengths.argmax())} has {lengths.max()} values; at most "
            f"{np.iinfo(np.int32).max} per row can be loaded"
        )
    return lengths


def _obs_columns(archives: Sequence[Archive], names: Sequence[str]) -> ObsColumns:
    columns: dict[str, np.ndarray] = {}
    categories: dict[str, np.ndarray] = {}
    for name in names:
        columns[name], vocabulary = encode(obs_column(archives, name))
        if vocabulary is not None:
            categories[name] = vocabulary
    return ObsColumns(columns, categories)


def encode(column: pa.ChunkedArray) -> tuple[np.ndarray, np.ndarray | None]:
    """An Arrow column as batches carry it.

    Returns
    -------
    values
        Numbers as stored, as float64 with NaN where whole ones are missing; int64 codes of text and truth
        values, -1 where missing.
    vocabulary
        Vocabulary of codes: object, in the order of the stored categories or sorted, or bool ``[False,
        True]``. None for numbers.
    """
    kind = column.type
    if pa.types.is_dictionary(kind):
        unified = column.unify_dictionaries().combine_chunks()
        if isinstance(unified, pa.ChunkedArray):  # no rows
            unified = pa.array([], kind)
        codes = pc.fill_null(unified.indices.cast(pa.int64()), -1).to_numpy(zero_copy_only=False)
        return codes, _objects(unified.dictionary)
    if pa.types.is_boolean(kind):
        return _filled(column.cast(pa.int64())), np.array([False, True])
    if pa.types.is_integer(kind) or pa.types.is_floating(kind):
        if column.null_count and pa.types.is_integer(kind):
            column = column.cast(pa.float64(), safe=False)
        values: np.ndarray = column.to_numpy()
        return values, None
    texts = column.cast(pa.string())
    distinct = pc.drop_null(texts.unique())
    distinct = distinct.take(pc.sort_indices(distinct))
    return _filled(pc.index_in(texts, value_set=distinct).cast(pa.int64())), _objects(distinct)


def _filled(codes: pa.ChunkedArray) -> np.ndarray:
    found: np.ndarray = pc.fill_null(codes, -1).to_numpy()
    return found


def _objects(values: pa.Array) -> np.ndarray:
    out = np.empty(len(values), object)
    out[:] = values.to_pylist()
    return out


def dataset_of(
    archives: Sequence[Archive],
    *,
    metadata_columns: Sequence[str] | None = None,
    neighbors: str | None = None,
    seed: int = 0,
    **options: Any,
) -> CellDataset | PairedDataset:
    """:func:`to_cell_dataset`, with a drawn neighbor beside every cell if `neighbors` names a strategy.

    `options` are those of :func:`to_cell_dataset`: ``feature_id``, ``strip_versions``,
    ``require_shared_genes`` and ``reader``.
    """
    cells = to_cell_dataset(archives, metadata_columns=metadata_columns, **options)
    if neighbors is None:
        return cells
    from hbx_gpu.scdl._sources.pairs import PairedDataset

    return PairedDataset(cells, [Path(archive.path) for archive in archives], strategy=neighbors, seed=seed)
