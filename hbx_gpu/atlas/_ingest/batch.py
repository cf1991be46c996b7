"""Datasets whose groups are written, added to the atlas many at a time: one version of each table for all."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from hbx_gpu._advice import option
from hbx_gpu.atlas._catalog import tables
from hbx_gpu.atlas._catalog.additions import Rows
from hbx_gpu.atlas._catalog.catalog import Catalog
from hbx_gpu.atlas._catalog.journal import GroupNote, IngestNote
from hbx_gpu.atlas._catalog.session import WriteSession, finish_replacement
from hbx_gpu.atlas._ingest.atlas_state import KnownAtlas
from hbx_gpu.atlas._ingest.cells import pointer_column
from hbx_gpu.atlas._ingest.commit import defaults_of
from hbx_gpu.atlas._ingest.duplicates import MOST_COUNTS, MOST_NAMES, find_same_cells, say_other_version
from hbx_gpu.atlas._ingest.settings import Settings
from hbx_gpu.atlas._ingest.tasks import CELLS, FEATURES, GROUP, Written, load_table
from hbx_gpu.atlas._model.schema import make_uid
from hbx_gpu.atlas._model.spaces import FeatureSpace
from hbx_gpu.errors import AlreadyIngestedError, InvalidDataError

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Ready:
    """One dataset of one group, written and not yet in the atlas.

    Attributes
    ----------
    source
        Name of the source, used in error messages.
    row
        Row of the group in the table of groups.
    field_name, space
        Pointer column, and the space it points into.
    features
        Ids of its features in the order of its columns.
    written
        Where its files are.
    replaces
        Datasets in whose place it comes.
    new_features
        Features that it brings to the registry.
    """

    source: str
    row: Mapping[str, object]
    field_name: str
    space: FeatureSpace
    features: Sequence[str]
    written: Written
    replaces: tuple[str, ...] = ()
    new_features: tuple[str, ...] = ()

    @property
    def dataset_uid(self) -> str:
        """Uid of the dataset."""
        return str(self.row["dataset_uid"])

    @property
    def zarr_group(self) -> str:
        """The group, as pointers will name it."""
        return str(self.row["zarr_group"])

    @property
    def layout_uid(self) -> str:
        """Uid of its feature list."""
        return str(self.row["layout_uid"])


class Batch:
    """Datasets that become part of an atlas together, by the one commit of their cells.

    Whatever dies before that commit, the next writer undoes all of them; after it, all are complete.

    Parameters
    ----------
    session
        The atlas; the caller holds its write lock.
    settings
        How datasets are added.
    known
        What is known of the atlas.

    Attributes
    ----------
    n_cells
        Number of cells that were taken and are not committed.
    failed
        Whether a commit failed, after which there is nothing more to do.
    """

    def __init__(self, session: WriteSession, settings: Settings, known: KnownAtlas) -> None:
        self._session, self._settings, self._known = session, settings, known
        self._catalog: Catalog = session.catalog
        self.failed = False
        self._begin()

    def _begin(self) -> None:
        self._members: list[Ready] = []
        self._rows: dict[str, Rows] = {}  # by table
        self._layouts: dict[str, tuple[str, Sequence[str]]] = {}  # uid -> the member that brings it, the list
        self.n_cells = 0

    def __len__(self) -> int:
        return len(self._members)

    def add(self, ready: Ready) -> int:
        """Take a dataset. Those before it are committed first where it depends on them. Returns its cells.

        Raises
        ------
        InvalidDataError
            Its columns disagree with those of the atlas.
        AlreadyIngestedError
            Most of its cells are in another dataset, with equal values.
        """
        stored = load_table(ready.written.folder / CELLS)
        everyone = np.arange(len(stored))
        at = stored.schema.get_field_index(ready.field_name)
        staged = (ready.written.folder / GROUP).relative_to(self._catalog.store)
        pointers = stored.column(at).combine_chunks()
        names = stored.column("obs_name")
        ready = self._check_duplicates(ready, names, pointer_column(pointers, str(staged), everyone))
        self._check_uids(ready, stored.column("uid"))
        cells = stored.set_column(at, ready.field_name, pointer_column(pointers, ready.zarr_group, everyone))
        ready = self._take(ready, cells, load_table(ready.written.folder / FEATURES))
        self._members.append(ready)
        self.n_cells += len(cells)
        self._known.add_cells(ready.dataset_uid, ready.field_name, names, pointers)
        return len(cells)

    def _take(self, ready: Ready, cells: pa.Table, features: pa.Table) -> Ready:
        """Put the rows of a dataset to those before it; returns it with the features that it brings."""
        known, space = self._known, ready.space.name
        while True:
            uids = features.column("uid")
            new = known.unregistered(space, uids.to_pylist())
            brought = features.filter(pc.is_in(uids, value_set=pa.array(new, pa.string())))
            lots = {
                "cells": (self._settings.obs_table, cells, f"{ready.source}, obs"),
                "datasets": ("", pa.Table.from_pylist([dict(ready.row)]), f"{ready.source}, dataset record"),
            }
            if new:
                lots["features"] = (space, brought, f"{ready.source}, var")
            found = {kind: self._table(kind, name) for kind, (name, _, _) in lots.items()}
            merges = {kind: found[kind].check(data, source) for kind, (_, data, source) in lots.items()}
            fitting = {kind: merge for kind, merge in merges.items() if merge is not None}
            if len(fitting) == len(lots):
                break
            self.commit()
        for kind, merge in fitting.items():
            _, data, source = lots[kind]
            found[kind].take(data, source, merge)
        known.register(space, new)
        if ready.layout_uid not in known.layouts:
            self._layouts[ready.layout_uid] = (ready.dataset_uid, ready.features)
            known.layouts.add(ready.layout_uid)
        return Ready(**vars(ready) | {"new_features": tuple(new)})

    def _table(self, kind: str, name: str) -> Rows:
        """Rows on their way to a table, in the order in which they are committed later."""
        if kind not in self._rows:
            if kind == "features":
                free = self._session.registry_schema(name) is None
                made = Rows(self._catalog.registry(name), allow_new=free, lenient=free)
            elif kind == "datasets":
                made = Rows(self._catalog.datasets(), allow_new=True)
            else:
                schema = self._session.obs_schema(name)
                made = Rows(self._catalog.obs(name), allow_new=schema is None, defaults=defaults_of(schema))
            self._rows[kind] = made
        return self._rows[kind]

    def _check_duplicates(self, ready: Ready, names: pa.ChunkedArray, pointers: pa.Array) -> Ready:
        """Refuse cells that are there under another file; with `replace`, those go."""
        known, settings = self._known, self._settings
        shared = known.datasets_with_cells(ready.field_name, names, pointers, MOST_NAMES * MOST_COUNTS)
        shared = {uid: n for uid, n in shared.items() if uid not in ready.replaces}
        if shared.keys() & {member.dataset_uid for member in self._members}:
            self.commit()  # their values are compared
        same = find_same_cells(
            self._catalog,
            settings.obs_table,
            shared,
            (ready.field_name, ready.space),
            names.combine_chunks(),
            pointers,
        )
        if same is None:
            if not ready.replaces and not settings.accept_duplicates:
                named = known.datasets_of_file(ready.written.source_name, names, MOST_NAMES)
                say_other_version(named, known.row_of, {ready.written.source_name}, ready.source)
            return ready
        what = (
            f"{ready.source}: {same.n_names:,} of its {len(names):,} cells are in the atlas already, with "
            f"equal values, in dataset {same.dataset_uid!r} (from {same.source_name!r})"
        )
        if settings.replace:
            return Ready(**vars(ready) | {"replaces": (*ready.replaces, same.dataset_uid)})
        if not settings.accept_duplicates:
            raise AlreadyIngestedError(
                f"{what}, though the file differs; put it in the place of the other with "
                f"{option('replace', 'True')}, or store the cells twice with "
                f"{option('accept_duplicates', 'True')}"
            )
        _log.warning("warning: %s; they are stored twice", what)
        return ready

    def _check_uids(self, ready: Ready, uids: pa.ChunkedArray) -> None:
        """Cells are told apart by uid, also across datasets. Files give them only where a class says so."""
        if self._session.obs_schema(self._settings.obs_table) is None:
            return
        maybe = uids.filter(pa.array(self._known.maybe_uids(uids))).to_pylist()
        if maybe:
            self.commit()
        table = self._catalog.obs(self._settings.obs_table)
        twice: list[str] = []
        for chosen in tables.batches("uid", maybe):
            others = f"{chosen} AND NOT ({tables.one_of('dataset_uid', ready.replaces)})"
            twice += tables.read(table, ["uid"], others).column("uid").to_pylist()
        if twice:
            raise InvalidDataError(
                f"{ready.source}, obs: {len(twice)} cell uid(s) are in table {table.name!r} already, for "
                f"example {twice[:3]}; the cells were added before, or the dataset_uid is in use"
            )
        self._known.add_uids(uids)

    def commit(self) -> None:
        """Add all datasets taken so far, or none of them."""
        if not self._members:
            self._begin()
            return
        catalog, note = self._catalog, self._note()
        members, rows, layouts = self._members, self._rows, self._layouts
        self._begin()
        try:
            catalog.journal.write(note)
            for member in members:
                catalog.publish(member.written.folder / GROUP, member.zarr_group)
            if "features" in rows:
                rows["features"].commit()
            catalog.add_layouts({uid: features for uid, (_, features) in layouts.items()})
            rows["datasets"].commit()
            # The cells come last and at once: with them the datasets exist.
            self._session.lock.check()
            rows["cells"].commit()
        except BaseException:
            self.failed = True
            try:
                catalog.undo(note)
            except Exception:
                # The note stays, so the next writer tries again; what went wrong first is what matters.
                _log.warning("%d datasets could not be undone yet", len(members), exc_info=True)
            raise
        finish_replacement(catalog, note)
        if note.replaces:
            self._known.forget_features()
        catalog.undo(note)  # complete now: this removes the note

    def _note(self) -> IngestNote:
        brought = {(member, uid) for uid, (member, _) in self._layouts.items()}
        groups = tuple(
            GroupNote(
                member.zarr_group,
                member.space.name,
                member.field_name,
                member.layout_uid if (member.dataset_uid, member.layout_uid) in brought else "",
                member.new_features,
            )
            for member in self._members
        )
        return IngestNote(
            make_uid(),
            self._settings.obs_table,
            tuple(member.dataset_uid for member in self._members),
            groups,
            {rows.name: rows.new_columns for rows in self._rows.values() if rows.new_columns},
            replaces=tuple(uid for member in self._members for uid in member.replaces),
        )
