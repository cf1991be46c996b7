"""Addresses and their options: read as they are written, and never shown with credentials."""

from __future__ import annotations

import pickle
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from hbx_gpu._remote import options
from hbx_gpu._remote.lookup import folders, is_dir
from hbx_gpu._remote.places import Place, is_remote, parse
from hbx_gpu.errors import RemotePathError
from tests.emulation.build import outer_environment
from tests.remote.range_server import RangeServer

SECRET = "wJalrXUtnFEMI"


def test_an_address_is_used_like_a_path() -> None:
    place = parse("s3://bucket/a//b/")
    assert isinstance(place, Place)
    assert (place.url, place.root, place.key, place.name) == ("s3://bucket/a/b", "s3://bucket", "a/b", "b")
    assert str(place / "c" / "zarr.json") == "s3://bucket/a/b/c/zarr.json"
    assert place.parent.parent == Place("s3://bucket") == place.parent.parent.parent
    assert place.lists
    assert not Place("https://host/x").lists


def test_an_address_that_went_through_a_path_is_the_same() -> None:
    assert parse(Path("s3://bucket/a")) == Place("s3://bucket/a")


def test_local_paths_stay_local(tmp_path: Path) -> None:
    assert parse(tmp_path) == tmp_path
    assert parse(f"file://{tmp_path}") == tmp_path
    assert not is_remote("C:/x")
    assert not is_remote(f"file://{tmp_path}")


@pytest.mark.parametrize("text", ["file://atlas", "file://host/data/atlas", "file://"])
def test_a_file_address_without_an_absolute_path_is_not_the_current_folder(text: str) -> None:
    with pytest.raises(RemotePathError, match="three slashes"):
        parse(text)
    assert parse("file://localhost/data/a%20b") == Path("/data/a b")


@pytest.mark.parametrize("text", ["ftp://host/x", "s3:///x", "s3://b/../c"])
def test_other_addresses_are_refused(text: str) -> None:
    with pytest.raises(RemotePathError):
        parse(text)


@pytest.mark.parametrize("text", [f"https://user:{SECRET}@host/x", f"https://host/x?sig={SECRET}"])
def test_credentials_in_an_address_are_refused_and_not_repeated(text: str) -> None:
    with pytest.raises(RemotePathError) as caught:
        parse(text)
    assert SECRET not in str(caught.value)


def test_options_are_found_below_their_address_and_never_shown() -> None:
    place = parse("s3://seen/a", {"secret_access_key": SECRET, "region": "r"})
    assert options.options_of("s3://seen/a/b/c")["region"] == "r"
    assert options.options_of("s3://seen/ab") == {}
    assert SECRET not in repr(place)
    assert SECRET.encode() not in pickle.dumps(place)


def test_an_unknown_option_is_named_without_its_value() -> None:
    with pytest.raises(RemotePathError, match="secret_acess_key") as caught:
        parse("s3://typo/a", {"secret_acess_key": SECRET})
    assert SECRET not in str(caught.value)


def test_a_process_that_is_started_finds_the_options() -> None:
    parse("s3://seen/child", {"region": "of-the-parent"})
    code = "from hbx_gpu._remote.options import options_of; print(options_of('s3://seen/child/x')['region'])"
    found = subprocess.run(
        [sys.executable, "-c", code],
        env=outer_environment(), capture_output=True, text=True, check=True, timeout=60,
    )  # fmt: skip
    assert found.stdout.strip() == "of-the-parent"


def test_a_folder_of_many_objects_is_found_in_one_request(
    range_server: Callable[..., RangeServer],
) -> None:
    server = range_server()
    for number in range(1_001):  # a page of a listing has 1,000
        (server.root / "many" / "below" / f"{number}").mkdir(parents=True)
        (server.root / "many" / "below" / f"{number}" / "object").touch()
    place = parse("s3://many/below", server.s3_options)
    assert isinstance(place, Place)
    assert is_dir(place)
    assert len(server.log) == 1
    assert not is_dir(place / "not there")
    assert len(folders(place)) == 1_001
