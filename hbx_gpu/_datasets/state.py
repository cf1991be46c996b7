"""How a dataset crosses to another process: as the path of a folder of memory-mapped arrays.

Pickling the arrays would copy the row index into every worker. Instead the first pickle writes
them once to a temporary folder, and every process maps the same pages. The folder goes when the
dataset that wrote it does; a process that comes too late rebuilds the dataset from its recipe.
"""

from __future__ import annotations

import os
import pickle
import shutil
import tempfile
import weakref
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np


def spill(owner: object, arrays: Mapping[str, np.ndarray], state: Any) -> str:
    """Write `arrays` and `state` to a temporary folder that lives as long as `owner`.

    Returns
    -------
    str
        Path of the folder.

    Raises
    ------
    OSError
        No room for it.
    """
    folder = tempfile.mkdtemp(prefix="hbx_gpu-dataset-")
    try:
        for name, array in arrays.items():
            np.save(os.path.join(folder, f"{name}.npy"), array, allow_pickle=False)
        with open(os.path.join(folder, "state.pickle"), "wb") as file:
            pickle.dump(state, file, protocol=pickle.HIGHEST_PROTOCOL)
    except BaseException:
        shutil.rmtree(folder, ignore_errors=True)
        raise
    # Only the process that wrote the folder removes it, also after a fork.
    weakref.finalize(owner, _remove, folder, os.getpid())
    return folder


def _remove(folder: str, pid: int) -> None:
    if os.getpid() == pid:
        shutil.rmtree(folder, ignore_errors=True)


def unspill(folder: str) -> tuple[dict[str, np.ndarray], Any]:
    """Map the arrays of a spilled dataset and load its state.

    Raises
    ------
    FileNotFoundError
        The folder is gone.
    """
    root = Path(folder)
    with open(root / "state.pickle", "rb") as file:
        state = pickle.load(file)
    arrays = {
        path.stem: np.asarray(np.load(path, mmap_mode="r" if path.stat().st_size > 128 else None))
        for path in root.glob("*.npy")
    }
    return arrays, state
