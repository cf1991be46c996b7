"""Numba kernels of homeobox.bitpacking. They check bounds, release the GIL and can be called from kernels.

They return a status (see `bitpacking.describe_status`) because compiled code without the GIL cannot raise.
Bytes are taken in machine order, so only little-endian hosts work; numba and CUDA support no others today.
"""

# numba looks at the names of arguments that only the generated code uses.
# ruff: noqa: ARG001, ARG005

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
from llvmlite import ir
from numba import njit, types
from numba.extending import intrinsic, overload

from hbx_gpu._codecs.bitpacking_format import (
    BAD_REQUEST,
    BLOCK,
    HEADER_BYTES,
    MISSING_WIDTH,
    OK,
    SHORT_HEADER,
    TRUNCATED_BLOCK,
    UNKNOWN_TRANSFORM,
    WIDE_BLOCK,
    WRONG_COUNT,
    describe_status,
)

if TYPE_CHECKING:
    from numba.core.base import BaseContext
    from numba.core.typing.context import Context as TypingContext
    from numba.core.typing.templates import Signature

    from hbx_gpu._codecs.rowpack_vector import Typed

__all__ = ["decode_into", "describe_status", "encode_into", "max_encoded_size"]

_NONE, _ZIGZAG = 0, 2
_jit = njit(nogil=True, cache=True, boundscheck=False)


