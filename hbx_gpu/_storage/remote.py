"""Reader of chunks in object storage: ranges of objects, many at once, into one buffer per window."""

from __future__ import annotations

import threading
import time
from concurrent.futures import ThreadPoolExecutor

import numpy as np

from hbx_gpu._remote import stores
from hbx_gpu._remote.fetch import Fetcher, Moved, Range, map_at_once
from hbx_gpu._remote.link import link_of
from hbx_gpu._remote.options import cache_of
from hbx_gpu._remote.places import Place
from hbx_gpu._remote.stores import ObjectInfo
from hbx_gpu._storage.cache import ChunkCache, cache_at
from hbx_gpu._storage.chunks import CHANGED, ChunkDirectory, Extents
from hbx_gpu._storage.held import HeldChunks, Kept
from hbx_gpu._storage.readers import Reader, Runs, Slab, coalesce
from hbx_gpu.errors import RemoteError, ReplacedError
from hbx_gpu.loader_stats import count_remote, in_window

_ALIGNMENT = 8
_OFFSET_BITS = 40  # of the number that stands for a place in a file
_PIECE = 16 << 20  # bytes of chunks that come and are kept together
# Bytes between chunks that are read over though a request would cost less, where what lies between is kept:
# a later window mostly needs it.
_KEPT_GAP = 64 << 10
_PIECES = 16  # pieces that are on their way at a time
# Seconds between two looks at an object that is held in memory: a look takes about a twentieth of that.
_LOOK = 6e-3


