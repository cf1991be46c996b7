"""Adding one dataset to an atlas: checked while it streams, committed at the end, undone if it fails."""

from __future__ import annotations

import contextlib
import hashlib
import logging
import os
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from pydantic_core import PydanticUndefined

from hbx_gpu import __version__
from hbx_gpu.atlas import tables
from hbx_gpu.atlas.arrays import DEFAULT_CHUNK, DEFAULT_SHARD, SparseGroupWriter, check_codec, flat_shape
from hbx_gpu.atlas.catalogue import Catalogue
from hbx_gpu.atlas.h5ad import H5adFile
from hbx_gpu.atlas.inputs import (
    Input,
    feature_columns,
    from_anndata,
    from_h5ad,
    obs_columns,
    pick_feature_ids,
)
from hbx_gpu.atlas.journal import IngestNote
from hbx_gpu.atlas.repacking import codec_of
from hbx_gpu.atlas.schema import DatasetSchema, layout_uid, make_uid
from hbx_gpu.atlas.spaces import FeatureSpace, get_space
from hbx_gpu.atlas.values import LayerCast
from hbx_gpu.errors import AlreadyIngestedError, AtlasError, InvalidDataError, UnknownNameError

if TYPE_CHECKING:
    from anndata import AnnData

    from hbx_gpu.atlas.atlas import RaggedAtlas

_log = logging.getLogger(__name__)

Progress = Callable[[int, int], object]


@dataclass(frozen=True)
class _Options:
    """Arguments of an ingest, checked as far as that needs no data."""

    field_name: str
    space: FeatureSpace
    obs_table: str
    zarr_layer: str
    dtype: str
    codec: str
    codec_asked: bool
    chunk: int
    shard: int
    dataset_record: DatasetSchema | None
    feature_id_column: str | None
    allow_rounding: bool
    progress: Progress | None


@dataclass(frozen=True)
class _Plan:
    """What will be committed, known to fit; and the note by which it can be undone."""

    note: IngestNote
    features: tables.Addition
    dataset: tables.Addition
    cells: tables.Addition


def add_from_anndata(
    atlas: RaggedAtlas,
    adata: AnnData | str | os.PathLike[str] | Input,
    *,
    field_name: str | None = None,
    feature_space: str | None = None,
    zarr_layer: str = "counts",
    dataset_record: DatasetSchema | None = None,
    feature_id_column: str | None = None,
    layer: str | None = None,
    obs_table: str | None = None,
    obs_table_name: str | None = None,
    chunk_shape: int | tuple[int, ...] | None = None,
    shard_shape: int | tuple[int, ...] | None = None,
    codec: str | None = None,
    allow_rounding: bool = False,
    exist_ok: bool = False,
    progress: Progress | None = None,
) -> int:
    """Add the cells of an AnnData to an atlas, or nothing at all.

    Parameters
    ----------
    atlas
        Open for writing.
    adata
        In memory, backed by a file and unchanged, or the path of an .h5ad file; or what another format made
        of its data.
    field_name
        Pointer column that the cells get, ``gene_expression`` by default; `feature_space` names
        it by its space.
    zarr_layer
        Layer to write: ``counts`` takes whole numbers, ``log_normalized`` and ``tpm`` take float32.
    dataset_record
        The dataset's row. Its ``dataset_uid`` and ``zarr_group`` then identify it; by default they follow
        from the content, so that ingesting the same data twice is noticed.
    feature_id_column
        Column of var with the durable feature ids, ``index`` for the names; see `pick_feature_ids`.
    layer
        Matrix to read: ``X`` (default), ``raw``, or a layer of the AnnData.
    obs_table
        Where the cells go; needed where there are several obs tables. `obs_table_name` means the same.
    chunk_shape, shard_shape
        Elements per inner chunk (40,960) and per shard (41,943,040).
    codec
        How arrays are compressed; by default as the atlas was made with.
    allow_rounding
        Let float layers take values that float32 does not hold exactly.
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
    UnknownNameError
        No such table, pointer column or layer.
    AtlasLockedError
        Somebody else is writing.
    """
    atlas.catalogue  # noqa: B018 - refuses here if the atlas is read-only
    options = _check_options(
        atlas,
        field_name=field_name,
        feature_space=feature_space,
        zarr_layer=zarr_layer,
        obs_table=obs_table or obs_table_name,
        codec=codec,
        chunk_shape=chunk_shape,
        shard_shape=shard_shape,
        dataset_record=dataset_record,
        feature_id_column=feature_id_column,
        allow_rounding=allow_rounding,
        progress=progress,
    )
    with contextlib.ExitStack() as stack:
        catalogue = stack.enter_context(atlas._writing())
        if isinstance(adata, Input):
            data = adata
        elif isinstance(adata, str | os.PathLike) or adata.isbacked:
            path = adata if isinstance(adata, str | os.PathLike) else _backing_file(adata)
            data = from_h5ad(stack.enter_context(H5adFile(path)), layer or "X")
        else:
            data = from_anndata(adata, layer or "X")
        return _ingest(atlas, catalogue, data, options, exist_ok=exist_ok)


