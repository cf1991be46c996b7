"""Map whole files into memory through the C library's mmap(2)."""

from __future__ import annotations

import ctypes
import functools
import mmap
import os
import sys

from hbx_gpu._untrusted import open_regular
from hbx_gpu.errors import UnsupportedError

_MAP_FAILED = ctypes.c_void_p(-1).value


class FileMap:
    """A whole file mapped read-only, and unmapped with the last reference.

    It calls libc, because Python's mmap keeps a descriptor per map, and one batch may touch more files than a
    process may hold open.

    Parameters
    ----------
    path
        The file.

    Attributes
    ----------
    address, nbytes
        Where the map begins, and its size; both 0 for an empty file.
    identity
        Device and inode of the file.

    Raises
    ------
    UnsupportedError
        The system has no mmap(2).
    OSError
        The file cannot be opened or mapped.
    """

    def __init__(self, path: str) -> None:
        self.nbytes, self.address = 0, 0
        self._libc = _libc()
        fd = open_regular(path)
        try:
            found = os.fstat(fd)
            self.identity = (found.st_dev, found.st_ino)
            if found.st_size:
                address = self._libc.mmap(None, found.st_size, mmap.PROT_READ, mmap.MAP_SHARED, fd, 0)
                if address == _MAP_FAILED:
                    code = ctypes.get_errno()
                    raise OSError(code, f"mmap of {found.st_size} bytes: {os.strerror(code)}", path)
                self.nbytes, self.address = found.st_size, address
        finally:
            os.close(fd)

    def __del__(self) -> None:
        if self.nbytes:
            self._libc.munmap(self.address, self.nbytes)

    def hand_back(self) -> None:
        """Drop the pages from this process; the map stays valid, and the file stays in the page cache."""
        if self.nbytes and hasattr(mmap, "MADV_DONTNEED"):  # not on every system
            self._libc.madvise(self.address, self.nbytes, mmap.MADV_DONTNEED)


@functools.cache
def _libc() -> ctypes.CDLL:
    """Open the C library, on first use only, because some systems do not have these functions."""
    try:
        library = ctypes.CDLL(None, use_errno=True)
        library.mmap.restype = ctypes.c_void_p
        library.mmap.argtypes = [
            ctypes.c_void_p,
            ctypes.c_size_t,
            ctypes.c_int,
            ctypes.c_int,
            ctypes.c_int,
            ctypes.c_int64,
        ]
        library.madvise.restype = ctypes.c_int
        library.madvise.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
        library.munmap.restype = ctypes.c_int
        library.munmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t]
    except (AttributeError, OSError, TypeError) as error:
        raise UnsupportedError(
            f"reading stored arrays needs mmap and madvise of Linux or macOS, which {sys.platform} does not "
            "have; load the data there"
        ) from error
    return library
