"""Builds a folder beside its target and moves it there in one step; cleans up after killed writers."""

from __future__ import annotations

import contextlib
import os
import secrets
import shutil
from collections.abc import Iterator
from pathlib import Path

from hbx_gpu._files import lock, make_folder, replace_folder, sync, sync_tree

# `.NAME.scdl-TOKEN/` beside NAME: the folder in work, the lock of its writer, temporary files.
_MARK = ".scdl-"
_NEW = "archive"
_OLD = "replaced"
_LOCK = "lock"


class NewFolder:
    """A place to build a folder in, beside the one where it will be.

    Parameters
    ----------
    target
        Where the folder goes. A symbolic link is followed: what it points to is replaced.

    Attributes
    ----------
    target
        The resolved target.
    folder
        The folder in work; exists and is empty.
    scratch
        Existing folder for temporary files, removed with the staging place.
    """

    def __init__(self, target: str | os.PathLike[str]) -> None:
        self.target = Path(target).resolve()
        make_folder(self.target.parent, "an archive")
        recover(self.target)
        self._place = self.target.with_name(f".{self.target.name}{_MARK}{secrets.token_hex(6)}")
        with _parent_locked(self.target):
            self._place.mkdir()
            # Held while the process lives, so that other processes can tell active work from leftovers.
            self._lock = os.open(self._place / _LOCK, os.O_RDWR | os.O_CREAT, 0o600)
            lock(self._lock)
        self.folder, self.scratch = self._place / _NEW, self._place / "scratch"
        self.folder.mkdir()
        self.scratch.mkdir()

    def publish(self, *, replace: bool) -> None:
        """Put the folder in its place, durably; everything else of the staging place goes.

        Parameters
        ----------
        replace
            Whether a folder that is there may be replaced. Readers that have it open keep what they have.

        Raises
        ------
        FileExistsError
            The target exists and `replace` is false.
        """
        sync_tree(self.folder)
        if not os.path.lexists(self.target):
            os.rename(self.folder, self.target)
        elif not replace:
            raise FileExistsError(f"{self.target} came into being while its replacement was built")
        elif (old := replace_folder(self.folder, self.target, self._place / _OLD)) != self.folder:
            # Under another name before its files go: half an archive must never be put back by `recover`.
            os.rename(old, self.scratch / _OLD)
        sync(self.target.parent)
        self.discard()

    def discard(self) -> None:
        """Remove the staging place and its content; safe to repeat."""
        if self._lock >= 0:
            shutil.rmtree(self._place, ignore_errors=True)
            os.close(self._lock)
            self._lock = -1


def recover(target: str | os.PathLike[str]) -> bool:
    """Put back a folder that a killed writer had moved aside, and remove the remains of killed writers.

    Parameters
    ----------
    target
        Where the folder should be.

    Returns
    -------
    bool
        Whether a folder was put back.
    """
    target = Path(target).resolve()
    restored = False
    if not leftovers(target):
        return restored
    with _parent_locked(target) as exclusive:
        for place in leftovers(target):
            with _held(place, or_without_lock=exclusive) as abandoned:
                if not abandoned:
                    continue
                if (place / _OLD).is_dir() and not os.path.lexists(target):
                    os.rename(place / _OLD, target)
                    sync(target.parent)
                    restored = True
                shutil.rmtree(place, ignore_errors=True)
    return restored


def leftovers(target: Path) -> list[Path]:
    """Staging places beside a target, of living writers and of those that died."""
    prefix = f".{target.name}{_MARK}"
    with contextlib.suppress(OSError):
        return sorted(path for path in target.parent.iterdir() if path.name.startswith(prefix))
    return []


@contextlib.contextmanager
def _parent_locked(target: Path) -> Iterator[bool]:
    """Hold other makers and removers of staging places off; False where folders cannot be locked."""
    folder = os.open(target.parent, os.O_RDONLY)
    try:
        try:
            lock(folder, wait=True)
        except OSError:  # network file systems
            yield False
        else:
            yield True
    finally:
        os.close(folder)


@contextlib.contextmanager
def _held(place: Path, *, or_without_lock: bool) -> Iterator[bool]:
    """Whether no living writer has the place, which is ours meanwhile."""
    try:
        file = os.open(place / _LOCK, os.O_RDWR)
    except OSError:
        # Its maker died before it had a lock, or is about to make it if we do not hold makers off.
        yield or_without_lock
        return
    try:
        try:
            abandoned = lock(file)
        except OSError:
            abandoned = False
        yield abandoned
    finally:
        os.close(file)
