"""Arrays that the processes of a host share: one of them makes the files, all of them map these.

The ranks of a training job run the same query. What it finds is written once, to a folder whose name follows
from the question, and mapped by every rank, so that the host holds it once. Whoever uses a folder holds a
lock on it that the kernel releases when the process ends, in whatever way. The last user removes the folder;
one that was killed leaves it to the next process that shares something.
"""

from __future__ import annotations

import os
import pickle
import shutil
import tempfile
import time
import weakref
from collections.abc import Callable, Mapping
from importlib.util import find_spec
from pathlib import Path

import numpy as np

from hbx_gpu._datasets.state import check_room, machine, unspill

_PREFIX = "hbx_gpu-shared-"
_WAIT_SECONDS = 0.02
_COUNTS = ("LOCAL_WORLD_SIZE", "OMPI_COMM_WORLD_LOCAL_SIZE", "MPI_LOCALNRANKS")
"""Where torchrun, Ray Train and MPI say how many ranks of a job run on this host."""

Arrays = Mapping[str, np.ndarray]


def several_ranks_here() -> bool:
    """Whether other ranks of this job may run on this host and share files, as the environment says."""
    if find_spec("fcntl") is None:  # a system without file locks, where each process has its own arrays
        return False
    if any(os.environ.get(name, "1") not in ("", "0", "1") for name in _COUNTS):
        return True
    # Slurm says how many tasks there are on each node, such as "4(x2)"; one task alone is "1".
    return os.environ.get("SLURM_STEP_TASKS_PER_NODE", "1").partition("(")[0] not in ("", "1")


def shared(key: str, make: Callable[[], tuple[Arrays, object]]) -> tuple[Arrays, object]:
    """Return arrays and a state, made by one of the processes of this user that ask for the same key.

    Parameters
    ----------
    key
        Names what is made: letters and digits. It must stand for the same content in every process.
    make
        Makes the arrays and a picklable state.

    Returns
    -------
    arrays
        Views of memory maps; the folder is kept at least as long as the largest one is used.
    state
        The state.

    Raises
    ------
    OSError
        The disk has too little room, or the folder cannot be written.
    """
    folder = Path(tempfile.gettempdir()) / f"{_PREFIX}{machine()}-{os.geteuid()}-{key}"
    _sweep(folder.parent, folder.name)
    lock = _locked_with_content(folder, make)
    try:
        arrays, state = unspill(str(folder))
    except BaseException:
        os.close(lock)
        raise
    largest = max(arrays.values(), key=lambda array: array.nbytes)
    # A memory map is the base of each view of it, and lives as long as any of them.
    kept = largest.base if isinstance(largest.base, np.memmap) else largest
    weakref.finalize(kept, _leave, folder, lock, os.getpid())
    return arrays, state


def _locked_with_content(folder: Path, make: Callable[[], tuple[Arrays, object]]) -> int:
    """A shared lock on a folder that is there, made by this process if by no other."""
    import fcntl

    while True:
        lock = _open(folder)
        fcntl.flock(lock, fcntl.LOCK_SH)  # waits for the process that makes the folder
        if not _is_current(folder, lock):
            os.close(lock)
            continue
        if (folder / "state.pickle").exists():
            return lock
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:  # another process is about to make it
            os.close(lock)
            time.sleep(_WAIT_SECONDS)
            continue
        try:
            if _is_current(folder, lock) and not (folder / "state.pickle").exists():
                _write(folder, *make())
        except BaseException:
            os.close(lock)
            raise
        fcntl.flock(lock, fcntl.LOCK_SH)
        if _is_current(folder, lock) and (folder / "state.pickle").exists():
            return lock
        os.close(lock)


def _lock_path(folder: Path) -> Path:
    return folder.with_name(folder.name + ".lock")


def _open(folder: Path) -> int:
    return os.open(_lock_path(folder), os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o600)


def _is_current(folder: Path, lock: int) -> bool:
    """Whether the lock is on the file of that name; another process may have removed it meanwhile."""
    try:
        return os.path.samestat(os.stat(_lock_path(folder)), os.fstat(lock))
    except FileNotFoundError:
        return False


def _write(folder: Path, arrays: Arrays, state: object) -> None:
    """Make the folder whole or not at all."""
    check_room(str(folder.parent), sum(array.nbytes for array in arrays.values()))
    shutil.rmtree(folder, ignore_errors=True)  # what a process left that was killed while writing
    folder.mkdir(mode=0o700)
    for name, array in arrays.items():
        np.save(folder / f"{name}.npy", array, allow_pickle=False)
    partial = folder / "state.partial"
    with open(partial, "wb") as file:
        pickle.dump(state, file, protocol=pickle.HIGHEST_PROTOCOL)
    partial.rename(folder / "state.pickle")


def _leave(folder: Path, lock: int, pid: int) -> None:
    """Give a folder up, and remove it if no other process uses it."""
    if os.getpid() == pid:
        _remove_if_unused(folder, lock)


def _remove_if_unused(folder: Path, lock: int) -> bool:
    """Close the lock; True if the folder was removed."""
    import fcntl

    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        if _is_current(folder, lock):
            shutil.rmtree(folder, ignore_errors=True)
            _lock_path(folder).unlink(missing_ok=True)
            return True
    except OSError:  # in use
        pass
    finally:
        os.close(lock)
    return False


def _sweep(place: Path, but: str) -> list[str]:
    """Remove the folders that no process uses any more; return their names."""
    removed = []
    for path in sorted(place.glob(f"{_PREFIX}{machine()}-{os.geteuid()}-*.lock")):
        name = path.name.removesuffix(".lock")
        if name == but:
            continue
        try:
            lock = os.open(path, os.O_RDWR | os.O_NOFOLLOW)
        except OSError:  # another process was faster
            continue
        if _remove_if_unused(path.with_name(name), lock):
            removed.append(name)
    return removed
