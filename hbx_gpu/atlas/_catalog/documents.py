"""The metadata of all arrays of an atlas in one file: object storage is asked once, not for each array.

The file lies beside the tables and is written with every snapshot. It says nothing that the ``zarr.json`` of
each array does not say, and before an array is first read, its own document is compared with what was read
here. So a file that another program left out of date costs an error and a second try, never wrong numbers.
Atlases without the file, and arrays that it does not list, are opened from their own documents.
"""

from __future__ import annotations

import json
import logging
import re
from collections.abc import Mapping
from pathlib import Path

from hbx_gpu._files import write_durably
from hbx_gpu._remote.places import Place
from hbx_gpu._storage.metadata import found_changed, read_document
from hbx_gpu._untrusted import Within, parse_json, read_small
from hbx_gpu.atlas._catalog.paths import group_path
from hbx_gpu.errors import CorruptDataError, HbxError

_log = logging.getLogger(__name__)
NAME = "hbx_gpu_arrays.json"
"""The file, in the folder of the atlas."""
_FORMAT = 1
_LARGEST = 256 << 20  # most bytes of the file
# The documents of an atlas mostly differ in the shape alone, so what surrounds it is written once.
_SHAPE = re.compile(r'"shape"\s*:\s*\[([\s,0-9]*)\]')


def packed(documents: Mapping[str, bytes]) -> str:
    """The content of the file.

    Parameters
    ----------
    documents
        Path of an array in the zarr store -> its ``zarr.json``.
    """
    frames: dict[tuple[str, str], int] = {}
    arrays: dict[str, tuple[int, str]] = {}
    for path, content in sorted(documents.items()):
        text = content.decode()
        found = _SHAPE.search(text)
        before, shape, after = (
            (text, "", "") if found is None else (text[: found.start(1)], found[1], text[found.end(1) :])
        )
        arrays[path] = frames.setdefault((before, after), len(frames)), shape
    return json.dumps({"format": _FORMAT, "frames": list(frames), "arrays": arrays}, separators=(",", ":"))


def unpacked(content: bytes, where: str) -> dict[str, bytes]:
    """The documents that :func:`packed` was given; none of a file that a later release wrote.

    Raises
    ------
    CorruptDataError
        The content is not that of such a file.
    """
    read = parse_json(content, where)
    try:
        if not isinstance(read, dict):
            raise TypeError(f"it holds a {type(read).__name__}")
        if read["format"] != _FORMAT:
            return {}
        frames = [(before, after) for before, after in read["frames"]]
        return {
            path: f"{frames[number][0]}{shape}{frames[number][1]}".encode()
            for path, (number, shape) in read["arrays"].items()
        }
    except (KeyError, TypeError, ValueError, IndexError, AttributeError) as error:
        raise CorruptDataError(
            f"{where} is not a list of the arrays of an atlas ({error!r}); remove it: it is written again "
            "with the next snapshot"
        ) from error


def write(root: Path, documents: Mapping[str, bytes]) -> None:
    """Write the file of an atlas on a local disk; the caller holds the write lock."""
    write_durably(root / NAME, packed(documents))


def fetch(root: Place, store: object) -> dict[str, bytes]:
    """The documents of an atlas in object storage; none where they are not kept, damaged or out of date.

    Raises
    ------
    RemoteError
        The store does not answer, or refuses.
    """
    # A file of this name says something about the store inside the atlas only.
    if store != root / "zarr_store" or found_changed(str(store)):
        return {}
    try:
        return unpacked(read_small(root / NAME, _LARGEST), str(root / NAME))
    except FileNotFoundError:
        return {}
    except CorruptDataError as error:
        _log.warning("%s. Until then the metadata of each array are asked for, which takes longer", error)
        return {}


def begin_changes(root: Path) -> list[str]:
    """Remove the file before arrays are replaced; returns the arrays that it listed."""
    try:
        Within(str(root)).check(str(root / NAME))
        listed = list(unpacked(read_small(root / NAME, _LARGEST), str(root / NAME)))
    except (FileNotFoundError, CorruptDataError):
        listed = []
    (root / NAME).unlink(missing_ok=True)
    return listed


def end_changes(root: Path, store: Path, arrays: list[str]) -> None:
    """Write the file again, with the documents as they are now."""
    within, documents = Within(str(store)), {}
    for path in arrays:
        try:
            found = read_document(group_path(store, path, within=within), within)
        except (OSError, HbxError):  # opening the array says what is wrong with it
            continue
        if found is not None:
            documents[path] = found
    if documents:
        write(root, documents)
