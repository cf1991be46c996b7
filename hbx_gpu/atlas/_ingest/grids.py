"""Writing one large image as a sharded zarr array of square chunks, a shard at a time."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from itertools import product
from pathlib import Path

import numpy as np
import zarr

from hbx_gpu._files import sync
from hbx_gpu.atlas._ingest.image_files import StoredImage
from hbx_gpu.atlas._writing.arrays import ChunkEncoder, ObjectWriter, compressor_for, layout_of

_CHUNK_EDGE = 512
_SHARD_EDGE = 2048


def grid_shapes(shape: tuple[int, ...]) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Chunk and shard of an image: squares on the last two axes, no larger than it; one elsewhere."""
    leading = (1,) * (len(shape) - 2)
    chunk = (*leading, *(min(_CHUNK_EDGE, n) for n in shape[-2:]))
    edges = zip(chunk[-2:], shape[-2:], strict=True)
    shard = (*leading, *(min(_SHARD_EDGE // c, -(-n // c)) * c for c, n in edges))
    return chunk, shard


def write_grid(
    path: Path, image: StoredImage, *, codec: str, done: Callable[[float], object] = lambda _: None
) -> None:
    """Write an image of two or more axes; holds one shard of it in memory.

    Parameters
    ----------
    path
        Directory of the array; made.
    image
        The image.
    codec
        One of `hbx_gpu.atlas._writing.arrays.codec_names`.
    done
        Called with the part that is written, up to 1.
    """
    chunk, shard = grid_shapes(image.shape)
    n_values = math.prod(chunk)
    compressor = compressor_for(codec, "dense", image.dtype, n_values)
    grid = tuple(-(-n // s) for n, s in zip(image.shape, shard, strict=True))
    per_shard = tuple(s // c for s, c in zip(shard, chunk, strict=True))
    encoder = ChunkEncoder(image.dtype.name, compressor, n_values, most=math.prod(per_shard))
    objects = ObjectWriter(
        path, math.prod(per_shard), lambda i: "/".join(map(str, np.unravel_index(i, grid)))
    )
    try:
        for number, place in enumerate(product(*(range(n) for n in grid))):
            corner = tuple(at * s for at, s in zip(place, shard, strict=True))
            region = tuple(
                slice(a, min(a + s, n)) for a, s, n in zip(corner, shard, image.shape, strict=True)
            )
            pending: list[np.ndarray] = []
            values = image.read(region)
            for values_of_chunk in _chunks(values, chunk, per_shard):
                # Chunks wholly outside the image follow no rule but this: they are absent.
                if values_of_chunk is not None and len(pending) < encoder.batch:
                    pending.append(values_of_chunk)
                    continue
                _put(objects, encoder, pending)
                pending = [] if values_of_chunk is None else [values_of_chunk]
                if values_of_chunk is None:
                    objects.put(None)
            _put(objects, encoder, pending)
            done((number + 1) / math.prod(grid))
        objects.close()
    finally:
        objects.abort()
    zarr.create_array(
        path, shape=image.shape, chunks=chunk, shards=shard, **layout_of(image.dtype.name, compressor)
    )
    sync(path / "zarr.json")


def _put(objects: ObjectWriter, encoder: ChunkEncoder, chunks: list[np.ndarray]) -> None:
    if chunks:
        for encoded in encoder.encode(np.concatenate(chunks)):
            objects.put(encoded)


def _chunks(
    values: np.ndarray, chunk: tuple[int, ...], per_shard: tuple[int, ...]
) -> Iterator[np.ndarray | None]:
    """The chunks of a shard in C order, flat and padded with zeros; None for those outside the image."""
    for place in product(*(range(n) for n in per_shard)):
        corner = [at * c for at, c in zip(place, chunk, strict=True)]
        if any(a >= n for a, n in zip(corner, values.shape, strict=True)):
            yield None
            continue
        part = values[tuple(slice(a, a + c) for a, c in zip(corner, chunk, strict=True))]
        if part.shape != chunk:
            whole = np.zeros(chunk, values.dtype)
            whole[tuple(slice(0, n) for n in part.shape)] = part
            part = whole
        yield part.reshape(-1)
