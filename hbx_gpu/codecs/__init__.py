"""Codecs of array chunks: homeobox.bitpacking here, every other codec chain in `chain`."""

from hbx_gpu.codecs.bitpacking import (
    decode_bitpacking,
    decode_bitpacking_reference,
    encode_bitpacking,
    encode_bitpacking_reference,
)

__all__ = [
    "decode_bitpacking",
    "decode_bitpacking_reference",
    "encode_bitpacking",
    "encode_bitpacking_reference",
]
