"""The servers of these tests speak enough of S3 and HTTP, and fail as they are asked to."""

from __future__ import annotations

import subprocess
import sys
import time
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path

import obstore
import psutil
import pytest
from obstore.exceptions import AlreadyExistsError, BaseError, PreconditionError
from obstore.store import HTTPStore, ObjectStore

from tests.remote.objects import content, listing, store_of, upload
from tests.remote.range_server import KINDS, Kind, RangeServer, at_random
from tests.remote.weed import Bucket

Make = Callable[..., RangeServer]


@pytest.fixture(params=["weed", "range"])
def s3(request: pytest.FixtureRequest) -> ObjectStore:
    if request.param == "weed":
        bucket: Bucket = request.getfixturevalue("bucket")
        return store_of(bucket.url, bucket.options)
    server: RangeServer = request.getfixturevalue("range_server")()
    (server.root / "bucket").mkdir()
    return store_of("s3://bucket", server.s3_options)


def test_an_object_is_written_under_conditions_copied_listed_and_removed(s3: ObjectStore) -> None:
    obstore.put(s3, "a/b", b"0123456789", mode="create")
    with pytest.raises(AlreadyExistsError):
        obstore.put(s3, "a/b", b"x", mode="create")
    tag = obstore.head(s3, "a/b")["e_tag"]
    assert tag is not None
    obstore.put(s3, "a/b", b"abcdefghij", mode={"e_tag": tag})
    with pytest.raises(PreconditionError):
        obstore.put(s3, "a/b", b"x", mode={"e_tag": tag})
    with pytest.raises(PreconditionError):
        obstore.get(s3, "a/b", options={"if_match": tag})
    assert bytes(obstore.get_range(s3, "a/b", start=2, length=3)) == b"cde"
    assert [bytes(part) for part in obstore.get_ranges(s3, "a/b", starts=[0, 9], lengths=[1, 1])] == [
        b"a",
        b"j",
    ]
    obstore.copy(s3, "a/b", "a/c d")
    big = bytes(range(256)) * (12 << 12)
    obstore.put(s3, "big", big, use_multipart=True, chunk_size=5 << 20)
    assert bytes(obstore.get(s3, "big").bytes()) == big
    there = {item["path"]: item["size"] for page in obstore.list(s3) for item in page}
    assert there == {"a/b": 10, "a/c d": 10, "big": len(big)}
    assert list(obstore.list_with_delimiter(s3)["common_prefixes"]) == ["a"]
    obstore.delete(s3, ["a/b", "a/c d"])
    assert [item["path"] for page in obstore.list(s3) for item in page] == ["big"]


def test_a_long_listing_comes_in_pages(range_server: Make, tmp_path: Path) -> None:
    server = range_server()
    folder = tmp_path / "many"
    (folder / "sub").mkdir(parents=True)
    for i in range(1100):
        (folder / "sub" / f"{i:04}").write_bytes(b"x")
    upload(folder, "s3://bucket/top", server.s3_options)
    assert len(listing("s3://bucket/top", server.s3_options)) == 1100
    assert any("continuation-token" in r.query for r in server.log)


def test_plain_http_reads_ranges_and_keeps_a_log(range_server: Make) -> None:
    server = range_server(latency=0.05)
    (server.root / "file").write_bytes(b"0123456789")
    store = HTTPStore.from_url(server.url, client_options={"allow_http": True})
    begin = time.monotonic()
    assert bytes(obstore.get_range(store, "file", start=3, length=4)) == b"3456"
    assert time.monotonic() - begin >= 0.05
    assert obstore.head(store, "file")["size"] == 10
    assert [(r.method, r.span) for r in server.log] == [("GET", (3, 7)), ("HEAD", None)]


def test_a_capped_link_takes_its_time(range_server: Make) -> None:
    server = range_server(bandwidth=10e6)
    (server.root / "file").write_bytes(bytes(2_000_000))
    store = HTTPStore.from_url(server.url, client_options={"allow_http": True})
    begin = time.monotonic()
    obstore.get(store, "file").bytes()
    assert time.monotonic() - begin >= 0.18


@pytest.mark.parametrize("kind", KINDS)
def test_each_fault_is_seen_by_a_client_that_does_not_try_again(range_server: Make, kind: Kind) -> None:
    server = range_server(stall=0.5)
    body = bytes(range(256)) * 16
    (server.root / "file").write_bytes(body)
    store = HTTPStore.from_url(
        server.url,
        client_options={"allow_http": True, "timeout": "250ms"},
        retry_config={"max_retries": 0, "retry_timeout": timedelta(seconds=1)},
    )
    tag = obstore.head(store, "file")["e_tag"]
    server.faults = at_random(1, (kind,))
    try:
        found = obstore.get(store, "file", options={"range": (1000, 3000)})
        got, said = bytes(found.bytes()), found.meta["e_tag"]
    except (BaseError, OSError):
        assert kind in ("429", "500", "503", "reset", "cut", "short", "stall")
        return
    expected = body[1000:3000]
    if kind == "wrong":
        assert got != expected
        assert len(got) == len(expected)
    elif kind == "etag":
        assert said != tag
    else:
        assert kind == "short"
        assert len(got) < len(expected)


def test_faults_at_random_are_repeatable_and_overcome(range_server: Make) -> None:
    server = range_server()
    (server.root / "bucket").mkdir()
    (server.root / "bucket" / "key").write_bytes(b"value")
    server.faults, again = (at_random(0.3, ("503", "reset"), seed=5) for _ in range(2))
    assert [server.faults("GET", "/") for _ in range(50)] == [again("GET", "/") for _ in range(50)]
    for _ in range(10):
        assert content("s3://bucket", server.s3_options, "key") == b"value"
    assert any(request.fault for request in server.log)


def test_a_server_ends_with_a_test_process_that_is_killed(tmp_path: Path) -> None:
    script = (
        "import os, pathlib, signal, sys, time, psutil\n"
        "from tests.remote.weed import kept\n"
        "with kept(['sleep', '600'], pathlib.Path(sys.argv[1])) as keeper:\n"
        "    while not (found := psutil.Process(keeper.pid).children()): time.sleep(0.01)\n"
        "    print(keeper.pid, found[0].pid, flush=True)\n"
        "    os.kill(os.getpid(), signal.SIGKILL)\n"
    )
    command = [sys.executable, "-c", script, str(tmp_path / "log")]
    done = subprocess.run(command, capture_output=True, text=True)
    pids = [int(text) for text in done.stdout.split()]
    assert len(pids) == 2, done.stderr
    deadline = time.monotonic() + 10
    while any(psutil.pid_exists(pid) and psutil.Process(pid).status() != "zombie" for pid in pids):
        assert time.monotonic() < deadline
        time.sleep(0.05)
