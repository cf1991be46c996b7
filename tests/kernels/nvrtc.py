"""Compiles kernel texts with NVRTC, which needs neither driver nor toolkit, and reads ptxas' report."""

from __future__ import annotations

import ctypes
import importlib.util
import re
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

ARCHITECTURES = ("sm_80", "sm_90", "sm_100")

_FUNCTION = re.compile(r"Compiling entry function '(\w+)' for '(\w+)'")
_SPILLS = re.compile(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads")
_USED = re.compile(r"Used (\d+) registers(?:.*?, (\d+) bytes smem)?")


class NvrtcMissing(RuntimeError):
    """There is no NVRTC on this machine."""


class CompilationFailed(RuntimeError):
    """NVRTC refused a text; the message is its log."""


@dataclass(frozen=True)
class Usage:
    """What ptxas reports of one kernel: registers per thread, the rest in bytes."""

    registers: int
    shared: int
    stack: int
    spill_stores: int
    spill_loads: int


@lru_cache(maxsize=1)
def _library() -> ctypes.CDLL:
    spec = importlib.util.find_spec("nvidia")
    folders = [Path(place) for place in spec.submodule_search_locations or []] if spec else []
    # Wheels of CUDA 13 share a folder cu13, earlier ones have one of their own; then the system's libraries.
    candidates = [
        str(p) for folder in folders for p in sorted(folder.glob("*/lib/libnvrtc.so.*"), reverse=True)
    ]
    candidates += [f"libnvrtc.so.{major}" for major in (13, 12)]
    for candidate in candidates:
        try:
            return ctypes.CDLL(candidate)
        except OSError:
            continue
    raise NvrtcMissing(
        "no libnvrtc found to compile kernels with; the package nvidia-cuda-nvrtc or a CUDA toolkit brings it"
    )


def version() -> str:
    """NVRTC's version, "13.0"."""
    major, minor = ctypes.c_int(), ctypes.c_int()
    _library().nvrtcVersion(ctypes.byref(major), ctypes.byref(minor))
    return f"{major.value}.{minor.value}"


def compile_text(text: str, name: str, arch: str) -> tuple[bytes, str]:
    """Cubin and log, with ptxas' report, of a text whose includes are inlined.

    Raises
    ------
    NvrtcMissing, CompilationFailed
    """
    lib = _library()
    program = ctypes.c_void_p()
    if lib.nvrtcCreateProgram(ctypes.byref(program), text.encode(), name.encode(), 0, None, None) != 0:
        raise CompilationFailed(f"NVRTC does not take {name}")
    try:
        # As cupy compiles: its options, and `-ftz=true`, which it adds.
        options = [f"-arch={arch}", "--std=c++17", "-ftz=true", "--ptxas-options=-v"]
        encoded = (ctypes.c_char_p * len(options))(*(option.encode() for option in options))
        status = lib.nvrtcCompileProgram(program, len(options), encoded)
        log = _read(program, "ProgramLog").rstrip(b"\0").decode(errors="replace")
        if status != 0:
            raise CompilationFailed(f"NVRTC refuses {name} for {arch}:\n{log}")
        return _read(program, "CUBIN"), log
    finally:
        lib.nvrtcDestroyProgram(ctypes.byref(program))


def _read(program: ctypes.c_void_p, what: str) -> bytes:
    size = ctypes.c_size_t()
    getattr(_library(), f"nvrtcGet{what}Size")(program, ctypes.byref(size))
    buffer = ctypes.create_string_buffer(size.value)
    getattr(_library(), f"nvrtcGet{what}")(program, buffer)
    return buffer.raw


def usage(log: str) -> dict[str, Usage]:
    """What the kernels of a compiled text use, by kernel."""
    found: dict[str, Usage] = {}
    starts = [*_FUNCTION.finditer(log)]
    for k, start in enumerate(starts):
        part = log[start.end() : starts[k + 1].start() if k + 1 < len(starts) else len(log)]
        spills, used = _SPILLS.search(part), _USED.search(part)
        if spills is None or used is None:
            raise ValueError(f"ptxas' report of {start[1]} is not understood:\n{part}")
        stack, stores, loads = (int(value) for value in spills.groups())
        found[start[1]] = Usage(int(used[1]), int(used[2] or 0), stack, stores, loads)
    return found
