"""Opens untrusted files safely: only regular files, without waiting, inside their folder.

A path inside an atlas or an archive may be a FIFO, a device or a link that leads anywhere. Opening a FIFO
could wait forever, reading a device might never end, following the third would read, or replace, what is
not part of the atlas.
"""

from __future__ import annotations

import json
import os
import stat
from pathlib import Path

from hbx_gpu._advice import option
from hbx_gpu._remote import stores
from hbx_gpu._remote.places import Place, is_remote
from hbx_gpu.errors import CorruptDataError, UnsafePathError

METADATA_BYTES = 16 << 20
"""Largest file of metadata that is read: zarr.json, hbx_gpu.json, the header of an archive, labels, ..."""

# Windows has none of them, and nothing that they guard against.
_SAFELY = 0
for _name in ("O_CLOEXEC", "O_NONBLOCK", "O_NOCTTY"):
    _SAFELY |= getattr(os, _name, 0)

_NO_LINK = getattr(os, "O_NOFOLLOW", 0)

_KINDS = {
    stat.S_IFDIR: "a folder",
    stat.S_IFIFO: "a FIFO",
    stat.S_IFCHR: "a device",
    stat.S_IFBLK: "a device",
    stat.S_IFSOCK: "a socket",
    stat.S_IFLNK: "a link",
}


def open_regular(path: str | os.PathLike[str], flags: int = os.O_RDONLY, mode: int = 0o666) -> int:
    """Open a regular file; never waits.

    Parameters
    ----------
    path
        The file.
    flags, mode
        As for `os.open`.

    Returns
    -------
    int
        A descriptor, which the caller closes.

    Raises
    ------
    UnsafePathError
        There is something else than a regular file.
    OSError
        As `os.open`.
    """
    # Looked at first, because opening some devices does something.
    try:
        _check_kind(path, os.stat(path).st_mode)
    except FileNotFoundError:
        if not flags & os.O_CREAT:
            raise
    # A FIFO that was put there meanwhile is opened at once, and found out.
    descriptor = os.open(path, flags | _SAFELY, mode)
    try:
        _check_kind(path, os.fstat(descriptor).st_mode)
    except BaseException:
        os.close(descriptor)
        raise
    return descriptor


def check_regular(path: str | os.PathLike[str], found: os.stat_result) -> None:
    """Refuse what is not a regular file.

    Raises
    ------
    UnsafePathError
        `found`, the status of `path`, is that of something else.
    """
    _check_kind(path, found.st_mode)


def _check_kind(path: str | os.PathLike[str], mode: int) -> None:
    if not stat.S_ISREG(mode):
        kind = _KINDS.get(stat.S_IFMT(mode), "no file")
        raise UnsafePathError(
            f"{os.fspath(path)} is {kind}, a regular file is expected; remove it, and copy the data again "
            "from their origin"
        )


def found_at(path: str | os.PathLike[str]) -> str:
    """What is in the place of a file that the user names, as "it is a folder"; empty if a regular file is."""
    try:
        mode = os.stat(path).st_mode
    except FileNotFoundError:
        return "it is a link that leads nowhere" if os.path.islink(path) else "it is missing"
    except OSError as error:
        return f"it cannot be opened: {error.strerror}"
    return "" if stat.S_ISREG(mode) else f"it is {_KINDS.get(stat.S_IFMT(mode), 'no file')}"


def check_file(path: str | os.PathLike[str], what: str) -> None:
    """Refuse what is not a regular file, such as a named pipe, which would be waited for.

    Parameters
    ----------
    path
        As the user names it.
    what
        What it should be: ``"a BED file"``.

    Raises
    ------
    FileNotFoundError
        Something else is there, or nothing; the message says what.
    """
    if found := found_at(path):
        raise FileNotFoundError(f"expected {what} at {os.fspath(path)}; {found}")


def read_small(path: str | os.PathLike[str], limit: int = METADATA_BYTES) -> bytes:
    """The content of a small regular file, or of a small object in storage.

    Raises
    ------
    UnsafePathError
        There is something else than a regular file.
    CorruptDataError
        It has more than `limit` bytes.
    OSError
        It cannot be read.
    """
    if is_remote(path):
        content = stores.read_bytes(Place(os.fspath(path)), limit)
        size = len(content)
    else:
        content, size = _read_local(path, limit)
    return _of_size(path, content, size, limit)


def _of_size(path: str | os.PathLike[str], content: bytes, size: int, limit: int) -> bytes:
    """The content, unless the file is too large for one of its kind."""
    if size > limit:
        raise CorruptDataError(
            f"{os.fspath(path)} has {size:,} bytes; such a file has {limit:,} at most. It is damaged: "
            "copy it again from its origin"
        )
    return content


def _read_local(path: str | os.PathLike[str], limit: int) -> tuple[bytes, int]:
    """Content and size of a regular file; no content of one that is too large."""
    return _read_open(open_regular(path), limit)


def _read_open(descriptor: int, limit: int, size: int = -1) -> tuple[bytes, int]:
    """Content and size of an open file, which is closed; its size is asked for unless it is given."""
    try:
        size = os.fstat(descriptor).st_size if size < 0 else size
        # Do not read to the end: kernel files report 0 bytes and may be endless. No file object is made,
        # because an atlas has thousands of these files.
        parts, left = [], size if size <= limit else 0
        while left and (part := os.read(descriptor, left)):
            parts.append(part)
            left -= len(part)
        return b"".join(parts), size
    finally:
        os.close(descriptor)


