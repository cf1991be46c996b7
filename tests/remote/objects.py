"""Folders to buckets and back, through obstore itself: what the tests compare with."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, cast

import obstore
from obstore.store import S3Store

if TYPE_CHECKING:
    from obstore.store import ClientConfig, S3Config


def store_of(url: str, options: dict[str, str]) -> S3Store:
    """The store of obstore at an address."""
    config = {key: value for key, value in options.items() if key != "allow_http"}
    client: ClientConfig = {"allow_http": "allow_http" in options}
    return S3Store.from_url(url, config=cast("S3Config", config), client_options=client)


def upload(folder: Path, url: str, options: dict[str, str]) -> None:
    """Copy the files of a folder to below an address."""
    store = store_of(url, options)
    files = [path for path in sorted(folder.rglob("*")) if path.is_file()]

    def put(path: Path) -> None:
        obstore.put(store, path.relative_to(folder).as_posix(), path)

    with ThreadPoolExecutor(16) as pool:
        list(pool.map(put, files))


def listing(url: str, options: dict[str, str], prefix: str = "") -> dict[str, int]:
    """Object -> size below an address."""
    found = obstore.list(store_of(url, options), prefix=prefix or None)
    return {item["path"]: item["size"] for page in found for item in page}


def content(url: str, options: dict[str, str], key: str) -> bytes:
    """The bytes of one object."""
    return bytes(obstore.get(store_of(url, options), key).bytes())
