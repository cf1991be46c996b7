"""Kernels on the CPU: launches compiled kernel files with NumPy arrays and torch CPU tensors as arguments.

For tests, never a fallback: a value takes hundreds of nanoseconds. `EmulatedLauncher` checks what a GPU would
not: argument types, divergence, and (sanitized) every access.
"""

from __future__ import annotations

import ctypes
import os
import threading
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np

from hbx_gpu._engine.device import sources
from tests.emulation.build import CompilerMissing, KernelDoesNotCompile, library

__all__ = ["CompilerMissing", "EmulatedLauncher", "EmulationError", "KernelDoesNotCompile"]

MAX_THREADS = 1024
MAX_SHARED = 232_448  # dynamic shared memory of a block on sm_90
MAX_PARAMETERS = 64
_ORDERS = {"forward": 0, "reverse": 1, "random": 2}
_KINDS = {"u": "uint", "i": "int", "f": "float"}
_REPORT_BYTES = 8192

# Blocks of a library run on fibers that it keeps: one launch at a time.
_LOCK = threading.Lock()


class EmulationError(RuntimeError):
    """A kernel did what no GPU defines: divergent barriers, a trap. Names what each thread waits for."""


class _Launch(ctypes.Structure):
    _fields_ = (
        ("grid", ctypes.c_uint32 * 3),
        ("block", ctypes.c_uint32 * 3),
        ("shared", ctypes.c_uint64),
        ("seed", ctypes.c_uint64),
        ("order", ctypes.c_uint32),
        ("report_bytes", ctypes.c_uint32),
        ("report", ctypes.c_char_p),
        ("collectives", ctypes.c_uint64),
    )


class _Kernel:
    """A kernel of a built library: its entry, and per parameter what shim.h calls its letter and size."""

    def __init__(self, handle: ctypes.CDLL, name: str) -> None:
        self.name = name
        self.entry = getattr(handle, f"hbx_launch_{name}")
        letters = ctypes.create_string_buffer(MAX_PARAMETERS)
        sizes = (ctypes.c_uint * MAX_PARAMETERS)()
        count = getattr(handle, f"hbx_signature_{name}")(letters, sizes)
        self.parameters = [(letters.raw[k : k + 1].decode(), sizes[k]) for k in range(count)]


@cache
def _load(path: Path) -> ctypes.CDLL:
    return ctypes.CDLL(str(path), mode=os.RTLD_LOCAL | os.RTLD_NOW)


class EmulatedLauncher:
    """Launches kernels on the CPU.

    Parameters
    ----------
    order
        Which thread runs next where several could, and which block: `"forward"` (lowest number), `"reverse"`
        (highest), `"random:SEED"`. Results of a kernel without races are the same in all of them.
    watch
        Use a build with a sanitizer, a key of `build.WATCHES`; None asks the environment
        (`HBX_EMULATED_WATCH`, set by `python -m tests.emulation.sanitized` and `.races`). What the sanitizer
        reports ends the process.
    files
        Kernel files to use instead of the project's.
    """

    emulated = True

    def __init__(
        self, order: str = "forward", watch: str | None = None, *, files: Sequence[Path] | None = None
    ) -> None:
        name, _, seed = order.partition(":")
        if name not in _ORDERS or (name == "random") != seed.isdigit():
            raise ValueError(f"order is {order!r}; expected 'forward', 'reverse' or 'random:SEED'")
        self.order = order
        self._order, self._seed = _ORDERS[name], int(seed or 0)
        self.watch = os.environ.get("HBX_EMULATED_WATCH", "") if watch is None else watch
        if files is None:
            folder = sources.kernels_folder()
            self._files = {kernel: folder / file for kernel, file in sources.kernel_names().items()}
        else:
            self._files = {kernel: file for file in files for kernel in sources.kernels_in(file)}
        self._kernels: dict[str, _Kernel] = {}
        self.collectives = 0  # that threads met in the last launch

    def launch(
        self,
        kernel: str,
        grid: int | tuple[int, ...],
        block: int | tuple[int, ...],
        args: Sequence[Any],
        shared: int = 0,
    ) -> None:
        """Run a kernel to its end.

        Parameters
        ----------
        kernel
            Its name.
        grid, block
            Blocks, and threads per block: a number or up to three.
        args
            One per parameter: for pointers a C-contiguous NumPy array, a contiguous torch CPU tensor, None or
            an address as np.uint64; else a NumPy scalar of the parameter's exact type.
        shared
            Bytes of dynamic shared memory.

        Raises
        ------
        TypeError, ValueError
            For arguments that do not fit the parameters, and for grids that no GPU launches.
        EmulationError
            If threads diverge at a barrier or a collective.
        """
        found = self._kernel(kernel)
        values, keep = self._bind(found, args)
        launch = _Launch(
            grid=(ctypes.c_uint32 * 3)(*_three("grid", grid, limit=2**31 - 1)),
            block=(ctypes.c_uint32 * 3)(*_three("block", block, limit=MAX_THREADS)),
            shared=_shared(shared),
            seed=self._seed,
            order=self._order,
            report_bytes=_REPORT_BYTES,
        )
        report = ctypes.create_string_buffer(_REPORT_BYTES)
        launch.report = ctypes.cast(report, ctypes.c_char_p)
        pointers = (ctypes.c_void_p * max(1, len(values)))(*(ctypes.addressof(value) for value in values))
        with _LOCK:
            failed = found.entry(ctypes.byref(launch), pointers)
        self.collectives = launch.collectives
        for original, copy in keep:
            if original.flags.writeable:
                original[...] = copy
        if failed:
            raise EmulationError(f"{kernel}, order {self.order}: {report.value.decode()}")

    # Arrays are in host memory: there is nothing to bring back.
    run = launch

    def address(self, array: np.ndarray) -> int:
        """Address of an array as kernels see it, for records that hold one. Valid while the array lives."""
        return int(array.ctypes.data)

    def _kernel(self, name: str) -> _Kernel:
        if name not in self._kernels:
            if name not in self._files:
                raise ValueError(
                    f"There is no kernel {name}; there are: {', '.join(sorted(self._files)) or 'none'}"
                )
            handle = _load(library(self._files[name], self.watch))
            self._kernels[name] = _Kernel(handle, name)
        return self._kernels[name]

    def _bind(
        self, kernel: _Kernel, args: Sequence[Any]
    ) -> tuple[list[Any], list[tuple[np.ndarray, np.ndarray]]]:
        """C values of the arguments, and (array, copy) of those that were copied."""
        if len(args) != len(kernel.parameters):
            raise TypeError(f"{kernel.name} takes {len(kernel.parameters)} arguments; {len(args)} given")
        copies: list[tuple[np.ndarray, np.ndarray]] = []
        if self.watch == "accesses":
            copies = _exact_copies([arg for arg in args if isinstance(arg, np.ndarray)])
        stand_in = {id(array): copy for array, copy in copies}
        values = []
        for number, (arg, (letter, size)) in enumerate(zip(args, kernel.parameters, strict=True)):
            where = f"{kernel.name}, argument {number}"
            if letter in "pP":
                address = _address(where, arg, size, stand_in.get(id(arg)), writes=letter == "P")
                values.append(ctypes.c_void_p(address))
            else:
                values.append(_scalar(where, arg, f"{_KINDS[letter]}{8 * size}"))
        return values, copies


