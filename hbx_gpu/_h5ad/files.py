"""Reading .h5ad and .h5mu files piece by piece: which matrices they hold, rows as a stream, obs and var."""

from __future__ import annotations

import contextlib
import os
import sys
from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, TypeGuard

import h5py
import numpy as np

from hbx_gpu._h5ad.foreign import describe_error, describe_hdf5, describe_path, missing_filters
from hbx_gpu._h5ad.links import check_inside
from hbx_gpu._h5ad.matrix import CscMatrix, CsrMatrix, DenseMatrix, Matrix, two_axes
from hbx_gpu._paths import checked
from hbx_gpu._untrusted import check_file
from hbx_gpu.errors import InvalidDataError, UnsafePathError

if TYPE_CHECKING:
    import pandas as pd
    from anndata import AnnData


def is_anndata(data: object) -> TypeGuard[AnnData]:
    """Whether an object is an AnnData in memory. Does not import anndata: without it there are none."""
    module = sys.modules.get("anndata")
    return module is not None and isinstance(data, module.AnnData)


def check_anndata(data: object) -> None:
    """Refuse an object in memory that is not an AnnData.

    Raises
    ------
    TypeError
        Says what to pass instead.
    """
    if is_anndata(data):
        return
    kind = type(data).__name__
    remedy = (
        "add a MuData with add_multimodal"
        if kind == "MuData"
        else "make one of a matrix with anndata.AnnData(matrix, obs=..., var=...)"
    )
    raise TypeError(f"expected an AnnData or the path of a file, got a {kind}; {remedy}")


class AnnDataGroup(ABC):
    """An AnnData in any open store, as ingest and conversion read it.

    Attributes
    ----------
    path
        The store.
    modality
        Name of its part in a MuData store, ``""`` for a store that is one AnnData.
    source
        Name used in error messages.
    """

    path: Path
    modality: str
    source: str

    @abstractmethod
    def matrices(self) -> list[str]:
        """Names of the matrices: ``X``, ``raw`` and the layers, as far as they exist."""

    @abstractmethod
    def matrix(self, name: str = "X") -> Matrix:
        """One of :meth:`matrices`; its shape agrees with obs and its var."""

    @abstractmethod
    def obs(self) -> pd.DataFrame:
        """Table of the cells, their names as index."""

    @abstractmethod
    def obs_columns(self) -> list[str]:
        """Names of the columns of obs."""

    @abstractmethod
    def var(self, matrix: str = "X") -> pd.DataFrame:
        """Table of the features of a matrix, their names as index."""


def no_matrix(source: str, name: str, available: Sequence[str]) -> str:
    """The message of a store that lacks a matrix, or has none at all."""
    if not available:
        return f"{source} holds no matrix (no X, raw or layers), so there are no counts to read"
    return f"{source} has no matrix {name!r}; it holds {list(available)} (X, raw, or the name of a layer)"


class HdfAnnData(AnnDataGroup):
    """An AnnData inside an open HDF5 file.

    Parameters
    ----------
    group
        The file itself, or a group of it.
    path
        The file.
    modality
        Name of the group in a MuData file, ``""`` for a file that is one AnnData.
    """

    def __init__(self, group: h5py.Group, path: Path, modality: str = "") -> None:
        self.path, self.modality, self._file = path, modality, group
        self.source = f"{path}:{modality}" if modality else str(path)

    def matrices(self) -> list[str]:
        """Names of the matrices: ``X``, ``raw`` and the layers, as far as they exist."""
        names = ["X"] if _is_matrix(self._file.get("X")) else []
        names += ["raw"] if _is_matrix(self._file.get(self._raw("X"))) else []
        return names + sorted(self._layers())

    def matrix(self, name: str = "X") -> Matrix:
        """One of :meth:`matrices`; its shape agrees with obs and its var.

        Raises
        ------
        InvalidDataError
            No such matrix, no rows or columns, a contradiction in its metadata.
        """
        if name not in (available := self.matrices()):
            raise InvalidDataError(no_matrix(self.source, name, available))
        key = {"X": "X", "raw": self._raw("X")}.get(name, f"layers/{name}")
        return open_matrix(self._file[key], f"{self.source}, matrix {name!r}")

    def obs(self) -> pd.DataFrame:
        """Table of the cells, their names as index."""
        return self._frame("obs")

    def obs_columns(self) -> list[str]:
        """Names of the columns of obs."""
        node = self._file["obs"]
        if isinstance(node, h5py.Dataset):
            return [str(name) for name in (node.dtype.names or ())]
        names = node.attrs.get("column-order", list(node))
        return [name.decode() if isinstance(name, bytes) else str(name) for name in names]

    def var(self, matrix: str = "X") -> pd.DataFrame:
        """Table of the features of a matrix, their names as index: of ``raw/var`` for ``raw``."""
        return self._frame(self._raw("var") if matrix == "raw" else "var")

    def _raw(self, member: str) -> str:
        """Where raw is: in a group, or (anndata before 0.7) in ``raw.X`` and ``raw.var`` beside others."""
        return f"raw.{member}" if f"raw.{member}" in self._file else f"raw/{member}"

    def _layers(self) -> list[str]:
        layers = self._file.get("layers")
        if not isinstance(layers, h5py.Group):
            return []
        # A layer may not hide X or raw; nobody names one so.
        return [name for name in layers if _is_matrix(layers[name]) and name not in ("X", "raw")]

    def _frame(self, key: str) -> pd.DataFrame:
        return read_frame(self._file, key, self.source)


