"""What every format is opened as: parts with matrices over the same cells, and tables of both axes."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING

import numpy as np

from hbx_gpu._remote.places import AnyPath
from hbx_gpu._stores.matrix import StoredMatrix
from hbx_gpu.errors import CorruptDataError, HbxError, UnknownNameError

if TYPE_CHECKING:
    import pandas as pd

RAW = "raw"


@dataclass
class Part:
    """One AnnData: matrices over the same cells.

    Attributes
    ----------
    name
        Store and place in it, used in error messages.
    matrices
        Name -> matrix: ``X``, ``raw`` and the layers, as far as they exist.
    read_obs
        Reads the table of cells, their names as index.
    read_var
        Reads the table of features of a matrix, given its name; feature names are the index.
    unreadable
        Layers that exist and cannot be read: name -> the error to raise when one is asked for.
    """

    name: str
    matrices: Mapping[str, StoredMatrix]
    read_obs: Callable[[], pd.DataFrame]
    read_var: Callable[[str], pd.DataFrame]
    unreadable: Mapping[str, HbxError] = field(default_factory=dict)
    _vars: dict[bool, pd.DataFrame] = field(default_factory=dict, repr=False)

    @cached_property
    def obs(self) -> pd.DataFrame:
        """Table of the cells.

        Raises
        ------
        CorruptDataError
            It has another number of rows than the matrices.
        """
        frame = self.read_obs()
        for matrix in self.matrices.values():
            if len(frame) != matrix.shape[0]:
                raise CorruptDataError(
                    f"{self.name}: obs has {len(frame)} rows, {matrix.name} has {matrix.shape[0]}"
                )
        return frame

    def var(self, matrix: str) -> pd.DataFrame:
        """Table of the features of one of the matrices.

        Raises
        ------
        CorruptDataError
            It has another number of rows than the matrix has columns.
        """
        raw = matrix == RAW
        if raw not in self._vars:
            self._vars[raw] = self.read_var(matrix)
        frame, stored = self._vars[raw], self.matrix(matrix)
        if len(frame) != stored.shape[1]:
            raise CorruptDataError(
                f"{self.name}: var has {len(frame)} rows, {stored.name} has {stored.shape[1]} columns"
            )
        return frame

    def matrix(self, name: str) -> StoredMatrix:
        """One of the matrices.

        Raises
        ------
        UnknownNameError
            The matrix does not exist.
        """
        if name in self.unreadable:
            raise self.unreadable[name]
        if name not in self.matrices:
            there = f"it holds {sorted(self.matrices)}" if self.matrices else "it holds no matrix at all"
            raise UnknownNameError(
                f"{self.name} has no matrix {name!r}; {there} (X, raw, or the name of a layer)"
            )
        return self.matrices[name]

    @property
    def n_cells(self) -> int:
        """Number of cells."""
        for matrix in self.matrices.values():
            return matrix.shape[0]
        return len(self.obs)


@dataclass
class Store:
    """One store: parts that follow one another, or modalities of the same cells.

    Attributes
    ----------
    path
        Where it lies.
    format
        Readable name of the format: ``"AnnData zarr"``, ``"10x Genomics HDF5"``, ...
    parts
        Parts of one modality, whose cells follow one another; one for all formats but collections.
    modalities
        Modality -> (part, row of the part for each cell of the store, -1 where a cell lacks it), for MuData.
    read_obs
        Reads the table of all cells of a store with modalities.
    allow_links
        Whether links that lead out of the store are followed.
    """

    path: AnyPath
    format: str
    parts: list[Part]
    modalities: dict[str, tuple[Part, np.ndarray]] = field(default_factory=dict)
    read_obs: Callable[[], pd.DataFrame] | None = None
    allow_links: bool = False

    @property
    def every_part(self) -> list[Part]:
        """The parts, and those of modalities."""
        return [*self.parts, *(part for part, _ in self.modalities.values())]
