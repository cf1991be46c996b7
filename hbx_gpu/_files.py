"""Steps on files that a crash cannot leave half done: syncing, replacing, exchanging two names, locking."""

from __future__ import annotations

import ctypes
import errno
import os
from pathlib import Path

from hbx_gpu.errors import UnsupportedError

# renameat2(2) of Linux.
_AT_FDCWD = -100
_RENAME_EXCHANGE = 2
# Errors of systems and file systems that cannot exchange two names.
_CANNOT_EXCHANGE = {errno.ENOSYS, errno.EINVAL, errno.ENOTSUP, errno.EOPNOTSUPP, errno.EPERM}


def make_folder(path: Path, what: str) -> None:
    """Make a folder, with its parents, unless it is there.

    Parameters
    ----------
    path
        The folder.
    what
        What is to lie in it, for the message.

    Raises
    ------
    FileExistsError, NotADirectoryError
        Something else is in the way.
    """
    try:
        path.mkdir(parents=True, exist_ok=True)
    except (FileExistsError, NotADirectoryError) as error:
        file = next(place for place in (path, *path.parents) if os.path.lexists(place))
        raise type(error)(
            f"cannot make the folder {path} for {what}: {file} is not a folder; choose another path"
        ) from None


def sync(path: Path) -> None:
    """Wait until a file, or the entries of a folder, are on disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def sync_tree(folder: Path) -> None:
    """Wait until a folder is on disk with everything in it."""
    for parent, _, files in os.walk(folder):
        for name in files:
            sync(Path(parent) / name)
        sync(Path(parent))


def write_durably(path: Path, text: str) -> None:
    """Write a file so that a crash leaves the old content or the new one, on disk when this returns.

    Nothing is written through links: one that somebody planted at either name is replaced.
    """
    new = path.with_name(f"{path.name}.new")
    new.unlink(missing_ok=True)
    descriptor = os.open(new, os.O_WRONLY | os.O_CREAT | os.O_EXCL | getattr(os, "O_CLOEXEC", 0), 0o666)
    with open(descriptor, "w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    os.replace(new, path)
    sync(path.parent)


def exchange(a: Path, b: Path) -> bool:
    """Exchange two names in one step; False where the system cannot."""
    try:
        renameat2 = ctypes.CDLL(None, use_errno=True).renameat2
    except (AttributeError, OSError, TypeError):  # not Linux; Windows does not even open the library
        return False
    if not renameat2(_AT_FDCWD, os.fsencode(a), _AT_FDCWD, os.fsencode(b), ctypes.c_uint(_RENAME_EXCHANGE)):
        return True
    code = ctypes.get_errno()
    if code in _CANNOT_EXCHANGE:
        return False
    raise OSError(code, os.strerror(code), str(b))


def replace_folder(new: Path, live: Path, aside: Path) -> Path:
    """Put a new folder in the place of one that exists; returns where the old one lies afterward.

    Readers see the old folder or the new one, never a mixture. Where the system cannot exchange two names,
    `live` is absent for the moment between two renames; the caller needs a way to find `aside` if it is
    killed there.

    Parameters
    ----------
    new
        The folder to put in place. The old one takes this name where the two can be exchanged.
    live
        The folder that is replaced.
    aside
        A free name on the same file system, which the old folder takes otherwise.
    """
    if exchange(new, live):
        return new
    os.rename(live, aside)
    try:
        os.rename(new, live)
    except OSError:
        os.rename(aside, live)
        raise
    return aside


def lock(descriptor: int, *, wait: bool = False) -> bool:
    """Lock an open file or folder for this process alone, until the descriptor is closed.

    Returns
    -------
    bool
        False if another process holds it and `wait` is false.

    Raises
    ------
    OSError
        The file system has no locks.
    UnsupportedError
        The operating system has no locks.
    """
    try:
        import fcntl
    except ImportError as error:
        raise UnsupportedError(
            "writing needs the file locks (flock) of Linux or macOS, which this system does not have; "
            "write there, and read here"
        ) from error
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
    except BlockingIOError:
        return False
    return True
