"""Writing one group of a feature space: zarr v3 arrays, chunk by chunk, in bounded memory.

Metadata and chunk encoding are zarr-python's own; only the stored objects are put together here, because
zarr encodes a shard in one piece and two default shards of 42 million values would not fit the budget.
zarr is imported where something is written, because readers of an atlas need only the names of the codecs.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO, Literal

import numpy as np

from hbx_gpu._codecs.checksum import with_crc32c
from hbx_gpu._devices import cores
from hbx_gpu._files import sync
from hbx_gpu._source import Codec
from hbx_gpu.atlas._model.spaces import FeatureSpace

if TYPE_CHECKING:
    from zarr.core.buffer import Buffer

Role = Literal["index", "values", "dense"]
"""What the values of an array are like. Column numbers (``index``) ascend within a row, ``values`` of a
layer need not. A ``dense`` layer, an image or encoded bytes leave nothing out;
general codecs store them."""
DEFAULT_CODEC = "hbx_gpu.rowpack"
HOMEOBOX_CODEC = "homeobox.bitpacking"
DEFAULT_CHUNK = 40_960
DEFAULT_SHARD = 41_943_040
# Values encoded at once; chunks of one batch are encoded in parallel by zarr's threads.
_BATCH_VALUES = 1 << 20
_ABSENT = 2**64 - 1
# What zarr writes for a group; asking it for this takes it milliseconds.
_GROUP = json.dumps({"attributes": {}, "zarr_format": 3, "node_type": "group"}, indent=2)


def _zstd(*_: object) -> object:
    from zarr.codecs import ZstdCodec

    return ZstdCodec(level=0, checksum=False)


def _blosc(_role: Role, dtype: np.dtype, _chunk: int) -> object:
    from zarr.codecs import BloscCodec

    return BloscCodec(typesize=dtype.itemsize, cname="lz4", clevel=5, shuffle="bitshuffle")


def _gzip(*_: object) -> object:
    from zarr.codecs import GzipCodec

    return GzipCodec(level=5)


def _rowpack(role: Role, dtype: np.dtype, chunk: int) -> object:  # noqa: ARG001
    if dtype.kind not in "iu":
        return _zstd()
    from hbx_gpu._codecs.zarr_codec import RowpackCodec

    return RowpackCodec(transform="gaps" if role == "index" else "none", element_size=dtype.itemsize)


def _bitpacking(role: Role, dtype: np.dtype, chunk: int) -> object:
    # Homeobox does the same: words of 4 bytes whatever the item size, and zstd for single bytes.
    if dtype.kind not in "iu" or dtype.itemsize == 1 or chunk * dtype.itemsize % 4:
        return _zstd()
    from hbx_gpu._codecs.zarr_codec import BitpackingCodec

    return BitpackingCodec(transform="delta" if role == "index" else "none", element_size=4)


# Codec name -> compressor of the chunks of an array, None for no compression. Floats keep a general codec.
_CODECS: Mapping[str, Callable[[Role, np.dtype, int], object]] = {
    DEFAULT_CODEC: _rowpack,
    HOMEOBOX_CODEC: _bitpacking,
    "zstd": _zstd,
    "blosc": _blosc,
    "gzip": _gzip,
    "none": lambda *_: None,
}


def compressor_for(name: str, role: Role, dtype: np.dtype | str, chunk: int) -> tuple[object, ...]:
    """The zarr bytes-to-bytes codecs that compress an array under a codec name.

    A CRC32C follows the stored bytes, so that damage is found before they are decompressed, possibly on a
    GPU. Our codec for sparse matrices has a checksum of its own.

    Parameters
    ----------
    name
        One of :func:`codec_names`.
    role
        What the values of the array are like.
    dtype
        Of the stored values.
    chunk
        Elements per (inner) chunk.
    """
    from zarr.codecs import Crc32cCodec

    from hbx_gpu._codecs.zarr_codec import RowpackCodec

    name = check_codec(name) if role != "dense" else dense_codec(check_codec(name))
    compressor = _CODECS[name](role, np.dtype(dtype), chunk)
    if isinstance(compressor, RowpackCodec):
        return (compressor,)
    return (Crc32cCodec(),) if compressor is None else (compressor, Crc32cCodec())


def dense_codec(name: str) -> str:
    """Codec of dense arrays: the codecs for sparse matrices are replaced by zstd."""
    return "zstd" if name in (DEFAULT_CODEC, HOMEOBOX_CODEC) else name


def codec_names() -> list[str]:
    """Codecs that new arrays can be written with."""
    return list(_CODECS)


def check_codec(name: str) -> str:
    """`name`, if there is such a codec.

    Raises
    ------
    ValueError
        The codec does not exist.
    """
    if name not in _CODECS:
        raise ValueError(f"unknown codec {name!r}; choose one of {codec_names()}")
    return name


def flat_shape(shape: int | tuple[int, ...] | None, default: int, *, name: str) -> int:
    """Length of the only axis of `shape`.

    Raises
    ------
    ValueError
        The length is not a positive integer.
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
        zarr's bytes-to-bytes codecs, or None.
    chunk
        Elements per chunk.
    most
        Largest number of chunks that are encoded at once.

    Attributes
    ----------
    batch
        Number of chunks to pass at once: about a million values.
    codecs
        The codec chain, as in zarr metadata.
    """

    def __init__(self, dtype: str, compressor: object, chunk: int, *, most: int) -> None:
        import zarr
        from zarr.storage import MemoryStore

        self._chunk = chunk
        self.batch = max(1, min(_BATCH_VALUES // chunk, most))
        self._encoded: dict[str, Buffer] = {}
        # Chunks of an unsharded array in memory are exactly the inner chunks of a sharded one.
        self._scratch = zarr.create_array(
            MemoryStore(self._encoded),
            shape=(self.batch * chunk,),
            chunks=(chunk,),
            config={"write_empty_chunks": True},
            **layout_of(dtype, compressor),
        )
        self.codecs: list[Codec] = json.loads(self._encoded["zarr.json"].to_bytes())["codecs"]
        self._pack = _packer(compressor)
        self._pool = ThreadPoolExecutor(cores())

    def encode(self, values: np.ndarray) -> Iterable[bytes]:
        """Encode 1 to `batch` whole chunks in the background; `values` must not change meanwhile."""
        n = len(values) // self._chunk
        if self._pack is not None:
            return self._pool.map(self._pack, np.split(values, n))
        self._scratch[: len(values)] = values
        return [self._encoded[f"c/{i}"].to_bytes() for i in range(n)]


def _packer(compressors: object) -> Callable[[np.ndarray], bytes] | None:
    """A direct encoder of one chunk where we have one, because zarr takes several times as long."""
    from zarr.codecs import Crc32cCodec

    from hbx_gpu._codecs import encode_bitpacking, encode_rowpack
    from hbx_gpu._codecs.zarr_codec import BitpackingCodec, RowpackCodec

    match compressors:
        case (RowpackCodec() as codec,):
            word = f"<u{codec.element_size}"
            return lambda values: encode_rowpack(values.view(word), codec.transform)
        case (BitpackingCodec() as codec, Crc32cCodec()):
            return lambda values: with_crc32c(encode_bitpacking(values, codec.transform, codec.element_size))
    return None


class ObjectWriter:
    """Writes the stored objects of an array chunk by chunk: plain chunks, or shards that end in an index.

    Parameters
    ----------
    path
        Directory of the array; created.
    per_shard
        Chunks per shard; 0 where the array is not sharded.
    key
        Function from the number of an object to its key below ``c``; by default the key of a 1-D array.
    """

    def __init__(self, path: Path, per_shard: int, key: Callable[[int], str] = str) -> None:
        self._path, self._per_shard, self._key = path, per_shard, key
        self._file: BinaryIO | None = None
        self._index: list[tuple[int, int]] = []
        self._offset = 0
        self._objects = 0
        (path / "c").mkdir(parents=True)

    def put(self, encoded: bytes | None) -> None:
        """Store the next chunk; None leaves it out, which means that it holds the fill value."""
        if encoded is not None:
            if self._file is None:
                path = self._path / "c" / self._key(self._objects)
                path.parent.mkdir(parents=True, exist_ok=True)
                self._file = open(path, "xb")  # noqa: SIM115 - see _end
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
                self._file.write(with_crc32c(raw))
            self._file.flush()
            os.fsync(self._file.fileno())
            self._file.close()
            self._file = None
        self._index = []
        self._objects += 1


class ShardedArrayWriter:
    """One sharded array, written front to back along its first axis; holds about two million values.

    Parameters
    ----------
    path
        Directory of the array; created.
    dtype
        Of the stored values.
    compressor
        zarr's bytes-to-bytes codecs, or None.
    chunk, shard
        Elements of the first axis per inner chunk and per shard; shard is a multiple of chunk.
    row_shape
        The other axes, which no chunk divides; () for a 1-D array.

    Attributes
    ----------
    length
        Elements of the first axis appended so far.
    """

    def __init__(
        self,
        path: Path,
        *,
        dtype: str,
        compressor: object,
        chunk: int,
        shard: int,
        row_shape: tuple[int, ...] = (),
    ) -> None:
        if shard % chunk:
            raise ValueError(
                f"shard shape {shard} must be a multiple of chunk shape {chunk}; for example "
                f"{max(1, shard // chunk) * chunk}"
            )
        self._path = path
        self._rows_per_chunk, self._per_shard, self._row_shape = chunk, shard // chunk, tuple(row_shape)
        self._width = math.prod(row_shape)
        self._chunk = chunk * self._width
        self._layout = layout_of(dtype, compressor)
        self._encoder = ChunkEncoder(dtype, compressor, self._chunk, most=self._per_shard)
        # One buffer is filled from the source while the other is encoded.
        self._buffer, self._other = (np.zeros(self._encoder.batch * self._chunk, dtype) for _ in range(2))
        self._pending: Iterable[bytes] = ()
        self._filled = 0
        beyond = "/0" * len(self._row_shape)
        self._objects = ObjectWriter(path, self._per_shard, lambda i: f"{i}{beyond}")
        self.length = 0

    def append(self, values: np.ndarray) -> None:
        """Append (n, *row_shape) values of the array's dtype."""
        self.length += len(values)
        # Chunks are as wide as the array, so its values are contiguous whatever the number of axes.
        values = values.reshape(-1)
        at = 0
        while at < len(values):
            n = min(len(values) - at, len(self._buffer) - self._filled)
            self._buffer[self._filled : self._filled + n] = values[at : at + n]
            self._filled += n
            at += n
            if self._filled == len(self._buffer):
                self._flush()

    def close(self) -> None:
        """Write what is left, the metadata, and wait until all of it is on disk."""
        import zarr

        if self._filled:
            self._flush()
        self._store()
        self._objects.close()
        zarr.create_array(
            self._path,
            shape=(self.length, *self._row_shape),
            chunks=(self._rows_per_chunk, *self._row_shape),
            shards=(self._rows_per_chunk * self._per_shard, *self._row_shape),
            **self._layout,
        )
        sync(self._path / "zarr.json")

    def abort(self) -> None:
        """Close open files; what was written is of no use."""
        self._objects.abort()

    def _flush(self) -> None:
        # Inner chunks are always full: the fill value follows the last element.
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


