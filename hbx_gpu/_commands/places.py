"""Paths and addresses of a command line, and the option ``--storage-option`` that goes with addresses."""

from __future__ import annotations

import argparse
from collections.abc import Iterator

from hbx_gpu._remote.lookup import is_dir
from hbx_gpu._remote.places import AnyPath, Place, is_remote, parse
from hbx_gpu.errors import RemotePathError


def argument(text: str) -> AnyPath:
    """A local path as it was written, or an address in object storage, for ``type=`` of argparse."""
    from hbx_gpu._paths import argument as local_argument

    if not is_remote(text):
        return local_argument(text)
    try:
        return parse(text)
    except RemotePathError as error:
        raise argparse.ArgumentTypeError(str(error)) from error


def is_atlas(path: AnyPath) -> bool:
    """Whether there are tables of an atlas."""
    return is_dir(path / "lance_db")


def is_empty(path: AnyPath) -> bool:
    """Whether a folder does not exist or holds nothing."""
    if isinstance(path, Place):
        return not is_dir(path)
    return not path.is_dir() or not any(path.iterdir())


def add_snapshot(parser: argparse.ArgumentParser) -> None:
    """Add the option that chooses a snapshot of an atlas."""
    parser.add_argument(
        "--version",
        dest="snapshot",
        type=int,
        metavar="N",
        help="snapshot of an atlas; by default the newest",
    )


def add_storage_options(parser: argparse.ArgumentParser) -> None:
    """Add the option to the parser of a command."""
    parser.add_argument(
        "--storage-option",
        action="append",
        default=[],
        type=_pair,
        metavar="KEY=VALUE",
        help="for addresses (s3://, gs://, az://, https://): endpoint, region, access_key_id, "
        "secret_access_key, allow_http, ... as obstore calls them; repeat for more. By default the "
        "credentials of the environment, which other users of the machine cannot see",
    )


def use_storage_options(args: argparse.Namespace) -> None:
    """Let the options of a command line count for all its addresses.

    Raises
    ------
    RemotePathError
        An option is unknown, or there is no address to use it for.
    """
    pairs: list[tuple[str, str]] = getattr(args, "storage_option", [])
    if not pairs:
        return
    places = list(_places(args))
    if not places:
        raise RemotePathError("--storage-option is for addresses such as s3://bucket/atlas; none is given")
    for place in places:
        parse(place, dict(pairs))


def _places(args: argparse.Namespace) -> Iterator[Place]:
    for value in vars(args).values():
        for one in value if isinstance(value, list) else [value]:
            if isinstance(one, Place):
                yield one


def _pair(text: str) -> tuple[str, str]:
    key, sign, value = text.partition("=")
    if not sign or not key:
        # The text may be a secret whose name was forgotten, so it is not repeated.
        raise argparse.ArgumentTypeError("expected KEY=VALUE, such as region=us-east-1")
    return key, value
