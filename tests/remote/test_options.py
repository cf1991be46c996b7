"""Storage options: obstore's names, refused in words where they are unknown, and never shown."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from hbx_gpu._remote import stores
from hbx_gpu._remote.keys import _OF_SCHEME, checked
from hbx_gpu._remote.places import SCHEMES, Place, parse
from hbx_gpu.cli import main
from hbx_gpu.errors import RemotePathError

SECRET = "wJalrXUtnFEMI"
MISSPELLED = [
    ("s3", "secret_acces_key", "secret_access_key"),
    ("s3", "end_point", "endpoint"),
    ("gs", "service_acount", "service_account"),
    ("az", "acount_key", "account_key"),
    ("https", "allow_htp", "allow_http"),
]


@pytest.mark.parametrize(("scheme", "given", "meant"), MISSPELLED)
def test_a_misspelled_option_is_refused_with_the_one_that_was_meant(
    scheme: str, given: str, meant: str
) -> None:
    with pytest.raises(RemotePathError, match=f"did you mean '{meant}'") as caught:
        parse(f"{scheme}://host/a", {given: SECRET})
    assert SECRET not in str(caught.value)


def test_names_of_the_environment_and_of_other_programs_are_understood() -> None:
    given = {"AWS_ACCESS_KEY_ID": "k", "aws_endpoint_url": "http://x", "allow-http": True, "timeout": 5}
    expected = {"access_key_id": "k", "endpoint": "http://x", "allow_http": "true", "timeout": "5"}
    assert checked("s3", given) == expected
    assert checked("az", {"AZURE_STORAGE_ACCOUNT_NAME": "n"}) == {"account_name": "n"}
    assert checked("gs", {"GOOGLE_SERVICE_ACCOUNT": "f"}) == {"service_account": "f"}


def test_an_option_is_given_once_and_as_a_plain_value() -> None:
    with pytest.raises(RemotePathError, match="twice"):
        checked("s3", {"region": "a", "aws_region": "b"})
    with pytest.raises(RemotePathError, match="a number"):
        checked("s3", {"region": [SECRET]})


def test_every_option_is_one_that_obstore_knows() -> None:
    from obstore.exceptions import BaseError
    from obstore.store import from_url

    make: Callable[..., object] = from_url  # its types allow known names only
    unknown = []
    for scheme in ("s3", "gs", "az"):
        for name in _OF_SCHEME[scheme]:
            try:
                make(f"{scheme}://bucket", config={name: "true"})
            except (BaseError, ValueError) as error:
                if "is not valid for store" in str(error):
                    unknown.append(name)
    assert not unknown
    assert set(SCHEMES) == set(_OF_SCHEME)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["info", "/nothing", "--storage-option", f"secret_access_key={SECRET}"], "none is given"),
        (["info", "/nothing", "--storage-option", SECRET], "expected KEY=VALUE"),
    ],
)
def test_the_command_line_says_what_is_wrong_with_an_option(
    arguments: list[str], said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    try:
        status = main(arguments)
    except SystemExit as stop:
        status = int(str(stop.code))
    assert status
    shown = capsys.readouterr()
    assert said in shown.err
    assert SECRET not in shown.out + shown.err


def test_an_address_that_lacks_an_option_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("AZURE_STORAGE_ACCOUNT_NAME", raising=False)
    with pytest.raises(RemotePathError, match="az://container cannot be opened with the storage options"):
        stores.head(Place("az://container/atlas"))
