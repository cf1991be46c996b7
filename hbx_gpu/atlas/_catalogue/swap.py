"""A new group takes the place of an old one in a single step; what was interrupted is put in order."""

from __future__ import annotations

import contextlib
import os
import shutil
from pathlib import Path

from hbx_gpu._files import replace_folder, sync
from hbx_gpu.atlas._catalogue.journal import Journal, RepackNote
from hbx_gpu.atlas._catalogue.paths import STAGING, group_path, staging_path

NEW = "group"
OLD = "replaced"


def discard(store: Path, name: str) -> None:
    """Remove a folder of unfinished files."""
    shutil.rmtree(staging_path(store, name), ignore_errors=True)
    with contextlib.suppress(OSError):  # another one's files are in it
        (store / STAGING).rmdir()


def replace_group(store: Path, note: RepackNote) -> None:
    """Let the staged group and the one in place change places; the old one then lies in the staging folder.

    Readers see one or the other, never a mixture. Where the system cannot exchange two names, the group is
    absent for the moment between two renames; the note, which must be in the journal, covers that.
    """
    live, folder = group_path(store, note.zarr_group), staging_path(store, note.staging)
    replace_folder(folder / NEW, live, folder / OLD)
    sync(live.parent)
    sync(folder)


def recover(journal: Journal, store: Path) -> None:
    """End the repacks that did not: every group is whole afterwards. May be repeated.

    Raises
    ------
    AtlasError
        A note names what lies outside of the store. Nothing was changed.
    """
    notes = journal.repacks()
    for note in notes:
        check(store, note)
    for note in notes:
        settle(journal, store, note)


def check(store: Path, note: RepackNote) -> None:
    """Refuse a note that names what lies outside of the store.

    Raises
    ------
    AtlasError, UnsafePathError
        The group or the folder of unfinished files does.
    """
    group_path(store, note.zarr_group)
    staging_path(store, note.staging)


def settle(journal: Journal, store: Path, note: RepackNote) -> None:
    """Leave one whole group in place, new or old, and nothing beside it.

    Where there is neither, the note may be about another store of this atlas: it stays.
    """
    live, old = group_path(store, note.zarr_group), staging_path(store, note.staging) / OLD
    if not live.exists():
        if not old.exists():
            return
        os.rename(old, live)
        sync(live.parent)
    discard(store, note.staging)
    journal.remove(note)
