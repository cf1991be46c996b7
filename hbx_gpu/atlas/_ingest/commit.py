"""Adding one dataset to an atlas: checked while it streams, committed at the end, undone if it fails."""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from pydantic_core import PydanticUndefined

from hbx_gpu._advice import option
from hbx_gpu._version import __version__
from hbx_gpu.atlas._catalog import tables
from hbx_gpu.atlas._catalog.catalog import Catalog
from hbx_gpu.atlas._catalog.journal import GroupNote, IngestNote
from hbx_gpu.atlas._catalog.session import WriteSession, finish_replacement
from hbx_gpu.atlas._ingest.already_ingested import ingested_before, replaced_datasets
from hbx_gpu.atlas._ingest.cells import Dataset, ObsNames, cell_rows, pointer_column, reserved_names
from hbx_gpu.atlas._ingest.duplicates import (
    datasets_with_names,
    find_same_cells,
    say_other_version,
    stored_row,
)
from hbx_gpu.atlas._ingest.parts import Part
from hbx_gpu.atlas._ingest.settings import Settings
from hbx_gpu.atlas._model import columns
from hbx_gpu.atlas._model.schema import DatasetSchema, HoxBaseSchema, layout_uid, make_uid
from hbx_gpu.atlas._model.spaces import FeatureSpace
from hbx_gpu.atlas._writing.arrays import dense_codec
from hbx_gpu.errors import AlreadyIngestedError, AtlasError, InvalidDataError

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class IngestReport:
    """Result of adding a dataset.

    Attributes
    ----------
    dataset_uid
        ``""`` where nothing was added.
    n_cells
        Rows added; 0 where the same data were ingested before.
    n_complete
        Number of added cells that have every modality.
    n_measured
        Pointer column -> cells that have it.
    n_left_out
        Pointer column -> number of ids in its file that did not become cells.
    """

    dataset_uid: str
    n_cells: int
    n_complete: int = 0
    n_measured: Mapping[str, int] = field(default_factory=dict)
    n_left_out: Mapping[str, int] = field(default_factory=dict)


@dataclass(frozen=True)
class _Plan:
    """What will be committed, known to fit; and the note by which it can be undone."""

    note: IngestNote
    features: Sequence[tables.Addition]
    layouts: Sequence[Sequence[str]]
    datasets: tables.Addition
    cells: tables.Addition
    same_names: Mapping[str, int]


def ingest(session: WriteSession, dataset: Dataset, settings: Settings) -> IngestReport:
    """Add a dataset, or nothing at all; callers hold the write lock.

    Raises
    ------
    InvalidDataError, AlreadyIngestedError, AtlasError
        See :func:`add_from_anndata`.
    """
    catalog = session.catalog
    if ingested_before(catalog, dataset, settings):
        return IngestReport("", 0)
    fields = {part.field_name: part.space.name for part in dataset.parts}
    new = {name: s for name, s in fields.items() if name not in catalog.pointer_spaces(settings.obs_table)}
    note = IngestNote(make_uid(), settings.obs_table)
    written = False
    try:
        if new:
            _check_extensible(session, settings.obs_table, new)
            note = IngestNote(
                note.staging,
                note.obs_table,
                new_columns={note.obs_table: tuple(new)},
                new_registries=catalog.extension(settings.obs_table, new),
            )
            catalog.journal.write(note)
            written = True
            catalog.extend(settings.obs_table, new)
        for part in dataset.parts:
            part.order_features(catalog.feature_order)
        plan = _make_plan(session, dataset, settings, note)
        note, written = plan.note, True
        catalog.journal.write(note)
        pointers = _write_arrays(catalog, dataset, settings, note)
        note = _check_duplicates(catalog, dataset, settings, note, plan.same_names, pointers)
        _commit_features(catalog, plan)
        _commit_dataset(plan)
        session.lock.check()
        _commit_cells(plan, pointers)
    except BaseException:
        if written:
            try:
                catalog.undo(note)
            except Exception:
                # The note stays, so the next writer tries again; what went wrong first is what matters.
                _log.warning("%s: the failed ingest could not be undone yet", dataset.source, exc_info=True)
        raise
    # Complete now: this removes what it replaces, and temporary files.
    finish_replacement(catalog, note)
    catalog.undo(note)
    return _report(note, dataset)


