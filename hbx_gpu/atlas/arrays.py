"""Writing one group of a sparse feature space: zarr v3 arrays, chunk by chunk, in bounded memory.

Metadata and chunk encoding are zarr-python's own; only the shard objects are put together here, because
zarr encodes a shard in one piece and two default shards of 42 million values would not fit the budget.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, BinaryIO, Literal

import google_crc32c
import numpy as np
import zarr
from zarr.codecs import BloscCodec, GzipCodec, ZstdCodec
from zarr.storage import MemoryStore

from hbx_gpu.atlas.spaces import FeatureSpace

Role = Literal["index", "counts", "floats"]
DEFAULT_CODEC = "homeobox.bitpacking"
DEFAULT_CHUNK = 40_960
DEFAULT_SHARD = 41_943_040
# Values encoded at once; chunks of one batch are encoded in parallel by zarr's threads.
_BATCH_VALUES = 1 << 20
_ABSENT = 2**64 - 1


def _bitpacking(role: Role) -> Any:
    if role == "floats":
        return _zstd(role)
    from hbx_gpu.codecs.zarr_codec import BitpackingCodec

    return BitpackingCodec(transform="delta" if role == "index" else "none", element_size=4)


def _zstd(_role: Role) -> Any:
    return ZstdCodec(level=0, checksum=False)


def _blosc(_role: Role) -> Any:
    return BloscCodec(typesize=4, cname="lz4", clevel=5, shuffle="bitshuffle")


def _gzip(_role: Role) -> Any:
    return GzipCodec(level=5)


def _none(_role: Role) -> Any:
    return None


# Codec name -> what compresses the chunks of an array in that role (None: nothing does).
_CODECS: Mapping[str, Callable[[Role], Any]] = {
    DEFAULT_CODEC: _bitpacking,
    "zstd": _zstd,
    "blosc": _blosc,
    "gzip": _gzip,
    "none": _none,
}


def codec_names() -> list[str]:
    """Codecs that new arrays can be written with."""
    return list(_CODECS)


def check_codec(name: str) -> str:
    """`name`, if there is such a codec.

    Raises
    ------
    ValueError
        There is none.
    """
    if name not in _CODECS:
        raise ValueError(f"unknown codec {name!r}; choose one of {codec_names()}")
    return name


def flat_shape(shape: int | tuple[int, ...] | None, default: int, *, name: str) -> int:
    """Length of the only axis of `shape`.

    Raises
    ------
    ValueError
        It is no positive integer.
    """
    if shape is None:
        return default
    axes = (shape,) if isinstance(shape, int | np.integer) else tuple(shape)
    if len(axes) != 1 or int(axes[0]) < 1:
        raise ValueError(f"{name} must be one positive number of elements, got {shape!r}")
    return int(axes[0])


class ShardedArrayWriter:
    """One 1-D sharded array, written front to back; holds about a million values in memory.

    Parameters
    ----------
    path
        Directory of the array; created.
    dtype
        Of the stored values.
    compressor
        A zarr bytes-to-bytes codec, or None.
    chunk, shard
        Elements per inner chunk and per shard object; shard is a multiple of chunk.
    """

    def __init__(self, path: Path, *, dtype: str, compressor: Any, chunk: int, shard: int) -> None:
        if shard % chunk:
            raise ValueError(
                f"shard shape {shard} must be a multiple of chunk shape {chunk}; for example "
                f"{max(1, shard // chunk) * chunk}"
            )
        self._path = path
        self._chunk, self._per_shard = chunk, shard // chunk
        self._layout: dict[str, Any] = {
            "dtype": dtype,
            "filters": None,
            "compressors": None if compressor is None else [compressor],
            "fill_value": 0,
        }
        batch = max(1, min(_BATCH_VALUES // chunk, self._per_shard))
        self._buffer = np.zeros(batch * chunk, dtype)
        self._filled = 0
        self._encoded: dict[str, Any] = {}
        # Chunks of an unsharded array in memory are exactly the inner chunks of a sharded one.
        self._scratch = zarr.create_array(
            MemoryStore(self._encoded),
            shape=self._buffer.shape,
            chunks=(chunk,),
            config={"write_empty_chunks": True},
            **self._layout,
        )
        self._file: BinaryIO | None = None
        self._index: list[tuple[int, int]] = []
        self._offset = 0
        self._shards = 0
        self.length = 0
        (path / "c").mkdir(parents=True)

    def append(self, values: np.ndarray) -> None:
        """Append 1-D values of the array's dtype."""
        at = 0
        while at < len(values):
            n = min(len(values) - at, len(self._buffer) - self._filled)
            self._buffer[self._filled : self._filled + n] = values[at : at + n]
            self._filled += n
            at += n
            if self._filled == len(self._buffer):
                self._flush()
        self.length += len(values)

    def close(self) -> None:
        """Write what is left, the metadata, and wait until all of it is on disk."""
        if self._filled:
            self._flush()
        if self._file is not None:
            self._end_shard()
        zarr.create_array(
            self._path,
            shape=(self.length,),
            chunks=(self._chunk,),
            shards=(self._chunk * self._per_shard,),
            **self._layout,
        )
        _sync(self._path / "zarr.json")

    def abort(self) -> None:
        """Close open files; what was written is of no use."""
        if self._file is not None:
            self._file.close()
            self._file = None

    def _flush(self) -> None:
        chunks = -(-self._filled // self._chunk)
        # Inner chunks are always full: fill value behind the last element.
        self._buffer[self._filled :] = 0
        self._scratch[: chunks * self._chunk] = self._buffer[: chunks * self._chunk]
        for i in range(chunks):
            self._put(self._encoded[f"c/{i}"].to_bytes())
        self._filled = 0

    def _put(self, encoded: bytes) -> None:
        if self._file is None:
            self._file = open(self._path / "c" / str(self._shards), "xb")  # noqa: SIM115 - closed in _end_shard
            self._offset = 0
            self._index = []
        self._file.write(encoded)
        self._index.append((self._offset, len(encoded)))
        self._offset += len(encoded)
        if len(self._index) == self._per_shard:
            self._end_shard()

    def _end_shard(self) -> None:
        assert self._file is not None
        index = np.full((self._per_shard, 2), _ABSENT, "<u8")
        index[: len(self._index)] = self._index
        raw = index.tobytes()
        self._file.write(raw)
        self._file.write(google_crc32c.value(raw).to_bytes(4, "little"))
        self._file.flush()
        os.fsync(self._file.fileno())
        self._file.close()
        self._file = None
        self._shards += 1


class SparseGroupWriter:
    """The group of one sparse matrix with one layer: local feature numbers and values, row after row.

    Parameters
    ----------
    path
        Directory of the group; created.
    space
        A sparse feature space.
    layer, dtype
        Name and dtype of the layer.
    codec
        One of :func:`codec_names`.
    chunk, shard
        Elements per inner chunk and per shard.
    """

    def __init__(
        self,
        path: Path,
        space: FeatureSpace,
        *,
        layer: str,
        dtype: str,
        codec: str = DEFAULT_CODEC,
        chunk: int = DEFAULT_CHUNK,
        shard: int = DEFAULT_SHARD,
    ) -> None:
        assert space.index_array is not None
        make = _CODECS[check_codec(codec)]
        self._path = path
        self._groups = (path, path / Path(space.index_array).parent, path / space.layers_path)
        self._index = ShardedArrayWriter(
            path / space.index_array, dtype="uint32", compressor=make("index"), chunk=chunk, shard=shard
        )
        self._values = ShardedArrayWriter(
            path / space.layers_path / layer,
            dtype=dtype,
            compressor=make("floats" if np.dtype(dtype).kind == "f" else "counts"),
            chunk=chunk,
            shard=shard,
        )

    @property
    def length(self) -> int:
        """Number of elements appended so far."""
        return self._index.length

    def append(self, indices: np.ndarray, values: np.ndarray) -> None:
        """Append the same number of uint32 indices and values."""
        self._index.append(indices)
        self._values.append(values)

    def close(self) -> None:
        """Finish both arrays and the groups around them, durably."""
        self._index.close()
        self._values.close()
        for group in self._groups:
            make_group(group)
        for folder in [self._path, *(p for p in self._path.rglob("*") if p.is_dir())]:
            _sync(folder)

    def abort(self) -> None:
        """Close open files; what was written is of no use."""
        self._index.abort()
        self._values.abort()


def make_group(path: Path) -> None:
    """Make `path` a zarr group; nothing happens where it is one."""
    if not (path / "zarr.json").exists():
        zarr.create_group(path)
        _sync(path / "zarr.json")


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
