"""A cache of chunks on the local disk, shared by all processes of a host: segments that never change.

A segment is a file of chunks, written under another name and renamed when it is whole, so that processes that
are killed leave nothing that counts. Names are random: two writers never meet. A reader maps segments, so one
that is removed stays readable for those that use it. Segments that were used longest ago are removed first.
Every process verifies the checksum of a segment before it first uses it.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import struct
import threading
import time
import uuid
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass
from multiprocessing import util
from pathlib import Path

import numpy as np

from hbx_gpu._codecs.checksum import crc32c
from hbx_gpu._storage.claims import MOST_OBJECTS, Claims, keys_of
from hbx_gpu._storage.maps import FileMap
from hbx_gpu._storage.readers import Memory
from hbx_gpu.errors import ResourceError

SEGMENT = 32 << 20
"""Bytes of chunks in a segment, about."""
_ALIGNMENT = 8
_MAGIC = b"hbxgpuC1"
_TRAILER = struct.Struct("<QII8s")  # bytes of the footer, CRC32C of body and of footer, magic
_ENTRY = np.dtype([("object", "<i8"), ("offset", "<i8"), ("nbytes", "<i8"), ("place", "<i8")])
_MOST_WAITING = 8  # segments that wait in memory while others are written
_MOST_MAPS = 4096
_MAPPED = 256 << 20  # bytes looked at before pages are handed back to the page cache
_TOUCHED = 60.0  # seconds between two notes that a segment is in use
_LEFT_OVER = 3600.0  # seconds after which an unfinished file is one of a process that was killed
_LOOKED = 2.0  # seconds between two looks at what other processes have added


@dataclass(slots=True)
class _Pending:
    """Chunks that wait to be written, and the memory that holds them."""

    number: np.ndarray
    offset: np.ndarray
    nbytes: np.ndarray
    address: np.ndarray
    owner: object


class ChunkCache:
    """The cache in a folder, as one process sees it. It can be used from many threads.

    Parameters
    ----------
    folder
        Made where it is missing.
    most
        Bytes that all segments may take; None: half of what is free and what the cache takes already.

    Attributes
    ----------
    claims
        Which thread brings which of the chunks that are not there.

    Raises
    ------
    OSError
        The folder cannot be made.
    ValueError
        `most` is less than a megabyte.
    """

    def __init__(self, folder: str | os.PathLike[str], most: int | None = None) -> None:
        self.folder = Path(folder).expanduser().absolute()
        if most is not None and most < 1 << 20:
            raise ValueError(f"a cache has 1,048,576 bytes or more, got {most}")
        self.folder.mkdir(parents=True, exist_ok=True)
        self._lock, self._writing = threading.Lock(), threading.Lock()
        self._objects: dict[str, int] = {}
        self._names: list[str] = []
        # Entries of all known segments, sorted by key; a segment that is gone has the number -1.
        self._keys = np.zeros(0, np.int64)
        self._sizes, self._places = np.zeros(0, np.int64), np.zeros(0, np.int64)
        self._segment_of = np.zeros(0, np.int32)
        self._segments: list[str] = []
        self._known: set[str] = set()
        self._maps: OrderedDict[int, FileMap] = OrderedDict()
        self._touched: dict[int, float] = {}
        self._pending: list[_Pending] = []
        self.claims = Claims()
        self._waiting = 0
        self._writes = False  # whether a thread was told to write what waits and has not begun
        self._looked_at = 0.0
        self._used = 0
        self.most = self._default_most() if most is None else most
        self._segment = min(SEGMENT, self.most // 8)
        self._look()

    # Finding

    def object_number(self, url: str, version: str, nbytes: int) -> int:
        """The number of an object in this process; another version is another object."""
        with self._lock:
            return self._number(json.dumps([url, version, nbytes]))

    def _number(self, name: str) -> int:
        number = self._objects.setdefault(name, len(self._objects))
        if number == len(self._names):
            self._names.append(name)
        return number

    def find(
        self, objects: np.ndarray, offset: np.ndarray, nbytes: np.ndarray
    ) -> tuple[np.ndarray, list[object]]:
        """Where chunks lie in memory.

        Parameters
        ----------
        objects, offset, nbytes
            int64, (k,). Numbers from :meth:`object_number`; places in the objects.

        Returns
        -------
        tuple
            uint64, (k,): addresses, 0 where a chunk is not in the cache; and what keeps the memory alive.
        """
        address = np.zeros(len(objects), np.uint64)
        owners: list[object] = []
        with self._lock:
            if time.monotonic() - self._looked_at > _LOOKED:
                self._look()
            keys = keys_of(objects, offset)
            self._find_pending(keys, nbytes, address, owners)
            if not len(self._keys):
                return address, owners
            at = np.minimum(np.searchsorted(self._keys, keys), len(self._keys) - 1)
            hit = (self._keys[at] == keys) & (self._sizes[at] == nbytes) & (nbytes > 0) & (address == 0)
            segment = np.where(hit, self._segment_of[at], -1)
            for number in np.unique(segment[segment >= 0]).tolist():
                mapped = self._map(number)
                if mapped is None:
                    continue
                mine = segment == number
                address[mine] = np.uint64(mapped.address) + self._places[at[mine]].astype(np.uint64)
                owners.append(mapped)
            self._used += int(nbytes[address > 0].sum())
            if self._used > _MAPPED:
                self._used = 0
                for mapped in self._maps.values():
                    mapped.hand_back()
        return address, owners

    def has(self, objects: np.ndarray, offset: np.ndarray) -> np.ndarray:
        """bool, (k,): whether chunks are in the cache, as far as this process knows; as for :meth:`find`."""
        keys = keys_of(objects, offset)
        with self._lock:
            found = np.isin(keys, self._keys)
            for pending in self._pending:
                found |= np.isin(keys, keys_of(pending.number, pending.offset))
        return found

    def _find_pending(
        self, keys: np.ndarray, nbytes: np.ndarray, address: np.ndarray, owners: list[object]
    ) -> None:
        for pending in self._pending:
            known = keys_of(pending.number, pending.offset)
            order = np.argsort(known)
            at = order[np.minimum(np.searchsorted(known[order], keys), len(known) - 1)]
            hit = (known[at] == keys) & (pending.nbytes[at] == nbytes) & (nbytes > 0)
            if hit.any():
                address[hit] = pending.address[at[hit]]
                owners.append(pending.owner)

    def _map(self, number: int) -> FileMap | None:
        """The map of a segment; None, and the segment forgotten, where it is gone or damaged."""
        mapped = self._maps.get(number)
        path = self.folder / self._segments[number]
        if mapped is None:
            try:
                mapped = FileMap(str(path))
                _verify(mapped)
            except (OSError, _DamagedError) as error:
                if isinstance(error, _DamagedError):
                    path.unlink(missing_ok=True)
                self._forget(number)
                return None
            self._maps[number] = mapped
            while len(self._maps) > _MOST_MAPS:
                self._maps.popitem(last=False)
        self._maps.move_to_end(number)
        now = time.monotonic()
        if now - self._touched.get(number, -_TOUCHED) >= _TOUCHED:
            self._touched[number] = now
            with contextlib.suppress(OSError):  # removed by another process; the map stays
                os.utime(path)
        return mapped

    def _forget(self, number: int) -> None:
        keep = self._segment_of != number
        self._keys, self._sizes = self._keys[keep], self._sizes[keep]
        self._places, self._segment_of = self._places[keep], self._segment_of[keep]
        self._known.discard(self._segments[number])

    def _look(self) -> None:
        """Enter the segments that other processes have added since the last look."""
        self._looked_at = time.monotonic()
        for entry in sorted(_entries(self.folder), key=lambda entry: entry.name):
            if entry.name.endswith(".chunks") and entry.name not in self._known:
                self._known.add(entry.name)
                try:
                    names, entries = _read_footer(Path(entry.path))
                except (OSError, _DamagedError):
                    continue
                self._enter(entry.name, names, entries)

    def _enter(self, name: str, names: Sequence[str], entries: np.ndarray) -> None:
        numbers = np.array([self._number(one) for one in names], np.int64)
        self._known.add(name)
        self._segments.append(name)
        keys = keys_of(numbers[entries["object"]], entries["offset"])
        order = np.argsort(merged := np.concatenate([self._keys, keys]), kind="stable")
        self._keys = merged[order]
        self._sizes = np.concatenate([self._sizes, entries["nbytes"]])[order]
        self._places = np.concatenate([self._places, entries["place"]])[order]
        mine = np.full(len(keys), len(self._segments) - 1, np.int32)
        self._segment_of = np.concatenate([self._segment_of, mine])[order]

    # Adding

    def add(
        self,
        objects: np.ndarray,
        offset: np.ndarray,
        nbytes: np.ndarray,
        address: np.ndarray,
        owner: object,
    ) -> None:
        """Keep chunks that lie in memory; they are written once there are enough of them.

        Parameters
        ----------
        objects, offset, nbytes
            As for :meth:`find`.
        address
            uint64, (k,). Where the chunks lie.
        owner
            Keeps that memory alive.
        """
        keys = keys_of(objects, offset)
        _, first = np.unique(keys, return_index=True)
        first = first[(nbytes[first] > 0) & (objects[first] < MOST_OBJECTS)]
        if not len(first):
            return
        with self._lock:
            self._pending.append(
                _Pending(objects[first], offset[first], nbytes[first], address[first], owner)
            )
            self._waiting += int(nbytes[first].sum())
            waiting, writes = self._waiting, self._writes
            if waiting < self._segment:
                return
            self._writes = True
        if waiting > _MOST_WAITING * self._segment:
            self.flush()  # the disk is slower than the store: go on as fast as it does
        elif not writes:
            # What waits is found all the same, so a batch is made while its chunks are written.
            threading.Thread(target=self.flush, name="hbx_gpu-cache").start()

    def flush(self) -> None:
        """Write what waits to be written. A disk that is full is no error: the cache stays as it is."""
        with self._writing:
            with self._lock:
                self._writes = False  # what is added from now on needs another look
            self._flush()

    def _flush(self) -> None:
        with self._lock:
            pending = list(self._pending)
            names = list(self._names)
        if not pending:
            return
        for part in self._parts(pending):
            written = self._write(part, names)
            if written is None:
                break
            with self._lock:
                self._enter(*written)
        with self._lock:
            # Others may have been added, or written by another thread, meanwhile.
            done = set(map(id, pending))
            self._pending = [one for one in self._pending if id(one) not in done]
            self._waiting = sum(int(one.nbytes.sum()) for one in self._pending)

    def _parts(self, pending: Sequence[_Pending]) -> list[list[_Pending]]:
        """What goes into one segment each: about as many bytes as one has."""
        parts: list[list[_Pending]] = [[]]
        size = 0
        for one in pending:
            piece = np.cumsum(one.nbytes) // self._segment
            for cut in np.split(np.arange(len(piece)), np.flatnonzero(np.diff(piece)) + 1):
                nbytes = int(one.nbytes[cut].sum())
                if size and size + nbytes > 2 * self._segment:
                    parts.append([])
                    size = 0
                size += nbytes
                parts[-1].append(
                    _Pending(one.number[cut], one.offset[cut], one.nbytes[cut], one.address[cut], one.owner)
                )
        return parts

    def _write(
        self, part: Sequence[_Pending], names: Sequence[str]
    ) -> tuple[str, list[str], np.ndarray] | None:
        objects = np.concatenate([one.number for one in part])
        entries = np.empty(len(objects), _ENTRY)
        used, entries["object"] = np.unique(objects, return_inverse=True)
        entries["offset"] = np.concatenate([one.offset for one in part])
        entries["nbytes"] = np.concatenate([one.nbytes for one in part])
        room = -(-entries["nbytes"] // _ALIGNMENT) * _ALIGNMENT
        entries["place"] = np.cumsum(room) - room
        body = np.zeros(int(room.sum()), np.uint8)
        address = np.concatenate([one.address for one in part]).tolist()
        for place, nbytes, source in zip(
            entries["place"].tolist(), entries["nbytes"].tolist(), address, strict=True
        ):
            body[place : place + nbytes] = _view(source, nbytes)
        mine = [names[number] for number in used.tolist()]
        header = json.dumps(mine).encode()
        footer = struct.pack("<Q", len(header)) + header + entries.tobytes()
        trailer = _TRAILER.pack(len(footer), crc32c(body), crc32c(footer), _MAGIC)
        self._make_room(len(body) + len(footer) + len(trailer))
        name = uuid.uuid4().hex
        unfinished, path = self.folder / f".{name}.new", self.folder / f"{name}.chunks"
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            with open(unfinished, "xb") as file:
                file.write(body.data)
                file.write(footer)
                file.write(trailer)
            os.replace(unfinished, path)
        except OSError:
            with contextlib.suppress(OSError):
                unfinished.unlink(missing_ok=True)
            return None
        return path.name, mine, entries

    def _make_room(self, nbytes: int) -> None:
        """Remove the segments that were used longest ago until a new one fits; and what was left over."""
        found, now = [], time.time()
        for entry in _entries(self.folder):
            try:
                stat = entry.stat(follow_symlinks=False)
            except OSError:
                continue
            if entry.name.endswith(".chunks"):
                found.append((stat.st_mtime, stat.st_size, entry.path))
            elif entry.name.endswith(".new") and now - stat.st_mtime > _LEFT_OVER:
                Path(entry.path).unlink(missing_ok=True)
        total = sum(size for _, size, _ in found) + nbytes
        for _, size, path in sorted(found):
            if total <= self.most:
                break
            Path(path).unlink(missing_ok=True)
            total -= size

    def _default_most(self) -> int:
        taken = sum(entry.stat().st_size for entry in os.scandir(self.folder) if entry.is_file())
        free = shutil.disk_usage(self.folder).free
        if free + taken < 4 << 20:
            raise ResourceError(
                f"the disk of {self.folder} has no room for a cache: {free:,} bytes are free; choose another "
                "folder, or make room"
            )
        return (free + taken) // 2


class _DamagedError(Exception):
    """A file of the cache is not what was written."""


def _entries(folder: Path) -> list[os.DirEntry[str]]:
    """What is in the folder; nothing where it cannot be listed, or somebody has removed it meanwhile."""
    try:
        with os.scandir(folder) as entries:
            return list(entries)
    except OSError:
        return []


def _view(address: int, nbytes: int) -> np.ndarray:
    """Memory that the caller keeps alive."""
    return np.asarray(Memory(address, nbytes, None))


def _read_footer(path: Path) -> tuple[list[str], np.ndarray]:
    with open(path, "rb") as file:
        size = os.fstat(file.fileno()).st_size
        tail = os.pread(file.fileno(), _TRAILER.size, max(0, size - _TRAILER.size))
        length, checksum = _unpacked(tail, size)
        footer = os.pread(file.fileno(), length, size - _TRAILER.size - length)
    if len(footer) != length or crc32c(footer) != checksum:
        raise _DamagedError
    header = int.from_bytes(footer[:8], "little")
    names = json.loads(footer[8 : 8 + header])
    return names, np.frombuffer(footer[8 + header :], _ENTRY)


def _unpacked(tail: bytes, size: int) -> tuple[int, int]:
    if len(tail) != _TRAILER.size:
        raise _DamagedError
    length, _, checksum, magic = _TRAILER.unpack(tail)
    if magic != _MAGIC or length > size:
        raise _DamagedError
    return length, checksum


def _verify(mapped: FileMap) -> None:
    """Compare the body of a segment with its checksum."""
    whole = _view(mapped.address, mapped.nbytes) if mapped.nbytes else np.zeros(0, np.uint8)
    length, _ = _unpacked(whole[-_TRAILER.size :].tobytes(), len(whole))
    checksum = _TRAILER.unpack(whole[-_TRAILER.size :].tobytes())[1]
    if crc32c(whole[: len(whole) - _TRAILER.size - length]) != checksum:
        raise _DamagedError


_caches: dict[tuple[int, str], ChunkCache] = {}
_caches_lock = threading.Lock()


def cache_at(folder: str, most: int | None = None) -> ChunkCache:
    """The cache in a folder, one object per process; what waits is written when the process ends."""
    key = (os.getpid(), str(Path(folder).expanduser().absolute()))
    with _caches_lock:
        if key not in _caches:
            made = _caches[key] = ChunkCache(folder, most)
            # Also runs in workers, where atexit does not.
            util.Finalize(None, made.flush, exitpriority=10)
        if most is not None:
            _caches[key].most = most
        return _caches[key]
