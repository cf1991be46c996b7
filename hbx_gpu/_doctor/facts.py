"""What is on this machine, as plain values; nothing is judged here."""

from __future__ import annotations

import importlib
import importlib.metadata
import importlib.util
import platform
import re
import shutil
import subprocess
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from hbx_gpu._devices import cores, dali_missing, free_host_memory

# Distributions whose names end in the CUDA release that they are built for: cupy-cuda13x, kvikio-cu13.
_FOR_CUDA = {
    "DALI": re.compile(r"nvidia[-_]dali[-_]cuda(\d\d)\d?"),
    "cupy": re.compile(r"cupy[-_]cuda(\d\d)x"),
    "kvikio": re.compile(r"kvikio[-_]cu(\d\d)"),
    "nvCOMP": re.compile(r"nvidia[-_](?:lib)?nvcomp[-_]cu(\d\d)"),
}
_IMPORTED = ("cupy", "numba", "lancedb", "zarr")
_TIMEOUT = 10.0


@dataclass(frozen=True, slots=True)
class Package:
    """An installed package.

    Attributes
    ----------
    version
        Its version.
    cuda
        Major release of CUDA that it is built for; None if it is built for none, or does not say.
    broken
        Why it cannot be imported; empty if it can, or if nobody tried.
    """

    version: str
    cuda: int | None = None
    broken: str = ""


@dataclass(frozen=True, slots=True)
class Gpu:
    """A GPU as torch sees it: its name, bytes of memory, and compute capability such as ``"9.0"``."""

    name: str
    memory: int
    capability: str


@dataclass(frozen=True, slots=True)
class Facts:
    """What is on a machine.

    Attributes
    ----------
    hbx_gpu, python, system
        Versions.
    cpu
        Name of the processor.
    cores
        Cores that this process may use.
    memory, free, cached
        Bytes of memory in all, that can be taken, and in the page cache; 0 where the system does not tell.
    packages
        Installed packages by name: ``torch``, ``DALI``, ``cupy``, ``kvikio``, ``nvCOMP`` and those that
        everything needs.
    driver
        Version of the NVIDIA driver; empty where none is loaded.
    gpus
        GPUs that torch can use.
    gpudirect
        Whether the kernel module of GPUDirect Storage is loaded.
    """

    hbx_gpu: str
    python: str
    system: str
    cpu: str
    cores: int
    memory: int
    free: int
    cached: int
    packages: Mapping[str, Package]
    driver: str
    gpus: tuple[Gpu, ...]
    gpudirect: bool


def look() -> Facts:
    """Find out what is on this machine. Imports torch, DALI and cupy where they are installed."""
    from hbx_gpu._version import __version__

    meminfo = _meminfo()
    packages = _packages()
    return Facts(
        hbx_gpu=__version__,
        python=platform.python_version(),
        system=f"{platform.system()} {platform.release()}",
        cpu=_cpu(),
        cores=cores(),
        memory=meminfo.get("MemTotal", 0),
        free=free_host_memory() if meminfo else 0,
        cached=meminfo.get("Cached", 0),
        packages=packages,
        driver=_driver(),
        gpus=_gpus() if "torch" in packages and not packages["torch"].broken else (),
        gpudirect=Path("/proc/driver/nvidia-fs/version").exists(),
    )


def _meminfo() -> dict[str, int]:
    try:
        lines = Path("/proc/meminfo").read_text(encoding="ascii").splitlines()
    except OSError:
        return {}
    return {name: int(rest.split()[0]) << 10 for name, _, rest in (line.partition(":") for line in lines)}


def _cpu() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    names = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(names, platform.machine())


def _packages() -> dict[str, Package]:
    found: dict[str, Package] = {}
    installed = {dist.metadata["Name"]: dist.version for dist in importlib.metadata.distributions()}
    for name, version in sorted(installed.items()):
        for package, pattern in _FOR_CUDA.items():
            if match := pattern.fullmatch(name):
                found[package] = Package(version, int(match[1]), _broken(package))
        if name in _IMPORTED and name not in found:
            found[name] = Package(version, None, _broken(name))
    if importlib.util.find_spec("torch") is not None:
        found["torch"] = _torch()
    return found


def _broken(package: str) -> str:
    if package == "DALI":
        return dali_missing() or ""
    if package not in _IMPORTED:
        return ""  # kvikio and nvCOMP are libraries that ask for a driver when they are loaded
    return _error_of_import(package)


def _error_of_import(name: str) -> str:
    try:
        importlib.import_module(name)
    except Exception as error:  # whatever a half installed package raises is what the user has to know
        return f"{type(error).__name__}: {error}".splitlines()[0]
    return ""


def _torch() -> Package:
    if broken := _error_of_import("torch"):
        return Package(importlib.metadata.version("torch"), None, broken)
    import torch

    cuda = torch.version.cuda
    return Package(str(torch.__version__), None if cuda is None else int(cuda.partition(".")[0]))


def _gpus() -> tuple[Gpu, ...]:
    import torch

    if torch.version.cuda is None or not torch.cuda.is_available():
        return ()
    found = [torch.cuda.get_device_properties(number) for number in range(torch.cuda.device_count())]
    return tuple(Gpu(each.name, each.total_memory, f"{each.major}.{each.minor}") for each in found)


def _driver() -> str:
    try:
        text = Path("/proc/driver/nvidia/version").read_text()
    except OSError:
        return _driver_of_tool()
    match = re.search(r"\b(\d{3}\.\d+(?:\.\d+)?)\b", text)
    return match[1] if match else "unknown"


def _driver_of_tool() -> str:
    """The driver as nvidia-smi names it, for systems without the file in /proc, such as WSL."""
    tool = shutil.which("nvidia-smi")
    if tool is None:
        return ""
    command = [tool, "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=_TIMEOUT, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return done.stdout.splitlines()[0].strip() if done.returncode == 0 and done.stdout.strip() else ""
