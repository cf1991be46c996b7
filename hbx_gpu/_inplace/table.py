"""obs of several stores as one table, which answers the SQL that an atlas answers."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from functools import cached_property
from typing import TYPE_CHECKING

import numpy as np
import pyarrow as pa

from hbx_gpu._inplace.obs import to_arrow, to_series, united
from hbx_gpu._source import ObsColumns
from hbx_gpu._stores.store import Store
from hbx_gpu.errors import UnknownNameError

if TYPE_CHECKING:
    import pandas as pd
    from lancedb.table import Table

OBS_NAME = "obs_name"
"""Column with the names of the cells, where a store has no column of that name."""
_ROW = "__row"


class CellTable:
    """obs of all stores: one row per cell, one store after the other. Read when it is first needed.

    Parameters
    ----------
    stores
        The stores; all of them multimodal, or none.

    Attributes
    ----------
    stores
        The stores, as given.
    lengths
        Number of cells of each store.
    n_cells
        Number of cells of all stores.
    """

    def __init__(self, stores: Sequence[Store]) -> None:
        self.stores = list(stores)
        self.lengths = [_n_cells(store) for store in stores]
        self.n_cells = sum(self.lengths)

    @cached_property
    def _frames(self) -> list[pa.Table]:
        """obs of every store, the names of the cells among the columns."""
        frames = []
        for store in self.stores:
            frame = _obs_of(store)
            table = to_arrow(frame, str(store.path))
            if repeated := len(frame) - frame.index.nunique():
                warnings.warn(
                    f"{store.path}: {repeated} of the cells share their name with another cell of the store",
                    UserWarning,
                    stacklevel=2,
                )
            if OBS_NAME not in table.column_names:
                table = table.append_column(OBS_NAME, pa.array(frame.index.astype(str), pa.string()))
            frames.append(table)
        return frames

    @property
    def names(self) -> list[str]:
        """Names of the columns that any store has, in the order in which they are first seen."""
        return list(dict.fromkeys(name for table in self._frames for name in table.column_names))

    def check(self, names: Sequence[str]) -> None:
        """Raise for columns that no store has.

        Raises
        ------
        UnknownNameError
            A column does not exist; the message lists those that do.
        """
        if missing := [name for name in names if name not in self.names]:
            raise UnknownNameError(f"no obs column {missing} in the stores; they have {self.names}")

    def column(self, name: str) -> pa.ChunkedArray:
        """A column over the cells of all stores, null where a store lacks it.

        Raises
        ------
        InvalidDataError
            The stores hold types that no type holds without loss.
        """
        columns = [t.column(name) if name in t.column_names else None for t in self._frames]
        return united(columns, self.lengths, name)

    def columns(self, names: Sequence[str], rows: np.ndarray) -> pa.Table:
        """Columns of some rows, given as int64 row numbers, in their order."""
        taken = pa.array(rows)
        return pa.table({name: self.column(name).take(taken) for name in names})

    def frame(self, names: Sequence[str], rows: np.ndarray) -> pd.DataFrame:
        """As :meth:`columns`, in pandas; the names of the cells are the index and not among the columns.

        Integers and booleans of which some are missing have pandas' nullable types.
        """
        import pandas as pd

        taken = pa.array(rows)
        index = self.column(OBS_NAME).take(taken).to_numpy().astype(object)
        columns = {name: to_series(self.column(name).take(taken)) for name in names if name != OBS_NAME}
        return pd.DataFrame({name: column.set_axis(index) for name, column in columns.items()}, index=index)

    def counts(self, names: Sequence[str], rows: np.ndarray) -> pd.DataFrame:
        """The distinct values of columns among some rows, sorted, and how often they occur as ``count``."""
        table = self.columns(names, rows)
        plain = pa.table({name: _plain(table.column(name)) for name in names})
        counted = plain.group_by(list(names)).aggregate([([], "count_all")]).rename_columns([*names, "count"])
        return counted.sort_by([(name, "ascending") for name in names]).to_pandas()

    def metadata(self, names: Sequence[str], rows: np.ndarray) -> ObsColumns:
        """Columns of some rows as batches carry them."""
        from hbx_gpu.scdl._sources.cells import encode

        columns: dict[str, np.ndarray] = {}
        categories: dict[str, np.ndarray] = {}
        for name in names:
            values, vocabulary = encode(self.column(name))
            columns[name] = values[rows]
            if vocabulary is not None:
                categories[name] = vocabulary
        return ObsColumns(columns, categories)

    # Rows

    @cached_property
    def _database(self) -> Table:
        import lancedb

        from hbx_gpu.atlas._catalog.table_errors import guarded

        table = pa.table({name: self.column(name) for name in self.names})
        table = table.append_column(_ROW, pa.array(np.arange(self.n_cells, dtype=np.int64)))
        made = lancedb.connect("memory://").create_table("obs", table)
        return guarded(made, self.stores[0].path, "obs")

    def matching(self, conditions: Sequence[str], limit: int | None = None) -> np.ndarray:
        """Rows for which all of some SQL conditions hold.

        Parameters
        ----------
        conditions
            The conditions; without any, all rows match.
        limit
            Number of rows at most, the first ones; None for all.

        Returns
        -------
        numpy.ndarray
            int64, (n_rows,), ascending.

        Raises
        ------
        ValueError
            A condition is not valid SQL, or names a column that no store has.
        """
        from hbx_gpu.atlas._query.obs import both, first_rows

        if not conditions or not self.n_cells:
            return np.arange(self.n_cells, dtype=np.int64)[:limit]
        return first_rows(self._database, limit, where=both(*conditions), column=_ROW)

    def balanced(self, rows: np.ndarray, n: int, name: str) -> np.ndarray:
        """At most `n` of some rows, the values of a column as equally frequent as possible.

        Rows that miss the value (null or NaN) are never taken.

        Raises
        ------
        ValueError
            The column does not hold plain values.
        """
        from hbx_gpu.atlas._query.balance import balanced_rows, value_codes

        column = _plain(self.column(name)).take(pa.array(rows))
        kept: np.ndarray = rows[balanced_rows(value_codes(column.chunks, pa.field(name, column.type)), n)]
        return kept


def _obs_of(store: Store) -> pd.DataFrame:
    """The table of a store's cells; columns of modalities as ``modality:column``."""
    import pandas as pd

    if not store.modalities:
        if len(store.parts) == 1:
            return store.parts[0].obs
        return pd.concat([part.obs for part in store.parts])
    assert store.read_obs is not None
    frame = store.read_obs()
    columns: dict[str, pd.Series] = {}
    for name, (part, rows) in store.modalities.items():
        for column in part.obs.columns:
            taken = part.obs[column].reset_index(drop=True).reindex(np.where(rows >= 0, rows, len(part.obs)))
            columns[f"{name}:{column}"] = taken.set_axis(frame.index)
    return pd.concat([frame, pd.DataFrame(columns, index=frame.index)], axis=1)


def _n_cells(store: Store) -> int:
    if store.modalities:
        return len(next(iter(store.modalities.values()))[1])
    return sum(part.n_cells for part in store.parts)


def _plain(column: pa.ChunkedArray) -> pa.ChunkedArray:
    return column.cast(column.type.value_type) if pa.types.is_dictionary(column.type) else column
