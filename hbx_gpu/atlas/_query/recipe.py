"""What to ask of which snapshot, as plain data that crosses process borders; importing it is cheap."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from hbx_gpu.atlas._query.state import QueryState

if TYPE_CHECKING:
    from hbx_gpu._datasets.cells import CellDataset


@dataclass(frozen=True, slots=True)
class QueryRecipe:
    """How to build a dataset again, in another process: the snapshot it came from and the question asked.

    Attributes
    ----------
    path, version, store, table
        The atlas, the pinned snapshot, its zarr store, and the obs table.
    state
        The query.
    field_name, layers, metadata_columns, dtypes
        Arguments of ``to_cell_dataset``.
    absent
        Whether rows without the modality are numbered too, as in multimodal datasets.
    version_table_name
        Table the snapshot is recorded in.
    """

    path: str
    version: int
    store: str
    table: str
    state: QueryState
    field_name: str
    layers: tuple[str, ...]
    metadata_columns: tuple[str, ...] | None
    dtypes: tuple[tuple[str, str], ...] = ()
    absent: bool = False
    version_table_name: str = "atlas_versions"

    def rebuild(self) -> CellDataset:
        """Open the snapshot and build the dataset; same rows in the same order."""
        from hbx_gpu.atlas._catalogue.snapshot import Snapshot
        from hbx_gpu.atlas._query.query import AtlasQuery

        snapshot = Snapshot.open(
            self.path, self.version, store=self.store, version_table_name=self.version_table_name
        )
        return AtlasQuery(snapshot, self.table, state=self.state).dataset_of(self)
