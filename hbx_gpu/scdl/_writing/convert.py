"""An .h5ad file becomes an archive, block of rows after block of rows."""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import h5py
import numpy as np
import pyarrow as pa

from hbx_gpu._advice import option, spelled
from hbx_gpu._h5ad.choice import MatrixChoice, choose_matrix
from hbx_gpu._h5ad.evidence import look_at
from hbx_gpu._h5ad.files import AnnDataGroup, open_matrix
from hbx_gpu._h5ad.matrix import CsrBlock, DenseMatrix, Matrix
from hbx_gpu._identity.choice import choose
from hbx_gpu._identity.overlap import compare, require
from hbx_gpu._identity.tables import FeatureTable
from hbx_gpu._progress import Progress, checked
from hbx_gpu._remote.places import is_remote
from hbx_gpu._stores.kinds import split_modality
from hbx_gpu._stores.source import open_source
from hbx_gpu.errors import InvalidDataError
from hbx_gpu.scdl._format.index_writer import to_table
from hbx_gpu.scdl._format.values import Tolerance, check_dtype
from hbx_gpu.scdl._writing.uploading import local_target
from hbx_gpu.scdl._writing.writer import ArchiveWriter, check_target

if TYPE_CHECKING:
    import pandas as pd

_MIB = 1 << 20
_SHOWN = 3


class MixedValuesError(InvalidDataError):
    """Files with counts and files without were to be converted into one archive."""


@dataclass(frozen=True)
class ConvertOptions:
    """How an .h5ad file is read.

    Attributes
    ----------
    matrix
        ``X``, ``raw`` or the name of a layer; ``auto``: as `choose`. None: as `use_X_not_raw` says.
    use_X_not_raw
        True: ``X``. False: ``raw.X`` where the file has one, else ``X`` with a warning, as the package that
        we follow refuses such a file. Either comes with its own genes: those of ``raw.var`` or of ``var``.
    choose
        Take the matrix that holds counts by the rule of `hbx_gpu._h5ad.choice`, and not as `use_X_not_raw`
        says.
    allow_normalized
        Accept values that do not look like counts without a warning. Otherwise there is a warning where no
        file holds counts, as the package that we follow accepts such files, and an error where only some do.
    paginated_load_cutoff
        Size in MiB from which on a file is read at most `load_block_row_size` rows at a time.
    load_block_row_size
        See above. Blocks are never larger than some million values, whatever the two say.
    var_feature_index_name, obs_feature_index_name
        Columns for the names of genes and cells where var or obs has no column.
    require_shared_genes
        Refuse files that share less than this fraction of the smaller set of genes with those before them.
        None: a fraction below one half causes a warning.
    neighbor_key
        Matrix of ``obsp`` that holds the neighbors; None for none.
    allow_links
        Follow links that lead out of a file or a store.
    """

    matrix: str | None = None
    use_X_not_raw: bool = False
    choose: bool = False
    allow_normalized: bool = False
    paginated_load_cutoff: float = 10_000
    load_block_row_size: int = 1_000_000
    var_feature_index_name: str = "var_feature_id"
    obs_feature_index_name: str = "obs_feature_id"
    require_shared_genes: float | None = None
    neighbor_key: str | None = None
    allow_links: bool = False

    def __post_init__(self) -> None:
        if self.load_block_row_size < 1 or self.paginated_load_cutoff < 0:
            raise ValueError(
                "expected load_block_row_size of at least 1 and paginated_load_cutoff of at least 0, found "
                f"{self.load_block_row_size} and {self.paginated_load_cutoff}"
            )


@dataclass(frozen=True)
class Conversion:
    """What was converted of one file.

    Attributes
    ----------
    file
        Path of the file.
    n_rows, n_vars
        Number of cells and genes.
    matrix
        The matrix that was taken: ``X``, ``raw`` or a layer.
    has_neighbors
        Whether neighbors were stored.
    reason
        What the matrix holds and why it was chosen, where that was looked at.
    allow_links
        Whether links that lead out of the file were followed.
    """

    file: str | os.PathLike[str]
    n_rows: int
    n_vars: int
    matrix: str
    has_neighbors: bool
    reason: str = ""
    allow_links: bool = False

    @property
    def var(self) -> pd.DataFrame:
        """Table of the genes as the file has it, read again; names as index."""
        with open_source(self.file, allow_links=self.allow_links) as file:
            return file.var(self.matrix)

    @property
    def obs(self) -> pd.DataFrame:
        """Table of the cells as the file has it, read again; names as index."""
        with open_source(self.file, allow_links=self.allow_links) as file:
            return file.obs()


