"""What is to be ingested, whatever it comes from: matrix, cells, features, and what identifies them."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pyarrow as pa
import scipy.sparse

from hbx_gpu._h5ad.choice import MatrixChoice, choose_matrix
from hbx_gpu._h5ad.files import AnnDataGroup
from hbx_gpu._h5ad.matrix import CsrMatrix, DenseMatrix, Matrix
from hbx_gpu._identity.tables import UNIQUE_NAMES
from hbx_gpu.atlas._model import columns
from hbx_gpu.errors import InvalidDataError

if TYPE_CHECKING:
    import pandas as pd
    from anndata import AnnData

_HASH_BYTES = 1 << 24


@dataclass(frozen=True)
class Input:
    """One matrix with its cells and features.

    Attributes
    ----------
    source
        Path of the file, or what else it is; for messages.
    source_name
        As recorded with the dataset.
    sha256
        SHA-256 of the file, or of the content of an AnnData in memory.
    matrix_name
        ``X``, ``raw`` or a layer.
    matrix, obs, var
        The data; shapes agree.
    available
        Matrices that the source holds.
    keeps_order
        Whether columns and elements are to be stored in the source's order, so that the source can be made
        again; otherwise columns are ordered as the registry numbers them.
    """

    source: str
    source_name: str
    sha256: str
    matrix_name: str
    matrix: Matrix
    obs: pd.DataFrame
    var: pd.DataFrame
    available: Sequence[str]
    keeps_order: bool = False

    def __post_init__(self) -> None:
        n_obs, n_vars = self.matrix.shape
        if (n_obs, n_vars) != (len(self.obs), len(self.var)):
            raise InvalidDataError(
                f"{self.matrix.name} is {n_obs} x {n_vars}, but there are {len(self.obs)} rows in obs and "
                f"{len(self.var)} in var; the file is damaged, write it anew"
            )
        if not n_obs or not n_vars:
            what = "cells" if not n_obs else "features"
            raise InvalidDataError(
                f"{self.matrix.name} has no {what} ({n_obs} x {n_vars}): nothing to ingest"
            )


def from_h5ad(
    file: AnnDataGroup, matrix: str, *, sha256: str | None = None, backed: AnnData | None = None
) -> Input:
    """One matrix of an open .h5ad file, or of a modality of an .h5mu file.

    Parameters
    ----------
    file, matrix
        Where it is.
    sha256
        SHA-256 of the file, where it is known.
    backed
        The AnnData that is backed by the file. Its obs, var and layers are taken as they are in memory.
    """
    if backed is not None and matrix not in ("X", "raw"):
        return from_anndata(backed, matrix, source=file.source)
    inside = f"mod/{file.modality}/" if file.modality else ""
    values = file.matrix(matrix)  # first, because it says which matrices there are
    obs, var = file.obs(), file.var(matrix)
    sha256 = sha256 or hash_file(file.path)
    if backed is not None:
        now = backed.obs, backed.raw.var if matrix == "raw" else backed.var
        changed = [frame for frame, stored in zip(now, (obs, var), strict=True) if not frame.equals(stored)]
        if changed:
            # Other data than the file's: not to be taken for them when the file itself is ingested.
            tables = "\0".join(frame.to_csv() for frame in now)
            sha256 = hashlib.sha256(f"{sha256}\0{tables}".encode()).hexdigest()
        obs, var = now
    return Input(
        file.source,
        file.path.name,
        sha256,
        inside + matrix,
        values,
        obs,
        var,
        file.matrices(),
    )


def from_anndata(adata: AnnData, matrix: str, *, source: str = "AnnData object") -> Input:
    """One matrix of an AnnData in memory.

    Raises
    ------
    InvalidDataError
        No such matrix, or one of a kind that cannot be read.
    """
    available = matrices_of(adata)
    if matrix not in available:
        raise InvalidDataError(f"{source} has no matrix {matrix!r}; it holds {available}")
    values = _values_of(adata, matrix)
    var = adata.raw.var if matrix == "raw" else adata.var
    opened = _open(values, f"{source}, matrix {matrix!r}")
    digest = _hash(opened, [*adata.obs_names, *var.index])
    return Input(source, source, digest, matrix, opened, adata.obs, var, available)


def choose_for(data: AnnDataGroup | AnnData, wanted: str | None, *, counts: bool) -> MatrixChoice | None:
    """The matrix that is taken of a file or an AnnData where the user names none; None where one is named.

    Parameters
    ----------
    data
        Where it is.
    wanted
        What the user names.
    counts
        Whether counts are wanted; otherwise it is ``X``.
    """
    if wanted is not None or not counts:
        return None
    if isinstance(data, AnnDataGroup):
        return choose_matrix(names, data.matrix) if (names := data.matrices()) else None
    names = matrices_of(data)
    return choose_matrix(names, lambda name: _open(_values_of(data, name), name)) if names else None


def matrices_of(adata: AnnData) -> list[str]:
    """Names of the matrices that an AnnData in memory has."""
    available = [name for name, there in (("X", adata.X), ("raw", adata.raw)) if there is not None]
    # Since anndata 0.13 X is a layer too, named None.
    return available + [str(name) for name in adata.layers if name is not None]


def _values_of(adata: AnnData, matrix: str) -> object:
    return adata.X if matrix == "X" else adata.raw.X if matrix == "raw" else adata.layers[matrix]


def _open(values: object, name: str) -> CsrMatrix | DenseMatrix:
    if isinstance(values, scipy.sparse.spmatrix | scipy.sparse.sparray):
        rows = values.tocsr()
        return CsrMatrix(name, rows.shape, rows.indptr, rows.indices, rows.data)
    if isinstance(values, np.ndarray) and values.ndim == 2:
        return DenseMatrix(name, values.shape, np.asarray(values))
    raise InvalidDataError(
        f"{name}: expected a SciPy sparse matrix or a NumPy array, found {type(values).__name__}; convert "
        "it, or write the AnnData to a file and ingest that"
    )


def hash_file(path: Path) -> str:
    """SHA-256 in hexadecimal of a file's bytes; of a directory those of its files, by name."""
    digest = hashlib.sha256()
    if path.is_dir():
        for inside in sorted(p for p in path.rglob("*") if p.is_file()):
            digest.update(f"{inside.relative_to(path)}\0{hash_file(inside)}\0".encode())
        return digest.hexdigest()
    with open(path, "rb") as file:
        while piece := file.read(_HASH_BYTES):
            digest.update(piece)
    return digest.hexdigest()


