"""What a query selects: rows of one obs table of a snapshot, pointer fields and columns of features."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping, Sequence, Sized
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa

from hbx_gpu.atlas._query import encoders, obs, opening
from hbx_gpu.atlas._query.balance import balanced_rows, value_codes
from hbx_gpu.atlas._query.fields import Fields
from hbx_gpu.atlas._query.matrices import Matrices, measured
from hbx_gpu.atlas._query.state import QueryState

if TYPE_CHECKING:
    import pandas as pd
    from lancedb.table import Table

    from hbx_gpu._datasets.dense import FeatureDataset
    from hbx_gpu.atlas._catalog.snapshot import PointerColumn, Snapshot


@dataclass(frozen=True)
class Selection:
    """The rows that a query asks for, and what can be read of them; made by :meth:`of`.

    Attributes
    ----------
    snapshot
        The atlas at one version.
    name, table
        The obs table.
    pointers
        Pointer columns of the table by name.
    state
        Steps of the query.
    """

    snapshot: Snapshot
    name: str
    table: Table
    pointers: Mapping[str, PointerColumn]
    state: QueryState

    @classmethod
    def of(cls, snapshot: Snapshot, table: str | None, state: QueryState) -> Selection:
        """Open an obs table.

        Raises
        ------
        ValueError
            No table is named and there are several, or there is no table of that name.
        """
        name = snapshot.obs_table_name(table)
        return cls(snapshot, name, snapshot.obs_table(name), snapshot.pointer_fields(name), state)

    def changed(self, **changes: Any) -> Selection:
        """The same selection with some fields of its state replaced."""
        return replace(self, state=replace(self.state, **changes))

    # Columns and fields

    @property
    def schema(self) -> pa.Schema:
        """Schema of the obs table."""
        return self.table.schema

    @property
    def fields(self) -> Fields:
        """The pointer fields that the query considers."""
        panels = tuple(space for space, _ in self.state.panels)
        return Fields(self.name, self.pointers, self.state.spaces, self.state.fields, panels)

    def plain_columns(self) -> list[str]:
        """The obs columns that were selected, pointers left out."""
        names = self.schema.names if self.state.columns is None else self.state.columns
        return [name for name in names if name not in self.pointers]

    def metadata(self, columns: Sequence[str] | None) -> list[str]:
        """Obs columns that batches may carry, each once.

        Raises
        ------
        ValueError
            Not a list, an unknown column, or a pointer column.
        """
        if isinstance(columns, str):
            raise ValueError(f"metadata_columns must be a list, got {columns!r}")
        names = list(dict.fromkeys(columns or ()))
        obs.check_columns(self.schema, names)
        if pointers := [name for name in names if name in self.pointers]:
            raise ValueError(
                f"{pointers} are pointer columns, not metadata; choose from {self.plain_columns()}"
            )
        return names

    def columns(self, pointer: PointerColumn) -> opening.Columns:
        """Features read for a field: the requested panel, or all features of its space."""
        panels = dict(self.state.panels)
        space = pointer.feature_space
        if space in panels:
            index = self.snapshot.registry(space).resolve(panels[space])
            return opening.chosen_columns(self.snapshot, space, index)
        return opening.all_columns(self.snapshot, space)

    def check_panels(self, pointers: Sequence[PointerColumn]) -> None:
        """Refuse panels for spaces that are not read.

        Raises
        ------
        ValueError
            There are such panels; the message names the spaces.
        """
        spaces = list(dict.fromkeys(pointer.feature_space for pointer in pointers))
        panels = {space for space, _ in self.state.panels}
        if strangers := sorted(panels - set(spaces)):
            read = ", ".join(map(repr, spaces))
            raise ValueError(
                f"features() was given for {strangers}, but this dataset reads {read}; ask for features of "
                f"{read}, or use a query of its own"
            )

    # Rows

    def scan(
        self, columns: Sequence[str] | dict[str, str], rowids: np.ndarray | None
    ) -> Iterator[pa.RecordBatch]:
        """Columns of the rows that match the filter, restricted to `rowids` where given, batch by batch."""
        return obs.scan(self.table, columns, where=self.state.where, rowids=rowids)

    def read_table(self, columns: Sequence[str]) -> pa.Table:
        """Columns of all rows, in query order."""
        return obs.read_table(self.table, columns, where=self.state.where, rowids=self.rowids())

    def read_rows(
        self, pointer: PointerColumn, columns: Sequence[str], *, absent: bool = False
    ) -> obs.ModalityRows:
        """The rows that have a field (all rows if `absent`), the places of their data, and obs columns."""
        return obs.read_modality(
            self.snapshot,
            self.name,
            pointer,
            columns,
            where=self.state.where,
            rowids=self.rowids(None if absent else pointer),
            absent=absent,
        )

    def rowids(self, pointer: PointerColumn | None = None) -> np.ndarray | None:
        """Row ids that remain after limit, offset and balanced_limit; None if none of them is set.

        Parameters
        ----------
        pointer
            Count only rows that have this field.

        Returns
        -------
        ndarray or None
            uint64, (n_rows,), ascending unless balanced.
        """
        state = self.state
        if state.limit is None and state.balanced is None and not state.offset:
            return None
        where, present = state.where, None if pointer is None else obs.is_present(pointer)
        if state.balanced is None and state.limit is not None:
            count = state.offset + state.limit
            return obs.first_rows(self.table, count, where=where, also=present)[state.offset :]
        wanted = {} if state.balanced is None else {"value": obs.column_expression(state.balanced[1])}
        ids: list[np.ndarray] = [np.empty(0, np.uint64)]
        values: list[pa.Array] = []
        for batch in obs.scan(self.table, wanted, where=where, also=present):
            ids.append(batch.column(obs.ROWID).to_numpy())
            if state.balanced is not None:
                values.append(encoders.plain(batch.column("value")))
        rowids = np.concatenate(ids)
        order = np.argsort(rowids, kind="stable")[state.offset :]
        if state.balanced is not None:
            number, column = state.balanced
            codes = value_codes(values, self.schema.field(column))[order]
            order = order[balanced_rows(codes, number)]
        return rowids[order]

    def warn_if_empty(self, dataset: Sized) -> None:
        """Warn, and show the query, if a dataset has no cells: a training loop over it would do nothing."""
        if len(dataset):
            return
        state = self.state
        asked = [f"where: {' '.join(state.where.split())}"] if state.where is not None else []
        asked += [f"limit: {state.limit}"] if state.limit is not None else []
        asked += [f"offset: {state.offset}"] if state.offset else []
        asked += [f"balanced_limit: {state.balanced}"] if state.balanced is not None else []
        warnings.warn(
            f"this query selects no cells of the {self.table.count_rows():,} in table {self.name!r}"
            + (f" ({'; '.join(asked)})" if asked else ", because none has the modality")
            + ". count(group_by=...) shows which values a column has",
            UserWarning,
            stacklevel=3,
        )

    # Data of a field

    def layers(self, pointer: PointerColumn, groups: Sequence[str]) -> tuple[str, ...]:
        """The layers requested for the space of a field, or else the default layer."""
        asked = dict(self.state.layers).get(pointer.feature_space)
        return asked or (opening.default_layer(self.snapshot, pointer.feature_space, groups),)

    def open(
        self, pointer: PointerColumn, found: obs.ModalityRows, layers: Sequence[str] | None
    ) -> tuple[FeatureDataset, pd.DataFrame | None]:
        """A dataset over rows that were found, and the registry of its columns if the space has one."""
        layers = self.layers(pointer, found.groups) if layers is None else layers
        columns = self.columns(pointer)
        dataset = opening.open_dataset(self.snapshot, self.name, pointer, found, layers, columns, None)
        if pointer.feature_space not in self.snapshot.record.registries:
            return dataset, None
        registry = self.snapshot.registry(pointer.feature_space)
        return dataset, registry.frame.reindex(list(columns.uids))

    def matrices(self, pointer: PointerColumn, found: obs.ModalityRows | None = None) -> Matrices:
        """Layers of a field as matrices, over `found` rows or else over all rows that have the field."""
        space = pointer.feature_space
        found = self.read_rows(pointer, []) if found is None else found
        panel = dict(self.state.panels).get(space)
        registry = self.snapshot.registry(space)
        if panel is None:
            index = measured(self.snapshot, space, found.groups, self.state.join)
        else:
            index = registry.resolve(panel)
        columns = opening.chosen_columns(self.snapshot, space, index)
        datasets = {
            layer: opening.open_dataset(self.snapshot, self.name, pointer, found, (layer,), columns, None)
            for layer in self.layers(pointer, found.groups)
        }
        names = [name for name in self.plain_columns() if name != "uid"]
        rows = obs.read_table(self.table, ["uid", *names], rowids=found.rowids)
        return Matrices(datasets, rows, names, registry.frame.reindex(list(columns.uids)))
