"""A local copy of the catalog of an atlas in object storage, in which a writer works before it uploads.

It has the tables and the metadata of the groups; the arrays of a group are fetched when a writer reads them.
A write works on the copy as on any local atlas. What it made is then uploaded and committed: new groups and
files of tables first, the versions of the tables last, so readers see all of it or none.
"""

from __future__ import annotations

import contextlib
import functools
import os
import shutil
import tempfile
import weakref
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import ParamSpec, Protocol, Self, TypeVar

from hbx_gpu._remote.commits import Step, commit, recover
from hbx_gpu._remote.lease import FOLDER, Lease
from hbx_gpu._remote.places import Place, is_remote, parse
from hbx_gpu._remote.stores import ObjectInfo, walk
from hbx_gpu._remote.writing import check_writable, download
from hbx_gpu.atlas._catalog.paths import STAGING
from hbx_gpu.atlas._catalog.snapshot_records import VERSION_TABLE
from hbx_gpu.errors import AtlasError, HbxError, RemoteError, UnsafePathError

_STORE = "zarr_store/"
_TABLES = "lance_db/"
_METADATA = "zarr.json"
# A hint of LanceDB that is right without being there, and would be wrong after another program has written.
_HINT = "latest_version_hint.json"

_Signature = tuple[int, int, int]


@dataclass(frozen=True)
class _Copy:
    """A file of the mirror: the object that it equals, and how the file looked then."""

    version: str
    signature: _Signature


