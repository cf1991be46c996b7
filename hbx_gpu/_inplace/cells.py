"""`Cells`: a query over stores that lie where other programs wrote them, with the steps that an atlas has."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from concurrent.futures import Executor
from dataclasses import dataclass, replace
from functools import cached_property
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa

from hbx_gpu._advice import option, spelled
from hbx_gpu._inplace.join import Join
from hbx_gpu._inplace.matrices import Places, Wanted, open_dataset
from hbx_gpu._inplace.table import CellTable
from hbx_gpu._progress import Progress
from hbx_gpu._remote.places import Place
from hbx_gpu._stores.store import Store
from hbx_gpu.atlas._query.state import whole_number
from hbx_gpu.atlas._query.statistics import parsed_panel
from hbx_gpu.errors import InvalidDataError, UnknownNameError, UnsupportedError

if TYPE_CHECKING:
    import numpy.typing as npt
    import pandas as pd
    from anndata import AnnData

    from hbx_gpu._datasets.dense import FeatureDataset
    from hbx_gpu._datasets.modality import Modality
    from hbx_gpu._datasets.multimodal import MultimodalCellDataset
    from hbx_gpu.statistics import Statistics

SPACE = "gene_expression"


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

        cells = Cells(CellTable(open_stores(self.paths, allow_links=self.allow_links)), self.steps)
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

    Parameters
    ----------
    table
        obs of the stores.
    steps
        Steps of the query; None for all cells.

    Raises
    ------
    UnsupportedError
        Some of the stores are MuData and others hold one modality.
    """

    def __init__(self, table: CellTable, steps: Steps | None = None) -> None:
        self._table = table
        self._steps = steps or Steps()
        multimodal = [bool(store.modalities) for store in table.stores]
        if any(multimodal) and not all(multimodal):
            raise UnsupportedError(
                "MuData and stores of one modality cannot be opened together; open them apart"
            )
        self._is_multimodal = any(multimodal)

    @property
    def stores(self) -> list[Store]:
        """The stores in the order in which they were opened."""
        return self._table.stores

    @property
    def n_cells(self) -> int:
        """Number of cells in all stores, whatever the query selects."""
        return self._table.n_cells

    def __repr__(self) -> str:
        formats = ", ".join(dict.fromkeys(store.format for store in self.stores))
        stores = "1 store" if len(self.stores) == 1 else f"{len(self.stores)} stores"
        return f"Cells({self.n_cells:,} cells in {stores}: {formats})"

    # Steps

    def _with(self, **changes: Any) -> Cells:
        return Cells(self._table, replace(self._steps, **changes))

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
        self._table.check(names)
        return self._with(columns=tuple(names))

    def features(self, uids: Sequence[str] | str, feature_space: str | None = None) -> Cells:
        """Exactly these features as the columns of results, in this order.

        Parameters
        ----------
        uids
            Names as in the dataset's `feature_uids`. ``"hvg:2000"``: the 2,000 most variable features of all
            cells of the stores, whose counts are read once for that.
        feature_space
            Modality, where the stores hold several.
        """
        space = self._modality(feature_space)
        if isinstance(uids, str):
            n = parsed_panel(uids)
            uids = list(Cells(self._table).statistics(feature_space=space).highly_variable(n).index)
        others = tuple(entry for entry in self._steps.panels if entry[0] != space)
        return self._with(panels=(*others, (space, tuple(map(str, uids)))))

    def limit(self, n: int) -> Cells:
        """At most the first `n` rows."""
        if self._steps.balanced is not None:
            raise ValueError("limit() and balanced_limit() cannot be combined; use one of them")
        return self._with(limit=whole_number(n, "limit"))

    def balanced_limit(self, n: int, column: str) -> Cells:
        """At most `n` rows, the values of an obs column as equally frequent as the data allow."""
        if self._steps.limit is not None:
            raise ValueError("limit() and balanced_limit() cannot be combined; use one of them")
        self._table.check([column])
        return self._with(balanced=(whole_number(n, "balanced_limit"), column))

    # Tables

    @property
    def obs_columns(self) -> list[str]:
        """Names of the obs columns that any store has, in the order in which they are first seen."""
        return self._table.names

    def _names(self) -> list[str]:
        return self.obs_columns if self._steps.columns is None else list(self._steps.columns)

    @cached_property
    def _rows(self) -> np.ndarray:
        """int64, ascending: rows that the query keeps."""
        rows = self._table.matching(self._steps.where, self._steps.limit)
        if self._steps.balanced is None:
            return rows
        return self._table.balanced(rows, *self._steps.balanced)

    def count(self, group_by: str | Sequence[str] | None = None) -> int | pd.DataFrame:
        """Number of rows, or a frame of the distinct values of columns and their ``count``."""
        if group_by is None:
            return len(self._rows)
        names = [group_by] if isinstance(group_by, str) else list(group_by)
        self._table.check(names)
        return self._table.counts(names, self._rows)

    def to_arrow(self) -> pa.Table:
        """obs of the rows as an Arrow table."""
        return self._table.columns(self._names(), self._rows)

    def to_pandas(self) -> pd.DataFrame:
        """obs of the rows as a pandas frame, the names of the cells as index.

        Integers and booleans of which some are missing have pandas' nullable types.
        """
        return self._table.frame(self._names(), self._rows)

    def statistics(
        self,
        by: str | None = None,
        *,
        feature_space: str | None = None,
        layer: str = "X",
        target_sum: float | None = 10_000.0,
        medians: bool = True,
        executor: Executor | None = None,
        progress: Progress | None = None,
    ) -> Statistics:
        """Statistics of the features over the rows; nothing is kept, because nothing is written here.

        Parameters
        ----------
        by, target_sum, medians, executor, progress
            As in :func:`hbx_gpu.statistics.compute`.
        feature_space, layer
            As in :meth:`to_cell_dataset`.

        Returns
        -------
        Statistics
            One entry per feature: cells measured, nonzero cells, sum, mean, variance and median. The errors
            are those of both functions.
        """
        from hbx_gpu.statistics import compute

        dataset = self.to_cell_dataset(feature_space, layer, [by] if by is not None else [])
        return compute(
            dataset, by, target_sum=target_sum, medians=medians, executor=executor, progress=progress
        )

    # Results with measurements

    def to_cell_dataset(
        self,
        feature_space: str | None = None,
        layer: str = "X",
        metadata_columns: Sequence[str] | None = None,
        *,
        join: Join = "outer",
        feature_id_column: str | None = None,
        strip_versions: bool = False,
        dtype: npt.DTypeLike | None = None,
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
            Column of var that identifies features, ``"index"`` for their names, ``"unique_names"`` for the
            names with repeats numbered (a, a-1, ...). By default the names, unless they are positions or
            repeat in one of several stores: then a column is chosen as for an atlas (docs/columns.md).
        strip_versions
            Drop the versions of Ensembl ids: ENSG00000000003.15 becomes ENSG00000000003.
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
            "strip_versions": strip_versions,
            "dtype": dtype,
        }
        wanted = Wanted(space, layer, join, feature_id_column, self._panel(space), dtype, strip_versions)
        return self._dataset(places, wanted, columns, self._recipe(arguments))

    def to_multimodal_dataset(
        self,
        feature_spaces: Sequence[str] | None = None,
        layers: Mapping[str, str] | None = None,
        metadata_columns: Sequence[str] | None = None,
        *,
        join: Join = "outer",
        feature_id_column: str | None = None,
        strip_versions: bool = False,
    ) -> MultimodalCellDataset:
        """A map-style dataset over the rows, several modalities of each.

        Parameters
        ----------
        feature_spaces
            Modalities; by default all.
        layers
            Modality -> layer; ``"X"`` for other modalities.
        metadata_columns, join, feature_id_column, strip_versions
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
            panel = self._panel(space)
            wanted = Wanted(space, layer, join, feature_id_column, panel, strip_versions=strip_versions)
            datasets[name] = self._dataset(places, wanted, columns, None)
        return MultimodalCellDataset(datasets)

    def to_anndata(
        self,
        feature_space: str | None = None,
        layer: str = "X",
        *,
        join: Join = "outer",
        feature_id_column: str | None = None,
        strip_versions: bool = False,
    ) -> AnnData:
        """The rows as AnnData in memory: CSR or dense as stored, obs and var names beside it."""
        import pandas as pd
        from anndata import AnnData

        from hbx_gpu.atlas._query.matrices import read_matrix

        dataset = self.to_cell_dataset(
            feature_space,
            layer,
            join=join,
            feature_id_column=feature_id_column,
            strip_versions=strip_versions,
        )
        matrix = read_matrix(dataset, 0, len(dataset))
        frame = self.to_pandas()
        if self._is_multimodal:
            places = self._places(self._modality(feature_space), absent=True)
            frame = frame.iloc[np.flatnonzero(places.part >= 0)]
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
                given = spelled("feature_space=", option("field_name"))
                raise UnknownNameError(f"pass {given}, one of {self.modalities}")
            return self.modalities[0]
        if name not in self.modalities:
            raise UnknownNameError(f"no modality {name!r} in the stores; they hold {self.modalities}")
        return name

    def _places(self, space: str, *, absent: bool = False) -> Places:
        return Places.of(self._table, space, self._rows, absent=absent)

    def _dataset(
        self, places: Places, wanted: Wanted, columns: Sequence[str], recipe: StoresRecipe | None
    ) -> FeatureDataset:
        self._table.check(columns)
        obs = self._table.metadata(columns, places.rows)
        return open_dataset(places, wanted, obs, self.stores, recipe)

    def _panel(self, space: str) -> tuple[str, ...] | None:
        return dict(self._steps.panels).get(space)

    def _recipe(self, arguments: dict[str, Any]) -> StoresRecipe:
        paths = tuple(
            str(store.path if isinstance(store.path, Place) else store.path.absolute())
            for store in self.stores
        )
        links = any(store.allow_links for store in self.stores)
        return StoresRecipe(paths, self._steps, arguments, self.n_cells, links)