class _File:
    """An open HDF5 file; a context manager."""

    def __init__(
        self, path: str | os.PathLike[str], kind: str, needs: set[str], what: str, *, allow_links: bool
    ) -> None:
        self.path = Path(checked(path))
        self._file = _open_hdf5(self.path, kind)
        if not allow_links:
            self._check_inside()
        if not needs <= set(self._file):
            found = sorted(self._file) or "nothing"
            known = describe_hdf5(self._file)
            self._file.close()
            raise InvalidDataError(
                f"{self.path} is HDF5 but not {what}: {known}"
                if known
                else f"{self.path} is HDF5 but not {what}: expected {' and '.join(sorted(needs))}, "
                f"found {found}"
            )

    def _check_inside(self) -> None:
        try:
            check_inside(self._file, self.path)
        except UnsafePathError:
            self._file.close()
            raise
        except Exception as error:  # h5py raises whatever it meets in a damaged file
            self._file.close()
            raise InvalidDataError(f"{self.path} cannot be read: {error}; it is damaged") from error

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._file.close()


class H5adFile(_File, HdfAnnData):
    """An open .h5ad file; a context manager.

    Parameters
    ----------
    path
        The file. Written by anndata of any release, the oldest ones included.
    allow_links
        Follow external links, external storage and virtual datasets that lead out of the file.

    Raises
    ------
    FileNotFoundError
        No such file.
    InvalidDataError
        The file is not HDF5, is damaged, or is not an AnnData.
    """

    def __init__(self, path: str | os.PathLike[str], *, allow_links: bool = False) -> None:
        needs = {"obs", "var"}
        _File.__init__(self, path, ".h5ad", needs, "an AnnData file", allow_links=allow_links)
        HdfAnnData.__init__(self, self._file, self.path)

    def __enter__(self) -> H5adFile:
        return self


class H5muFile(_File):
    """An open .h5mu file, which holds one AnnData per modality; a context manager.

    Parameters
    ----------
    path
        The file.
    allow_links
        Follow external links, external storage and virtual datasets that lead out of the file.

    Raises
    ------
    FileNotFoundError
        No such file.
    InvalidDataError
        The file is not HDF5, is damaged, is not a MuData, or its modalities do not share their cells.
    """

    def __init__(self, path: str | os.PathLike[str], *, allow_links: bool = False) -> None:
        super().__init__(path, ".h5mu", {"mod", "obs"}, "a MuData file", allow_links=allow_links)
        axis = int(self._file.attrs.get("axis", 0))
        if axis == 1:
            self._file.close()
            raise InvalidDataError(
                f"{self.path}: its parts share features, not cells (axis=1), so they are datasets and no "
                "modalities; write each to an .h5ad file and ingest them one by one"
            )

    def __enter__(self) -> H5muFile:
        return self

    def modalities(self) -> list[str]:
        """Names of the modalities, in the order of the file."""
        there = [str(name) for name in self._file["mod"]]
        order = [str(name) for name in self._file["mod"].attrs.get("mod-order", ())]
        return [name for name in order if name in there] + [name for name in there if name not in order]

    def modality(self, name: str) -> AnnDataGroup:
        """One of :meth:`modalities`.

        Raises
        ------
        InvalidDataError
            There is no such modality, or it is not an AnnData.
        """
        if name not in self.modalities():
            raise InvalidDataError(f"{self.path} has no modality {name!r}; it has {self.modalities()}")
        group = self._file["mod"][name]
        if not {"obs", "var"} <= set(group):
            raise InvalidDataError(
                f"{self.path}: modality {name!r} is not an AnnData: expected obs and var, "
                f"found {sorted(group)}"
            )
        return HdfAnnData(group, self.path, name)

    def obs(self) -> pd.DataFrame:
        """Table of all cells, without the copies of the modalities' columns that MuData keeps."""
        frame = read_frame(self._file, "obs", str(self.path))
        return without_copies(frame, {name: self.modality(name).obs().columns for name in self.modalities()})


