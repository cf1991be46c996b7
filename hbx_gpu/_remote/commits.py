"""Several objects of a place that become visible together, or not at all, however the writer dies.

First everything is uploaded: new objects under their own names, where nothing refers to them yet; other
content under temporary names. A note says what is on its way. Then one object, the commit, lists the steps
that remain. If the writer dies before the commit is there, the next writer removes the uploads; afterward,
it finishes the steps. All callers hold the lease of the place.
"""

from __future__ import annotations

import json
import uuid
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from hbx_gpu._remote.lease import FOLDER, Lease
from hbx_gpu._remote.places import Place
from hbx_gpu._remote.stores import names, read_bytes, walk
from hbx_gpu._remote.writing import ConflictError, copy, put_new, remove, upload
from hbx_gpu.errors import AtlasError, RemoteError

Do = Literal["publish", "replace", "remove"]
_FORMAT = 1


@dataclass(frozen=True)
class Step:
    """What happens to one object when everything is uploaded.

    Attributes
    ----------
    do
        ``publish`` an object that must not exist, ``replace`` one that may, ``remove`` one.
    path
        The object, relative to the place.
    """

    do: Do
    path: str


def commit(
    lease: Lease, place: Place, fresh: Mapping[str, Path], steps: Sequence[tuple[Step, Path | None]]
) -> None:
    """Write objects so that all of them become visible, or none.

    Parameters
    ----------
    lease
        The lease of the place.
    place
        The folder of all objects.
    fresh
        New objects that nothing refers to before the steps: path relative to the place -> file.
    steps
        What makes them visible, in this order, with the file of what is written.

    Raises
    ------
    AtlasLockedError
        The lease was lost; nothing is visible.
    RemoteError
        The store does not answer, or refuses. Nothing is visible, or the next writer finishes it.
    """
    if not fresh and not steps:
        return
    work = uuid.uuid4().hex
    staged = {
        step.path: f"{FOLDER}/upload-{work}/{i}" for i, (step, file) in enumerate(steps) if file is not None
    }
    note, done = place / FOLDER / f"upload-{work}.json", place / FOLDER / f"commit-{work}.json"
    listed = [*fresh, *staged.values()]
    put_new(note, json.dumps({"format": _FORMAT, "uploads": listed}).encode())
    files = {place / path: file for path, file in fresh.items()}
    files |= {place / staged[step.path]: file for step, file in steps if file is not None}
    upload(files, lease.check)
    lease.renew()
    todo = [[step.do, step.path, staged.get(step.path, "")] for step, _ in steps]
    put_new(done, json.dumps({"format": _FORMAT, "steps": todo}).encode())
    _carry_out(place, done, note, todo)


def recover(place: Place, objects: Iterable[str]) -> list[str]:
    """Finish the commits of writers that died, and remove what others had uploaded.

    Parameters
    ----------
    place
        The folder of all objects.
    objects
        The objects in it, as a listing gives them: paths relative to the place.

    Returns
    -------
    list of str
        What was done, a sentence for each.

    Raises
    ------
    AtlasError
        A note is not one of this package; nothing was changed for it.
    """
    there = set(objects)
    said = []
    for path in sorted(there):
        if path.startswith(f"{FOLDER}/commit-") and path.endswith(".json"):
            todo = _note(place / path, "steps")
            uploads = place / path.replace("/commit-", "/upload-")
            _carry_out(place, place / path, uploads, todo)
            there.discard(path.replace("/commit-", "/upload-"))
            said.append(f"{place}: finished the commit of a writer that had died ({len(todo)} steps)")
    for path in sorted(there):
        if path.startswith(f"{FOLDER}/upload-") and path.endswith(".json"):
            listed = [item for item in _note(place / path, "uploads") if isinstance(item, str)]
            remove(place / item for item in listed if _is_inside(item))
            remove([place / path])
            n = len(there & set(listed))
            said.append(f"{place}: removed {n} objects of an upload that had not finished")
    rest = [path for path in there if path.startswith((f"{FOLDER}/upload-", f"{FOLDER}/clock-"))]
    remove(place / path for path in rest if not path.endswith(".json"))
    return said


def clean(place: Place) -> list[str]:
    """Finish or remove what writers left that died; returns what was done, a sentence for each.

    Raises
    ------
    AtlasLockedError
        Somebody is writing.
    """
    _, folders = names(place)
    if FOLDER not in folders:
        return []
    lease = Lease(place)
    lease.acquire()
    try:
        return recover(place, [f"{FOLDER}/{path}" for path, _ in walk(place / FOLDER)])
    finally:
        lease.release()


def _carry_out(place: Place, done: Place, note: Place, todo: Sequence[object]) -> None:
    steps = [_checked(done, item) for item in todo]
    for step, source in steps:
        target = place / step.path
        if step.do == "remove":
            remove([target])
        elif step.do == "replace":
            # A staged object that is gone was moved before an interruption.
            copy(place / source, target)
        else:
            _publish(place / source, target)
    remove(place / source for _, source in steps if source)
    remove([note])
    remove([done])


def _publish(source: Place, target: Place) -> None:
    try:
        content = read_bytes(source)
    except FileNotFoundError:
        return  # it was moved before an interruption
    try:
        put_new(target, content)
    except ConflictError:
        raise RemoteError(
            f"{target} was written by another program in the meantime, so what was uploaded cannot become "
            "part of it; let one program write at a time, and restore the earlier version of that object"
        ) from None


def _note(place: Place, key: str) -> list[object]:
    try:
        found = json.loads(read_bytes(place))
    except ValueError:
        found = None
    if not isinstance(found, dict) or found.get("format") != _FORMAT or not isinstance(found.get(key), list):
        raise AtlasError(
            f"{place} is not a note of unfinished work that this release can read. Nothing was changed. "
            "Finish interrupted work with the release that began it; if there is none, remove the object"
        )
    return list(found[key])


def _checked(note: Place, item: object) -> tuple[Step, str]:
    match item:
        case [("publish" | "replace" | "remove") as do, str() as path, str() as source] if _is_inside(path):
            if source == "" or _is_inside(source):
                return Step(do, path), source
    raise AtlasError(f"{note} holds {str(item)[:100]!r}, which is not a step; remove the object")


def _is_inside(path: str) -> bool:
    return all(part not in ("", ".", "..") for part in path.split("/"))
