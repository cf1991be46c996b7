"""A new group takes the place of an old one in a single step; what was interrupted is put in order."""

from __future__ import annotations

import contextlib
import ctypes
import errno
import os
import shutil
from pathlib import Path

from hbx_gpu.atlas._catalogue.journal import Journal, RepackNote, sync

STAGING = ".staging"
NEW = "group"
OLD = "replaced"
_AT_FDCWD = -100
_RENAME_EXCHANGE = 2
# What the system says where it, or the file system, cannot exchange two names.
_CANNOT = {errno.ENOSYS, errno.EINVAL, errno.ENOTSUP, errno.EOPNOTSUPP, errno.EPERM}


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
    if not exchange(folder / NEW, live):
        os.rename(live, folder / OLD)
        try:
            os.rename(folder / NEW, live)
        except OSError:
            os.rename(folder / OLD, live)
            raise
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


def exchange(a: Path, b: Path) -> bool:
    """Exchange two names in one step; False where that is not possible."""
    try:
        renameat2 = ctypes.CDLL(None, use_errno=True).renameat2
    except AttributeError:
        return False
    if not renameat2(_AT_FDCWD, os.fsencode(a), _AT_FDCWD, os.fsencode(b), ctypes.c_uint(_RENAME_EXCHANGE)):
        return True
    code = ctypes.get_errno()
    if code in _CANNOT:
        return False
    raise OSError(code, os.strerror(code), str(b))
