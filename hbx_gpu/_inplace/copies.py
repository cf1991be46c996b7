"""Local copies of what is small in an SCDL archive in object storage."""

from __future__ import annotations

import atexit
import os
import shutil
import tempfile
from pathlib import Path

import numpy as np

from hbx_gpu._remote import stores
from hbx_gpu._remote.fetch import map_at_once
from hbx_gpu._remote.places import Place
from hbx_gpu._remote.stores import ObjectInfo
from hbx_gpu.errors import CorruptDataError, UnsupportedError
from hbx_gpu.scdl._format.layout import COL_PTR, DATA, NEIGHBOR_FILES

_WHOLE = 64 << 20
"""Bytes of values and columns that are copied whole; of larger ones, samples tell the dtype."""
_SAMPLES, _SAMPLE = 64, 1 << 18
_made: dict[str, tuple[frozenset[tuple[str, ObjectInfo]], Path]] = {}


def copy_of(place: Place) -> Path:
    """A folder that an archive can be opened from, to read its rows from where it lies.

    Files of values and columns are as large as theirs. Where they are large, they hold samples only, at the
    places where the dtype is looked for; nobody may read rows from there. The folder is removed when the
    process ends.

    Parameters
    ----------
    place
        The archive.

    Raises
    ------
    UnsupportedError
        It lies on a server that cannot list.
    FileNotFoundError
        Nothing is there.
    CorruptDataError
        The name of an object leads out of the folder.
    """
    if not place.lists:
        raise UnsupportedError(
            f"{place} is an SCDL archive on a plain HTTP server, which cannot list its files: open it by "
            "s3://, gs:// or az://, or copy it to a local disk"
        )
    found = dict(stores.walk(place))
    if not found:
        raise FileNotFoundError(f"expected an SCDL archive, found nothing at {place}")
    state = frozenset(found.items())
    if place.url in _made and _made[place.url][0] == state:
        return _made[place.url][1]
    folder = Path(tempfile.mkdtemp(prefix="hbx_gpu-archive-"))
    atexit.register(_remove, os.getpid(), folder)
    copy = folder / (place.name or "archive")
    copy.mkdir()

    def bring(item: tuple[str, ObjectInfo]) -> None:
        name, info = item
        if any(part in ("", ".", "..") for part in name.split("/")):
            raise CorruptDataError(f"{place} holds an object {name!r}, which cannot be the name of a file")
        target = copy / name
        target.parent.mkdir(parents=True, exist_ok=True)
        if name in (DATA, COL_PTR, *NEIGHBOR_FILES) and info.nbytes > _WHOLE:
            _sample(place / name, info, target)
        else:
            target.write_bytes(stores.read_bytes(place / name))

    map_at_once(bring, found.items())
    _made[place.url] = (state, copy)
    return copy


def _sample(place: Place, info: ObjectInfo, target: Path) -> None:
    with open(target, "wb") as file:
        file.truncate(info.nbytes)
        for begin in np.linspace(0, info.nbytes - _SAMPLE, _SAMPLES).astype(np.int64).tolist():
            file.seek(begin // 8 * 8)
            file.write(stores.get(place, {"range": (begin // 8 * 8, begin // 8 * 8 + _SAMPLE)})[0])


def _remove(process: int, folder: Path) -> None:
    if process == os.getpid():
        shutil.rmtree(folder, ignore_errors=True)