def _hash(matrix: CsrMatrix | DenseMatrix, names: Sequence[str]) -> str:
    digest = hashlib.sha256(f"{matrix.shape} {matrix.dtype}".encode())
    parts = [matrix.values]
    if isinstance(matrix, CsrMatrix):
        parts += [matrix.indptr, matrix.indices]
    for part in parts:
        step = max(1, _HASH_BYTES // max(1, part[:1].nbytes))
        for i in range(0, part.shape[0], step):
            digest.update(np.ascontiguousarray(part[i : i + step]).tobytes())
    for name in names:
        digest.update(str(name).encode() + b"\0")
    return digest.hexdigest()


def feature_columns(data: Input, id_column: str, feature_ids: Sequence[str], rows: np.ndarray) -> pa.Table:
    """Rows for the registry: ``uid``, the columns of var, and the names where the ids come from a column.

    Columns that an atlas cannot store are left out, with a warning: they only describe the features.

    Parameters
    ----------
    data
        Whose var it is.
    id_column, feature_ids
        Where the ids come from, and the ids of all features.
    rows
        int64, (n,). Numbers of the features that are wanted.
    """
    var = data.var.drop(columns=[name for name in (id_column, "global_index") if name in data.var.columns])
    of_others = id_column in data.var.columns or id_column == UNIQUE_NAMES
    if of_others and "feature_name" not in var.columns:
        var = var.assign(feature_name=data.var.index.to_numpy())
    source = f"{data.source}, var"
    others = columns.to_arrow(var.iloc[rows], reserved=("uid", "global_index"), source=source, lenient=True)
    return with_columns({"uid": pa.array([feature_ids[i] for i in rows], pa.string())}, others)


OWN_COLUMNS = ("uid", "dataset_uid", "obs_name")
"""What an ingest puts into an obs table itself."""


def obs_columns(names: Sequence[str], found: pa.Table, dataset_uid: str, *, source: str) -> pa.Table:
    """Rows for an obs table without pointers: ``uid``, ``dataset_uid``, ``obs_name``, then the columns found.

    Parameters
    ----------
    names
        Names of the cells.
    found
        Columns of obs; one called ``uid`` gives the cells' uids, which otherwise follow from `dataset_uid`.
    dataset_uid
        The dataset.
    source
        For messages.

    Raises
    ------
    InvalidDataError
        The column ``uid`` does not hold unique strings.
    """
    uids = cell_uids(dataset_uid, len(names))
    if "uid" in found.schema.names:
        given = _strings(found.column("uid").to_pylist())
        if given is None or len(set(given)) < len(given):
            raise InvalidDataError(f"{source}: column 'uid' must hold unique strings, one per cell")
        uids = pa.array(given, pa.string())
        found = found.drop_columns(["uid"])
    own = {
        "uid": uids,
        "dataset_uid": pa.array(np.full(len(names), dataset_uid, object), pa.string()),
        "obs_name": pa.array(list(names), pa.string()),
    }
    return with_columns(own, found)


def with_columns(first: Mapping[str, pa.Array], others: pa.Table) -> pa.Table:
    """A table of `first`, then the columns of `others`."""
    fields = [*(pa.field(name, array.type) for name, array in first.items()), *others.schema]
    return pa.Table.from_arrays([*first.values(), *others.columns], schema=pa.schema(fields))


def cell_uids(dataset_uid: str, n: int) -> pa.Array:
    """string, (n,). Uids of a dataset's cells, 16 hexadecimal digits, from its uid and their row numbers.

    A bijection of the row number, so no two cells of a dataset share one.
    """
    seed = np.frombuffer(hashlib.sha256(dataset_uid.encode()).digest()[:8], "<u8")
    # The finaliser of splitmix64; arrays wrap around modulo 2^64.
    x = seed + np.arange(n, dtype=np.uint64) * np.uint64(0x9E3779B97F4A7C15)
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    digits = (x ^ (x >> np.uint64(31))).astype(">u8").tobytes().hex()
    return pa.array([digits[i : i + 16] for i in range(0, len(digits), 16)], pa.string())


def _strings(values: Iterable[object]) -> list[str] | None:
    """The values if all are non-empty strings, else None."""
    listed = list(values)
    texts = [value for value in listed if isinstance(value, str) and value]
    return texts if len(texts) == len(listed) else None
