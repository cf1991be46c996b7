"""`Cells`: a query over stores that lie where other programs wrote them, with the steps that an atlas has."""

from __future__ import annotations

import operator
import shlex
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa

from hbx_gpu._inplace.join import Axis, Join, joined, names_of
from hbx_gpu._inplace.obs import to_arrow, to_series, united
from hbx_gpu._source import BoxIndex, ObsColumns, RowIndex, Source
from hbx_gpu._stores.store import Part, Store
from hbx_gpu.errors import InvalidDataError, UnknownNameError, UnsupportedError

if TYPE_CHECKING:
    import pandas as pd
    from anndata import AnnData

    from hbx_gpu._datasets.dense import FeatureDataset
    from hbx_gpu._datasets.modality import Modality
    from hbx_gpu._datasets.multimodal import MultimodalCellDataset

OBS_NAME = "obs_name"
"""Column of a query's table with the names of the cells, where a store has no column of that name."""
SPACE = "gene_expression"
_ROW = "__row"
_BATCH = 4_096


@dataclass(frozen=True, slots=True)
class Steps:
    """What a query asks for.

    Attributes
    ----------
    where
        SQL conditions on obs, all of which must hold.
    columns
        obs columns of tables; None for all.
    panels
        (modality, features) in the order asked for.
    limit
        Number of rows at most.
    balanced
        (number of rows, obs column) of :meth:`Cells.balanced_limit`.
    """

    where: tuple[str, ...] = ()
    columns: tuple[str, ...] | None = None
    panels: tuple[tuple[str, tuple[str, ...]], ...] = ()
    limit: int | None = None
    balanced: tuple[int, str] | None = None


@dataclass(frozen=True, slots=True)
class StoresRecipe:
    """How a spawned worker makes a dataset again.

    Attributes
    ----------
    paths
        The stores.
    steps
        The query.
    arguments
        Arguments of :meth:`Cells.to_cell_dataset`.
    n_cells
        Number of cells that all stores held when the query was made.
    allow_links
        Whether links that lead out of the stores are followed.
    """

    paths: tuple[str, ...]
    steps: Steps
    arguments: dict[str, Any]
    n_cells: int
    allow_links: bool = False

    def rebuild(self) -> FeatureDataset:
        """Same rows and columns, in the same order.

        Raises
        ------
        InvalidDataError
            The stores hold another number of cells now.
        """
        from hbx_gpu._inplace.stores import open_stores

        cells = Cells(open_stores(self.paths, allow_links=self.allow_links), self.steps)
        if cells.n_cells != self.n_cells:
            raise InvalidDataError(
                f"the stores held {self.n_cells} cells when the dataset was made and hold {cells.n_cells} "
                "now; open them again"
            )
        return cells.to_cell_dataset(**self.arguments)


