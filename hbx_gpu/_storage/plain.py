"""Describe plain files as arrays of chunks: a file of elements alone, or the body of an .npy file."""

from __future__ import annotations

import io
import os
from typing import BinaryIO

import numpy as np
import numpy.typing as npt

from hbx_gpu._remote import stores
from hbx_gpu._remote.places import Place, is_remote
from hbx_gpu._source import ArrayLayout
from hbx_gpu._untrusted import check_regular, open_regular
from hbx_gpu.errors import CorruptDataError

CHUNK_ELEMENTS = 4096
"""Elements per chunk, which `preadv` reads as a whole; other readers read just the part that rows need."""
_HEADER_BYTES = 4096  # more than NumPy writes for one dimension


def plain_layout(
    path: str | os.PathLike[str],
    dtype: npt.DTypeLike,
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
        dtype of the elements, in either byte order.
    n
        Number of elements.
    name
        Name of the array in messages; the file's name by default.
    byte_offset
        First byte of the first element.
    chunk_elements
        Elements per chunk.
    watched
        Whether reading the file is an error if it changes after this call.

    Raises
    ------
    FileNotFoundError
        The file does not exist.
    CorruptDataError
        The file ends before the last element.
    """
    path = os.fspath(path) if is_remote(path) else os.path.abspath(path)
    name = os.path.basename(path) if name is None else name
    stored = np.dtype(dtype)
    found, end = _size_of(path), byte_offset + n * stored.itemsize
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


def _size_of(path: str) -> int:
    if is_remote(path):
        info = stores.head(Place(path))
        if info is None:
            raise FileNotFoundError(f"there is no object {path}")
        return info.nbytes
    status = os.stat(path)
    check_regular(path, status)
    return status.st_size


def npy_layout(
    path: str | os.PathLike[str], *, name: str | None = None, chunk_elements: int = CHUNK_ELEMENTS
) -> ArrayLayout:
    """Describe the array in an .npy file of one dimension.

    Raises
    ------
    CorruptDataError
        It is not an .npy file, or its array holds objects or has several dimensions.
    """
    try:
        with _opened(path) as file:
            version = np.lib.format.read_magic(file)
            read = np.lib.format.read_array_header_1_0
            shape, _, dtype = (read if version == (1, 0) else np.lib.format.read_array_header_2_0)(file)
            begin = file.tell()
    except (OSError, CorruptDataError):
        raise
    except Exception as error:  # NumPy parses the header as Python code, which can raise almost anything
        raise CorruptDataError(f"{path} is not an .npy file that can be read: {error}") from error
    if len(shape) != 1 or dtype.hasobject:
        raise CorruptDataError(
            f"{path}: expected numbers in one dimension, found {dtype} in shape {shape}; "
            "save it again with numpy.save as such an array"
        )
    return plain_layout(path, dtype, shape[0], name=name, byte_offset=begin, chunk_elements=chunk_elements)


def _opened(path: str | os.PathLike[str]) -> BinaryIO:
    """The file, or the beginning of an object, which holds its header."""
    if is_remote(path):
        return io.BytesIO(stores.get(Place(os.fspath(path)), {"range": (0, _HEADER_BYTES)})[0])
    return open(open_regular(path), "rb")


def file_fingerprint(path: str, *, content: bool = False) -> str:
    """Return a text that tells a file from another one put in its place; empty if there is no file.

    Parameters
    ----------
    path
        The file.
    content
        Whether size and time of change are part of the text, so that a file rewritten in place differs too.
    """
    if is_remote(path):
        info = stores.head(Place(path))
        return "" if info is None else f"{info.version}:{info.nbytes}"
    try:
        found = os.stat(path)
    except (FileNotFoundError, NotADirectoryError):
        return ""
    identity = f"{found.st_dev}:{found.st_ino}"
    return f"{identity}:{found.st_size}:{found.st_mtime_ns}" if content else identity