class Mirror:
    """The local copy of one atlas.

    Parameters
    ----------
    place
        The atlas.
    versions
        Name of its table of snapshots.

    Attributes
    ----------
    root
        The copy, a temporary folder that is removed with this object or with the process.
    """

    def __init__(self, place: Place, versions: str) -> None:
        check_writable(place)
        self.place = place
        self._versions = versions
        folder = Path(tempfile.mkdtemp(prefix="hbx_gpu-mirror-"))
        weakref.finalize(self, shutil.rmtree, str(folder), ignore_errors=True)
        self.root = folder / (place.name or "atlas")
        self.root.mkdir()
        self._copies: dict[str, _Copy] = {}
        self._far: dict[str, ObjectInfo] = {}
        self._lease = Lease(place)

    @contextlib.contextmanager
    def exchange(self) -> Iterator[None]:
        """Hold the lease of the atlas; first bring the copy up to date, at the end upload what has changed.

        If the block raises, nothing is uploaded, and the copy is restored at the next time.

        Raises
        ------
        AtlasLockedError
            Somebody else is writing.
        RemoteError
            The store does not answer, or refuses.
        """
        self._lease.acquire()
        try:
            with self._named():
                self._pull()
                yield
                self.push()
        except BaseException:
            shutil.rmtree(self.root / FOLDER, ignore_errors=True)  # notes about work that is given up
            raise
        finally:
            self._lease.release()

    def fetch(self, zarr_group: str) -> None:
        """Bring the arrays of a group into the copy.

        Raises
        ------
        RemoteError
            The store does not answer, or refuses.
        """
        self._download(path for path in list(self._far) if path.startswith(f"{_STORE}{zarr_group}/"))

    def fetch_all(self) -> None:
        """Bring the arrays of all groups into the copy; raises as :meth:`fetch`."""
        self._download(list(self._far))

    # From the store

    def _pull(self) -> None:
        there = dict(walk(self.place))
        if recover(self.place, there):
            there = dict(walk(self.place))
        there = {path: info for path, info in there.items() if _is_part(path)}
        for path in there:
            if any(part in ("", ".", "..") or "\\" in part for part in path.split("/")):
                raise UnsafePathError(f"{self.place} holds an object {path!r}, which is not a path below it")
        (self.root / _STORE).mkdir(parents=True, exist_ok=True)
        shutil.rmtree(self.root / _STORE / STAGING, ignore_errors=True)
        same = {}
        for path, signature in self._files():
            copy = self._copies.get(path)
            info = there.get(path)
            if copy and info and copy.version == info.version and copy.signature == signature:
                same[path] = copy
            else:
                (self.root / path).unlink()
        self._copies = same
        self._far = {path: info for path, info in there.items() if path not in same}
        self._download(
            path for path in list(self._far) if not path.startswith(_STORE) or path.endswith(f"/{_METADATA}")
        )
        self._sweep()

    def _download(self, paths: Iterator[str] | list[str]) -> None:
        wanted = list(paths)
        download({self.place / path: self.root / path for path in wanted})
        for path in wanted:
            self._copies[path] = _Copy(self._far.pop(path).version, _signature(self.root / path))

    def _sweep(self) -> None:
        """Remove folders of the copy in which nothing is left: tables and groups that are gone."""
        for folder, _, _ in os.walk(self.root, topdown=False):
            if Path(folder) not in (self.root, self.root / _STORE.rstrip("/")):
                with contextlib.suppress(OSError):
                    os.rmdir(folder)

    # To the store

    def push(self) -> None:
        """Upload and commit what has changed; the caller is inside :meth:`exchange`.

        Raises
        ------
        AtlasLockedError
            The lease was lost; nothing is visible.
        RemoteError
            The store does not answer, or refuses. Nothing is visible, or the next writer finishes it.
        """
        now = dict(self._files())
        new = [path for path in now if path not in self._copies and path not in self._far]
        changed = [
            path
            for path, signature in now.items()
            if path in self._far or (path in self._copies and self._copies[path].signature != signature)
        ]
        gone = [path for path in self._copies if path not in now]
        groups = {path.removesuffix(_METADATA) for path in gone if path.endswith(_METADATA)}
        gone += [
            path
            for path in self._far
            if path not in now
            and any(path.startswith(group) and not (self.root / group).is_dir() for group in groups)
        ]
        published = [path for path in new if _is_version(path)]
        named = [path for path in new if "/" not in path]
        fresh = {path: self.root / path for path in new if path not in {*published, *named}}
        commit(self._lease, self.place, fresh, self._steps(changed, published, named, gone))
        self._settle(now, gone)

    def _steps(
        self, changed: list[str], published: list[str], named: list[str], gone: list[str]
    ) -> list[tuple[Step, Path | None]]:
        """What makes everything visible, in order."""

        def write(path: str) -> tuple[Step, Path | None]:
            return Step("replace", path), self.root / path

        def remove(path: str) -> tuple[Step, Path | None]:
            return Step("remove", path), None

        in_groups = [path for path in changed if path.startswith(_STORE)]
        metadata = sorted((p for p in in_groups if p.endswith(_METADATA)), key=lambda p: p.count("/"))
        data = [path for path in in_groups if path not in set(metadata)]
        # A group whose arrays are replaced has no metadata meanwhile, so nobody reads a mixture.
        return [
            *(remove(path) for path in metadata),
            *(remove(path) for path in gone if path.startswith(_STORE)),
            *(write(path) for path in data),
            *(write(path) for path in reversed(metadata)),
            *((Step("publish", path), self.root / path) for path in self._in_order(published)),
            *(write(path) for path in changed if path not in set(in_groups)),
            *(write(path) for path in named),
            *(remove(path) for path in gone if not path.startswith(_STORE)),
        ]

    def _in_order(self, versions: list[str]) -> list[str]:
        """Versions of tables in the order of their making; those of the table of snapshots come last."""

        def key(path: str) -> tuple[bool, int, int]:
            table, _, version = path.removeprefix(_TABLES).partition(".lance/_versions/")
            number = version.partition(".")[0]
            # LanceDB counts down in the names.
            order = -int(number) if number.isdigit() else 0
            return table == self._versions, (self.root / path).stat().st_mtime_ns, order

        return sorted(versions, key=key)

    def _settle(self, now: dict[str, _Signature], gone: list[str]) -> None:
        """Take note of what was uploaded; arrays that are in the store now need no copy."""
        there = {path: info for path, info in walk(self.place) if _is_part(path)}
        for path in gone:
            self._copies.pop(path, None)
            self._far.pop(path, None)
        for path, signature in now.items():
            if path not in there:
                raise RemoteError(
                    f"{self.place / path} was written, but the store does not list it; a store is needed "
                    "whose listings are complete at once"
                )
            if path.startswith(_STORE) and not path.endswith(f"/{_METADATA}"):
                (self.root / path).unlink()
                self._copies.pop(path, None)
                self._far[path] = there[path]
            else:
                self._far.pop(path, None)
                self._copies[path] = _Copy(there[path].version, signature)

    # Either

    def _files(self) -> list[tuple[str, _Signature]]:
        found = []
        for folder, folders, files in os.walk(self.root):
            within = Path(folder).relative_to(self.root)
            folders[:] = [name for name in folders if (within / name).as_posix() not in _OWN]
            for name in files:
                path = (within / name).as_posix()
                if _is_part(path):
                    found.append((path, _signature(self.root / path)))
        return found

    @contextlib.contextmanager
    def _named(self) -> Iterator[None]:
        """Let messages name the atlas, not the copy."""
        try:
            yield
        except (HbxError, OSError, ValueError) as error:
            here, there = str(self.root), str(self.place)
            error.args = tuple(a.replace(here, there) if isinstance(a, str) else a for a in error.args)
            raise


