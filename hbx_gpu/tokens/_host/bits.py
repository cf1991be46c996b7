"""Sets of small numbers as bits, in numba."""

from __future__ import annotations

from llvmlite import ir
from numba import types
from numba.extending import intrinsic


@intrinsic
def lowest(typingctx, word):  # noqa: ARG001 - numba's signature
    """Place of the lowest bit of a uint64; 64 where it is 0."""

    def codegen(context, builder, signature, args):  # noqa: ARG001
        return builder.cttz(args[0], ir.Constant(ir.IntType(1), 0))

    return types.uint64(types.uint64), codegen


@intrinsic
def number_of(typingctx, word):  # noqa: ARG001
    """How many bits of a uint64 are set."""

    def codegen(context, builder, signature, args):  # noqa: ARG001
        return builder.ctpop(args[0])

    return types.uint64(types.uint64), codegen
