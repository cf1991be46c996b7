"""Texts of the CUDA kernels: where they lie, what they define, and one string per file for a compiler.

Compiles nothing. A text is flattened (headers inlined once), because caches of compiled kernels look at the
text they are handed, not at headers it includes.
"""

from __future__ import annotations

import re
from functools import lru_cache
from pathlib import Path

_PACKAGE = Path(__file__).resolve().parents[2]
_COMMENT = re.compile(r"//[^\n]*|/\*.*?\*/", re.DOTALL)
_INCLUDE = re.compile(r'^[ \t]*#[ \t]*include[ \t]+"([^"]+)"')
_ONCE = re.compile(r"^[ \t]*#[ \t]*pragma[ \t]+once\b")
_KERNEL = re.compile(r"^[ \t]*HBX_KERNEL\s+(?:__launch_bounds__\s*\([^)]*\)\s*)?(\w+)\s*\(", re.MULTILINE)


def kernels_folder() -> Path:
    """Folder of the `.cu` and `.cuh` files: inside an installed package, else beside it in the repository.

    Raises
    ------
    FileNotFoundError
        If neither holds kernels: the installation is incomplete.
    """
    places = (_PACKAGE / "kernels", _PACKAGE.parent / "kernels")
    for place in places:
        if (place / "hbx.cuh").is_file():
            return place
    tried = " and ".join(str(place) for place in places)
    raise FileNotFoundError(f"The CUDA kernels are missing: no hbx.cuh in {tried}; install hbx_gpu again")


def kernel_files() -> list[Path]:
    """All `.cu` files, by name."""
    return sorted(kernels_folder().glob("*.cu"))


def source(name: str) -> str:
    """Text of a `.cu` file with everything it includes from the same folder inlined once.

    Line directives keep compilers' messages pointing at the files on disk.

    Parameters
    ----------
    name
        A file's name, `"gather.cu"`; `kernel_names` tells which file holds a kernel.

    Raises
    ------
    FileNotFoundError
        If the file, or one it includes, does not exist.
    """
    return flatten(kernels_folder() / name)


def flatten(path: Path) -> str:
    """Text of any `.cu` file; headers are looked up beside it, then beside the kernels."""
    lines: list[str] = []
    _inline(path, lines, set())
    return "\n".join(lines) + "\n"


def _inline(path: Path, lines: list[str], seen: set[str]) -> None:
    seen.add(path.name)
    lines.append(f'#line 1 "{path.name}"')
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), start=1):
        include = _INCLUDE.match(line)
        if include is None:
            lines.append("" if _ONCE.match(line) else line)
            continue
        if include[1] not in seen:
            _inline(_header(path, include[1]), lines, seen)
        lines.append(f'#line {number + 1} "{path.name}"')


def _header(path: Path, name: str) -> Path:
    for folder in (path.parent, kernels_folder()):
        if (folder / name).is_file():
            return folder / name
    raise FileNotFoundError(f"{path.name} includes {name}, which is neither beside it nor beside the kernels")


def kernels_in(path: Path) -> list[str]:
    """Names of the kernels that a `.cu` file defines, in the file's order."""
    return _KERNEL.findall(_COMMENT.sub("", path.read_text(encoding="utf-8")))


@lru_cache(maxsize=1)
def kernel_names() -> dict[str, str]:
    """The file of each kernel: `{"gather_pieces": "gather.cu", ...}`.

    Raises
    ------
    ValueError
        If two files define kernels of one name.
    """
    names: dict[str, str] = {}
    for path in kernel_files():
        for kernel in kernels_in(path):
            if kernel in names:
                raise ValueError(
                    f"Kernel {kernel} is defined in {names[kernel]} and in {path.name}; rename one"
                )
            names[kernel] = path.name
    return names
