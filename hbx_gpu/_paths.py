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
        `path` is a remote address, or a ``file://`` address of another machine.
    """
    return Path(checked(path)).expanduser().absolute()


def checked(path: str | os.PathLike[str]) -> str:
    """A path as it was written, without ``file://``.

    Raises
    ------
    RemotePathError
        `path` is a remote address, or a ``file://`` address of another machine.
    """
    text = os.fspath(path)
    # pathlib makes one slash of two, so an address that went through a Path has lost one.
    scheme, colon, rest = text.partition(":/")
    if not colon or len(scheme) < 2 or not scheme.replace("+", "").replace("-", "").isalnum():
        return text
    if scheme == "file":
        address = urlparse(f"file:/{rest}")
        # With two slashes only, the first part of a path is taken for the name of a machine.
        if address.netloc not in ("", "localhost") or not address.path:
            raise RemotePathError(
                f"cannot open {text!r}: a file:// address has three slashes and an absolute path, such as "
                "file:///data/atlas; write a relative path without file://"
            )
        return unquote(address.path)
    raise RemotePathError(
        f"cannot open {text!r}: only local paths are supported here; copy the data to a local disk first"
    )


def argument(text: str) -> Path:
    """A path on a command line, for ``type=`` of argparse."""
    try:
        return Path(checked(text))
    except RemotePathError as error:
        raise argparse.ArgumentTypeError(str(error)) from error
