"""What an ingest of many files knows of the atlas: read once, then kept up with what it adds itself."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from functools import cached_property
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from hbx_gpu.atlas._catalog import tables
from hbx_gpu.atlas._catalog.catalog import Catalog
from hbx_gpu.atlas._ingest.names_index import NamesIndex, cell_hashes, hashes, of_table

Row = Mapping[str, Any]
"""A row of the table of groups."""


class KnownAtlas:
    """Groups, feature lists, features and cell names of an atlas, and those that are about to be in it.

    The caller holds the write lock, so that nobody else changes them.

    Parameters
    ----------
    catalog
        The atlas.
    obs_table
        Obs table that receives the cells.
    """

    def __init__(self, catalog: Catalog, obs_table: str) -> None:
        self._catalog, self._obs_table = catalog, obs_table
        self._by_hash: dict[tuple[str, str], list[Row]] = defaultdict(list)
        self._by_source: dict[str, set[str]] = defaultdict(set)
        self._cells: dict[str, NamesIndex] = {}
        self.planned: set[str] = set()
        for row in catalog.dataset_rows():
            self._add_row(row)
        self._places: dict[str, dict[str, int | None]] = {}
        self.forget_features()

    def forget_features(self) -> None:
        """Read features and their lists anew: a dataset was removed, and with it what it alone had."""
        listed = tables.read(self._catalog.layouts(), ["layout_uid"], "local_index = 0")
        self.layouts: set[str] = set(listed.column("layout_uid").to_pylist())
        self._registered: dict[str, set[str]] = {}

    def plan(self, row: Row) -> None:
        """Count a dataset as there that is about to be added."""
        self.planned.add(row["dataset_uid"])
        self._add_row(row)

    def _add_row(self, row: Row) -> None:
        self._by_hash[row.get("source_sha256") or "", row["feature_space"]].append(row)
        self._by_source[row.get("source_name") or ""].add(row["dataset_uid"])

    def rows_of_file(self, sha256: str, feature_space: str) -> Sequence[Row]:
        """Groups that were made of a file."""
        return self._by_hash.get((sha256, feature_space), ()) if sha256 else ()

    def rows(self) -> list[Row]:
        """All groups."""
        return [row for rows in self._by_hash.values() for row in rows]

    def row_of(self, dataset_uid: str) -> Row:
        """A group of a dataset; empty where there is none."""
        return next((row for row in self.rows() if row["dataset_uid"] == dataset_uid), {})

    # Features

    def places(self, feature_space: str) -> dict[str, int | None]:
        """See :meth:`Catalog.feature_places`."""
        if feature_space not in self._places:
            self._places[feature_space] = self._catalog.feature_places(feature_space)
        return self._places[feature_space]

    def unregistered(self, feature_space: str, uids: Sequence[str]) -> list[str]:
        """Those of `uids` that the registry of a space lacks, in order."""
        return [uid for uid in uids if uid not in self._in_registry(feature_space)]

    def register(self, feature_space: str, uids: Sequence[str]) -> None:
        """Count features as registered that are about to be."""
        self._in_registry(feature_space).update(uids)

    def _in_registry(self, feature_space: str) -> set[str]:
        if feature_space not in self._registered:
            stored = tables.read(self._catalog.registry(feature_space), ["uid"]).column("uid")
            self._registered[feature_space] = set(stored.to_pylist())
        return self._registered[feature_space]

    def number(self, feature_space: str, uids: Sequence[str]) -> None:
        """Give those without a place the next ones, as ``optimize()`` will when it meets this list."""
        places = self.places(feature_space)
        if all(places.get(uid) is not None for uid in uids):
            return
        free = 1 + max((at for at in places.values() if at is not None), default=-1)
        for uid in uids:
            if places.get(uid) is None:
                places[uid] = free
                free += 1

    # Cells

    @cached_property
    def has_cells(self) -> frozenset[str]:
        """Uids of the datasets that had cells in the obs table when the ingest began."""
        return frozenset(self._names[1])

    @cached_property
    def _names(self) -> tuple[NamesIndex, list[str]]:
        table = self._catalog.obs(self._obs_table)
        named = "obs_name" in table.schema.names
        stored = tables.read(table, ["obs_name", "dataset_uid"] if named else ["dataset_uid"])
        uids = stored.column("dataset_uid")
        names = stored.column("obs_name") if named else pa.chunked_array([pa.nulls(len(uids), pa.string())])
        index, listed = of_table(names, uids)
        return (index if named else NamesIndex()), listed

    def datasets_of_file(
        self, source_name: str, names: pa.Array | pa.ChunkedArray, share: float
    ) -> dict[str, int]:
        """Datasets of a file of this name that have most of some names of cells -> how many."""
        of_file = self._by_source.get(source_name)
        if not of_file:
            return {}
        index, uids = self._names
        found = {uids[owner]: n for owner, n in index.owners(hashes(names), share).items()}
        return {uid: n for uid, n in found.items() if uid in of_file}

    def datasets_with_cells(
        self, field: str, names: pa.Array | pa.ChunkedArray, pointers: pa.Array, share: float
    ) -> dict[str, int]:
        """Datasets that have most of some cells -> how many; see :meth:`NamesIndex.owners`.

        Parameters
        ----------
        field, names, pointers
            Pointer column of a new dataset; see :func:`cell_hashes`.
        share
            Least share of the cells of the smaller dataset.
        """
        uids = self._names[1]
        found = self._cells_of(field).owners(cell_hashes(names, pointers), share)
        return {uids[owner]: n for owner, n in found.items()}

    def add_cells(
        self, dataset_uid: str, field: str, names: pa.Array | pa.ChunkedArray, pointers: pa.Array
    ) -> None:
        """Add the cells of a dataset that is about to be in the atlas."""
        _ = self.has_cells  # as it was before
        index, uids = self._names
        owner = np.full(len(names), len(uids), np.int32)
        self._cells_of(field).add(cell_hashes(names, pointers), owner)
        index.add(hashes(names), owner)
        uids.append(dataset_uid)

    def _cells_of(self, field: str) -> NamesIndex:
        """The cells that a pointer column has; datasets are numbered as in `_names`."""
        if field not in self._cells:
            table, uids = self._catalog.obs(self._obs_table), self._names[1]
            made = NamesIndex()
            if {"obs_name", field} <= set(table.schema.names):
                where = f"`{field}`.zarr_group IS NOT NULL"
                stored = tables.read(table, ["obs_name", "dataset_uid", field], where)
                if len(stored):
                    owner = pc.index_in(stored.column("dataset_uid"), value_set=pa.array(uids, pa.string()))
                    keys = cell_hashes(stored.column("obs_name"), stored.column(field))
                    made.add(keys, owner.to_numpy().astype(np.int32))
            self._cells[field] = made
        return self._cells[field]

    @cached_property
    def _uids(self) -> NamesIndex:
        index = NamesIndex()
        stored = tables.read(self._catalog.obs(self._obs_table), ["uid"]).column("uid")
        if len(stored):
            index.add(hashes(stored), np.zeros(len(stored), np.int32))
        return index

    def maybe_uids(self, uids: pa.Array | pa.ChunkedArray) -> np.ndarray:
        """bool, (n,). Whether cells of these uids may be in the obs table; a look at the table decides."""
        return self._uids.contains(hashes(uids))

    def add_uids(self, uids: pa.Array | pa.ChunkedArray) -> None:
        """Add uids that files gave to their cells."""
        found = hashes(uids)
        self._uids.add(found, np.zeros(len(found), np.int32))
