"""CRC32C of many stretches of memory in one call that does not hold the GIL.

`google_crc32c` holds the GIL while it computes, so threads that verify chunks through it wait for each other.
x86-64 CPUs have an instruction for CRC32C, which is used here where numba compiles for a CPU that has it;
elsewhere `google_crc32c` is called for one stretch after the other.
"""

# numba looks at the names of arguments that only the generated code uses.
# ruff: noqa: ARG001

from __future__ import annotations

import ctypes
import platform
from typing import TYPE_CHECKING

import llvmlite.binding as llvm
import numpy as np
from llvmlite import ir
from numba import config, njit, types
from numba.extending import intrinsic

from hbx_gpu._codecs.checksum import crc32c

if TYPE_CHECKING:
    from numba.core.base import BaseContext
    from numba.core.typing.context import Context as TypingContext
    from numba.core.typing.templates import Signature

    from hbx_gpu._codecs.rowpack_vector import Typed

_BYTE, _WORD, _LONG = ir.IntType(8), ir.IntType(32), ir.IntType(64)
_jit = njit(nogil=True, cache=True, boundscheck=False)


def _has_instruction() -> bool:
    """Whether the CPU that numba compiles for has the instruction."""
    if platform.machine().lower() not in ("x86_64", "amd64"):
        return False
    # numba sets its options where a type checker does not see them.
    features, name = getattr(config, "CPU_FEATURES", None), getattr(config, "CPU_NAME", None)
    if features is not None:
        return "+sse4.2" in str(features).split(",")
    return name is None and bool(llvm.get_host_cpu_features().get("sse4.2"))


HAS_INSTRUCTION = _has_instruction()
"""Whether `crc32c_each` uses the instruction of the CPU."""


def _loader(width: ir.Type, returned: types.Type) -> object:
    @intrinsic
    def load(typingctx: TypingContext, address: types.Type) -> Typed:
        def codegen(
            context: BaseContext, builder: ir.IRBuilder, sig: Signature, args: tuple[ir.Value, ...]
        ) -> ir.Value:
            value = builder.load(builder.inttoptr(args[0], width.as_pointer()))
            value.align = 1  # a chunk may begin at any byte of a file
            return value

        return returned(types.uint64), codegen

    return load


_load8, _load64 = _loader(_BYTE, types.uint8), _loader(_LONG, types.uint64)


@intrinsic
def _instruction64(typingctx: TypingContext, crc: types.Type, value: types.Type) -> Typed:
    def codegen(
        context: BaseContext, builder: ir.IRBuilder, sig: Signature, args: tuple[ir.Value, ...]
    ) -> ir.Value:
        function = builder.module.declare_intrinsic(
            "llvm.x86.sse42.crc32.64.64", fnty=ir.FunctionType(_LONG, [_LONG, _LONG])
        )
        return builder.call(function, args)

    return types.uint64(types.uint64, types.uint64), codegen


@intrinsic
def _instruction8(typingctx: TypingContext, crc: types.Type, value: types.Type) -> Typed:
    def codegen(
        context: BaseContext, builder: ir.IRBuilder, sig: Signature, args: tuple[ir.Value, ...]
    ) -> ir.Value:
        function = builder.module.declare_intrinsic(
            "llvm.x86.sse42.crc32.32.8", fnty=ir.FunctionType(_WORD, [_WORD, _BYTE])
        )
        return builder.zext(builder.call(function, [builder.trunc(args[0], _WORD), args[1]]), _LONG)

    return types.uint64(types.uint64, types.uint8), codegen


@_jit
def _rest_by_instruction(crc, at, end):
    while at + np.uint64(8) <= end:
        crc = _instruction64(crc, _load64(at))
        at += np.uint64(8)
    while at < end:
        crc = _instruction8(crc, _load8(at))
        at += np.uint64(1)
    return np.uint32(crc ^ np.uint64(0xFFFFFFFF))


@_jit
def by_instruction(address, nbytes, out):
    """out[i] = CRC32C of the bytes [address[i], address[i] + nbytes[i]), with the instruction of the CPU.

    The instruction gives its result after three cycles, but one can begin in every cycle: so three chunks
    are verified side by side, as far as the shortest of them reaches.
    """
    n = len(address)
    first = np.uint64(0xFFFFFFFF)
    for i in range(0, n - n % 3, 3):
        a, b, c = address[i], address[i + 1], address[i + 2]
        together = min(nbytes[i], nbytes[i + 1], nbytes[i + 2]) // 8 * 8
        one, two, three = first, first, first
        for k in range(0, together, 8):
            step = np.uint64(k)
            one = _instruction64(one, _load64(a + step))
            two = _instruction64(two, _load64(b + step))
            three = _instruction64(three, _load64(c + step))
        done = np.uint64(together)
        out[i] = _rest_by_instruction(one, a + done, a + np.uint64(nbytes[i]))
        out[i + 1] = _rest_by_instruction(two, b + done, b + np.uint64(nbytes[i + 1]))
        out[i + 2] = _rest_by_instruction(three, c + done, c + np.uint64(nbytes[i + 2]))
    for i in range(n - n % 3, n):
        out[i] = _rest_by_instruction(first, address[i], address[i] + np.uint64(nbytes[i]))


def one_by_one(address: np.ndarray, nbytes: np.ndarray, out: np.ndarray) -> None:
    """Do what `by_instruction` does, on any CPU, with the GIL."""
    for i, (at, size) in enumerate(zip(address.tolist(), nbytes.tolist(), strict=True)):
        memory = (ctypes.c_uint8 * size).from_address(at)
        out[i] = crc32c(np.frombuffer(memory, np.uint8)) if size else 0


def crc32c_each(address: np.ndarray, nbytes: np.ndarray) -> np.ndarray:
    """CRC32C of stretches of memory, without holding the GIL.

    Parameters
    ----------
    address
        uint64, (k,). First byte of each; the caller keeps the memory alive.
    nbytes
        int64, (k,). Bytes of each, 0 or more.

    Returns
    -------
    ndarray
        uint32, (k,).
    """
    out = np.empty(len(address), np.uint32)
    (by_instruction if HAS_INSTRUCTION else one_by_one)(address, nbytes, out)
    return out