def without_copies(obs: pd.DataFrame, columns: Mapping[str, Iterable[str]]) -> pd.DataFrame:
    """The common obs of a MuData without the columns ``<modality>:<column>`` of its modalities."""
    copies = {f"{name}:{column}" for name, own in columns.items() for column in own}
    return obs.drop(columns=[column for column in obs.columns if column in copies])


def _open_hdf5(path: Path, kind: str) -> h5py.File:
    with contextlib.suppress(ImportError):
        import hdf5plugin  # noqa: F401 - registers the filters that it brings
    if path.is_dir():
        raise FileNotFoundError(f"expected an {kind} file at {path}; {describe_path(path)}")
    check_file(path, f"an {kind} file")
    try:
        return h5py.File(path, "r")
    except OSError as error:
        # Only then: a file that is locked, or whose first block holds no signature, may be HDF5 nevertheless.
        size = path.stat().st_size
        if not size:
            raise InvalidDataError(f"{path} is not an HDF5 file, so not an {kind}: it is empty") from error
        if os.access(path, os.R_OK) and not h5py.is_hdf5(path) and not _has_signature(path):
            why = describe_path(path) or f"its {size} bytes do not begin with the HDF5 signature"
            raise InvalidDataError(f"{path} is not an HDF5 file, so not an {kind}: {why}") from error
        raise InvalidDataError(f"{path} cannot be opened: {describe_error(error, path)}") from error


def _has_signature(path: Path) -> bool:
    with open(path, "rb") as file:
        return file.read(8) == b"\x89HDF\r\n\x1a\n"


def read_frame(file: h5py.Group, key: str, source: str) -> pd.DataFrame:
    """A table of an AnnData file, its index as strings.

    Raises
    ------
    InvalidDataError
        It cannot be read.
    """
    from anndata.io import read_elem

    try:
        node = file[key]
        frame = _legacy_frame(file, key) if isinstance(node, h5py.Dataset) else read_elem(node)
    except Exception as error:  # anndata raises whatever it meets in a damaged file
        why = missing_filters(file[key]) if key in file else ""
        raise InvalidDataError(f"{source}: cannot read {key}: {why or error}") from error
    frame.index = frame.index.astype(str)
    return frame


def _is_matrix(node: object) -> bool:
    if isinstance(node, h5py.Group):
        return {"data", "indices", "indptr"} <= set(node)
    return isinstance(node, h5py.Dataset) and node.ndim == 2


def open_matrix(node: h5py.Group | h5py.Dataset, name: str) -> Matrix:
    if isinstance(node, h5py.Group | h5py.Dataset) and (why := missing_filters(node)):
        raise InvalidDataError(f"{name} cannot be read: {why}")
    if isinstance(node, h5py.Dataset):
        return DenseMatrix(name, (int(node.shape[0]), int(node.shape[1])), node)
    layout = node.attrs.get("encoding-type", node.attrs.get("h5sparse_format", ""))
    layout = layout.decode() if isinstance(layout, bytes) else str(layout)  # HDF5.jl: fixed-length strings
    shape = node.attrs.get("shape", node.attrs.get("h5sparse_shape"))
    kinds: dict[str, type[CsrMatrix] | type[CscMatrix]] = {
        "csr_matrix": CsrMatrix,
        "csr": CsrMatrix,
        "csc_matrix": CscMatrix,
        "csc": CscMatrix,
    }
    kind, axes = kinds.get(layout), two_axes(shape)
    if kind is None or axes is None:
        raise InvalidDataError(
            f"{name}: expected a CSR, CSC or dense matrix with its shape, found encoding {layout!r} "
            f"and shape {shape}"
        )
    return kind(name, axes, node["indptr"], node["indices"], node["data"])


def _legacy_frame(file: h5py.Group, key: str) -> pd.DataFrame:
    """A table stored as one compound dataset (anndata before 0.7), categories kept in uns."""
    import pandas as pd

    frame = pd.DataFrame.from_records(file[key][:])
    for column in frame.columns:
        if frame[column].dtype == object:
            frame[column] = frame[column].map(lambda v: v.decode() if isinstance(v, bytes) else v)
        folder = "raw.cat" if key == "raw.var" else "uns"
        labels = file.get(f"{folder}/{column}_categories")
        if isinstance(labels, h5py.Dataset) and frame[column].dtype.kind in "iu":
            names = [v.decode() if isinstance(v, bytes) else v for v in np.atleast_1d(labels[()])]
            codes = frame[column].to_numpy()
            # Categories are stored by the name of the column alone, so those of obs and var overwrite each
            # other: codes without a label are those of the other table, and stay numbers.
            if len(codes) and -1 <= codes.min() and codes.max() < len(names):
                frame[column] = pd.Categorical.from_codes(codes, names)
    return frame.set_index("index" if "index" in frame.columns else frame.columns[0])
