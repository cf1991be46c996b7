"""Writing one group of a sparse feature space: zarr v3 arrays, chunk by chunk, in bounded memory.

Metadata and chunk encoding are zarr-python's own; only the stored objects are put together here, because
zarr encodes a shard in one piece and two default shards of 42 million values would not fit the budget.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, BinaryIO, Literal

import numpy as np
import zarr
from zarr.codecs import BloscCodec, GzipCodec, ZstdCodec
from zarr.storage import MemoryStore

from hbx_gpu.atlas.journal import sync
from hbx_gpu.atlas.spaces import FeatureSpace
from hbx_gpu.codecs.checksum import crc32c

Role = Literal["index", "values"]
"""What an array's values are like: column numbers ascend within a row, values of a layer need not."""
DEFAULT_CODEC = "hbx_gpu.rowpack"
HOMEOBOX_CODEC = "homeobox.bitpacking"
DEFAULT_CHUNK = 40_960
DEFAULT_SHARD = 41_943_040
# Values encoded at once; chunks of one batch are encoded in parallel by zarr's threads.
_BATCH_VALUES = 1 << 20
_ABSENT = 2**64 - 1


def _rowpack(role: Role, dtype: np.dtype[Any], chunk: int) -> Any:  # noqa: ARG001
    if dtype.kind not in "iu":
        return ZstdCodec(level=0, checksum=False)
    from hbx_gpu.codecs.zarr_codec import RowpackCodec

    return RowpackCodec(transform="gaps" if role == "index" else "none", element_size=dtype.itemsize)


def _bitpacking(role: Role, dtype: np.dtype[Any], chunk: int) -> Any:
    # What Homeobox does: words of 4 bytes whatever the item size, and zstd for single bytes.
    if dtype.kind not in "iu" or dtype.itemsize == 1 or chunk * dtype.itemsize % 4:
        return ZstdCodec(level=0, checksum=False)
    from hbx_gpu.codecs.zarr_codec import BitpackingCodec

    return BitpackingCodec(transform="delta" if role == "index" else "none", element_size=4)


# Codec name -> what compresses the chunks of an array (None: nothing does). Floats keep a general codec.
_CODECS: Mapping[str, Callable[[Role, np.dtype[Any], int], Any]] = {
    DEFAULT_CODEC: _rowpack,
    HOMEOBOX_CODEC: _bitpacking,
    "zstd": lambda *_: ZstdCodec(level=0, checksum=False),
    "blosc": lambda *_: BloscCodec(typesize=4, cname="lz4", clevel=5, shuffle="bitshuffle"),
    "gzip": lambda *_: GzipCodec(level=5),
    "none": lambda *_: None,
}


def compressor_for(name: str, role: Role, dtype: np.dtype[Any] | str, chunk: int) -> Any:
    """What compresses an array under a codec name: a zarr bytes-to-bytes codec, or None.

    Parameters
    ----------
    name
        One of :func:`codec_names`.
    role
        What its values are like.
    dtype
        Of the stored values.
    chunk
        Elements per (inner) chunk.
    """
    return _CODECS[check_codec(name)](role, np.dtype(dtype), chunk)


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


