"""Refuses what an HDF5 file takes from other files: external links, external storage, virtual datasets.

The HDF5 library opens any of them without a question, so a file from elsewhere could show the content of
another file of the user as a column, or wait for a FIFO.
"""

from __future__ import annotations

import os
from typing import NoReturn

import h5py

from hbx_gpu._advice import option
from hbx_gpu._remote.places import AnyPath, is_remote
from hbx_gpu.errors import UnsafePathError

# Groups of this name hold whatever a program stored beside the data, and are not read.
_UNREAD = "uns"


def check_inside(node: h5py.Group | h5py.Dataset, path: AnyPath, *, deep: bool = True) -> None:
    """Refuse a group or a dataset with content in other files than its own.

    Parameters
    ----------
    node
        The open group or dataset.
    path
        Its file.
    deep
        Look at everything in a group too, except for what is stored as ``uns``.

    Raises
    ------
    UnsafePathError
        There is such content; the message names the node and the other file.
    """
    pending, seen = [node], set()
    while pending:
        node = pending.pop()
        address = h5py.h5o.get_info(node.id).addr
        if address in seen:  # a group may hold itself
            continue
        seen.add(address)
        _check(node, path)
        if not deep or not isinstance(node, h5py.Group):
            continue
        for name in node:
            link = node.get(name, getlink=True)
            if isinstance(link, h5py.ExternalLink):
                _refuse(f"{node.name.rstrip('/')}/{name}", path, link.filename)
            if name != _UNREAD and (child := node.get(name)) is not None:
                pending.append(child)


def is_same_file(opened: str, path: str | os.PathLike[str]) -> bool:
    """Whether the name of a file that h5py has open is that of the store at a path."""
    # An object in storage is opened through a file of ours, which has its address as its name.
    return opened == os.fspath(path) if is_remote(path) else os.path.samefile(opened, path)


def _check(node: h5py.Group | h5py.Dataset, path: AnyPath) -> None:
    if not is_same_file(node.file.filename, path):
        _refuse(node.name, path, node.file.filename)
    if isinstance(node, h5py.Dataset):
        if node.external:
            _refuse(node.name, path, os.fsdecode(node.external[0][0]))
        if node.is_virtual and (others := [s for s in node.virtual_sources() if s.file_name != "."]):
            _refuse(node.name, path, others[0].file_name)


def _refuse(name: str, path: AnyPath, other: str) -> NoReturn:
    raise UnsafePathError(
        f"{name!r} of {path} leads out of it, to {other}; if you made that link, pass "
        f"{option('allow_links', 'True')}"
    )
