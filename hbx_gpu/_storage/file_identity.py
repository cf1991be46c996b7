"""What is there at the path of an object: size and identity, on a local disk or in object storage."""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import TypeAlias

from hbx_gpu._remote import stores
from hbx_gpu._remote.places import Place, is_remote
from hbx_gpu._untrusted import check_regular, open_regular

Identity: TypeAlias = tuple[int, int] | tuple[str, int]
"""Tells a file from another one in its place: device and inode, or version and size in object storage."""


@dataclass(frozen=True, slots=True)
class Found:
    """A file or an object.

    Attributes
    ----------
    identity, nbytes
        Its identity and its size.
    """

    identity: Identity
    nbytes: int


def look(path: str) -> Found | None:
    """What is there; None if nothing is.

    Raises
    ------
    UnsafePathError
        Something else than a regular file.
    RemoteError
        Object storage does not answer.
    """
    if is_remote(path):
        info = stores.head(Place(path))
        return None if info is None else Found((info.version, info.nbytes), info.nbytes)
    try:
        found = os.stat(path)
    except (FileNotFoundError, NotADirectoryError):
        return None
    check_regular(path, found)
    return Found((found.st_dev, found.st_ino), found.st_size)


def read_end(path: str, nbytes: int, *, at_end: bool) -> tuple[bytes, Found]:
    """The last or the first bytes of a file or an object; fewer than asked for where it is smaller.

    Raises
    ------
    FileNotFoundError, NotADirectoryError
        Nothing is there.
    UnsafePathError, RemoteError
        As :func:`look`.
    """
    if is_remote(path):
        content, info = stores.get(
            Place(path), {"range": {"suffix": nbytes}} if at_end else {"range": (0, nbytes)}
        )
        return bytes(content), Found((info.version, info.nbytes), info.nbytes)
    with open(open_regular(path), "rb", buffering=0) as file:
        stat = os.fstat(file.fileno())
        found = Found((stat.st_dev, stat.st_ino), stat.st_size)
        if nbytes > found.nbytes:
            return b"", found
        return os.pread(file.fileno(), nbytes, found.nbytes - nbytes if at_end else 0), found