class ChunkEncoder:
    """Encodes chunks of a 1-D array as zarr does, many at once and in parallel.

    Parameters
    ----------
    dtype
        Of the values.
    compressor
        A zarr bytes-to-bytes codec, or None.
    chunk
        Elements per chunk.
    most
        Chunks that are encoded at once, at most.

    Attributes
    ----------
    batch
        Chunks to pass at once: about a million values.
    codecs
        The codec chain, as in zarr metadata.
    """

    def __init__(self, dtype: str, compressor: Any, chunk: int, *, most: int) -> None:
        self._chunk = chunk
        self.batch = max(1, min(_BATCH_VALUES // chunk, most))
        self._encoded: dict[str, Any] = {}
        # Chunks of an unsharded array in memory are exactly the inner chunks of a sharded one.
        self._scratch = zarr.create_array(
            MemoryStore(self._encoded),
            shape=(self.batch * chunk,),
            chunks=(chunk,),
            config={"write_empty_chunks": True},
            **_layout(dtype, compressor),
        )
        self.codecs: list[dict[str, Any]] = json.loads(self._encoded["zarr.json"].to_bytes())["codecs"]
        self._pack = _packer(compressor)
        self._pool = ThreadPoolExecutor(len(os.sched_getaffinity(0)))

    def encode(self, values: np.ndarray) -> Iterable[bytes]:
        """Encode 1 to `batch` whole chunks in the background; keep `values` as it is until all are taken."""
        n = len(values) // self._chunk
        if self._pack is not None:
            return self._pool.map(self._pack, np.split(values, n))
        self._scratch[: len(values)] = values
        return [self._encoded[f"c/{i}"].to_bytes() for i in range(n)]


def _packer(compressor: Any) -> Callable[[np.ndarray], bytes] | None:
    """What encodes one chunk, where that is known here: through zarr it takes several times as long."""
    from hbx_gpu.codecs import encode_bitpacking, encode_rowpack
    from hbx_gpu.codecs.zarr_codec import BitpackingCodec, RowpackCodec

    if isinstance(compressor, RowpackCodec):
        word = f"<u{compressor.element_size}"
        return lambda values: encode_rowpack(values.view(word), compressor.transform)
    if isinstance(compressor, BitpackingCodec):
        return lambda values: encode_bitpacking(values, compressor.transform, compressor.element_size)
    return None


class ObjectWriter:
    """Stored objects of a 1-D array, chunk after chunk: shards with their index at the end, or plain chunks.

    Parameters
    ----------
    path
        Directory of the array; created.
    per_shard
        Chunks per shard; 0 where the array is not sharded.
    """

    def __init__(self, path: Path, per_shard: int) -> None:
        self._path, self._per_shard = path, per_shard
        self._file: BinaryIO | None = None
        self._index: list[tuple[int, int]] = []
        self._offset = 0
        self._objects = 0
        (path / "c").mkdir(parents=True)

    def put(self, encoded: bytes | None) -> None:
        """Store the next chunk; None leaves it out, which means fill value."""
        if encoded is not None:
            if self._file is None:
                self._file = open(self._path / "c" / str(self._objects), "xb")  # noqa: SIM115 - see _end
                self._offset = 0
            self._file.write(encoded)
        self._index.append((_ABSENT, _ABSENT) if encoded is None else (self._offset, len(encoded)))
        self._offset += len(encoded or b"")
        if len(self._index) == max(1, self._per_shard):
            self._end()

    def close(self) -> None:
        """End the last shard."""
        if self._index:
            self._end()

    def abort(self) -> None:
        """Close open files; what was written is of no use."""
        if self._file is not None:
            self._file.close()
            self._file = None

    def _end(self) -> None:
        if self._file is not None:
            if self._per_shard:
                index = np.full((self._per_shard, 2), _ABSENT, "<u8")
                index[: len(self._index)] = self._index
                raw = index.tobytes()
                self._file.write(raw)
                self._file.write(crc32c(raw).to_bytes(4, "little"))
            self._file.flush()
            os.fsync(self._file.fileno())
            self._file.close()
            self._file = None
        self._index = []
        self._objects += 1


class ShardedArrayWriter:
    """One 1-D sharded array, written front to back; holds about two million values in memory.

    Parameters
    ----------
    path
        Directory of the array; created.
    dtype
        Of the stored values.
    compressor
        A zarr bytes-to-bytes codec, or None.
    chunk, shard
        Elements per inner chunk and per shard; shard is a multiple of chunk.
    """

    def __init__(self, path: Path, *, dtype: str, compressor: Any, chunk: int, shard: int) -> None:
        if shard % chunk:
            raise ValueError(
                f"shard shape {shard} must be a multiple of chunk shape {chunk}; for example "
                f"{max(1, shard // chunk) * chunk}"
            )
        self._path = path
        self._chunk, self._per_shard = chunk, shard // chunk
        self._layout = _layout(dtype, compressor)
        self._encoder = ChunkEncoder(dtype, compressor, chunk, most=self._per_shard)
        # One is filled while the other is encoded: the source is read meanwhile.
        self._buffer, self._other = (np.zeros(self._encoder.batch * chunk, dtype) for _ in range(2))
        self._pending: Iterable[bytes] = ()
        self._filled = 0
        self._objects = ObjectWriter(path, self._per_shard)
        self.length = 0

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
        self._store()
        self._objects.close()
        zarr.create_array(
            self._path,
            shape=(self.length,),
            chunks=(self._chunk,),
            shards=(self._chunk * self._per_shard,),
            **self._layout,
        )
        sync(self._path / "zarr.json")

    def abort(self) -> None:
        """Close open files; what was written is of no use."""
        self._objects.abort()

    def _flush(self) -> None:
        # Inner chunks are always full: fill value behind the last element.
        self._buffer[self._filled :] = 0
        chunks = -(-self._filled // self._chunk)
        self._store()
        self._pending = self._encoder.encode(self._buffer[: chunks * self._chunk])
        self._buffer, self._other = self._other, self._buffer
        self._filled = 0

    def _store(self) -> None:
        """Write what was encoded."""
        for encoded in self._pending:
            self._objects.put(encoded)
        self._pending = ()


def _layout(dtype: str, compressor: Any) -> dict[str, Any]:
    """Arguments of zarr.create_array that every array here has in common."""
    return {
        "dtype": dtype,
        "filters": None,
        "compressors": None if compressor is None else [compressor],
        "fill_value": 0,
    }


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
        self._path = path
        self._groups = (path, path / Path(space.index_array).parent, path / space.layers_path)
        self._index = ShardedArrayWriter(
            path / space.index_array,
            dtype="uint32",
            compressor=compressor_for(codec, "index", "uint32", chunk),
            chunk=chunk,
            shard=shard,
        )
        self._values = ShardedArrayWriter(
            path / space.layers_path / layer,
            dtype=dtype,
            compressor=compressor_for(codec, "values", dtype, chunk),
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
            sync(folder)

    def abort(self) -> None:
        """Close open files; what was written is of no use."""
        self._index.abort()
        self._values.abort()


def make_group(path: Path) -> None:
    """Make `path` a zarr group; nothing happens where it is one."""
    if not (path / "zarr.json").exists():
        zarr.create_group(path)
        sync(path / "zarr.json")
