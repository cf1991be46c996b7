"""The write lock of an atlas: a lock of the file system where that holds, else a lease in a Lance table."""

from __future__ import annotations

import contextlib
import os
import socket
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Protocol

from hbx_gpu._files import lock
from hbx_gpu._untrusted import NO_LINK, leads_out, open_regular, own_folder
from hbx_gpu.atlas._catalog.file_systems import locks_hold
from hbx_gpu.atlas._catalog.journal import FOLDER
from hbx_gpu.atlas._catalog.lease import Lease
from hbx_gpu.errors import AtlasLockedError, UnsafePathError

# Files with a lock, which a copy of this process that fork makes must not keep locked once this one is dead.
_held: set[int] = set()


def _let_go() -> None:
    for file in _held:
        with contextlib.suppress(OSError):
            os.close(file)
    _held.clear()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_let_go)


class _Taken(Protocol):
    """What keeps other writers out."""

    def check(self) -> None:
        """Raise AtlasLockedError if it does so no longer."""
        ...

    def release(self) -> None:
        """Let others write."""
        ...


class WriteLock:
    """Lock of one atlas: held by one thread of one process, free again after the process has died.

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
        self._taken: _Taken | None = None

    @contextlib.contextmanager
    def hold(self) -> Iterator[bool]:
        """Hold the lock, reentrant for one thread. Yields whether it was newly taken.

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
                self._taken = _take(self._root)
                self._owner, self._depth = me, 1
        try:
            yield not again
        finally:
            with self._guard:
                self._depth -= 1
                if not self._depth:
                    taken, self._owner, self._taken = self._taken, None, None
                    assert taken is not None
                    taken.release()

    def check(self) -> None:
        """Make sure that the lock still keeps others out; to be called before a commit that cannot be undone.

        Raises
        ------
        AtlasLockedError
            This process was silent for so long that its lease ran out.
        """
        if self._taken is not None:
            self._taken.check()


def _take(root: Path) -> _Taken:
    folder = own_folder(root / FOLDER)
    if locks_hold(folder):
        return _FileLock(root, folder / "lock")
    return Lease(root, folder)


class _FileLock:
    """A lock of the file system."""

    def __init__(self, root: Path, path: Path) -> None:
        if path.is_symlink():  # writing through the link would overwrite its target
            raise leads_out(path, root, NO_LINK)
        file = open_regular(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW)
        try:
            if os.fstat(file).st_nlink > 1:
                raise UnsafePathError(
                    f"{path} has another name too, whose content it would replace; remove it"
                )
            free = lock(file)
            holder = "" if free else os.pread(file, 200, 0).decode("utf-8", "replace").strip() or "unknown"
        except BaseException:
            os.close(file)
            raise
        if not free:
            os.close(file)
            raise AtlasLockedError(
                f"another writer holds the atlas at {root} ({holder}); wait until it has "
                "finished and try again"
            )
        os.ftruncate(file, 0)
        os.pwrite(file, f"process {os.getpid()} on {socket.gethostname()}".encode(), 0)
        self._file = file
        _held.add(file)

    def check(self) -> None:
        """See :class:`_Taken`: a lock of the file system holds as long as the process lives."""

    def release(self) -> None:
        """See :class:`_Taken`."""
        _held.discard(self._file)
        os.close(self._file)