def convert_h5ad(
    h5ad: str | os.PathLike[str],
    target: str | os.PathLike[str],
    *,
    options: ConvertOptions | None = None,
    data_dtype: str | None = None,
    tolerance: Tolerance | None = None,
    overwrite: bool = False,
    progress: Progress | None = None,
) -> Conversion:
    """Make an archive of an .h5ad file: CSR, CSC or dense.

    The archive appears at once and whole; an error or a kill leaves what was there before.

    Parameters
    ----------
    h5ad
        Path of the file.
    target
        Folder of the archive.
    options
        How the file is read.
    data_dtype
        Dtype of the values in the archive; float32 by default, ``auto`` for the smallest exact one.
    tolerance
        What happens to values that the dtype does not hold.
    overwrite
        Whether an archive at the target may be replaced.
    progress
        Called with the rows done and their total.

    Raises
    ------
    FileNotFoundError
        No such file.
    FileExistsError
        The target exists and may not be replaced.
    InvalidDataError
        A damaged file; a matrix that it does not have; values that the dtype does not hold.
    """
    (conversion,) = convert_h5ad_files(
        [h5ad],
        target,
        options=options,
        data_dtype=data_dtype,
        tolerance=tolerance,
        overwrite=overwrite,
        progress=progress,
    )
    return conversion


def convert_h5ad_files(
    files: Sequence[str | os.PathLike[str]],
    target: str | os.PathLike[str],
    *,
    options: ConvertOptions | None = None,
    data_dtype: str | None = None,
    tolerance: Tolerance | None = None,
    overwrite: bool = False,
    progress: Progress | None = None,
) -> list[Conversion]:
    """Make one archive of several files, one after the other in a single pass.

    Parameters and errors are those of :func:`convert_h5ad`. What a file lacks is found before anything is
    written.

    Returns
    -------
    list of Conversion
        One per file.
    """
    progress = checked(progress)
    options = options or ConvertOptions()
    check_dtype(data_dtype)
    for file in files:
        if not split_modality(file)[0].exists():
            raise FileNotFoundError(f"Error: could not find h5ad path {file}")
    if not is_remote(target):
        check_target(target, overwrite=overwrite)
    chosen = look_at_files(files, options)
    if len(files) > 1:
        _compare_genes(files, chosen, options)
    shapes = [_shape(file, choice.name, options) for file, choice in zip(files, chosen, strict=True)]
    total = sum(n for n, _ in shapes)
    if options.choose and (not total or not any(n for _, n in shapes)):
        what = "features" if total else "cells"
        raise InvalidDataError(
            f"{', '.join(map(str, files[:_SHOWN]))}: there are no {what} in it, so there is nothing to "
            "convert"
        )
    with (
        local_target(target, overwrite=overwrite) as made,
        ArchiveWriter(
            made,
            n_columns=max(n for _, n in shapes),
            data_dtype=data_dtype,
            tolerance=tolerance,
            overwrite=overwrite,
        ) as writer,
    ):
        added = []
        for file, choice in zip(files, chosen, strict=True):
            show = _shifted(progress, writer.n_rows, total)
            added.append(_add_file(writer, file, choice, options, show))
    return added


def look_at_files(files: Sequence[str | os.PathLike[str]], options: ConvertOptions) -> list[MatrixChoice]:
    """Choose a matrix per file, and compare what they hold.

    Raises
    ------
    MixedValuesError
        Some files hold counts and others do not; the message names one of each.
    """
    chosen = []
    for path in files:
        with open_source(path, allow_links=options.allow_links) as file:
            chosen.append(_choose_matrix(file, options))
    if options.allow_normalized:
        return chosen
    _say_where_raw_is_missing(files, chosen, options)
    good = [i for i, choice in enumerate(chosen) if choice.evidence.are_counts]
    bad = [i for i, choice in enumerate(chosen) if not choice.evidence.are_counts]
    if good and bad:
        raise MixedValuesError(
            f"{files[good[0]]} holds counts in {chosen[good[0]].name}, {files[bad[0]]} holds "
            f"{chosen[bad[0]].evidence} in {chosen[bad[0]].name}: one archive would mix them. Take the "
            f"matrix of each file that holds counts with {option('matrix', 'auto')}, leave files out, or "
            f"accept the mixture with {option('allow_normalized', 'True')}"
        )
    for i in bad:
        warnings.warn(
            f"{files[i]}: {chosen[i].name} holds {chosen[i].evidence}, where counts are expected; if that is "
            f"meant, pass {option('allow_normalized', 'True')}",
            UserWarning,
            stacklevel=4,
        )
    return chosen


