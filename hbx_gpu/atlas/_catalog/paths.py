"""Turns names stored in an atlas into paths; every path that tables and notes name passes these checks.

An atlas may come from anywhere. A valid name is one plain path component; the name of a group may be
several, joined by ``/``. Anything else is refused before a file is touched.
"""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import TypeVar

from hbx_gpu._paths import local_path
from hbx_gpu._remote.places import AnyPath, Place
from hbx_gpu._untrusted import NO_LINK, Within, check_tree, leads_out
from hbx_gpu.errors import AtlasError, UnsafePathError

STAGING = ".staging"
LAYOUT_TABLE = "_feature_layouts"
PathT = TypeVar("PathT", Path, Place, AnyPath)
_PLAIN = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.+ -]{0,254}")
# Names that need no closer look, as nearly all of the thousands of an atlas.
_USUAL = re.compile(r"[A-Za-z0-9_-]{1,200}(?:/[A-Za-z0-9_-]{1,200}){0,4}")
_MOST = 1024  # characters in the name of a group
_MOST_BYTES = 255  # of one component, which is what file systems take


def root_of(path: str | os.PathLike[str]) -> Path:
    """Directory of the atlas that is meant by it or by its ``lance_db``."""
    root = local_path(path)
    return root.parent if root.name == "lance_db" else root


def plain_name(name: object, what: str) -> str:
    """Check that a name is one path component without characters special to a file system.

    Raises
    ------
    UnsafePathError
        The name is anything else.
    """
    if not isinstance(name, str) or not _PLAIN.fullmatch(name) or name.endswith((".", " ")):
        raise UnsafePathError(
            f"{what} is {_short(name)}; a plain name of letters, digits, '_', '-', '+' and '.' is expected. "
            "The atlas was damaged, or made to reach files outside of it"
        )
    return name


def group_path(
    store: PathT, zarr_group: object, *, allow_links: bool = False, within: Within | None = None
) -> PathT:
    """Directory of a group, which lies in the store.

    Parameters
    ----------
    store
        Directory of the zarr store.
    zarr_group
        Name of the group as stored in tables and notes.
    allow_links
        Follow links that lead out of the store.
    within
        What refuses such links, where many groups are opened: it remembers the folders it has looked at.

    Raises
    ------
    AtlasError
        The name leaves the store.
    UnsafePathError
        A link leads out of it.
    """
    name = zarr_group if isinstance(zarr_group, str) else ""
    if not _USUAL.fullmatch(name) and _is_no_group(name):
        raise AtlasError(
            f"zarr_group {_short(zarr_group)} must be a relative path below {store}; the atlas was damaged, "
            "or made to reach files outside of it"
        )
    path: PathT = store / name
    if not allow_links:
        (within or Within(str(store))).check(str(path))
    return path


def _is_no_group(name: str) -> bool:
    parts = name.split("/")
    return any(map(_is_strange, parts)) or parts[0] == STAGING or len(name) > _MOST


def _is_strange(part: str) -> bool:
    if part in ("", ".", "..") or not part.isprintable() or "\\" in part:
        return True
    return len(part) > _MOST_BYTES or len(part.encode()) > _MOST_BYTES


def plain_column(name: str) -> str:
    """Check a column name that becomes part of SQL.

    Raises
    ------
    AtlasError
        The name has a character that would end the quoted name in SQL.
    """
    if not name or "`" in name or not name.isprintable():
        raise AtlasError(
            f"column {_short(name)}: a name without backticks is expected; the atlas was damaged"
        )
    return name


def staging_path(store: Path, name: object) -> Path:
    """Folder for unfinished files of one writer, inside the store so that moving them out is a rename.

    Raises
    ------
    UnsafePathError
        The name is not plain, or there is a link or a file in the place of the folder or of the one that
        holds all these folders.
    """
    folder = store / STAGING
    for path in (folder, folder / plain_name(name, "the folder of unfinished files")):
        if path.is_symlink():
            raise leads_out(path, store, NO_LINK)
        if os.path.lexists(path) and not path.is_dir():
            raise UnsafePathError(
                f"{path} is not a folder, as it is expected for unfinished files; remove it"
            )
    return path


def check_database(root: AnyPath, *, allow_links: bool = False) -> None:
    """Refuse a database that holds anything but files and folders: LanceDB would wait forever for a FIFO.

    Raises
    ------
    UnsafePathError
        The database holds something else; the message names it.
    """
    if isinstance(root, Place):
        return
    database = root / "lance_db"
    if not allow_links:
        Within(str(root)).check(str(database))
    if database.is_dir():
        check_tree(database, links=allow_links)


def check_store(root: AnyPath, store: PathT, *, allow_links: bool = False) -> PathT:
    """Check that the default store of an atlas, which the user did not name, lies inside the atlas.

    Raises
    ------
    UnsafePathError
        The store is reached through a link that leads out of the atlas.
    """
    if not allow_links:
        Within(str(root)).check(str(store))
    return store


def _short(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 120 else f"{text[:120]}..."
