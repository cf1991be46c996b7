"""Labels of feature blocks: `labels.json` or `labels.npy`, read so that the file can call nothing.

Old archives hold paths in an object array, which is a pickle. Only the opcodes that an array of texts and
paths needs are let through, and every class that it names is replaced by a harmless one of this module.
"""

from __future__ import annotations

import io
import logging
import math
import pickle
import pickletools
from functools import partial
from pathlib import Path, PurePath, PurePosixPath, PureWindowsPath

import numpy as np

from hbx_gpu._untrusted import parse_json, read_small
from hbx_gpu.scdl._format.layout import LABELS, LABELS_JSON

_log = logging.getLogger(__name__)

# A file is larger by far than the labels of any real archive; so is a path.
_MAX_BYTES = 64 << 20
_MAX_PATH = 1 << 16
# fmt: off
_OPCODES = {
    "PROTO", "FRAME", "STOP", "MARK", "NONE", "NEWTRUE", "NEWFALSE", "MEMOIZE", "BINPUT", "LONG_BINPUT",
    "BINGET", "LONG_BINGET", "EMPTY_LIST", "APPEND", "APPENDS", "EMPTY_TUPLE", "TUPLE", "TUPLE1",
    "TUPLE2", "TUPLE3", "GLOBAL", "STACK_GLOBAL", "REDUCE", "BUILD", "BININT", "BININT1", "BININT2",
    "SHORT_BINBYTES", "BINBYTES", "SHORT_BINUNICODE", "BINUNICODE", "BINUNICODE8",
}
# fmt: on


class _Unexpected(Exception):
    """The file holds something else than texts and paths."""


class _Array:
    """Stands for a pickled array, and for its dtype; keeps the elements."""

    def __init__(self, *_: object) -> None:
        self.elements: list[object] = []

    def __setstate__(self, state: tuple[object, ...]) -> None:
        # (version, shape, dtype, is_fortran, elements); a dtype's state is longer and of no use here.
        if len(state) == 5 and isinstance(state[4], list | bytes):
            self.elements = list(state[4])


class _LabelUnpickler(pickle.Unpickler):
    def __init__(self, raw: bytes) -> None:
        super().__init__(io.BytesIO(raw))
        # Paths made of paths that stand before are short in a file and long in memory.
        self._room = _MAX_BYTES

    def _path(self, kind: type[PurePath], *parts: str) -> str:
        # A path joined to itself, thirty times over, would fill the memory.
        length = sum(map(len, parts))
        self._room -= length
        if length > _MAX_PATH or self._room < 0:
            raise _Unexpected(f"a path of more than {_MAX_PATH} characters, or paths of {_MAX_BYTES} in all")
        return str(kind(*parts))

    def find_class(self, module: str, name: str) -> object:
        """The stand-in for a class or function that the pickle names."""
        if module in ("pathlib", "pathlib._local"):
            if name in ("PosixPath", "PurePosixPath", "Path", "PurePath"):
                return partial(self._path, PurePosixPath)
            if name in ("WindowsPath", "PureWindowsPath"):
                return partial(self._path, PureWindowsPath)
        if (module, name) in (("numpy", "ndarray"), ("numpy", "dtype")):
            return _Array
        if module in ("numpy.core.multiarray", "numpy._core.multiarray") and name == "_reconstruct":
            return _Array
        raise _Unexpected(f"{module}.{name} has no place in labels")


def read_labels(folder: Path, n_blocks: int) -> list[str | None]:
    """The label of every block; None where it is unknown, which never keeps an archive from opening.

    Parameters
    ----------
    folder
        A feature index folder.
    n_blocks
        Number of labels expected.
    """
    problems = []
    # A program that knows one of the files only, and appends blocks, leaves the other one too short.
    for file, read in ((folder / LABELS_JSON, _json_labels), (folder / LABELS, _npy_labels)):
        if not file.exists():
            continue
        try:
            found = read(file)
            if not isinstance(found, list):
                raise _Unexpected(f"expected a list, found {type(found).__name__}")
            if len(found) != n_blocks:
                raise _Unexpected(f"expected {n_blocks} labels, found {len(found)}")
            # An empty text is how a missing label is written without a pickle.
            return [str(label) if label not in (None, "") else None for label in found]
        except Exception as error:  # whatever is in the file: it is nothing that rows need
            problems.append(f"{file.name}: {error}")
    if problems:
        _log.warning("%s: labels of feature blocks are left out: %s", folder, "; ".join(problems))
    return [None] * n_blocks


def _json_labels(file: Path) -> object:
    return parse_json(read_small(file), file)


def _npy_labels(file: Path) -> list[object]:
    if (size := file.stat().st_size) > _MAX_BYTES:
        raise _Unexpected(f"expected at most {_MAX_BYTES} bytes, found {size}")
    with file.open("rb") as stream:
        if np.lib.format.read_magic(stream) == (1, 0):
            shape, _, dtype = np.lib.format.read_array_header_1_0(stream)
        else:
            shape, _, dtype = np.lib.format.read_array_header_2_0(stream)
        if dtype.hasobject:
            return _unpickled(stream.read())
    if math.prod(shape) * dtype.itemsize > size:
        raise _Unexpected(f"the header says shape {shape} of {dtype}, but the file has {size} bytes")
    array = np.load(file, allow_pickle=False)
    return [] if not array.size else list(array.ravel().tolist())


def _unpickled(raw: bytes) -> list[object]:
    """The elements of a pickled 1-D object array of texts, paths and None."""
    for opcode, argument, _ in pickletools.genops(raw):
        if opcode.name not in _OPCODES:
            raise _Unexpected(f"opcode {opcode.name} is not expected in labels")
        # The memo is a list as long as its highest number.
        if opcode.name == "LONG_BINPUT" and int(argument or 0) > len(raw):
            raise _Unexpected(f"memo entry {argument} in a pickle of {len(raw)} bytes")
    found = _LabelUnpickler(raw).load()
    if not isinstance(found, _Array) or not all(e is None or isinstance(e, str) for e in found.elements):
        raise _Unexpected("it holds something else than texts and paths")
    return found.elements
