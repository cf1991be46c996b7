"""Vector code that the kernels of hbx_gpu.rowpack call: unaligned loads, unpacking, running sums.

Nothing here checks a bound: `rowpack_numba` does so before it calls. The code is written in LLVM because
numba neither turns byte indexing into one load nor unrolls by width. It works on little-endian hosts only.
"""

# numba prescribes the parameters of an intrinsic and of its code generator.
# ruff: noqa: ARG001

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, TypeAlias

from llvmlite import ir
from numba import types
from numba.extending import intrinsic

from hbx_gpu._codecs.rowpack_format import BLOCK

if TYPE_CHECKING:
    from numba.core.base import BaseContext
    from numba.core.typing.context import Context as TypingContext
    from numba.core.typing.templates import Signature

Codegen: TypeAlias = "Callable[[BaseContext, ir.IRBuilder, Signature, tuple[ir.Value, ...]], ir.Value]"
Typed: TypeAlias = "tuple[Signature, Codegen]"
"""What the function of an intrinsic returns to numba."""

_I32 = ir.IntType(32)
_LANES = 4
_FOUR = ir.VectorType(_I32, _LANES)
_EIGHT = ir.VectorType(_I32, 2 * _LANES)


def _pointer(
    context: BaseContext,
    builder: ir.IRBuilder,
    array_type: types.Type,
    array: ir.Value,
    index: ir.Value,
    to: ir.Type,
) -> ir.Value:
    """Return a pointer to array[index], cast to a pointer to `to`."""
    data = context.make_array(array_type)(context, builder, array).data
    return builder.bitcast(builder.gep(data, [index]), to.as_pointer())


def _shifted(pointer: ir.Value, builder: ir.IRBuilder, index: int) -> ir.Value:
    return builder.gep(pointer, [_I32(index)]) if index else pointer


def _splat(builder: ir.IRBuilder, vector: ir.VectorType, value: ir.Value) -> ir.Value:
    undefined = ir.Constant(vector, ir.Undefined)
    lane0 = builder.insert_element(undefined, value, _I32(0))
    lanes = ir.Constant(ir.VectorType(_I32, vector.count), [0] * vector.count)
    return builder.shuffle_vector(lane0, undefined, lanes)


def _loader(bits: int) -> ir.Value:
    @intrinsic
    def load(typingctx: TypingContext, src: types.Type, at: types.Type) -> Typed:
        def codegen(
            context: BaseContext, builder: ir.IRBuilder, sig: Signature, args: tuple[ir.Value, ...]
        ) -> ir.Value:
            src_value, at_value = args
            place = _pointer(context, builder, sig.args[0], src_value, at_value, ir.IntType(bits))
            value = builder.load(place)
            value.align = 1
            return builder.zext(value, ir.IntType(64))

        return types.uint64(src, types.int64), codegen

    return load


load8, load32, load64 = _loader(8), _loader(32), _loader(64)
"""``load8(src, at)`` reads a little-endian number of 8 (32, 64) bits at byte `at` of a uint8 array."""


def _emit_unpack(
    builder: ir.IRBuilder, width: int, source: ir.Value, target: ir.Value, add: ir.Value
) -> None:
    """Emit code for all 32 rows of one width, with constant shifts; both pointers are to vectors of four."""
    words: dict[int, ir.Value] = {}

    def word(k: int) -> ir.Value:
        if k not in words:
            words[k] = builder.load(_shifted(source, builder, k))
            words[k].align = 1  # a chunk may begin at any byte of a file
        return words[k]

    mask = ir.Constant(_FOUR, [(1 << width) - 1] * _LANES)
    for row in range(BLOCK // _LANES):
        if width == 0:
            value = add
        else:
            k, shift = divmod(row * width, 32)
            value = word(k)
            if shift:
                value = builder.lshr(value, ir.Constant(_FOUR, [shift] * _LANES))
            if shift + width > 32:
                carried = builder.shl(word(k + 1), ir.Constant(_FOUR, [32 - shift] * _LANES))
                value = builder.or_(value, carried)
            if shift + width != 32:
                value = builder.and_(value, mask)
            value = builder.add(value, add)
        builder.store(value, _shifted(target, builder, row)).align = 4


@intrinsic
def unpack_block(
    typingctx: TypingContext,
    src: types.Type,
    at: types.Type,
    width: types.Type,
    add: types.Type,
    out: types.Type,
    to: types.Type,
) -> Typed:
    """out[to:to + 128] = add + 128 values of `width` <= 32 bits from src[at:at + 16 * width].

    `src` is uint8, `out` and `add` are uint32; sums are modulo 2**32.
    """
    signature = types.void(src, types.int64, types.int64, types.uint32, out, types.int64)

    def codegen(
        context: BaseContext, builder: ir.IRBuilder, sig: Signature, args: tuple[ir.Value, ...]
    ) -> ir.Value:
        source = _pointer(context, builder, sig.args[0], args[0], args[1], _FOUR)
        target = _pointer(context, builder, sig.args[4], args[4], args[5], _FOUR)
        add_row = _splat(builder, _FOUR, args[3])
        done = builder.append_basic_block("unpacked")
        cases = [builder.append_basic_block(f"width{width}") for width in range(33)]
        switch = builder.switch(args[2], done)
        for width, block in enumerate(cases):
            switch.add_case(ir.IntType(64)(width), block)
            builder.position_at_end(block)
            _emit_unpack(builder, width, source, target, add_row)
            builder.branch(done)
        builder.position_at_end(done)
        return context.get_dummy_value()

    return signature, codegen


@intrinsic
def running_sum(typingctx: TypingContext, values: types.Type, at: types.Type, base: types.Type) -> Typed:
    """values[at:at + 128] = base + their running sum, uint32, modulo 2**32."""
    signature = types.void(values, types.int64, types.uint32)

    def codegen(
        context: BaseContext, builder: ir.IRBuilder, sig: Signature, args: tuple[ir.Value, ...]
    ) -> ir.Value:
        pointer = _pointer(context, builder, sig.args[0], args[0], args[1], _EIGHT)
        zero = ir.Constant(_EIGHT, [0] * 8)

        def pick(row: ir.Value, lanes: list[int]) -> ir.Value:  # lane 8 stands for zero
            return builder.shuffle_vector(row, zero, ir.Constant(_EIGHT, lanes))

        carry = _splat(builder, _EIGHT, args[2])
        for eight in range(BLOCK // 8):
            place = _shifted(pointer, builder, eight)
            row = builder.load(place)
            row.align = 4
            # Sum within each half, then add the lower half's total to the upper half: shuffles across halves
            # are slow. The carry takes one addition per row, so that the CPU can work on several rows at
            # once.
            row = builder.add(row, pick(row, [8, 0, 1, 2, 8, 4, 5, 6]))
            row = builder.add(row, pick(row, [8, 8, 0, 1, 8, 8, 4, 5]))
            row = builder.add(row, pick(row, [8, 8, 8, 8, 3, 3, 3, 3]))
            builder.store(builder.add(row, carry), place).align = 4
            carry = builder.add(carry, pick(row, [7] * 8))
        return context.get_dummy_value()

    return signature, codegen


@intrinsic
def leading_zeros(typingctx: TypingContext, value: types.Type) -> Typed:
    """Count the leading zero bits of a uint64; 64 for 0."""

    def codegen(
        context: BaseContext, builder: ir.IRBuilder, sig: Signature, args: tuple[ir.Value, ...]
    ) -> ir.Value:
        return builder.ctlz(args[0], ir.IntType(1)(0))

    return types.uint64(types.uint64), codegen
