"""Storage options, such as credentials: kept apart from addresses, so that no text shows them.

Addresses travel in reprs, messages, pickles and saved states; options never do. Processes that this one
starts on the same machine, such as workers of a loader, find them in a file that only this user may read; its
path is in their environment, and it is removed when this process ends.
"""

from __future__ import annotations

import atexit
import json
import os
import shutil
import tempfile
import threading
from collections.abc import Mapping
from pathlib import Path

_VARIABLE = "HBX_GPU_STORAGE_OPTIONS"
_options: dict[str, dict[str, str]] = {}
_caches: dict[str, tuple[str, int | None]] = {}
_lock = threading.Lock()
_folder: tuple[int, str] | None = None  # the process that made it, and the folder
_inherited: str | None = None


def remember(url: str, options: Mapping[str, str]) -> None:
    """Use options for an address and everything below it, in this process and those that it starts.

    Parameters
    ----------
    url
        The address.
    options
        obstore's configuration keys. They replace those remembered for the same address before.
    """
    with _lock:
        _inherit()
        mine = {str(key): str(value) for key, value in options.items()}
        if _options.get(url) == mine:
            return
        _options[url] = mine
        _hand_over()


def remember_cache(url: str, folder: str, most: int | None) -> None:
    """Keep chunks below an address in a folder of the local disk, in this process and those that it starts.

    Parameters
    ----------
    url
        The address.
    folder, most
        Absolute path of the folder, and the bytes that it may take; None: the default of the cache.
    """
    with _lock:
        _inherit()
        if _caches.get(url) == (folder, most):
            return
        _caches[url] = (folder, most)
        _hand_over()


def cache_of(url: str) -> tuple[str, int | None] | None:
    """The folder and the bytes that were remembered for the nearest address above; None if there are none."""
    with _lock:
        _inherit()
        best = max((known for known in _caches if _is_below(url, known)), key=len, default=None)
        return None if best is None else _caches[best]


def options_of(url: str) -> dict[str, str]:
    """The options that were remembered for the nearest address above, as a copy; empty if there are none."""
    with _lock:
        _inherit()
        best = max((known for known in _options if _is_below(url, known)), key=len, default=None)
        return {} if best is None else dict(_options[best])


def _is_below(url: str, known: str) -> bool:
    return url == known or url.startswith(known.rstrip("/") + "/")


def _inherit() -> None:
    """Take over what the process that started this one has remembered."""
    global _inherited
    path = os.environ.get(_VARIABLE)
    if path is None or path == _inherited:
        return
    _inherited = path
    try:
        found = json.loads(Path(path).read_bytes())
    except (OSError, ValueError):  # the parent has ended and removed it: what is left is the environment
        return
    for url, options in found["options"].items():
        _options.setdefault(url, options)
    for url, (folder, most) in found["caches"].items():
        _caches.setdefault(url, (folder, most))


def _hand_over() -> None:
    """Write the options where processes that are started from now on find them."""
    global _folder, _inherited
    if _folder is None or _folder[0] != os.getpid():
        made = tempfile.mkdtemp(prefix="hbx_gpu-options-")  # of mode 0700
        _folder = (os.getpid(), made)
        atexit.register(_remove, *_folder)
    path = os.path.join(_folder[1], "options.json")
    unfinished = f"{path}.new"
    descriptor = os.open(unfinished, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
    with open(descriptor, "w") as file:
        json.dump({"options": _options, "caches": _caches}, file)
    os.replace(unfinished, path)
    os.environ[_VARIABLE] = _inherited = path


def _remove(process: int, folder: str) -> None:
    if process == os.getpid():  # a forked child runs the same handlers
        shutil.rmtree(folder, ignore_errors=True)
