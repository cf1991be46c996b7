"""nvCOMP: decompression of many streams at once on a GPU, through the batched C API of libnvcomp.

Loading the library and asking it for sizes takes no driver. Signatures are those of the headers of nvCOMP 5
and 6; another major version is refused, because a wrong signature would be undefined behavior.
"""

from __future__ import annotations

import ctypes
import importlib.util
import threading
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from hbx_gpu._engine.device.backend import STREAM_ALIGNMENT, DeviceBuffer, Streams
from hbx_gpu.errors import DeviceUnavailableError

MAJORS = (6, 5)
"""Versions whose signatures are known, the preferred one first."""
MAX_TEMP = 256 << 20
"""Bytes of scratch that one call may ask for; zstd takes about three times its output."""

_NAMES = {"zstd": "Zstd", "lz4": "LZ4", "deflate": "Deflate"}
_CUDA_BACKEND = 2  # the decompression engine of newer GPUs reports success whatever it finds
_SIZE = ctypes.c_size_t
_INSTALL = "pip install 'hbx_gpu[gpu]', which has nvidia-nvcomp-cu13"


class _Options(ctypes.Structure):
    """nvcompBatched<Algorithm>DecompressOpts_t: 64 bytes that begin with the backend, else zeros."""

    _fields_ = (("backend", ctypes.c_int), ("others", ctypes.c_char * 60))


class _Properties(ctypes.Structure):
    _fields_ = (("version", ctypes.c_uint32), ("cudart_version", ctypes.c_uint32))


class _Alignments(ctypes.Structure):
    _fields_ = (("input", _SIZE), ("output", _SIZE), ("temp", _SIZE))


@dataclass(frozen=True, slots=True)
class Alignments:
    """Least alignments in bytes: of compressed streams, of what they become, of scratch."""

    input: int
    output: int
    temp: int


