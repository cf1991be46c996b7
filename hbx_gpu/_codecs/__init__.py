"""Codecs of array chunks: homeobox.bitpacking and hbx_gpu.rowpack here, every other chain in `chain`."""

from hbx_gpu._codecs.bitpacking import (
    decode_bitpacking,
    decode_bitpacking_reference,
    encode_bitpacking,
    encode_bitpacking_reference,
)
from hbx_gpu._codecs.rowpack import (
    decode_rowpack,
    decode_rowpack_reference,
    encode_rowpack,
    encode_rowpack_reference,
)

__all__ = [
    "decode_bitpacking",
    "decode_bitpacking_reference",
    "decode_rowpack",
    "decode_rowpack_reference",
    "encode_bitpacking",
    "encode_bitpacking_reference",
    "encode_rowpack",
    "encode_rowpack_reference",
]
