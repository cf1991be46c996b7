"""Requests to object storage through obstore: sizes, names, bytes. Every one of them has a time limit."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from datetime import timedelta
from typing import TYPE_CHECKING, NoReturn, Protocol

from hbx_gpu._remote.keys import CLIENT
from hbx_gpu._remote.link import link_of
from hbx_gpu._remote.options import options_of
from hbx_gpu._remote.places import Place
from hbx_gpu.errors import RemoteError, RemotePathError, ReplacedError, UnsupportedError

if TYPE_CHECKING:
    from obstore import Bytes, GetOptions, ObjectMeta
    from obstore.store import ClientConfig, ObjectStore, RetryConfig

_stores: dict[tuple[int, str, tuple[tuple[str, str], ...]], ObjectStore] = {}
_lock = threading.Lock()


@dataclass(frozen=True, slots=True)
class ObjectInfo:
    """What a store says about an object.

    Attributes
    ----------
    nbytes
        Its size.
    version
        Its ETag; where the server gives none, the time of its last change. It differs for another content.
    """

    nbytes: int
    version: str


def store_of(place: Place) -> ObjectStore:
    """The obstore store of the bucket or server of a place, with its options; `Place.key` is a path in it.

    Raises
    ------
    UnsupportedError
        obstore is not installed.
    RemotePathError
        An option is unknown to the store.
    """
    options = options_of(place.url)
    key = (os.getpid(), place.root, tuple(sorted(options.items())))
    with _lock:
        if key not in _stores:
            _stores[key] = _make(place, place.root, options)
        return _stores[key]


def store_below(place: Place) -> ObjectStore:
    """A store whose paths begin at a place, for libraries that know no bucket; raises as :func:`store_of`."""
    return _make(place, place.url, options_of(place.url))


def _make(place: Place, url: str, options: Mapping[str, str]) -> ObjectStore:
    try:
        from obstore.store import from_url
    except ImportError as error:
        raise UnsupportedError(
            f"{place.root} is object storage, which needs obstore: pip install 'hbx_gpu[cloud]'"
        ) from error
    client: ClientConfig = {"connect_timeout": "5s", "timeout": "60s", "pool_max_idle_per_host": "128"}
    # Options that are given to obstore take the place of all that it finds in the environment.
    given = {**_client_of_environment(place.scheme), **options}
    client.update({k: v for k, v in given.items() if k in CLIENT})  # type: ignore[typeddict-item]
    config = {k: v for k, v in options.items() if k not in CLIENT}
    retry: RetryConfig = {
        "max_retries": 4,
        "retry_timeout": timedelta(seconds=60),
        "backoff": {
            "init_backoff": timedelta(milliseconds=50),
            "max_backoff": timedelta(seconds=4),
            "base": 2,
        },
    }
    from obstore.exceptions import BaseError

    try:
        if place.lists:
            return from_url(
                url,
                config=config or None,  # type: ignore[arg-type] # its keys are checked by obstore
                client_options=client,
                retry_config=retry,
            )
        return from_url(url, client_options=client, retry_config=retry)
    except (BaseError, ValueError, TypeError) as error:
        # The text of the error may repeat a value, so only names are told.
        raise RemotePathError(
            f"{place.root} cannot be opened with the storage options {sorted(options)}: "
            f"{type(error).__name__}; the names are those of obstore, such as endpoint, access_key_id, "
            "secret_access_key, region, allow_http"
        ) from None


_OF_ENVIRONMENT = {"s3": "AWS_", "gs": "GOOGLE_", "az": "AZURE_"}


def _client_of_environment(scheme: str) -> dict[str, str]:
    """Options of connections in the environment, such as ``AWS_ALLOW_HTTP``."""
    prefix = _OF_ENVIRONMENT.get(scheme)
    if prefix is None:
        return {}
    found = {name: os.environ.get(f"{prefix}{name.upper()}", "") for name in CLIENT}
    return {name: value for name, value in found.items() if value}


def info_of(meta: ObjectMeta) -> ObjectInfo:
    """Size and version from the answer of a store."""
    version = meta.get("e_tag") or meta["last_modified"].isoformat()
    return ObjectInfo(int(meta["size"]), version)


def head(place: Place) -> ObjectInfo | None:
    """Size and version of an object, None if there is none."""
    import obstore

    try:
        return info_of(obstore.head(store_of(place), place.key))
    except FileNotFoundError:
        return None
    except Exception as error:
        fail(place, error)


class Result(Protocol):
    """The part of obstore's ``GetResult`` that is used here."""

    @property
    def meta(self) -> ObjectMeta: ...

    def bytes(self) -> Bytes: ...


def request(place: Place, options: GetOptions | None = None, version: str = "") -> Result:
    """Ask for an object, or the part of it that the options of obstore name; its bytes may come later.

    Parameters
    ----------
    place, options
        The object, and obstore's options.
    version
        The version that it has to be of, as in `ObjectInfo`; the store is asked to refuse others where it
        can, and the caller compares what came.

    Raises
    ------
    FileNotFoundError
        There is no such object.
    RemoteError
        The store does not answer, or refuses.
    """
    import obstore

    # A store compares strong ETags only.
    if version.startswith('"'):
        options = {**(options or {}), "if_match": version}
    try:
        link = link_of(place.root)
        begin, first = link.began(), None
        try:
            found = obstore.get(store_of(place), place.key, options=options)
            first = time.perf_counter()
            return found
        finally:
            link.ended(begin, first, 0)
    except FileNotFoundError:
        raise FileNotFoundError(f"there is no object {place}") from None
    except Exception as error:
        fail(place, error)


