"""One snapshot of an atlas, read-only: its tables at their recorded versions, its features, its groups."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from hbx_gpu._advice import option
from hbx_gpu._remote.fetch import map_at_once
from hbx_gpu._remote.places import AnyPath, Place, parse
from hbx_gpu._untrusted import Within
from hbx_gpu.atlas._catalog import documents, manifest
from hbx_gpu.atlas._catalog.paths import LAYOUT_TABLE, check_database, group_path
from hbx_gpu.atlas._catalog.registry import Registry
from hbx_gpu.atlas._catalog.snapshot_records import (
    VERSION_TABLE,
    SnapshotRecord,
    atlas_root,
    list_versions,
    read_records,
    resolve_store,
)
from hbx_gpu.atlas._catalog.table_errors import lance_errors, open_guarded
from hbx_gpu.atlas._model.schema import layout_uid
from hbx_gpu.atlas._model.spaces import FeatureSpace, PointerKind, get_space, guess_space, known_spaces
from hbx_gpu.errors import AtlasError, TableError, UnknownNameError

if TYPE_CHECKING:
    import pandas as pd
    from lancedb.table import Table

__all__ = ["Group", "PointerColumn", "Snapshot", "list_versions"]

_log = logging.getLogger(__name__)

_SUBFIELDS: dict[PointerKind, frozenset[str]] = {
    "sparse": frozenset({"zarr_group", "start", "end"}),
    "dense": frozenset({"zarr_group", "position"}),
    "discrete_spatial": frozenset({"zarr_group", "min_corner", "max_corner"}),
}


@dataclass(frozen=True, slots=True)
class PointerColumn:
    """A column of an obs table that locates the data of each row in one modality.

    Attributes
    ----------
    name
        Name of the column.
    feature_space
        Feature space (modality) that the column points into.
    kind
        How the column addresses data.
    """

    name: str
    feature_space: str
    kind: PointerKind


@dataclass(frozen=True, slots=True)
class Group:
    """Record of one zarr group.

    Attributes
    ----------
    name
        Path of the group in the zarr store.
    feature_space
        Feature space (modality) of the group.
    layout_uid
        Uid of the group's ordered feature list; empty where the space has no features.
    software
        Program that wrote the group, ``""`` if not recorded.
    """

    name: str
    feature_space: str
    layout_uid: str
    software: str


class Snapshot:
    """A read-only snapshot at pinned table versions: its answers stay the same while the atlas grows.

    Use :meth:`open`.

    Attributes
    ----------
    path
        Directory or address of the atlas.
    version
        Number of the snapshot.
    store_path
        Directory or address of the zarr store.
    record
        Record of the snapshot.
    version_table_name
        Table that holds the record.
    allow_links
        Whether links may lead out of the zarr store.
    """

    def __init__(
        self,
        path: AnyPath,
        record: SnapshotRecord,
        store_path: AnyPath,
        version_table_name: str,
        *,
        allow_links: bool = False,
    ) -> None:
        self.path = path
        self.version = record.version
        self.store_path = store_path
        self.record = record
        self.version_table_name = version_table_name
        self.allow_links = allow_links
        self._tables: dict[tuple[str, int], Table] = {}
        self._registries: dict[str, Registry] = {}
        self._groups: dict[tuple[str, str], Group] | None = None
        self._remaps: dict[tuple[str, str], np.ndarray] = {}
        self._documents: dict[str, bytes] | None = None
        # Vocabularies of obs columns, filled by atlas.obs.
        self.vocabularies: dict[tuple[str, str], pa.Array] = {}

    @classmethod
    def open(
        cls,
        path: str | os.PathLike[str],
        version: int | None = None,
        *,
        store: object = None,
        version_table_name: str = VERSION_TABLE,
        allow_links: bool = False,
        storage_options: Mapping[str, str] | None = None,
        cache: str | os.PathLike[str] | None = None,
        cache_bytes: int | None = None,
    ) -> Snapshot:
        """Open a snapshot of an atlas of any generation.

        Parameters
        ----------
        path
            Directory of the atlas, or its ``lance_db``; or an address in object storage.
        version
            Number of the snapshot; the latest by default.
        store
            The zarr store where it is not the sibling of ``lance_db``: a path or a local store object.
        version_table_name
            Table that records the snapshots.
        allow_links
            Follow links that lead out of the atlas and its zarr store.
        storage_options, cache, cache_bytes
            For an address, as in :meth:`RaggedAtlas.checkout`.

        Returns
        -------
        Snapshot
            The snapshot, read-only.

        Raises
        ------
        FileNotFoundError
            No atlas, or no zarr store.
        UnsafePathError
            A link that leads out, or a FIFO or a device in the place of a file.
        ValueError
            No snapshots, or none of that number.
        AtlasError
            A table whose recorded version no longer exists.
        """
        root = atlas_root(parse(path, storage_options, cache=cache, cache_bytes=cache_bytes))
        check_database(root, allow_links=allow_links)
        records = {r.version: r for r in read_records(root, version_table_name=version_table_name)}
        if not records:
            raise ValueError(
                f"No snapshots found in the atlas at {root}; its writer must call snapshot() first"
            )
        wanted = max(records) if version is None else version
        if wanted not in records:
            raise ValueError(
                f"version {version} not found in the atlas at {root}; available: {sorted(records)}"
            )
        record = records[wanted]
        where = resolve_store(root, record, store, allow_links=allow_links)
        snapshot = cls(root, record, where, version_table_name, allow_links=allow_links)
        pinned = [(table, v) for table, versions in record.pinned.items() for v in versions]
        if isinstance(root, Place):
            manifest.fetch(root, record)
            map_at_once(lambda key: snapshot._open_table(*key), pinned)
        for table, number in pinned:
            snapshot._open_table(table, number)
        return snapshot

    def __repr__(self) -> str:
        return f"Snapshot({str(self.path)!r}, version={self.version}, obs_tables={self.obs_tables})"

    def _open_table(self, name: str, version: int) -> Table:
        key = (name, version)
        if key not in self._tables:
            manifest.verify(self.path, self.record, name, version)
            try:
                table = open_guarded(self.path, name)
                table.checkout(version)
            except TableError as error:
                raise AtlasError(
                    f"snapshot {self.version} of the atlas at {self.path} needs version {version} of table "
                    f"{name!r}, which cannot be opened: {error}. It may have been cleaned up; other "
                    "snapshots may still open, see list_versions()"
                ) from error
            self._tables[key] = table
        return self._tables[key]

    # Obs tables

    @property
    def obs_tables(self) -> list[str]:
        """Names of the obs tables, sorted."""
        return sorted(self.record.obs_tables)

    def obs_table_name(self, table: str | None = None) -> str:
        """Name of the obs table meant by `table`; None means the only one.

        Raises
        ------
        ValueError
            `table` is None and there are several tables.
        UnknownNameError
            There is no obs table of that name.
        """
        names = self.obs_tables
        if table is None:
            if len(names) != 1:
                raise ValueError(
                    f"Atlas has multiple obs tables ({names}); pass {option('obs_table_name')} to select one."
                )
            return names[0]
        if table not in names:
            raise UnknownNameError(f"no obs table {table!r} in snapshot {self.version}; available: {names}")
        return table

    def obs_table(self, table: str | None = None) -> Table:
        """The LanceDB table at its pinned version."""
        name = self.obs_table_name(table)
        return self._open_table(name, self.record.obs_tables[name])

    def obs_schema(self, table: str | None = None) -> pa.Schema:
        """Arrow schema of an obs table."""
        return self.obs_table(table).schema

    def pointer_fields(self, table: str | None = None) -> dict[str, PointerColumn]:
        """Pointer columns of an obs table by name, in column order."""
        found = (self._pointer_field(column) for column in self.obs_schema(table))
        return {pointer.name: pointer for pointer in found if pointer is not None}

    def _pointer_field(self, column: pa.Field) -> PointerColumn | None:
        if not pa.types.is_struct(column.type):
            return None
        members = {column.type.field(i).name for i in range(column.type.num_fields)}
        kind = next((kind for kind, needs in _SUBFIELDS.items() if needs <= members), None)
        space = (column.metadata or {}).get(b"homeobox.feature_space", b"").decode()
        # The oldest generation has no metadata; there the column has the name of its space.
        if not space and column.name in self._spaces_in_use():
            space = column.name
        return PointerColumn(column.name, space, kind) if kind and space else None

    def _spaces_in_use(self) -> set[str]:
        groups = {space for _, space in self._group_records()}
        return groups | set(self.record.registries) | set(known_spaces())

    # Groups and features

    def datasets(self) -> pd.DataFrame:
        """One row per zarr group: ``dataset_uid``, ``zarr_group``, ``feature_space``, ``layout_uid``, ...

        Earlier generations called the first column ``uid`` and the row count ``n_cells``; here it is
        ``n_rows`` for all that have it.
        """
        table = self._datasets_table()
        return table.to_pandas()

    def _datasets_table(self) -> pa.Table:
        table = self._open_table(*self.record.dataset_table).to_arrow()
        renames = {"n_cells": "n_rows"}
        if "dataset_uid" not in table.schema.names:
            renames["uid"] = "dataset_uid"
        names = [
            renames[n] if n in renames and renames[n] not in table.schema.names else n
            for n in table.schema.names
        ]
        return table.rename_columns(names)

    def _group_records(self) -> dict[tuple[str, str], Group]:
        if self._groups is None:
            table = self._datasets_table()
            with lance_errors(self.path, self.record.dataset_table[0]):
                self._groups = self._listed(table)
        return self._groups

    @staticmethod
    def _listed(table: pa.Table) -> dict[tuple[str, str], Group]:
        keys = ["zarr_group", "feature_space", "layout_uid", "software"]
        rows = table.select([key for key in keys if key in table.schema.names]).to_pylist()
        return {
            (row["zarr_group"], row["feature_space"]): Group(
                row["zarr_group"],
                row["feature_space"],
                row["layout_uid"] or "",
                str(row.get("software") or ""),
            )
            for row in rows
        }

    def group(self, zarr_group: str, feature_space: str) -> Group:
        """Record of a zarr group.

        Raises
        ------
        AtlasError
            Obs rows point to a group that the dataset table does not list for that space.
        """
        try:
            return self._group_records()[zarr_group, feature_space]
        except KeyError:
            raise AtlasError(
                f"table {self.record.dataset_table[0]!r} lists no group {zarr_group!r} of feature space "
                f"{feature_space!r} in snapshot {self.version} of the atlas at {self.path}"
            ) from None

    def groups(self, feature_space: str) -> list[Group]:
        """Records of all groups of a space, whether rows point to them or not."""
        return [group for (_, space), group in self._group_records().items() if space == feature_space]

    def space(self, group: Group) -> FeatureSpace:
        """The feature space of a group: registered, or guessed from what the group holds."""
        if group.feature_space in known_spaces():
            return get_space(group.feature_space)
        return guess_space(
            group.feature_space, self.group_path(group.name), has_features=bool(group.layout_uid)
        )

    def group_path(self, zarr_group: str, within: Within | None = None) -> AnyPath:
        """Directory or address of a group.

        Parameters
        ----------
        zarr_group
            Name of the group.
        within
            What refuses links, where many groups are opened.

        Raises
        ------
        AtlasError
            The name leaves the store.
        UnsafePathError
            A link leads out of the store.
        """
        return group_path(self.store_path, zarr_group, allow_links=self.allow_links, within=within)

    def array_document(self, array: str) -> bytes | None:
        """The ``zarr.json`` of an array in object storage; None where the atlas does not keep a copy of it.

        Parameters
        ----------
        array
            Path of the array in the zarr store.
        """
        if self._documents is None:
            far = self.path if isinstance(self.path, Place) else None
            self._documents = {} if far is None else documents.fetch(far, self.store_path)
        return self._documents.get(array)

    def registry(self, feature_space: str) -> Registry:
        """The features of a space at the pinned version of its registry.

        Raises
        ------
        UnknownNameError
            The space has no registry in this snapshot.
        AtlasError
            The registry is inconsistent.
        """
        if feature_space not in self._registries:
            if feature_space not in self.record.registries:
                raise UnknownNameError(
                    f"feature space {feature_space!r} has no registry in snapshot {self.version}; "
                    f"spaces with one: {sorted(self.record.registries)}"
                )
            name, version = self.record.registries[feature_space]
            with lance_errors(self.path, name):
                table = self._open_table(name, version).to_arrow()
                self._registries[feature_space] = Registry.from_table(feature_space, table, name=name)
        return self._registries[feature_space]

    def remap(self, zarr_group: str, feature_space: str) -> np.ndarray:
        """int32, (n_local_features,), read-only. Local column of a group -> global index of its feature.

        A feature that is no longer registered gives -1. Groups that share a layout share the array.

        Raises
        ------
        AtlasError
            The group or its layout is not recorded, or the layout is incomplete.
        """
        group = self.group(zarr_group, feature_space)
        self.load_remaps([group])
        return self._remaps[group.layout_uid, feature_space]

    def load_remaps(self, groups: Iterable[Group]) -> None:
        """Read the layouts of several groups in one scan, where :meth:`remap` would scan for each."""
        wanted: dict[tuple[str, str], Group] = {}
        for group in groups:
            key = (group.layout_uid, group.feature_space)
            if not group.layout_uid:
                self._remaps.setdefault(key, _frozen(np.empty(0, dtype=np.int32)))
            if key not in self._remaps:
                wanted.setdefault(key, group)
        if not wanted:
            return
        uids = sorted({layout for layout, _ in wanted})
        clause = "layout_uid IN ({})".format(", ".join("'" + uid.replace("'", "''") + "'" for uid in uids))
        table = self._open_table(LAYOUT_TABLE, self.record.layouts_version)
        rows = (
            table.search()
            .where(clause)
            .to_arrow()
            .sort_by([("layout_uid", "ascending"), ("local_index", "ascending")])
        )
        counts = pc.value_counts(rows.column("layout_uid")).to_pylist()
        begin = np.cumsum([0] + [entry["counts"] for entry in counts]).tolist()
        parts = {
            entry["values"]: rows.slice(at, entry["counts"]) for entry, at in zip(counts, begin, strict=False)
        }
        for key, group in wanted.items():
            with lance_errors(self.path, LAYOUT_TABLE):
                found = parts.get(group.layout_uid, rows.slice(0, 0))
                self._remaps[key] = self._resolve_layout(found, group)

    def _resolve_layout(self, layout: pa.Table, group: Group) -> np.ndarray:
        """Global indices of one layout by local index. Stored copies may be wrong, so uids are looked up."""
        where = f"layout {group.layout_uid!r} of group {group.name!r}"
        local = layout.column("local_index").to_numpy()
        if not len(local) or not np.array_equal(local, np.arange(len(local))):
            raise AtlasError(
                f"{where}: expected local indices 0 .. m-1, each once, in table {LAYOUT_TABLE!r}, "
                f"found {len(local)} rows" + (f" from {local[0]} to {local[-1]}" if len(local) else "")
            )
        remap = self.registry(group.feature_space).find(layout.column("feature_uid"))
        ours = group.software.startswith("hbx_gpu")
        if ours and (found := layout_uid(layout.column("feature_uid").to_pylist())) != group.layout_uid:
            raise AtlasError(
                f"{where}: its {len(local)} features make layout {found!r}; table {LAYOUT_TABLE!r} of the "
                f"atlas at {self.path} was damaged or changed, copy the atlas again from its origin"
            )
        if (gone := np.flatnonzero(remap < 0)).size:
            some = layout.column("feature_uid").take(pa.array(gone[:5])).to_pylist()
            if ours:
                raise AtlasError(
                    f"{where}: {gone.size} feature(s) are not in the registry of {group.feature_space!r}, "
                    f"first: {some}; the atlas at {self.path} was damaged, copy it again from its origin or "
                    "open an earlier snapshot"
                )
            _log.warning(
                "%s: %d feature(s) are not in the registry of %r and are left out, first: %s",
                where,
                gone.size,
                group.feature_space,
                some,
            )
        copies = layout.column("global_index")
        if copies.null_count or not np.array_equal(copies.to_numpy(), remap):
            _log.warning(
                "%s: the global indices stored in %r differ from the registry of %r; the registry is used",
                where,
                LAYOUT_TABLE,
                group.feature_space,
            )
        return _frozen(remap)


def _frozen(array: np.ndarray) -> np.ndarray:
    array.flags.writeable = False
    return array
