"""Rows of an atlas, read once and dealt to the groups of arrays that hold them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import cached_property
from typing import TYPE_CHECKING

import numpy as np

from hbx_gpu.errors import HbxError

if TYPE_CHECKING:
    from hbx_gpu._verify.dataset import Stored
    from hbx_gpu.atlas import Snapshot
    from hbx_gpu.atlas._catalog.snapshot import PointerColumn
    from hbx_gpu.atlas._query.obs import ModalityRows
    from hbx_gpu.atlas._query.opening import Columns
    from hbx_gpu.atlas._query.selection import Selection


class FieldRows:
    """The rows that have a pointer field.

    A query for each group would read the table of cells once per group.

    Parameters
    ----------
    snapshot, table
        The atlas, and its obs table.
    pointer
        The field.
    """

    def __init__(self, snapshot: Snapshot, table: str, pointer: PointerColumn) -> None:
        self._snapshot, self._table, self._pointer = snapshot, table, pointer

    def dataset(self, group: str, layers: Sequence[str]) -> Stored | None:
        """Some layers of the rows of a group; None where it has no rows.

        The dataset cannot be made again in another process once this one has ended.

        Raises
        ------
        HbxError
            The arrays of the group, or the table of cells, are damaged.
        """
        if self._found is None:
            return self.queried(group, layers)
        rows = self._rows_of(group)
        if not len(rows):
            return None
        from hbx_gpu.atlas._query.ids import id_runs
        from hbx_gpu.atlas._query.obs import ModalityRows
        from hbx_gpu.atlas._query.opening import open_dataset

        places = replace(self._found.rows.at(rows), source=np.zeros(len(rows), np.int32))
        found = ModalityRows(id_runs(self._ids[rows]), [group], places, self._found.obs)
        return open_dataset(
            self._snapshot, self._table, self._pointer, found, layers, self._columns, recipe=None
        )

    def queried(self, group: str, layers: Sequence[str]) -> Stored | None:
        """The same by a query of its own, for processes elsewhere, and where only some groups can be read."""
        from hbx_gpu.atlas._query.query import AtlasQuery

        name = group.replace("'", "''")
        query = AtlasQuery(self._snapshot, self._table)
        query = query.where(f"`{self._pointer.name}`.zarr_group = '{name}'")
        if not query.count():
            return None
        return query.to_cell_dataset(field_name=self._pointer.name, layer=list(layers))

    @cached_property
    def _selection(self) -> Selection:
        from hbx_gpu.atlas._query.selection import Selection
        from hbx_gpu.atlas._query.state import QueryState

        return Selection.of(self._snapshot, self._table, QueryState())

    @cached_property
    def _found(self) -> ModalityRows | None:
        """All rows of the field; None where they cannot be read together."""
        try:
            return self._selection.read_rows(self._pointer, [])
        except (HbxError, OSError, ValueError):
            return None

    @cached_property
    def _columns(self) -> Columns:
        return self._selection.columns(self._pointer)

    @cached_property
    def _ids(self) -> np.ndarray:
        """uint64, (n,). Row id of each row."""
        assert self._found is not None
        return self._found.rowids

    @cached_property
    def _runs(self) -> tuple[np.ndarray, np.ndarray, dict[str, slice]]:
        """First row and length of each run of rows of one group; and which runs each group has."""
        assert self._found is not None
        runs = self._found.rows.groups()
        order = np.argsort(runs.codes, kind="stable")
        names = self._found.groups
        bounds = np.searchsorted(runs.codes[order], np.arange(len(names) + 1)).tolist()
        places = {name: slice(*bounds[number : number + 2]) for number, name in enumerate(names)}
        return runs.starts[:-1][order], np.diff(runs.starts)[order], places

    def _rows_of(self, group: str) -> np.ndarray:
        """int64, ascending. Numbers of the rows of a group."""
        firsts, lengths, places = self._runs
        mine = places.get(group, slice(0))
        first, length = firsts[mine], lengths[mine]
        before = np.cumsum(length) - length
        return np.repeat(first - before, length) + np.arange(int(length.sum()))
