"""Sets of small numbers as bits, in numba."""

from __future__ import annotations

import numpy as np
from llvmlite import ir
from numba import types
from numba.extending import intrinsic

from hbx_gpu.tokens._host.draws import jit

SPARE = 4
"""Places that are written down without asking whether a word has so many."""
_ONE = np.uint64(1)


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


@jit
def list_bits(word, first, item, found):
    """item[found:] = first + places of the bits of a word, and SPARE entries that may hold anything.

    Returns where the places end. Words whose number of bits is hard to guess cost no wrong guesses.
    """
    end = found + number_of(word)
    for _ in range(SPARE):
        item[found] = first + lowest(word)
        word &= word - _ONE
        found += _ONE
    while word:
        item[found] = first + lowest(word)
        word &= word - _ONE
        found += _ONE
    return end
