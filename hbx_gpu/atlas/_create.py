"""Open the atlas at a path, which is made first where there is none."""

from __future__ import annotations

import os
from collections.abc import Mapping

from hbx_gpu.atlas._atlas import RaggedAtlas
from hbx_gpu.atlas._catalog import creation
from hbx_gpu.atlas._catalog.homeobox_arguments import Given, RegistrySchemas, read_declared
from hbx_gpu.atlas._catalog.mirror import also_in_object_storage
from hbx_gpu.atlas._catalog.names import Names
from hbx_gpu.atlas._catalog.paths import root_of
from hbx_gpu.atlas._catalog.session import ObsSchemas
from hbx_gpu.atlas._catalog.snapshot_records import VERSION_TABLE
from hbx_gpu.atlas._model.schema import DatasetSchema, HoxBaseSchema
from hbx_gpu.atlas._writing.arrays import DEFAULT_CODEC


@also_in_object_storage
def create_or_open_atlas(
    atlas_path: str | os.PathLike[str],
    *given: Given,
    obs_schemas: ObsSchemas | None = None,
    cell_table_name: str | None = None,
    cell_schema: type[HoxBaseSchema] | None = None,
    dataset_table_name: str | None = None,
    dataset_schema: type[DatasetSchema] | None = None,
    registry_schemas: RegistrySchemas | None = None,
    codec: str | None = None,
    store: object = None,
    version_table_name: str = VERSION_TABLE,
    pointer_fields: Mapping[str, str] | None = None,
    store_kwargs: object = None,
    storage_options: Mapping[str, object] | None = None,
    allow_links: bool = False,
) -> RaggedAtlas:
    """Open the atlas at a path for writing; create it first if it does not exist.

    Parameters
    ----------
    atlas_path
        Directory of the atlas, or an address in object storage.
    *given
        By position ``obs_schemas, dataset_table_name, dataset_schema, registry_schemas``, or as in Homeobox
        0.2.3 ``cell_table_name, cell_schema, dataset_table_name, dataset_schema``.
    obs_schemas
        Obs table -> its class, or None to take further columns from the data and merge them. Without this
        argument there is one table, `cell_table_name`, with the class `cell_schema`. Tables that do not
        exist yet are created.
    dataset_table_name, dataset_schema
        The table of groups; used when the atlas is made.
    registry_schemas
        Feature space -> class of its features. Spaces without one take their columns from the data.
    cell_table_name, cell_schema
        The only obs table, in the older way of calling.
    codec
        How new arrays are compressed, see `codec_names`; by default as before, ``hbx_gpu.rowpack``
        in a new atlas and ``homeobox.bitpacking`` in one that Homeobox made.
    store
        The zarr store where it is not the sibling of ``lance_db``: a path, or a local store object of zarr or
        obstore.
    version_table_name
        Table that records the snapshots.
    pointer_fields
        Pointer column -> feature space, for obs tables without a class in a new atlas; by default
        ``gene_expression`` alone. Later ones come with :meth:`RaggedAtlas.add_pointer_field`.
    store_kwargs
        Accepted and not used: local stores have no options.
    storage_options
        Credentials and settings of an address in object storage, under the names of obstore; by default those
        of the environment.
    allow_links
        Follow links that lead out of the atlas or its zarr store, which are refused otherwise.

    Returns
    -------
    RaggedAtlas
        The atlas, open for writing.

    Raises
    ------
    TypeError
        An argument is given twice or has a wrong type.
    AtlasError
        A class disagrees with the tables of the existing atlas.
    """
    del store_kwargs, storage_options
    named = {
        "obs_schemas": obs_schemas,
        "cell_table_name": cell_table_name,
        "cell_schema": cell_schema,
        "dataset_table_name": dataset_table_name,
        "dataset_schema": dataset_schema,
        "registry_schemas": registry_schemas,
    }
    asked = read_declared(given, named)
    root = root_of(atlas_path)
    if creation.is_unfinished(root) or (
        Names.load(root, version_table=version_table_name, allow_links=allow_links) is None
    ):
        return RaggedAtlas.create(
            root,
            obs_schemas=asked.obs_schemas or {asked.cell_table_name: None},
            dataset_table_name=asked.dataset_table_name,
            dataset_schema=asked.dataset_schema,
            store=store,
            registry_schemas=asked.registry_schemas,
            codec=codec or DEFAULT_CODEC,
            version_table_name=version_table_name,
            pointer_fields=pointer_fields,
            allow_links=allow_links,
        )
    return RaggedAtlas.open(
        root,
        obs_schemas=asked.obs_schemas,
        registry_schemas=asked.registry_schemas,
        store=store,
        codec=codec,
        version_table_name=version_table_name,
        allow_links=allow_links,
    )