class Cells:
    """Cells of one or several stores, described step by step and read when a result is asked for.

    Made by :func:`hbx_gpu.open`. Every step returns a new query; nothing is written anywhere. Rows are the
    cells of the stores, one store after the other.

    Attributes
    ----------
    stores
        The stores in the order in which they were opened.
    n_cells
        Number of cells in all stores, whatever the query selects.
    """

    def __init__(self, stores: Sequence[Store], steps: Steps | None = None) -> None:
        self.stores = list(stores)
        self._steps = steps or Steps()
        multimodal = [bool(store.modalities) for store in stores]
        if any(multimodal) and not all(multimodal):
            raise UnsupportedError(
                "MuData and stores of one modality cannot be opened together; open them apart"
            )
        self._is_multimodal = any(multimodal)
        self._lengths = [_n_cells(store) for store in stores]
        self.n_cells = sum(self._lengths)

    def __repr__(self) -> str:
        formats = ", ".join(dict.fromkeys(store.format for store in self.stores))
        return f"Cells({self.n_cells:,} cells in {len(self.stores)} stores: {formats})"

    # Steps

    def _with(self, **changes: Any) -> Cells:
        other = Cells.__new__(Cells)
        other.__dict__.update(self.__dict__)
        other.__dict__.pop("_rows", None)
        other._steps = replace(self._steps, **changes)
        return other

    def where(self, condition: str) -> Cells:
        """Keep the cells for which a SQL condition on obs holds; several conditions must all hold.

        Raises
        ------
        ValueError
            The condition is not valid SQL, or names a column that no store has. Raised when rows are
            needed.
        """
        return self._with(where=(*self._steps.where, condition))

    def select(self, columns: Sequence[str]) -> Cells:
        """obs columns of tables and AnnData, in this order.

        Raises
        ------
        UnknownNameError
            No store has one of them.
        """
        names = [columns] if isinstance(columns, str) else list(columns)
        self._check_columns(names)
        return self._with(columns=tuple(names))

    def features(self, uids: Sequence[str], feature_space: str | None = None) -> Cells:
        """Exactly these features as the columns of results, in this order.

        Parameters
        ----------
        uids
            Names as in the dataset's `feature_uids`.
        feature_space
            Modality, where the stores hold several.
        """
        space = self._modality(feature_space)
        others = tuple(entry for entry in self._steps.panels if entry[0] != space)
        return self._with(panels=(*others, (space, tuple(map(str, uids)))))

    def limit(self, n: int) -> Cells:
        """At most the first `n` rows."""
        if self._steps.balanced is not None:
            raise ValueError("limit() and balanced_limit() cannot be combined; use one of them")
        return self._with(limit=_whole(n, "limit"))

    def balanced_limit(self, n: int, column: str) -> Cells:
        """At most `n` rows, the values of an obs column as equally frequent as the data allow."""
        if self._steps.limit is not None:
            raise ValueError("limit() and balanced_limit() cannot be combined; use one of them")
        self._check_columns([column])
        return self._with(balanced=(_whole(n, "balanced_limit"), column))

    # Tables

    @cached_property
    def _frames(self) -> list[pa.Table]:
        """obs of every store, the names of the cells among the columns."""
        frames = []
        for store in self.stores:
            frame = _obs_of(store)
            table = to_arrow(frame, str(store.path))
            if repeated := len(frame) - frame.index.nunique():
                _say(f"{store.path}: {repeated} cells share their name with another cell of the store")
            if OBS_NAME not in table.column_names:
                table = table.append_column(OBS_NAME, pa.array(frame.index.to_numpy().astype(str)))
            frames.append(table)
        return frames

    @property
    def obs_columns(self) -> list[str]:
        """Names of the obs columns that any store has, in the order in which they are first seen."""
        return list(dict.fromkeys(name for table in self._frames for name in table.column_names))

    def _column(self, name: str) -> pa.ChunkedArray:
        columns = [t.column(name) if name in t.column_names else None for t in self._frames]
        return united(columns, self._lengths, name)

    def _check_columns(self, names: Sequence[str]) -> None:
        if missing := [name for name in names if name not in self.obs_columns]:
            raise UnknownNameError(f"no obs column {missing} in the stores; they have {self.obs_columns}")

    @cached_property
    def _database(self) -> Any:
        """The obs of all stores as a table in memory, which answers the same SQL as an atlas."""
        import lancedb

        from hbx_gpu.atlas._catalogue.guarded import guarded

        table = pa.table({name: self._column(name) for name in self.obs_columns})
        table = table.append_column(_ROW, pa.array(np.arange(self.n_cells, dtype=np.int64)))
        made = lancedb.connect("memory://").create_table("obs", table)
        return guarded(made, self.stores[0].path, "obs")

    @cached_property
    def _rows(self) -> np.ndarray | None:
        """int64, ascending: rows that the query keeps; None for all."""
        from hbx_gpu.atlas._query.balance import balanced_rows
        from hbx_gpu.atlas._query.obs import scan

        steps = self._steps
        if not steps.where and steps.limit is None and steps.balanced is None:
            return None
        rows = np.arange(self.n_cells, dtype=np.int64)
        if steps.where and self.n_cells:
            condition = " AND ".join(f"({each})" for each in steps.where)
            found = [b.column(_ROW).to_numpy() for b in scan(self._database, [_ROW], where=condition)]
            rows = np.sort(np.concatenate([np.empty(0, np.int64), *found]))
        if steps.balanced is not None:
            number, column = steps.balanced
            codes = _codes(self._column(column)).take(pa.array(rows))
            rows = rows[balanced_rows(codes.to_numpy(), number)]
        return rows[: steps.limit]

    def _selected(self) -> np.ndarray:
        return np.arange(self.n_cells, dtype=np.int64) if self._rows is None else self._rows

    def count(self, group_by: str | Sequence[str] | None = None) -> int | pd.DataFrame:
        """Number of rows, or a frame of the distinct values of columns and their ``count``."""
        if group_by is None:
            return self.n_cells if self._rows is None else len(self._rows)
        names = [group_by] if isinstance(group_by, str) else list(group_by)
        self._check_columns(names)
        rows = pa.array(self._selected())
        plain = pa.table({name: _plain(self._column(name)).take(rows) for name in names})
        counted = plain.group_by(names).aggregate([([], "count_all")]).rename_columns([*names, "count"])
        return counted.sort_by([(name, "ascending") for name in names]).to_pandas()

    def to_arrow(self) -> pa.Table:
        """obs of the rows as an Arrow table."""
        names = self.obs_columns if self._steps.columns is None else list(self._steps.columns)
        rows = pa.array(self._selected())
        return pa.table({name: self._column(name).take(rows) for name in names})

    def to_pandas(self) -> pd.DataFrame:
        """obs of the rows as a pandas frame, the names of the cells as index.

        Integers and booleans of which some are missing have pandas' nullable types.
        """
        import pandas as pd

        names = self.obs_columns if self._steps.columns is None else list(self._steps.columns)
        rows = pa.array(self._selected())
        index = self._column(OBS_NAME).take(rows).to_numpy().astype(object)
        columns = {name: to_series(self._column(name).take(rows)) for name in names if name != OBS_NAME}
        return pd.DataFrame({name: column.set_axis(index) for name, column in columns.items()}, index=index)

    # Results with measurements

    def to_cell_dataset(
        self,
        feature_space: str | None = None,
        layer: str = "X",
        metadata_columns: Sequence[str] | None = None,
        *,
        join: Join = "outer",
        feature_id_column: str | None = None,
        dtype: Any = None,
    ) -> FeatureDataset:
        """A map-style dataset over the rows: what loaders, samplers and engines take.

        Parameters
        ----------
        feature_space
            Modality of MuData stores; may be left out where there is one.
        layer
            ``"X"``, ``"raw"`` or the name of a layer, which every store must have.
        metadata_columns
            obs columns that batches carry; rows of stores without one count as missing.
        join
            ``"outer"``: every feature that any store has, zero where a store lacks it (`measured` tells
            these zeros from others). ``"inner"``: features that all stores have.
        feature_id_column
            Column of var that identifies features; by default their names.
        dtype
            Dtype of batches of dense matrices. By default the stored dtype, promoted where stores differ.

        Raises
        ------
        UnknownNameError
            A store lacks the layer, or no store has a column.
        UnsupportedError
            A CSC matrix, or sparse and dense matrices together.
        CorruptDataError
            Arrays of a store that contradict each other.
        """
        space = self._modality(feature_space)
        places = self._places(space)
        columns = list(dict.fromkeys(metadata_columns or ()))
        arguments = {
            "feature_space": feature_space,
            "layer": layer,
            "metadata_columns": columns,
            "join": join,
            "feature_id_column": feature_id_column,
            "dtype": dtype,
        }
        return self._dataset(space, places, layer, columns, join, feature_id_column, dtype, arguments)

    def to_multimodal_dataset(
        self,
        feature_spaces: Sequence[str] | None = None,
        layers: Mapping[str, str] | None = None,
        metadata_columns: Sequence[str] | None = None,
        *,
        join: Join = "outer",
        feature_id_column: str | None = None,
    ) -> MultimodalCellDataset:
        """A map-style dataset over the rows, several modalities of each.

        Parameters
        ----------
        feature_spaces
            Modalities; by default all.
        layers
            Modality -> layer; ``"X"`` for other modalities.
        metadata_columns, join, feature_id_column
            As in :meth:`to_cell_dataset`.

        Raises
        ------
        UnsupportedError
            The stores hold one modality.
        """
        from hbx_gpu._datasets.multimodal import MultimodalCellDataset

        if not self._is_multimodal:
            raise UnsupportedError(f"{self!r} holds one modality; use to_cell_dataset()")
        names = list(feature_spaces) if feature_spaces is not None else self.modalities
        datasets: dict[str, Modality] = {}
        for name in names:
            space = self._modality(name)
            columns = list(metadata_columns or ()) if not datasets else []
            places = self._places(space, absent=True)
            layer = (layers or {}).get(name, "X")
            datasets[name] = self._dataset(space, places, layer, columns, join, feature_id_column, None, None)
        return MultimodalCellDataset(datasets)

    def to_anndata(
        self,
        feature_space: str | None = None,
        layer: str = "X",
        *,
        join: Join = "outer",
        feature_id_column: str | None = None,
    ) -> AnnData:
        """The rows as AnnData in memory: CSR or dense as stored, obs and var names beside it."""
        import pandas as pd
        from anndata import AnnData

        dataset = self.to_cell_dataset(feature_space, layer, join=join, feature_id_column=feature_id_column)
        numbers = np.arange(len(dataset))
        rows = [numbers[at : at + _BATCH] for at in range(0, len(numbers), _BATCH)] or [numbers]
        blocks = [dataset.__getitems__(part) for part in rows]
        matrix = _stacked(blocks, dataset.n_features)
        frame = self.to_pandas()
        if self._is_multimodal:
            frame = frame.iloc[np.flatnonzero(self._present(self._modality(feature_space)))]
        return AnnData(matrix, obs=frame, var=pd.DataFrame(index=dataset.feature_uids.astype(str)))

    # Modalities

    @property
    def modalities(self) -> list[str]:
        """Modalities that any store has; one for stores that are a single AnnData."""
        if not self._is_multimodal:
            return [SPACE]
        return list(dict.fromkeys(name for store in self.stores for name in store.modalities))

    def _modality(self, name: str | None) -> str:
        if name is None:
            if len(self.modalities) > 1:
                raise UnknownNameError(f"pass feature_space=, one of {self.modalities}")
            return self.modalities[0]
        if name not in self.modalities:
            raise UnknownNameError(f"no modality {name!r} in the stores; they hold {self.modalities}")
        return name

    def _present(self, space: str) -> np.ndarray:
        return self._places(space, absent=True).part >= 0

    def _places(self, space: str, *, absent: bool = False) -> _Places:
        """Where each row of the query lies; rows without the modality are left out unless `absent`."""
        parts: list[Part] = []
        part_of, row_of = np.full(self.n_cells, -1, np.int32), np.zeros(self.n_cells, np.int64)
        at = 0
        for store, length in zip(self.stores, self._lengths, strict=True):
            if store.modalities:
                if space in store.modalities:
                    part, rows = store.modalities[space]
                    part_of[at : at + length] = np.where(rows >= 0, len(parts), -1)
                    row_of[at : at + length] = rows
                    parts.append(part)
                at += length
                continue
            for part in store.parts:
                part_of[at : at + part.n_cells] = len(parts)
                row_of[at : at + part.n_cells] = np.arange(part.n_cells)
                parts.append(part)
                at += part.n_cells
        selected = self._selected()
        if not absent:
            selected = selected[part_of[selected] >= 0]
        return _Places(parts, part_of[selected], row_of[selected], selected)

    def _dataset(
        self,
        space: str,
        places: _Places,
        layer: str,
        columns: list[str],
        join: Join,
        feature_id_column: str | None,
        dtype: Any,
        arguments: dict[str, Any] | None,
    ) -> FeatureDataset:
        from hbx_gpu._datasets.cells import CellDataset
        from hbx_gpu._datasets.dense import DenseCellDataset

        self._check_columns(columns)
        matrices = [part.matrix(layer) for part in places.parts]
        forms = {matrix.form for matrix in matrices} or {"csr"}
        if "csc" in forms:
            at = [matrix.form for matrix in matrices].index("csc")
            path = shlex.quote(str(self._path_of(places.parts[at])))
            raise UnsupportedError(
                f"{matrices[at].name} is stored as CSC, column by column, so that a row would need all of "
                f"it; turn it once with 'hbx-gpu ingest {path} --atlas ATLAS' and train from the atlas"
            )
        if len(forms) > 1:
            raise UnsupportedError(
                f"matrix {layer!r} is sparse in some stores and dense in others; open them apart, or ingest "
                "them into one atlas"
            )
        dtypes = {matrix.name: matrix.values.dtype.name for matrix in matrices}
        if len(set(dtypes.values())) > 1:
            found = ", ".join(f"{kind} in {name}" for name, kind in list(dtypes.items())[:4])
            _say(f"matrix {layer!r} differs in type between stores ({found}); batches have one for all")
        axis = self._axis(places.parts, layer, join, feature_id_column, dict(self._steps.panels).get(space))
        pointers = [
            matrix.pointers() if matrix.form == "csr" else np.zeros(0, np.int64) for matrix in matrices
        ]
        sources = [
            Source(matrix.name, matrix.columns(bounds), {layer: matrix.values}, remap)
            for matrix, bounds, remap in zip(matrices, pointers, axis.remaps, strict=True)
        ]
        common: dict[str, Any] = {
            "layer": layer,
            "n_features": len(axis.uids),
            "feature_uids": axis.uids,
            "obs": self._obs_columns(columns, places.rows),
            "recipe": None if arguments is None else self._recipe(arguments),
            "feature_space": space,
        }
        if forms == {"csr"}:
            return CellDataset(sources, _row_index(places, pointers), **common)
        ones = np.ones((len(places.row), 1), np.int64)
        boxes = BoxIndex(places.part, places.row[:, None], ones)
        wanted = {} if dtype is None else {layer: np.dtype(dtype).name}
        return DenseCellDataset(sources, boxes, positions=True, dtypes=wanted, **common)

    def _path_of(self, part: Part) -> Path:
        """The store that a part belongs to."""
        every = ((store, [*store.parts, *(p for p, _ in store.modalities.values())]) for store in self.stores)
        return next(store.path for store, parts in every if any(part is one for one in parts))

    def _axis(
        self, parts: Sequence[Part], layer: str, join: Join, column: str | None, panel: tuple[str, ...] | None
    ) -> Axis:
        names = [names_of(part.var(layer), column, part.name) for part in parts]
        if len(parts) == 1 and panel is None and len(set(names[0])) < len(names[0]):
            _say(
                f"{parts[0].name}: {len(names[0]) - len(set(names[0]))} features share their name with "
                "another; each keeps a column of its own"
            )
        return joined(names, [part.name for part in parts], join, panel)

    def _obs_columns(self, names: Sequence[str], rows: np.ndarray) -> ObsColumns:
        from hbx_gpu.scdl._sources.cells import encode

        columns: dict[str, np.ndarray] = {}
        categories: dict[str, np.ndarray] = {}
        for name in names:
            values, vocabulary = encode(self._column(name))
            columns[name] = values[rows]
            if vocabulary is not None:
                categories[name] = vocabulary
        return ObsColumns(columns, categories)

    def _recipe(self, arguments: dict[str, Any]) -> StoresRecipe:
        paths = tuple(str(store.path.absolute()) for store in self.stores)
        links = any(store.allow_links for store in self.stores)
        return StoresRecipe(paths, self._steps, arguments, self.n_cells, links)


