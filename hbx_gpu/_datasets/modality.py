"""The protocol that the parts of a multimodal dataset follow."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, Protocol, Self

import numpy as np

from hbx_gpu._datasets.stored import Kind, Planned
from hbx_gpu._protocols import Chunked, Loadable, Rows
from hbx_gpu.batch import Part

if TYPE_CHECKING:
    from hbx_gpu._storage.chunks import ChunkDirectory
    from hbx_gpu._storage.readers import Slab


class Modality(Loadable[Part], Chunked, Protocol):
    """The rows of one feature space, planned and decoded apart from each other."""

    kind: Kind

    @property
    def n_features(self) -> int:
        """Number of columns."""

    @property
    def n_groups(self) -> int:
        """Number of stored matrices."""

    @property
    def layers(self) -> tuple[str, ...]:
        """Names of the layers that are read."""

    @property
    def feature_uids(self) -> np.ndarray:
        """uid of the feature of each column, (n_features,)."""

    @property
    def groups_np(self) -> np.ndarray:
        """Number of the stored matrix of every row, int32, (n_cells,); -1 where it lacks the modality."""

    def groups_of(self, rows: np.ndarray) -> np.ndarray:
        """Number of the stored matrix of some rows, int32; -1 where they lack the modality."""

    @property
    def present(self) -> np.ndarray:
        """Whether each row has the modality, bool, (n_cells,)."""

    @property
    def columns(self) -> dict[str, np.ndarray]:
        """Metadata columns."""

    @property
    def categories(self) -> dict[str, np.ndarray]:
        """Vocabularies of metadata columns."""

    @property
    def directory(self) -> ChunkDirectory:
        """Directory of the chunks."""

    def plan(self, selection: np.ndarray) -> Planned:
        """Plan the rows `selection`: find the chunks that they need."""

    def decode(self, plan: Any, slab: Slab, selections: Sequence[np.ndarray]) -> Sequence[Part]:
        """Decode the batches `selections` with a plan of :meth:`plan`."""

    def subset(self, rows: Rows) -> Self:
        """Return the dataset of some rows."""

    def identity(self) -> dict[str, object]:
        """Return plain values that identify the rows."""

    def axes(self) -> str:
        """Return a digest of what columns and codes of batches mean."""

    def measured_masks(self, groups: np.ndarray) -> np.ndarray:
        """Return whether each stored matrix has each column, bool, (len(groups), n_features)."""

    def with_row_numbers(self) -> Self:
        """Return this dataset with row numbers as metadata column ``index``."""

    def with_wide_columns(self) -> Self:
        """Return this dataset with sparse batches that become CSR tensors without a copy."""

    def with_columns(self, columns: Mapping[str, np.ndarray]) -> Self:
        """Return this dataset with more metadata columns."""

    def without_metadata(self) -> Self:
        """Return this dataset with batches that carry no metadata."""

    def close(self) -> None:
        """Close the files."""
