"""Local copies of what lies in object storage, for steps that read everything and need files."""

from __future__ import annotations

import contextlib
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from hbx_gpu._remote import stores
from hbx_gpu._remote.fetch import Fetcher, Range
from hbx_gpu._remote.places import AnyPath, Place
from hbx_gpu._remote.stores import ObjectInfo
from hbx_gpu.errors import CorruptDataError, HbxError, ResourceError

_PIECE = 8 << 20
"""Bytes of one request."""


@contextlib.contextmanager
def local_copy(path: AnyPath) -> Iterator[Path]:
    """A local path of a file or a folder while the block runs.

    Parameters
    ----------
    path
        A local path, which is given back as it is, or an address. What lies there is copied to the temporary
        folder, and the copy is removed when the block ends. Errors of the block name the address.

    Raises
    ------
    FileNotFoundError
        Nothing lies at the address.
    UnsupportedError
        It names a folder on a server that cannot list.
    CorruptDataError
        The name of an object leads out of the folder.
    ResourceError
        The temporary folder has no room for it.
    ReplacedError, RemoteError
        An object was replaced while it was copied; the store does not answer, or refuses.
    """
    if not isinstance(path, Place):
        yield path
        return
    with tempfile.TemporaryDirectory(prefix="hbx_gpu-copy-") as folder:
        copy = Path(folder) / (path.name or "copy")
        _bring(path, copy)
        try:
            yield copy
        except (HbxError, OSError, ValueError) as error:
            here, there = str(copy), str(path)
            error.args = tuple(a.replace(here, there) if isinstance(a, str) else a for a in error.args)
            raise


def _bring(place: Place, copy: Path) -> None:
    found = stores.head(place)
    if found is not None:
        return _bring_objects([(place, found, copy)])
    below = list(stores.walk(place))
    if not below:
        raise FileNotFoundError(f"there is nothing at {place}")
    for name, _ in below:
        if any(part in ("", ".", "..") for part in name.split("/")):
            raise CorruptDataError(f"{place} holds an object {name!r}, which cannot be the name of a file")
    return _bring_objects([(place / name, info, copy / name) for name, info in below])


def _bring_objects(objects: list[tuple[Place, ObjectInfo, Path]]) -> None:
    folder = tempfile.gettempdir()
    needed, free = sum(info.nbytes for _, info, _ in objects), shutil.disk_usage(folder).free
    if needed > free:  # a memory map of a file on a full disk ends the process
        raise ResourceError(
            f"a copy of {objects[0][0].parent} takes {needed:,} bytes in the temporary folder {folder}, "
            f"which has {free:,}; choose a folder of a larger disk by the variable TMPDIR"
        )
    ranges, targets = [], []
    for place, info, file in objects:
        file.parent.mkdir(parents=True, exist_ok=True)
        if info.nbytes == 0:
            file.touch()
            continue
        content = np.memmap(file, np.uint8, "w+", shape=(info.nbytes,))
        for begin in range(0, info.nbytes, _PIECE):
            end = min(begin + _PIECE, info.nbytes)
            ranges.append(Range(place, begin, end, info))
            targets.append(content[begin:end])
    Fetcher().into(ranges, targets)
