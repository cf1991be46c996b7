"""Decode one chunk through its whole codec chain, without zarr's per-chunk machinery.

`ArrayLayout.codecs` holds the chain of a zarr v3 array as its metadata do. The metadata of a zarr v2 array
have no chain, so `codecs` has one entry for it (likewise for an HDF5 dataset, filters in the order of its
pipeline)::

    {"name": "zarr.v2", "configuration": {"dtype": ">i4", "order": "C" or "F",
                                          "filters": [numcodecs configurations] or None,
                                          "compressor": numcodecs configuration or None}}
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import partial
from typing import Literal, Self

import numpy as np

from hbx_gpu._codecs.bitpacking import bitpacking_length, decode_bitpacking
from hbx_gpu._codecs.bitpacking_format import BytesLike, as_bytes
from hbx_gpu._codecs.bounds import Decode, Numcodec, Room, bounded
from hbx_gpu._codecs.checksum import crc32c
from hbx_gpu._codecs.rowpack import decode_rowpack
from hbx_gpu._codecs.rowpack_format import ELEMENT_SIZES, read_header
from hbx_gpu._source import ArrayLayout, Codec, Configuration
from hbx_gpu.errors import CorruptChunkError, CorruptDataError, UnsupportedCodecError

V2_CHAIN = "zarr.v2"
BITPACKING = "homeobox.bitpacking"
ROWPACK = "hbx_gpu.rowpack"

# A fixed list instead of all codecs that numcodecs has registered: its pickle codec would run code from the
# chunk.
_CHECKSUMS = {"adler32", "crc32", "crc32c", "fletcher32", "jenkins_lookup3"}
_COMPRESSORS = {"blosc", "bz2", "gzip", "lz4", "lzma", "shuffle", "zlib", "zstd"} | _CHECKSUMS
LZF = "hdf5.lzf"
_FILTERS = {"astype", "bitround", "delta", "fixedscaleoffset", "packbits", "quantize"}
# Settings of these codecs matter to encoders only, and zarr v3 spells some of blosc's differently.
_SETTINGS_FREE = {"blosc", "gzip", "zstd"}

CRC32C_BYTES = 4
# Bytes of the widest element, and the most bytes that a filter may put before the elements.
_WIDEST, _SPARE = 16, 64

_Step = tuple[str, Decode]


class ChunkCodec:
    """Decodes the chunks of one array.

    Parameters
    ----------
    layout
        The array; `codecs`, `dtype`, `chunk_shape` and `name` are used.

    Attributes
    ----------
    bitpacking
        Word size (4 or 8) if the chain is little-endian bytes + homeobox.bitpacking, with or without a
        checksum, and nothing else; None otherwise. Such a chunk unpacks to words of that size whose bytes are
        the elements.
    rowpack
        Word size (1, 2, 4 or 8) if the chain is little-endian bytes + hbx_gpu.rowpack and nothing else; None
        otherwise.
    is_raw
        Whether the stored bytes are the elements, with or without a checksum: C order, machine byte order,
        and no other codec in the chain.
    tail
        Bytes of CRC32C at the end of a chunk where `bitpacking` or `is_raw` applies to the bytes before it; 0
        for every other chain.

    Raises
    ------
    UnsupportedCodecError
        The chain has a codec or a setting that cannot be decoded here.
    CorruptDataError
        The chain is not valid: it has no array-to-bytes step, or a step that does not fit the array.
    """

    def __init__(self, layout: ArrayLayout) -> None:
        self._layout = layout
        self._nbytes = math.prod(layout.chunk_shape) * layout.dtype.itemsize
        self.bitpacking: int | None = None
        self.rowpack: int | None = None
        self.is_raw = False
        self.tail = 0
        if len(layout.codecs) == 1 and layout.codecs[0]["name"] == V2_CHAIN:
            self._steps = self._v2_steps(layout.codecs[0]["configuration"])
        else:
            self._steps = self._v3_steps(layout.codecs)

    @classmethod
    def several(cls, layouts: Sequence[ArrayLayout]) -> list[Self]:
        """The codec of each array; arrays whose chunks are alike share what is made for them."""
        made: dict[tuple[object, ...], Self] = {}
        found = []
        for layout in layouts:
            # Layouts that were read from like documents share their codecs, which are never changed.
            key = id(layout.codecs), layout.chunk_shape, layout.dtype, layout.byte_offset is None
            codec = made[key]._of(layout) if key in made else made.setdefault(key, cls(layout))
            found.append(codec)
        return found

    @property
    def decodes_rows_alone(self) -> bool:
        """Whether a row costs no more than its own part of a chunk, whatever else the chunk holds."""
        return self.is_raw or self.rowpack is not None or self.bitpacking is not None

    def _of(self, layout: ArrayLayout) -> Self:
        other = object.__new__(type(self))  # what `copy` does, in a tenth of the time
        other.__dict__.update(self.__dict__)
        other._layout = layout
        return other

    def decode(self, data: BytesLike, skipped: int = 0) -> np.ndarray:
        """Decode one stored chunk.

        Parameters
        ----------
        data
            The whole stored chunk.
        skipped
            Bit i is set where the i-th filter (the compressor last) was not applied to this chunk: an HDF5
            writer may leave out a filter that gains nothing.

        Returns
        -------
        ndarray
            The elements, of shape `layout.chunk_shape` and dtype `layout.dtype`, C contiguous. The array may
            be read-only and may alias `data`. The last chunk of a plain file holds the elements that are
            left.

        Raises
        ------
        CorruptChunkError
            A checksum differs, a decompressor fails, or the decoded length is not that of a chunk.
        """
        value: BytesLike = as_bytes(data)
        last = len(self._steps) - 2  # the filter that was applied last; the final step only views the bytes
        for k, (name, step) in enumerate(self._steps):
            if k <= last and skipped >> (last - k) & 1:
                continue
            try:
                value = step(value)
            except CorruptChunkError as error:
                raise CorruptChunkError(error.reason, array=self._layout.name) from error
            except Exception as error:  # decompressors raise anything from zlib.error to MemoryError
                reason = f"codec {name!r} cannot decode its {np.asarray(value).nbytes} bytes: {error}"
                raise CorruptChunkError(reason, array=self._layout.name) from error
        return np.asarray(value, self._layout.dtype, order="C")

    def _v3_steps(self, codecs: tuple[Codec, ...]) -> list[_Step]:
        layout = self._layout
        names = [codec["name"] for codec in codecs]
        settings = [codec.get("configuration") or {} for codec in codecs]
        if "bytes" not in names:
            for name, setting in zip(
                names, settings, strict=True
            ):  # report an unknown codec before anything else
                if _works_on_arrays(name):
                    self._array_step(name, setting, layout.chunk_shape, layout.dtype)
                else:
                    self._bytes_step(name, setting, layout.dtype, Room(0))
            raise CorruptDataError(f"array {layout.name!r}: codec chain {names} has no 'bytes' step")
        middle = names.index("bytes")
        shape, dtype = layout.chunk_shape, layout.dtype
        steps: list[_Step] = []
        for name, setting in zip(names[:middle], settings[:middle], strict=True):
            step, shape, dtype = self._array_step(name, setting, shape, dtype)
            steps.append((name, step))
        stored_dtype = self._with_endian(dtype, settings[middle].get("endian"))
        if layout.byte_offset is None:
            steps.append(("bytes", _from_bytes(shape, stored_dtype, "C")))
        else:
            steps.append(("bytes", _from_plain_bytes(shape, stored_dtype)))
        room = Room(math.prod(shape) * dtype.itemsize, exact=layout.byte_offset is None)
        for name, setting in zip(names[middle + 1 :], settings[middle + 1 :], strict=True):
            if _works_on_arrays(name):
                raise CorruptDataError(f"array {layout.name!r}: codec {name!r} works on arrays, not on bytes")
            step, room = self._bytes_step(name, setting, dtype, room)
            steps.append((name, step))
        if middle == 0 and stored_dtype == layout.dtype:
            checked = len(names) > 1 and names[-1] == "crc32c" and layout.byte_offset is None
            packed = names[1:-1] if checked else names[1:]
            self.is_raw = not packed
            if packed == [BITPACKING]:
                self.bitpacking = self._element_size(BITPACKING, settings[1])
            if names[1:] == [ROWPACK]:
                self.rowpack = self._element_size(ROWPACK, settings[1])
            self.tail = CRC32C_BYTES if checked and (self.is_raw or self.bitpacking) else 0
        return steps[::-1]

    def _v2_steps(self, setting: Configuration) -> list[_Step]:
        layout = self._layout
        filters, compressor = setting["filters"] or [], setting["compressor"]
        stored_dtype = np.dtype(setting["dtype"])
        order = setting["order"]
        steps: list[_Step] = [("bytes", _from_bytes(layout.chunk_shape, stored_dtype, order))]
        n = math.prod(layout.chunk_shape)
        room = Room(n * stored_dtype.itemsize, exact=True)
        for config in [*filters, *([compressor] if compressor else [])]:
            name = config["id"]
            if name == LZF:
                from hbx_gpu._codecs.lzf import decode_lzf  # imports numba: only where it is needed

                steps.append((name, lambda data: decode_lzf(data, self._nbytes)))
                room = room.compressed()
                continue
            if name not in _COMPRESSORS | _FILTERS:
                raise self._unsupported(name)
            codec = self._numcodec(name, config)
            if name in _FILTERS:
                steps.append((name, codec.decode))
                room = Room(n * _WIDEST + _SPARE)  # elements of any dtype
            else:
                step, room = bounded(name, codec, room)
                steps.append((name, step))
        c_order = order == "C" or len(layout.chunk_shape) < 2
        self.is_raw = len(steps) == 1 and c_order and stored_dtype == layout.dtype
        return steps[::-1]

    def _array_step(
        self, name: str, setting: Configuration, shape: tuple[int, ...], dtype: np.dtype
    ) -> tuple[Decode, tuple[int, ...], np.dtype]:
        """Return the decoder of a codec whose encoder takes an array, and the shape and dtype it stores."""
        if name == "transpose":
            order = setting.get("order")
            if not isinstance(order, list | tuple) or sorted(order) != list(range(len(shape))):
                raise CorruptDataError(
                    f"array {self._layout.name!r}: transpose order {order!r} is not a permutation of "
                    f"{len(shape)} axes"
                )
            inverse = np.argsort(order)
            return lambda data: np.asarray(data).transpose(inverse), tuple(shape[i] for i in order), dtype
        if not _works_on_arrays(name):
            step, _ = self._bytes_step(name, setting, dtype, Room(math.prod(shape) * dtype.itemsize))
            return step, shape, dtype
        return self._filter(name, name.removeprefix("numcodecs."), setting, shape, dtype)

    def _bytes_step(
        self, name: str, setting: Configuration, dtype: np.dtype, room: Room
    ) -> tuple[Decode, Room]:
        """Return the decoder of a codec whose encoder takes bytes, and the room of what it stores.

        `room` says how many bytes the encoder was given.
        """
        if name in (BITPACKING, ROWPACK):
            element_size = self._element_size(name, setting)
            decode = _bitpacking if name == BITPACKING else _rowpack
            return partial(decode, element_size=element_size, room=room), room.compressed()
        if name == "crc32c":
            return check_crc32c, room.plus(CRC32C_BYTES)
        codec_id = name.removeprefix("numcodecs.")
        if codec_id not in _COMPRESSORS:
            raise self._unsupported(name)
        if codec_id == "shuffle":
            setting = {"elementsize": dtype.itemsize, **setting}
        return bounded(codec_id, self._numcodec(name, {"id": codec_id, **setting}), room)

    def _filter(
        self, name: str, codec_id: str, setting: Configuration, shape: tuple[int, ...], dtype: np.dtype
    ) -> tuple[Decode, tuple[int, ...], np.dtype]:
        if codec_id in ("fixedscaleoffset", "quantize"):
            setting = {"dtype": str(dtype), **setting}
        if codec_id == "astype":
            setting = {"decode_dtype": str(dtype), **setting}
        codec = self._numcodec(name, {"id": codec_id, **setting})
        stored_shape, stored_dtype = shape, dtype
        if codec_id == "packbits":
            stored_shape, stored_dtype = (1 + -(-math.prod(shape) // 8),), np.dtype(np.uint8)
        elif stored := setting.get("encode_dtype" if codec_id == "astype" else "astype"):
            stored_dtype = np.dtype(stored)
        return lambda data: np.asarray(codec.decode(data)).reshape(shape), stored_shape, stored_dtype

    def _numcodec(self, name: str, config: Configuration) -> Numcodec:
        import numcodecs

        if config["id"] in _SETTINGS_FREE:
            config = {"id": config["id"]}
        try:
            codec: Numcodec = numcodecs.get_codec(config)
            return codec
        except (TypeError, ValueError, ImportError) as error:  # UnknownCodecError is a ValueError
            raise UnsupportedCodecError(
                f"array {self._layout.name!r}: codec {name!r} with configuration {config} cannot be set up: "
                f"{error}; is the package installed that numcodecs needs for it?"
            ) from error

    def _with_endian(self, dtype: np.dtype, endian: str | None) -> np.dtype:
        if dtype.itemsize == 1:
            return dtype
        if endian not in ("little", "big"):
            raise CorruptDataError(
                f"array {self._layout.name!r}: codec 'bytes' of dtype {dtype} needs endian little or big, "
                f"found {endian!r}"
            )
        return dtype.newbyteorder("<" if endian == "little" else ">")

    def _element_size(self, name: str, setting: Configuration) -> int:
        element_size = setting.get("element_size", 4)
        known = (4, 8) if name == BITPACKING else ELEMENT_SIZES
        if element_size not in known:
            raise UnsupportedCodecError(
                f"array {self._layout.name!r}: codec {name!r} with element_size {element_size!r}; "
                f"words of {', '.join(map(str, known[:-1]))} or {known[-1]} bytes can be decoded"
            )
        return int(element_size)

    def _unsupported(self, name: str) -> UnsupportedCodecError:
        known = sorted({"bytes", "transpose", BITPACKING, ROWPACK} | _COMPRESSORS | _FILTERS)
        return UnsupportedCodecError(
            f"array {self._layout.name!r}: codec {name!r} cannot be decoded; known codecs: "
            f"{', '.join(known)}. Rewrite the array with one of them"
        )


def _from_bytes(shape: tuple[int, ...], dtype: np.dtype, order: Literal["C", "F"]) -> Decode:
    nbytes = math.prod(shape) * dtype.itemsize

    def view(data: BytesLike) -> np.ndarray:
        raw = as_bytes(data)
        if len(raw) != nbytes:
            raise CorruptChunkError(
                f"chunk decodes to {len(raw)} bytes, {nbytes} expected for shape {shape} of {dtype}"
            )
        return raw.view(dtype).reshape(shape, order=order)

    return view


def _from_plain_bytes(shape: tuple[int, ...], dtype: np.dtype) -> Decode:
    """Return a decoder for chunks of a plain file, the last of which may be shorter than the others."""

    def view(data: BytesLike) -> np.ndarray:
        raw = as_bytes(data)
        if len(raw) % dtype.itemsize or len(raw) > math.prod(shape) * dtype.itemsize:
            raise CorruptChunkError(f"{len(raw)} bytes are not a whole number of elements of {dtype}")
        return raw.view(dtype)

    return view


def check_crc32c(data: BytesLike) -> np.ndarray:
    """Verify the CRC32C at the end of `data` and return the bytes before it.

    Raises
    ------
    CorruptChunkError
        The checksum differs, or `data` is too short to hold one.
    """
    raw = as_bytes(data)
    if len(raw) < 4:
        raise CorruptChunkError(f"codec 'crc32c' needs 4 bytes of checksum, the chunk has {len(raw)}")
    found = crc32c(raw[:-4])
    stored = int.from_bytes(raw[-4:].tobytes(), "little")
    if found != stored:
        raise CorruptChunkError(f"CRC32C is {found:#010x}, {stored:#010x} is stored: the bytes were altered")
    return raw[:-4]


def _works_on_arrays(name: str) -> bool:
    return name == "transpose" or name.removeprefix("numcodecs.") in _FILTERS


def _bitpacking(data: BytesLike, element_size: int, room: Room) -> np.ndarray:
    raw = as_bytes(data)
    room.check(element_size * bitpacking_length(raw), BITPACKING)
    return decode_bitpacking(raw, element_size)


def _rowpack(data: BytesLike, element_size: int, room: Room) -> np.ndarray:
    raw = as_bytes(data)
    header = read_header(raw, check=False)
    room.check(header.element_size * header.n, ROWPACK)
    return decode_rowpack(raw, element_size=element_size)
