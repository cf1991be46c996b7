"""Archives whose target is an address in object storage: made on the local disk, then uploaded at once."""

from __future__ import annotations

import contextlib
import os
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path

from hbx_gpu._advice import option
from hbx_gpu._remote.commits import Step, commit, recover
from hbx_gpu._remote.lease import FOLDER, Lease
from hbx_gpu._remote.places import Place, parse
from hbx_gpu._remote.stores import walk
from hbx_gpu._remote.writing import check_writable
from hbx_gpu.scdl._format.layout import HEADER, ROW_PTR
from hbx_gpu.scdl._writing.writer import OWN_FILES

# By these a reader recognizes an archive, so they appear last and go first.
_SIGNS = (HEADER, ROW_PTR)


@contextlib.contextmanager
def local_target(
    target: str | os.PathLike[str],
    *,
    overwrite: bool,
    storage_options: Mapping[str, object] | None = None,
) -> Iterator[str | os.PathLike[str]]:
    """Where an archive is to be made for a target, which may be an address in object storage.

    Parameters
    ----------
    target
        A path, which is given back as it is, or an address. What the block makes for an address is uploaded
        when the block ends without an error: the archive appears whole or not at all.
    overwrite
        Whether an archive at an address may be replaced.
    storage_options
        Credentials and settings of an address, under the names of obstore.

    Raises
    ------
    FileExistsError
        Something is at the address that must not be replaced.
    AtlasLockedError
        Somebody else is writing there.
    RemoteError
        The store does not answer, or refuses.
    """
    place = parse(target, storage_options)
    if not isinstance(place, Place):
        yield target
        return
    check_writable(place)
    lease = Lease(place)
    lease.acquire()
    try:
        there = [path for path, _ in walk(place)]
        if recover(place, there):
            there = [path for path, _ in walk(place)]
        there = [path for path in there if not path.startswith(f"{FOLDER}/")]
        _check(place, there, overwrite=overwrite)
        with tempfile.TemporaryDirectory(prefix="hbx_gpu-archive-") as folder:
            made = Path(folder) / (place.name or "archive")
            yield made
            _upload(lease, place, made, there)
    finally:
        lease.release()


def _check(place: Place, there: list[str], *, overwrite: bool) -> None:
    if there and not overwrite:
        raise FileExistsError(
            f"there is something at {place} already; choose another address, or replace an archive with "
            f"{option('overwrite', 'True')}"
        )
    if others := sorted({path.partition("/")[0] for path in there} - OWN_FILES):
        raise FileExistsError(
            f"{place} holds what belongs to no archive, such as {others[0]!r}; choose another address"
        )


def _upload(lease: Lease, place: Place, made: Path, there: list[str]) -> None:
    files = {path.relative_to(made).as_posix(): path for path in made.rglob("*") if path.is_file()}
    fresh = {path: file for path, file in files.items() if path not in there and path not in _SIGNS}
    steps: list[tuple[Step, Path | None]] = [(Step("remove", path), None) for path in _SIGNS if path in there]
    steps += [(Step("replace", path), files[path]) for path in sorted(set(files) & set(there) - set(_SIGNS))]
    steps += [(Step("remove", path), None) for path in sorted(set(there) - set(files) - set(_SIGNS))]
    steps += [(Step("replace", path), files[path]) for path in _SIGNS if path in files]
    commit(lease, place, fresh, steps)
