"""Adding one matrix of an AnnData or .h5ad file as a dataset; and the options that all ingests share."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from hbx_gpu._advice import option, spelled
from hbx_gpu._h5ad.files import AnnDataGroup, H5adFile, check_anndata
from hbx_gpu._progress import Progress
from hbx_gpu._stores.source import open_source
from hbx_gpu.atlas._catalog.names import only_table
from hbx_gpu.atlas._catalog.session import Writable, WriteSession
from hbx_gpu.atlas._ingest.cells import Dataset
from hbx_gpu.atlas._ingest.commit import ingest
from hbx_gpu.atlas._ingest.identity import GivenColumn, identify
from hbx_gpu.atlas._ingest.inputs import Input, choose_for, from_anndata, from_h5ad
from hbx_gpu.atlas._ingest.joining import Joined
from hbx_gpu.atlas._ingest.obs_edits import ObsEdits
from hbx_gpu.atlas._ingest.parts import MatrixPart, Storage
from hbx_gpu.atlas._ingest.settings import Settings
from hbx_gpu.atlas._model.schema import DatasetSchema
from hbx_gpu.atlas._model.spaces import FeatureSpace, get_space
from hbx_gpu.atlas._writing.arrays import DEFAULT_CHUNK, DEFAULT_SHARD, check_codec, flat_shape
from hbx_gpu.errors import AtlasError, InvalidDataError, UnknownNameError

if TYPE_CHECKING:
    from anndata import AnnData


def add_from_anndata(
    atlas: Writable,
    adata: AnnData | str | os.PathLike[str] | Input,
    *,
    field_name: str | None = None,
    feature_space: str | None = None,
    zarr_layer: str | None = None,
    dataset_record: DatasetSchema | None = None,
    feature_id_column: GivenColumn = None,
    strip_versions: bool = False,
    require_shared_genes: float | None = None,
    layer: str | None = None,
    obs_table: str | None = None,
    obs_table_name: str | None = None,
    chunk_shape: int | tuple[int, ...] | None = None,
    shard_shape: int | tuple[int, ...] | None = None,
    codec: str | None = None,
    allow_rounding: bool = False,
    obs_types: Mapping[str, str] | None = None,
    drop_obs: Sequence[str] = (),
    rename_obs: Mapping[str, str] | None = None,
    replace: bool = False,
    accept_duplicates: bool = False,
    exist_ok: bool = False,
    progress: Progress | None = None,
) -> int:
    """Add the cells of an AnnData to an atlas, or nothing at all.

    Parameters
    ----------
    atlas
        Open for writing.
    adata
        In memory, backed by a file (obs, var and layers are taken as they are in memory), or the path of an
        .h5ad file; or what another format made of its data.
    field_name
        Pointer column that the cells get, ``gene_expression`` by default; `feature_space` names
        it by its space.
    zarr_layer
        Layer to write: ``counts`` takes whole numbers, ``log_normalized`` and ``tpm`` take float32. By
        default what the feature space requires: ``counts``, of image features ``ctrl_standardized``.
    dataset_record
        The dataset's row. Its ``dataset_uid`` and ``zarr_group`` then identify it; by default they follow
        from the content, so that ingesting the same data twice is noticed.
    feature_id_column
        Column of var with the durable feature ids, ``index`` for the names, ``unique_names`` for the names
        with repeats numbered (a, a-1, ...). By default as the atlas has them, else ids of a database
        (Ensembl and the like), else the names; positions never while a column identifies the features.
    strip_versions
        Drop the versions of Ensembl ids: ENSG00000000003.15 becomes ENSG00000000003.
    require_shared_genes
        Refuse data that share less than this fraction of the smaller set of features with the atlas, if that
        has any. By default a fraction below one half causes a warning.
    layer
        Matrix to read: ``X``, ``raw``, or a layer of the AnnData. By default, where counts are wanted, the
        one that holds them: ``X``, else ``raw``, else a layer called ``counts``; otherwise ``X``.
    obs_table
        Where the cells go; needed where there are several obs tables. `obs_table_name` means the same.
    chunk_shape, shard_shape
        Values per inner chunk (40,960) and per shard (41,943,040); dense spaces fit whole rows into them.
    codec
        How arrays are compressed; by default as the atlas was made with.
    allow_rounding
        Let float layers take values that float32 does not hold exactly.
    obs_types, drop_obs, rename_obs
        Obs columns that get another type (name -> ``int``, ``float``, ``bool``, ``str``, ``datetime``), that
        are left out, or that get another name (name in the file -> name). docs/columns.md says how columns
        of several files are joined without these.
    replace
        Let the data take the place of the dataset made of the same file, of a file of that name, or of the
        same cells. Snapshots that were taken before keep what they had.
    accept_duplicates
        Add cells that are in the atlas already, from another file; by default most names and values of cells
        alike are an error.
    exist_ok
        Return 0 if the same data were ingested in the same way before.
    progress
        Called with the number of cells done and of all cells.

    Returns
    -------
    int
        Number of cells added.

    Raises
    ------
    InvalidDataError
        The data break a rule of the layer, ids are not unique, columns disagree with the atlas, ...
    AlreadyIngestedError
        The same data are in the atlas.
    TypeError
        `adata` is neither an AnnData nor a path.
    UnknownNameError
        No such table, pointer column or layer.
    AtlasLockedError
        Somebody else is writing.
    """
    if not isinstance(adata, Input | str | os.PathLike):
        check_anndata(adata)
    session = atlas.session
    table = obs_table or obs_table_name or only_table(session.obs_tables)
    name = field_name_of(session.catalog.pointer_spaces(table), table, field_name, feature_space)
    space = get_space(session.catalog.pointer_spaces(table)[name])
    check_matrix_space(name, space)
    if dataset_record is not None and dataset_record.feature_space != space.name:
        raise AtlasError(
            f"dataset_record is for feature space {dataset_record.feature_space!r}, but pointer "
            f"column {name!r} is of {space.name!r}"
        )
    target = first_layer(space) if zarr_layer is None else zarr_layer
    check_layer(space, target)
    settings = Settings(
        table,
        storage_of(session, codec, chunk_shape, shard_shape),
        codec is not None,
        record=dataset_record,
        edits=ObsEdits(obs_types or {}, drop_obs, rename_obs or {}),
        exist_ok=exist_ok,
        replace=replace,
        accept_duplicates=accept_duplicates,
        progress=progress,
    )
    with contextlib.ExitStack() as stack:
        stack.enter_context(session.writing())
        if isinstance(adata, Input):
            data = adata
        elif isinstance(adata, str | os.PathLike) or adata.isbacked:
            file, backed = _open_file(adata, stack, allow_links=session.catalog.allow_links)
            chosen = choose_for(file, layer, counts=target == "counts")
            data = from_h5ad(file, layer or (chosen.name if chosen else "X"), backed=backed)
        else:
            chosen = choose_for(adata, layer, counts=target == "counts")
            data = from_anndata(adata, layer or (chosen.name if chosen else "X"))
        choice, ids = identify(
            session.catalog,
            space.name,
            data.var,
            data.source,
            feature_id_column,
            strip_versions=strip_versions,
            require_shared=require_shared_genes,
        )
        part = MatrixPart(
            name,
            name,
            space,
            data,
            {target: data.matrix},
            [data.matrix_name],
            choice,
            ids,
            allow_rounding,
        )
        joined = Joined(part.ids, (np.arange(len(part.ids)),))
        return ingest(session, Dataset([part], joined, data.source), settings).n_cells


def add_from_h5ad(atlas: Writable, path: str | os.PathLike[str], **kwargs: Any) -> int:
    """Add the cells of an .h5ad file to an atlas, reading it in pieces: memory does not grow with the matrix.

    Parameters as in :func:`add_from_anndata`.
    """
    return add_from_anndata(atlas, os.fspath(path), **kwargs)


def _open_file(
    adata: AnnData | str | os.PathLike[str], stack: contextlib.ExitStack, *, allow_links: bool
) -> tuple[AnnDataGroup, AnnData | None]:
    """The file of a path or of a backed AnnData, and the latter, whose obs and var may have been changed."""
    if isinstance(adata, str | os.PathLike):
        return stack.enter_context(open_source(adata, allow_links=allow_links)), None
    return stack.enter_context(H5adFile(backing_file(adata))), adata


def backing_file(adata: AnnData) -> str:
    if adata.is_view:
        raise InvalidDataError(
            f"a part of an AnnData backed by {adata.filename} cannot be ingested from the file; "
            "pass adata.to_memory()"
        )
    return str(adata.filename)


def check_matrix_space(field_name: str, space: FeatureSpace) -> None:
    """Refuse a matrix for a space that holds something else.

    Raises
    ------
    AtlasError
        Says what the space holds.
    """
    if space.has_features and not space.repeats and space.pointer != "discrete_spatial":
        return
    what = "fragments" if space.repeats else "images"
    raise AtlasError(
        f"pointer column {field_name!r} is of feature space {space.name!r}, which holds {what}, no cells x "
        f"features matrix: add {what} with {spelled('add_multimodal', '--modality')}"
    )


def first_layer(space: FeatureSpace) -> str:
    """The layer a matrix goes to unless another one is named."""
    return next(iter(space.required_layers))


def check_layer(space: FeatureSpace, layer: str) -> None:
    """Refuse a layer that a space does not have.

    Raises
    ------
    UnknownNameError
        Lists those it has.
    """
    layers = {**space.required_layers, **space.optional_layers}
    if layer not in layers:
        raise UnknownNameError(
            f"feature space {space.name!r} has no layer {layer!r}; it has {sorted(layers)}"
        )


def storage_of(
    session: WriteSession,
    codec: str | None,
    chunk_shape: int | tuple[int, ...] | None,
    shard_shape: int | tuple[int, ...] | None,
) -> Storage:
    """How arrays are stored, by default as the atlas was made.

    Raises
    ------
    ValueError
        No such codec, or no such shape.
    """
    chunk = flat_shape(chunk_shape, DEFAULT_CHUNK, name="chunk_shape")
    default_shard = max(1, DEFAULT_SHARD // chunk) * chunk
    shard = flat_shape(shard_shape, default_shard, name="shard_shape")
    return Storage(check_codec(codec or session.catalog.names.codec), chunk, shard)


def field_name_of(
    fields: Mapping[str, str], table: str, field_name: str | None, feature_space: str | None
) -> str:
    """The pointer column that a matrix goes to.

    Raises
    ------
    UnknownNameError
        There is none of that name or space.
    """
    name = field_name or field_of(feature_space or "gene_expression", fields, table)
    if name not in fields:
        raise UnknownNameError(f"obs table {table!r} has no pointer column {name!r}; it has {sorted(fields)}")
    if feature_space not in (None, name, fields[name]):
        raise UnknownNameError(
            f"pointer column {name!r} is of feature space {fields[name]!r}, not {feature_space!r}"
        )
    return name


def field_of(wanted: str, fields: Mapping[str, str], table: str) -> str:
    """The pointer column meant by its own name or by that of its space.

    Raises
    ------
    UnknownNameError
        There is none, or there are several of that space.
    """
    if wanted in fields:
        return wanted
    found = [name for name, space in fields.items() if space == wanted]
    if len(found) != 1:
        raise UnknownNameError(
            f"obs table {table!r} has {len(found)} pointer columns of feature space {wanted!r} ({found}); "
            f"name one of {sorted(fields)} with {option('field_name')}"
        )
    return found[0]
