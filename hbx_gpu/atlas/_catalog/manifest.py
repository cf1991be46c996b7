"""SHA-256 of the files of a snapshot's tables, because LanceDB stores no checksums.

A manifest is a small JSON file in our own folder of the atlas, one per snapshot, written when the snapshot is
taken. It holds the snapshot's record and, for every table, the files of the pinned version: that version's
Lance manifest, the data files that it names, and the deletion files. Atlases that other programs wrote have
none, and are read unverified. Files that are gone are left to LanceDB, which knows whether they are needed.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import threading
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import TypeAlias

from hbx_gpu._files import write_durably
from hbx_gpu._remote.places import AnyPath, Place
from hbx_gpu._untrusted import Within, open_regular, own_folder, parse_json, read_small
from hbx_gpu.atlas._catalog.journal import FOLDER
from hbx_gpu.atlas._catalog.paths import PathT
from hbx_gpu.atlas._catalog.snapshot_records import SnapshotRecord
from hbx_gpu.errors import AtlasError, CorruptDataError, TableError

MOST_BYTES = 1 << 30
"""Size limit of tables verified whenever a snapshot is opened; `verify_all` reads larger ones too."""

_FORMAT = 1
_LARGEST = 256 << 20  # most bytes of a manifest
_PIECE = 4 << 20
# Files of a Lance table: a folder, and a plain name in it.
_FILE = re.compile(r"(_versions|data|_deletions)/[A-Za-z0-9_-][A-Za-z0-9_.-]{0,200}")
_NEWEST = (1 << 64) - 1  # Lance names its manifests by this number minus the version
# Table -> version -> file -> (size, SHA-256).
_Tables: TypeAlias = dict[str, dict[str, dict[str, tuple[int, str]]]]
# (path, size, mtime, inode) of files that this process has verified.
_seen: set[tuple[str, int, int, int]] = set()
# Manifests in object storage by address: all tables of a snapshot are verified by one.
_documents: dict[str, bytes | None] = {}
_MOST_DOCUMENTS = 4
_lock = threading.Lock()


def path_of(root: PathT, version: int) -> PathT:
    """Path of the manifest of a snapshot."""
    return root / FOLDER / "snapshots" / f"{version}.json"


def write(root: Path, record: SnapshotRecord) -> None:
    """Record the files of the tables of a snapshot as they are now."""
    tables = {
        name: {str(version): dict(_described(root, name, version)) for version in sorted(versions)}
        for name, versions in record.pinned.items()
    }
    document = {"format": _FORMAT, "record": _plain(record), "tables": tables}
    own_folder(root / FOLDER)
    own_folder(path_of(root, record.version).parent)
    write_durably(path_of(root, record.version), json.dumps(document))


def fetch(root: Place, record: SnapshotRecord) -> None:
    """Fetch the manifest of a snapshot in object storage once more, before several threads need it."""
    path = path_of(root, record.version)
    with _lock:
        _documents.pop(path.url, None)
    _fetched(path)


def verify(
    root: AnyPath, record: SnapshotRecord, table: str, version: int, *, most: int = MOST_BYTES
) -> None:
    """Compare the files of a table with their state when the snapshot was taken.

    Parameters
    ----------
    root
        Directory of the atlas.
    record
        The snapshot.
    table, version
        One of its tables.
    most
        Bytes of the largest table that is read; of a larger one, and of those in object storage, only the
        Lance manifest is verified.

    Raises
    ------
    AtlasError
        The record of the snapshot has changed since it was written.
    TableError
        A file has changed.
    """
    tables = _load(root, record)
    if tables is None:
        return
    files = tables.get(table, {}).get(str(version))
    if files is None:
        raise AtlasError(
            f"{path_of(root, record.version)} knows no version {version} of table {table!r}, which snapshot "
            f"{record.version} needs; copy the atlas again from its origin"
        )
    folder = root / "lance_db" / f"{table}.lance"
    large = isinstance(root, Place) or sum(size for size, _ in files.values()) > most
    for relative, (size, sha256) in files.items():
        if large and not relative.startswith("_versions/"):
            continue
        if not _same(folder / relative, size, sha256):
            raise TableError(
                f"table {table!r} of the atlas at {root}: {folder / relative} is not the file that it was "
                f"when snapshot {record.version} was taken; it was damaged or changed. Copy the atlas again "
                "from its origin, or open an earlier snapshot (RaggedAtlas.list_versions)"
            )


def verify_all(root: Path, record: SnapshotRecord) -> None:
    """Verify all tables of a snapshot, however large; raises as :func:`verify`."""
    for table, versions in record.pinned.items():
        for version in versions:
            verify(root, record, table, version, most=1 << 62)


def _load(root: AnyPath, record: SnapshotRecord) -> _Tables | None:
    path = path_of(root, record.version)
    if isinstance(path, Place):
        content = _fetched(path)
    else:
        Within(str(root)).check(str(path))
        content = read_small(path, _LARGEST) if os.path.lexists(path) else None
    if content is None:
        return None
    document = parse_json(content, path)
    try:
        if not isinstance(document, dict):
            raise TypeError(f"it holds a {type(document).__name__}")
        if document["format"] != _FORMAT:
            return None  # written by a later release
        tables: _Tables = document["tables"]
        for versions in tables.values():
            for files in versions.values():
                for relative, (size, sha256) in files.items():
                    if not _FILE.fullmatch(relative):
                        raise ValueError(f"file {relative!r}")
                    if type(size) is not int or not isinstance(sha256, str):
                        raise TypeError(f"file {relative!r}")
        recorded = document["record"]
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise AtlasError(
            f"{path} is not the manifest of a snapshot ({error!r}); copy the atlas again from its origin"
        ) from error
    if recorded != _plain(record):
        raise AtlasError(
            f"snapshot {record.version} of the atlas at {root} is recorded otherwise than when it was taken "
            f"({path}); the table of snapshots was damaged or changed, copy the atlas again from its origin"
        )
    return tables


def _fetched(path: Place) -> bytes | None:
    """A manifest in object storage, which never changes; None if there is none. Kept."""
    with _lock:
        if path.url in _documents:
            return _documents[path.url]
    try:
        content: bytes | None = read_small(path, _LARGEST)
    except FileNotFoundError:
        content = None
    with _lock:
        if len(_documents) >= _MOST_DOCUMENTS:
            _documents.clear()
        _documents[path.url] = content
    return content


def _plain(record: SnapshotRecord) -> object:
    return json.loads(json.dumps(asdict(record)))


def _described(root: Path, table: str, version: int) -> Iterator[tuple[str, tuple[int, str]]]:
    folder = root / "lance_db" / f"{table}.lance"
    manifest = next(
        (
            name
            for name in (f"_versions/{_NEWEST - version}.manifest", f"_versions/{version}.manifest")
            if (folder / name).is_file()
        ),
        None,
    )
    if manifest is None:
        return
    content = read_small(folder / manifest, 1 << 40)
    yield manifest, (len(content), hashlib.sha256(content).hexdigest())
    for kind in ("data", "_deletions"):
        for path in sorted((folder / kind).glob("*")):
            # A Lance manifest holds the names of data files as plain text.
            if path.is_file() and (kind == "_deletions" or path.name.encode() in content):
                yield f"{kind}/{path.name}", (path.stat().st_size, _sha256(path))


def _same(path: AnyPath, size: int, sha256: str) -> bool:
    if isinstance(path, Place):
        try:
            content = read_small(path, size)
        except FileNotFoundError:
            return True
        except CorruptDataError:  # it is larger
            return False
        return len(content) == size and hashlib.sha256(content).hexdigest() == sha256
    try:
        found = path.stat()
    except FileNotFoundError:
        return True
    if found.st_size != size:
        return False
    key = (str(path), size, found.st_mtime_ns, found.st_ino)
    with _lock:
        if key in _seen:
            return True
    same = _sha256(path) == sha256
    if same:
        with _lock:
            _seen.add(key)
    return same


def _sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with open(open_regular(path), "rb", buffering=0) as file:
        while piece := file.read(_PIECE):
            digest.update(piece)
    return digest.hexdigest()
