"""One writer at a time, and notes of what it is about to do, so that killed work can be undone."""

from __future__ import annotations

import contextlib
import json
import os
import socket
import threading
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from hbx_gpu._files import lock, sync, write_durably
from hbx_gpu.errors import AtlasLockedError

_FOLDER = ".hbx_gpu"


@dataclass(frozen=True)
class GroupNote:
    """One group that an ingest makes.

    Attributes
    ----------
    zarr_group, feature_space
        The group.
    field_name
        Pointer column through which cells reach it: such cells mean that the ingest is complete.
    layout_uid
        Its feature list, ``""`` where that existed before or the space has none.
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
    """What an ingest will leave behind if it dies; written before it changes anything.

    Attributes
    ----------
    staging
        Folder of unfinished files, relative to the atlas's zarr store.
    obs_table
        Where its cells go.
    dataset_uid
        The dataset, ``""`` as long as nothing but columns and registries is made for it.
    groups
        One per modality.
    new_columns
        Table -> columns that it did not have.
    new_registries
        Tables that did not exist.
    """

    staging: str
    obs_table: str
    dataset_uid: str = ""
    groups: tuple[GroupNote, ...] = ()
    new_columns: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    new_registries: tuple[str, ...] = ()

    @classmethod
    def from_json(cls, data: dict[str, Any]) -> IngestNote:
        """The note as :meth:`Journal.write` stored it."""
        groups = tuple(GroupNote(**g | {"new_features": tuple(g["new_features"])}) for g in data["groups"])
        new_columns = {table: tuple(names) for table, names in data["new_columns"].items()}
        registries = tuple(data["new_registries"])
        return cls(**data | {"groups": groups, "new_columns": new_columns, "new_registries": registries})


@dataclass(frozen=True)
class RepackNote:
    """A group that is being rewritten; written before anything changes.

    Attributes
    ----------
    zarr_group
        The group.
    staging
        Folder of the new group, and of the old one once it is replaced, relative to ``.staging``.
    """

    zarr_group: str
    staging: str


Note = IngestNote | RepackNote


class Journal:
    """Notes of unfinished ingests and repacks of one atlas.

    Parameters
    ----------
    root
        Directory of the atlas.
    """

    def __init__(self, root: Path) -> None:
        self._folder = root / _FOLDER

    def write(self, note: Note) -> None:
        """Record a note durably, in place of an earlier one of the same work."""
        self._folder.mkdir(exist_ok=True)
        write_durably(self._path(note), json.dumps(asdict(note)))

    def sweep(self) -> None:
        """Remove notes that a killed writer had not finished; nothing was changed under them."""
        for path in self._folder.glob("*.new"):
            path.unlink(missing_ok=True)

    def notes(self) -> list[IngestNote]:
        """All notes of ingests that did not end."""
        return [IngestNote.from_json(data) for data in self._read("ingest")]

    def repacks(self) -> list[RepackNote]:
        """All notes of repacks that did not end."""
        return [RepackNote(**data) for data in self._read("repack")]

    def remove(self, note: Note) -> None:
        """Forget a note."""
        self._path(note).unlink(missing_ok=True)
        sync(self._folder)

    def _read(self, kind: str) -> list[dict[str, Any]]:
        paths = sorted(self._folder.glob(f"{kind}-*.json"))
        return [json.loads(path.read_text(encoding="utf-8")) for path in paths]

    def _path(self, note: Note) -> Path:
        # The staging folder is named after the work.
        kind = "ingest" if isinstance(note, IngestNote) else "repack"
        return self._folder / f"{kind}-{Path(note.staging).name}.json"


class WriteLock:
    """Advisory lock of one atlas: held by one thread of one process, released when the process dies.

    Parameters
    ----------
    root
        Directory of the atlas.
    """

    def __init__(self, root: Path) -> None:
        self._root = root
        self._owner: int | None = None
        self._depth = 0
        self._guard = threading.Lock()

    @contextlib.contextmanager
    def hold(self) -> Iterator[bool]:
        """Hold the lock; the thread that holds it may do so again. Yields whether it was taken anew.

        Raises
        ------
        AtlasLockedError
            Somebody else holds it.
        """
        me = threading.get_ident()
        with self._guard:
            again = self._owner == me
            if again:
                self._depth += 1
            elif self._owner is not None:
                raise AtlasLockedError(
                    f"another thread of this process is writing to the atlas at {self._root}"
                )
            else:
                self._file = self._take()
                self._owner, self._depth = me, 1
        try:
            yield not again
        finally:
            with self._guard:
                self._depth -= 1
                if not self._depth:
                    self._owner = None
                    os.close(self._file)

    def _take(self) -> int:
        folder = self._root / _FOLDER
        folder.mkdir(exist_ok=True)
        file = os.open(folder / "lock", os.O_RDWR | os.O_CREAT, 0o666)
        try:
            free = lock(file)
            holder = "" if free else os.pread(file, 200, 0).decode("utf-8", "replace").strip() or "unknown"
        except BaseException:
            os.close(file)
            raise
        if not free:
            os.close(file)
            raise AtlasLockedError(
                f"another writer holds the atlas at {self._root} ({holder}); wait until it has "
                "finished and try again"
            )
        os.ftruncate(file, 0)
        os.pwrite(file, f"process {os.getpid()} on {socket.gethostname()}".encode(), 0)
        return file
