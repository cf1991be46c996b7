"""An atlas that is open for writing: its tables, the classes declared for them, and the write lock."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Protocol

from hbx_gpu.atlas._catalog import removal, tables
from hbx_gpu.atlas._catalog.catalog import Catalog
from hbx_gpu.atlas._catalog.journal import IngestNote
from hbx_gpu.atlas._catalog.lock import WriteLock
from hbx_gpu.atlas._catalog.mirror import Mirror
from hbx_gpu.atlas._catalog.names import Names, only_table
from hbx_gpu.atlas._catalog.removal import remove_dataset
from hbx_gpu.atlas._model.schema import (
    Cell,
    FeatureBaseSchema,
    Gene,
    HoxBaseSchema,
    cells_class,
    check_schema,
    default_registry,
    registry_table_name,
)
from hbx_gpu.atlas._model.spaces import get_space
from hbx_gpu.errors import UnknownNameError

ObsSchemas = Mapping[str, type[HoxBaseSchema] | None]
"""Obs table -> its schema class, None for a table that takes its columns from the data."""


def recover(catalog: Catalog) -> None:
    """Undo or finish the work of killed writers; every step is safe to repeat."""
    for note in catalog.journal.notes():
        finish_replacement(catalog, note)
    catalog.recover()
    removal.recover(catalog)


def finish_replacement(catalog: Catalog, note: IngestNote) -> None:
    """Remove the datasets that a new one replaces, if the new one is complete; safe to repeat."""
    if note.replaces and catalog.is_complete(note):
        for uid in note.replaces:
            remove_dataset(catalog, uid)


def declared_schemas(
    names: Names,
    obs_table_names: str | Sequence[str] | ObsSchemas | None = None,
    obs_schemas: ObsSchemas | type[HoxBaseSchema] | None = None,
    dataset_table_name: str | None = None,
    registry_tables: Mapping[str, str] | None = None,
) -> dict[str, type[HoxBaseSchema] | None] | None:
    """Classes by obs table, from arguments as Homeobox's releases take them, checked against the atlas.

    Parameters
    ----------
    names
        Names of the tables of the atlas.
    obs_table_names, obs_schemas, dataset_table_name, registry_tables
        As of :meth:`hbx_gpu.atlas.RaggedAtlas.open`.

    Raises
    ------
    UnknownNameError
        The atlas has no obs table of a name, or its table of groups or of features has another.
    ValueError
        A class without the name of its table, where there are several tables.
    """
    if isinstance(obs_table_names, Mapping):
        if obs_schemas is not None:
            raise ValueError("pass the classes of obs tables once, as obs_schemas=")
        obs_table_names, obs_schemas = None, obs_table_names
    asked = [obs_table_names] if isinstance(obs_table_names, str) else list(obs_table_names or ())
    if missing := [name for name in asked if name not in names.obs_tables]:
        raise UnknownNameError(f"no obs table {missing[0]!r} in this atlas; it has {list(names.obs_tables)}")
    if dataset_table_name not in (None, names.dataset_table):
        raise UnknownNameError(
            f"no table of datasets {dataset_table_name!r} in this atlas; it is called {names.dataset_table!r}"
        )
    for space, table in (registry_tables or {}).items():
        if names.registries.get(space) != table:
            raise UnknownNameError(
                f"the features of {space!r} are not in table {table!r}; this atlas has them in "
                f"{dict(names.registries)}"
            )
    if obs_schemas is None:
        return None
    if isinstance(obs_schemas, Mapping):
        return dict(obs_schemas)
    return {only_table(asked or names.obs_tables): obs_schemas}


class WriteSession:
    """An atlas that is open for writing.

    Parameters
    ----------
    catalog
        Tables of the atlas.
    obs_schemas, registry_schemas
        Schema classes by obs table and by feature space; tables without a class take further columns from the
        data.
    pointer_fields
        Pointer column -> feature space, for obs tables that are created without a class.
    """

    def __init__(
        self,
        catalog: Catalog,
        *,
        obs_schemas: ObsSchemas | None = None,
        registry_schemas: Mapping[str, type[FeatureBaseSchema]] | None = None,
        pointer_fields: Mapping[str, str] | None = None,
    ) -> None:
        self.catalog = catalog
        self._obs_schemas = dict(obs_schemas or {})
        self._registry_schemas = dict(registry_schemas or {})
        self._without_class = Cell if pointer_fields is None else cells_class(pointer_fields)
        self.lock = WriteLock(catalog.root)
        self.mirror: Mirror | None = None

    @property
    def obs_tables(self) -> list[str]:
        """Names of the obs tables, sorted."""
        return sorted(self.catalog.names.obs_tables)

    def obs_schema(self, table: str) -> type[HoxBaseSchema] | None:
        """The class declared for an obs table, if any."""
        return self._obs_schemas.get(table)

    def registry_schema(self, feature_space: str) -> type[FeatureBaseSchema] | None:
        """The class declared for a registry, if any."""
        return self._registry_schemas.get(feature_space)

    @contextlib.contextmanager
    def writing(self) -> Iterator[Catalog]:
        """Hold the write lock; the remains of killed writers are cleaned up first.

        Raises
        ------
        AtlasLockedError
            Somebody else is writing.
        """
        with contextlib.ExitStack() as stack:
            taken = stack.enter_context(self.lock.hold())
            if taken and self.mirror is not None:
                stack.enter_context(self.mirror.exchange())
                self._read_names()
            if taken:
                recover(self.catalog)
            yield self.catalog

    def attach(self, mirror: Mirror) -> None:
        """Let every write go on to the atlas in object storage of which this one is the local copy."""
        self.mirror = mirror
        self.catalog.fetch = mirror.fetch

    def checkpoint(self) -> None:
        """Make what was written so far last, in object storage too; the caller holds the write lock."""
        if self.mirror is not None:
            self.mirror.push()

    def _read_names(self) -> None:
        """Names of tables that other writers have added in the meantime."""
        names = self.catalog.names
        found = Names.load(self.catalog.root, version_table=names.version_table)
        if found is not None:
            self.catalog.names = replace(found, codec=names.codec)

    @property
    def complete(self) -> bool:
        """Whether every table for which a class was declared exists."""
        names = self.catalog.names
        return set(self._obs_schemas) <= set(names.obs_tables) and set(self._registry_schemas) <= set(
            names.registries
        )

    def ensure_tables(self) -> None:
        """Create declared obs tables and registries that do not exist; the caller holds the write lock."""
        root, names = self.catalog.root, self.catalog.names
        registries = dict(names.registries)
        for space, schema in self._registry_schemas.items():
            registries.setdefault(space, registry_table_name(schema))
            tables.ensure_table(root, registries[space], schema.to_arrow_schema())
        for table, given in self._obs_schemas.items():
            declared = given or self._without_class
            tables.ensure_table(root, table, declared.to_arrow_schema())
            for pointer in declared.pointer_fields().values():
                space = pointer.feature_space
                if get_space(space).has_features and space not in registries:
                    registries[space] = default_registry(space)
                    tables.ensure_table(root, registries[space], Gene.to_arrow_schema())
        obs = tuple(sorted({*names.obs_tables, *self._obs_schemas}))
        changed = replace(names, obs_tables=obs, registries=registries)
        if changed != names:
            self.catalog.names = changed
            changed.save(root)

    def check_schemas(self) -> None:
        """Compare the declared classes with the tables that exist.

        Raises
        ------
        AtlasError
            A class disagrees with its table.
        """
        names = self.catalog.names
        for table, declared in self._obs_schemas.items():
            if declared is not None and table in names.obs_tables:
                check_schema(declared, self.catalog.obs(table).schema, table)
        for space, schema in self._registry_schemas.items():
            if space in names.registries:
                name = names.registries[space]
                check_schema(schema, self.catalog.registry(space).schema, name)


class Writable(Protocol):
    """What an ingest accepts: an atlas that has a write session."""

    @property
    def session(self) -> WriteSession:
        """The write session.

        Raises
        ------
        AtlasError
            The atlas is checked out, thus read-only.
        """
        ...