class Attachable(Protocol):
    """An open atlas whose writes can go on to object storage."""

    def attached(self, mirror: Mirror) -> Self:
        """The same atlas, whose writes a mirror uploads to object storage."""
        ...


_Atlas = TypeVar("_Atlas", bound=Attachable)
_P = ParamSpec("_P")


def also_in_object_storage(make: Callable[_P, _Atlas]) -> Callable[_P, _Atlas]:
    """Let a function that makes or opens a local atlas for writing do so for one in object storage.

    The path is the first text or path among its arguments. Of the named ones, ``storage_options``, ``store``
    and ``version_table_name`` count.
    """

    @functools.wraps(make)
    def wrapped(*args: _P.args, **kwargs: _P.kwargs) -> _Atlas:
        at = next((i for i, arg in enumerate(args) if isinstance(arg, str | os.PathLike)), None)
        path = kwargs.get("path", kwargs.get("atlas_path")) if at is None else args[at]
        options = kwargs.get("storage_options")
        if not isinstance(path, str | os.PathLike) or not is_remote(path):
            return make(*args, **kwargs)
        place = parse(path, options if isinstance(options, Mapping) else None)
        assert isinstance(place, Place)
        if kwargs.get("store") is not None:
            raise AtlasError(f"the atlas at {place} has its zarr store inside; leave store= out")
        place = place.parent if place.name == "lance_db" else place
        mirror = Mirror(place, str(kwargs.get("version_table_name", VERSION_TABLE)))
        here = str(mirror.root)
        local = args if at is None else (*args[:at], here, *args[at + 1 :])
        named = {k: here if k in ("path", "atlas_path") else v for k, v in kwargs.items()}
        with mirror.exchange():
            atlas = make(*local, **named)  # type: ignore[arg-type] # the same arguments but for the path
        return atlas.attached(mirror)

    return wrapped


_OWN = {FOLDER, f"{_STORE}{STAGING}"}


def _is_part(path: str) -> bool:
    """Whether an object belongs to an atlas and has a copy or stays far: tables, groups, names."""
    if path.startswith(_TABLES):
        return not path.endswith(f"/{_HINT}")
    return path.startswith(_STORE) or ("/" not in path and path.endswith(".json"))


def _is_version(path: str) -> bool:
    return path.startswith(_TABLES) and "/_versions/" in path


def _signature(path: Path) -> _Signature:
    stat = path.stat()
    return stat.st_size, stat.st_mtime_ns, stat.st_ino
