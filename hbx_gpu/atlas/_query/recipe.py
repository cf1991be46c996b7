"""A snapshot and a query as plain data that can be sent to other processes; importing it is cheap."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from hbx_gpu.atlas._query.state import QueryState

if TYPE_CHECKING:
    from hbx_gpu._datasets.dense import FeatureDataset
    from hbx_gpu.atlas._catalog.snapshot import PointerColumn
    from hbx_gpu.atlas._query.obs import ModalityRows
    from hbx_gpu.atlas._query.opening import Arrays
    from hbx_gpu.atlas._query.selection import Selection


@dataclass(frozen=True, slots=True)
class QueryRecipe:
    """How to build a dataset again, in another process: the snapshot it came from and the question asked.

    Attributes
    ----------
    path, version, store, table
        The atlas, the pinned snapshot, its zarr store, and the obs table.
    state
        Steps of the query.
    field_name, layers, metadata_columns, dtypes
        Arguments passed to ``to_cell_dataset``.
    absent
        Whether rows without the modality are numbered too, as in multimodal datasets.
    version_table_name
        Table that records the snapshot.
    allow_links
        Whether links may lead out of the zarr store.
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
    allow_links: bool = False

    @classmethod
    def of(
        cls,
        selection: Selection,
        pointer: PointerColumn,
        layers: tuple[str, ...],
        metadata_columns: Sequence[str] | None,
        *,
        dtypes: tuple[tuple[str, str], ...] = (),
        absent: bool = False,
    ) -> QueryRecipe:
        """The recipe for layers of a field over the rows of a selection."""
        snapshot = selection.snapshot
        return cls(
            path=str(snapshot.path),
            version=snapshot.version,
            store=str(snapshot.store_path),
            table=selection.name,
            state=selection.state,
            field_name=pointer.name,
            layers=layers,
            metadata_columns=None if metadata_columns is None else tuple(metadata_columns),
            dtypes=dtypes,
            absent=absent,
            version_table_name=snapshot.version_table_name,
            allow_links=snapshot.allow_links,
        )

    def dataset(
        self,
        selection: Selection,
        found: ModalityRows | None = None,
        ahead: Mapping[str, Arrays] | None = None,
    ) -> FeatureDataset:
        """The dataset over rows of a selection.

        Parameters
        ----------
        selection
            The rows.
        found
            The same rows if they have been read already.
        ahead
            Arrays that are open already, by name of their group.
        """
        pointer = selection.fields.one(None, self.field_name)
        if found is None:
            found = selection.read_rows(pointer, list(self.metadata_columns or ()), absent=self.absent)
        from hbx_gpu.atlas._query.opening import open_dataset

        return open_dataset(
            selection.snapshot,
            selection.name,
            pointer,
            found,
            self.layers,
            selection.columns(pointer),
            self,
            dict(self.dtypes) or None,
            ahead,
        )

    def rebuild(self) -> FeatureDataset:
        """Open the snapshot and build the dataset, with the same rows in the same order."""
        from hbx_gpu.atlas._catalog.snapshot import Snapshot
        from hbx_gpu.atlas._query.selection import Selection

        snapshot = Snapshot.open(
            self.path,
            self.version,
            store=self.store,
            version_table_name=self.version_table_name,
            allow_links=self.allow_links,
        )
        return self.dataset(Selection.of(snapshot, self.table, self.state))