def _report(note: IngestNote, dataset: Dataset) -> IngestReport:
    joined, names = dataset.joined, [part.field_name for part in dataset.parts]
    there = [rows >= 0 for rows in joined.rows]
    measured = {name: int(np.count_nonzero(has)) for name, has in zip(names, there, strict=True)}
    left_out = {part.field_name: len(part.ids) - measured[part.field_name] for part in dataset.parts}
    complete = int(np.count_nonzero(np.all(there, axis=0)))
    return IngestReport(note.dataset_uids[0], len(joined.ids), complete, measured, left_out)


def _check_extensible(session: WriteSession, table: str, new: Mapping[str, str]) -> None:
    schema = session.obs_schema(table)
    if schema is not None:
        raise AtlasError(
            f"{schema.__name__}, the class of obs table {table!r}, declares no pointer columns "
            f"{sorted(new)} (into {sorted(set(new.values()))}); declare them in the class of a new atlas, or "
            "open this one without a class and the columns are added"
        )


def _check_duplicates(
    catalog: Catalog,
    dataset: Dataset,
    settings: Settings,
    note: IngestNote,
    same_names: Mapping[str, int],
    pointers: Mapping[str, pa.Array],
) -> IngestNote:
    """Refuse cells that are there under another file; with `replace`, note that those go.

    Raises
    ------
    AlreadyIngestedError
        Most of the cells are in another dataset, with equal values.
    """
    if not same_names:
        return note
    names = pa.array(list(dataset.joined.ids), pa.string())
    for part in dataset.parts:
        found = find_same_cells(
            catalog,
            settings.obs_table,
            same_names,
            (part.field_name, part.space),
            names,
            pointers[part.field_name],
        )
        if found is None:
            continue
        what = (
            f"{dataset.source}: {found.n_names:,} of its {len(names):,} cells are in the atlas already, with "
            f"equal values, in dataset {found.dataset_uid!r} (from {found.source_name!r})"
        )
        if settings.replace:
            note = replace(note, replaces=(*note.replaces, found.dataset_uid))
            catalog.journal.write(note)
        elif not settings.accept_duplicates:
            raise AlreadyIngestedError(
                f"{what}, though the file differs; put it in the place of the other with "
                f"{option('replace', 'True')}, or store the cells twice with "
                f"{option('accept_duplicates', 'True')}"
            )
        else:
            _log.warning("warning: %s; they are stored twice", what)
        return note
    if not note.replaces and not settings.accept_duplicates:
        source_names = {part.source_name for part in dataset.parts}
        say_other_version(same_names, partial(stored_row, catalog), source_names, dataset.source)
    return note


def _make_plan(session: WriteSession, dataset: Dataset, settings: Settings, note: IngestNote) -> _Plan:
    """Everything that can be refused is refused here, before anything is written."""
    catalog = session.catalog
    replaced = replaced_datasets(catalog, dataset, settings)
    records = _records(dataset.parts, settings, catalog)
    for record in records:
        if catalog.group_path(record.zarr_group).exists():
            raise AtlasError(
                f"group {record.zarr_group!r} exists in {catalog.store}, though no dataset refers to it; "
                "remove it or choose another zarr_group"
            )
    features, new = _plan_features(session, dataset.parts)
    uids = [layout_uid(part.features.ids) if part.features else "" for part in dataset.parts]
    layouts: dict[str, Sequence[str]] = {
        uid: part.features.ids
        for uid, part in zip(uids, dataset.parts, strict=True)
        if part.features and not catalog.layout_exists(uid)
    }
    cells = _plan_cells(session, dataset, settings, records[0].dataset_uid, replaced)
    rows = [
        record.model_dump()
        | {"layout_uid": uid}
        | origin(part.space, part.identity, part.source_name, int(np.count_nonzero(kept >= 0)), settings)
        for record, uid, part, kept in zip(records, uids, dataset.parts, dataset.joined.rows, strict=True)
    ]
    datasets = tables.prepare(
        catalog.datasets(),
        pa.Table.from_pylist(rows),
        allow_new=True,
        source=f"{dataset.source}, dataset record",
    )
    groups = tuple(
        GroupNote(
            record.zarr_group,
            part.space.name,
            part.field_name,
            uid if uid in layouts else "",
            tuple(new[i]),
        )
        for i, (record, uid, part) in enumerate(zip(records, uids, dataset.parts, strict=True))
    )
    note = IngestNote(
        note.staging,
        note.obs_table,
        (records[0].dataset_uid,),
        groups,
        _new_columns([*features, datasets, cells], note),
        note.new_registries,
        replaced,
    )
    same_names = datasets_with_names(catalog, settings.obs_table, dataset.joined.ids, replaced)
    return _Plan(note, features, list(layouts.values()), datasets, cells, same_names)


