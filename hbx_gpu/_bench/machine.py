"""What must accompany every figure: the machine, and versions of software."""

from __future__ import annotations

import os
import platform
from collections.abc import Iterable, Iterator, Sequence
from importlib import metadata
from pathlib import Path
from typing import NotRequired, TypedDict

from hbx_gpu._devices import cores

PACKAGES = (
    "hbx_gpu", "numpy", "numba", "torch", "zarr", "lancedb", "anndata", "h5py", "scipy", "cupy-cuda13x",
    "nvidia-dali-cuda130", "kvikio-cu13",
)  # fmt: skip


class Conditions(TypedDict):
    """The conditions of a measurement."""

    cpu: str
    cores: int
    memory_gib: float | None
    system: str
    python: str
    versions: dict[str, str]
    gpu: str | None
    commit: NotRequired[str]


def conditions(gpu: int | None = None, packages: Sequence[str] = PACKAGES) -> Conditions:
    """Return the conditions of a measurement as plain values.

    Parameters
    ----------
    gpu
        Number of the GPU that is measured; None for the CPU.
    packages
        Distributions whose versions are noted where they are installed.
    """
    found: Conditions = {
        "cpu": _cpu(),
        "cores": cores(),
        "memory_gib": _memory(),
        "system": f"{platform.system()} {platform.release()}",
        "python": platform.python_version(),
        "versions": dict(_versions(packages)),
        "gpu": None,
    }
    if gpu is not None:
        import torch

        found["gpu"] = torch.cuda.get_device_name(gpu)
    return found


def describe(found: Conditions) -> str:
    """Return conditions as two lines of text."""
    versions = ", ".join(f"{name} {version}" for name, version in found["versions"].items())
    commit = f"; commit {found['commit']}" if "commit" in found else ""
    memory = f"{found['memory_gib']} GiB" if found["memory_gib"] else "memory unknown"
    return (
        f"{found.get('gpu') or 'no GPU'}; {found['cpu']}, {found['cores']} cores, {memory}; "
        f"{found['system']}{commit}\nPython {found['python']}; {versions}"
    )


def _versions(names: Iterable[str]) -> Iterator[tuple[str, str]]:
    for name in names:
        try:
            yield name, metadata.version(name)
        except metadata.PackageNotFoundError:
            continue


def _memory() -> float | None:
    """Return the memory of the machine in GiB; None where the system does not tell."""
    if not hasattr(os, "sysconf"):  # Windows
        return None
    return round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30, 1)


def _cpu() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    names = (line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    return next(names, platform.machine())
