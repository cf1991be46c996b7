"""Which format a path holds, by what is in it and never by its name."""

from __future__ import annotations

import glob
import os
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from hbx_gpu._h5ad.foreign import A_FOLDER, describe_path
from hbx_gpu._paths import checked
from hbx_gpu._remote.places import AnyPath, Place, is_remote, parse
from hbx_gpu._stores.anndata import open_anndata, open_collection, open_mudata
from hbx_gpu._stores.loom import open_loom
from hbx_gpu._stores.tenx import groups_of, open_tenx
from hbx_gpu._stores.tree import HdfTree, Tree, open_tree
from hbx_gpu.errors import HbxError, InvalidDataError, UnsupportedError

if TYPE_CHECKING:
    from hbx_gpu._stores.store import Store

_KNOWN = (
    "AnnData (.h5ad or zarr), MuData (.h5mu or zarr), annbatch collections, 10x Genomics HDF5, loom, SCDL "
    "archives and atlases"
)
_ARCHIVES = {b"PK\x03\x04": "a zip archive", b"\x1f\x8b": "compressed with gzip", b"ustar": "a tar archive"}


def expand(paths: Sequence[str | os.PathLike[str] | Sequence[str | os.PathLike[str]]]) -> list[AnyPath]:
    """The stores meant by paths, lists of paths, globs and folders of stores, in that order.

    Raises
    ------
    FileNotFoundError
        A path that does not exist, or a glob that matches nothing.
    InvalidDataError
        No path at all; a folder without stores.
    """
    found: list[AnyPath] = []
    for given in paths:
        if not isinstance(given, str | os.PathLike):
            found += expand(list(given))
            continue
        text = os.fspath(given)
        if is_remote(text):
            found.append(parse(text))
            continue
        path = Path(checked(text))
        if path.exists():
            found += _inside(path) if _is_folder(path) else [path]
        elif glob.has_magic(text):
            matches = sorted(map(Path, glob.glob(text)))
            if not matches:
                raise FileNotFoundError(f"no path matches {text!r}")
            found += matches
        else:
            raise FileNotFoundError(f"no store at {text!r}: the path does not exist")
    if not found:
        raise InvalidDataError("no path was given; pass files, folders or globs")
    return found


def _is_folder(path: Path) -> bool:
    """Whether a directory is not a store itself."""
    marks = ("zarr.json", ".zgroup", ".zattrs", "header.sch", "row_ptr.npy", "lance_db", "hbx_gpu.json")
    if not path.is_dir():
        return False
    return not any((path / mark).exists() for mark in marks) or _is_group_of_stores(path)


def _is_group_of_stores(path: Path) -> bool:
    """Whether a zarr group is not a store, but holds groups that are."""
    try:
        with open_tree(path) as tree:
            groups = [key for key in tree.names() if not tree.is_array(key)]
            return not _opener(tree) and any({"obs", "var"} <= set(tree.names(key)) for key in groups)
    except HbxError:  # damaged, or no zarr at all: whoever opens it says so
        return False


def _inside(folder: Path) -> list[Path]:
    found = []
    for path in sorted(folder.iterdir()):
        if path.name.startswith("."):
            continue
        if (path.is_dir() and not _is_folder(path)) or (path.is_file() and format_of_file(path) is not None):
            found.append(path)
    if not found:
        names = ", ".join(sorted(p.name for p in folder.iterdir())[:8]) or "nothing"
        if (known := describe_path(folder)) != A_FOLDER:
            raise UnsupportedError(f"no store that can be opened in {folder}: {known}")
        raise InvalidDataError(
            f"no store that can be opened in {folder}; it holds {names}. Known are {_KNOWN}"
        )
    return found


def format_of_file(path: Path) -> str | None:
    """``"HDF5"`` for a file that begins like one, None for others."""
    import h5py

    return "HDF5" if h5py.is_hdf5(path) else None


def open_store(path: AnyPath, *, allow_links: bool = False) -> Store:
    """Open one store.

    Parameters
    ----------
    path
        The store.
    allow_links
        Follow links that lead out of the store.

    Raises
    ------
    InvalidDataError
        Not a format that is known.
    """
    if not isinstance(path, Place) and path.is_file():
        _refuse_packed(path)
    with open_tree(path, allow_links=allow_links) as tree:
        opener = _opener(tree)
        if opener is None:
            names = ", ".join(tree.names()[:8]) or "nothing"
            raise InvalidDataError(
                f"{path} is not a store that is known: it holds {names}. Known are {_KNOWN}"
            )
        return replace(opener(tree), allow_links=allow_links)


def _opener(tree: Tree) -> Callable[[Tree], Store] | None:
    names = set(tree.names())
    kind = "HDF5" if isinstance(tree, HdfTree) else "zarr"
    if {"mod", "obs"} <= names:
        return lambda tree: open_mudata(tree, kind)
    if {"obs", "var"} <= names:
        return lambda tree: open_anndata(tree, kind)
    if "dataset_0" in names or "annbatch-preshuffled" in tree.attributes():
        return open_collection
    if kind == "zarr":
        return None
    if {"row_attrs", "col_attrs"} & names:
        return open_loom
    return open_tenx if groups_of(tree) else None


def _refuse_packed(path: Path) -> None:
    with path.open("rb") as file:
        start = file.read(300)
    for mark, what in _ARCHIVES.items():
        if start.startswith(mark) or start[257:].startswith(mark):
            raise UnsupportedError(f"{path} is {what}; unpack it first")
    if start.startswith(b"version https://git-lfs"):
        raise InvalidDataError(f"{path} is a pointer of Git LFS; fetch the file itself with 'git lfs pull'")
