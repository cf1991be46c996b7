"""Reading an .h5ad file piece by piece: which matrices it holds, their rows as a stream, its obs and var."""

from __future__ import annotations

import os
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any

import h5py
import numpy as np

from hbx_gpu.atlas.matrix import CscMatrix, CsrMatrix, DenseMatrix, Matrix
from hbx_gpu.errors import InvalidDataError

if TYPE_CHECKING:
    import pandas as pd


class H5adFile:
    """An open .h5ad file; a context manager.

    Parameters
    ----------
    path
        The file. Written by anndata of any release, the oldest ones included.

    Raises
    ------
    FileNotFoundError
        No such file.
    InvalidDataError
        Not HDF5, damaged, or no AnnData.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = Path(path)
        if not self.path.is_file():
            what = "a directory" if self.path.is_dir() else "missing"
            raise FileNotFoundError(f"expected an .h5ad file at {self.path}; it is {what}")
        if not h5py.is_hdf5(self.path):
            size = self.path.stat().st_size
            why = "it is empty" if not size else f"its {size} bytes do not begin with the HDF5 signature"
            raise InvalidDataError(f"{self.path} is no HDF5 file, so no .h5ad: {why}")
        try:
            self._file = h5py.File(self.path, "r")
        except OSError as error:
            raise InvalidDataError(
                f"{self.path} cannot be opened: {error}; it is truncated or damaged"
            ) from error
        if not {"obs", "var"} <= set(self._file):
            found = sorted(self._file) or "nothing"
            self._file.close()
            raise InvalidDataError(
                f"{self.path} is HDF5 but no AnnData file: expected obs and var, found {found}"
            )

    def __enter__(self) -> H5adFile:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._file.close()

    def matrices(self) -> list[str]:
        """Names of the matrices: ``X``, ``raw`` and the layers, as far as they exist."""
        names = ["X"] if _is_matrix(self._file.get("X")) else []
        names += ["raw"] if _is_matrix(self._file.get("raw/X")) else []
        return names + sorted(self._layers())

    def matrix(self, name: str = "X") -> Matrix:
        """One of :meth:`matrices`; its shape agrees with obs and its var.

        Raises
        ------
        InvalidDataError
            No such matrix, no rows or columns, a contradiction in its metadata.
        """
        if name not in self.matrices():
            raise InvalidDataError(
                f"{self.path} has no matrix {name!r}; it holds {self.matrices()} "
                "(X, raw, or the name of a layer)"
            )
        key = {"X": "X", "raw": "raw/X"}.get(name, f"layers/{name}")
        return open_matrix(self._file[key], f"{self.path}, matrix {name!r}")

    def obs(self) -> pd.DataFrame:
        """Table of the cells, their names as index."""
        return self._frame("obs")

    def var(self, matrix: str = "X") -> pd.DataFrame:
        """Table of the features of a matrix, their names as index: of ``raw/var`` for ``raw``."""
        return self._frame("raw/var" if matrix == "raw" else "var")

    def _layers(self) -> list[str]:
        layers = self._file.get("layers")
        if not isinstance(layers, h5py.Group):
            return []
        # A layer may not hide X or raw; nobody names one so.
        return [name for name in layers if _is_matrix(layers[name]) and name not in ("X", "raw")]

    def _frame(self, key: str) -> pd.DataFrame:
        from anndata.io import read_elem

        try:
            node = self._file[key]
            frame = _legacy_frame(self._file, key) if isinstance(node, h5py.Dataset) else read_elem(node)
        except Exception as error:  # anndata raises whatever it meets in a damaged file
            raise InvalidDataError(f"{self.path}: cannot read {key}: {error}") from error
        frame.index = frame.index.astype(str)
        return frame


def _is_matrix(node: Any) -> bool:
    if isinstance(node, h5py.Group):
        return {"data", "indices", "indptr"} <= set(node)
    return isinstance(node, h5py.Dataset) and node.ndim == 2


def open_matrix(node: Any, name: str) -> Matrix:
    if isinstance(node, h5py.Dataset):
        return DenseMatrix(name, (int(node.shape[0]), int(node.shape[1])), node)
    layout = str(node.attrs.get("encoding-type", node.attrs.get("h5sparse_format", "")))
    shape = node.attrs.get("shape", node.attrs.get("h5sparse_shape"))
    kind: Any = {"csr_matrix": CsrMatrix, "csr": CsrMatrix, "csc_matrix": CscMatrix, "csc": CscMatrix}.get(
        layout
    )
    if kind is None or shape is None or len(shape) != 2:
        raise InvalidDataError(
            f"{name}: expected a CSR, CSC or dense matrix with its shape, found encoding {layout!r} "
            f"and shape {shape}"
        )
    opened: Matrix = kind(name, (int(shape[0]), int(shape[1])), node["indptr"], node["indices"], node["data"])
    return opened


def _legacy_frame(file: h5py.File, key: str) -> pd.DataFrame:
    """A table stored as one compound dataset (anndata before 0.7), categories kept in uns."""
    import pandas as pd

    frame = pd.DataFrame.from_records(file[key][:])
    for column in frame.columns:
        if frame[column].dtype == object:
            frame[column] = frame[column].map(lambda v: v.decode() if isinstance(v, bytes) else v)
        labels = file.get(f"uns/{column}_categories")
        if isinstance(labels, h5py.Dataset) and frame[column].dtype.kind in "iu":
            names = [v.decode() if isinstance(v, bytes) else v for v in np.atleast_1d(labels[()])]
            frame[column] = pd.Categorical.from_codes(frame[column].to_numpy(), names)
    return frame.set_index("index" if "index" in frame.columns else frame.columns[0])
