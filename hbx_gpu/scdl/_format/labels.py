"""Labels of feature blocks: `labels.json` or `labels.npy`, read without unpickling anything.

Old archives hold paths in an object array, which is a pickle. Its opcodes are walked and only what a list
of texts and paths needs is understood; no class is looked up and nothing is called.
"""

from __future__ import annotations

import json
import logging
import pickletools
from pathlib import Path, PurePath, PurePosixPath, PureWindowsPath
from typing import Any

import numpy as np

_log = logging.getLogger(__name__)

_MARK = object()
_PATHS: dict[tuple[str, str], type[PurePath]] = {
    (module, name): kind
    for module in ("pathlib", "pathlib._local")
    for names, kind in (
        (("PosixPath", "PurePosixPath", "Path", "PurePath"), PurePosixPath),
        (("WindowsPath", "PureWindowsPath"), PureWindowsPath),
    )
    for name in names
}
_NUMPY = {
    (module, name)
    for module, name in (
        ("numpy.core.multiarray", "_reconstruct"),
        ("numpy._core.multiarray", "_reconstruct"),
        ("numpy", "ndarray"),
        ("numpy", "dtype"),
    )
}
# These name objects to be looked up.
_UNSAFE = ("PERSID", "INST", "EXT1", "EXT2", "EXT4")


class _Unknown(Exception):
    """The pickle holds something else than texts and paths."""


def read_labels(folder: Path, n_blocks: int) -> list[str | None]:
    """The label of every block; None where it is unknown, which never keeps an archive from opening.

    Parameters
    ----------
    folder
        A feature index folder.
    n_blocks
        Number of labels expected.
    """
    try:
        if (file := folder / "labels.json").exists():
            found = json.loads(file.read_bytes())
        elif (file := folder / "labels.npy").exists():
            found = _npy_labels(file)
        else:
            return [None] * n_blocks
        if not isinstance(found, list):
            raise _Unknown(f"expected a list, found {type(found).__name__}")
        # An empty text is how a missing label is written without a pickle.
        labels = [str(label) if label not in (None, "") else None for label in found]
        if len(labels) != n_blocks:
            raise _Unknown(f"expected {n_blocks} labels, found {len(labels)}")
    except Exception as error:  # whatever is in the file: it is nothing that rows need
        _log.warning("%s: labels of feature blocks are left out: %s", folder, error)
        return [None] * n_blocks
    return labels


def _npy_labels(file: Path) -> list[Any]:
    with file.open("rb") as stream:
        if np.lib.format.read_magic(stream) == (1, 0):
            _, _, dtype = np.lib.format.read_array_header_1_0(stream)
        else:
            _, _, dtype = np.lib.format.read_array_header_2_0(stream)
        if dtype.hasobject:
            return _walk(stream.read())
    array = np.load(file, allow_pickle=False)
    return [] if not array.size else list(array.ravel().tolist())


def _walk(raw: bytes) -> list[Any]:
    """The elements of a pickled 1-D object array of texts, paths and None.

    Raises
    ------
    _Unknown
        It is anything else.
    """
    try:
        return _run(raw)
    except (IndexError, KeyError, TypeError, AttributeError) as error:
        raise _Unknown(f"the pickle is not one of an array of paths ({error!r})") from None


def _run(raw: bytes) -> list[Any]:
    stack: list[Any] = []
    memo: dict[Any, Any] = {}
    for opcode, argument, _ in pickletools.genops(raw):
        match opcode.name:
            case "PROTO" | "FRAME":
                pass
            case "STOP":
                return _elements(stack.pop())
            case "MARK":
                stack.append(_MARK)
            case "NONE":
                stack.append(None)
            case "NEWTRUE" | "NEWFALSE":
                stack.append(opcode.name == "NEWTRUE")
            case "MEMOIZE":
                memo[len(memo)] = stack[-1]
            case "BINPUT" | "LONG_BINPUT" | "PUT":
                memo[argument] = stack[-1]
            case "BINGET" | "LONG_BINGET" | "GET":
                stack.append(memo[argument])
            case "EMPTY_LIST":
                stack.append([])
            case "EMPTY_TUPLE":
                stack.append(())
            case "TUPLE1" | "TUPLE2" | "TUPLE3":
                n = int(opcode.name[-1])
                stack[-n:] = [tuple(stack[-n:])]
            case "TUPLE":
                stack.append(tuple(_to_mark(stack)))
            case "LIST":
                stack.append(list(_to_mark(stack)))
            case "APPEND":
                item = stack.pop()
                stack[-1].append(item)
            case "APPENDS":
                items = _to_mark(stack)
                stack[-1].extend(items)
            case "GLOBAL":
                module, _, name = str(argument).partition(" ")
                stack.append(_name(module, name))
            case "STACK_GLOBAL":
                name = stack.pop()
                stack.append(_name(stack.pop(), name))
            case "REDUCE":
                arguments = stack.pop()
                stack.append(_made(stack.pop(), arguments))
            case "BUILD":
                state = stack.pop()
                stack[-1] = _built(stack[-1], state)
            case _ if opcode.arg is not None and opcode.name not in _UNSAFE:
                stack.append(argument)
            case _:
                raise _Unknown(f"opcode {opcode.name} is not expected in labels")
    raise _Unknown("the pickle does not end")


def _to_mark(stack: list[Any]) -> list[Any]:
    at = len(stack) - 1 - stack[::-1].index(_MARK)
    items = stack[at + 1 :]
    del stack[at:]
    return items


def _name(module: Any, name: Any) -> tuple[str, Any]:
    if (module, name) in _PATHS:
        return "path", _PATHS[module, name]
    if (module, name) in _NUMPY:
        return "numpy", name
    raise _Unknown(f"{module}.{name} has no place in labels")


def _made(what: Any, arguments: Any) -> Any:
    kind, name = what
    if kind == "path":
        return str(name(*arguments))
    # An array or dtype in the making: its state follows.
    return "numpy object", name


def _built(what: Any, state: Any) -> Any:
    if what == ("numpy object", "_reconstruct"):
        # (version, shape, dtype, is_fortran, elements)
        return "array", state[4]
    return what


def _elements(result: Any) -> list[Any]:
    kind, elements = result
    if kind != "array" or not all(e is None or isinstance(e, str) for e in elements):
        raise _Unknown("it holds something else than texts and paths")
    return list(elements)