def _compare_genes(
    files: Sequence[str | os.PathLike[str]], chosen: Sequence[MatrixChoice], options: ConvertOptions
) -> None:
    """Warn of files that share few genes with those before them, or refuse them.

    Raises
    ------
    InvalidDataError
        A file shares less than `require_shared_genes` of the smaller set of genes.
    """
    tables = []
    for path, choice in zip(files, chosen, strict=True):
        with open_source(path, allow_links=options.allow_links) as file:
            tables.append(FeatureTable.of_frame(file.var(choice.name), str(path)))
    known: set[str] = set()
    for table, by in zip(tables, choose(tables, same_column=True), strict=False):
        if not table.identifies(by.column):
            continue  # an archive keeps all columns: that none identifies its genes is said when it is read
        if known:
            overlap = compare(table, by, known, parameter="feature_id")
            require(overlap, options.require_shared_genes)
            if overlap.is_small:
                warnings.warn(str(overlap), UserWarning, stacklevel=4)
        known.update(by.ids(table))


def _say_where_raw_is_missing(
    files: Sequence[str | os.PathLike[str]], chosen: Sequence[MatrixChoice], options: ConvertOptions
) -> None:
    if options.choose or options.matrix is not None or options.use_X_not_raw:
        return
    if without := [file for file, choice in zip(files, chosen, strict=True) if choice.name == "X"]:
        more = f" and {len(without) - 1} more do" if len(without) > 1 else " does"
        warnings.warn(
            f"{without[0]}{more} not have raw count data (raw.X), so X is taken; BioNeMo-SCDL refuses such "
            f"files. {option('use_X_not_raw', 'True')} says that X is meant",
            UserWarning,
            stacklevel=5,
        )


def _shape(h5ad: str | os.PathLike[str], matrix: str, options: ConvertOptions) -> tuple[int, int]:
    with open_source(h5ad, allow_links=options.allow_links) as file:
        return file.matrix(matrix).shape


def _shifted(progress: Progress, before: int, total: int) -> Callable[[int], None]:
    def show(rows: int) -> None:
        progress(before + rows, total)

    return show


def _add_file(
    writer: ArchiveWriter,
    h5ad: str | os.PathLike[str],
    choice: MatrixChoice,
    options: ConvertOptions,
    progress: Callable[[int], None],
) -> Conversion:
    with open_source(h5ad, allow_links=options.allow_links) as file:
        name = choice.name
        matrix, obs, var = file.matrix(name), file.obs(), file.var(name)
        _check_shape(matrix, obs, var)
        first_row = writer.n_rows
        _write_frames(writer, file, obs, var, options)
        writer.add_source(str(h5ad), len(obs), name)
        _write_rows(writer, matrix, _block_rows(h5ad, options), progress)
        neighbors = options.neighbor_key is not None and _write_neighbors(
            writer, h5ad, first_row, len(obs), options.neighbor_key
        )
    return Conversion(h5ad, len(obs), len(var), name, neighbors, choice.reason, options.allow_links)


def _choose_matrix(file: AnnDataGroup, options: ConvertOptions) -> MatrixChoice:
    available = file.matrices()
    automatic = options.matrix == "auto" and "auto" not in available
    if available and (automatic or (options.choose and options.matrix is None)):
        return choose_matrix(available, file.matrix)
    name = options.matrix or _as_followed(file, options, available)
    evidence = look_at(file.matrix(name))
    return MatrixChoice(name, str(evidence), evidence)