def layout_of(dtype: str, compressor: object) -> dict[str, Any]:
    """Arguments of zarr.create_array that all arrays here share."""
    return {
        "dtype": dtype,
        "filters": None,
        "compressors": compressor,
        "fill_value": 0,
    }


class SparseGroupWriter:
    """The group of one sparse matrix: local feature numbers, and values of one or several layers.

    Parameters
    ----------
    path
        Directory of the group; created.
    space
        A space addressed by ``[start, end)``.
    layers
        Name -> dtype of the layers; element k of each belongs to element k of the index array.
    index_dtype
        Dtype of the index array.
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
        layers: Mapping[str, str],
        index_dtype: str = "uint32",
        codec: str = DEFAULT_CODEC,
        chunk: int = DEFAULT_CHUNK,
        shard: int = DEFAULT_SHARD,
    ) -> None:
        assert space.index_array is not None
        self._path, self._space = path, space

        def array(relative: str, role: Role, dtype: str) -> ShardedArrayWriter:
            compressor = compressor_for(codec, role, dtype, chunk)
            return ShardedArrayWriter(
                path / relative, dtype=dtype, compressor=compressor, chunk=chunk, shard=shard
            )

        self._index = array(space.index_array, "index", index_dtype)
        self._layers = {
            name: array(
                f"{space.layers_path}/{name}", "index" if name in space.ascending_layers else "values", dtype
            )
            for name, dtype in layers.items()
        }

    @property
    def length(self) -> int:
        """Number of elements appended so far."""
        return self._index.length

    def append(self, indices: np.ndarray, layers: Mapping[str, np.ndarray]) -> None:
        """Append the same number of indices and of values of every layer."""
        self._index.append(indices)
        for name, values in layers.items():
            self._layers[name].append(values)

    def close(self) -> None:
        """Finish all arrays and the groups around them, durably."""
        for array in (self._index, *self._layers.values()):
            array.close()
        finish_group(self._path, self._space)

    def abort(self) -> None:
        """Close open files; what was written is of no use."""
        for array in (self._index, *self._layers.values()):
            array.abort()


class DenseGroupWriter:
    """The group of a dense feature space, of image tiles or of bytes: layers that grow along the first axis.

    Parameters
    ----------
    path
        Directory of the group; created.
    space
        The space.
    layers
        Name -> dtype of the layers.
    row_shape
        Shape of one element of the first axis: (m,) for m features, (C, Y, X) for tiles, () for bytes.
    codec
        One of :func:`codec_names`, see :func:`dense_codec`.
    chunk, shard
        Largest number of values per inner chunk and per shard; each holds at least one row.
    """

    def __init__(
        self,
        path: Path,
        space: FeatureSpace,
        *,
        layers: Mapping[str, str],
        row_shape: tuple[int, ...],
        codec: str = DEFAULT_CODEC,
        chunk: int = DEFAULT_CHUNK,
        shard: int = DEFAULT_SHARD,
    ) -> None:
        self._path, self._space = path, space
        width = math.prod(row_shape)
        rows = max(1, chunk // width)
        self._layers = {
            name: ShardedArrayWriter(
                path / space.layers_path / name,
                dtype=dtype,
                compressor=compressor_for(codec, "dense", dtype, rows * width),
                chunk=rows,
                shard=max(1, shard // width // rows) * rows,
                row_shape=row_shape,
            )
            for name, dtype in layers.items()
        }

    @property
    def length(self) -> int:
        """Rows appended so far."""
        return next(iter(self._layers.values())).length

    def append(self, layers: Mapping[str, np.ndarray]) -> None:
        """Append the same number of rows, (n, *row_shape), to every layer."""
        for name, values in layers.items():
            self._layers[name].append(values)

    def close(self) -> None:
        """Finish all arrays and the groups around them, durably."""
        for array in self._layers.values():
            array.close()
        finish_group(self._path, self._space)

    def abort(self) -> None:
        """Close open files; what was written is of no use."""
        for array in self._layers.values():
            array.abort()


def finish_group(path: Path, space: FeatureSpace) -> None:
    """Make zarr groups of the folders of a space's arrays, and wait until every folder is on disk."""
    folders = [path / space.layers_path]
    if space.index_array is not None:
        folders.append((path / space.index_array).parent)
    for folder in folders:
        while folder != path.parent:
            make_group(folder)
            folder = folder.parent
    for folder in [path, *(p for p in path.rglob("*") if p.is_dir())]:
        sync(folder)


def make_group(path: Path) -> None:
    """Make `path` a zarr group; nothing happens if it already is one."""
    if not (path / "zarr.json").exists():
        path.mkdir(parents=True, exist_ok=True)
        (path / "zarr.json").write_text(_GROUP, encoding="utf-8")
        sync(path / "zarr.json")
