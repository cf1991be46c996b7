"""What a part of a multimodal dataset is."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, Protocol, Self

import numpy as np

from hbx_gpu._datasets.stored import Kind, Planned
from hbx_gpu._protocols import Chunked, Loadable, Rows

if TYPE_CHECKING:
    from hbx_gpu._storage.chunks import ChunkDirectory
    from hbx_gpu._storage.readers import Slab


class Modality(Loadable[Any], Chunked, Protocol):
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
        """(n_features,). Which column is which."""

    @property
    def groups_np(self) -> np.ndarray:
        """int32, (n_cells,). Stored matrix of every row; -1 where it lacks the modality."""

    @property
    def present(self) -> np.ndarray:
        """bool, (n_cells,). Which rows have the modality."""

    @property
    def columns(self) -> dict[str, np.ndarray]:
        """Metadata columns."""

    @property
    def categories(self) -> dict[str, np.ndarray]:
        """Vocabularies of metadata columns."""

    @property
    def directory(self) -> ChunkDirectory:
        """Where the chunks lie."""

    def plan(self, selection: np.ndarray) -> Planned:
        """Which chunks some rows need."""

    def decode(self, plan: Any, slab: Slab, selections: Sequence[np.ndarray]) -> list[Any]:
        """The batches that a plan of :meth:`plan` is for."""

    def subset(self, rows: Rows) -> Self:
        """The same for some rows."""

    def identity(self) -> dict[str, Any]:
        """Which rows these are."""

    def measured_masks(self, groups: np.ndarray) -> np.ndarray:
        """bool, (len(groups), n_features). Which columns a stored matrix has."""

    def with_row_numbers(self) -> Self:
        """The same with row numbers as metadata column ``index``."""

    def with_wide_columns(self) -> Self:
        """The same with sparse batches of which CSR tensors are made without a copy."""

    def with_columns(self, columns: Mapping[str, np.ndarray]) -> Self:
        """The same with more metadata columns."""

    def without_metadata(self) -> Self:
        """The same with batches that carry no metadata."""

    def close(self) -> None:
        """Close the files."""
