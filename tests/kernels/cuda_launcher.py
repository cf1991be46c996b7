"""Kernels on a GPU with NumPy arguments: uploads arrays before a launch and brings them back after it."""

from __future__ import annotations

import weakref
from collections.abc import Sequence
from typing import Any

import cupy
import numpy as np

from hbx_gpu._engine.device import sources

# Address and bytes: two views of one array are one argument, as they are where kernels see host memory.
_Place = tuple[int, int]
DEFAULT_SHARED = 48 * 1024  # a kernel must ask for more than this


class CudaLauncher:
    """The GPU twin of `tests.emulation.EmulatedLauncher`."""

    emulated = False
    order = "cuda"

    def __init__(self) -> None:
        self._modules: dict[str, Any] = {}
        self._placed: dict[_Place, tuple[weakref.ref[np.ndarray], Any]] = {}

    def address(self, array: np.ndarray) -> int:
        """Address of an array's device copy; each `run` uploads it before and downloads it after."""
        known = self._placed.get(_place(array))
        if known is None or known[0]() is None:
            known = (weakref.ref(array), cupy.zeros(array.nbytes, dtype=np.uint8))
            self._placed[_place(array)] = known
        return int(known[1].data.ptr)

    def launch(
        self,
        kernel: str,
        grid: int | tuple[int, ...],
        block: int | tuple[int, ...],
        args: Sequence[Any],
        shared: int = 0,
    ) -> None:
        """Launch on the current stream with device arrays (cupy, torch), None, and NumPy scalars."""
        function = self._function(kernel)
        if shared > DEFAULT_SHARED:
            function.max_dynamic_shared_size_bytes = shared
        function(_three(grid), _three(block), tuple(_argument(arg) for arg in args), shared_mem=shared)

    def run(
        self,
        kernel: str,
        grid: int | tuple[int, ...],
        block: int | tuple[int, ...],
        args: Sequence[Any],
        shared: int = 0,
    ) -> None:
        """Launch with NumPy arrays, wait, and leave in them what the kernel wrote."""
        self._placed = {key: entry for key, entry in self._placed.items() if entry[0]() is not None}
        moved: dict[_Place, tuple[np.ndarray, Any]] = {}
        for key, (reference, device) in self._placed.items():
            array = reference()
            if array is not None:
                moved[key] = (array, device)
        for arg in args:
            if isinstance(arg, np.ndarray) and _place(arg) not in moved:
                moved[_place(arg)] = (arg, cupy.empty(arg.nbytes, dtype=np.uint8))
        for array, device in moved.values():
            device.set(_bytes(array))
        device_args = [moved[_place(arg)][1] if isinstance(arg, np.ndarray) else arg for arg in args]
        self.launch(kernel, grid, block, device_args, shared)
        cupy.cuda.get_current_stream().synchronize()
        for array, device in moved.values():
            if array.flags.writeable:
                _bytes(array)[:] = device.get()

    def _function(self, kernel: str) -> Any:
        file = sources.kernel_names()[kernel]
        if file not in self._modules:
            self._modules[file] = cupy.RawModule(code=sources.source(file), options=("--std=c++17",))
        return self._modules[file].get_function(kernel)


def _place(array: np.ndarray) -> _Place:
    return int(array.ctypes.data), array.nbytes


def _bytes(array: np.ndarray) -> np.ndarray:
    """An array's memory; structured ones too, which cupy does not know."""
    if not array.flags.c_contiguous:
        raise ValueError("expected contiguous memory")
    return array.reshape(-1).view(np.uint8)


def _argument(arg: Any) -> Any:
    if arg is None:
        return np.uint64(0)
    return np.uint64(arg.data_ptr()) if hasattr(arg, "data_ptr") else arg


def _three(sizes: int | tuple[int, ...]) -> tuple[int, ...]:
    return sizes if isinstance(sizes, tuple) else (sizes,)
