"""Compiles a kernel file with the shim into a shared library, once per content, in a temporary folder.

One library per `.cu` file: a file that does not compile leaves the kernels of the others usable. Knows
nothing of launches.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
import tempfile
from functools import lru_cache
from pathlib import Path

from hbx_gpu._engine.device import sources

HERE = Path(__file__).resolve().parent
PARTS = ("shim.h", "fibers.h")
COMMON = [
    *("-std=c++17", "-shared", "-fPIC", "-g1"),
    # A library's names are its own: several are loaded at once.
    *("-fvisibility=hidden", "-fno-gnu-unique"),
    *("-ffp-contract=off", "-fno-strict-aliasing"),
    *("-Wall", "-Wno-unused", "-Wno-unknown-pragmas"),
]
# What watches the kernels, and the flags of its build. Only a process that was started with the library of a
# sanitizer preloaded can load what is built for it.
WATCHES = {
    "": ["-O2"],
    "accesses": [
        "-O1",
        "-fno-omit-frame-pointer",
        "-fsanitize=address,undefined",
        "-fno-sanitize-recover=all",
        "-fsanitize-sections=hbx_shared",
    ],
    "races": ["-O1", "-fno-omit-frame-pointer", "-fsanitize=thread"],
}


class CompilerMissing(RuntimeError):
    """There is no g++ on this machine."""


class KernelDoesNotCompile(RuntimeError):
    """g++ refused a kernel file; the message holds its output."""


@lru_cache(maxsize=1)
def compiler() -> tuple[str, str]:
    """Path and version of g++."""
    path = shutil.which("g++")
    if path is None:
        raise CompilerMissing(
            "The emulation of kernels needs g++ on PATH; install it (Debian, Ubuntu: apt install g++)"
        )
    version = subprocess.run([path, "--version"], capture_output=True, text=True, check=True).stdout
    return path, version.splitlines()[0]


def outer_environment() -> dict[str, str]:
    """Environment for a pytest in a process of its own, which has no part in the run that starts it.

    With xdist's variables it would wait for the locks of that run, whose workers may wait for it.
    """
    return {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_")}


def compiler_library(name: str) -> str:
    """Path of a library that comes with g++, such as that of a sanitizer.

    Raises
    ------
    FileNotFoundError
        g++ has none.
    """
    done = subprocess.run(
        [compiler()[0], f"-print-file-name={name}"], capture_output=True, text=True, check=True
    )
    path = done.stdout.strip()
    if not Path(path).is_absolute():
        raise FileNotFoundError(
            f"g++ has no {name}; install its sanitizer libraries (Debian, Ubuntu: libasan8, libtsan2)"
        )
    return path


@lru_cache(maxsize=1)
def cache_folder() -> Path:
    """Folder of the built libraries; only this user can write to it, since what lies there is executed."""
    folder = Path(tempfile.gettempdir()) / f"hbx_gpu_emulation_{os.getuid()}"
    folder.mkdir(mode=0o700, exist_ok=True)
    owner = folder.lstat()
    if folder.is_symlink() or owner.st_uid != os.getuid() or owner.st_mode & 0o022:
        return Path(tempfile.mkdtemp(prefix="hbx_gpu_emulation_"))
    return folder


def library(path: Path, watch: str = "") -> Path:
    """Shared library with every kernel of a `.cu` file, built if the cache lacks it.

    Parameters
    ----------
    path
        The kernel file.
    watch
        ``"accesses"``: with AddressSanitizer and UBSan; ``"races"``: with ThreadSanitizer. See `WATCHES`.

    Raises
    ------
    CompilerMissing, KernelDoesNotCompile
    """
    flags = [*COMMON, *WATCHES[watch]]
    wrapper = _wrapper(path)
    parts = [
        wrapper,
        sources.flatten(path),
        *((HERE / part).read_text() for part in PARTS),
        *flags,
        *compiler(),
    ]
    digest = hashlib.sha256("\0".join(parts).encode()).hexdigest()[:20]
    built = cache_folder() / f"{path.stem}-{digest}.so"
    if not built.exists():
        _compile(path, wrapper, flags, built)
    return built


def _wrapper(path: Path) -> str:
    """The file as a translation unit, without external names: shared arrays of templates can be static."""
    exports = "\n".join(f"EMUL_EXPORT({kernel})" for kernel in sources.kernels_in(path))
    return f'namespace {{\n#include "{path.resolve()}"\n}}\n{exports}\n'


def _compile(path: Path, wrapper: str, flags: list[str], built: Path) -> None:
    with tempfile.TemporaryDirectory(dir=built.parent, prefix="build_") as folder:
        unit, output = Path(folder) / "unit.cpp", Path(folder) / "unit.so"
        unit.write_text(wrapper)
        includes = ["-I", str(path.resolve().parent), "-I", str(sources.kernels_folder())]
        command = [
            compiler()[0],
            *flags,
            "-include",
            str(HERE / "shim.h"),
            *includes,
            str(unit),
            "-o",
            str(output),
        ]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode != 0:
            raise KernelDoesNotCompile(f"g++ refused {path.name}:\n{done.stderr[:8000]}")
        # Whole at once: another process may be building the same library.
        os.replace(output, built)
