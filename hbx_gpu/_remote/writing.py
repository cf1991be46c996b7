"""Objects written to a store: under conditions, many at once, copied, removed."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

from hbx_gpu._remote.places import Place
from hbx_gpu._remote.stores import fail, read_bytes, store_of
from hbx_gpu.errors import RemoteError, UnsupportedError

if TYPE_CHECKING:
    from obstore import PutMode

_T = TypeVar("_T")
# Larger objects are written in parts, several parts at a time.
_PART = 16 << 20
_PARTS_AT_ONCE = 4
_AT_ONCE = 16
_ATTEMPTS = 5
_FIRST_WAIT = 0.1


class ConflictError(RemoteError):
    """An object is there already, or is another one than the writer expects."""


def check_writable(place: Place) -> None:
    """Refuse to write to a plain HTTP server.

    Raises
    ------
    UnsupportedError
        The place is on one.
    """
    if not place.lists:
        raise UnsupportedError(
            f"{place} is on a plain HTTP server, which takes no files; write to an address of s3, gs or az, "
            "or to a local path"
        )


def put(place: Place, content: bytes | Path) -> None:
    """Write an object, whether it exists or not; a large one in parts.

    Raises
    ------
    RemoteError
        The store does not answer, or refuses.
    """
    import obstore

    def attempt() -> None:
        obstore.put(store_of(place), place.key, content, chunk_size=_PART, max_concurrency=_PARTS_AT_ONCE)

    _again(place, attempt)


def put_new(place: Place, content: bytes) -> str:
    """Write an object that must not exist; returns its ETag.

    An object with the same content counts as written: an answer may have been lost, and asked for again.

    Raises
    ------
    ConflictError
        There is an object with another content.
    RemoteError
        The store does not answer, or refuses.
    """
    return _put_if(place, content, "create")


def put_over(place: Place, content: bytes, version: str) -> str:
    """Replace the object with one ETag; returns the new one.

    `content` must differ from every content that the object had before.

    Raises
    ------
    ConflictError
        The object has another ETag.
    RemoteError
        The store does not answer, or refuses.
    """
    return _put_if(place, content, {"e_tag": version})


def _put_if(place: Place, content: bytes, mode: PutMode) -> str:
    import obstore
    from obstore.exceptions import AlreadyExistsError, NotSupportedError, PreconditionError

    def attempt() -> str:
        try:
            done = obstore.put(store_of(place), place.key, content, mode=mode, use_multipart=False)
            return done["e_tag"] or ""
        except (AlreadyExistsError, PreconditionError):
            found, version = read_version(place)
            if found != content:
                raise ConflictError(f"{place} was written by somebody else") from None
            return version
        except (NotSupportedError, NotImplementedError):
            raise UnsupportedError(
                f"{place.root} has no conditional writes, without which two writers could destroy each "
                "other's work; use a store that has them, or set the storage option conditional_put"
            ) from None

    return _again(place, attempt)


def read_version(place: Place) -> tuple[bytes, str]:
    """Content and ETag of an object; empty where there is none."""
    import obstore

    try:
        found = obstore.get(store_of(place), place.key)
        return bytes(found.bytes()), found.meta["e_tag"] or ""
    except FileNotFoundError:
        return b"", ""
    except Exception as error:
        fail(place, error)


def copy(source: Place, target: Place) -> bool:
    """Copy an object inside its store; False if there is none.

    Raises
    ------
    RemoteError
        The store does not answer, or refuses.
    """
    import obstore

    def attempt() -> bool:
        try:
            obstore.copy(store_of(source), source.key, target.key)
            return True
        except FileNotFoundError:
            return False

    return _again(target, attempt)


def remove(places: Iterable[Place]) -> None:
    """Remove objects, those that do not exist too.

    Raises
    ------
    RemoteError
        The store does not answer, or refuses.
    """
    import obstore

    def one(place: Place) -> None:
        def attempt() -> None:
            try:
                obstore.delete(store_of(place), place.key)
            except FileNotFoundError:
                return

        _again(place, attempt)

    with ThreadPoolExecutor(_AT_ONCE) as pool:
        list(pool.map(one, places))


def upload(files: Mapping[Place, Path], check: Callable[[], None]) -> None:
    """Write files as objects, many at once.

    Parameters
    ----------
    files
        Object -> the file with its content.
    check
        Called before each object; raises if nothing may be written any more.

    Raises
    ------
    RemoteError
        The store does not answer, or refuses. Some objects may be written.
    """

    def one(item: tuple[Place, Path]) -> None:
        check()
        put(*item)

    _each(one, files.items())


def download(files: Mapping[Place, Path]) -> None:
    """Write objects into local files, many at once; folders are made.

    Raises
    ------
    FileNotFoundError, RemoteError
        An object is gone, or the store does not answer, or refuses.
    """

    def one(item: tuple[Place, Path]) -> None:
        place, path = item
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(_again(place, lambda: read_bytes(place)))

    _each(one, files.items())


def _each(do: Callable[[tuple[Place, Path]], None], items: Iterable[tuple[Place, Path]]) -> None:
    pool = ThreadPoolExecutor(_AT_ONCE)
    try:
        for future in [pool.submit(do, item) for item in items]:
            future.result()
    finally:
        pool.shutdown(cancel_futures=True)


def _again(place: Place, attempt: Callable[[], _T]) -> _T:
    """Try a request again where the store fails for a moment; the pauses double."""
    from obstore.exceptions import PermissionDeniedError, UnauthenticatedError

    for number in range(_ATTEMPTS):
        try:
            return attempt()
        except (ConflictError, UnsupportedError, FileNotFoundError):
            raise
        except (PermissionDeniedError, UnauthenticatedError) as error:
            fail(place, error)
        except Exception as error:
            if number == _ATTEMPTS - 1:
                fail(place, error)
        time.sleep(_FIRST_WAIT * 2**number)
    raise AssertionError
