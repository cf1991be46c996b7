"""The stream of homeobox.bitpacking: its meaning in NumPy (the reference), and the public way in and out.

The kernels of `bitpacking_numba` must agree with the reference here: values, bytes and error messages.

Format (zarr v3 codec ``homeobox.bitpacking``): a transform byte, the number of words as u32 little
endian, then for every 128 words a width byte and ``16 * width`` bytes of payload in the 4-lane layout
of the Rust crate ``bitpacking`` (``BitPacker4x``): value i lies in lane ``i % 4``, row ``i // 4``. Words
of 8 bytes make two such runs of blocks, all low halves before all high halves.
"""

from __future__ import annotations

import numpy as np

from hbx_gpu._codecs.bitpacking_format import (
    BLOCK,
    HEADER_BYTES,
    LANES,
    MAX_WORDS,
    MISSING_WIDTH,
    OK,
    ROWS,
    SHORT_HEADER,
    TRANSFORMS,
    TRUNCATED_BLOCK,
    UNKNOWN_TRANSFORM,
    WIDE_BLOCK,
    BytesLike,
    as_bytes,
    describe_status,
    transform_code,
)
from hbx_gpu.errors import CorruptChunkError


def decode_bitpacking(data: BytesLike, element_size: int = 4) -> np.ndarray:
    """Unpack one chunk of ``homeobox.bitpacking``.

    Parameters
    ----------
    data
        The encoded chunk. Its own transform byte says how it is decoded; bytes after the last block are
        ignored.
    element_size
        Bytes per word, 4 or 8. It is not part of the stream, so it must come from the codec's configuration.

    Returns
    -------
    ndarray
        (n,), uint32 for 4-byte words, uint64 for 8-byte words. View it as the array's dtype: the codec
        packs raw bytes, so that two uint16 may share a word.

    Raises
    ------
    CorruptChunkError
        The header, a width byte or payload is missing, a width is above 32, or the transform is unknown.
    """
    from hbx_gpu._codecs import bitpacking_numba  # numba takes long to import; do so on first use

    _check_element_size(element_size)
    src = as_bytes(data)
    n, _ = _read_header(src)
    if _blocks(n) * (element_size // 4) > len(src) - HEADER_BYTES:
        # The chunk is shorter than its header says: allocate nothing, and let the reference find where it
        # ends.
        return decode_bitpacking_reference(src, element_size)
    out = np.empty(n, _word_dtype(element_size))
    status = bitpacking_numba.decode_into(src, element_size, n, 0, n, out)
    if status != OK:
        raise CorruptChunkError(describe_status(status))
    return out


def encode_bitpacking(data: BytesLike, transform: str = "none", element_size: int = 4) -> bytes:
    """Pack one chunk as ``homeobox.bitpacking``.

    Parameters
    ----------
    data
        Bytes, or an integer array, which counts as its little-endian bytes. The length in bytes must be
        a multiple of `element_size`.
    transform
        ``none``; ``delta``: differences modulo 2^32 (2^64); ``delta_zigzag``: the same, sign folded
        into the lowest bit.
    element_size
        Bytes per packed word, 4 or 8.

    Raises
    ------
    ValueError
        The transform or the element size is unknown, the length is not a multiple of the element size, or
        there are more than 2^32 - 1 words.
    """
    from hbx_gpu._codecs import bitpacking_numba

    words = _as_words(data, element_size)
    out = np.empty(bitpacking_numba.max_encoded_size(len(words), element_size), np.uint8)
    size = bitpacking_numba.encode_into(words, transform_code(transform), out)
    return out[:size].tobytes()


def decode_bitpacking_reference(data: BytesLike, element_size: int = 4) -> np.ndarray:
    """`decode_bitpacking` in NumPy, for reading and for tests."""
    _check_element_size(element_size)
    src = as_bytes(data)
    n, transform = _read_header(src)
    low, end = _unpack_blocks(src, HEADER_BYTES, _blocks(n))
    if element_size == 4:
        return _undo_transform(low[:n], transform)
    high, _ = _unpack_blocks(src, end, _blocks(n))
    return _undo_transform((low | high.astype(np.uint64) << np.uint64(32))[:n], transform)


def encode_bitpacking_reference(data: BytesLike, transform: str = "none", element_size: int = 4) -> bytes:
    """`encode_bitpacking` in NumPy, for reading and for tests."""
    words = _as_words(data, element_size)
    code = transform_code(transform)
    padded = np.zeros(_blocks(len(words)) * BLOCK, words.dtype)
    padded[: len(words)] = _apply_transform(words, code)
    parts = [bytes([code]), len(words).to_bytes(4, "little"), *_pack_blocks(padded.astype(np.uint32))]
    if element_size == 8:
        parts += _pack_blocks((padded >> np.uint64(32)).astype(np.uint32))
    return b"".join(parts)


def _check_element_size(element_size: int) -> None:
    if element_size not in (4, 8):
        raise ValueError(f"bitpacking element_size must be 4 or 8, not {element_size!r}")


def _word_dtype(element_size: int) -> np.dtype:
    return np.dtype(np.uint32 if element_size == 4 else np.uint64)


def _blocks(n_words: int) -> int:
    return -(-n_words // BLOCK)


def _as_words(data: BytesLike, element_size: int) -> np.ndarray:
    _check_element_size(element_size)
    if isinstance(data, np.ndarray):
        if data.dtype.kind not in "iu":
            raise TypeError(f"bitpacking takes bytes or an integer array, not dtype {data.dtype}")
        data = np.ascontiguousarray(data, data.dtype.newbyteorder("<"))
    src = as_bytes(data)
    if len(src) % element_size:
        raise ValueError(
            f"bitpacking packs words of {element_size} bytes, the input has {len(src)} bytes, which is not a "
            "multiple; choose an even chunk length or another codec"
        )
    if len(src) // element_size > MAX_WORDS:
        raise ValueError(f"a bitpacked chunk holds at most {MAX_WORDS} words; choose smaller chunks")
    return np.require(src.view(_word_dtype(element_size)), requirements="A")


def bitpacking_length(data: BytesLike) -> int:
    """Return the number of words that the header of a chunk gives.

    Raises
    ------
    CorruptChunkError
        There is no header, or it names an unknown transform.
    """
    return _read_header(as_bytes(data))[0]


def _read_header(src: np.ndarray) -> tuple[int, int]:
    if len(src) < HEADER_BYTES:
        raise CorruptChunkError(describe_status(SHORT_HEADER | len(src) << 8))
    transform = int(src[0])
    if transform not in TRANSFORMS.values():
        raise CorruptChunkError(describe_status(UNKNOWN_TRANSFORM | transform << 8))
    return int.from_bytes(src[1:HEADER_BYTES].tobytes(), "little"), transform


def _walk(src: np.ndarray, pos: int, n_blocks: int) -> tuple[np.ndarray, np.ndarray, int]:
    """Return payload offsets and widths of a run of blocks, and where the run ends.

    The memory used is bounded by the size of `src`, whatever `n_blocks` says.
    """
    starts, widths = [], []
    for _ in range(n_blocks):
        if pos >= len(src):
            raise CorruptChunkError(describe_status(MISSING_WIDTH | pos << 8))
        width = int(src[pos])
        if width > 32:
            raise CorruptChunkError(describe_status(WIDE_BLOCK | pos << 8))
        if pos + 1 + 16 * width > len(src):
            raise CorruptChunkError(describe_status(TRUNCATED_BLOCK | pos << 8))
        starts.append(pos + 1)
        widths.append(width)
        pos += 1 + 16 * width
    return np.array(starts, np.int64), np.array(widths, np.int64), pos


def _unpack_blocks(src: np.ndarray, pos: int, n_blocks: int) -> tuple[np.ndarray, int]:
    """Return the uint32 values of a run of blocks, padding included, and the offset after the run."""
    starts, widths, end = _walk(src, pos, n_blocks)
    out = np.zeros((n_blocks, ROWS, LANES), np.uint32)
    for width in np.unique(widths[widths > 0]):
        chosen = np.flatnonzero(widths == width)
        payload = src[starts[chosen, None] + np.arange(16 * width)]
        words = payload.view("<u4").reshape(-1, width, LANES)
        for row in range(ROWS):
            k, shift = divmod(row * int(width), 32)
            value = words[:, k] >> np.uint32(shift)
            if shift + width > 32:
                value = value | words[:, k + 1] << np.uint32(32 - shift)
            out[chosen, row] = value & np.uint32((1 << int(width)) - 1)
    return out.reshape(-1), end


def _pack_blocks(values: np.ndarray) -> list[bytes]:
    blocks = values.reshape(-1, ROWS, LANES)
    # float64 holds every uint32, so its exponent is the exact bit length.
    widths = np.frexp(blocks.max(axis=(1, 2), initial=0).astype(np.float64))[1]
    packed: list[bytes] = [b"\0"] * len(blocks)
    for width in np.unique(widths[widths > 0]):
        chosen = np.flatnonzero(widths == width)
        words = np.zeros((len(chosen), width, LANES), "<u4")
        for row in range(ROWS):
            k, shift = divmod(row * int(width), 32)
            words[:, k] |= blocks[chosen, row] << np.uint32(shift)
            if shift + width > 32:
                words[:, k + 1] |= blocks[chosen, row] >> np.uint32(32 - shift)
        for i, payload in zip(chosen, words, strict=True):
            packed[i] = bytes([width]) + payload.tobytes()
    return packed


def _undo_transform(stored: np.ndarray, transform: int) -> np.ndarray:
    if transform == TRANSFORMS["none"]:
        return stored
    if transform == TRANSFORMS["delta_zigzag"]:
        one = stored.dtype.type(1)
        stored = (stored >> one) ^ -(stored & one)
    return np.cumsum(stored, dtype=stored.dtype)


def _apply_transform(words: np.ndarray, transform: int) -> np.ndarray:
    if transform == TRANSFORMS["none"]:
        return words
    delta = np.diff(words, prepend=words.dtype.type(0))
    if transform == TRANSFORMS["delta"]:
        return delta
    signed = delta.view(f"i{delta.itemsize}")
    return ((signed << 1) ^ (signed >> (8 * delta.itemsize - 1))).view(delta.dtype)
