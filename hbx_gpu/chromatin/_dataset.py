"""A dataset whose batches are counts over bins or peaks, made from stored fragments as they are read."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from hbx_gpu.batch import SparseBatch
from hbx_gpu.chromatin._chromosomes import registered
from hbx_gpu.chromatin._counting import count_fragments
from hbx_gpu.chromatin._intervals import observed_sizes
from hbx_gpu.chromatin._regions import Bins, Peaks, Regions
from hbx_gpu.errors import InvalidDataError
from hbx_gpu.stats import stage

if TYPE_CHECKING:
    import pandas as pd

_LOG = logging.getLogger(__name__)

_OF_THE_FRAGMENTS = frozenset({
    "n_cells", "n_groups", "groups_np", "feature_space", "present", "categories", "columns",
    "row_numbers", "identity", "reader_kind", "directory", "open_reader", "plan", "read", "needed_chunks",
    "close",
})  # fmt: skip
"""What rows and chunks are the same of, whatever is counted."""


class FragmentMatrixDataset:
    """The cells of a fragment dataset as rows of a matrix: cells x bins, or cells x peaks.

    Batches are :class:`~hbx_gpu.batch.SparseBatch` of counts, so samplers, collates and loaders take this as
    any sparse dataset. Nothing is stored: other bins are another dataset over the same fragments.

    Parameters
    ----------
    fragments
        A dataset over fragments that reads the layers ``starts`` and ``lengths``.
    matrix
        Where to count.
    chromosome_names
        Name of every column of `fragments`; by default their uids. None for one to leave out.
    chromosome_sizes
        Name -> bases, for `Bins` that have no sizes of their own.

    Attributes
    ----------
    n_cells, n_features
        Shape of the whole as one dense matrix.
    feature_uids
        object, (n_features,): ``chr1:0-5000``.
    dtype
        uint32, of batch values.
    fragments, regions
        What is read, and where it is counted.

    Raises
    ------
    InvalidDataError
        The names do not fit the dataset, or the regions the names; see :meth:`Bins.over`.
    """

    dtype = np.dtype(np.uint32)
    layer = "counts"
    layers = ("counts",)

    def __init__(
        self,
        fragments: Any,
        matrix: Bins | Peaks,
        *,
        chromosome_names: Sequence[str | None] | np.ndarray | None = None,
        chromosome_sizes: dict[str, int] | None = None,
    ) -> None:
        names = fragments.feature_uids if chromosome_names is None else chromosome_names
        if len(names) != fragments.n_features:
            raise InvalidDataError(
                f"{len(names)} chromosome names for a dataset of {fragments.n_features} chromosomes"
            )
        if isinstance(matrix, Bins) and matrix.observed:
            _LOG.info("reading all fragments of %s once, for the sizes of chromosomes", fragments)
            chromosome_sizes = observed_sizes(fragments, names)
        self.fragments = fragments
        self.regions: Regions = matrix.over(names, chromosome_sizes)

    @classmethod
    def registered(
        cls, fragments: Any, matrix: Bins | Peaks, registry: pd.DataFrame
    ) -> FragmentMatrixDataset:
        """With names and sizes of chromosomes as an atlas has registered them.

        Parameters
        ----------
        fragments, matrix
            As for the class.
        registry
            Registry of the chromosomes, uid as index.
        """
        names, sizes = registered(registry, fragments.feature_uids)
        return cls(fragments, matrix, chromosome_names=names, chromosome_sizes=sizes)

    def __getattr__(self, name: str) -> Any:
        # By name: a method that makes another dataset of the fragments would hand out chromosomes as columns.
        if name not in _OF_THE_FRAGMENTS:
            raise AttributeError(f"{type(self).__name__!r} object has no attribute {name!r}")
        return getattr(self.fragments, name)

    @property
    def n_features(self) -> int:
        return self.regions.n_features

    @property
    def feature_uids(self) -> np.ndarray:
        return self.regions.feature_uids

    def __len__(self) -> int:
        return len(self.fragments)

    def __repr__(self) -> str:
        return f"FragmentMatrixDataset({len(self):,} cells x {self.regions!r} of {self.fragments!r})"

    def __getitem__(self, rows: int | slice | Sequence[int] | np.ndarray) -> SparseBatch:
        """A batch of the rows asked for, as of :class:`hbx_gpu.dataloader.CellDataset`."""
        return self._counted(self.fragments[rows])

    def __getitems__(self, rows: Sequence[int] | np.ndarray) -> SparseBatch:
        """One batch of `rows`, in the order asked."""
        return self.read_batches([rows])[0]

    def read_batches(self, batches: Sequence[Sequence[int] | np.ndarray]) -> list[SparseBatch]:
        """Several batches under one plan."""
        return [self._counted(batch) for batch in self.fragments.read_batches(batches)]

    def decode(self, plan: Any, slab: Any, selections: Sequence[np.ndarray]) -> list[SparseBatch]:
        """The batches that a plan is for, as :meth:`hbx_gpu.dataloader.CellDataset.decode`."""
        return [self._counted(batch) for batch in self.fragments.decode(plan, slab, selections)]

    def subset(self, rows: Sequence[int] | np.ndarray) -> FragmentMatrixDataset:
        """The dataset of some cells; see :meth:`hbx_gpu.dataloader.CellDataset.subset`."""
        other: FragmentMatrixDataset = object.__new__(type(self))
        other.__dict__.update(self.__dict__, fragments=self.fragments.subset(rows))
        return other

    def _counted(self, batch: SparseBatch) -> SparseBatch:
        with stage("decode"):
            return count_fragments(batch, self.regions)

    def batch_nbytes(self, rows: Sequence[int] | np.ndarray) -> int:
        """Bytes of one batch while it is made; counts are taken to be as large as the fragments."""
        return self.batches_nbytes([rows])[0]

    def batches_nbytes(self, batches: Sequence[Sequence[int] | np.ndarray]) -> list[int]:
        """:meth:`batch_nbytes` of each of several batches."""
        return [2 * int(nbytes) for nbytes in self.fragments.batches_nbytes(batches)]

    def measured_masks(self, groups: np.ndarray) -> np.ndarray:
        """bool, (len(groups), n_features). Whether a stored matrix has the chromosome of a column."""
        chromosomes = self.fragments.measured_masks(groups)
        none = np.zeros((len(groups), 1), dtype=bool)
        return np.hstack([chromosomes, none])[:, self.regions.column_numbers()]

    def reading_with(self, reader: Any) -> FragmentMatrixDataset:
        """This dataset with another reader of its chunks; everything else is shared."""
        return self._over(self.fragments.reading_with(reader))

    def without_metadata(self) -> FragmentMatrixDataset:
        """This dataset without obs columns; everything else is shared."""
        return self._over(self.fragments.without_metadata())

    def with_columns(self, columns: Mapping[str, np.ndarray]) -> FragmentMatrixDataset:
        """This dataset with more metadata columns; everything else is shared."""
        return self._over(self.fragments.with_columns(columns))

    def _over(self, fragments: Any) -> FragmentMatrixDataset:
        other: FragmentMatrixDataset = object.__new__(type(self))
        other.fragments, other.regions = fragments, self.regions
        return other
