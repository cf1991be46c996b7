"""Small arrays on disk, for readers."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from hbx_gpu._source import ArrayLayout, Codec


def plain_array(path: Path, n_chunks: int, chunk: int = 10, name: str = "set0/counts") -> ArrayLayout:
    return ArrayLayout(
        path=str(path),
        name=name,
        shape=(n_chunks * chunk,),
        dtype=np.dtype(np.uint32),
        chunk_shape=(chunk,),
        shard_shape=(chunk,),
        codecs=RAW,
    )


def write_chunks(path: Path, sizes: list[int]) -> list[bytes]:
    (path / "c").mkdir(parents=True)
    rng = np.random.default_rng(0)
    contents = [rng.integers(0, 256, size, np.uint8).tobytes() for size in sizes]
    for i, content in enumerate(contents):
        (path / "c" / str(i)).write_bytes(content)
    return contents


RAW: tuple[Codec, ...] = ({"name": "bytes", "configuration": {"endian": "little"}},)
