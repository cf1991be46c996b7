"""The chunks of a stored array, decoded, and the metadata of the array in its new form."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np

from hbx_gpu._codecs.chain import ChunkCodec
from hbx_gpu._files import sync
from hbx_gpu._source import ArrayLayout, Codec
from hbx_gpu._storage.choice import open_reader
from hbx_gpu._storage.chunks import ChunkDirectory
from hbx_gpu._storage.readers import Slab
from hbx_gpu.atlas._writing.recoding import ATTRIBUTE, n_chunks
from hbx_gpu.errors import CorruptChunkError


def write_metadata(
    old: Path,
    new: Path,
    layout: ArrayLayout,
    codecs: list[Codec],
    about_order: Mapping[str, str] | None = None,
) -> None:
    """The array's own metadata, attributes and all, with another codec chain and news of its order."""
    document = json.loads(old.read_text(encoding="utf-8"))
    if about_order is not None:
        document["attributes"] = (document.get("attributes") or {}) | {ATTRIBUTE: dict(about_order)}
    if layout.sharded:
        sharding = document["codecs"][0]
        sharding["configuration"] |= {
            "codecs": codecs,
            "index_codecs": [{"name": "bytes", "configuration": {"endian": "little"}}, {"name": "crc32c"}],
            "index_location": "end",
        }
    else:
        document["codecs"] = codecs
    document["chunk_key_encoding"] = {"name": "default", "configuration": {"separator": "/"}}
    new.write_text(json.dumps(document, indent=2), encoding="utf-8")
    shutil.copymode(old, new)
    sync(new)


def decoded_chunks(
    layout: ArrayLayout, batch: int, pool: ThreadPoolExecutor
) -> Iterator[list[np.ndarray | None]]:
    """The chunks of an array, `batch` at a time; None for an absent one."""
    directory, codec = ChunkDirectory([layout]), ChunkCodec(layout)
    with open_reader("preadv", directory) as reader:
        for first in range(0, n_chunks(layout), batch):
            ids = np.arange(first, min(first + batch, n_chunks(layout)))
            slab = reader.read(directory.extents(ids))

            def decode(i: int, slab: Slab = slab, ids: np.ndarray = ids) -> np.ndarray | None:
                if slab.nbytes[i] < 0:
                    return None
                try:
                    return codec.decode(slab.view(i))
                except CorruptChunkError as error:
                    raise directory.error(int(ids[i]), error.reason) from error

            yield list(pool.map(decode, range(len(ids))))
