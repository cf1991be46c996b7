"""A dataset whose batches are counts over bins or peaks, made from stored fragments as they are read."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Self

import numpy as np

from hbx_gpu._datasets.base import Dataset, digest_of_axes
from hbx_gpu._datasets.cells import CellDataset
from hbx_gpu._datasets.stored import Kind
from hbx_gpu._plan.rows import BatchPlan
from hbx_gpu._protocols import Rows
from hbx_gpu.batch import SparseBatch
from hbx_gpu.chromatin._chromosomes import registered
from hbx_gpu.chromatin._counting import count_fragments
from hbx_gpu.chromatin._intervals import observed_sizes
from hbx_gpu.chromatin._regions import Bins, Peaks, Regions
from hbx_gpu.errors import InvalidDataError
from hbx_gpu.loader_stats import stage

if TYPE_CHECKING:
    import pandas as pd

    from hbx_gpu._storage.chunks import ChunkDirectory
    from hbx_gpu._storage.readers import Reader, Slab

_LOG = logging.getLogger(__name__)


class FragmentMatrixDataset(Dataset[SparseBatch]):
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
        The dataset that is read, and the regions in which its fragments are counted.

    Raises
    ------
    InvalidDataError
        The names do not fit the dataset, or the regions the names; see :meth:`Bins.over`.
    """

    kind: Kind = "sparse"
    dtype = np.dtype(np.uint32)
    layer = "counts"
    layers = ("counts",)

    def __init__(
        self,
        fragments: CellDataset,
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
        cls, fragments: CellDataset, matrix: Bins | Peaks, registry: pd.DataFrame
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

    @property
    def feature_space(self) -> str:
        return self.fragments.feature_space

    @property
    def groups_np(self) -> np.ndarray:
        return self.fragments.groups_np

    def groups_of(self, rows: np.ndarray) -> np.ndarray:
        """Number of the stored matrix of some rows, int32, in the order of `rows`."""
        return self.fragments.groups_of(rows)

    @property
    def n_groups(self) -> int:
        return self.fragments.n_groups

    @property
    def present(self) -> np.ndarray:
        return self.fragments.present

    @property
    def columns(self) -> dict[str, np.ndarray]:
        return self.fragments.columns

    @property
    def categories(self) -> dict[str, np.ndarray]:
        return self.fragments.categories

    @property
    def directory(self) -> ChunkDirectory:
        return self.fragments.directory

    @property
    def reader_kind(self) -> str:
        return self.fragments.reader_kind

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

    def read_rows(self, selections: Sequence[np.ndarray]) -> list[SparseBatch]:
        """See :meth:`Dataset.read_rows`."""
        return [self._counted(batch) for batch in self.fragments.read_rows(selections)]

    def plan(self, selection: np.ndarray) -> BatchPlan:
        """Plan the rows `selection`: find the chunks of fragments that they need."""
        return self.fragments.plan(selection)

    def needed_chunks(self) -> np.ndarray:
        """See :meth:`hbx_gpu.dataloader.CellDataset.needed_chunks`."""
        return self.fragments.needed_chunks()

    def decode(self, plan: BatchPlan, slab: Slab, selections: Sequence[np.ndarray]) -> list[SparseBatch]:
        """The batches that a plan is for, as :meth:`hbx_gpu.dataloader.CellDataset.decode`."""
        return [self._counted(batch) for batch in self.fragments.decode(plan, slab, selections)]

    def _counted(self, batch: SparseBatch) -> SparseBatch:
        with stage("decode"):
            return count_fragments(batch, self.regions)

    def rows_nbytes(self, selections: Sequence[np.ndarray]) -> list[int]:
        """Bytes of each batch while it is made; counts are taken to be as large as fragments."""
        return [2 * nbytes for nbytes in self.fragments.rows_nbytes(selections)]

    def measured_masks(self, groups: np.ndarray) -> np.ndarray:
        """bool, (len(groups), n_features). Whether a stored matrix has the chromosome of a column."""
        chromosomes = self.fragments.measured_masks(groups)
        none = np.zeros((len(groups), 1), dtype=bool)
        return np.hstack([chromosomes, none])[:, self.regions.column_numbers()]

    def axes(self) -> str:
        """Digest of regions and vocabularies; see :meth:`CellDataset.axes`."""
        return digest_of_axes(self.feature_uids, self.layers, self.categories)

    def marked(self, batch: SparseBatch) -> SparseBatch:
        """See :meth:`Dataset.marked`."""
        return replace(batch, axes=self.axes())

    def identity(self) -> dict[str, object]:
        """See :meth:`hbx_gpu.dataloader.CellDataset.identity`."""
        return self.fragments.identity()

    def subset(self, rows: Rows) -> Self:
        """The dataset of some cells; see :meth:`hbx_gpu.dataloader.CellDataset.subset`."""
        return self._derived(fragments=self.fragments.subset(rows))

    def open_reader(self, kind: str) -> Reader:
        """A reader of the chunks of the fragments."""
        return self.fragments.open_reader(kind)

    def reading_with(self, reader: Reader) -> Self:
        """This dataset with another reader of its chunks; everything else is shared."""
        return self._derived(fragments=self.fragments.reading_with(reader))

    def without_metadata(self) -> Self:
        """This dataset with batches that carry no metadata; everything else is shared."""
        return self._derived(fragments=self.fragments.without_metadata())

    def with_columns(self, columns: Mapping[str, np.ndarray]) -> Self:
        """This dataset with more metadata columns; everything else is shared."""
        return self._derived(fragments=self.fragments.with_columns(columns))

    def with_row_numbers(self) -> Self:
        """See :meth:`Dataset.with_row_numbers`."""
        return self._derived(fragments=self.fragments.with_row_numbers())

    def close(self) -> None:
        """Close the files; the dataset opens them again when it is read again."""
        self.fragments.close()