class Library:
    """libnvcomp, with its version known and its functions typed.

    Parameters
    ----------
    path
        Path of the shared library, or a name that the system's loader finds.

    Attributes
    ----------
    version
        (major, minor, patch).

    Raises
    ------
    DeviceUnavailableError
        It cannot be loaded, is of an unknown version, or lacks a function.
    """

    def __init__(self, path: str) -> None:
        try:
            self._library = ctypes.CDLL(path)
        except OSError as error:
            raise DeviceUnavailableError(f"nvCOMP cannot be loaded from {path}: {error}") from error
        try:
            properties = _Properties()
            self._call("nvcompGetProperties", ctypes.byref(properties))
            thousands, rest = divmod(properties.version, 1000)
            self.version = (thousands, rest // 100, rest % 100)
            if thousands not in MAJORS:
                known = " and ".join(str(major) for major in sorted(MAJORS))
                raise DeviceUnavailableError(
                    f"nvCOMP {'.'.join(map(str, self.version))} at {path} has signatures that are not known "
                    f"here; {known} have: {_INSTALL}"
                )
            # Renamed in 6, where it is told the stream as well.
            self._temp_size = "GetTempSize" if thousands >= 6 else "GetTempSizeAsync"
            for name in _NAMES.values():
                for verb in ("GetRequiredAlignments", self._temp_size, "Async"):
                    getattr(self._library, f"nvcompBatched{name}Decompress{verb}")
        except AttributeError as error:
            raise DeviceUnavailableError(f"nvCOMP at {path} lacks a function: {error}; {_INSTALL}") from error

    def alignments(self, algorithm: str) -> Alignments:
        """Return the alignments that an algorithm needs for its buffers."""
        found = _Alignments()
        self._call(self._function(algorithm, "GetRequiredAlignments"), self._options(), ctypes.byref(found))
        return Alignments(found.input, found.output, found.temp)

    def temp_bytes(self, algorithm: str, n: int, max_bytes: int, total_bytes: int, *, stream: int = 0) -> int:
        """Scratch for one call.

        Parameters
        ----------
        algorithm
            See :data:`hbx_gpu._codecs.containers.ALGORITHMS`.
        n, max_bytes, total_bytes
            Streams, decompressed bytes of the longest one, and of all of them.
        stream
            CUDA stream of the call.
        """
        found = _SIZE()
        more = (ctypes.c_void_p(stream),) if self.version[0] >= 6 else ()
        self._call(
            self._function(algorithm, self._temp_size),
            _SIZE(n),
            _SIZE(max_bytes),
            self._options(),
            ctypes.byref(found),
            _SIZE(total_bytes),
            *more,
        )
        return int(found.value)

    def decompress(
        self, algorithm: str, streams: Streams, first: int, n: int, temp: tuple[int, int], stream: int
    ) -> None:
        """Order the decompression of streams [first, first + n) on a CUDA stream.

        Parameters
        ----------
        temp
            Address and bytes of scratch.
        """
        pointer = ctypes.c_void_p
        self._call(
            self._function(algorithm, "Async"),
            pointer(streams.sources + 8 * first),
            pointer(streams.source_bytes + 8 * first),
            pointer(streams.target_bytes + 8 * first),
            pointer(streams.actual + 8 * first),
            _SIZE(n),
            pointer(temp[0]),
            _SIZE(temp[1]),
            pointer(streams.targets + 8 * first),
            self._options(),
            pointer(streams.states + 4 * first),
            pointer(stream),
        )

    def _function(self, algorithm: str, verb: str) -> str:
        return f"nvcompBatched{_NAMES[algorithm]}Decompress{verb}"

    def _options(self) -> _Options:
        return _Options(backend=_CUDA_BACKEND)

    def _call(self, name: str, *args: object) -> None:
        function = getattr(self._library, name)
        function.restype = ctypes.c_int
        status = function(*args)
        if status != 0:
            describe = self._library.nvcompGetStatusString
            describe.restype = ctypes.c_char_p
            reason = (describe(ctypes.c_int(status)) or b"").decode(errors="replace")
            raise RuntimeError(f"{name} failed with status {status}: {reason}")


def find_library() -> Library:
    """libnvcomp of the pip package nvidia-libnvcomp, else of the system.

    Raises
    ------
    DeviceUnavailableError
        There is none, or none that is known here.
    """
    places = _packaged()
    found = [str(path) for major in MAJORS for path in places if path.name == f"libnvcomp.so.{major}"]
    if found:
        return Library(found[0])
    if places:  # of an unknown version: `Library` names it
        return Library(str(places[-1]))
    for major in MAJORS:
        try:
            return Library(f"libnvcomp.so.{major}")
        except DeviceUnavailableError:
            continue
    raise DeviceUnavailableError(f"nvCOMP is not installed (no libnvcomp.so.{MAJORS[0]}): {_INSTALL}")


def _packaged() -> list[Path]:
    """Libraries inside the pip package, sorted by name."""
    try:
        spec = importlib.util.find_spec("nvidia.libnvcomp")
    except ModuleNotFoundError:  # no package `nvidia` at all
        spec = None
    folders = [] if spec is None else spec.submodule_search_locations or []
    return sorted(path for folder in folders for path in Path(folder).glob("lib*/libnvcomp.so.*"))


class NvcompDecompressor:
    """Decompresses on one GPU, on one CUDA stream. Safe to use from many threads.

    Parameters
    ----------
    library
        nvCOMP.
    allocate
        Function that allocates device memory, 256-byte aligned.
    wait
        Blocks until `stream` has passed all that was ordered on it so far.
    stream
        The CUDA stream's handle.
    on_device
        Makes the GPU the calling thread's current one.

    Raises
    ------
    DeviceUnavailableError
        The library asks for alignments that staged streams do not have.
    """

    def __init__(
        self,
        library: Library,
        allocate: Callable[[int], DeviceBuffer],
        wait: Callable[[], None],
        stream: int,
        on_device: Callable[[], AbstractContextManager[object]],
    ) -> None:
        self._library, self._allocate, self._wait = library, allocate, wait
        self._stream, self._on_device = stream, on_device
        self._temp: DeviceBuffer | None = None
        self._lock = threading.Lock()
        for algorithm in _NAMES:
            need = library.alignments(algorithm)
            if need.input > STREAM_ALIGNMENT or need.output > 1 or need.temp > 256:
                raise DeviceUnavailableError(
                    f"nvCOMP {library.version} wants {algorithm} streams aligned to {need.input} bytes, "
                    f"outputs to {need.output} and scratch to {need.temp}; {STREAM_ALIGNMENT}, 1 and 256 are "
                    "what they have"
                )

    def decompress(self, algorithm: str, streams: Streams) -> None:
        """See :class:`~hbx_gpu._engine.device.backend.Decompressor`."""
        # Calls that share scratch follow each other on the stream, never interleaved.
        with self._lock, self._on_device():
            for first, n, nbytes in self._calls(algorithm, streams.sizes):
                if nbytes and (self._temp is None or self._temp.nbytes < nbytes):
                    if (
                        self._temp is not None
                    ):  # earlier calls may be using it; in powers of two it grows rarely
                        self._wait()
                    self._temp = None
                    self._temp = self._allocate(1 << (nbytes - 1).bit_length())
                temp = (0, 0) if self._temp is None or not nbytes else (self._temp.address, nbytes)
                self._library.decompress(algorithm, streams, first, n, temp, self._stream)

    def _calls(self, algorithm: str, sizes: np.ndarray) -> list[tuple[int, int, int]]:
        """(first stream, streams, scratch) of calls that keep to `MAX_TEMP`, but for single long streams."""
        calls, first = [], 0
        while first < len(sizes):
            n = len(sizes) - first
            while True:
                part = sizes[first : first + n]
                sums = (int(part.max()), int(part.sum()))
                nbytes = self._library.temp_bytes(algorithm, n, *sums, stream=self._stream)
                if nbytes <= MAX_TEMP or n == 1:
                    break
                n = max(1, min(n - 1, n * MAX_TEMP // nbytes))
            calls.append((first, n, nbytes))
            first += n
        return calls