def _as_followed(file: AnnDataGroup, options: ConvertOptions, available: Sequence[str]) -> str:
    """``X`` or ``raw`` as BioNeMo-SCDL's options say; it refuses files without the one asked for."""
    if options.use_X_not_raw:
        if "X" not in available:
            raise InvalidDataError(
                f"{file.path} does not have count data in X, it holds {available}; "
                f"{spelled('set use_X_not_raw=False', 'leave --use-X-not-raw out')}"
            )
        return "X"
    if "raw" in available:
        return "raw"
    if "X" not in available:
        raise InvalidDataError(f"{file.path} has neither raw.X nor X; it holds {available or 'no matrix'}")
    return "X"


def _check_shape(matrix: Matrix, obs: pd.DataFrame, var: pd.DataFrame) -> None:
    if matrix.shape != (len(obs), len(var)):
        raise InvalidDataError(
            f"{matrix.name} is {matrix.shape[0]} x {matrix.shape[1]}, but there are {len(obs)} rows in obs "
            f"and {len(var)} in var; the file is damaged, write it anew"
        )


def _write_frames(
    writer: ArchiveWriter, file: AnnDataGroup, obs: pd.DataFrame, var: pd.DataFrame, options: ConvertOptions
) -> None:
    label = str(file.path)
    genes = to_table(var, index_name=options.var_feature_index_name, source=f"{label}, var")
    writer.append_var(genes, len(obs), label=label, gene_names=[str(name) for name in var.index])
    cells = to_table(obs, index_name=options.obs_feature_index_name, source=f"{label}, obs")
    cell_names = pa.array([str(name) for name in obs.index], pa.string())
    writer.append_obs(iter([cells]), len(obs), label=label, cell_names=cell_names)


def _nbytes(path: Path) -> int:
    """Bytes of a file, or of all files of a store that is a directory."""
    files = path.rglob("*") if path.is_dir() else [path]
    return sum(file.stat().st_size for file in files if file.is_file())


def _block_rows(h5ad: str | os.PathLike[str], options: ConvertOptions) -> int | None:
    """Most rows of a block; None if only its values count."""
    if _nbytes(split_modality(h5ad)[0]) >= options.paginated_load_cutoff * _MIB:
        return options.load_block_row_size
    return None


def _write_rows(
    writer: ArchiveWriter, matrix: Matrix, most: int | None, progress: Callable[[int], None]
) -> None:
    for block in matrix.blocks(writer.scratch):
        for part in _split(block, most):
            last = part.first_row + len(part.indptr) - 1
            where = f"{matrix.name}, rows {part.first_row} to {last - 1}"
            writer.append_rows(part.indptr, part.indices, part.values, where=where)
            progress(last)


def _split(block: CsrBlock, most: int | None) -> Iterator[CsrBlock]:
    n_rows = len(block.indptr) - 1
    step = n_rows if most is None else most
    for first in range(0, n_rows, step):
        indptr = block.indptr[first : first + step + 1]
        part = slice(int(indptr[0]), int(indptr[-1]))
        yield CsrBlock(block.first_row + first, indptr - indptr[0], block.indices[part], block.values[part])


def _write_neighbors(
    writer: ArchiveWriter, h5ad: str | os.PathLike[str], first_row: int, n_rows: int, key: str
) -> bool:
    path, modality = split_modality(h5ad)
    with h5py.File(path, "r") as file:
        graphs = file.get(f"mod/{modality}/obsp" if modality else "obsp", {})
        node = graphs.get(key)
        if node is None:
            found = sorted(graphs)
            warnings.warn(
                f"Neighbor key '{key}' not found in AnnData.obsp of {h5ad}, which holds {found}. Neighbor "
                "loading skipped.",
                UserWarning,
                stacklevel=5,
            )
            return False
        matrix = open_matrix(node, f"{h5ad}, obsp[{key!r}]")
        if isinstance(matrix, DenseMatrix):
            raise InvalidDataError(
                f"Neighbor matrix for key '{key}' of {h5ad} is not a sparse matrix. Store it as one: "
                f"adata.obsp[{key!r}] = scipy.sparse.csr_matrix(adata.obsp[{key!r}])"
            )
        if matrix.shape != (n_rows, n_rows):
            raise InvalidDataError(f"{matrix.name} is {matrix.shape}, expected {n_rows} x {n_rows}")
        for block in matrix.blocks(writer.scratch):
            at = first_row + block.first_row
            others = block.indices.astype(np.int64) + first_row
            writer.append_neighbors(block.indptr, others, block.values, first_row=at)
    return True
