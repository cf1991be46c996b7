"""Plain files as arrays of chunks: a bare buffer of elements, or the body of an .npy file."""

from __future__ import annotations

import os
from typing import Any

import numpy as np

from hbx_gpu._source import ArrayLayout
from hbx_gpu._untrusted import check_regular, open_regular
from hbx_gpu.errors import CorruptDataError

CHUNK_ELEMENTS = 4096
"""Elements that `preadv` reads at least; other readers take from a file just what rows need."""


def plain_layout(
    path: str | os.PathLike[str],
    dtype: Any,
    n: int,
    *,
    name: str | None = None,
    byte_offset: int = 0,
    chunk_elements: int = CHUNK_ELEMENTS,
    watched: bool = False,
) -> ArrayLayout:
    """Describe `n` elements that lie uncompressed in a file.

    Parameters
    ----------
    path
        The file.
    dtype
        Of the elements, either byte order.
    n
        Number of elements.
    name
        For messages; the file's name by default.
    byte_offset
        Where the first one begins.
    chunk_elements
        Length of a chunk.
    watched
        Whether a change of the file after this call is an error when it is read.

    Raises
    ------
    FileNotFoundError
        No such file.
    CorruptDataError
        The file ends before the last element.
    """
    path = os.path.abspath(path)
    name = os.path.basename(path) if name is None else name
    stored = np.dtype(dtype)
    status = os.stat(path)
    check_regular(path, status)
    found, end = status.st_size, byte_offset + n * stored.itemsize
    if found < end:
        raise CorruptDataError(
            f"{path} holds {found} bytes; array {name!r}, {n} elements of {stored} from byte {byte_offset} "
            f"on, needs {end}. The file was cut short; copy it again from its origin"
        )
    big = stored.byteorder == ">" or (stored.byteorder == "=" and not np.little_endian)
    return ArrayLayout(
        path=path,
        name=name,
        shape=(n,),
        dtype=stored.newbyteorder("="),
        chunk_shape=(chunk_elements,),
        shard_shape=(chunk_elements,),
        codecs=({"name": "bytes", "configuration": {"endian": "big" if big else "little"}},),
        absent_is_fill=False,
        fingerprint=file_fingerprint(path, content=watched),
        byte_offset=byte_offset,
        watched=watched,
    )


def npy_layout(
    path: str | os.PathLike[str], *, name: str | None = None, chunk_elements: int = CHUNK_ELEMENTS
) -> ArrayLayout:
    """Describe the array in an .npy file of one dimension.

    Raises
    ------
    CorruptDataError
        Not an .npy file, objects in it, or several dimensions.
    """
    try:
        with open(open_regular(path), "rb") as file:
            version = np.lib.format.read_magic(file)
            read = np.lib.format.read_array_header_1_0
            shape, _, dtype = (read if version == (1, 0) else np.lib.format.read_array_header_2_0)(file)
            begin = file.tell()
    except (OSError, CorruptDataError):
        raise
    except Exception as error:  # NumPy parses the header as Python, and fails in as many ways
        raise CorruptDataError(f"{path} is not an .npy file that can be read: {error}") from error
    if len(shape) != 1 or dtype.hasobject:
        raise CorruptDataError(
            f"{path}: expected numbers in one dimension, found {dtype} in shape {shape}; "
            "save it again with numpy.save as such an array"
        )
    return plain_layout(path, dtype, shape[0], name=name, byte_offset=begin, chunk_elements=chunk_elements)


def file_fingerprint(path: str, *, content: bool = False) -> str:
    """What tells a file from another one that was put in its place; empty if there is none.

    Parameters
    ----------
    path
        The file.
    content
        Whether size and time of change count too, so that a file rewritten in place differs.
    """
    try:
        found = os.stat(path)
    except (FileNotFoundError, NotADirectoryError):
        return ""
    identity = f"{found.st_dev}:{found.st_ino}"
    return f"{identity}:{found.st_size}:{found.st_mtime_ns}" if content else identity
