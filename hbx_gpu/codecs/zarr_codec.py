"""`homeobox.bitpacking` as a codec of zarr-python, so that `zarr.open` reads and writes such arrays."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from zarr.abc.codec import BytesBytesCodec
from zarr.core.common import JSON, parse_named_configuration

from hbx_gpu.codecs.bitpacking import decode_bitpacking, encode_bitpacking, transform_code

if TYPE_CHECKING:
    from typing import Self

    from zarr.core.array_spec import ArraySpec
    from zarr.core.buffer import Buffer


@dataclass(frozen=True)
class BitpackingCodec(BytesBytesCodec):
    """Bit-packs blocks of 128 words; zarr v3 codec ``homeobox.bitpacking``.

    Parameters
    ----------
    transform
        ``none``, ``delta`` or ``delta_zigzag``.
    element_size
        Bytes per packed word, 4 or 8. The bytes of a chunk must be a multiple of it.
    """

    is_fixed_size = False

    transform: str = "none"
    element_size: int = 4

    def __post_init__(self) -> None:
        transform_code(self.transform)
        if not isinstance(self.element_size, int) or self.element_size not in (4, 8):
            raise ValueError(f"homeobox.bitpacking: element_size must be 4 or 8, not {self.element_size!r}")

    @classmethod
    def from_dict(cls, data: dict[str, JSON]) -> Self:
        _, configuration = parse_named_configuration(data, "homeobox.bitpacking", require_configuration=False)
        configuration = configuration or {}
        unknown = sorted(set(configuration) - {"transform", "element_size"})
        if unknown:
            raise ValueError(
                f"homeobox.bitpacking: unknown configuration {', '.join(unknown)}; "
                "it takes transform and element_size"
            )
        return cls(**configuration)  # type: ignore[arg-type]

    def to_dict(self) -> dict[str, JSON]:
        return {
            "name": "homeobox.bitpacking",
            "configuration": {"transform": self.transform, "element_size": self.element_size},
        }

    def _decode_sync(self, chunk_bytes: Buffer, chunk_spec: ArraySpec) -> Buffer:
        words = decode_bitpacking(chunk_bytes.as_numpy_array(), self.element_size)
        return chunk_spec.prototype.buffer.from_bytes(words.view(np.uint8).data)

    async def _decode_single(self, chunk_bytes: Buffer, chunk_spec: ArraySpec) -> Buffer:
        return await asyncio.to_thread(self._decode_sync, chunk_bytes, chunk_spec)

    def _encode_sync(self, chunk_bytes: Buffer, chunk_spec: ArraySpec) -> Buffer | None:
        encoded = encode_bitpacking(chunk_bytes.as_numpy_array(), self.transform, self.element_size)
        return chunk_spec.prototype.buffer.from_bytes(encoded)

    async def _encode_single(self, chunk_bytes: Buffer, chunk_spec: ArraySpec) -> Buffer | None:
        return await asyncio.to_thread(self._encode_sync, chunk_bytes, chunk_spec)

    def compute_encoded_size(self, input_byte_length: int, _chunk_spec: ArraySpec) -> int:
        raise NotImplementedError("the size of a bitpacked chunk depends on its values")