def _new_columns(additions: Sequence[tables.Addition], note: IngestNote) -> dict[str, tuple[str, ...]]:
    """Table -> columns that it gets, those of `note` included."""
    out = dict(note.new_columns)
    for addition in additions:
        if addition.merge.new:
            out[addition.name] = (*out.get(addition.name, ()), *(f.name for f in addition.merge.new))
    return out


def _records(parts: Sequence[Part], settings: Settings, catalog: Catalog) -> list[DatasetSchema]:
    """A row per group: the one given, or ones that follow from the content."""
    if settings.record is not None:
        return [settings.record]
    uid = settings.dataset_uid
    if uid is None:
        keys = [
            f"{part.identity['source_sha256']}\0{part.identity['source_matrix']}\0{part.field_name}"
            for part in parts
        ]
        uid = free_uid("\0\0".join(sorted(keys)), catalog)
    return [
        DatasetSchema(dataset_uid=uid, zarr_group=f"{uid}/{part.field_name}", feature_space=part.space.name)
        for part in parts
    ]


def free_uid(content: str, catalog: Catalog, taken: Collection[str] = ()) -> str:
    """A uid that follows from the content; from its next edition where the atlas had it, or it is `taken`.

    Arrays of a dataset that was removed or replaced stay for the snapshots that have it.
    """
    uid = hashlib.sha256(content.encode()).hexdigest()[:16]
    edition = 1
    while uid in taken or catalog.group_path(uid).exists():
        edition += 1
        uid = hashlib.sha256(f"{content}\0edition {edition}".encode()).hexdigest()[:16]
    return uid


def origin(
    space: FeatureSpace, identity: Mapping[str, str], source_name: str, n_rows: int, settings: Settings
) -> dict[str, object]:
    """Columns of the dataset's row that say where a group comes from."""
    codec = settings.storage.codec
    return {
        "n_rows": n_rows,
        "source_name": source_name,
        **identity,
        "codec": dense_codec(codec) if space.index_array is None else codec,
        "software": f"hbx_gpu {__version__}",
        **settings.choices,
    }


def _plan_features(
    session: WriteSession, parts: Sequence[Part]
) -> tuple[list[tables.Addition], list[list[str]]]:
    """Rows for the registries, one addition per registry; and per part the features it brings."""
    catalog = session.catalog
    unseen: dict[str, set[str]] = {}
    found: dict[str, list[tuple[Part, pa.Table]]] = {}
    new: list[list[str]] = []
    for part in parts:
        if part.features is None:
            new.append([])
            continue
        registry = catalog.names.registries.get(part.space.name, "")
        # A set: numpy.isin compares every pair of objects, which takes seconds for 20,000 features.
        known = unseen.setdefault(registry, set())
        own = set(catalog.unregistered(part.space.name, part.features.ids)) - known
        known |= own
        new.append([uid for uid in part.features.ids if uid in own])
        rows = np.flatnonzero([uid in own for uid in part.features.ids])
        if len(rows):  # columns of var that nobody stores cannot stop an ingest
            found.setdefault(registry, []).append((part, part.features.table(rows)))
    additions = []
    for members in found.values():
        space = members[0][0].space.name
        source = ", ".join(f"{part.source}, var" for part, _ in members)
        try:
            rows = pa.concat_tables([table for _, table in members], promote_options="permissive")
        except pa.ArrowException as error:
            raise InvalidDataError(f"{source}: columns of var disagree: {error}; rename them") from error
        additions.append(
            tables.prepare(
                catalog.registry(space),
                rows,
                allow_new=session.registry_schema(space) is None,
                source=source,
                lenient=session.registry_schema(space) is None,
            )
        )
    return additions, new