def add_from_h5ad(atlas: RaggedAtlas, path: str | os.PathLike[str], **kwargs: Any) -> int:
    """Add the cells of an .h5ad file to an atlas, reading it in pieces: memory does not grow with the matrix.

    Parameters as in :func:`add_from_anndata`.
    """
    return add_from_anndata(atlas, os.fspath(path), **kwargs)


def _backing_file(adata: AnnData) -> str:
    if adata.is_view:
        raise InvalidDataError(
            f"a part of an AnnData backed by {adata.filename} cannot be ingested from the file; "
            "pass adata.to_memory()"
        )
    return str(adata.filename)


# Options


def _check_options(
    atlas: RaggedAtlas,
    *,
    field_name: str | None,
    feature_space: str | None,
    zarr_layer: str,
    obs_table: str | None,
    codec: str | None,
    chunk_shape: int | tuple[int, ...] | None,
    shard_shape: int | tuple[int, ...] | None,
    **others: Any,
) -> _Options:
    table = obs_table or _only_table(atlas.obs_tables)
    fields = atlas.catalogue.pointer_spaces(table)
    name = field_name or _field_of(feature_space or "gene_expression", fields, table)
    if name not in fields:
        raise UnknownNameError(f"obs table {table!r} has no pointer column {name!r}; it has {sorted(fields)}")
    if feature_space not in (None, name, fields[name]):
        raise UnknownNameError(
            f"pointer column {name!r} is of feature space {fields[name]!r}, not {feature_space!r}"
        )
    space = get_space(fields[name])
    if space.pointer != "sparse" or not space.has_features or space.repeats:
        raise AtlasError(
            f"pointer column {name!r}: matrices of feature space {space.name!r} cannot be ingested yet, only "
            "those of sparse spaces with registered features such as gene_expression"
        )
    record: DatasetSchema | None = others["dataset_record"]
    if record is not None and record.feature_space != space.name:
        raise AtlasError(
            f"dataset_record is for feature space {record.feature_space!r}, but pointer column {name!r} is "
            f"of {space.name!r}"
        )
    layers = {**space.required_layers, **space.optional_layers}
    if zarr_layer not in layers:
        raise UnknownNameError(
            f"feature space {space.name!r} has no layer {zarr_layer!r}; it has {sorted(layers)}"
        )
    chunk = flat_shape(chunk_shape, DEFAULT_CHUNK, name="chunk_shape")
    default_shard = max(1, DEFAULT_SHARD // chunk) * chunk
    shard = flat_shape(shard_shape, default_shard, name="shard_shape")
    return _Options(
        name,
        space,
        table,
        zarr_layer,
        layers[zarr_layer][0],
        check_codec(codec or atlas.catalogue.names.codec),
        codec is not None,
        chunk,
        shard,
        **others,
    )


def _only_table(names: list[str]) -> str:
    if len(names) != 1:
        raise ValueError(
            f"the atlas has several obs tables ({names}); pass obs_table= (--table) to select one"
        )
    return names[0]


def _field_of(wanted: str, fields: dict[str, str], table: str) -> str:
    if wanted in fields:
        return wanted
    found = [name for name, space in fields.items() if space == wanted]
    if len(found) != 1:
        raise UnknownNameError(
            f"obs table {table!r} has {len(found)} pointer columns of feature space {wanted!r} ({found}); "
            f"name one of {sorted(fields)} with field_name= (--field)"
        )
    return found[0]


# The steps, in the order in which they happen


def _ingest(
    atlas: RaggedAtlas, catalogue: Catalogue, data: Input, options: _Options, *, exist_ok: bool
) -> int:
    id_column, feature_ids = pick_feature_ids(data.var, options.feature_id_column, source=data.source)
    if _ingested_before(catalogue, data, options, id_column, exist_ok=exist_ok):
        return 0
    plan = _make_plan(atlas, catalogue, data, options, id_column, feature_ids)
    note = plan.note
    catalogue.journal.write(note)
    try:
        starts = _write_arrays(catalogue, data, options, note, feature_ids)
        _commit_features(catalogue, plan, feature_ids)
        _commit_dataset(plan)
        _commit_cells(plan, starts)
    except BaseException:
        try:
            catalogue.undo(note)
        except Exception:
            # The note stays, so the next writer tries again; what went wrong first is what matters.
            _log.warning("%s: the failed ingest could not be undone yet", data.source, exc_info=True)
        raise
    # Complete now: this removes nothing but temporary files.
    catalogue.undo(note)
    return data.matrix.shape[0]


def _ingested_before(
    catalogue: Catalogue, data: Input, options: _Options, id_column: str, *, exist_ok: bool
) -> bool:
    """Whether there is nothing left to do; raises where the same data are there in another form."""
    if options.dataset_record is not None:
        where = f"zarr_group = {tables.quoted(options.dataset_record.zarr_group)}"
    elif "source_sha256" in catalogue.datasets().schema.names:
        space = tables.quoted(options.space.name)
        where = f"source_sha256 = {tables.quoted(data.sha256)} AND feature_space = {space}"
    else:
        return False
    rows = catalogue.dataset_rows(where)
    if not rows:
        return False
    row = rows[0]
    asked = {
        "source_sha256": data.sha256,
        "source_matrix": data.matrix_name,
        "zarr_layer": options.zarr_layer,
        "feature_id_column": id_column,
    }
    changed = [
        f"{key} was {row.get(key)!r}, is {value!r}" for key, value in asked.items() if row.get(key) != value
    ]
    if options.codec_asked:
        # As it is stored now, which repack() may have changed; the row says how it was ingested.
        stored = codec_of(catalogue.group_path(row["zarr_group"]), options.space)
        if stored != options.codec:
            changed.append(f"codec was {stored!r}, is {options.codec!r} (hbx-gpu repack changes it)")
    if not catalogue.obs(options.obs_table).count_rows(f"dataset_uid = {tables.quoted(row['dataset_uid'])}"):
        changed.append(f"its cells are in another obs table than {options.obs_table!r}")
    there = f"dataset {row['dataset_uid']!r} (group {row['zarr_group']!r}, from {row.get('source_name')!r})"
    if changed:
        raise AlreadyIngestedError(
            f"{data.source}: {there} is in the atlas already, ingested differently: {'; '.join(changed)}. "
            "Adding it again would store its cells twice; use a new atlas, or a dataset_record with another "
            "zarr_group"
        )
    if not exist_ok:
        raise AlreadyIngestedError(f"{data.source} is in the atlas already as {there}; nothing was added")
    _log.info("%s is in the atlas already as %s; skipped", data.source, there)
    return True


def _make_plan(
    atlas: RaggedAtlas,
    catalogue: Catalogue,
    data: Input,
    options: _Options,
    id_column: str,
    feature_ids: list[str],
) -> _Plan:
    """Everything that can be refused is refused here, before anything is written."""
    record = _identity(data, options)
    if catalogue.group_path(record.zarr_group).exists():
        raise AtlasError(
            f"group {record.zarr_group!r} exists in {catalogue.store}, though no dataset refers to it; "
            "remove it or choose another zarr_group"
        )
    space = options.space.name
    uid = layout_uid(feature_ids)
    new = catalogue.unregistered(space, feature_ids)
    # A set: numpy.isin compares every pair of objects, which takes seconds for 20,000 features.
    unseen = set(new)
    is_new = np.array([feature_id in unseen for feature_id in feature_ids], bool)
    features = tables.prepare(
        catalogue.registry(space),
        feature_columns(data, id_column, feature_ids).filter(pa.array(is_new)),
        allow_new=atlas.registry_schema(space) is None,
        source=f"{data.source}, var",
    )
    schema = atlas.obs_schema(options.obs_table)
    pointers = catalogue.pointer_spaces(options.obs_table)
    cells = tables.prepare(
        catalogue.obs(options.obs_table),
        obs_columns(data, record.dataset_uid, reserved=pointers, own_uids=schema is not None),
        allow_new=schema is None,
        defaults={}
        if schema is None
        else {
            name: info.default
            for name, info in schema.model_fields.items()
            if info.default not in (None, PydanticUndefined)
        },
        later=(options.field_name,),
        source=f"{data.source}, obs",
    )
    _check_uids(cells)
    row = {
        **record.model_dump(),
        "layout_uid": uid,
        "n_rows": data.matrix.shape[0],
        "source_name": data.source_name,
        "source_sha256": data.sha256,
        "source_matrix": data.matrix_name,
        "zarr_layer": options.zarr_layer,
        "codec": options.codec,
        "feature_id_column": id_column,
        "software": f"hbx_gpu {__version__}",
    }
    dataset = tables.prepare(
        catalogue.datasets(),
        pa.Table.from_pylist([row]),
        allow_new=True,
        source=f"{data.source}, dataset record",
    )
    note = IngestNote(
        dataset_uid=record.dataset_uid,
        zarr_group=record.zarr_group,
        feature_space=space,
        obs_table=options.obs_table,
        field_name=options.field_name,
        staging=make_uid(),
        layout_uid="" if catalogue.layout_exists(uid) else uid,
        new_features=tuple(new),
    )
    return _Plan(note, features, dataset, cells)


def _identity(data: Input, options: _Options) -> DatasetSchema:
    """The dataset's record: the one given, or one that follows from the content."""
    record = options.dataset_record
    if record is None:
        key = f"{data.sha256}\0{data.matrix_name}\0{options.field_name}"
        uid = hashlib.sha256(key.encode()).hexdigest()[:16]
        return DatasetSchema(
            dataset_uid=uid, zarr_group=f"{uid}/{options.field_name}", feature_space=options.space.name
        )
    return record


def _check_uids(cells: tables.Addition) -> None:
    """Cells are told apart by uid, also across datasets."""
    stored = tables.read(cells.table, ["uid"]).column("uid")
    if len(stored):
        known = pc.is_in(cells.data.column("uid"), value_set=stored.combine_chunks())
        if twice := cells.data.column("uid").filter(known).to_pylist():
            raise InvalidDataError(
                f"{cells.source}: {len(twice)} cell uid(s) are in table {cells.name!r} already, for example "
                f"{twice[:3]}; the cells were added before, or the dataset_uid is in use"
            )


def _write_arrays(
    catalogue: Catalogue, data: Input, options: _Options, note: IngestNote, feature_ids: list[str]
) -> np.ndarray:
    """Stream the matrix into its group; int64, (n_cells + 1,): where each cell begins."""
    staging = catalogue.staging(note.staging)
    scratch = staging / "scratch"
    scratch.mkdir(parents=True)
    advice = (
        f"The source holds the matrices {list(data.available)}, choose with layer= (--layer); normalised "
        f"values go to {sorted(options.space.optional_layers)} with zarr_layer= (--target-layer)."
    )
    cast = LayerCast(
        options.dtype,
        data.matrix.name,
        advice,
        lambda row: str(data.obs.index[row]),
        lambda column: feature_ids[column],
        options.allow_rounding,
    )
    cast.check_dtype(data.matrix.dtype)
    n = data.matrix.shape[0]
    starts = np.zeros(n + 1, np.int64)
    writer = SparseGroupWriter(
        staging / "group",
        options.space,
        layer=options.zarr_layer,
        dtype=options.dtype,
        codec=options.codec,
        chunk=options.chunk,
        shard=options.shard,
    )
    try:
        for block in data.matrix.blocks(scratch):
            begin, end = block.first_row, block.first_row + len(block.indptr) - 1
            starts[begin + 1 : end + 1] = writer.length + block.indptr[1:]
            writer.append(block.indices.astype(np.uint32, copy=False), cast(block))
            if options.progress is not None:
                options.progress(end, n)
        writer.close()
    finally:
        writer.abort()
    catalogue.publish(staging / "group", note.zarr_group)
    return starts


def _commit_features(catalogue: Catalogue, plan: _Plan, feature_ids: list[str]) -> None:
    if len(plan.features.data):
        plan.features.commit()
    if plan.note.layout_uid:
        catalogue.add_layout(feature_ids)


def _commit_dataset(plan: _Plan) -> None:
    plan.dataset.commit()


def _commit_cells(plan: _Plan, starts: np.ndarray) -> None:
    """The cells come last and at once: with them the dataset exists."""
    n = len(starts) - 1
    pointer = pa.StructArray.from_arrays(
        [
            pa.array(np.full(n, plan.note.zarr_group, object), pa.string()),
            pa.array(starts[:-1]),
            pa.array(starts[1:]),
            pa.array(np.arange(n)),
        ],
        names=["zarr_group", "start", "end", "zarr_row"],
    )
    plan.cells.commit({plan.note.field_name: pointer})