def _three(name: str, value: int | tuple[int, ...], *, limit: int) -> list[int]:
    sizes = [int(size) for size in (value if isinstance(value, tuple) else (value,))]
    total = int(np.prod(sizes, dtype=object))
    if not 1 <= len(sizes) <= 3 or min(sizes) < 1 or total > limit:
        raise ValueError(
            f"{name} is {value}; expected one to three sizes of at least 1, together at most {limit}"
        )
    return sizes + [1] * (3 - len(sizes))


def _shared(nbytes: int) -> int:
    if not 0 <= nbytes <= MAX_SHARED:
        raise ValueError(f"shared is {nbytes}; a block can have 0 to {MAX_SHARED} bytes")
    return int(nbytes)


def _scalar(where: str, arg: Any, expected: str) -> Any:
    if not isinstance(arg, np.generic) or arg.dtype != np.dtype(expected):
        found = f"{type(arg).__name__} {arg!r}"
        raise TypeError(f"{where}: expected np.{expected}, found {found}")
    return (ctypes.c_char * arg.dtype.itemsize).from_buffer_copy(arg.tobytes())


def _address(where: str, arg: Any, size: int, stand_in: np.ndarray | None, *, writes: bool) -> int | None:
    """Address of a pointer argument; `size` is that of the elements the kernel sees there, 0 for void."""
    if arg is None:
        return None
    if isinstance(arg, np.uint64):
        return int(arg)
    if isinstance(arg, np.ndarray):
        itemsize, contiguous, address = arg.dtype.itemsize, arg.flags.c_contiguous, int(arg.ctypes.data)
        if writes and not arg.flags.writeable:
            raise ValueError(f"{where}: the kernel writes there, and the array is read-only")
    elif hasattr(arg, "data_ptr"):
        if arg.device.type != "cpu":
            raise ValueError(f"{where}: the tensor is on {arg.device}; emulated kernels see host memory only")
        itemsize, contiguous, address = arg.element_size(), arg.is_contiguous(), int(arg.data_ptr())
    else:
        raise TypeError(
            f"{where}: expected an array, a tensor, None or np.uint64, found {type(arg).__name__}"
        )
    if size > 1 and itemsize != size:
        raise TypeError(
            f"{where}: the kernel sees elements of {size} bytes, found {itemsize} bytes ({arg.dtype})"
        )
    if not contiguous:
        raise ValueError(f"{where}: expected contiguous memory")
    return address if stand_in is None else int(stand_in.ctypes.data)


def _exact_copies(arrays: list[np.ndarray]) -> list[tuple[np.ndarray, np.ndarray]]:
    """Stand-ins of exactly the arrays' sizes, so that red zones lie at their ends, also where they are views.

    Arrays that share memory with another argument stay where they are.
    """
    distinct = list({id(array): array for array in arrays}.values())
    alone = [a for a in distinct if not any(a is not b and np.may_share_memory(a, b) for b in distinct)]
    return [(array, array.copy()) for array in alone if array.flags.c_contiguous]
