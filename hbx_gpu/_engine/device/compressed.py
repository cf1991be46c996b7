"""General codecs on a device: whose chunks are decompressed there, and the tables that say how.

Compressed streams cross one by one, each to a place of its own; a decompressor writes what they hold to
scratch in the arena, kernels copy stored streams and undo shuffles. What lies in scratch then is what a
decoder on the host would have returned.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from itertools import groupby

import numpy as np

from hbx_gpu._codecs.containers import ALGORITHMS, NO_SHUFFLE, STREAM, Compression, Contents, compression_of
from hbx_gpu._devices import say_once
from hbx_gpu._engine.device.backend import STREAM_ALIGNMENT, Backend
from hbx_gpu._engine.device.records import BLOCK
from hbx_gpu._engine.device.staged_plan import Cursor, Opened, round_up
from hbx_gpu._source import ArrayLayout
from hbx_gpu.errors import DeviceUnavailableError

_NOT_WRITTEN = -1  # what a state holds until a decompressor writes it

_LOG = logging.getLogger(__name__)


def chosen(layouts: Sequence[ArrayLayout], decode: str, backend: Backend) -> list[Compression | None]:
    """The compression of each array whose chunks are to be decompressed on the device; None for others.

    Raises
    ------
    DeviceUnavailableError
        ``decode="device"``, an array that it would be for, and no decompressor.
    """
    found = [compression_of(layout) if decode != "host" else None for layout in layouts]
    if decode == "auto":
        found = [c if c is not None and c.checksummed else None for c in found]
    if not any(found):
        return found
    try:
        backend.decompressor()
    except DeviceUnavailableError as missing:
        if decode == "device":
            name = next(layout.name for layout, c in zip(layouts, found, strict=True) if c)
            raise DeviceUnavailableError(
                f"decode='device' was asked for and array {name!r} would be decompressed there, but "
                f"{missing}. decode='auto' decodes on the host where there is no decompressor"
            ) from missing
        say_once(_LOG, logging.INFO, f"hbx_gpu decodes chunks of general codecs on the host: {missing}")
        return [None] * len(found)
    return found


def lay_out(jobs: np.ndarray, contents: Sequence[Contents], sizes: np.ndarray, cursor: Cursor) -> Opened:
    """Places and tables of chunks.

    Parameters
    ----------
    jobs
        int64, (n,). Chunks of the plan.
    contents
        Streams of each of these chunks.
    sizes
        int64, (n,). Decompressed bytes of each.
    cursor
        Hands out places in the staged bytes.
    """
    # Chunks of one compressor stand together, so that one call takes their streams.
    order = sorted(range(len(jobs)), key=lambda j: ALGORITHMS.index(contents[j].algorithm))
    jobs, sizes = jobs[order], sizes[order]
    contents = [contents[j] for j in order]
    # As bytes: NumPy would compare the fields of every array with those of the first.
    streams = np.concatenate([c.streams.view(np.uint8) for c in contents]).view(STREAM)
    owner = np.repeat(np.arange(len(jobs)), [len(c.streams) for c in contents])
    place = cursor.take_each(streams["nbytes"], STREAM_ALIGNMENT)

    scratch = Cursor(0)
    out = scratch.take_each(sizes, 16)
    shuffled = np.array([c.shuffle != NO_SHUFFLE for c in contents])
    landing = out.copy()
    landing[shuffled] = scratch.take_each(sizes[shuffled], 16)
    target = (landing[owner] + streams["target"]).astype(np.uint64)

    stored = streams["stored"]
    packed = np.flatnonzero(~stored)
    tables = {
        "streams": place[packed].astype(np.uint64),
        "stream_bytes": streams["nbytes"][packed].astype(np.uint64),
        "stream_targets": target[packed],
        "stream_sizes": streams["size"][packed].astype(np.uint64),
        "stream_actual": np.zeros(len(packed), np.uint64),
        "stream_states": np.full(len(packed), _NOT_WRITTEN, np.int32),
        "copies": _copies(place[stored], target[stored], streams["size"][stored]),
        "shuffles": np.concatenate(
            [np.empty(0, BLOCK)]
            + [
                _shuffles(contents[j], int(landing[j]), int(out[j]), int(sizes[j]))
                for j in np.flatnonzero(shuffled)
            ]
        ),
    }
    counts = {
        "streams": np.bincount(owner[packed], minlength=len(jobs)),
        "copies": np.bincount(owner[stored], minlength=len(jobs)),
        "shuffles": np.where(
            shuffled, [-(-n // max(1, c.block)) for n, c in zip(sizes, contents, strict=True)], 0
        ),
    }
    algorithms = [contents[j].algorithm for j in owner[packed].tolist()]
    calls, first = [], 0
    for algorithm, group in groupby(algorithms):
        n = len(list(group))
        calls.append((algorithm, first, n))
        first += n
    return Opened(
        tables, jobs, counts, calls, out, round_up(scratch.at, 16),
        streams["begin"], streams["nbytes"], place, owner,
    )  # fmt: skip


def _copies(place: np.ndarray, target: np.ndarray, nbytes: np.ndarray) -> np.ndarray:
    blocks = np.zeros(len(place), BLOCK)
    blocks["from"], blocks["to"], blocks["nbytes"], blocks["typesize"] = place, target, nbytes, 1
    return blocks


def _shuffles(contents: Contents, landing: int, out: int, nbytes: int) -> np.ndarray:
    begin = np.arange(0, nbytes, contents.block)
    blocks = np.zeros(len(begin), BLOCK)
    blocks["from"], blocks["to"] = landing + begin, out + begin
    blocks["nbytes"] = np.minimum(contents.block, nbytes - begin)
    blocks["typesize"], blocks["shuffle"] = contents.typesize, contents.shuffle
    return blocks
