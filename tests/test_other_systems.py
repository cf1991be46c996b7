"""Systems that are not Linux: everything can be imported, and what they lack is said by what needs it."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]

# What Windows does not have. Packages that we import from are loaded before it goes.
HIDE = """
import ctypes, importlib, mmap, os, pathlib, pkgutil, subprocess, sys
for name in ("numpy", "scipy.sparse", "pandas", "pyarrow", "h5py", "zarr", "anndata.io", "lancedb", "numba",
             "multiprocessing.connection", "torch.multiprocessing", "torch.utils.data", "nvidia.dali",
             "lightning.pytorch", "accelerate", "scvi"):
    try:
        importlib.import_module(name)
    except ImportError:
        pass
for name in ("fcntl", "resource", "termios", "pwd", "grp"):
    sys.modules[name] = None
for name in ("sched_getaffinity", "preadv", "pread", "posix_fadvise", "sysconf", "O_CLOEXEC", "O_NOFOLLOW",
             "O_NONBLOCK", "O_NOCTTY", "geteuid", "getuid", "register_at_fork"):
    delattr(os, name)
for name in ("MADV_DONTNEED", "PROT_READ", "MAP_SHARED"):
    delattr(mmap, name)
plain = ctypes.CDLL
def no_process_library(name, *args, **kwargs):
    if name is None:
        raise TypeError("bad argument type for built-in operation")
    return plain(name, *args, **kwargs)
ctypes.CDLL = no_process_library
"""

EVERYTHING = """
import hbx_gpu
for module in pkgutil.walk_packages(hbx_gpu.__path__, "hbx_gpu."):
    if not module.name.endswith("__main__"):
        try:
            importlib.import_module(module.name)
        except ImportError as error:  # an optional package; never one of ours, never a hidden one
            missing = error.__cause__ if module.name.startswith("hbx_gpu.integrations.") else error
            assert isinstance(missing, ModuleNotFoundError), missing
            optional = ("torch", "nvidia", "matplotlib", "cupy", "lightning", "accelerate", "scvi")
            assert missing.name.partition(".")[0] in optional, missing
"""

USE = """
from hbx_gpu._bench.machine import conditions, describe
from hbx_gpu._devices import cores
from hbx_gpu._files import exchange, lock
from hbx_gpu._storage.maps import FileMap
from hbx_gpu.errors import UnsupportedError

assert cores() >= 1
assert "memory unknown" in describe(conditions())
new, old = pathlib.Path(sys.argv[1], "new"), pathlib.Path(sys.argv[1], "old")
for path in (new, old):
    path.write_text(path.name)
assert exchange(new, old) is False
assert (new.read_text(), old.read_text()) == ("new", "old")
for call, words in ((lambda: FileMap(str(new)), "needs mmap"), (lambda: lock(0), "needs the file locks")):
    try:
        call()
    except UnsupportedError as error:
        assert words in str(error), error
    else:
        raise AssertionError(words)
"""


def test_everything_is_imported_and_what_is_missing_said(tmp_path: Path) -> None:
    command = [sys.executable, "-c", HIDE + EVERYTHING + USE, str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, check=False)
    assert done.returncode == 0, done.stderr
