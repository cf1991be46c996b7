"""A new group takes the place of an old one in a single step; what was interrupted is put in order."""

from __future__ import annotations

import contextlib
import os
import shutil
from pathlib import Path

from hbx_gpu._files import replace_folder, sync
from hbx_gpu.atlas._catalogue.journal import Journal, RepackNote

STAGING = ".staging"
NEW = "group"
OLD = "replaced"


def staging(store: Path, name: str) -> Path:
    """Folder for unfinished files of one writer: in the store, so that moving out is a rename."""
    return store / STAGING / name


def discard(store: Path, name: str) -> None:
    """Remove a folder of unfinished files."""
    shutil.rmtree(staging(store, name), ignore_errors=True)
    with contextlib.suppress(OSError):  # another one's files are in it
        (store / STAGING).rmdir()


def replace_group(store: Path, note: RepackNote) -> None:
    """Let the staged group and the one in place change places; the old one then lies in the staging folder.

    Readers see one or the other, never a mixture. Where the system cannot exchange two names, the group is
    absent for the moment between two renames; the note, which must be in the journal, covers that.
    """
    live, folder = store / note.zarr_group, staging(store, note.staging)
    replace_folder(folder / NEW, live, folder / OLD)
    sync(live.parent)
    sync(folder)


def recover(journal: Journal, store: Path) -> None:
    """End the repacks that did not: every group is whole afterwards. May be repeated."""
    for note in journal.repacks():
        settle(journal, store, note)


def settle(journal: Journal, store: Path, note: RepackNote) -> None:
    """Leave one whole group in place, new or old, and nothing beside it.

    Where there is neither, the note may be about another store of this atlas: it stays.
    """
    live, old = store / note.zarr_group, staging(store, note.staging) / OLD
    if not live.exists():
        if not old.exists():
            return
        os.rename(old, live)
        sync(live.parent)
    discard(store, note.staging)
    journal.remove(note)
