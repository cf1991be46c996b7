"""Pickle a dataset as the path of a folder of memory-mapped arrays.

Pickling the arrays themselves would copy the row index into every worker. Instead, the first pickle writes
them to a temporary folder, and every process maps the same pages. The folder is removed with the dataset that
wrote it; if the job is killed, the next process that writes such a folder removes it. A process that
unpickles the dataset after the folder is gone rebuilds it from its recipe.
"""

from __future__ import annotations

import errno
import hashlib
import os
import pickle
import re
import shutil
import socket
import stat
import tempfile
import weakref
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

_PREFIX = "hbx_gpu-dataset-"
# Machine, process, and when that process began: a number is used again once its process has ended.
_OWNED = re.compile(re.escape(_PREFIX) + r"([0-9a-f]{8})-(\d+)-(\d+)-")
_SPARE = 1 << 20  # bytes beside the arrays


class Spill:
    """The temporary folder with the arrays of a dataset, shared by all of its variants.

    Attributes
    ----------
    folder
        Path of the folder; None until it is written. It is removed with this object if this process wrote it.
    """

    def __init__(self, folder: str | None = None) -> None:
        self.folder = folder

    def write(self, arrays: Mapping[str, np.ndarray], state: Callable[[], object]) -> str | None:
        """Return the path of the folder, writing it if needed; None if the disk has no room for it."""
        if self.folder is None:
            try:
                self.folder = spill(self, arrays, state())
            except OSError:
                return None
        return self.folder


def spill(owner: object, arrays: Mapping[str, np.ndarray], state: object) -> str:
    """Write `arrays` and `state` to a temporary folder that lives as long as `owner`.

    Folders of processes that were killed are removed first.

    Returns
    -------
    str
        Path of the folder.

    Raises
    ------
    OSError
        The disk has too little room; nothing was written.
    """
    place = tempfile.gettempdir()
    sweep(place)
    check_room(place, sum(array.nbytes for array in arrays.values()))
    pid = os.getpid()
    folder = tempfile.mkdtemp(prefix=f"{_PREFIX}{machine()}-{pid}-{_began(pid)}-", dir=place)
    try:
        for name, array in arrays.items():
            _save(os.path.join(folder, f"{name}.npy"), array)
        with open(os.path.join(folder, "state.pickle"), "wb") as file:
            pickle.dump(state, file, protocol=pickle.HIGHEST_PROTOCOL)
    except BaseException:
        shutil.rmtree(folder, ignore_errors=True)
        raise
    # Only the process that wrote the folder removes it, also after a fork.
    weakref.finalize(owner, _remove, folder, os.getpid())
    return folder


def sweep(place: str) -> list[str]:
    """Remove the folders of processes that ended without removing them; return their paths.

    Folders of other users and of other machines or containers are left, because their processes may still
    run.
    """
    removed = []
    try:
        entries = list(os.scandir(place))
    except OSError:
        return []
    for entry in entries:
        owned = _OWNED.match(entry.name)
        if owned is None or owned[1] != machine():
            continue
        try:
            found = entry.stat(follow_symlinks=False)
        except OSError:  # another process was faster
            continue
        if not stat.S_ISDIR(found.st_mode) or found.st_uid != os.geteuid():
            continue
        if _began(int(owned[2])) != owned[3]:
            shutil.rmtree(entry.path, ignore_errors=True)
            removed.append(entry.path)
    return removed


def _save(path: str, array: np.ndarray) -> None:
    """Write an array; one that is mapped from a file is linked instead, so that its pages are shared."""
    base: object = array
    while isinstance(base, np.ndarray) and not isinstance(base, np.memmap):
        base = base.base
    if isinstance(base, np.memmap) and base.filename is not None and _is_all_of(array, base):
        try:
            os.link(base.filename, path)
        except OSError:  # another file system, or the file is gone
            pass
        else:
            return
    np.save(path, array, allow_pickle=False)


def _is_all_of(array: np.ndarray, base: np.ndarray) -> bool:
    same = array.shape == base.shape and array.dtype == base.dtype and array.strides == base.strides
    return same and array.__array_interface__["data"] == base.__array_interface__["data"]


def check_room(place: str, nbytes: int) -> None:
    """Refuse to write so many bytes where they do not fit.

    Raises
    ------
    OSError
        There is too little room.
    """
    free = shutil.disk_usage(place).free
    if nbytes + _SPARE > free:
        raise OSError(
            errno.ENOSPC,
            f"sending this dataset to other processes takes {nbytes + _SPARE:,} bytes of temporary files, "
            f"and {free:,} are free; make room there, or set TMPDIR to another folder",
            place,
        )


def machine() -> str:
    """Return a name of host, boot and process namespace: processes that share it see each other's ids."""
    parts = [socket.gethostname()]
    reads: tuple[Callable[[], str], ...] = (
        lambda: Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii"),
        lambda: os.readlink("/proc/self/ns/pid"),
    )
    for read in reads:
        try:
            parts.append(read())
        except OSError:
            parts.append("")
    return hashlib.sha256("\0".join(parts).encode()).hexdigest()[:8]


def _began(pid: int) -> str:
    """Return when a process began, in the system's own unit; empty if the process does not exist."""
    try:
        # The name of the program, in parentheses, may hold anything.
        text = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8", errors="replace")
        return text.rpartition(")")[2].split()[19]
    except (FileNotFoundError, ProcessLookupError):
        if os.path.isdir("/proc/self"):
            return ""
    try:  # a system without /proc
        os.kill(pid, 0)
    except ProcessLookupError:
        return ""
    except OSError:
        pass
    return "0"


def _owner_of(folder: Path) -> int:
    return folder.stat().st_uid


def _remove(folder: str, pid: int) -> None:
    if os.getpid() == pid:
        shutil.rmtree(folder, ignore_errors=True)


def unspill(folder: str) -> tuple[dict[str, np.ndarray], Any]:
    """Map the arrays of a spilled dataset and load its state.

    Raises
    ------
    FileNotFoundError
        The folder is gone.
    PermissionError
        The folder belongs to another user; loading its state could run code of theirs.
    """
    root = Path(folder)
    if _owner_of(root) not in (os.geteuid(), 0):
        raise PermissionError(
            errno.EPERM, "the folder of this dataset belongs to another user; open the dataset anew", folder
        )
    with open(root / "state.pickle", "rb") as file:
        state = pickle.load(file)
    arrays = {
        path.stem: np.asarray(np.load(path, mmap_mode="r" if path.stat().st_size > 128 else None))
        for path in root.glob("*.npy")
    }
    return arrays, state