class RemoteReader(Reader):
    """Reader that asks a store for the ranges that a plan needs.

    Neighboring extents come in one request where the gap between them costs less than a request, as the
    requests of this process are measured. Every request names the version of the object whose chunks were
    looked up, so that a replaced object is an error and never mixes with the old one.

    Windows of a loader mostly need chunks that earlier windows needed. They are kept in the cache on the
    local disk if there is one, and otherwise in memory, up to a bound.

    Parameters
    ----------
    directory
        Where the chunks lie.
    fetcher
        Makes the requests.
    cache
        Keeps chunks on the local disk; None: the one that was chosen where the data were opened, if any.
    """

    def __init__(
        self, directory: ChunkDirectory, *, fetcher: Fetcher | None = None, cache: ChunkCache | None = None
    ) -> None:
        super().__init__(directory)
        self._fetcher = fetcher or Fetcher()
        self._cache = cache or _cache_of(directory)
        self._kept: Kept = self._cache or HeldChunks()
        self._numbers = np.zeros(0, np.int64)  # of the objects among those that are kept, by file
        self._lock = threading.Lock()
        self._looked_at = 0.0

    @property
    def cache(self) -> ChunkCache | None:
        """The cache that keeps the chunks of this reader."""
        return self._cache

    def bring(self, extents: Extents) -> int:
        """Read extents, and return the bytes that came for them from the store."""
        return self._read(extents)[1].nbytes

    def read(self, extents: Extents) -> Slab:
        """See :class:`Reader`."""
        return self._read(extents)[0]

    def _read(self, extents: Extents) -> tuple[Slab, Moved]:
        stored = extents.nbytes > 0
        wanted = int(extents.nbytes[stored].sum())
        if self._cache is None and not in_window():
            address, buffer, moved = self._fetched(extents)
            count_remote(requests=moved.requests, wanted=wanted, moved=moved.nbytes)
            return Slab(address, extents.nbytes, buffer), moved
        objects = self._objects(extents)
        address, owners = self._kept.find(objects, extents.offset, extents.nbytes)
        missing = stored & (address == 0)
        moved = Moved(0, 0)
        if missing.any():
            moved = self._bring_missing(extents, missing, address, owners)
        if self._cache is None:
            moved = Moved(moved.requests + self._look_at_held(extents, stored & ~missing), moved.nbytes)
        count_remote(
            requests=moved.requests,
            wanted=wanted,
            moved=moved.nbytes,
            cache_hits=int((stored & ~missing).sum()),
            cache_misses=int(missing.sum()),
        )
        return Slab(address, extents.nbytes, owners), moved

    def _look_at_held(self, extents: Extents, held: np.ndarray) -> int:
        """Check that objects with chunks in memory are still there; returns the number of requests.

        A request for bytes of an object would say so, and there may be none for a long time. Looks are as
        frequent as they can be without costing much time.
        """
        files = np.unique(extents.file[held]).tolist()
        with self._lock:
            now = time.monotonic()
            if not files or now - self._looked_at < len(files) * _LOOK:
                return 0
            self._looked_at = now
        try:
            found = map_at_once(lambda file: stores.head(Place(self.directory.paths[file])), files)
        except RemoteError:  # what is held is right; the next request for bytes says what is wrong
            return len(files)
        for file, info in zip(files, found, strict=True):
            if info is None:
                raise self._gone(extents, file)
            if (info.version, info.nbytes) != self.directory.identities[file]:
                raise self._error_in(extents, file, CHANGED)
        return len(files)

    def _bring_missing(
        self, extents: Extents, missing: np.ndarray, address: np.ndarray, owners: list[object]
    ) -> Moved:
        """Bring chunks that are not kept, each by one thread; fills in addresses and owners.

        Chunks in the gaps that are read over are kept too: their bytes come anyway, and a later batch
        probably needs them.
        """
        n = int(missing.sum())
        part = _joined(_some(extents, missing), self._in_gaps(_some(extents, missing)))
        numbers, places = self._objects(part), np.zeros(len(part), np.uint64)
        mine, claim, others = self._kept.claims.claim(numbers, part.offset)
        try:
            moved = self._add(part, numbers, np.flatnonzero(mine), places, owners)
        finally:
            self._kept.claims.release(claim)
        rest = np.flatnonzero(~mine[:n])
        if len(rest):
            for other in others:
                other.done.wait()
            found, more = self._kept.find(numbers[rest], part.offset[rest], part.nbytes[rest])
            places[rest] = found
            owners += more
            # What the other thread could not bring, or what was pushed out at once.
            again = self._add(part, numbers, rest[found == 0], places, owners)
            moved = Moved(moved.requests + again.requests, moved.nbytes + again.nbytes)
        address[missing] = places[:n]
        return moved

    def _in_gaps(self, wanted: Extents) -> Extents:
        """The chunks between wanted ones that their requests read over, and that are not kept."""
        runs = self._runs(wanted, _KEPT_GAP)
        between = self.directory.extents(
            self.directory.within(runs.file, runs.offset, runs.offset + runs.nbytes)
        )
        # Chunks of one object that begin at the same byte are the same bytes.
        lacking = ~np.isin(_starts(between), _starts(wanted))
        asked = _some(between, lacking)
        lacking[lacking] = ~self._kept.has(self._objects(asked), asked.offset)
        return _some(between, lacking)

    def _add(
        self,
        extents: Extents,
        objects: np.ndarray,
        which: np.ndarray,
        address: np.ndarray,
        owners: list[object],
    ) -> Moved:
        """Fetch extents, keep them, and fill in where they lie.

        They come in pieces, side by side, and each is kept as soon as it is there: a cache is written while
        the rest is on its way.
        """
        if not len(which):
            return Moved(0, 0)

        def bring(piece: np.ndarray) -> Moved:
            part = _some(extents, piece)
            found, buffer, moved = self._fetched(part, _KEPT_GAP)
            self._kept.add(objects[piece], part.offset, part.nbytes, found, buffer)
            address[piece] = found
            owners.append(buffer)
            return moved

        pieces = _pieces(extents, which)
        if len(pieces) == 1:
            return bring(pieces[0])
        with ThreadPoolExecutor(min(len(pieces), _PIECES), thread_name_prefix="hbx_gpu-pieces") as pool:
            brought = list(pool.map(bring, pieces))
        return Moved(sum(m.requests for m in brought), sum(m.nbytes for m in brought))

    def _objects(self, extents: Extents) -> np.ndarray:
        """Number of the object of each extent among those that are kept."""
        known, there = len(self._numbers), len(self.directory.identities)
        if known < there:
            more = [
                self._kept.object_number(path, str(version), size)
                for path, (version, size) in zip(
                    self.directory.paths[known:there], self.directory.identities[known:there], strict=True
                )
            ]
            self._numbers = np.concatenate([self._numbers[:known], np.array(more, np.int64)])
        result: np.ndarray = self._numbers[np.maximum(extents.file, 0)]
        return result

    def _fetched(self, extents: Extents, least_gap: int = 0) -> tuple[np.ndarray, np.ndarray, Moved]:
        """Extents in a new buffer: their addresses, the buffer, and what it took."""
        address = np.zeros(len(extents), np.uint64)
        if not (extents.nbytes > 0).any():
            return address, np.zeros(0, np.uint8), Moved(0, 0)
        runs = self._runs(extents, least_gap)
        shift = runs.offset % _ALIGNMENT
        room = -(-(shift + runs.nbytes) // _ALIGNMENT) * _ALIGNMENT
        place = np.cumsum(room) - room + shift
        buffer = np.empty(int(room.sum()), np.uint8)
        ranges, targets = [], []
        for file, offset, nbytes, at in zip(
            runs.file.tolist(), runs.offset.tolist(), runs.nbytes.tolist(), place.tolist(), strict=True
        ):
            version, size = self.directory.identities[file]
            info = ObjectInfo(size, str(version))
            ranges.append(Range(Place(self.directory.paths[file]), offset, offset + nbytes, info))
            targets.append(buffer[at : at + nbytes])
        moved = self._bring(extents, ranges, targets)
        stored = runs.run >= 0
        run = runs.run[stored]
        inside = extents.offset[stored] - runs.offset[run] + place[run]
        address[stored] = np.uint64(buffer.ctypes.data) + inside.astype(np.uint64)
        return address, buffer, moved

    def _runs(self, extents: Extents, least_gap: int) -> Runs:
        """The requests that bring extents, of which some have bytes; gaps up to `least_gap` are read over."""
        first = int(extents.file[extents.nbytes > 0][0])
        link = link_of(Place(self.directory.paths[first]).root)
        wanted = int(np.maximum(extents.nbytes, 0).sum())
        return coalesce(
            extents.file,
            extents.offset,
            extents.nbytes,
            max_gap=max(link.gap(), least_gap),
            max_size=link.size(wanted),
        )

    def close(self) -> None:
        """See :class:`Reader`; what waits to be written to the cache is written."""
        self._kept.flush()

    def _bring(self, extents: Extents, ranges: list[Range], targets: list[np.ndarray]) -> Moved:
        try:
            return self._fetcher.into(ranges, targets)
        except (ReplacedError, FileNotFoundError) as error:
            file = next(
                (f for f in np.unique(extents.file).tolist() if self.directory.paths[f] in str(error)),
                int(extents.file[extents.nbytes > 0][0]),
            )
            if isinstance(error, FileNotFoundError):
                raise self._gone(extents, file) from None
            raise self._error_in(extents, file, CHANGED) from None


def _some(extents: Extents, which: np.ndarray) -> Extents:
    """Some of the extents, by number or by mask."""
    return Extents(extents.file[which], extents.offset[which], extents.nbytes[which])


def _pieces(extents: Extents, which: np.ndarray) -> list[np.ndarray]:
    """Numbers of extents, in the order of their places, in pieces of about `_PIECE` bytes."""
    order = which[np.lexsort((extents.offset[which], extents.file[which]))]
    cuts = np.flatnonzero(np.diff(np.cumsum(np.maximum(extents.nbytes[order], 0)) // _PIECE)) + 1
    return np.split(order, cuts)


def _joined(one: Extents, other: Extents) -> Extents:
    """All extents of both."""
    return Extents(
        np.concatenate([one.file, other.file]),
        np.concatenate([one.offset, other.offset]),
        np.concatenate([one.nbytes, other.nbytes]),
    )


def _starts(extents: Extents) -> np.ndarray:
    """A number for the file and the first byte of each extent.

    Where two numbers agree by chance, in a file of more than a terabyte, a chunk in a gap is not kept.
    """
    found: np.ndarray = extents.file.astype(np.int64) << _OFFSET_BITS | extents.offset
    return found


def _cache_of(directory: ChunkDirectory) -> ChunkCache | None:
    """The cache that was chosen where the arrays of a directory were opened."""
    chosen = next(filter(None, (cache_of(layout.path) for layout in directory.layouts)), None)
    return None if chosen is None else cache_at(*chosen)
