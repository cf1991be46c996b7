"""Philox for eight genes at a time, in vectors that are written out.

LLVM gives loops of numba 256 bits on CPUs that have 512. Vectors that are written out get all of them, and
are cut into shorter ones, or into single numbers, where a CPU has less.
"""

from __future__ import annotations

from llvmlite import ir
from numba import types
from numba.core.errors import TypingError
from numba.extending import intrinsic

from hbx_gpu._draws import MULTIPLIERS, ROUNDS, WEYL

LANES = 8
_WORD, _HALF_WORD = ir.IntType(64), ir.IntType(32)
_VECTOR, _SHORT = ir.VectorType(_WORD, LANES), ir.VectorType(_HALF_WORD, LANES)
_MASK = 0xFFFFFFFF


def _all(value):
    """A constant in all lanes."""
    return ir.Constant(_VECTOR, [value] * LANES)


def _spread(builder, value):
    """A number of the row in all lanes."""
    one = builder.insert_element(ir.Constant(_VECTOR, ir.Undefined), value, ir.Constant(_HALF_WORD, 0))
    return builder.shuffle_vector(one, one, ir.Constant(_SHORT, [0] * LANES))


def _product(builder, a, factor):
    """Of lower halves; what the upper halves hold never matters."""
    return builder.mul(builder.and_(a, _all(_MASK)), _all(factor))


def _upper(builder, a):
    return builder.lshr(a, _all(32))


def _last_rounds(builder, index, row):
    """The four words after the last round, of eight genes; see :func:`hbx_gpu.tokens._host.draws.keys`.

    `row`: c_1 with the step, a_2, a_3, b_3, c_3 and both words of the seed, as single numbers.
    """
    c_1, a_2, a_3, b_3, c_3 = (_spread(builder, value) for value in row[:5])
    c = builder.xor(c_1, builder.shl(index, _all(8)))
    right = _product(builder, c, MULTIPLIERS[1])
    a = builder.xor(a_2, _upper(builder, right))
    left = _product(builder, a, MULTIPLIERS[0])
    a, b, c, d = builder.xor(a_3, right), b_3, builder.xor(c_3, _upper(builder, left)), left
    for k in range(3, ROUNDS):
        key_0, key_1 = (
            _spread(
                builder,
                builder.and_(
                    builder.add(seed, ir.Constant(_WORD, k * weyl & _MASK)), ir.Constant(_WORD, _MASK)
                ),
            )
            for seed, weyl in zip(row[5:], WEYL, strict=True)
        )
        left, right = _product(builder, a, MULTIPLIERS[0]), _product(builder, c, MULTIPLIERS[1])
        a = builder.xor(builder.xor(_upper(builder, right), b), key_0)
        c = builder.xor(builder.xor(_upper(builder, left), d), key_1)
        b, d = right, left
    return a, b, c, d


def _at(context, builder, array, value, place, vector):
    """The address of eight elements of an array."""
    data = context.make_array(array)(context, builder, value).data
    return builder.bitcast(builder.gep(data, [place]), vector.as_pointer())


def _made(index, place, row, outs):
    """Signature and code of an intrinsic that writes a key of eight genes to each of `outs`."""
    if not (isinstance(index.dtype, types.Integer) and index.dtype.bitwidth == 32):
        raise TypingError(f"indices of genes must have 32 bits, got {index.dtype}")

    def codegen(context, builder, signature, args):
        kinds = signature.args
        found = builder.load(_at(context, builder, kinds[0], args[0], args[1], _SHORT))
        found.align = 4
        words = _last_rounds(builder, builder.zext(found, _VECTOR), args[2:9])
        for out, (high, low) in enumerate((words[:2], words[2:])[: len(outs)], 9):
            key = builder.or_(builder.shl(high, _all(32)), builder.and_(low, _all(_MASK)))
            builder.store(key, _at(context, builder, kinds[out], args[out], args[1], _VECTOR)).align = 8
        return context.get_dummy_value()

    return types.void(index, place, *row, *outs), codegen


@intrinsic
def eight_keys(typingctx, index, place, c_1, a_2, a_3, b_3, c_3, seed_0, seed_1, out):  # noqa: ARG001
    """out[place : place + 8] = keys of index[place : place + 8]: the first two words of their draws."""
    return _made(index, place, (c_1, a_2, a_3, b_3, c_3, seed_0, seed_1), (out,))


@intrinsic
def eight_pairs(typingctx, index, place, c_1, a_2, a_3, b_3, c_3, seed_0, seed_1, out, out_2):  # noqa: ARG001
    """As `eight_keys`, and out_2[place : place + 8] = keys of the other two words."""
    return _made(index, place, (c_1, a_2, a_3, b_3, c_3, seed_0, seed_1), (out, out_2))


@intrinsic
def eight_up_to(typingctx, keys, place, limit):  # noqa: ARG001
    """Bits of a uint64: which of keys[place : place + 8] are at most `limit`."""

    def codegen(context, builder, signature, args):
        found = builder.load(_at(context, builder, signature.args[0], args[0], args[1], _VECTOR))
        found.align = 8
        bits = builder.icmp_unsigned("<=", found, _spread(builder, args[2]))
        return builder.zext(builder.bitcast(bits, ir.IntType(LANES)), _WORD)

    return types.uint64(keys, place, limit), codegen
