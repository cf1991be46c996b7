"""From paths to opened stores, SCDL archives among them."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import TYPE_CHECKING

from hbx_gpu._remote.lookup import is_dir, is_file
from hbx_gpu._remote.places import AnyPath

if TYPE_CHECKING:
    from hbx_gpu._stores.store import Store


def is_atlas(path: AnyPath) -> bool:
    """Whether a directory is an atlas, of hbx_gpu or of Homeobox."""
    return is_dir(path / "lance_db") or path.name == "lance_db"


def is_archive(path: AnyPath) -> bool:
    """Whether a directory is an SCDL archive."""
    return is_file(path / "row_ptr.npy") and is_file(path / "col_ptr.npy")


def open_stores(paths: Sequence[str | os.PathLike[str]], *, allow_links: bool = False) -> list[Store]:
    """Open stores that are not atlases; see :func:`hbx_gpu.open` for parameters and errors."""
    from hbx_gpu._stores.recognize import expand

    return [_open(path, allow_links) for path in expand(paths)]


def _open(path: AnyPath, allow_links: bool) -> Store:
    # What reads archives and other stores takes long to import, and an atlas needs none of it.
    if is_archive(path):
        from hbx_gpu._inplace.archives import open_scdl

        return open_scdl(path, allow_links=allow_links)
    from hbx_gpu._stores.recognize import open_store

    return open_store(path, allow_links=allow_links)