def parse_json(content: bytes, where: str | os.PathLike[str]) -> object:
    """JSON as Python values.

    Raises
    ------
    CorruptDataError
        It is not JSON, or nested so deeply that nobody wrote it in earnest.
    """
    try:
        found: object = json.loads(content)
    except RecursionError:
        raise CorruptDataError(f"{os.fspath(where)} is nested too deeply to be read; it is damaged") from None
    except ValueError as error:  # JSONDecodeError, UnicodeDecodeError, numbers of thousands of digits
        raise CorruptDataError(f"{os.fspath(where)} is not JSON: {error}") from error
    return found


def _above(path: str) -> tuple[str, str]:
    """The folder above a path, and the last part of the path."""
    if os.altsep:
        return os.path.split(path)
    # What `os.path.split` does takes several times as long, and an atlas has tens of thousands of paths.
    above, _, name = path.rpartition(os.sep)
    return above or os.sep, name


class Within:
    """Refuses paths that links lead out of a folder. Remembers the folders it has looked at.

    Parameters
    ----------
    root
        The folder; it may be reached through links itself. An empty text allows everything.
    remedy
        What to do about a link that leads out; by default to allow links.

    Attributes
    ----------
    root
        The folder as it was given.
    """

    def __init__(self, root: str, remedy: str | None = None) -> None:
        self.root = root
        self._root = os.path.realpath(root) if root and not is_remote(root) else ""
        self._remedy = remedy
        self._seen: dict[str, bool] = {}

    def check(self, path: str) -> None:
        """Refuse a path that leads out. Object storage has no links.

        Raises
        ------
        UnsafePathError
            Says where it leads.
        """
        if not self._root or is_remote(path):
            return
        if not self._leads_inside(_above(path)[0]) or (
            os.path.islink(path) and not self._holds(os.path.realpath(path))
        ):
            raise leads_out(path, self._root, self._remedy)

    def read(self, path: str, limit: int = METADATA_BYTES) -> bytes:
        """The content of a small file, as :func:`read_small` returns it, after :meth:`check`.

        An atlas has thousands of such files, so a file that is no link is looked at only once before it is
        opened.
        """
        if self._root and not is_remote(path):
            found = os.lstat(path)
            if stat.S_ISREG(found.st_mode):
                if not self._leads_inside(_above(path)[0]):
                    raise leads_out(path, self._root, self._remedy)
                # A link that was put there meanwhile is not followed, and a FIFO not waited for.
                descriptor = os.open(path, os.O_RDONLY | _SAFELY | _NO_LINK)
                try:
                    found = os.fstat(descriptor)
                    _check_kind(path, found.st_mode)
                except BaseException:
                    os.close(descriptor)
                    raise
                return _of_size(path, *_read_open(descriptor, limit, found.st_size), limit)
        self.check(path)
        return read_small(path, limit)

    def _leads_inside(self, folder: str) -> bool:
        found = self._seen.get(folder)
        if found is None:
            above, name = _above(folder)
            # What is no link lies in the folder above it: one look instead of one for each part of the path.
            found = (
                name not in ("", ".", "..") and self._leads_inside(above) and not os.path.islink(folder)
            ) or self._holds(os.path.realpath(folder))
            self._seen[folder] = found
        return found

    def _holds(self, real: str) -> bool:
        return real == self._root or real.startswith(self._root.rstrip("/") + "/")


def leads_out(
    path: str | os.PathLike[str], root: str | os.PathLike[str], remedy: str | None = None
) -> UnsafePathError:
    """The error for a path that links lead out of a folder; by default it advises to allow links."""
    remedy = remedy or f"if you made that link, pass {option('allow_links', 'True')}"
    return UnsafePathError(
        f"{os.fspath(path)} leads out of {os.fspath(root)}, to {os.path.realpath(path)}; {remedy}"
    )


def own_folder(folder: Path) -> Path:
    """A folder of ours inside a store: made where it is missing, and nothing else in its place.

    Raises
    ------
    UnsafePathError
        There is a link or another thing that is not a folder; what we write or remove there would be
        somewhere else.
    """
    if folder.is_symlink():
        raise leads_out(folder, folder.parent, NO_LINK)
    if os.path.lexists(folder) and not folder.is_dir():
        kind = _KINDS.get(stat.S_IFMT(os.lstat(folder).st_mode), "a file")
        raise UnsafePathError(f"{os.fspath(folder)} is {kind}, a folder is expected; remove it")
    folder.mkdir(exist_ok=True)
    return folder


NO_LINK = "nothing is written through that link: put what it leads to in its place"
"""What to do about a link that no option allows."""


def check_tree(folder: Path, *, links: bool, remedy: str | None = None, root: Path | None = None) -> None:
    """Refuse a folder that holds anything but regular files and folders.

    Parameters
    ----------
    folder
        Looked through with all folders in it.
    links
        Allow links, to regular files and to folders, which are not looked through.
    remedy
        What to do about a link that leads out; by default to allow links.
    root
        The folder that links may not lead out of; by default `folder` itself.

    Raises
    ------
    UnsafePathError
        Names the entry.
    """
    within = Within(str(root or folder), remedy)
    if root is not None and not links:
        within.check(str(folder))
    pending = [str(folder)]
    while pending:
        with os.scandir(pending.pop()) as entries:
            for entry in entries:
                if entry.is_symlink() and not links:
                    within.check(entry.path)
                if entry.is_dir(follow_symlinks=False):
                    pending.append(entry.path)
                elif not entry.is_file() and not entry.is_dir():
                    mode = (
                        entry.stat().st_mode
                        if entry.is_symlink()
                        else entry.stat(follow_symlinks=False).st_mode
                    )
                    _check_kind(entry.path, mode)
