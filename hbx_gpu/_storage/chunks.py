"""The chunk directory: it numbers the chunks of many arrays, and knows where each chunk lies on disk.

Shard indexes and object sizes are read when a chunk of theirs is first needed; chunks themselves are not read
here.
"""

from __future__ import annotations

import itertools
import math
import threading
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from hbx_gpu._codecs.checksum import crc32c
from hbx_gpu._remote.fetch import map_at_once
from hbx_gpu._remote.places import is_remote
from hbx_gpu._source import ArrayLayout
from hbx_gpu._storage.file_identity import Found, Identity, look, read_end
from hbx_gpu._storage.metadata import is_current, object_path
from hbx_gpu._untrusted import Within
from hbx_gpu.errors import CorruptChunkError, CorruptDataError, UnsupportedCodecError

_ABSENT = np.uint64(2**64 - 1)
# Sizes are stored plus 2, so that 0, the content of freshly allocated pages, means "not looked up yet". A
# table of 10^7 chunks then takes physical memory only for the entries that were written.
_BIAS = 2
CHANGED = (
    "the file was changed by another program after this dataset was opened; open the dataset again when "
    "nobody writes to the file"
)
REPLACED = (
    "the array was replaced by another one after this dataset was opened, for example by hbx-gpu repack; "
    "open the dataset again"
)


@dataclass(frozen=True, slots=True)
class Extents:
    """The places of k chunks in files.

    Attributes
    ----------
    file
        int32, (k,). Position in the directory's `paths`; -1 for an absent chunk.
    offset
        int64, (k,). First byte inside the file.
    nbytes
        int64, (k,). Stored size; -1 for an absent chunk, whose elements are all the fill value.
    share
        Part of the stored bytes that will be looked at, 0 to 1. The rest of a mapped file is not touched.
    """

    file: np.ndarray
    offset: np.ndarray
    nbytes: np.ndarray
    share: float = 1.0

    def __len__(self) -> int:
        return len(self.file)


