"""Storage options: obstore's names, refused in words where they are unknown, and never shown."""

from __future__ import annotations

from collections.abc import Callable

import obstore.store
import pytest

from hbx_gpu._remote import stores
from hbx_gpu._remote.keys import _OF_SCHEME, checked
from hbx_gpu._remote.places import SCHEMES, Place, parse
from hbx_gpu.cli import main
from hbx_gpu.errors import RemoteError, RemotePathError
from tests.remote.range_server import RangeServer
from tests.remote.weed import Bucket

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


def test_a_server_without_tls_needs_an_option_and_the_message_names_it(
    range_server: Callable[..., RangeServer], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("AWS_ALLOW_HTTP", raising=False)
    options = {name: value for name, value in range_server().s3_options.items() if name != "allow_http"}
    parse("s3://without-tls", options)
    with pytest.raises(RemoteError, match="allow_http=true"):
        stores.head(Place("s3://without-tls/atlas"))


@pytest.mark.parametrize("ask", [stores.head, stores.names, lambda place: list(stores.walk(place))])
def test_wrong_credentials_are_said_whatever_is_asked(bucket: Bucket, ask: Callable[[Place], object]) -> None:
    place = parse(f"{bucket.url}/atlas", {**bucket.options, "secret_access_key": SECRET})
    assert isinstance(place, Place)
    with pytest.raises(RemoteError, match="the store refuses access") as caught:
        ask(place)
    assert not caught.value.transient
    assert SECRET not in str(caught.value)


def test_a_bucket_that_is_not_there_is_said(bucket: Bucket) -> None:
    place = parse("s3://no-such-bucket-here/atlas", bucket.options)
    assert isinstance(place, Place)
    with pytest.raises(RemoteError, match="no bucket of this name"):
        list(stores.walk(place))


def test_an_address_that_lacks_an_option_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("AZURE_STORAGE_ACCOUNT_NAME", raising=False)
    with pytest.raises(RemotePathError, match="az://container cannot be opened with the storage options"):
        stores.head(Place("az://container/atlas"))


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, object]]:
    """What obstore is asked to open, as one dict per store."""
    found: list[dict[str, object]] = []
    real = obstore.store.from_url

    def from_url(url: str, **options: object) -> object:
        found.append({"url": url, "store": real(url, **options), **options})  # type: ignore[call-overload]
        return found[-1]["store"]

    monkeypatch.setattr(obstore.store, "from_url", from_url)
    return found


@pytest.mark.parametrize(
    ("address", "options", "store", "config"),
    [
        (
            "gs://bucket-a/atlas",
            {"skip_signature": True, "google_base_url": "http://localhost:4443"},
            "GCSStore",
            {"skip_signature": "true", "base_url": "http://localhost:4443"},
        ),
        ("gcs://bucket-b/atlas", {"bearer_token": SECRET}, "GCSStore", {"bearer_token": SECRET}),
        (
            "az://container-a/atlas",
            {"account_name": "somebody", "account_key": "c2VjcmV0"},
            "AzureStore",
            {"account_name": "somebody", "account_key": "c2VjcmV0"},
        ),
        (
            "azure://container-b/atlas",
            {"AZURE_STORAGE_ACCOUNT_NAME": "somebody", "sas_key": "sv=1&sig=2"},
            "AzureStore",
            {"account_name": "somebody", "sas_key": "sv=1&sig=2"},
        ),
        ("https://server-a/cells.h5ad", {"timeout": "9s"}, "HTTPStore", None),
        ("http://server-b/cells.h5ad", {"allow_http": "true"}, "HTTPStore", None),
        ("s3a://bucket-c/atlas", {"region": "eu-west-1"}, "S3Store", {"region": "eu-west-1"}),
    ],
)
def test_every_scheme_leads_to_its_store(
    asked: list[dict[str, object]],
    address: str,
    options: dict[str, object],
    store: str,
    config: dict[str, str] | None,
) -> None:
    place = parse(address, options)
    assert isinstance(place, Place)
    opened = stores.store_of(place)
    assert type(opened).__name__ == store
    (given,) = asked
    assert given["url"] == place.root
    assert given.get("config") == config
    client = given["client_options"]
    assert isinstance(client, dict)
    for name in ("timeout", "allow_http"):
        assert name not in options or client[name] == options[name]
    assert SECRET not in repr(place)


@pytest.mark.parametrize(("scheme", "prefix"), [("s3", "AWS"), ("gs", "GOOGLE"), ("az", "AZURE")])
def test_options_of_connections_come_from_the_environment(
    asked: list[dict[str, object]], monkeypatch: pytest.MonkeyPatch, scheme: str, prefix: str
) -> None:
    monkeypatch.setenv("AZURE_STORAGE_ACCOUNT_NAME", "somebody")
    monkeypatch.setenv(f"{prefix}_ALLOW_HTTP", "true")
    monkeypatch.setenv(f"{prefix}_TIMEOUT", "7s")
    stores.store_of(Place(f"{scheme}://of-the-environment-{scheme}"))
    parse(f"{scheme}://given-{scheme}", {"timeout": "9s"})
    stores.store_of(Place(f"{scheme}://given-{scheme}"))
    for given, timeout in zip(asked, ("7s", "9s"), strict=True):
        client = given["client_options"]
        assert isinstance(client, dict)
        assert (client["allow_http"], client["timeout"]) == ("true", timeout)
