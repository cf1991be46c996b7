"""Adding many files to an atlas, which is given by its path or is already open."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from concurrent.futures import Executor
from typing import Unpack

from hbx_gpu.atlas._atlas import RaggedAtlas
from hbx_gpu.atlas._create import create_or_open_atlas
from hbx_gpu.atlas._ingest.many import Source, add_many, found
from hbx_gpu.atlas._ingest.options import ManyOptions, spells_out_options
from hbx_gpu.atlas._ingest.reports import ManyReport
from hbx_gpu.atlas._upkeep.snapshots import has_news


@spells_out_options
def ingest_many(
    atlas: RaggedAtlas | str | os.PathLike[str],
    sources: Iterable[Source],
    executor: Executor | None = None,
    *,
    storage_options: Mapping[str, object] | None = None,
    **options: Unpack[ManyOptions],
) -> ManyReport:
    """Add many files to an atlas, one dataset each: read on any executor, committed here many at a time.

    A file is in the atlas whole or not at all, whatever is killed and when. Files are recognized by the
    SHA-256 of their bytes: those that were ingested before in the same way are skipped, so after an
    interruption the same call goes on where it stopped. The next writer first cleans up after a run that was
    killed. If an executor runs a task twice, nothing is added twice.

    Files are added in the order given, so the atlas is the same whatever the executor. At the first file that
    cannot be added, its error is raised; all files before it are in the atlas, and none after it.

    If `atlas` is a path or an address, a snapshot is taken at the end, which
    :meth:`RaggedAtlas.checkout_latest` opens. Take it yourself of an atlas that you opened:
    ``atlas.optimize()``, ``atlas.snapshot()``.

    Parameters
    ----------
    atlas
        An atlas that is open for writing, or the path or address of one, which is made if it does not exist.
    sources
        Paths of .h5ad files and of all other stores that hold one AnnData. Files of several modalities
        (.h5mu) are added last and by this process.
    executor
        Where files are read and packed: any ``concurrent.futures.Executor``, for example a
        ``ThreadPoolExecutor``, a ``ProcessPoolExecutor``, or ``dask.distributed.Client(...).get_executor()``.
        Its processes need the same paths to the atlas and to the files, and no access to the tables. None:
        this process reads and packs one file after the other.
    progress
        Called with two numbers: the cells of the files that are done, and all cells.
    added
        Called with the report of each file, in order, once it is in the atlas.
    layer
        Matrix to read: of all files, or a mapping from source to matrix; see
        :func:`hbx_gpu.add_from_anndata`.
    zarr_layer, field_name, feature_space, feature_id_column, strip_versions, require_shared_genes
        As of :func:`hbx_gpu.add_from_anndata`, for all files. How features are identified is chosen for all
        files together.
    obs_table, chunk_shape, shard_shape, codec, allow_rounding, obs_types, drop_obs, rename_obs
        As of :func:`hbx_gpu.add_from_anndata`, for all files.
    replace, accept_duplicates
        As of :func:`hbx_gpu.add_from_anndata`, for all files.
    storage_options
        Credentials and settings of an address in object storage, under the names of obstore; by default those
        of the environment. An atlas that is open already has its own.

    Returns
    -------
    ManyReport
        What became of each file.

    Raises
    ------
    FileNotFoundError
        A source does not exist; nothing was added.
    InvalidDataError, AlreadyIngestedError, UnknownNameError
        See :func:`hbx_gpu.add_from_anndata`. Also UnknownNameError if `layer` names a file that is not among
        the sources.
    ResourceError
        A process, or the cluster, that worked on a file is gone; run the same call again.
    AtlasLockedError
        Another process is writing to the atlas.
    TypeError
        Storage options are given together with an open atlas; sources is a single path, or holds something
        that is not a path.
    """
    paths = found(sources)  # before an atlas is made
    if not isinstance(atlas, RaggedAtlas):
        opened = create_or_open_atlas(atlas, storage_options=storage_options)
    elif storage_options is None:
        opened = atlas
    else:
        raise TypeError("pass storage_options with the address of an atlas; an open atlas has its own")
    report = add_many(opened, list(paths), executor, **options)
    if opened is not atlas and has_news(opened.catalog):
        opened.optimize()
        opened.snapshot()
    return report