def get(place: Place, options: GetOptions | None = None) -> tuple[Bytes, ObjectInfo]:
    """An object, or a part of it, and what the store says about it; raises as :func:`request`."""
    found = request(place, options)
    try:
        return found.bytes(), info_of(found.meta)
    except Exception as error:
        fail(place, error)


def read_bytes(place: Place, most: int | None = None) -> bytes:
    """An object as a whole, or one byte more than `most` of it; raises as :func:`get`."""
    if most is None:
        return bytes(get(place)[0])
    found = request(place)
    try:
        if found.meta["size"] > most:
            found = request(place, {"range": (0, most + 1)})
        return bytes(found.bytes())
    except Exception as error:
        fail(place, error)


def names(place: Place) -> tuple[list[str], list[str]]:
    """Names of the objects and of the folders directly below a place, each sorted.

    Raises
    ------
    UnsupportedError
        The server cannot list.
    RemoteError
        It does not answer, or refuses.
    """
    import obstore

    _check_lists(place)
    prefix = f"{place.key}/" if place.key else ""
    try:
        found = obstore.list_with_delimiter(store_of(place), prefix or None)
    except Exception as error:
        fail(place, error)
    objects = [meta["path"].removeprefix(prefix) for meta in found["objects"]]
    folders = [path.rstrip("/").removeprefix(prefix) for path in found["common_prefixes"]]
    return sorted(filter(None, objects)), sorted(filter(None, folders))


def any_below(place: Place) -> bool:
    """Whether any object lies below a place, in one request however many do. Raises as :func:`names`."""
    return next(walk(place), None) is not None


def walk(place: Place) -> Iterator[tuple[str, ObjectInfo]]:
    """All objects below a place: path relative to it, size and version. Raises as :func:`names`."""
    import obstore

    _check_lists(place)
    prefix = f"{place.key}/" if place.key else ""
    try:
        for page in obstore.list(store_of(place), prefix or None):
            for meta in page:
                yield meta["path"].removeprefix(prefix), info_of(meta)
    except Exception as error:
        fail(place, error)


def _check_lists(place: Place) -> None:
    if not place.lists:
        raise UnsupportedError(
            f"{place} is on a plain HTTP server, which cannot list what it holds; what has to be found by "
            "listing, such as the tables of an atlas, needs an address of s3, gs or az"
        )


def fail(place: Place, error: Exception) -> NoReturn:
    """Raise an error of ours for one of obstore's, without what may hold credentials.

    Raises
    ------
    ReplacedError
        The object is not of the version that was asked for.
    RemoteError
        Anything else; `transient` says whether another attempt may help.
    """
    from obstore import exceptions as known

    if isinstance(error, RemoteError | RemotePathError):
        raise error
    if isinstance(error, known.PreconditionError):
        raise ReplacedError(f"{place} was replaced after it was opened; open it again") from None
    # Listings are refused with an error of no particular kind.
    text = str(error)
    refused = isinstance(error, known.PermissionDeniedError | known.UnauthenticatedError) or any(
        f"status code: {status}" in text for status in (401, 403)
    )
    refused &= _OF_THE_MACHINE not in text  # the store was not asked
    raised = RemoteError(f"{place}: {_REFUSED if refused else _reason_of(error)}")
    lasting = refused or "NoSuchBucket" in text or isinstance(error, known.NotSupportedError)
    raised.transient = not lasting
    raise raised from None


_OF_THE_MACHINE = "169.254.169.254"
"""Address at which a machine in a cloud has credentials; it is asked where none are given."""
_REFUSED = (
    "the store refuses access; check the storage options access_key_id and secret_access_key, or the "
    "credentials of the environment"
)


def _reason_of(error: Exception) -> str:
    """What an error of obstore means, in words. Its own text may hold headers or signed addresses."""
    text = str(error)
    for sign, meaning in (
        (
            _OF_THE_MACHINE,
            "there are no credentials; pass storage options such as access_key_id and secret_access_key, or "
            "skip_signature=true for public data",
        ),
        ("timed out", "the store did not answer in time"),
        ("TimedOut", "the store did not answer in time"),
        (
            "builder error",
            "the address of the server begins with http://, and connections without TLS are not allowed; "
            "pass the storage option allow_http=true",
        ),
        ("NoSuchBucket", "there is no bucket of this name; make it first"),
        ("Connect", "no connection to the store; check the address and the option endpoint"),
        ("429", "the store asks for fewer requests (429)"),
        ("503", "the store is overloaded (503)"),
        ("status: 5", "the store failed (a status of 500 or more)"),
    ):
        if sign in text:
            return meaning
    return f"the request failed ({type(error).__name__})"
