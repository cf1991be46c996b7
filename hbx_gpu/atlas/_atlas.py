"""The user's handle on an atlas: made or opened for writing, or checked out at a snapshot for reading."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import Executor
from pathlib import Path
from typing import TYPE_CHECKING, Any, Unpack

import pyarrow as pa

from hbx_gpu._remote.places import AnyPath, local_only
from hbx_gpu.atlas._catalog import setup
from hbx_gpu.atlas._catalog.catalog import Catalog
from hbx_gpu.atlas._catalog.homeobox_arguments import Given, RegistrySchemas, read_declared
from hbx_gpu.atlas._catalog.mirror import Mirror, also_in_object_storage
from hbx_gpu.atlas._catalog.paths import root_of
from hbx_gpu.atlas._catalog.removal import Removal, find_dataset, remove_dataset
from hbx_gpu.atlas._catalog.session import ObsSchemas, WriteSession, declared_schemas
from hbx_gpu.atlas._catalog.snapshot import Snapshot
from hbx_gpu.atlas._catalog.snapshot_records import VERSION_TABLE, list_versions
from hbx_gpu.atlas._model.schema import DatasetSchema, FeatureBaseSchema, HoxBaseSchema, PointerField
from hbx_gpu.atlas._query.query import AtlasQuery
from hbx_gpu.atlas._query.statistics import Options
from hbx_gpu.atlas._upkeep import snapshots as maintenance
from hbx_gpu.atlas._writing.arrays import DEFAULT_CODEC
from hbx_gpu.errors import AtlasError

if TYPE_CHECKING:
    import numpy as np
    import pandas as pd
    from anndata import AnnData

    from hbx_gpu.atlas._ingest.commit import IngestReport
    from hbx_gpu.atlas._ingest.embeddings import EmbedOptions
    from hbx_gpu.atlas._ingest.inputs import Input
    from hbx_gpu.atlas._ingest.many import Source
    from hbx_gpu.atlas._ingest.options import ManyOptions
    from hbx_gpu.atlas._ingest.reports import ManyReport
    from hbx_gpu.statistics import Statistics

_READ_ONLY = "this atlas is checked out at snapshot {} and read-only; open it with RaggedAtlas.open({!r})"


class RaggedAtlas:
    """Datasets with different features in one catalog.

    Made by :func:`create_or_open_atlas`, :meth:`create` or :meth:`open` (writable, no queries), or by
    :meth:`checkout` and :meth:`checkout_latest` (one snapshot, read-only).
    """

    def __init__(
        self,
        path: AnyPath,
        *,
        session: WriteSession | None = None,
        snapshot: Snapshot | None = None,
        schemas: ObsSchemas | None = None,
    ) -> None:
        self._path = path
        self._session = session
        self._snapshot = snapshot
        self._schemas = dict(schemas or {})

    def attached(self, mirror: Mirror) -> RaggedAtlas:
        """The same atlas, whose writes go on to object storage."""
        self.session.attach(mirror)
        self._path = mirror.place
        return self

    def __repr__(self) -> str:
        state = "writable" if self._snapshot is None else f"snapshot {self.version}"
        return f"RaggedAtlas({str(self._path)!r}, {state}, obs_tables={self.obs_tables})"

    # Opening

    @classmethod
    @also_in_object_storage
    def create(
        cls,
        path: str | os.PathLike[str],
        *given: Given,
        obs_schemas: ObsSchemas | None = None,
        cell_table_name: str | None = None,
        cell_schema: type[HoxBaseSchema] | None = None,
        dataset_table_name: str | None = None,
        dataset_schema: type[DatasetSchema] | None = None,
        store: object = None,
        registry_schemas: RegistrySchemas | None = None,
        codec: str = DEFAULT_CODEC,
        version_table_name: str = VERSION_TABLE,
        pointer_fields: Mapping[str, str] | None = None,
        store_kwargs: object = None,
        storage_options: Mapping[str, object] | None = None,
        allow_links: bool = False,
    ) -> RaggedAtlas:
        """Make a new atlas, open for writing; other parameters as in :func:`create_or_open_atlas`.

        Parameters
        ----------
        path
            Directory of the atlas, or an address in object storage.
        *given
            By position ``obs_schemas, dataset_table_name, dataset_schema, registry_schemas``, or as in
            Homeobox 0.2.3 ``cell_table_name, cell_schema, dataset_table_name, dataset_schema``.
        store
            Where the arrays go instead of ``zarr_store`` in that directory: a path, or a local store object
            of zarr or obstore. An atlas does not record it, so pass it whenever you open the atlas.
        store_kwargs
            Accepted and not used: local stores have no options.
        storage_options
            As in :meth:`checkout`.

        Raises
        ------
        TypeError
            An argument is given twice or has a wrong type.
        FileExistsError
            An atlas already exists there.
        AtlasLockedError
            Somebody else is making it.
        """
        del store_kwargs, storage_options
        root = root_of(path)
        named = {
            "obs_schemas": obs_schemas,
            "cell_table_name": cell_table_name,
            "cell_schema": cell_schema,
            "dataset_table_name": dataset_table_name,
            "dataset_schema": dataset_schema,
            "registry_schemas": registry_schemas,
        }
        asked = read_declared(given, named)
        session, schemas = setup.make_atlas(
            root,
            asked,
            store=store,
            version_table_name=version_table_name,
            codec=codec,
            pointer_fields=pointer_fields,
            allow_links=allow_links,
        )
        return cls(root, session=session, schemas=schemas)

    @classmethod
    @also_in_object_storage
    def open(
        cls,
        path: str | os.PathLike[str],
        obs_table_names: str | Sequence[str] | ObsSchemas | None = None,
        obs_schemas: ObsSchemas | type[HoxBaseSchema] | None = None,
        dataset_table_name: str | None = None,
        *,
        store: object = None,
        registry_schemas: Mapping[str, type[FeatureBaseSchema]] | None = None,
        registry_tables: Mapping[str, str] | None = None,
        codec: str | None = None,
        version_table_name: str = VERSION_TABLE,
        store_kwargs: object = None,
        storage_options: Mapping[str, object] | None = None,
        allow_links: bool = False,
    ) -> RaggedAtlas:
        """Open an atlas for writing.

        The path is enough; positional arguments are those of Homeobox's ``open``, old and new.

        Parameters
        ----------
        path
            Directory of the atlas, or its ``lance_db``; or an address in object storage.
        obs_table_names
            Obs tables that must exist: a name or names, or ``{table: class or None}`` as `obs_schemas`.
        obs_schemas
            Obs table -> its class, or None; the class alone where there is one table.
        dataset_table_name, registry_tables
            Checked: the table of groups, and feature space -> table of its features.
        store
            The zarr store where it is not the sibling of ``lance_db``: a path, or a local store object of
            zarr or obstore.
        registry_schemas, codec, version_table_name, allow_links
            As in :func:`create_or_open_atlas`.
        store_kwargs
            Accepted and not used: local stores have no options.
        storage_options
            As in :meth:`checkout`.

        Raises
        ------
        FileNotFoundError
            There is no atlas.
        AtlasError
            The tables cannot be told apart or are named otherwise, a schema class disagrees with them, or the
            creation of the atlas was interrupted.
        AtlasLockedError
            Somebody else is making it.
        """
        del store_kwargs, storage_options
        root = root_of(path)
        names = setup.finished_names(root, version_table_name, allow_links=allow_links)
        schemas = declared_schemas(names, obs_table_names, obs_schemas, dataset_table_name, registry_tables)
        session = setup.open_atlas(
            root,
            names,
            schemas,
            store=store,
            registry_schemas=registry_schemas,
            codec=codec,
            allow_links=allow_links,
        )
        return cls(root, session=session, schemas=schemas)

    @classmethod
    def checkout(
        cls,
        path: str | os.PathLike[str] | None = None,
        version: int | None = None,
        schema: type[HoxBaseSchema] | ObsSchemas | None = None,
        store: object = None,
        *,
        cell_schema: type[HoxBaseSchema] | None = None,
        obs_schemas: ObsSchemas | None = None,
        db_uri: str | os.PathLike[str] | None = None,
        store_kwargs: object = None,
        version_table_name: str = VERSION_TABLE,
        allow_links: bool = False,
        storage_options: Mapping[str, str] | None = None,
        cache: str | os.PathLike[str] | None = None,
        cache_bytes: int | None = None,
    ) -> RaggedAtlas:
        """Open one snapshot, read-only.

        Parameters
        ----------
        path
            Directory of the atlas, or its ``lance_db``; or an address that begins with ``s3://``, ``gs://``,
            ``az://`` or ``file://``. `db_uri` means the same.
        version
            Number of the snapshot; None for the latest.
        schema
            Class of the obs table, or ``{table: class or None}``, checked against the atlas. Not
            needed. `cell_schema` and `obs_schemas` mean the same.
        store
            The zarr store where it is not the sibling of ``lance_db``.
        store_kwargs
            Accepted and not used: local stores have no options.
        version_table_name
            Table that records the snapshots.
        allow_links
            Follow links that lead out of the atlas or its zarr store, which are refused otherwise: pass True
            only for an atlas whose links you made.
        storage_options
            Options of the object storage, by the names of obstore: ``endpoint``, ``access_key_id``,
            ``secret_access_key``, ``region``, ``allow_http``, ... By default those that this process was
            given for the address before, else the credentials of the environment.
        cache, cache_bytes
            Folder of a local disk that keeps the chunks that were fetched from object storage, for all
            processes of the host. It takes up to `cache_bytes` bytes (default: half of the free space of
            that disk); what was not used for the longest time is removed first. Loaders of this atlas use it
            without further options. For a local path it is not used.

        Raises
        ------
        FileNotFoundError
            There is no atlas, or no zarr store.
        RemoteError
            Object storage does not answer, or refuses.
        UnsafePathError
            A link leads out, or a FIFO or a device is in the place of a file.
        ValueError
            The atlas has no snapshots, or none of that number.
        AtlasError
            A schema class declares columns that the snapshot lacks, or as another type.
        """
        del store_kwargs
        where = path if path is not None else db_uri
        if where is None:
            raise TypeError("pass the path of the atlas")
        snapshot = Snapshot.open(
            where,
            version,
            store=store,
            version_table_name=version_table_name,
            allow_links=allow_links,
            storage_options=storage_options,
            cache=cache,
            cache_bytes=cache_bytes,
        )
        schemas = setup.checked_schemas(snapshot, schema or cell_schema or obs_schemas or {})
        return cls(snapshot.path, schemas=schemas, snapshot=snapshot)

    @classmethod
    def checkout_latest(
        cls,
        path: str | os.PathLike[str] | None = None,
        schema: type[HoxBaseSchema] | ObsSchemas | None = None,
        store: object = None,
        **kwargs: Any,
    ) -> RaggedAtlas:
        """Open the newest snapshot, read-only; errors are those of :meth:`checkout`.

        Parameters
        ----------
        path
            Directory of the atlas, or its address in object storage.
        schema, store
            As in :meth:`checkout`.
        **kwargs
            The other arguments of :meth:`checkout`: among them `allow_links` and, for an atlas in object
            storage, `storage_options`, `cache` and `cache_bytes`.
        """
        return cls.checkout(path, None, schema, store, **kwargs)

    @staticmethod
    def list_versions(
        path: str | os.PathLike[str],
        *,
        version_table_name: str = VERSION_TABLE,
        storage_options: Mapping[str, str] | None = None,
    ) -> pd.DataFrame:
        """The snapshots of an atlas, one row each; see :func:`hbx_gpu.atlas.list_versions`."""
        return list_versions(path, version_table_name=version_table_name, storage_options=storage_options)

    # What it is

    @property
    def path(self) -> Path:
        """Directory of the atlas.

        Raises
        ------
        RemotePathError
            The atlas is in object storage; :attr:`url` is its address.
        """
        return local_only(self._path)

    @property
    def url(self) -> str:
        """Directory of the atlas, or its address in object storage, as text."""
        return str(self._path)

    @property
    def db_uri(self) -> str:
        """Directory of its LanceDB database."""
        return str(self._path / "lance_db")

    @property
    def version(self) -> int | None:
        """Number of the checked-out snapshot, None when the atlas is open for writing."""
        return None if self._snapshot is None else self._snapshot.version

    @property
    def obs_tables(self) -> list[str]:
        """Names of the obs tables, sorted."""
        return self._snapshot.obs_tables if self._snapshot else self.session.obs_tables

    @property
    def session(self) -> WriteSession:
        """Tables, declared classes and write lock of the atlas.

        Raises
        ------
        AtlasError
            The atlas is checked out, thus read-only.
        """
        if self._session is None:
            raise AtlasError(_READ_ONLY.format(self.version, str(self._path)))
        return self._session

    @property
    def catalog(self) -> Catalog:
        """Tables of the atlas, open for writing.

        Raises
        ------
        AtlasError
            The atlas is checked out, thus read-only.
        """
        return self.session.catalog

    @property
    def pointer_fields(self) -> dict[str, PointerField]:
        """Pointer columns by name, over all obs tables."""
        if self._snapshot is not None:
            fields = [p for t in self.obs_tables for p in self._snapshot.pointer_fields(t).values()]
            return {p.name: PointerField(p.name, p.feature_space) for p in fields}
        spaces = [item for t in self.obs_tables for item in self.catalog.pointer_spaces(t).items()]
        return {name: PointerField(name, space) for name, space in spaces}

    def query(self, obs_table_name: str | None = None) -> AtlasQuery:
        """Start a query for cells of the checked-out snapshot.

        Parameters
        ----------
        obs_table_name
            Required where there are several obs tables.

        Raises
        ------
        RuntimeError
            The atlas is open for writing.
        ValueError
            No table is named and there are several.
        """
        if self._snapshot is None:
            raise RuntimeError(
                "queries need a snapshot, so that their answers stay the same: call snapshot(), then "
                f"RaggedAtlas.checkout_latest({str(self._path)!r}).query()"
            )
        return AtlasQuery(self._snapshot, obs_table_name)

    def statistics(
        self, by: str | None = None, *, obs_table_name: str | None = None, **options: Unpack[Options]
    ) -> Statistics:
        """Statistics of the features over all cells, in one pass (docs/statistics.md).

        The result is kept in a local atlas, and read from there the next time.

        Parameters
        ----------
        by
            obs column; the result then also has ``groups``, the statistics of each of its values.
        obs_table_name
            Obs table of the cells; required where there are several.
        **options
            As in :meth:`AtlasQuery.statistics`.

        Returns
        -------
        Statistics
            One entry per feature: cells measured, nonzero cells, sum, mean, variance and median.

        Raises
        ------
        RuntimeError
            The atlas is open for writing.
        """
        return self.query(obs_table_name).statistics(by, **options)

    def list_datasets(self) -> pd.DataFrame:
        """One row per group: ``dataset_uid``, ``zarr_group``, ``feature_space``, ``layout_uid``, ..."""
        return self._snapshot.datasets() if self._snapshot else self.catalog.datasets().to_pandas()

    def feature_registry(self, feature_space: str) -> pd.DataFrame:
        """The features of a space, ascending ``global_index``, ``uid`` and all other columns.

        Raises
        ------
        UnknownNameError
            The space has no registry.
        """
        if self._snapshot is not None:
            return self._snapshot.registry(feature_space).table.to_pandas()
        return self.catalog.registry(feature_space).to_arrow().sort_by("global_index").to_pandas()

    def obs_schema(self, table: str) -> type[HoxBaseSchema] | None:
        """The class given for an obs table, if any."""
        return self._schemas.get(table)

    # Writing

    def register_features(
        self, feature_space: str, features: Sequence[FeatureBaseSchema] | pd.DataFrame | pa.Table
    ) -> int:
        """Add features to the registry of a space; those already there are left as they are.

        Parameters
        ----------
        feature_space
            Their space.
        features
            Records, or a table (pandas, Arrow, polars) with a column ``uid`` and the registry's others.

        Returns
        -------
        int
            Number of new features. They get their global index in :meth:`optimize`.

        Raises
        ------
        InvalidDataError
            A column is missing, has missing values or another type.
        """
        return setup.register_features(self.session, feature_space, features)

    def optimize(self) -> None:
        """Give new features their global index and merge small files. No snapshot loses anything."""
        with self.session.writing() as catalog:
            maintenance.optimize(catalog)

    def validate(self) -> list[str]:
        """Reasons why no snapshot of the atlas can be taken, as sentences; empty if there are none."""
        return maintenance.validate(self.catalog)

    def snapshot(self) -> int:
        """Record the current state as a snapshot; returns its number: 0, 1, 2, ...

        Raises
        ------
        AtlasError
            The atlas is not fit for reading; the message says what is missing, for example a call of
            :meth:`optimize`.
        """
        with self.session.writing() as catalog:
            return maintenance.snapshot(catalog)

    def remove_dataset(self, dataset: str) -> Removal:
        """Remove the cells of a dataset, and the features that no other dataset has, from the newest state.

        Earlier snapshots keep the dataset. Call :meth:`optimize` and :meth:`snapshot` to take one without
        it.

        Parameters
        ----------
        dataset
            The ``dataset_uid``, or the name of the file from which the dataset was made.

        Raises
        ------
        UnknownNameError
            No such dataset, or several.
        """
        with self.session.writing() as catalog:
            return remove_dataset(catalog, find_dataset(catalog, dataset))

    def add_pointer_field(self, name: str, feature_space: str, *, obs_table: str | None = None) -> None:
        """Add a pointer column to an obs table; existing cells lack that modality. Safe to repeat.

        Parameters
        ----------
        name
            Name of the column.
        feature_space
            A registered feature space. Its registry is created if it does not exist.
        obs_table
            Name of the obs table; required where there are several.

        Raises
        ------
        AtlasError
            There is another column of that name.
        UnknownNameError
            No such table or feature space.
        """
        setup.add_pointer_field(self.session, name, feature_space, obs_table)

    def add_multimodal(self, modalities: Any, **kwargs: Any) -> IngestReport:
        """See :func:`hbx_gpu.atlas.add_multimodal`."""
        from hbx_gpu.atlas._ingest.multimodal import add_multimodal

        return add_multimodal(self, modalities, **kwargs)

    def ingest_many(
        self, sources: Iterable[Source], executor: Executor | None = None, **kwargs: Unpack[ManyOptions]
    ) -> ManyReport:
        """Add many files, one dataset each.

        Parameters, result and errors are those of :func:`hbx_gpu.ingest_many`, without `storage_options`,
        which an open atlas has already.
        """
        from hbx_gpu.atlas._ingest.many import add_many

        return add_many(self, sources, executor, **kwargs)

    def add_embedding(
        self, name: str, values: np.ndarray, cells: Sequence[str] | np.ndarray, **kwargs: Unpack[EmbedOptions]
    ) -> int:
        """Store a row of numbers for each of some cells, as a dense modality of the atlas.

        Parameters
        ----------
        name
            Name of the modality, and of its pointer column in the obs table.
        values
            float16 or float32, (n, d).
        cells
            The ``uid`` of the cell of each row, (n,), each once.
        **kwargs
            `obs_table`, `overwrite`: as in :func:`hbx_gpu.atlas.add_embedding`, which lists the errors.

        Returns
        -------
        int
            Number of cells. Call :meth:`snapshot` to read them.
        """
        from hbx_gpu.atlas._ingest.embeddings import add_embedding

        return add_embedding(self, name, values, cells, **kwargs)

    def add_from_anndata(self, adata: AnnData | str | os.PathLike[str] | Input, **kwargs: Any) -> int:
        """See :func:`hbx_gpu.atlas.add_from_anndata`."""
        from hbx_gpu.atlas._ingest.anndata import add_from_anndata

        return add_from_anndata(self, adata, **kwargs)

    def add_from_h5ad(self, path: str | os.PathLike[str], **kwargs: object) -> int:
        """See :func:`hbx_gpu.atlas.add_from_h5ad`."""
        from hbx_gpu.atlas._ingest.anndata import add_from_h5ad

        return add_from_h5ad(self, path, **kwargs)