class ChunkDirectory:
    """All chunks of many arrays under one global numbering, whether stored as objects or in plain files.

    Chunk ``base[a] + i`` is chunk i of array a, counted in C order over the array's grid of (inner)
    chunks, ``ceil(shape / chunk_shape)`` per axis. A directory can be used from many threads. Its pickle
    holds the layouts only, so that places of chunks are looked up again after unpickling.

    Parameters
    ----------
    layouts
        The arrays.

    Attributes
    ----------
    layouts
        The arrays, as a tuple of ArrayLayout.
    base
        int64, (n_arrays + 1,). First chunk number of each array; the last entry is the number of chunks.
    paths
        Files that chunks were found in so far. The list grows; its entries never change.
    identities
        Identity of each file when its chunks were looked up.
    is_remote
        Whether arrays lie in object storage.

    Raises
    ------
    UnsupportedCodecError
        A shard index is encoded in another way than ``bytes``, or ``bytes`` and ``crc32c``.
    """

    def __init__(self, layouts: Sequence[ArrayLayout]) -> None:
        self.layouts = tuple(layouts)
        self._index_formats = [_index_format(layout) if layout.sharded else None for layout in layouts]
        self._grids = [chunk_grid(layout) for layout in layouts]
        self._within = {within: Within(within) for within in {layout.within for layout in layouts}}
        self.base = np.zeros(len(self.layouts) + 1, np.int64)
        np.cumsum([math.prod(grid) for grid in self._grids], out=self.base[1:])
        self.paths: list[str] = []
        self.identities: list[Identity] = []
        self._remote = [is_remote(layout.path) for layout in layouts]
        self.is_remote = any(self._remote)
        self._objects: list[tuple[int, tuple[int, ...]]] = []  # (array, grid coordinates) per file
        try:
            self._file = np.zeros(self.base[-1], np.int32)
            self._offset = np.zeros(self.base[-1], np.int64)
            self._nbytes = np.zeros(self.base[-1], np.int64)
        except MemoryError:
            raise self._too_many() from None
        self._lock = threading.Lock()
        # The place of a chunk in a plain file follows from its number, so only the file of each array is
        # kept.
        self._is_plain = np.array([layout.byte_offset is not None for layout in layouts], bool)
        self._plain_file = np.full(len(self.layouts), -1, np.int32)
        self._begin = np.array([layout.byte_offset or 0 for layout in layouts], np.int64)
        self._stored = np.array([math.prod(la.chunk_shape) * la.dtype.itemsize for la in layouts], np.int64)
        sizes = [math.prod(layout.shape) * layout.dtype.itemsize for layout in layouts]
        self._end = self._begin + np.array(sizes, np.int64)
        self._watched = np.array([layout.watched for layout in layouts], bool)
        self._any_plain, self._any_watched = bool(self._is_plain.any()), bool(self._watched.any())
        self._has_skips = any(la.table is not None and la.table.skipped is not None for la in layouts)

    def __reduce__(self) -> tuple[object, ...]:
        return (ChunkDirectory, (self.layouts,))

    def _too_many(self) -> CorruptDataError:
        largest = int(np.diff(self.base).argmax())
        layout = self.layouts[largest]
        return CorruptDataError(
            f"there is no memory for a table of {int(self.base[-1]):,} chunks. Most are of array "
            f"{layout.name!r} (shape {list(layout.shape)}, chunks of {list(layout.chunk_shape)}, in "
            f"{layout.path}): its metadata are damaged, or it has to be stored in larger chunks"
        )

    def extents(self, chunk_ids: np.ndarray, share: float = 1.0) -> Extents:
        """Look up where chunks lie.

        Parameters
        ----------
        chunk_ids
            int64, (k,). Any order, repeats allowed.
        share
            As in `Extents`.

        Raises
        ------
        CorruptChunkError
            A shard index is cut short, fails its checksum or points outside its file; an object is absent
            although its array has `absent_is_fill` False; or an array was replaced by another one after its
            layout was read.
        IndexError
            A number is not the number of a chunk of this directory.
        """
        ids = np.asarray(chunk_ids, np.int64)
        if len(ids) and not (0 <= ids.min() and ids.max() < self.base[-1]):
            raise IndexError(
                f"chunk numbers must be in 0..{self.base[-1] - 1}, found {ids.min()}..{ids.max()}"
            )
        if not self._any_plain and not self._any_watched:
            return self._looked_up(ids, share)
        array = np.searchsorted(self.base, ids, "right") - 1
        if self._any_watched:
            self._check_unchanged(array)
        plain = self._is_plain[array]
        if plain.all():
            return self._computed(ids, array, share)
        file, offset = np.empty(len(ids), np.int32), np.empty(len(ids), np.int64)
        nbytes = np.empty(len(ids), np.int64)
        for part, found in (
            (plain, self._computed(ids[plain], array[plain])),
            (~plain, self._looked_up(ids[~plain])),
        ):
            file[part], offset[part], nbytes[part] = found.file, found.offset, found.nbytes
        return Extents(file, offset, nbytes, share)

    def skipped_filters(self, chunk_id: int) -> int:
        """Return the filters that a chunk did not go through, as bits; 0 for nearly all chunks."""
        if not self._has_skips:
            return 0
        array, number = self._split(chunk_id)
        table = self.layouts[array].table
        return 0 if table is None or table.skipped is None else int(table.skipped[number])

    def _check_unchanged(self, array: np.ndarray) -> None:
        """Raise an error where a file changed after it was opened; each file is checked once per call."""
        seen = set()
        for a in np.unique(array[self._watched[array]]).tolist():
            layout = self.layouts[a]
            if layout.path not in seen and not is_current(layout):
                raise CorruptChunkError(CHANGED, file=layout.path, array=layout.name)
            seen.add(layout.path)

    def _looked_up(self, ids: np.ndarray, share: float = 1.0) -> Extents:
        """Return extents of chunks that are stored as objects, from the table."""
        nbytes = self._nbytes[ids]
        if not nbytes.all():
            with self._lock:
                self._load(ids[self._nbytes[ids] == 0])
            nbytes = self._nbytes[ids]
        return Extents(self._file[ids], self._offset[ids], nbytes - _BIAS, share)

    def _computed(self, ids: np.ndarray, array: np.ndarray, share: float = 1.0) -> Extents:
        """Compute extents of chunks of plain files; `array` is the array number of each chunk."""
        file = self._plain_file[array]
        if len(file) and file.min() < 0:
            with self._lock:
                for a in np.unique(array[file < 0]).tolist():
                    self._open_plain(a)
            file = self._plain_file[array]
        stored = self._stored[array]
        offset = self._begin[array] + (ids - self.base[array]) * stored
        return Extents(file, offset, np.minimum(stored, self._end[array] - offset), share)

    def within(self, file: np.ndarray, begin: np.ndarray, end: np.ndarray) -> np.ndarray:
        """Chunks that lie inside byte ranges of files that were looked up.

        Parameters
        ----------
        file, begin, end
            Integers, (k,). Ranges that do not overlap, in ascending order of (file, begin).

        Returns
        -------
        ndarray
            int64, ascending. Global numbers of the chunks all of whose bytes are in one range.
        """
        found = [np.zeros(0, np.int64)]
        for number in np.unique(file).tolist():
            mine = file == number
            first, last = begin[mine], end[mine]
            array, where = self._objects[number]
            if self._is_plain[array]:
                stored, at = int(self._stored[array]), int(self._begin[array])
                bounds = zip(-((at - first) // stored), (last - at) // stored + 1, strict=True)
                ids = self.base[array] + np.concatenate([np.arange(*pair) for pair in bounds])
                ids = ids[ids < self.base[array + 1]]
            else:
                ids, _ = self._chunks_of_object(array, where)
            extents = self.extents(ids)
            span = np.maximum(np.searchsorted(first, extents.offset, "right") - 1, 0)
            inside = (extents.file == number) & (extents.nbytes > 0) & (extents.offset >= first[span])
            found.append(ids[inside & (extents.offset + extents.nbytes <= last[span])])
        return np.unique(np.concatenate(found))

    def locate(self, chunk_id: int) -> tuple[str, str, int]:
        """Return (path of the object, name of the array, chunk number inside the array) for a chunk."""
        array, number = self._split(chunk_id)
        layout = self.layouts[array]
        return object_path(layout, self._object_of(array, number)), layout.name, number

    def error(self, chunk_id: int, reason: str | Exception) -> CorruptChunkError:
        """Make the error to raise for a chunk; the reason may be an error of its codec."""
        file, array, number = self.locate(chunk_id)
        what = reason.reason if isinstance(reason, CorruptChunkError) else str(reason)
        return CorruptChunkError(what, file=file, array=array, chunk=number)

    def error_at(self, file: int, offset: int, nbytes: int, reason: str) -> CorruptChunkError:
        """Make the error to raise for an extent."""
        array, where = self._objects[file]
        if self._is_plain[array]:
            number = int(offset - self._begin[array]) // int(self._stored[array])
            return self.error(int(self.base[array]) + number, reason)
        ids, _ = self._chunks_of_object(array, where)
        hits = np.flatnonzero(
            (self._file[ids] == file) & (self._offset[ids] == offset) & (self._nbytes[ids] == nbytes + _BIAS)
        )
        if len(hits):
            return self.error(int(ids[hits[0]]), reason)
        return CorruptChunkError(reason, file=self.paths[file], array=self.layouts[array].name)

    def _split(self, chunk_id: int) -> tuple[int, int]:
        if not 0 <= chunk_id < self.base[-1]:
            raise IndexError(f"chunk numbers must be in 0..{self.base[-1] - 1}, found {chunk_id}")
        array = int(np.searchsorted(self.base, chunk_id, "right")) - 1
        return array, int(chunk_id - self.base[array])

    def _object_of(self, array: int, number: int) -> tuple[int, ...]:
        """Return the grid coordinates of the stored object that holds a chunk."""
        per_object = _chunks_per_object(self.layouts[array])
        coordinates = np.unravel_index(number, self._grids[array]) if self._grids[array] else ()
        return tuple(int(c) // n for c, n in zip(coordinates, per_object, strict=True))

    def _chunks_of_object(
        self, array: int, where: tuple[int, ...]
    ) -> tuple[np.ndarray, tuple[np.ndarray, ...]]:
        """Return the global numbers of the chunks inside an object, and their positions in its index.

        A shard may reach beyond the array's edge; its entries there are not chunks of the array.
        """
        grid = self._grids[array]
        if not grid:
            return self.base[array : array + 1], ()
        if self.layouts[array].table is not None:
            return np.arange(self.base[array], self.base[array + 1]), ()
        per_object = _chunks_per_object(self.layouts[array])
        inside = [np.arange(min(n, size - n * c)) for n, size, c in zip(per_object, grid, where, strict=True)]
        mesh = np.ix_(*inside)
        coordinates = [axis + n * c for axis, n, c in zip(mesh, per_object, where, strict=True)]
        number = sum(axis * stride for axis, stride in zip(coordinates, _c_strides(grid), strict=True))
        return self.base[array] + np.ravel(number), mesh

    def _load(self, ids: np.ndarray) -> None:
        """Fill the table for the objects that hold these chunks. The caller holds the lock."""
        arrays = np.searchsorted(self.base, ids, "right") - 1
        shards: list[tuple[int, tuple[int, ...]]] = []
        for array in np.unique(arrays).tolist():
            if self.layouts[array].table is not None:
                self._load_table(array)
                continue
            numbers = np.unique(ids[arrays == array] - self.base[array])
            per_object = np.array(_chunks_per_object(self.layouts[array]), np.int64)
            grid = self._grids[array]
            coordinates = np.stack(np.unravel_index(numbers, grid), axis=1) if grid else np.zeros((1, 0))
            if self.layouts[array].sharded:
                wanted = sorted(set(map(tuple, (coordinates // per_object).tolist())))
                if self._remote[array]:
                    shards += [(array, where) for where in wanted]
                    continue
                for where in wanted:
                    found = self._try_index(array, where)
                    self.check_current(array)
                    self._enter_shard(array, where, found)
            else:
                self._load_plain(array, numbers.tolist(), list(map(tuple, coordinates.tolist())))
        # Requests take long, so those of all arrays are made at once; what they brought is entered once it is
        # known that no array was replaced meanwhile.
        brought = map_at_once(lambda shard: self._try_index(*shard), shards)
        map_at_once(self.check_current, dict.fromkeys(array for array, _ in shards))
        for (array, where), found in zip(shards, brought, strict=True):
            self._enter_shard(array, where, found)

    def _try_index(
        self, array: int, where: tuple[int, ...]
    ) -> tuple[Identity, np.ndarray, np.ndarray] | None:
        """Read the index of a shard, None if there is no such object."""
        try:
            return self._read_index(array, object_path(self.layouts[array], where), where)
        except (FileNotFoundError, NotADirectoryError):
            return None

    def _enter_shard(
        self, array: int, where: tuple[int, ...], found: tuple[Identity, np.ndarray, np.ndarray] | None
    ) -> None:
        path = object_path(self.layouts[array], where)
        ids, entries = self._chunks_of_object(array, where)
        if found is None:
            self._absent(array, path, where, ids)
            return
        identity, offset, nbytes = found
        offset, nbytes = offset[entries].ravel(), nbytes[entries].ravel()
        self._file[ids] = np.where(nbytes >= 0, len(self.paths), -1)
        self._offset[ids] = offset
        self._enter(array, path, where, identity, ids, nbytes)

    def _load_table(self, array: int) -> None:
        """Enter all chunks of an array whose file lists them."""
        layout, mine = self.layouts[array], slice(self.base[array], self.base[array + 1])
        assert layout.table is not None
        found = self._looked_at(array)
        offset, nbytes = layout.table.offset, layout.table.nbytes
        outside = np.flatnonzero((nbytes >= 0) & ((offset < 0) | (offset > found.nbytes - nbytes)))
        if len(outside):
            number = int(outside[0])
            reason = (
                f"the file lists it at bytes {offset[number]} + {nbytes[number]} and holds {found.nbytes}; "
                "the file was cut short"
            )
            raise CorruptChunkError(reason, file=layout.path, array=layout.name, chunk=number)
        self._file[mine] = np.where(nbytes >= 0, len(self.paths), -1)
        self._offset[mine] = offset
        self._enter(array, layout.path, (), found.identity, mine, nbytes)

    def _load_plain(self, array: int, numbers: list[int], places: list[tuple[int, ...]]) -> None:
        paths = [object_path(self.layouts[array], where) for where in places]
        found = map_at_once(look, paths) if self._remote[array] else [look(path) for path in paths]
        self.check_current(array)
        for number, where, path, there in zip(numbers, places, paths, found, strict=True):
            chunk_id = self.base[array] + number
            if there is None:
                self._absent(array, path, where, chunk_id)
                continue
            self._within[self.layouts[array].within].check(path)
            self._file[chunk_id] = len(self.paths)
            self._enter(array, path, where, there.identity, chunk_id, there.nbytes)

    def _open_plain(self, array: int) -> None:
        """Enter the file of an array that is stored in a plain file. The caller holds the lock."""
        layout = self.layouts[array]
        if self._plain_file[array] >= 0:
            return
        found = self._looked_at(array)
        self.paths.append(layout.path)
        self.identities.append(found.identity)
        self._objects.append((array, ()))
        self._plain_file[array] = len(self.paths) - 1

    def _looked_at(self, array: int) -> Found:
        """The single file of an array, which is the one that its layout was made from."""
        layout = self.layouts[array]
        found = look(layout.path)
        if found is None:
            raise CorruptChunkError("the file is missing", file=layout.path, array=layout.name)
        self.check_current(array)
        return found

    @property
    def has_plain_files(self) -> bool:
        """Return whether any array is stored without compression in a plain file."""
        return self._any_plain

    def check_current(self, array: int) -> None:
        """Raise an error where an array was replaced after its layout was read.

        Call this after a file of the array was opened and before its content is used. Groups are replaced as
        a whole, so metadata that are unchanged at that point mean that the opened file belongs to the layout.

        Raises
        ------
        CorruptChunkError
            The array was replaced.
        """
        layout = self.layouts[array]
        if not is_current(layout, self._within[layout.within]):
            raise CorruptChunkError(REPLACED, file=layout.path, array=layout.name)

    def array_of(self, file: int) -> int:
        """Return the number of the array that a file belongs to."""
        return self._objects[file][0]

    def _enter(
        self,
        array: int,
        path: str,
        where: tuple[int, ...],
        identity: Identity,
        ids: int | slice | np.ndarray,
        nbytes: int | np.ndarray,
    ) -> None:
        self.paths.append(path)
        self.identities.append(identity)
        self._objects.append((array, where))
        # Sizes are written last: other threads, without the lock, take a non-zero size as "looked up".
        self._nbytes[ids] = nbytes + _BIAS

    def _absent(self, array: int, path: str, where: tuple[int, ...], ids: int | np.ndarray) -> None:
        if not self.layouts[array].absent_is_fill:
            raise self._object_error(array, path, where, "the object is missing")
        self._file[ids] = -1
        self._nbytes[ids] = _BIAS - 1

    def _read_index(
        self, array: int, path: str, where: tuple[int, ...]
    ) -> tuple[Identity, np.ndarray, np.ndarray]:
        """Return the identity of a shard, and offset and nbytes of its inner chunks in the shape of its grid.

        Offset and nbytes are int64; an absent chunk has 0 and -1.
        """
        layout = self.layouts[array]
        per_object = _chunks_per_object(layout)
        dtype, checked = self._index_formats[array] or ("<u8", False)
        size = 16 * math.prod(per_object) + 4 * checked
        self._within[layout.within].check(path)
        # The size of the index comes from the metadata, so less may come.
        raw, found = read_end(path, size, at_end=layout.index_at_end)
        file_size = found.nbytes
        if len(raw) < size:
            reason = f"the file holds {file_size} bytes, its shard index alone takes {size}"
            raise self._object_error(array, path, where, reason)
        if checked:
            raw, stored = raw[:-4], int.from_bytes(raw[-4:], "little")
            if crc32c(raw) != stored:
                reason = f"the shard index fails its CRC32C (stored {stored:#010x})"
                raise self._object_error(array, path, where, reason)
        index = np.frombuffer(raw, dtype).astype(np.uint64).reshape(*per_object, 2)
        offset, nbytes = index[..., 0], index[..., 1]
        absent = (offset == _ABSENT) & (nbytes == _ABSENT)
        limit = np.uint64(file_size)
        outside = ~absent & ((offset > limit) | (nbytes > limit - np.minimum(offset, limit)))
        if outside.any():
            entry = int(np.flatnonzero(outside)[0])
            reason = (
                f"entry {entry} of the shard index points to bytes {offset.flat[entry]} + "
                f"{nbytes.flat[entry]}, the file holds {file_size}"
            )
            raise self._object_error(array, path, where, reason)
        return (
            found.identity,
            np.where(absent, 0, offset).astype(np.int64),
            np.where(absent, -1, nbytes.astype(np.int64)),
        )

    def _object_error(self, array: int, path: str, where: tuple[int, ...], reason: str) -> CorruptChunkError:
        what = "shard" if self.layouts[array].sharded else "chunk"
        return CorruptChunkError(
            f"{what} {'.'.join(map(str, where)) or '0'}: {reason}", file=path, array=self.layouts[array].name
        )


def chunk_grid(layout: ArrayLayout) -> tuple[int, ...]:
    """Return the number of (inner) chunks per axis."""
    return tuple(-(-n // chunk) for n, chunk in zip(layout.shape, layout.chunk_shape, strict=True))


def _chunks_per_object(layout: ArrayLayout) -> tuple[int, ...]:
    return tuple(shard // chunk for shard, chunk in zip(layout.shard_shape, layout.chunk_shape, strict=True))


def _c_strides(grid: tuple[int, ...]) -> list[int]:
    return list(itertools.accumulate(grid[:0:-1], lambda a, b: a * b, initial=1))[::-1]


def _index_format(layout: ArrayLayout) -> tuple[str, bool]:
    """Return the dtype of the entries of a shard index, and whether a CRC32C follows them."""
    names = [codec["name"] for codec in layout.index_codecs]
    endian = (layout.index_codecs[0].get("configuration") or {}).get("endian") if names else None
    if names in (["bytes"], ["bytes", "crc32c"]) and endian in ("little", "big"):
        return ("<u8" if endian == "little" else ">u8"), len(names) == 2
    raise UnsupportedCodecError(
        f"array {layout.name!r}: shard index codecs {list(layout.index_codecs)}; bytes (little or big), with "
        "or without crc32c, can be read"
    )
