"""Reading of an opened archive as SCDL's API has it: counts, feature columns, single rows and many."""

from __future__ import annotations

import itertools
import operator
import os
import warnings
from collections.abc import Sequence
from typing import TYPE_CHECKING, SupportsIndex, overload

import numpy as np

from hbx_gpu.errors import UnsupportedError
from hbx_gpu.scdl._api.collate import Rows
from hbx_gpu.scdl._format.archive import Archive
from hbx_gpu.scdl._format.features import ObservedFeatureIndex, VariableFeatureIndex
from hbx_gpu.scdl._format.header import Header
from hbx_gpu.scdl._format.layout import COL_PTR, DATA, HEADER, LAYOUT_VERSION, NEIGHBOR_FILES, ROW_PTR
from hbx_gpu.scdl._format.neighbors import NEIGHBOR_DTYPES

if TYPE_CHECKING:
    import torch


class RowReader:
    """Read access to an archive; :class:`hbx_gpu.scdl.SingleCellMemMapDataset` opens it.

    Attributes
    ----------
    archive
        The opened archive.
    data_path
        Its folder, as given.
    """

    archive: Archive
    data_path: str | os.PathLike[str]
    _warned_of_blocks = False

    @property
    def data(self) -> np.ndarray:
        """(nnz,). Values, read-only."""
        return self.archive.data

    @property
    def col_index(self) -> np.ndarray:
        """(nnz,). Columns, read-only."""
        return self.archive.indices

    @property
    def row_index(self) -> np.ndarray:
        """(n_rows + 1,). Row pointers, read-only."""
        return self.archive.indptr

    @property
    def header(self) -> Header | None:
        """The header as stored, or None."""
        return self.archive.header

    @property
    def metadata(self) -> dict[str, object]:
        """Content of `metadata.json` as stored; its row count may be stale."""
        return self.archive.metadata

    @property
    def header_path(self) -> str:
        """Path of the header."""
        return os.path.join(self.data_path, HEADER)

    @property
    def dtypes(self) -> dict[str, str]:
        """File name -> name of the dtype that its elements have."""
        return {
            DATA: self.data.dtype.name,
            COL_PTR: self.col_index.dtype.name,
            ROW_PTR: self.row_index.dtype.name,
            **{file: dtype.name for file, dtype in zip(NEIGHBOR_FILES, NEIGHBOR_DTYPES, strict=True)},
        }

    def version(self) -> str:
        """The release of SCDL whose layout is written; that of the archive is ``archive.version``."""
        return LAYOUT_VERSION

    def __len__(self) -> int:
        return self.number_of_rows()

    def number_of_rows(self) -> int:
        """Number of cells; 0 for an archive without gene blocks."""
        return self.archive.var.number_of_rows()

    def number_of_variables(self) -> list[int]:
        """Recorded number of genes of every gene block; ``[0]`` without one."""
        return list(self.archive.n_vars) or [0]

    def shape(self) -> tuple[int, list[int]]:
        """Number of cells, and of genes per block."""
        return self.number_of_rows(), self.number_of_variables()

    def number_of_values(self) -> int:
        """Cells times genes, over all blocks."""
        return sum(self.archive.var.number_of_values())

    def number_nonzero_values(self) -> int:
        """Number of stored values; explicit zeros count."""
        return len(self.data)

    def sparsity(self) -> float:
        """Share of values that are not stored; 0.0 if there are none."""
        total = self.number_of_values()
        return (total - self.number_nonzero_values()) / total if total else 0.0

    def var_features(self) -> VariableFeatureIndex:
        """The gene columns."""
        return self.archive.var

    def obs_features(self) -> ObservedFeatureIndex:
        """The cell columns; an empty index where the archive has none.

        Raises
        ------
        CorruptDataError
            They are those of another number of cells.
        """
        obs = self.archive.obs
        return ObservedFeatureIndex() if obs is None else obs

    def _row(self, index: SupportsIndex) -> int:
        row = operator.index(index)
        n = self.archive.n_rows
        if not -n <= row < n:
            raise IndexError(f"row {row} is out of range: the archive has {n} rows")
        return row % n

    @overload
    def __getitem__(self, index: int | np.integer) -> torch.Tensor: ...

    @overload
    def __getitem__(self, index: slice | Sequence[int] | np.ndarray) -> list[torch.Tensor]: ...

    def __getitem__(
        self, index: int | np.integer | slice | Sequence[int] | np.ndarray
    ) -> torch.Tensor | list[torch.Tensor]:
        """Row tensors.

        Parameters
        ----------
        index
            An integer, a slice, or a list or array of integers.

        Returns
        -------
        torch.Tensor or list of torch.Tensor
            (2, k) for an integer: values, then columns, in the dtype that holds both. Else one per row.
        """
        if isinstance(index, slice):
            return self.__getitems__(range(*index.indices(self.archive.n_rows)))
        if isinstance(index, Sequence) or (isinstance(index, np.ndarray) and index.ndim):
            return self.__getitems__(index)
        import torch

        values, columns = self.archive.row(self._row(index))
        pair = np.empty((2, len(values)), np.promote_types(values.dtype, columns.dtype))
        pair[0], pair[1] = values, columns
        return torch.from_numpy(pair)

    def __getitems__(self, indices: Sequence[int] | np.ndarray) -> Rows:
        """Many rows at once, as a DataLoader asks for them; read together.

        Parameters
        ----------
        indices
            Row numbers, in any order.

        Returns
        -------
        Rows
            A list of row tensors that knows the number of genes, so that batches are equally wide.
        """
        import torch

        rows = np.array([self._row(index) for index in indices], np.int64)
        self._warn_of_blocks(rows)
        values, columns, offsets = self.archive.gather(rows)
        pairs = np.empty((2, len(values)), np.promote_types(values.dtype, columns.dtype))
        pairs[0], pairs[1] = values, columns
        tensor = torch.from_numpy(pairs)
        edges = offsets.tolist()
        parts = [tensor[:, start:stop] for start, stop in itertools.pairwise(edges)]
        return Rows(parts, self.archive.max_width)

    def _warn_of_blocks(self, rows: np.ndarray) -> None:
        if self._warned_of_blocks or len(self.archive.n_vars) < 2 or not len(rows):
            return
        blocks = self.archive.block_of(rows)
        if blocks.min() != blocks.max():
            self._warned_of_blocks = True
            warnings.warn(
                f"{self.data_path}: rows with different genes share a batch, and their columns count within "
                "their own genes; hbx_gpu.make_loader brings them to one gene axis",
                UserWarning,
                stacklevel=3,
            )

    def get_row(
        self,
        index: SupportsIndex,
        return_var_features: bool = False,
        var_feature_names: Sequence[str] | None = None,
        return_obs_features: bool = False,
        obs_feature_names: Sequence[str] | None = None,
    ) -> tuple[tuple[np.ndarray, np.ndarray], list[np.ndarray] | None, list[object] | None]:
        """One cell.

        Parameters
        ----------
        index
            Row number.
        return_var_features, return_obs_features
            Whether gene or cell columns are wanted.
        var_feature_names, obs_feature_names
            Which; None for all.

        Returns
        -------
        (values, columns)
            (k,) each, in stored order and dtypes: read-only views of the files.
        var_features
            Per column asked for, an array with one element per gene of the row's block; or None.
        obs_features
            Per column asked for, the value of this cell; or None.

        Raises
        ------
        IndexError
            No such row, or no cell columns in this archive.
        ValueError
            No such column.
        """
        row = self._row(index)
        stored = self.archive.row(row)
        var = self.archive.var.lookup(row, var_feature_names)[0] if return_var_features else None
        obs = self.obs_features().lookup(row, obs_feature_names)[0] if return_obs_features else None
        return stored, var, obs

    def get_row_padded(
        self,
        index: SupportsIndex,
        return_var_features: bool = False,
        var_feature_names: Sequence[str] | None = None,
        return_obs_features: bool = False,
        obs_feature_names: Sequence[str] | None = None,
    ) -> tuple[np.ndarray, list[np.ndarray] | None, list[object] | None]:
        """One cell as a dense row.

        Parameters and errors are those of :meth:`get_row`.

        Returns
        -------
        row
            float64, one element per gene of the row's block. Columns that repeat are summed. Where
            columns exceed the recorded genes (`raw.X` beside the genes of `X`) all rows of the block are
            as wide as its largest column.
        var_features, obs_features
            As :meth:`get_row`.

        Raises
        ------
        UnsupportedError
            A column beyond the genes, in an archive too large to be searched for the largest.
        """
        row = self._row(index)
        stored, var, obs = self.get_row(
            row, return_var_features, var_feature_names, return_obs_features, obs_feature_names
        )
        return self._padded(row, stored), var, obs

    def _padded(self, row: int, stored: tuple[np.ndarray, np.ndarray]) -> np.ndarray:
        values, columns = stored
        width = self.archive.width(int(self.archive.block_of(row))) if self.archive.n_vars else 0
        dense = np.bincount(columns, weights=values, minlength=width).astype(np.float64, copy=False)
        if len(dense) > width:
            raise UnsupportedError(
                f"{self.data_path}, row {row}: column {len(dense) - 1}, but {width} genes are recorded; "
                "get_row gives values and columns as they are"
            )
        return dense

    def get_row_column(
        self, index: int, column: int | None, impute_missing_zeros: bool = True
    ) -> np.generic | float | None:
        """One element.

        Parameters
        ----------
        index, column
            Row number, and column within the genes of the row's block.
        impute_missing_zeros
            Whether an element that is not stored is 0.0 instead of None.

        Returns
        -------
        numpy scalar, float or None
            In the stored dtype; the sum, if the column repeats; None if `column` is None.
        """
        (values, columns), _, _ = self.get_row(index)
        if column is None:
            return None
        found = values[columns == column]
        if len(found):
            element: np.generic = found.sum() if len(found) > 1 else found[0]
            return element
        return 0.0 if impute_missing_zeros else None