@dataclass(frozen=True, slots=True)
class _Places:
    """Where rows of a query lie.

    Attributes
    ----------
    parts
        The parts that hold the modality.
    part
        int32, (n,). Part of each row, -1 where the cell lacks the modality.
    row
        int64, (n,). Row inside the part.
    rows
        int64, (n,). Row among the cells of all stores.
    """

    parts: list[Part]
    part: np.ndarray
    row: np.ndarray
    rows: np.ndarray


def _row_index(places: _Places, pointers: Sequence[np.ndarray]) -> RowIndex:
    start, length = np.zeros(len(places.row), np.int64), np.zeros(len(places.row), np.int32)
    for number, bounds in enumerate(pointers):
        mine = np.flatnonzero(places.part == number)
        rows = places.row[mine]
        start[mine] = bounds[rows]
        length[mine] = bounds[rows + 1] - bounds[rows]
    return RowIndex(places.part, start, length)


def _obs_of(store: Store) -> pd.DataFrame:
    """The table of a store's cells; columns of modalities as ``modality:column``."""
    import pandas as pd

    if not store.modalities:
        if len(store.parts) == 1:
            return store.parts[0].obs
        return pd.concat([part.obs for part in store.parts])
    assert store.read_obs is not None
    frame = store.read_obs()
    columns: dict[str, Any] = {}
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


def _codes(column: pa.ChunkedArray) -> pa.ChunkedArray:
    """int64 codes of sorted values, -1 where missing."""
    import pyarrow.compute as pc

    plain = _plain(column)
    distinct = pc.drop_null(plain.unique())
    distinct = distinct.take(pc.sort_indices(distinct))
    return pc.fill_null(pc.index_in(plain, value_set=distinct).cast(pa.int64()), -1)


def _stacked(blocks: Sequence[Any], n_features: int) -> Any:
    from scipy.sparse import csr_matrix

    if hasattr(blocks[0], "data"):
        return np.concatenate([block.data for block in blocks])
    lengths = np.concatenate([np.diff(block.offsets) for block in blocks])
    return csr_matrix(
        (
            np.concatenate([block.values for block in blocks]),
            np.concatenate([block.indices for block in blocks]),
            np.concatenate([[0], np.cumsum(lengths, dtype=np.int64)]),
        ),
        shape=(len(lengths), n_features),
    )


def _say(what: str) -> None:
    warnings.warn(what, UserWarning, stacklevel=2)


def _whole(n: int, what: str) -> int:
    number = operator.index(n)
    if number < 0:
        raise ValueError(f"{what} must not be negative, got {number}")
    return number
