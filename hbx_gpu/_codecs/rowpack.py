"""Codec `hbx_gpu.rowpack`: its meaning in NumPy (the reference), and the public way in and out.

Each block of 128 values decodes alone: a directory at the front of the chunk says where the block's payload
and patches lie, so that reading one row does not decode its neighbors. docs/format.md specifies every byte;
the kernels of `rowpack_numba` must agree with the reference here on values, bytes and what they refuse.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator

import numpy as np

from hbx_gpu._codecs.bitpacking_format import BytesLike, as_bytes
from hbx_gpu._codecs.checksum import crc32c
from hbx_gpu._codecs.rowpack_format import (
    BLOCK,
    ELEMENT_SIZES,
    HEADER,
    MAGIC,
    MAX_EXCEPTIONS,
    MAX_VALUES,
    PATCH_BITS,
    RECORD_BLOCKS,
    TAIL_BYTES,
    TRANSFORMS,
    VERSION,
    Block,
    ChunkHeader,
    read_header,
    record_bytes,
    transform_code,
)
from hbx_gpu.errors import CorruptChunkError


def bit_length(values: np.ndarray) -> np.ndarray:
    """Return the number of significant bits of each uint64 value; 0 for 0."""
    values = np.asarray(values, dtype=np.uint64)
    bits = np.zeros(values.shape, dtype=np.int64)
    for step in (32, 16, 8, 4, 2, 1):
        more = values >= np.uint64(1) << np.uint64(step)
        bits[more] += step
        values = np.where(more, values >> np.uint64(step), values)
    return bits + (values > 0)


def unpack(payload: np.ndarray, width: int) -> np.ndarray:
    """Unpack 128 values of `width` <= 32 bits from 16 * width bytes in the 4-lane vertical layout.

    Value i lies in lane ``i % 4`` at bits ``(i // 4) * width ...`` of that lane; word k of a lane is the
    little-endian u32 number ``4 * k + lane``.
    """
    words = np.zeros((width + 1, 4), dtype=np.uint64)
    words[:width] = payload[: 16 * width].view("<u4").reshape(width, 4)
    bit = np.arange(32) * width
    word, shift = bit // 32, (bit % 32).astype(np.uint64)[:, None]
    pair = words[word] | words[np.minimum(word + 1, width)] << np.uint64(32)
    return (pair >> shift & np.uint64((1 << width) - 1)).reshape(BLOCK)


def pack(values: np.ndarray, width: int) -> bytes:
    """Inverse of :func:`unpack` for 128 values below ``2**width``."""
    words = np.zeros((width + 1, 4), dtype=np.uint64)
    for row, four in enumerate(values.astype(np.uint64).reshape(32, 4)):
        word, shift = divmod(row * width, 32)
        wide = four << np.uint64(shift)
        words[word] |= wide & np.uint64(0xFFFFFFFF)
        if shift + width > 32:
            words[word + 1] |= wide >> np.uint64(32)
    return words[:width].astype("<u4").tobytes()


def _unpack_wide(payload: np.ndarray, width: int) -> np.ndarray:
    """Unpack 128 values of up to 64 bits: the low 32 bits are one packed plane, the rest another."""
    low = unpack(payload, min(width, 32))
    return low | unpack(payload[512:], width - 32) << np.uint64(32) if width > 32 else low


def _pack_wide(values: np.ndarray, width: int) -> bytes:
    """Inverse of :func:`_unpack_wide`."""
    low = pack(values & np.uint64(0xFFFFFFFF), min(width, 32))
    return low + pack(values >> np.uint64(32), width - 32) if width > 32 else low


def choose_width(stored: np.ndarray) -> tuple[int, int]:
    """Return the payload width and the index into PATCH_BITS that make the block smallest.

    Ties go to the larger width, which leaves fewer exceptions to patch.
    """
    bits = bit_length(stored)
    widest = int(bits.max())
    best = (16 * widest, widest, 0)
    for width in range(widest - 1, -1, -1):
        exceptions = int((bits > width).sum())
        code = next((c for c, b in enumerate(PATCH_BITS) if b >= widest - width), None)
        if exceptions > MAX_EXCEPTIONS or code is None:
            break
        size = 16 * width + exceptions + -(-exceptions * PATCH_BITS[code] // 8)
        if size < best[0]:
            best = (size, width, code)
    return best[1], best[2]


def _stored(block: np.ndarray, transform: int, minimum: int) -> tuple[np.ndarray, np.ndarray]:
    """Return the 128 uint64 that a block stores, and its resets: the positions that are not differences."""
    if transform == TRANSFORMS["none"]:
        return block - np.uint64(minimum), np.empty(0, dtype=np.int64)
    resets = 1 + np.flatnonzero(block[1:] < block[:-1])
    stored = np.diff(block, prepend=block[:1])
    stored[resets] = block[resets]
    return stored, resets


def encode_rowpack_reference(values: np.ndarray, transform: str = "none") -> bytes:
    """`encode_rowpack` in NumPy, a block at a time, for reading and for tests."""
    values, kind, minimum, base_bytes = _prepare(values, transform)
    blocks = np.zeros((-(-len(values) // BLOCK), BLOCK), dtype=np.uint64)
    flat = blocks.reshape(-1)
    flat[: len(values)] = values
    # The last block is filled up with values that are stored as zeros.
    flat[len(values) :] = values[-1:] if kind == TRANSFORMS["gaps"] else minimum

    directory, payload, patches = bytearray(), bytearray(), bytearray()
    for first in range(0, len(blocks), RECORD_BLOCKS):
        directory += struct.pack("<II", len(payload) // 16, len(patches))
        widths, infos, resets = (bytearray(RECORD_BLOCKS) for _ in range(3))
        bases = bytearray(RECORD_BLOCKS * base_bytes)
        for k, block in enumerate(blocks[first : first + RECORD_BLOCKS]):
            stored, reset_at = _stored(block, kind, minimum)
            width, code = choose_width(stored)
            positions = np.flatnonzero(bit_length(stored) > width)
            payload += _pack_wide(stored & np.uint64((1 << width) - 1), width)
            patches += bytes(positions.tolist()) + bytes(reset_at.tolist())
            high = sum(int(stored[p]) >> width << j * PATCH_BITS[code] for j, p in enumerate(positions))
            patches += high.to_bytes(-(-len(positions) * PATCH_BITS[code] // 8), "little")
            widths[k], infos[k], resets[k] = width, len(positions) | code << 5, len(reset_at)
            bases[k * base_bytes : (k + 1) * base_bytes] = int(block[0]).to_bytes(8, "little")[:base_bytes]
        directory += widths + infos + (resets + bases if kind == TRANSFORMS["gaps"] else b"")
    return _assemble(values, kind, minimum, base_bytes, directory, payload, patches)


def decode_rowpack_reference(chunk: BytesLike, *, check: bool = True) -> np.ndarray:
    """`decode_rowpack` in NumPy, a block at a time, for reading and for tests."""
    header = read_header(chunk, check=check)
    data = as_bytes(chunk)
    _check_reserved(data, header)
    out = np.empty((header.n_blocks, BLOCK), dtype=np.uint64)
    payload_at, patch_at = header.payload_start, header.patch_start
    for b in range(header.n_blocks):
        block = look_up(data, header, b)
        if (block.payload_at, block.patch_at) != (payload_at, patch_at):
            raise CorruptChunkError(f"block {b} does not begin where the one before it ends")
        out[b] = decode_block(data, header, b, block)
        payload_at += 16 * block.width
        patch_at += block.patch_bytes
    if (payload_at, patch_at) != (header.patch_start, header.patch_end):
        raise CorruptChunkError("the last block does not end where payload and patches end")
    return out.reshape(-1)[: header.n].astype(f"u{header.element_size}")  # modulo 2**bits


def _check_reserved(data: np.ndarray, header: ChunkHeader) -> None:
    """Check that padding, unused places of the last record and four bytes before the checksum are zero."""
    areas = [data[header.directory_end : header.payload_start], data[-TAIL_BYTES:-4]]
    used = header.n_blocks % RECORD_BLOCKS
    if used:
        record = data[header.directory_end - header.record_bytes : header.directory_end]
        areas += [record[8 + used : 16], record[16 + used : 24], record[24 + used : 32]]
        areas += [record[32 + used * header.base_bytes :]]
    if any(area.any() for area in areas):
        raise CorruptChunkError("reserved bytes are not zero")


def look_up(data: np.ndarray, header: ChunkHeader, b: int) -> Block:
    """Return the directory's entry for block b, and check that the block lies inside the chunk's areas."""
    k = b % RECORD_BLOCKS
    record = data[HEADER.size + b // RECORD_BLOCKS * header.record_bytes :][: header.record_bytes]
    payload_at = header.payload_start + 16 * int.from_bytes(record[:4].tobytes(), "little")
    patch_at = header.patch_start + int.from_bytes(record[4:8].tobytes(), "little")
    block = list(directory_entries(record, header, payload_at, patch_at, k + 1))[-1]
    bits = 8 * header.element_size
    if block.width > bits or (block.width == bits and block.exceptions):
        raise CorruptChunkError(f"block {b}: {block.width} bits and {block.exceptions} exceptions")
    if block.payload_at + 16 * block.width > header.patch_start:
        raise CorruptChunkError(f"block {b}: payload at {block.payload_at} leaves the payload area")
    if block.patch_at + block.patch_bytes > header.patch_end:
        raise CorruptChunkError(f"block {b}: patches at {block.patch_at} leave the chunk")
    return block


def directory_entries(
    record: np.ndarray, header: ChunkHeader, payload_at: int, patch_at: int, n: int
) -> Iterator[Block]:
    """Return the first n entries of a record; each block begins where the one before it ends."""
    gaps = header.transform == TRANSFORMS["gaps"]
    for k in range(n):
        info = int(record[16 + k])
        base = record[32 + k * header.base_bytes :][: header.base_bytes].tobytes()
        block = Block(
            payload_at=payload_at,
            patch_at=patch_at,
            width=int(record[8 + k]),
            exceptions=info & 31,
            high_bits=PATCH_BITS[info >> 5],
            resets=int(record[24 + k]) if gaps else 0,
            base=int.from_bytes(base, "little"),
        )
        yield block
        payload_at += 16 * block.width
        patch_at += block.patch_bytes


def decode_block(data: np.ndarray, header: ChunkHeader, b: int, block: Block) -> np.ndarray:
    """Return the 128 values of block b as uint64, correct modulo 2**(8 * element_size)."""
    stored = _unpack_wide(data[block.payload_at :], block.width)
    patch = data[block.patch_at : block.patch_at + block.patch_bytes]
    positions, resets, high = np.split(patch, [block.exceptions, block.exceptions + block.resets])
    for name, places, lowest in (("exceptions", positions, 0), ("resets", resets, 1)):
        if (np.diff(places.astype(int)) <= 0).any() or ((places < lowest) | (places >= BLOCK)).any():
            raise CorruptChunkError(f"block {b}: positions of {name} must ascend from {lowest} to 127")
    high_parts = int.from_bytes(high.tobytes(), "little")
    for j, position in enumerate(positions):
        part = high_parts >> j * block.high_bits & (1 << block.high_bits) - 1
        stored[position] |= np.uint64((part << block.width) % 2**64)
    if header.transform == TRANSFORMS["none"]:
        return stored + np.uint64(header.minimum)
    out = np.empty(BLOCK, dtype=np.uint64)
    begins_anew = set(resets.tolist())
    value = block.base
    for i in range(BLOCK):
        value = (int(stored[i]) + (0 if i in begins_anew else value)) % 2**64
        out[i] = value
    return out


def encode_rowpack(values: np.ndarray, transform: str = "none") -> bytes:
    """Pack one chunk.

    Parameters
    ----------
    values
        The values: uint8, uint16, uint32 or uint64, (n,), n <= 2**28.
    transform
        ``"gaps"`` for column indices in CSR order: it stores differences, and starts again from a value
        itself where that value is smaller than the one before it. ``"none"`` for anything else, such as
        counts.

    Returns
    -------
    bytes
        The chunk, the same bytes as `encode_rowpack_reference` returns.

    Raises
    ------
    TypeError, ValueError
        The values have another dtype or are too many, or the transform is unknown.
    """
    from hbx_gpu._codecs import rowpack_encode  # numba takes long to import; do so on first use

    values, kind, minimum, base_bytes = _prepare(values, transform)
    n_blocks = -(-len(values) // BLOCK)
    directory = np.zeros(-(-n_blocks // RECORD_BLOCKS) * record_bytes(kind, base_bytes), dtype=np.uint8)
    payload = np.empty(n_blocks * BLOCK * values.itemsize, dtype=np.uint8)
    # A block has at most 31 exceptions of 5 bytes and 127 resets of 1 byte.
    patches = np.empty(n_blocks * 288, dtype=np.uint8)
    payload_bytes, patch_bytes = rowpack_encode.encode_blocks(
        values.astype(np.uint64),
        kind == TRANSFORMS["gaps"],
        np.uint64(minimum),
        base_bytes,
        directory,
        payload,
        patches,
    )
    areas = (directory.data, payload[:payload_bytes].data, patches[:patch_bytes].data)
    return _assemble(values, kind, minimum, base_bytes, *areas)


def decode_rowpack(
    chunk: BytesLike, *, element_size: int | None = None, n: int | None = None, check: bool = True
) -> np.ndarray:
    """Unpack one chunk.

    Parameters
    ----------
    chunk
        A chunk from :func:`encode_rowpack`.
    element_size, n
        Bytes per value and number of values according to the array's metadata; a header that says otherwise
        is an error.
    check
        Whether to verify the checksum; without it, altered bytes may decode to wrong values.

    Returns
    -------
    ndarray
        The values: uint8, uint16, uint32 or uint64, (n,).

    Raises
    ------
    CorruptChunkError
        The bytes are not a chunk that an encoder writes.
    """
    from hbx_gpu._codecs import rowpack_numba  # numba takes long to import; do so on first use

    header = read_header(chunk, check=check)
    if element_size not in (None, header.element_size):
        raise CorruptChunkError(f"elements of {header.element_size} bytes, the metadata say {element_size}")
    if n not in (None, header.n):
        raise CorruptChunkError(f"the header says {header.n} values, the metadata demand {n}")
    # The directory takes at least three bytes per block, so the chunk's length bounds what is allocated here.
    out = np.empty(header.n_blocks * BLOCK, dtype=np.uint64 if header.element_size == 8 else np.uint32)
    src = as_bytes(chunk).view()
    src.flags.writeable = False  # numba would compile the kernels a second time for writable memory
    status = rowpack_numba.check_directory(src, header.element_size, header.n)
    if status == rowpack_numba.OK:
        status = rowpack_numba.decode_rowpack_into(src, header.element_size, header.n, 0, header.n, out)
    if status != rowpack_numba.OK:
        raise CorruptChunkError(rowpack_numba.describe_status(status))
    return out[: header.n].astype(f"u{header.element_size}", copy=False)


def _prepare(values: np.ndarray, transform: str) -> tuple[np.ndarray, int, int, int]:
    """Check the input; return (contiguous native values, transform byte, minimum, bytes per base)."""
    kind = transform_code(transform)
    if values.dtype.kind != "u" or values.ndim != 1:
        raise TypeError(
            f"rowpack takes one-dimensional unsigned integers, not {values.dtype} of shape {values.shape}; "
            "view non-negative signed integers as unsigned"
        )
    if len(values) > MAX_VALUES:
        raise ValueError(f"{len(values)} values; a rowpack chunk holds {MAX_VALUES}. Choose smaller chunks")
    values = np.ascontiguousarray(values, dtype=values.dtype.newbyteorder("="))
    if kind == TRANSFORMS["none"]:
        return values, kind, int(values.min()) if len(values) else 0, 0
    widest = int(values[::BLOCK].max(initial=0)).bit_length()
    return values, kind, 0, next(size for size in ELEMENT_SIZES if widest <= 8 * size)


def _assemble(
    values: np.ndarray,
    kind: int,
    minimum: int,
    base_bytes: int,
    directory: bytearray | memoryview,
    payload: bytearray | memoryview,
    patches: bytearray | memoryview,
) -> bytes:
    begin = -(-(HEADER.size + len(directory)) // 16) * 16
    patch_start = begin + len(payload)
    nbytes = patch_start + len(patches) + TAIL_BYTES
    head = HEADER.pack(
        MAGIC, VERSION, values.itemsize, kind, base_bytes, len(values), patch_start, minimum, nbytes, 0
    )
    padding = bytes(begin - HEADER.size - len(directory))
    body = b"".join((head, directory, padding, payload, patches, bytes(4)))
    return body + crc32c(body).to_bytes(4, "little")
