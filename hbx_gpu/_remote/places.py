"""`Place`: an address in object storage that is used like a path. No request is made here."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TypeAlias

from hbx_gpu._paths import local_path
from hbx_gpu._remote.keys import checked as checked_options
from hbx_gpu._remote.options import remember, remember_cache
from hbx_gpu.errors import RemotePathError

SCHEMES = ("s3", "gs", "az", "https", "http")
"""Schemes of addresses that are read through obstore; ``file://`` is a local path."""

# pathlib makes one slash of two, so an address that went through a Path has lost one.
_ADDRESS = re.compile(r"([A-Za-z][A-Za-z0-9+.-]+):/{1,2}(.*)", re.DOTALL)
_OTHER_NAMES = {"s3a": "s3", "gcs": "gs", "azure": "az", "abfs": "az", "abfss": "az", "adl": "az"}


@dataclass(frozen=True, slots=True)
class Place:
    """An address in object storage. Its options are kept apart, so a pickle or a repr holds no credentials.

    Attributes
    ----------
    url
        The address without a slash at its end: ``s3://bucket/atlas``.
    """

    url: str

    def __truediv__(self, name: str | os.PathLike[str]) -> Place:
        added = os.fspath(name).strip("/")
        return Place(f"{self.url}/{added}") if added else self

    def __str__(self) -> str:
        return self.url

    def __fspath__(self) -> str:
        return self.url

    @property
    def scheme(self) -> str:
        """One of `SCHEMES`."""
        return self.url.partition("://")[0]

    @property
    def root(self) -> str:
        """The part of the address that names the server or the bucket: ``s3://bucket``."""
        scheme, _, rest = self.url.partition("://")
        return f"{scheme}://{rest.partition('/')[0]}"

    @property
    def key(self) -> str:
        """The path inside the bucket, without a slash at either end."""
        return self.url[len(self.root) + 1 :]

    @property
    def name(self) -> str:
        """The last part of the path; empty for a bucket."""
        return self.key.rpartition("/")[2]

    @property
    def parent(self) -> Place:
        """The place above; a bucket is its own parent."""
        return Place(self.url.rpartition("/")[0]) if self.key else self

    @property
    def lists(self) -> bool:
        """Whether the names below a place can be asked for; plain HTTP servers have no such request."""
        return self.scheme not in ("http", "https")


AnyPath: TypeAlias = Path | Place
"""A place of data: on a local disk, or in object storage."""


def is_remote(path: object) -> bool:
    """Whether a path is the address of an object store; no error for addresses of unknown schemes."""
    if isinstance(path, Place):
        return True
    if not isinstance(path, str | os.PathLike):
        return False
    text = os.fspath(path)
    if not isinstance(text, str) or ":" not in text:
        return False
    found = _ADDRESS.match(text)
    return found is not None and found[1].lower() != "file"


def parse(
    path: str | os.PathLike[str],
    storage_options: Mapping[str, object] | None = None,
    *,
    cache: str | os.PathLike[str] | None = None,
    cache_bytes: int | None = None,
) -> AnyPath:
    """A path or an address as the user wrote it.

    Parameters
    ----------
    path
        A local path, ``file://``, or an address of one of `SCHEMES`.
    storage_options
        obstore's configuration keys for this address and all below it; by default those that this process
        was given before, then the usual ones of the environment.
    cache, cache_bytes
        Folder of a local disk where chunks are kept, and the bytes that it may take. They have no meaning for
        a local path.

    Returns
    -------
    Path or Place
        An absolute local path, or the address.

    Raises
    ------
    RemotePathError
        The scheme is unknown, the address names no server or bucket, or holds credentials or a query; or an
        option is unknown.
    """
    if isinstance(path, Place):
        place = path
    elif not is_remote(path):
        return local_path(path)
    else:
        place = Place(_checked(os.fspath(path)))
    if cache is not None:
        remember_cache(place.url, os.path.abspath(os.path.expanduser(cache)), cache_bytes)
    if storage_options:
        remember(place.url, checked_options(place.scheme, storage_options))
    return place


def local_only(path: AnyPath) -> Path:
    """A path for what cannot be done in object storage.

    Raises
    ------
    RemotePathError
        It is an address.
    """
    if isinstance(path, Place):
        raise RemotePathError(f"{path} is in object storage, and this needs a local path: use a local copy")
    return path


def _checked(text: str) -> str:
    found = _ADDRESS.match(text)
    assert found is not None
    scheme = found[1].lower()
    scheme = _OTHER_NAMES.get(scheme, scheme)
    if scheme not in SCHEMES:
        raise RemotePathError(
            f"cannot open an address of scheme {scheme!r}: known schemes are {', '.join(SCHEMES)} and file"
        )
    server, _, key = found[2].partition("/")
    # What follows may be a password or a signature, so none of it is repeated.
    if "@" in server or "?" in key or "#" in key:
        raise RemotePathError(
            f"an address {scheme}://{server.rpartition('@')[2]}/... holds a user, a query or a fragment; "
            "pass credentials as storage options"
        )
    parts = [part for part in key.split("/") if part]
    if not server or ".." in parts or "." in parts:
        raise RemotePathError(
            f"cannot open {scheme}://{found[2]}: expected {scheme}://"
            f"{'server' if scheme.startswith('http') else 'bucket'}/path without '.' and '..'"
        )
    return "/".join([f"{scheme}://{server}", *parts])