def _plan_cells(
    session: WriteSession, dataset: Dataset, settings: Settings, dataset_uid: str, replaced: Sequence[str]
) -> tables.Addition:
    catalog = session.catalog
    schema = session.obs_schema(settings.obs_table)
    obs = catalog.obs(settings.obs_table)
    names = ObsNames(
        reserved_names(catalog.pointer_spaces(settings.obs_table), has_class=schema is not None),
        columns.names_in_files(obs.schema),
    )
    rows = cell_rows(dataset, dataset_uid, names, winner=settings.obs_from, edits=settings.edits)
    source = f"{dataset.source}, obs"
    cells = tables.prepare(
        obs,
        rows,
        allow_new=schema is None,
        defaults=defaults_of(schema),
        later=[part.field_name for part in dataset.parts],
        source=source,
    )
    _check_uids(cells, replaced)
    return cells


def defaults_of(schema: type[HoxBaseSchema] | None) -> dict[str, object]:
    """Values that the class of an obs table gives to columns which the data lack."""
    if schema is None:
        return {}
    return {
        name: info.default
        for name, info in schema.model_fields.items()
        if info.default not in (None, PydanticUndefined)
    }


def _check_uids(cells: tables.Addition, replaced: Sequence[str]) -> None:
    """Cells are told apart by uid, also across datasets, those aside that go."""
    others = f"NOT ({tables.one_of('dataset_uid', replaced)})" if replaced else None
    stored = tables.read(cells.table, ["uid"], others).column("uid")
    if len(stored):
        known = pc.is_in(cells.data.column("uid"), value_set=stored.combine_chunks())
        if twice := cells.data.column("uid").filter(known).to_pylist():
            raise InvalidDataError(
                f"{cells.source}: {len(twice)} cell uid(s) are in table {cells.name!r} already, for example "
                f"{twice[:3]}; the cells were added before, or the dataset_uid is in use"
            )


def _write_arrays(
    catalog: Catalog, dataset: Dataset, settings: Settings, note: IngestNote
) -> dict[str, pa.Array]:
    """Stream every modality into its group; pointer column -> pointers, one per cell of the dataset."""
    staging = catalog.staging(note.staging)
    total = sum(len(part.ids) for part in dataset.parts)
    done, out = 0, {}
    for i, (part, rows, group) in enumerate(
        zip(dataset.parts, dataset.joined.rows, note.groups, strict=True)
    ):
        scratch = staging / f"scratch{i}"
        scratch.mkdir(parents=True)
        keep = np.zeros(len(part.ids), bool)
        keep[rows[rows >= 0]] = True

        def tick(n: int, before: int = done) -> None:
            if settings.progress is not None:
                settings.progress(before + n, total)

        pointers = part.write(staging / f"group{i}", scratch, keep, settings.storage, tick)
        out[part.field_name] = pointer_column(pointers, group.zarr_group, rows)
        done += len(part.ids)
    for i, group in enumerate(note.groups):
        catalog.publish(staging / f"group{i}", group.zarr_group)
    return out


def _commit_features(catalog: Catalog, plan: _Plan) -> None:
    for addition in plan.features:
        if len(addition.data):
            addition.commit()
    for feature_uids in plan.layouts:
        catalog.add_layout(list(feature_uids))


def _commit_dataset(plan: _Plan) -> None:
    plan.datasets.commit()


def _commit_cells(plan: _Plan, pointers: Mapping[str, pa.Array]) -> None:
    """The cells come last and at once: with them the dataset exists."""
    plan.cells.commit(pointers)
