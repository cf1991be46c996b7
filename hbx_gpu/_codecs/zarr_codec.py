"""`homeobox.bitpacking` and `hbx_gpu.rowpack` as codecs of zarr-python, for `zarr.open` to read and write."""

from __future__ import annotations

import asyncio
import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

import numpy as np
from zarr import config
from zarr.abc.codec import BytesBytesCodec
from zarr.core.common import JSON, parse_named_configuration
from zarr.registry import register_codec

from hbx_gpu._codecs import bitpacking, bitpacking_format, rowpack, rowpack_format

if TYPE_CHECKING:
    from typing import Self

    from zarr.core.array_spec import ArraySpec
    from zarr.core.buffer import Buffer


@dataclass(frozen=True)
class _PackingCodec(BytesBytesCodec):
    """Base of both codecs: checks a transform and a word size, and encodes and decodes in threads."""

    is_fixed_size = False
    codec_name: ClassVar[str]
    element_sizes: ClassVar[tuple[int, ...]]

    transform: str = "none"
    element_size: int = 4

    def __post_init__(self) -> None:
        # isinstance would accept True, which is not a number of bytes.
        if type(self.element_size) is not int or self.element_size not in self.element_sizes:
            *most, last = map(str, self.element_sizes)
            raise ValueError(
                f"{self.codec_name}: element_size must be {', '.join(most)} or {last}, "
                f"not {self.element_size!r}"
            )

    @classmethod
    def from_dict(cls, data: dict[str, JSON]) -> Self:
        _, configuration = parse_named_configuration(data, cls.codec_name, require_configuration=False)
        configuration = configuration or {}
        unknown = sorted(set(configuration) - {"transform", "element_size"})
        if unknown:
            raise ValueError(
                f"{cls.codec_name}: unknown configuration {', '.join(unknown)}; "
                "it takes transform and element_size"
            )
        return cls(**configuration)  # type: ignore[arg-type]

    def to_dict(self) -> dict[str, JSON]:
        return {
            "name": self.codec_name,
            "configuration": {"transform": self.transform, "element_size": self.element_size},
        }

    def _unpack(self, chunk: np.ndarray, spec: ArraySpec) -> np.ndarray:
        raise NotImplementedError

    def _pack(self, data: np.ndarray, spec: ArraySpec) -> bytes:
        raise NotImplementedError

    def _decode_sync(self, chunk_bytes: Buffer, chunk_spec: ArraySpec) -> Buffer:
        words = self._unpack(chunk_bytes.as_numpy_array(), chunk_spec)
        return chunk_spec.prototype.buffer.from_bytes(words.view(np.uint8).data)

    async def _decode_single(self, chunk_bytes: Buffer, chunk_spec: ArraySpec) -> Buffer:
        return await asyncio.to_thread(self._decode_sync, chunk_bytes, chunk_spec)

    def _encode_sync(self, chunk_bytes: Buffer, chunk_spec: ArraySpec) -> Buffer | None:
        encoded = self._pack(chunk_bytes.as_numpy_array(), chunk_spec)
        return chunk_spec.prototype.buffer.from_bytes(encoded)

    async def _encode_single(self, chunk_bytes: Buffer, chunk_spec: ArraySpec) -> Buffer | None:
        return await asyncio.to_thread(self._encode_sync, chunk_bytes, chunk_spec)

    def compute_encoded_size(self, input_byte_length: int, _chunk_spec: ArraySpec) -> int:
        raise NotImplementedError(f"the size of a chunk of {self.codec_name} depends on its values")


@dataclass(frozen=True)
class BitpackingCodec(_PackingCodec):
    """Bit-packs blocks of 128 words; zarr v3 codec ``homeobox.bitpacking``.

    Parameters
    ----------
    transform
        Name of the transform: ``none``, ``delta`` or ``delta_zigzag``.
    element_size
        Bytes per packed word, 4 or 8. The bytes of a chunk must be a multiple of it.
    """

    codec_name = "homeobox.bitpacking"
    element_sizes = (4, 8)

    def __post_init__(self) -> None:
        bitpacking_format.transform_code(self.transform)
        super().__post_init__()

    def _unpack(self, chunk: np.ndarray, spec: ArraySpec) -> np.ndarray:  # noqa: ARG002
        return bitpacking.decode_bitpacking(chunk, self.element_size)

    def _pack(self, data: np.ndarray, spec: ArraySpec) -> bytes:  # noqa: ARG002
        return bitpacking.encode_bitpacking(data, self.transform, self.element_size)


@dataclass(frozen=True)
class RowpackCodec(_PackingCodec):
    """Packs blocks of 128 words that decode alone; zarr v3 codec ``hbx_gpu.rowpack``, see docs/format.md.

    It must be the first codec after ``bytes``: a chunk's number of words is checked against the array's
    metadata.

    Parameters
    ----------
    transform
        Name of the transform: ``none``, or ``gaps`` for column indices in CSR order.
    element_size
        Bytes per packed word, 1, 2, 4 or 8; the item size of the array packs best.
    """

    codec_name = "hbx_gpu.rowpack"
    element_sizes = rowpack_format.ELEMENT_SIZES

    def __post_init__(self) -> None:
        rowpack_format.transform_code(self.transform)
        super().__post_init__()

    def _n_words(self, spec: ArraySpec) -> int:
        nbytes = math.prod(spec.shape) * spec.dtype.to_native_dtype().itemsize
        if nbytes % self.element_size:
            raise ValueError(
                f"hbx_gpu.rowpack: a chunk of {nbytes} bytes is not a multiple of element_size "
                f"{self.element_size}; choose the array's item size"
            )
        return nbytes // self.element_size

    def _unpack(self, chunk: np.ndarray, spec: ArraySpec) -> np.ndarray:
        words = rowpack.decode_rowpack(chunk, element_size=self.element_size, n=self._n_words(spec))
        return words.astype(words.dtype.newbyteorder("<"), copy=False)

    def _pack(self, data: np.ndarray, spec: ArraySpec) -> bytes:
        if data.nbytes != self._n_words(spec) * self.element_size:
            raise ValueError(
                f"hbx_gpu.rowpack: {data.nbytes} bytes do not make a chunk of shape {spec.shape} of "
                f"{spec.dtype.to_native_dtype()}; put the codec directly after 'bytes'"
            )
        return rowpack.encode_rowpack(data.view(f"<u{self.element_size}"), self.transform)


def _choose(codec: type[_PackingCodec]) -> None:
    """Let zarr-python take `codec` where another package has one of the same name, unless the user chose.

    Homeobox registers its own ``homeobox.bitpacking``; without a choice, zarr warns at every array.
    """
    register_codec(codec.codec_name, codec)
    chosen = {codec.codec_name: f"{codec.__module__}.{codec.__qualname__}", **config.get("codecs", {})}
    config.set({"codecs": chosen})


_choose(BitpackingCodec)
_choose(RowpackCodec)
