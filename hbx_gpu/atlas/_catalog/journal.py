"""Notes of what a writer is about to do, so that killed work can be undone."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TypeVar

from hbx_gpu._files import sync, write_durably
from hbx_gpu._untrusted import NO_LINK, leads_out, own_folder, parse_json, read_small
from hbx_gpu.atlas._catalog.paths import LAYOUT_TABLE, plain_name
from hbx_gpu.errors import AtlasError

FOLDER = ".hbx_gpu"
"""Folder of an atlas with the lock and the notes of its writers."""
_FORMAT = 2
# A note lists all features that an ingest registers, so it can be large.
_NOTE_BYTES = 256 << 20


@dataclass(frozen=True)
class GroupNote:
    """One group that an ingest creates.

    Attributes
    ----------
    zarr_group, feature_space
        Path of the group.
    field_name
        Pointer column into the group. Cells that use it prove that the ingest is complete.
    layout_uid
        Uid of its feature list, ``""`` where the list existed before or the space has no features.
    new_features
        Features that were not registered before.
    """

    zarr_group: str
    feature_space: str
    field_name: str
    layout_uid: str = ""
    new_features: tuple[str, ...] = ()


@dataclass(frozen=True)
class IngestNote:
    """What an ingest leaves on disk if it is killed; written before it changes anything.

    Several datasets may share a note: their cells are added in one commit, so all are complete, or none.

    Attributes
    ----------
    staging
        Folder of unfinished files, relative to the atlas's zarr store.
    obs_table
        Obs table that receives the cells.
    dataset_uids
        Uids of the datasets; none while there are only unfinished files, new columns and registries.
    groups
        One group per dataset and modality.
    new_columns
        Table -> columns that the ingest adds to it.
    new_registries
        Registry tables that the ingest creates.
    replaces
        Datasets that are removed when these are complete.
    """

    staging: str
    obs_table: str
    dataset_uids: tuple[str, ...] = ()
    groups: tuple[GroupNote, ...] = ()
    new_columns: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    new_registries: tuple[str, ...] = ()
    replaces: tuple[str, ...] = ()

    @classmethod
    def from_json(cls, data: dict[str, object]) -> IngestNote:
        """The note as :meth:`Journal.write` stored it.

        Raises
        ------
        KeyError, TypeError
            The note has other fields, or fields of another type.
        """
        groups = tuple(
            GroupNote(
                **_texts(group, "zarr_group", "feature_space", "field_name", "layout_uid"),
                new_features=_names(group["new_features"]),
            )
            for group in _list(data["groups"], dict)
        )
        return cls(
            **_texts(data, "staging", "obs_table"),
            dataset_uids=_names(data["dataset_uids"]),
            groups=groups,
            new_columns={table: _names(columns) for table, columns in _object(data["new_columns"]).items()},
            new_registries=_names(data["new_registries"]),
            replaces=_names(data["replaces"]),
        )


@dataclass(frozen=True)
class RepackNote:
    """A group that is being rewritten; written before anything changes.

    Attributes
    ----------
    zarr_group
        Path of the group.
    staging
        Folder of the new group, and of the old one once it is replaced, relative to ``.staging``.
    """

    zarr_group: str
    staging: str


@dataclass(frozen=True)
class RemoveNote:
    """A dataset that is being removed; written before anything changes, and carried out by the next writer.

    Attributes
    ----------
    staging
        Unique name of this work.
    dataset_uid
        The dataset.
    layouts
        Feature space and feature list of its groups.
    """

    staging: str
    dataset_uid: str
    layouts: tuple[tuple[str, str], ...]


Note = IngestNote | RepackNote | RemoveNote
_K = TypeVar("_K", dict[str, object], list[object])
_N = TypeVar("_N", IngestNote, RepackNote, RemoveNote)


class Journal:
    """Notes of unfinished ingests, repacks and removals of one atlas.

    Parameters
    ----------
    root
        Directory of the atlas.
    """

    def __init__(self, root: Path) -> None:
        self._folder = root / FOLDER

    def write(self, note: Note) -> None:
        """Record a note durably; it replaces an earlier note of the same work."""
        own_folder(self._folder)
        known = {"format": _FORMAT, "atlas": self._uid()}
        write_durably(self._path(note), json.dumps(asdict(note) | known))

    def sweep(self) -> None:
        """Remove notes that a killed writer had not finished writing; it had changed nothing yet."""
        for path in _checked(self._folder).glob("*.new"):
            if path.is_symlink() or not path.is_dir():
                path.unlink(missing_ok=True)

    def notes(self) -> list[IngestNote]:
        """All notes of ingests that did not finish.

        Raises
        ------
        AtlasError
            A file is not a note of this atlas.
        """
        return [self._parsed(path, IngestNote.from_json) for path in self._paths("ingest")]

    def repacks(self) -> list[RepackNote]:
        """All notes of repacks that did not finish; raises as :meth:`notes`."""

        def parse(data: dict[str, object]) -> RepackNote:
            return RepackNote(**_texts(data, "zarr_group", "staging"))

        return [self._parsed(path, parse) for path in self._paths("repack")]

    def removals(self) -> list[RemoveNote]:
        """All notes of removals that did not finish; raises as :meth:`notes`."""

        def parse(data: dict[str, object]) -> RemoveNote:
            pairs = [_names(pair) for pair in _list(data["layouts"], list)]
            if any(len(pair) != 2 for pair in pairs):
                raise TypeError("layouts are pairs")
            layouts = tuple((space, uid) for space, uid in pairs)
            return RemoveNote(**_texts(data, "staging", "dataset_uid"), layouts=layouts)

        return [self._parsed(path, parse) for path in self._paths("remove")]

    def remove(self, note: Note) -> None:
        """Remove a note."""
        self._path(note).unlink(missing_ok=True)
        sync(self._folder)

    def refused(self, note: Note, reason: str) -> AtlasError:
        """The error for a note that this package cannot have written."""
        return _refused(self._path(note), reason)

    def _paths(self, kind: str) -> list[Path]:
        return sorted(_checked(self._folder).glob(f"{kind}-*.json"))

    def _parsed(self, path: Path, parse: Callable[[dict[str, object]], _N]) -> _N:
        data = parse_json(read_small(path, _NOTE_BYTES), path)
        if not isinstance(data, dict) or data.get("format") != _FORMAT:
            raise _refused(path, f"its format is not {_FORMAT}, the one of this release")
        if data.get("atlas") != self._uid():
            raise _refused(path, "it is about another atlas")
        try:
            note = parse(data)
        except (KeyError, TypeError, AttributeError) as error:
            raise _refused(path, f"a field is missing or of another kind ({error!r})") from None
        plain_name(note.staging, f"the folder of unfinished files in {path}")
        if self._path(note) != path:
            raise _refused(path, f"its work is called {note.staging!r}")
        return note

    def _uid(self) -> str:
        """Identity of this atlas: LanceDB's name of the first commit of its feature lists."""
        commits = self._folder.parent / "lance_db" / f"{LAYOUT_TABLE}.lance" / "_transactions"
        return next((path.stem for path in sorted(commits.glob("0-*.txn"))), "")

    def _path(self, note: Note) -> Path:
        # The name of the staging folder identifies the work.
        kind = {IngestNote: "ingest", RepackNote: "repack", RemoveNote: "remove"}[type(note)]
        return self._folder / f"{kind}-{note.staging}.json"


