"""A small HTTP server of one folder, with the faults of a network: what readers and writers have to bear.

It speaks what object_store needs of plain HTTP (HEAD, GET with ranges, conditions on ETags) and of S3 without
signatures (listing, PUT with conditions, copies, multipart uploads, DELETE), at ``/BUCKET/KEY`` for the file
``root/BUCKET/KEY``. Run alone, it serves for benchmarks::

    python -m tests.remote.range_server FOLDER --latency-ms 30 --bandwidth 100e6
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import dataclasses
import os
import random
import shutil
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Literal
from urllib.parse import parse_qsl, unquote, urlsplit
from xml.etree import ElementTree
from xml.sax.saxutils import escape

Kind = Literal["429", "500", "503", "reset", "cut", "short", "wrong", "etag", "stall"]
"""What can go wrong with a request.

``429``, ``500``, ``503`` are answers with that status. ``reset`` closes the connection instead of an answer.
``cut`` closes it in the middle of the body. ``short`` says and sends fewer bytes than asked. ``wrong``
changes one byte of the body. ``etag`` names another version of the object. ``stall`` answers after a long
time.
"""

KINDS: tuple[Kind, ...] = ("429", "500", "503", "reset", "cut", "short", "wrong", "etag", "stall")
PASSING: tuple[Kind, ...] = ("429", "500", "503", "reset", "cut")
"""Faults that a client overcomes by asking again."""

_REASONS = {
    200: "OK",
    204: "No Content",
    206: "Partial Content",
    304: "Not Modified",
    400: "Bad Request",
    404: "Not Found",
    405: "Method Not Allowed",
    412: "Precondition Failed",
    416: "Range Not Satisfiable",
    429: "Too Many Requests",
    500: "Internal Server Error",
    503: "Slow Down",
}
_SENT_AT_ONCE = 256 << 10
_UPLOADS = ".uploads"


@dataclasses.dataclass(frozen=True)
class Request:
    """A request as the log keeps it.

    Attributes
    ----------
    method, path
        ``GET``, and the decoded path without the query.
    query
        Parameters of the query.
    span
        First byte and byte after the last one of a ranged GET, else None.
    fault
        What was made to go wrong.
    at
        Seconds on the monotonic clock.
    """

    method: str
    path: str
    query: dict[str, str]
    span: tuple[int, int] | None
    fault: Kind | None
    at: float


Chooser = Callable[[str, str], Kind | None]
"""From method and path to what goes wrong with this request."""


def at_random(
    rate: float, kinds: tuple[Kind, ...] = PASSING, *, seed: int = 0, methods: str = "GET"
) -> Chooser:
    """Let a share of the requests fail, each in one of several ways.

    Parameters
    ----------
    rate
        Share of the requests, from 0 to 1.
    kinds
        The ways.
    seed
        Of the random numbers.
    methods
        Names of the methods that fail, separated by spaces.
    """
    draws, wanted = random.Random(seed), set(methods.split())

    def choose(method: str, path: str) -> Kind | None:
        del path
        if method not in wanted or draws.random() >= rate:
            return None
        return draws.choice(kinds)

    return choose


@dataclasses.dataclass
class _Answer:
    status: int
    headers: dict[str, str] = dataclasses.field(default_factory=dict)
    body: bytes = b""
    file: Path | None = None
    start: int = 0
    length: int = 0


class RangeServer:
    """The server, on a thread of its own and a free port of the loopback device.

    Parameters
    ----------
    root
        Folder whose subfolders are the buckets.
    latency
        Seconds before the first byte of each answer.
    bandwidth
        Bytes per second of all answers together; None for no limit.
    faults
        Chooses the requests that fail; may be replaced at any time.
    stall
        Seconds that a stalled request waits.
    """

    def __init__(
        self,
        root: Path,
        *,
        latency: float = 0.0,
        bandwidth: float | None = None,
        faults: Chooser | None = None,
        stall: float = 5.0,
    ) -> None:
        self.root, self.latency, self.bandwidth, self.stall = root, latency, bandwidth, stall
        self.faults = faults
        self.log: list[Request] = []
        self.port = 0
        self._uploads = 0
        self._free_at = 0.0
        self._loop = asyncio.new_event_loop()
        self._started = threading.Event()
        self._thread = threading.Thread(target=self._run, name="range-server", daemon=True)

    # Life

    def __enter__(self) -> RangeServer:
        self._thread.start()
        self._started.wait(10)
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """End the server and all its connections."""
        if self._loop.is_running():
            self._loop.call_soon_threadsafe(self._loop.stop)
            self._thread.join(10)

    @property
    def url(self) -> str:
        """The address of the server, ``http://127.0.0.1:PORT``."""
        return f"http://127.0.0.1:{self.port}"

    @property
    def s3_options(self) -> dict[str, str]:
        """Storage options with which ``s3://`` addresses lead here."""
        return {
            "endpoint": self.url,
            "region": "us-east-1",
            "allow_http": "true",
            "skip_signature": "true",
        }

    def requests(self, method: str = "GET", part: str = "") -> list[Request]:
        """Requests of a method whose path has a part."""
        return [r for r in self.log if r.method == method and part in r.path]

    def _run(self) -> None:
        asyncio.set_event_loop(self._loop)
        server = self._loop.run_until_complete(asyncio.start_server(self._serve, "127.0.0.1", self.port))
        self.port = server.sockets[0].getsockname()[1]
        self._started.set()
        self._loop.run_forever()
        server.close()
        for task in asyncio.all_tasks(self._loop):
            task.cancel()
        self._loop.run_until_complete(asyncio.sleep(0))
        self._loop.close()

    # One connection

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with contextlib.suppress(
            ConnectionError, asyncio.IncompleteReadError, asyncio.CancelledError, OSError
        ):
            while await self._one(reader, writer):
                pass
        with contextlib.suppress(Exception):
            writer.close()

    async def _one(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> bool:
        """Answer one request; False when the connection has to end."""
        line = (await reader.readline()).decode("latin-1").split()
        if len(line) != 3:
            return False
        headers: dict[str, str] = {}
        while (text := (await reader.readline()).decode("latin-1").strip()) != "":
            name, _, value = text.partition(":")
            headers[name.lower()] = value.strip()
        body = await self._body(reader, headers)
        method, target = line[0], urlsplit(line[1])
        path, query = unquote(target.path), dict(parse_qsl(target.query, keep_blank_values=True))
        fault = self.faults(method, path) if self.faults else None
        span = _span(headers.get("range"), None) if method == "GET" else None
        self.log.append(Request(method, path, query, span, fault, time.monotonic()))
        if fault == "reset":
            writer.transport.abort()
            return False
        if self.latency or fault == "stall":
            await asyncio.sleep(self.latency + (self.stall if fault == "stall" else 0.0))
        if fault in ("429", "500", "503"):
            answer = _Answer(int(fault), body=_error("SlowDown", "injected"))
        else:
            answer = self._answer(method, path, query, headers, body)
        return await self._send(writer, method, answer, fault)

    async def _body(self, reader: asyncio.StreamReader, headers: dict[str, str]) -> bytes:
        if headers.get("transfer-encoding", "").lower() != "chunked":
            return await reader.readexactly(int(headers.get("content-length", "0")))
        parts = []
        while size := int((await reader.readline()).split(b";")[0], 16):
            parts.append(await reader.readexactly(size))
            await reader.readline()
        await reader.readline()
        return b"".join(parts)

    async def _send(
        self, writer: asyncio.StreamWriter, method: str, answer: _Answer, fault: Kind | None
    ) -> bool:
        length = answer.length if answer.file is not None else len(answer.body)
        sent = length
        if fault == "short" and answer.file is not None and length > 1:
            length = sent = length // 2
        elif fault == "cut":
            sent = length // 2
        headers = {"Content-Length": str(length), **answer.headers}
        if fault == "etag" and "ETag" in headers:
            headers["ETag"] = '"another-version"'
        head = [f"HTTP/1.1 {answer.status} {_REASONS[answer.status]}"]
        head += [f"{name}: {value}" for name, value in headers.items()]
        writer.write(("\r\n".join(head) + "\r\n\r\n").encode("latin-1"))
        if method == "HEAD":
            await writer.drain()
            return True
        if answer.file is None:
            writer.write(answer.body[:sent])
        elif fault == "wrong" and sent:
            content = bytearray(_read(answer.file, answer.start, sent))
            content[len(content) // 2] ^= 0x5A
            writer.write(bytes(content))
        else:
            await self._stream(writer, answer.file, answer.start, sent)
        await writer.drain()
        if fault == "cut":
            writer.transport.abort() if not sent else writer.close()
            return False
        return True

    async def _stream(self, writer: asyncio.StreamWriter, path: Path, start: int, length: int) -> None:
        with path.open("rb") as file:
            if self.bandwidth is None:
                await self._loop.sendfile(writer.transport, file, start, length)
                return
            file.seek(start)
            while length:
                part = file.read(min(_SENT_AT_ONCE, length))
                if not part:
                    return
                # One queue for all connections: each part takes its time on the link.
                now = time.monotonic()
                self._free_at = max(self._free_at, now) + len(part) / self.bandwidth
                if self._free_at - now > 0.002:
                    await asyncio.sleep(self._free_at - now)
                writer.write(part)
                await writer.drain()
                length -= len(part)

    # What is asked

    def _answer(
        self, method: str, path: str, query: dict[str, str], headers: dict[str, str], body: bytes
    ) -> _Answer:
        parts = [part for part in path.split("/") if part]
        if any(part in ("..", _UPLOADS) for part in parts):
            return _Answer(400)
        file = self.root.joinpath(*parts)
        if method == "GET" and len(parts) == 1 and "list-type" in query:
            return self._list(parts[0], query)
        if method == "POST" and len(parts) == 1 and "delete" in query:
            return self._delete_many(parts[0], body)
        if "uploads" in query or "uploadId" in query:
            return self._multipart(method, file, query, body)
        if method in ("GET", "HEAD"):
            return _get(file, headers)
        if method == "PUT":
            return self._put(file, headers, body)
        if method == "DELETE":
            _remove(file, self.root)
            return _Answer(204)
        return _Answer(405)

    def _put(self, file: Path, headers: dict[str, str], body: bytes) -> _Answer:
        if not _allowed(file, headers):
            return _Answer(412, body=_error("PreconditionFailed", "the object is there, or another one"))
        if source := headers.get("x-amz-copy-source"):
            origin = self.root.joinpath(*(part for part in unquote(source).split("/") if part))
            if not origin.is_file():
                return _Answer(404, body=_error("NoSuchKey", source))
            body = origin.read_bytes()
        _store(file, body)
        tag = _etag(file)
        copied = f"<CopyObjectResult><ETag>{escape(tag)}</ETag></CopyObjectResult>".encode()
        return _Answer(200, {"ETag": tag}, copied if source else b"")

    def _multipart(self, method: str, file: Path, query: dict[str, str], body: bytes) -> _Answer:
        if method == "POST" and "uploads" in query:
            self._uploads += 1
            name = str(self._uploads)
            (self.root / _UPLOADS / name).mkdir(parents=True)
            text = (
                f"<InitiateMultipartUploadResult><UploadId>{name}</UploadId></InitiateMultipartUploadResult>"
            )
            return _Answer(200, body=text.encode())
        folder = self.root / _UPLOADS / query.get("uploadId", "none")
        if not folder.is_dir():
            return _Answer(404, body=_error("NoSuchUpload", "no such upload"))
        if method == "PUT":
            part = folder / f"{int(query['partNumber']):06}"
            part.write_bytes(body)
            return _Answer(200, {"ETag": _etag(part)})
        if method == "POST":
            _store(file, b"".join(part.read_bytes() for part in sorted(folder.iterdir())))
        shutil.rmtree(folder)
        if method == "DELETE":
            return _Answer(204)
        tag = escape(_etag(file))
        text = f"<CompleteMultipartUploadResult><ETag>{tag}</ETag></CompleteMultipartUploadResult>"
        return _Answer(200, body=text.encode())

    def _list(self, bucket: str, query: dict[str, str]) -> _Answer:
        prefix, delimiter = query.get("prefix", ""), query.get("delimiter", "")
        after = query.get("continuation-token") or query.get("start-after", "")
        most = int(query.get("max-keys", "1000"))
        keys: list[str] = []
        folders: list[str] = []
        shown: set[str] = set()
        last, more = "", False
        for key, file in _objects(self.root / bucket, prefix):
            rest = key[len(prefix) :]
            folder = prefix + rest[: rest.index(delimiter) + 1] if delimiter and delimiter in rest else ""
            if key <= after or folder in shown or (folder and folder <= after):
                continue
            if len(keys) + len(folders) == most:
                more = True
                break
            last = folder or key
            if folder:
                shown.add(folder)
                folders.append(f"<CommonPrefixes><Prefix>{escape(folder)}</Prefix></CommonPrefixes>")
                continue
            stat = file.stat()
            when = time.strftime("%Y-%m-%dT%H:%M:%S.000Z", time.gmtime(stat.st_mtime))
            keys.append(
                f"<Contents><Key>{escape(key)}</Key><LastModified>{when}</LastModified>"
                f"<ETag>{escape(_etag(file))}</ETag><Size>{stat.st_size}</Size></Contents>"
            )
        token = f"<NextContinuationToken>{escape(last)}</NextContinuationToken>" if more else ""
        text = (
            f"<ListBucketResult><Name>{escape(bucket)}</Name><Prefix>{escape(prefix)}</Prefix>"
            f"<KeyCount>{len(keys) + len(folders)}</KeyCount><MaxKeys>{most}</MaxKeys>"
            f"<IsTruncated>{'true' if more else 'false'}</IsTruncated>{token}"
            f"{''.join(keys)}{''.join(folders)}</ListBucketResult>"
        )
        return _Answer(200, {"Content-Type": "application/xml"}, text.encode())

    def _delete_many(self, bucket: str, body: bytes) -> _Answer:
        gone = []
        for element in ElementTree.fromstring(body).iter():
            if element.tag.rpartition("}")[2] == "Key" and element.text:
                _remove(self.root / bucket / element.text, self.root)
                gone.append(f"<Deleted><Key>{escape(element.text)}</Key></Deleted>")
        return _Answer(200, body=f"<DeleteResult>{''.join(gone)}</DeleteResult>".encode())


def _error(code: str, text: str) -> bytes:
    return f"<Error><Code>{code}</Code><Message>{escape(text)}</Message></Error>".encode()


def _etag(file: Path) -> str:
    stat = file.stat()
    return f'"{stat.st_mtime_ns:x}-{stat.st_size:x}-{stat.st_ino:x}"'


def _read(file: Path, start: int, length: int) -> bytes:
    with file.open("rb") as opened:
        opened.seek(start)
        return opened.read(length)


def _store(file: Path, body: bytes) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    new = file.with_name(f"{file.name}.put-{time.monotonic_ns()}")
    new.write_bytes(body)
    new.replace(file)


def _remove(file: Path, root: Path) -> None:
    """Remove an object, and folders that are empty then: object storage has none."""
    file.unlink(missing_ok=True)
    for folder in file.parents:
        if folder in (root, *root.parents) or folder.parent == root:
            return
        try:
            folder.rmdir()
        except OSError:
            return


def _objects(bucket: Path, prefix: str) -> Iterator[tuple[str, Path]]:
    """Keys below a prefix in the order of S3, with their files."""
    root, top = str(bucket), str(bucket / prefix.rpartition("/")[0])
    keys = [
        os.path.join(folder, name)[len(root) + 1 :]
        for folder, _, names in os.walk(top, followlinks=True)
        for name in names
        if ".put-" not in name
    ]
    return ((key, bucket / key) for key in sorted(keys) if key.startswith(prefix))


def _span(text: str | None, size: int | None) -> tuple[int, int] | None:
    """First byte and byte after the last one of a Range header; None where it has none."""
    if not text or not text.startswith("bytes=") or "," in text:
        return None
    first, _, last = text.removeprefix("bytes=").partition("-")
    if not first:
        return None if size is None else (max(0, size - int(last)), size)
    stop = int(last) + 1 if last else (1 << 62)
    return int(first), stop if size is None else min(stop, size)


def _allowed(file: Path, headers: dict[str, str]) -> bool:
    """Whether the conditions of a PUT hold."""
    if headers.get("if-none-match") == "*" and file.exists():
        return False
    wanted = headers.get("if-match")
    return wanted is None or (file.is_file() and wanted in ("*", _etag(file)))


def _get(file: Path, headers: dict[str, str]) -> _Answer:
    if not file.is_file():
        return _Answer(404, body=_error("NoSuchKey", file.name))
    tag, stat = _etag(file), file.stat()
    modified = time.strftime("%a, %d %b %Y %H:%M:%S GMT", time.gmtime(stat.st_mtime))
    common = {"ETag": tag, "Last-Modified": modified, "Accept-Ranges": "bytes"}
    wanted = headers.get("if-match")
    if wanted is not None and wanted not in ("*", tag):
        return _Answer(412, common, _error("PreconditionFailed", "another version"))
    if headers.get("if-none-match") == tag:
        return _Answer(304, common)
    span = _span(headers.get("range"), stat.st_size)
    if span is None:
        return _Answer(200, common, file=file, length=stat.st_size)
    start, stop = span
    if start >= max(stat.st_size, 1) or stop <= start:
        return _Answer(416, common | {"Content-Range": f"bytes */{stat.st_size}"})
    said = {"Content-Range": f"bytes {start}-{stop - 1}/{stat.st_size}"}
    return _Answer(206, common | said, file=file, start=start, length=stop - start)


def main() -> None:
    """Serve a folder until the process is ended."""
    parser = argparse.ArgumentParser(description="Serve the subfolders of a folder as buckets.")
    parser.add_argument("root", type=Path, metavar="FOLDER")
    parser.add_argument("--port", type=int, default=0)
    parser.add_argument("--latency-ms", type=float, default=0.0)
    parser.add_argument("--bandwidth", type=float, metavar="BYTES_PER_SECOND")
    args = parser.parse_args()
    server = RangeServer(args.root, latency=args.latency_ms / 1e3, bandwidth=args.bandwidth)
    server.port = args.port
    with server:
        print(server.url, flush=True)
        threading.Event().wait()


if __name__ == "__main__":
    main()
