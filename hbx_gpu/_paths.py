"""Local paths as users write them; addresses of object stores are refused in words."""

from __future__ import annotations

import argparse
import os
from pathlib import Path
from urllib.parse import unquote, urlparse

from hbx_gpu.errors import RemotePathError


def local_path(path: str | os.PathLike[str]) -> Path:
    """Absolute local path of `path`, which may be a ``file://`` address.

    Raises
    ------
    RemotePathError
        `path` is a remote address.
    """
    return Path(checked(path)).expanduser().absolute()


def checked(path: str | os.PathLike[str]) -> str:
    """A path as it was written, without ``file://``.

    Raises
    ------
    RemotePathError
        `path` is a remote address.
    """
    text = os.fspath(path)
    # pathlib makes one slash of two, so an address that went through a Path has lost one.
    scheme, colon, rest = text.partition(":/")
    if not colon or len(scheme) < 2 or not scheme.replace("+", "").replace("-", "").isalnum():
        return text
    if scheme == "file":
        return unquote(urlparse(f"file:/{rest}").path)
    raise RemotePathError(
        f"cannot open {text!r}: only local paths are supported here; copy the data to a local disk first"
    )


def argument(text: str) -> Path:
    """A path on a command line, for ``type=`` of argparse."""
    try:
        return Path(checked(text))
    except RemotePathError as error:
        raise argparse.ArgumentTypeError(str(error)) from error
