"""Replaces a group by a new one in a single step, and recovers from interruptions."""

from __future__ import annotations

import contextlib
import os
import shutil
from collections.abc import Collection
from pathlib import Path

from hbx_gpu._files import replace_folder, sync
from hbx_gpu.atlas._catalog.journal import Journal, RepackNote
from hbx_gpu.atlas._catalog.paths import STAGING, group_path, staging_path

NEW = "group"
OLD = "replaced"


def discard(store: Path, name: str) -> None:
    """Remove a folder of unfinished files."""
    shutil.rmtree(staging_path(store, name), ignore_errors=True)
    with contextlib.suppress(OSError):  # it holds files of another writer
        (store / STAGING).rmdir()


def sweep(store: Path, kept: Collection[str]) -> None:
    """Remove all unfinished files but those in folders with these names; the caller holds the write lock."""
    folder = store / STAGING
    if folder.is_symlink() or not folder.is_dir():
        return
    for path in folder.iterdir():
        # What somebody planted here, a link or a file, is not ours to remove.
        if path.name not in kept and path.is_dir() and not path.is_symlink():
            shutil.rmtree(path, ignore_errors=True)
    with contextlib.suppress(OSError):
        folder.rmdir()


def replace_group(store: Path, note: RepackNote) -> None:
    """Exchange the staged group and the one in place; the old one then lies in the staging folder.

    Readers see one or the other, never a mixture. Where the system cannot exchange two names, the group is
    absent for the moment between two renames; the note, which must be in the journal, covers that.
    """
    live, folder = group_path(store, note.zarr_group), staging_path(store, note.staging)
    replace_folder(folder / NEW, live, folder / OLD)
    sync(live.parent)
    sync(folder)


def recover(journal: Journal, store: Path) -> None:
    """Finish interrupted repacks, so that every group is whole. Safe to repeat.

    Raises
    ------
    AtlasError
        A note names something outside of the store. Nothing was changed.
    """
    notes = journal.repacks()
    for note in notes:
        check(store, note)
    for note in notes:
        settle(journal, store, note)


def check(store: Path, note: RepackNote) -> None:
    """Refuse a note that names something outside of the store.

    Raises
    ------
    AtlasError, UnsafePathError
        The group or the folder of unfinished files lies outside.
    """
    group_path(store, note.zarr_group)
    staging_path(store, note.staging)


def settle(journal: Journal, store: Path, note: RepackNote) -> None:
    """Leave one whole group in place, new or old, and nothing beside it.

    Where neither exists, the note may be about another store of this atlas, so it stays.
    """
    live, old = group_path(store, note.zarr_group), staging_path(store, note.staging) / OLD
    if not live.exists():
        if not old.exists():
            return
        os.rename(old, live)
        sync(live.parent)
    discard(store, note.staging)
    journal.remove(note)
