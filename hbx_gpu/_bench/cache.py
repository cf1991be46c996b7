"""The page cache: dropping files from it, and whether that worked."""

from __future__ import annotations

import ctypes
import mmap
import os
from collections.abc import Sequence
from pathlib import Path

import numpy as np

_KEPT = 0.02  # share of the pages that may stay


def files_below(path: Path) -> list[Path]:
    """Files of a store that loading reads; the catalog of an atlas is read once, at opening."""
    if path.is_file():
        return [path]
    return sorted(f for f in path.rglob("*") if f.is_file() and "lance_db" not in f.relative_to(path).parts)


def load(files: Sequence[Path]) -> None:
    """Bring files into the page cache."""
    for file in files:
        with file.open("rb") as stream:
            while stream.read(1 << 24):
                pass


def forget(files: Sequence[Path]) -> str:
    """Drop files from the page cache; returns why that is not possible here, or "".

    Pages that some process maps or has not written back stay, and so do those of file systems in memory.
    The share that is left is measured, not assumed.
    """
    if not hasattr(os, "posix_fadvise"):  # macOS, Windows
        return "this system has no posix_fadvise"
    try:
        for file in files:
            descriptor = os.open(file, os.O_RDONLY)
            try:
                os.fsync(descriptor)
                os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
            finally:
                os.close(descriptor)
        kept = resident_share(files)
    except OSError as error:
        return str(error)
    if kept > _KEPT:
        return f"{kept:.0%} of it stayed (files in memory, or in use by another process)"
    return ""


def resident_share(files: Sequence[Path]) -> float:
    """Share of the pages of files that are in the page cache, 0 to 1.

    Raises
    ------
    OSError
        The system does not tell.
    """
    libc = ctypes.CDLL(None, use_errno=True)
    if not hasattr(libc, "mincore"):  # Windows
        raise OSError("this system has no mincore: what is in the page cache cannot be told")
    pages = found = 0
    for file in files:
        size = file.stat().st_size
        if not size:
            continue
        with file.open("rb") as stream, mmap.mmap(stream.fileno(), size, access=mmap.ACCESS_READ) as mapped:
            view = np.frombuffer(mapped, np.uint8)
            flags = np.zeros(-(-size // mmap.PAGESIZE), np.uint8)
            status = libc.mincore(
                ctypes.c_void_p(view.ctypes.data), ctypes.c_size_t(size), ctypes.c_void_p(flags.ctypes.data)
            )
            del view  # or the map cannot be closed
            if status:
                raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()), str(file))
        pages += len(flags)
        found += int((flags & 1).sum())
    return found / pages if pages else 0.0
