"""An atlas is made, or opened for writing: its folders and tables are checked, and made where missing."""

from __future__ import annotations

import contextlib
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import pyarrow as pa

from hbx_gpu._files import make_folder
from hbx_gpu._paths import local_path
from hbx_gpu.atlas._catalog import creation, tables
from hbx_gpu.atlas._catalog.catalog import Catalog
from hbx_gpu.atlas._catalog.homeobox_arguments import Declared
from hbx_gpu.atlas._catalog.names import Names, only_table
from hbx_gpu.atlas._catalog.paths import LAYOUT_TABLE, check_store
from hbx_gpu.atlas._catalog.session import ObsSchemas, WriteSession
from hbx_gpu.atlas._catalog.snapshot_records import store_path
from hbx_gpu.atlas._model import columns
from hbx_gpu.atlas._model.schema import (
    AtlasVersion,
    FeatureBaseSchema,
    FeatureLayout,
    HoxBaseSchema,
    check_schema,
)
from hbx_gpu.atlas._model.spaces import get_space
from hbx_gpu.atlas._writing.arrays import check_codec, make_group
from hbx_gpu.errors import AtlasError, AtlasLockedError

if TYPE_CHECKING:
    import pandas as pd

    from hbx_gpu.atlas._catalog.snapshot import Snapshot

_UNKNOWN = (
    "the atlas at {} has no snapshot and was not made by hbx_gpu, so nothing says which of its tables {} "
    "is which; take a snapshot with the program that made it"
)


def make_atlas(
    root: Path,
    asked: Declared,
    *,
    store: object,
    version_table_name: str,
    codec: str,
    pointer_fields: Mapping[str, str] | None,
    allow_links: bool,
) -> tuple[WriteSession, ObsSchemas]:
    """Make the folders and tables of a new atlas, and say its classes; see :meth:`RaggedAtlas.create`."""
    schemas = asked.obs_schemas or {asked.cell_table_name: None}
    where = root / "zarr_store" if store is None else local_path(store_path(store))
    names = Names((), asked.dataset_table_name, {}, version_table_name, check_codec(codec))
    session = WriteSession(
        Catalog(root, where, names, allow_links=allow_links),
        obs_schemas=schemas,
        registry_schemas=asked.registry_schemas,
        pointer_fields=pointer_fields,
    )
    make_folder(root, "an atlas")
    with contextlib.ExitStack() as stack:
        stack.enter_context(session.lock.hold())
        if not creation.is_unfinished(root):
            if Names.load(root, version_table=version_table_name) is not None:
                raise FileExistsError(f"there is an atlas at {root} already; open it with RaggedAtlas.open")
            if any(tables.open_table(root, name).count_rows() for name in tables.table_names(root)):
                raise FileExistsError(_UNKNOWN.format(root, tables.table_names(root)))
        stack.enter_context(creation.making(root))
        if store is None:
            check_store(root, where, allow_links=allow_links)
        where.mkdir(parents=store is not None, exist_ok=True)
        make_group(where)
        tables.ensure_table(root, asked.dataset_table_name, asked.dataset_schema.to_arrow_schema())  # type: ignore[no-untyped-call]
        tables.ensure_table(root, LAYOUT_TABLE, FeatureLayout.to_arrow_schema())  # type: ignore[no-untyped-call]
        tables.ensure_table(root, version_table_name, AtlasVersion.to_arrow_schema())  # type: ignore[no-untyped-call]
        # Last, because saving the names marks the atlas as complete.
        session.ensure_tables()
    return session, schemas


def finished_names(root: Path, version_table_name: str, *, allow_links: bool) -> Names:
    """The names of the tables of an atlas that was made whole.

    Raises
    ------
    FileNotFoundError
        There is none.
    AtlasError
        Its tables cannot be told apart, or its creation was interrupted.
    AtlasLockedError
        Somebody else is making it.
    """
    if not (root / "lance_db").is_dir():
        raise FileNotFoundError(f"No atlas found at {root}: there is no directory {root / 'lance_db'}")
    names = creation.finished_names(root, version_table_name, allow_links=allow_links)
    if names is None:
        raise AtlasError(_UNKNOWN.format(root, tables.table_names(root)))
    return names


def open_atlas(
    root: Path,
    names: Names,
    schemas: ObsSchemas | None,
    *,
    store: object,
    registry_schemas: Mapping[str, type[FeatureBaseSchema]] | None,
    codec: str | None,
    allow_links: bool,
) -> WriteSession:
    """Open the tables and the zarr store of an atlas for writing; see :meth:`RaggedAtlas.open`."""
    if codec is not None:
        names = replace(names, codec=check_codec(codec))
    sibling = root / "zarr_store"
    where = (
        local_path(store_path(store))
        if store is not None
        else check_store(root, sibling, allow_links=allow_links)
    )
    if not where.is_dir():
        raise FileNotFoundError(f"no zarr store at {where}; pass its path as store=")
    session = WriteSession(
        Catalog(root, where, names, allow_links=allow_links),
        obs_schemas=schemas,
        registry_schemas=registry_schemas,
    )
    session.check_schemas()
    try:
        with session.writing():
            session.ensure_tables()
    except AtlasLockedError:
        # Another process is writing. That matters only if tables have to be made before the atlas can be
        # used.
        if not session.complete:
            raise
    return session


def register_features(
    session: WriteSession,
    feature_space: str,
    features: Sequence[FeatureBaseSchema] | pd.DataFrame | pa.Table,
) -> int:
    """Add features to the registry of a space; see :meth:`RaggedAtlas.register_features`."""
    source = f"features for {feature_space!r}"
    data = columns.features_table(features, source)
    with session.writing() as catalog:
        new = set(catalog.unregistered(feature_space, data.column("uid").to_pylist()))
        keep = []
        for i, uid in enumerate(data.column("uid").to_pylist()):
            if uid in new:
                new.remove(uid)
                keep.append(i)
        if keep:
            tables.prepare(
                catalog.registry(feature_space),
                data.take(pa.array(keep)),
                allow_new=session.registry_schema(feature_space) is None,
                source=source,
            ).commit()
        return len(keep)


def add_pointer_field(session: WriteSession, name: str, feature_space: str, obs_table: str | None) -> None:
    """Add a pointer column to an obs table; see :meth:`RaggedAtlas.add_pointer_field`."""
    get_space(feature_space)
    if columns.stored_names([name], ()) != {name: name}:
        raise AtlasError(f"pointer column {name!r}: the name must be free of dots and backticks")
    with session.writing() as catalog:
        catalog.extend(obs_table or only_table(session.obs_tables), {name: feature_space})


def checked_schemas(
    snapshot: Snapshot, given: type[HoxBaseSchema] | ObsSchemas
) -> dict[str, type[HoxBaseSchema] | None]:
    """The classes that are given for the obs tables of a snapshot, by table.

    Raises
    ------
    AtlasError
        A class declares columns that the snapshot lacks, or as another type.
    """
    schemas: dict[str, type[HoxBaseSchema] | None]
    schemas = dict(given) if isinstance(given, Mapping) else {snapshot.obs_table_name(): given}
    for table, declared in schemas.items():
        if declared is not None:
            check_schema(declared, snapshot.obs_schema(table), table)
    return schemas
