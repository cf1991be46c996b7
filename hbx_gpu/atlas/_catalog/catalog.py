"""The tables of an atlas that is open for writing, and the rows that an ingest adds to them."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from lancedb.table import Table

from hbx_gpu._files import sync
from hbx_gpu.atlas._catalog import journal_checks, swap, tables
from hbx_gpu.atlas._catalog.journal import GroupNote, IngestNote, Journal
from hbx_gpu.atlas._catalog.names import Names
from hbx_gpu.atlas._catalog.paths import LAYOUT_TABLE, group_path, staging_path
from hbx_gpu.atlas._model.schema import FEATURE_SPACE_KEY, Gene, default_registry, layout_uid, pointer_column
from hbx_gpu.atlas._model.spaces import get_space
from hbx_gpu.atlas._writing.arrays import make_group
from hbx_gpu.errors import AtlasError, UnknownNameError

# Uids per SQL condition when rows are removed.
_SQL_BATCH = 1000


def _all_here(zarr_group: str) -> None:
    """Of a local atlas, the arrays of every group are on the local disk."""


class Catalog:
    """Tables and groups of one atlas, opened for writing. Callers hold the write lock.

    Parameters
    ----------
    root
        Directory of the atlas.
    store
        Directory of its zarr store.
    names
        Names of its tables.
    allow_links
        Follow links that lead out of the store.

    Attributes
    ----------
    fetch
        Brings the arrays of a group, by its name, to the local disk where the atlas is in object storage.
    """

    def __init__(self, root: Path, store: Path, names: Names, *, allow_links: bool = False) -> None:
        self.root, self.store, self.names, self.allow_links = root, store, names, allow_links
        self.journal = Journal(root)
        self.fetch: Callable[[str], None] = _all_here

    # Tables, always in their newest state

    def obs(self, name: str) -> Table:
        """An obs table."""
        if name not in self.names.obs_tables:
            raise UnknownNameError(
                f"no obs table {name!r} in the atlas at {self.root}; available: {list(self.names.obs_tables)}"
            )
        return tables.open_table(self.root, name)

    def datasets(self) -> Table:
        """The table of groups."""
        return tables.open_table(self.root, self.names.dataset_table)

    def layouts(self) -> Table:
        """The table of feature lists."""
        return tables.open_table(self.root, LAYOUT_TABLE)

    def versions(self) -> Table:
        """The table of snapshots."""
        return tables.open_table(self.root, self.names.version_table)

    def registry(self, feature_space: str) -> Table:
        """The features of a space."""
        if feature_space not in self.names.registries:
            raise UnknownNameError(
                f"feature space {feature_space!r} has no registry in the atlas at {self.root}; spaces with "
                f"one: {sorted(self.names.registries)}. Pass registry_schemas={{{feature_space!r}: ...}} to "
                "create_or_open_atlas"
            )
        return tables.open_table(self.root, self.names.registries[feature_space])

    def pointer_spaces(self, obs_table: str) -> dict[str, str]:
        """Pointer column -> feature space of an obs table."""
        return {
            field.name: (field.metadata or {})[FEATURE_SPACE_KEY].decode()
            for field in self.obs(obs_table).schema
            if FEATURE_SPACE_KEY in (field.metadata or {})
        }

    def dataset_rows(self, where: str | None = None) -> list[dict[str, Any]]:
        """Rows of the table of groups."""
        table = self.datasets()
        return list(tables.read(table, table.schema.names, where).to_pylist())

    # New modalities

    def extension(self, obs_table: str, fields: Mapping[str, str]) -> tuple[str, ...]:
        """Names of the registry tables that :meth:`extend` would create.

        Raises
        ------
        AtlasError
            A column of that name exists and is not a pointer column, or points into another space.
        """
        schema, there = self.obs(obs_table).schema, self.pointer_spaces(obs_table)
        for name, space in fields.items():
            if name in schema.names and there.get(name) != space:
                what = f"points into {there[name]!r}" if name in there else f"is {schema.field(name).type}"
                raise AtlasError(
                    f"obs table {obs_table!r} has a column {name!r} which {what}: a pointer column "
                    f"into {space!r} needs another name: RaggedAtlas.add_pointer_field(name, {space!r})"
                )
        stored = tables.table_names(self.root)
        return tuple(t for t in self._registries(fields).values() if t not in stored)

    def _registries(self, fields: Mapping[str, str]) -> dict[str, str]:
        spaces = [s for s in fields.values() if get_space(s).has_features and s not in self.names.registries]
        return {space: default_registry(space) for space in spaces}

    def extend(self, obs_table: str, fields: Mapping[str, str]) -> None:
        """Add pointer columns (name -> feature space) to an obs table, and the registries they need.

        May be repeated after an interruption. Raises as :meth:`extension`.
        """
        self.extension(obs_table, fields)
        if new := self._registries(fields):
            for name in new.values():
                tables.ensure_table(self.root, name, Gene.to_arrow_schema())
            self.names = replace(self.names, registries={**self.names.registries, **new})
            self.names.save(self.root)
        obs = self.obs(obs_table)
        columns = [pointer_column(name, s) for name, s in fields.items() if name not in obs.schema.names]
        if columns:
            obs.add_columns(columns)

    # Features

    def unregistered(self, feature_space: str, uids: Iterable[str]) -> list[str]:
        """Those of `uids` that the registry of a space lacks, in order."""
        known = set(tables.read(self.registry(feature_space), ["uid"]).column("uid").to_pylist())
        return [uid for uid in uids if uid not in known]

    def feature_order(self, feature_space: str, uids: Sequence[str]) -> np.ndarray:
        """int64, (len(uids),). Positions of `uids` in the order in which the registry numbers features.

        Features without a number follow the numbered ones: first in the order in which stored lists name
        them, as ``optimize()`` will number them, then in the order given.
        """
        if feature_space not in self.names.registries:
            return np.arange(len(uids))
        return in_order(self.feature_places(feature_space), uids)

    def feature_places(self, feature_space: str) -> dict[str, int | None]:
        """Registered feature of a space -> its number, or the one that ``optimize()`` will give it.

        None where no stored list names a feature that has no number yet.
        """
        rows = tables.read(self.registry(feature_space), ["uid", "global_index"])
        numbers = rows.column("global_index")
        place = dict(zip(rows.column("uid").to_pylist(), numbers.to_pylist(), strict=True))
        if numbers.null_count:
            largest = pc.max(numbers).as_py()
            listed = self.layouts().search().select(["feature_uid"]).with_row_id(True).to_arrow()
            names = listed.sort_by("_rowid").column("feature_uid").unique().to_pylist()
            for at, uid in enumerate(names, 0 if largest is None else largest + 1):
                if uid in place and place[uid] is None:
                    place[uid] = at
        return place

    def layout_exists(self, uid: str) -> bool:
        """Whether a feature list is stored."""
        return self.layouts().count_rows(f"layout_uid = {tables.quoted(uid)}") > 0

    def add_layout(self, feature_uids: list[str]) -> None:
        """Store an ordered feature list; its global indices follow in ``optimize()``."""
        self.add_layouts({layout_uid(feature_uids): feature_uids})

    def add_layouts(self, lists: Mapping[str, Sequence[str]]) -> None:
        """Store ordered feature lists (uid -> features) in one commit, which is none for no list."""
        if not lists:
            return
        table = self.layouts()
        lengths = [len(features) for features in lists.values()]
        rows = {
            "layout_uid": pa.array(np.repeat(np.array(list(lists), object), lengths), pa.string()),
            "feature_uid": pa.array([uid for features in lists.values() for uid in features], pa.string()),
            "local_index": pa.array(np.concatenate([np.arange(n) for n in lengths]), pa.int64()),
            "global_index": pa.nulls(sum(lengths), pa.int64()),
        }
        # A stream, so that the lists keep their order.
        table.add(pa.table(rows, schema=table.schema).to_reader())

    # Groups

    def staging(self, name: str) -> Path:
        """Folder for unfinished files of one ingest, inside the store so that moving them out is a rename."""
        return staging_path(self.store, name)

    def group_path(self, zarr_group: str) -> Path:
        """Directory of a group.

        Raises
        ------
        AtlasError
            The name, or a link, leaves the store.
        """
        return group_path(self.store, zarr_group, allow_links=self.allow_links)

    def publish(self, staged: Path, zarr_group: str) -> None:
        """Move a finished group to its place."""
        target = self.group_path(zarr_group)
        target.parent.mkdir(parents=True, exist_ok=True)
        folder = target.parent
        while folder != self.store:
            make_group(folder)
            folder = folder.parent
        os.rename(staged, target)
        sync(target.parent)

    # Undoing

    def is_complete(self, note: IngestNote) -> bool:
        """Whether an ingest reached its last commit, which adds the cells of all its groups at once."""
        obs = self.obs(note.obs_table)
        # Columns that the ingest would have added may not exist yet.
        members = [g for g in note.groups if g.field_name in obs.schema.names]
        reached = " OR ".join(f"`{g.field_name}`.zarr_group = {tables.quoted(g.zarr_group)}" for g in members)
        if not reached:
            return False
        return obs.count_rows(f"{tables.one_of('dataset_uid', note.dataset_uids)} AND ({reached})") > 0

    def recover(self) -> None:
        """Undo or finish the work of killed ingests and repacks; every step is safe to repeat.

        Raises
        ------
        AtlasError
            A note belongs to another atlas, or names something unfinished work cannot have made. Nothing was
            changed.
        """
        self.journal.sweep()
        notes, repacks = self.journal.notes(), self.journal.repacks()
        # All notes are checked before the first is carried out.
        for repack in repacks:
            swap.check(self.store, repack)
        for note in notes:
            journal_checks.check(self, note)
        for repack in repacks:
            swap.settle(self.journal, self.store, repack)
        for note in notes:
            self.undo(note)
        # Tasks that outlived their ingest may have written on; no note knows of their files.
        swap.sweep(self.store, [note.staging for note in self.journal.repacks()])

    def undo(self, note: IngestNote) -> None:
        """Remove every trace of an incomplete ingest; for a complete one, remove only temporary files."""
        swap.discard(self.store, note.staging)
        tables.finish_promotions(self.obs(note.obs_table))
        for space in {group.feature_space for group in note.groups} & set(self.names.registries):
            tables.finish_promotions(self.registry(space))
        if not self.is_complete(note):
            if note.groups:
                groups = tables.one_of("zarr_group", [group.zarr_group for group in note.groups])
                self.datasets().delete(f"{tables.one_of('dataset_uid', note.dataset_uids)} AND {groups}")
            for group in note.groups:
                self._remove_group(group.zarr_group)
            for group in note.groups:
                self.remove_layout(group.layout_uid)
                self._remove_features(group)
            self._remove_extension(note)
        self.journal.remove(note)

    def _remove_group(self, zarr_group: str) -> None:
        path = group_path(self.store, zarr_group)  # nothing is removed through a link, whoever made it
        shutil.rmtree(path, ignore_errors=True)
        folder = path.parent
        # Parent groups made for it hold nothing but their own metadata.
        while (
            folder != self.store and folder.is_dir() and {p.name for p in folder.iterdir()} <= {"zarr.json"}
        ):
            shutil.rmtree(folder)
            folder = folder.parent

    def remove_layout(self, uid: str) -> None:
        """Remove a feature list that no dataset has."""
        if uid and not self.dataset_rows(f"layout_uid = {tables.quoted(uid)}"):
            self.layouts().delete(f"layout_uid = {tables.quoted(uid)}")

    def _remove_features(self, group: GroupNote) -> None:
        if not group.new_features or group.feature_space not in self.names.registries:
            return
        registry = self.registry(group.feature_space)
        if not registry.count_rows("global_index IS NULL"):
            return
        for i in range(0, len(group.new_features), _SQL_BATCH):
            chosen = tables.one_of("uid", group.new_features[i : i + _SQL_BATCH])
            registry.delete(f"global_index IS NULL AND {chosen}")

    def _remove_extension(self, note: IngestNote) -> None:
        for table, names in note.new_columns.items():
            if table in note.new_registries:
                continue  # the table is dropped as a whole, or was dropped before an interruption
            opened = tables.open_table(self.root, table)
            # No row has a value in these columns: the rows of this ingest are removed or were never added.
            if added := [name for name in names if name in opened.schema.names]:
                opened.drop_columns(added)
        registries = {s: t for s, t in self.names.registries.items() if t not in note.new_registries}
        if registries != self.names.registries:
            self.names = replace(self.names, registries=registries)
            self.names.save(self.root)
        for name in note.new_registries:
            tables.drop_table(self.root, name)


def in_order(places: Mapping[str, int | None], uids: Sequence[str]) -> np.ndarray:
    """int64, (len(uids),). Positions of `uids` in ascending order of places; those without one come last."""
    found = [places.get(uid) for uid in uids]
    last = max((at for at in found if at is not None), default=-1) + 1
    return np.argsort([last if at is None else at for at in found], kind="stable")