def max_encoded_size(n_words: int, element_size: int) -> int:
    """Return the bytes that `encode_into` may need for n_words, which is every block at full width."""
    return HEADER_BYTES + (element_size // 4) * -(-n_words // BLOCK) * (1 + 4 * BLOCK)


# Four lanes are one vector operation, written in LLVM here: LLVM would unroll a loop of four before
# vectorizing it.
_I32 = ir.IntType(32)
_ROW = ir.VectorType(_I32, 4)


def _row_pointer(
    context: BaseContext, builder: ir.IRBuilder, array_type: types.Type, array: ir.Value, index: ir.Value
) -> ir.Value:
    data = context.make_array(array_type)(context, builder, array).data
    return builder.bitcast(builder.gep(data, [index]), _ROW.as_pointer())


def _splat(builder: ir.IRBuilder, value: ir.Value) -> ir.Value:
    undefined = ir.Constant(_ROW, ir.Undefined)
    lane0 = builder.insert_element(undefined, value, _I32(0))
    return builder.shuffle_vector(lane0, undefined, ir.Constant(_ROW, [0] * 4))


@intrinsic
def _unpack_row(
    typingctx: TypingContext,
    src: types.Type,
    lo: types.Type,
    hi: types.Type,
    shift: types.Type,
    mask: types.Type,
    out: types.Type,
    at: types.Type,
) -> Typed:
    """out[at:at + 4] = a row of four values whose words lie at byte lo of src, continued at byte hi."""
    signature = types.void(src, types.int64, types.int64, types.uint32, types.uint32, out, types.int64)

    def codegen(
        context: BaseContext, builder: ir.IRBuilder, sig: Signature, args: tuple[ir.Value, ...]
    ) -> ir.Value:
        src_value, lo_value, hi_value, shift_value, mask_value, out_value, at_value = args

        def load(offset: ir.Value) -> ir.Value:
            words = builder.load(_row_pointer(context, builder, sig.args[0], src_value, offset))
            words.align = 1  # a payload may begin at any byte of a chunk
            return words

        # (next << 1) << (31 - shift) instead of next << (32 - shift): a shift by 32 is undefined.
        low = builder.lshr(load(lo_value), _splat(builder, shift_value))
        carried = builder.shl(load(hi_value), _splat(builder, _I32(1)))
        high = builder.shl(carried, _splat(builder, builder.sub(_I32(31), shift_value)))
        row = builder.and_(builder.or_(low, high), _splat(builder, mask_value))
        store = builder.store(row, _row_pointer(context, builder, sig.args[5], out_value, at_value))
        store.align = 4
        return context.get_dummy_value()

    return signature, codegen


@intrinsic
def _integrate_row(
    typingctx: TypingContext, values: types.Type, at: types.Type, zigzag: types.Type, carry: types.Type
) -> Typed:
    """values[at:at + 4] = carry + running sum of the row, unzigzagged if zigzag is 1; returns the last."""
    signature = types.uint32(values, types.int64, types.uint32, types.uint32)

    def codegen(
        context: BaseContext, builder: ir.IRBuilder, sig: Signature, args: tuple[ir.Value, ...]
    ) -> ir.Value:
        array, at_value, zigzag_value, carry_value = args
        pointer = _row_pointer(context, builder, sig.args[0], array, at_value)
        zero = ir.Constant(_ROW, [0] * 4)

        def lanes_before(row: ir.Value, distance: int) -> ir.Value:
            picked = [4 if lane < distance else lane - distance for lane in range(4)]
            return builder.shuffle_vector(row, zero, ir.Constant(_ROW, picked))

        stored = builder.load(pointer)
        stored.align = 4
        flag = _splat(builder, zigzag_value)
        sign = builder.sub(zero, builder.and_(stored, flag))
        row = builder.xor(builder.lshr(stored, flag), sign)
        row = builder.add(row, lanes_before(row, 1))
        row = builder.add(row, lanes_before(row, 2))
        row = builder.add(row, _splat(builder, carry_value))
        builder.store(row, pointer).align = 4
        return builder.extract_element(row, _I32(3))

    return signature, codegen


@_jit
def _unpack_block(src, pos, width, out, at):
    """Unpack 128 values of `width` bits from src[pos:pos + 16 * width] to uint32 out[at:at + 128]."""
    if width == 0:
        for i in range(BLOCK):
            out[at + i] = 0
        return
    mask = np.uint32(0xFFFFFFFF >> (32 - width))
    for row in range(BLOCK // 4):
        bit = row * width
        shift = bit & 31
        lo = pos + 16 * (bit >> 5)
        # A row inside one word reads that word twice; what the second read adds lies above the mask.
        hi = lo + 16 if shift + width > 32 else lo
        _unpack_row(src, lo, hi, np.uint32(shift), mask, out, at + 4 * row)


@_jit
def _block_at(src, pos):
    """Return (status, width) of the block with its width byte at pos; OK: its payload lies inside src."""
    if pos >= len(src):
        return MISSING_WIDTH | pos << 8, 0
    width = np.int64(src[pos])
    if width > 32:
        return WIDE_BLOCK | pos << 8, 0
    if 16 * width > len(src) - pos - 1:
        return TRUNCATED_BLOCK | pos << 8, 0
    return OK, width


@_jit
def _integrate32(values, at, transform, carry):
    """Undo a transform on uint32 values[at:at + 128] in place; returns the running value."""
    zigzag = np.uint32(transform == _ZIGZAG)
    for row in range(0, BLOCK, 4):
        carry = _integrate_row(values, at + row, zigzag, carry)
    return carry


@_jit
def _integrate64(values, transform, carry):
    """Undo a transform on uint64 values[0:128] in place; returns the running value."""
    for i in range(BLOCK):
        stored = values[i]
        if transform == _ZIGZAG:
            stored = (stored >> np.uint64(1)) ^ (np.uint64(0) - (stored & np.uint64(1)))
        carry += stored
        values[i] = carry
    return carry


@_jit
def _decode32(src, transform, first, last, out):
    scratch = np.empty(BLOCK, np.uint32)
    carry = np.uint32(0)
    pos = HEADER_BYTES
    for begin in range(0, last if first < last else 0, BLOCK):
        status, width = _block_at(src, pos)
        if status != OK:
            return status
        if begin >= first and begin + BLOCK <= last:
            _unpack_block(src, pos + 1, width, out, begin)
            if transform != _NONE:
                carry = _integrate32(out, begin, transform, carry)
        elif transform != _NONE or begin + BLOCK > first:
            _unpack_block(src, pos + 1, width, scratch, 0)
            if transform != _NONE:
                carry = _integrate32(scratch, 0, transform, carry)
            for i in range(max(first, begin), min(last, begin + BLOCK)):
                out[i] = scratch[i - begin]
        pos += 1 + 16 * width
    return OK


@_jit
def _decode64(src, transform, expected, first, last, out):
    if first >= last:
        return OK
    low = HEADER_BYTES
    high = low
    for _ in range(0, expected, BLOCK):  # the high halves start where all low halves end
        status, width = _block_at(src, high)
        if status != OK:
            return status
        high += 1 + 16 * width
    halves = np.empty(2 * BLOCK, np.uint32)
    scratch = np.empty(BLOCK, np.uint64)
    carry = np.uint64(0)
    for begin in range(0, last, BLOCK):
        _, width_low = _block_at(src, low)
        status, width_high = _block_at(src, high)
        if status != OK:
            return status
        if transform != _NONE or begin + BLOCK > first:
            _unpack_block(src, low + 1, width_low, halves, 0)
            _unpack_block(src, high + 1, width_high, halves, BLOCK)
            for i in range(BLOCK):
                scratch[i] = np.uint64(halves[i]) | np.uint64(halves[BLOCK + i]) << np.uint64(32)
            if transform != _NONE:
                carry = _integrate64(scratch, transform, carry)
            for i in range(max(first, begin), min(last, begin + BLOCK)):
                out[i] = scratch[i - begin]
        low += 1 + 16 * width_low
        high += 1 + 16 * width_high
    return OK


def _decode_words(src, transform, expected, first, last, out):
    raise NotImplementedError("compiled for the dtype of out, see the overload")


@overload(_decode_words, jit_options={"nogil": True})
def _overload_decode_words(src, transform, expected, first, last, out):
    # Chosen by type, not by a branch on element_size: the branch not taken would have to compile as well.
    if out.dtype == types.uint32:
        return lambda src, transform, expected, first, last, out: _decode32(src, transform, first, last, out)
    if out.dtype == types.uint64:
        return lambda src, transform, expected, first, last, out: _decode64(
            src, transform, expected, first, last, out
        )
    return None


@_jit
def decode_into(src, element_size, expected, first, last, out):
    """Decode words [first, last) of one encoded chunk into out[first:last], and write nothing else.

    Without a transform, each block before `first` costs the read of one byte. With a transform these blocks
    must be decoded too, because values are differences.

    Parameters
    ----------
    src
        uint8, (nbytes,), C contiguous: the encoded chunk. Nothing outside it is read.
    element_size
        4 or 8, equal to the itemsize of `out`.
    expected
        Number of words according to the array's metadata; a header that says otherwise is an error.
    first, last
        Range of words to decode, 0 <= first <= last <= expected.
    out
        Output: uint32 or uint64, (>= expected,), C contiguous.

    Returns
    -------
    int64
        0, or a status for `describe_status`: a code in the low byte, a detail above it. After an error, words
        that were written before it stay written.
    """
    if element_size != out.itemsize or not 0 <= first <= last <= expected <= len(out):
        return BAD_REQUEST
    if len(src) < HEADER_BYTES:
        return SHORT_HEADER | len(src) << 8
    transform = np.int64(src[0])
    if transform > _ZIGZAG:
        return UNKNOWN_TRANSFORM | transform << 8
    n = np.int64(src[1]) | np.int64(src[2]) << 8 | np.int64(src[3]) << 16 | np.int64(src[4]) << 24
    if n != expected:
        return WRONG_COUNT | n << 8
    return _decode_words(src, transform, expected, first, last, out)


@_jit
def _apply_transform(words, begin, transform, out):
    """out[0:128] = words[begin:begin + 128] as stored, zeros beyond the end of words."""
    word = words.dtype.type
    sign_bit = np.uint64(8 * words.itemsize - 1)
    for i in range(BLOCK):
        k = begin + i
        if k >= len(words):
            out[i] = 0
        elif transform == _NONE:
            out[i] = words[k]
        else:
            delta = word(words[k] - (words[k - 1] if k > 0 else word(0)))
            if transform == _ZIGZAG:
                negative = word(delta >> word(sign_bit))
                delta = word(word(delta << word(1)) ^ word(-negative))
            out[i] = delta


@_jit
def _bit_length(value):
    width = 0
    while value:
        value >>= 1
        width += 1
    return width


@_jit
def _pack_block(values, out, pos):
    """Write width byte and payload of 128 uint32 at out[pos:]; return the offset after them."""
    union = np.uint32(0)
    for i in range(BLOCK):
        union |= values[i]
    width = _bit_length(union)
    out[pos] = width
    pos += 1
    for lane in range(4):
        pending = np.uint64(0)  # bits of this lane not yet written, lowest first
        filled = 0
        at = pos + 4 * lane
        for row in range(BLOCK // 4):
            pending |= np.uint64(values[4 * row + lane]) << np.uint64(filled)
            filled += width
            if filled >= 32:
                for byte in range(4):
                    out[at + byte] = np.uint8((pending >> np.uint64(8 * byte)) & np.uint64(0xFF))
                at += 16
                pending >>= np.uint64(32)
                filled -= 32
    return pos + 16 * width


@_jit
def encode_into(words, transform, out):
    """Encode one chunk at the front of `out`.

    Parameters
    ----------
    words
        The words: uint32 or uint64, (n,), C contiguous, n < 2^32.
    transform
        Number of the transform: 0 none, 1 delta, 2 delta_zigzag.
    out
        Output: uint8, (>= max_encoded_size(n, itemsize),).

    Returns
    -------
    int64
        Number of bytes written.
    """
    n = len(words)
    out[0] = transform
    for byte in range(4):
        out[1 + byte] = np.uint8((n >> (8 * byte)) & 0xFF)
    pos = HEADER_BYTES
    stored = np.empty(BLOCK, words.dtype)
    half = np.empty(BLOCK, np.uint32)
    for shift in range(0, 8 * words.itemsize, 32):
        for begin in range(0, n, BLOCK):
            _apply_transform(words, begin, transform, stored)
            for i in range(BLOCK):
                half[i] = np.uint32(np.uint64(stored[i]) >> np.uint64(shift))
            pos = _pack_block(half, out, pos)
    return pos
