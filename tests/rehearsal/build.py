"""Builds the stand-in runtime as ``libcudart.so.13``, and a ``libcuda.so.1`` that offers nothing."""

from __future__ import annotations

import hashlib
import importlib.util
import os
import re
import subprocess
import tempfile
from pathlib import Path

from tests.emulation.build import cache_folder, compiler

HERE = Path(__file__).resolve().parent
SOURCES = ("cudart.cpp", "driver.cpp", "streams.h", "memory.h")
FLAGS = ["-std=c++17", "-O1", "-g1", "-fPIC", "-Wall", "-Wextra", "-Wno-unused-parameter"]
# torch's libraries ask for symbols of this version.
VERSIONS = "libcudart.so.13 { global: cuda*; __cuda*; standin_*; local: *; };\n"


class PackageMissing(RuntimeError):
    """The interpreter lacks what the stand-in is built of or for."""


def folder() -> Path:
    """Folder with both libraries, built if the cache lacks them.

    Raises
    ------
    PackageMissing
        torch is not a CUDA build, or the packages with CUDA's headers are missing.
    """
    headers, libraries = _headers(), _torch_libraries()
    wanted = {kind: sorted(_asked_for(libraries, kind)) for kind in ("libcudart.so.13", "libcuda.so.1")}
    parts = [*((HERE / name).read_text() for name in SOURCES), *FLAGS, VERSIONS, *compiler(), repr(wanted)]
    digest = hashlib.sha256("\0".join(parts).encode()).hexdigest()[:20]
    built = cache_folder() / f"rehearsal-{digest}"
    if not built.exists():
        with tempfile.TemporaryDirectory(dir=built.parent, prefix="build_") as scratch:
            place = Path(scratch) / "libraries"
            place.mkdir()
            _build(Path(scratch), place, headers, wanted)
            os.replace(place, built)
    return built


def _build(scratch: Path, place: Path, headers: Path, wanted: dict[str, list[str]]) -> None:
    versions = scratch / "versions.map"
    versions.write_text(VERSIONS)
    for name, more in (("cudart", [f"-Wl,--version-script={versions}"]), ("driver", [])):
        soname = {"cudart": "libcudart.so.13", "driver": "libcuda.so.1"}[name]
        ours, rest = scratch / f"{name}.o", scratch / f"{name}_rest.cpp"
        _run([compiler()[0], *FLAGS, "-I", str(headers), "-c", str(HERE / f"{name}.cpp"), "-o", str(ours)])
        have = set(re.findall(r" T (\w+)", _run(["nm", str(ours)])))
        rest.write_text(_absent(set(wanted[soname]) - have))
        link = [compiler()[0], "-shared", "-fPIC", f"-Wl,-soname,{soname}", *more]
        _run([*link, "-o", str(place / soname), str(ours), str(rest), "-lpthread"])


def _absent(names: set[str]) -> str:
    """Functions that say that they are not there and return 801, "not supported" in runtime and driver."""
    functions = "".join(
        f'int {name}() {{ fprintf(stderr, "stand-in: there is no {name}\\n"); return 801; }}\n'
        for name in sorted(names)
    )
    return f'#include <cstdio>\nextern "C" {{\n{functions}}}\n'


def _asked_for(libraries: list[Path], soname: str) -> set[str]:
    """Functions of `soname` that torch's libraries need."""
    if soname == "libcuda.so.1":  # whose symbols have no version
        pattern = r" U (cu[A-Z]\w+)$"
        libraries = [path for path in libraries if path.name == "libcaffe2_nvrtc.so"]
    else:
        pattern = rf" U (\w+)@+{re.escape(soname)}$"
    tables = [_run(["nm", "-D", "--undefined-only", str(path)]) for path in libraries]
    return {name for table in tables for name in re.findall(pattern, table, flags=re.MULTILINE)}


def _headers() -> Path:
    for root in _places("nvidia"):
        found = root / "cu13" / "include"
        if (found / "cuda_runtime_api.h").is_file() and (found / "crt" / "host_defines.h").is_file():
            return found
    raise PackageMissing(
        "The headers of CUDA 13 are not installed; pip install nvidia-cuda-runtime nvidia-cuda-crt"
    )


def _torch_libraries() -> list[Path]:
    libraries = [path for root in _places("torch") for path in sorted((root / "lib").glob("*.so"))]
    if not any(path.name == "libtorch_cuda.so" for path in libraries):
        raise PackageMissing(
            "This interpreter has no CUDA build of torch; `make rehearse` makes an environment with one"
        )
    return libraries


def _places(package: str) -> list[Path]:
    spec = importlib.util.find_spec(package)
    return [] if spec is None else [Path(place) for place in spec.submodule_search_locations or []]


def _run(command: list[str]) -> str:
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise RuntimeError(f"{command[0]} failed:\n{done.stderr[:8000]}")
    return done.stdout
