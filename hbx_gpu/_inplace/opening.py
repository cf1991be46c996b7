"""`hbx_gpu.open`: from paths to a query over what lies there."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from hbx_gpu._inplace.cells import Cells
from hbx_gpu._inplace.stores import is_atlas, open_stores
from hbx_gpu._inplace.table import CellTable
from hbx_gpu._remote.places import Place, parse
from hbx_gpu._stores.recognize import expand
from hbx_gpu.errors import UnsupportedError

if TYPE_CHECKING:
    from hbx_gpu.atlas import AtlasQuery

Paths = str | os.PathLike[str] | Sequence[str | os.PathLike[str]]


def open(  # noqa: A001 - as `open` of other libraries
    *paths: Paths,
    allow_links: bool = False,
    storage_options: Mapping[str, str] | None = None,
    cache: str | os.PathLike[str] | None = None,
    cache_bytes: int | None = None,
) -> Cells | AtlasQuery:
    """Open stores where they lie and query their cells; nothing is written beside them.

    What a path holds is recognized by its content: AnnData (.h5ad of any release, zarr v2 and v3), MuData,
    annbatch collections, 10x Genomics HDF5 (versions 2 and 3), loom, SCDL archives, atlases of hbx_gpu and of
    Homeobox.

    Parameters
    ----------
    *paths
        Files, directories, globs, folders of stores, or lists of them. Several stores become one query,
        their cells one after the other. Addresses of object storage (``s3://``, ``gs://``, ``az://``) name
        one store each; ``https://`` leads to files and to zarr stores with consolidated metadata, not to
        atlases.
    allow_links
        Follow links that lead out of a store, which are refused otherwise: symbolic links of an atlas, a zarr
        store or an archive; external links, external storage and virtual datasets of an HDF5 file. A path
        that you pass may be a link itself.
    storage_options, cache, cache_bytes
        For addresses, as in :meth:`hbx_gpu.atlas.RaggedAtlas.checkout`.

    Returns
    -------
    Cells or AtlasQuery
        A query with the same steps: ``where``, ``select``, ``features``, ``limit``, ``balanced_limit``,
        ``count``, ``to_anndata``, ``to_cell_dataset``, ``to_multimodal_dataset``.

    Raises
    ------
    FileNotFoundError
        A path that does not exist, or a glob that matches nothing.
    InvalidDataError
        A path that holds no store that is known.
    UnsupportedError
        An atlas together with other stores; an archive that must be unpacked first; an address that leads to
        what its server would have to list and cannot.
    CorruptDataError
        A store whose arrays contradict each other.
    RemoteError
        Object storage does not answer, or refuses.
    """
    found = expand(paths)
    for path in found:
        if isinstance(path, Place):
            parse(path, storage_options, cache=cache, cache_bytes=cache_bytes)
    atlases = [path for path in found if is_atlas(path)]
    if atlases:
        if len(found) > 1:
            raise UnsupportedError(
                f"{atlases[0]} is an atlas, and an atlas is opened alone; open it apart from the other "
                f"{len(found) - 1} paths, or ingest these into it"
            )
        from hbx_gpu.atlas import RaggedAtlas

        return RaggedAtlas.checkout_latest(atlases[0], allow_links=allow_links).query()
    return Cells(CellTable(open_stores(found, allow_links=allow_links)))