def _checked(folder: Path) -> Path:
    """Check that our folder in an atlas is not a link, because notes are removed and a lock written there."""
    if folder.is_symlink():
        raise leads_out(folder, folder.parent, NO_LINK)
    return folder


def _refused(path: Path, reason: str) -> AtlasError:
    return AtlasError(
        f"{path} is not a note of unfinished work in this atlas: {reason}. Nothing was changed. Finish "
        "interrupted work with the release that began it; if there is none, remove the file"
    )


def _texts(data: Mapping[str, object], *keys: str) -> dict[str, str]:
    found = {key: value for key in keys if isinstance(value := data[key], str)}
    if len(found) < len(keys):
        raise TypeError(f"{', '.join(keys)} are texts")
    return found


def _object(value: object) -> dict[str, object]:
    if not isinstance(value, dict):
        raise TypeError("an object is expected")
    return value


def _list(value: object, kind: type[_K]) -> list[_K]:
    if not isinstance(value, list) or not all(isinstance(item, kind) for item in value):
        raise TypeError(f"a list of {kind.__name__} is expected")
    return value


def _names(values: object) -> tuple[str, ...]:
    if not isinstance(values, list) or not all(isinstance(value, str) for value in values):
        raise TypeError("a list of texts is expected")
    return tuple(values)
