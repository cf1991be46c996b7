"""From facts to what a loader chooses, and to what should be installed."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from hbx_gpu._doctor.facts import Facts, Package

OLDEST_DRIVER = {12: 525, 13: 580}
"""Major release of CUDA -> oldest driver branch for Linux (NVIDIA, CUDA Toolkit release notes, table of
driver versions for minor version compatibility)."""
CUDA = 13
"""Major release of CUDA of the packages that the extra ``gpu`` installs."""
INSTALL_GPU = "pip install 'hbx_gpu[gpu]'"
INSTALL_TORCH = f"pip install --force-reinstall torch --index-url https://download.pytorch.org/whl/cu{CUDA}0"
_GIB = 1 << 30


@dataclass(frozen=True, slots=True)
class Problem:
    """What is wrong, and the command or step that mends it."""

    what: str
    mend: str


@dataclass(frozen=True, slots=True)
class Choice:
    """What an option chooses by itself on this machine, and why."""

    option: str
    chosen: str
    why: str


def problems(facts: Facts) -> list[Problem]:
    """Say what keeps this machine from doing what it could; an empty list if nothing does.

    A machine without a GPU is not a problem: everything runs on the CPU there.
    """
    return [*_broken(facts), *_torch(facts), *(_gpu(facts) if facts.driver else ())]


def _broken(facts: Facts) -> Iterator[Problem]:
    for name, package in facts.packages.items():
        if package.broken:
            yield Problem(
                f"{name} {package.version} is installed and cannot be imported ({package.broken})",
                f"pip install --force-reinstall {_DISTRIBUTIONS.get(name, name)}",
            )


_DISTRIBUTIONS = {"DALI": f"nvidia-dali-cuda{CUDA}0", "cupy": f"'cupy-cuda{CUDA}x[ctk]'"}


def _torch(facts: Facts) -> Iterator[Problem]:
    if "torch" not in facts.packages:
        yield Problem("torch is not installed, so there are no loaders", "pip install 'hbx_gpu[torch]'")


def _gpu(facts: Facts) -> Iterator[Problem]:
    """Problems of a machine that has a driver."""
    torch = facts.packages.get("torch")
    if torch is None or torch.broken:
        return
    branch = int(facts.driver.partition(".")[0]) if facts.driver[:1].isdigit() else None
    if torch.cuda is None:
        yield Problem(
            f"there is an NVIDIA driver ({facts.driver}), but torch {torch.version} is built without CUDA",
            INSTALL_TORCH,
        )
        return
    needed = OLDEST_DRIVER.get(torch.cuda)
    if branch is not None and needed is not None and branch < needed:
        yield Problem(
            f"torch {torch.version} is built for CUDA {torch.cuda}, which needs driver {needed} or newer; "
            f"this one is {facts.driver}",
            f"install a driver of branch {needed} or newer from your system's packages, and restart",
        )
    elif not facts.gpus:
        yield Problem(
            f"driver {facts.driver} is loaded and torch {torch.version} sees no GPU",
            "look at nvidia-smi and at CUDA_VISIBLE_DEVICES; in a container, start it with --gpus all",
        )
    others = {name: package for name, package in facts.packages.items() if package.cuda is not None}
    for name, package in others.items():
        if name != "torch" and package.cuda != torch.cuda:
            yield Problem(
                f"{name} {package.version} is built for CUDA {package.cuda}, torch {torch.version} for CUDA "
                f"{torch.cuda}; both must be built for the same",
                INSTALL_TORCH if package.cuda == CUDA else INSTALL_GPU,
            )
    if missing := [name for name in ("cupy", "DALI", "kvikio", "nvCOMP") if name not in facts.packages]:
        why = "; without cupy nothing is decoded on the GPU" if "cupy" in missing else ""
        yield Problem(f"{_listed(missing)} not installed{why}", INSTALL_GPU)


def _listed(names: list[str]) -> str:
    *most, last = names
    return f"{', '.join(most)} and {last} are" if most else f"{last} is"


def choices(facts: Facts) -> list[Choice]:
    """Say what the options that are ``"auto"`` choose on this machine."""
    on_gpu = bool(facts.gpus) and _usable(facts.packages.get("cupy"))
    return [
        Choice("device", *_device(facts, on_gpu)),
        Choice("executor", *_executor(facts)),
        Choice("io", *_io(facts, on_gpu)),
        Choice("decode", *_decode(facts, on_gpu)),
    ]


def _usable(package: Package | None) -> bool:
    return package is not None and not package.broken


def _device(facts: Facts, on_gpu: bool) -> tuple[str, str]:
    torch = facts.packages.get("torch")
    if on_gpu:
        return "cuda", f"{facts.gpus[0].name} can be used"
    if torch is None:
        return "cpu", "torch is not installed"
    if facts.gpus:
        return "cpu", "cupy, which launches the kernels, is missing or broken"
    if torch.cuda is None:
        return "cpu", f"torch {torch.version} is built without CUDA"
    return "cpu", "torch sees no GPU"


def _executor(facts: Facts) -> tuple[str, str]:
    if _usable(facts.packages.get("DALI")):
        return "dali", 'for batches made with layout=; executor="direct" does without it'
    return "direct", "DALI is not installed" if "DALI" not in facts.packages else "DALI is broken"


def _io(facts: Facts, on_gpu: bool) -> tuple[str, str]:
    fastest = "whichever is fastest on the files of a dataset"
    if not on_gpu or "kvikio" not in facts.packages:
        return "mmap or pinned", fastest
    direct = "is loaded" if facts.gpudirect else "is not loaded, so kvikio copies through host memory"
    return "mmap, pinned or kvikio", f"{fastest}; the module of GPUDirect Storage {direct}"


def _decode(facts: Facts, on_gpu: bool) -> tuple[str, str]:
    if not on_gpu:
        return "host", "there is no GPU to decode on"
    if "nvCOMP" in facts.packages:
        return "nvCOMP", "for chunks that carry a CRC32C; others on host threads"
    return "host", "for zstd, lz4, gzip and blosc, since nvCOMP is not installed"


def report(facts: Facts) -> str:
    """One screen of text: the machine, its packages, what is chosen, and what to mend."""
    found = problems(facts)
    lines = [*_machine(facts), "", *_packages(facts), ""]
    lines += [f"{choice.option + '=auto':<15}{choice.chosen} ({choice.why})" for choice in choices(facts)]
    lines.append("")
    if not found:
        lines.append("Nothing needs to be mended.")
    for number, problem in enumerate(found, 1):
        lines += [f"{number}. {problem.what}", f"   {problem.mend}"]
    return "\n".join(lines)


def _machine(facts: Facts) -> Iterator[str]:
    yield f"{'hbx_gpu':<15}{facts.hbx_gpu}, Python {facts.python}, {facts.system}"
    yield f"{'processor':<15}{facts.cpu}; this process may use {facts.cores} cores"
    if facts.memory:
        free, cached = facts.free / _GIB, facts.cached / _GIB
        yield f"{'memory':<15}{facts.memory / _GIB:.1f} GiB, {free:.1f} free, {cached:.1f} in the page cache"
    for number, gpu in enumerate(facts.gpus):
        yield f"{f'GPU {number}':<15}{gpu.name}, {gpu.memory / _GIB:.0f} GiB, capability {gpu.capability}"
    if not facts.gpus:
        yield f"{'GPU':<15}none{'' if facts.driver else ': no NVIDIA driver is loaded'}"
    if facts.driver:
        direct = "is loaded" if facts.gpudirect else "is not loaded"
        yield f"{'driver':<15}{facts.driver}; the module of GPUDirect Storage {direct}"


def _packages(facts: Facts) -> Iterator[str]:
    for name in ("torch", "cupy", "DALI", "kvikio", "nvCOMP", "numba", "lancedb", "zarr"):
        package = facts.packages.get(name)
        if package is None:
            yield f"{name:<15}not installed"
            continue
        cuda = ""
        if package.cuda is not None:
            cuda = f", CUDA {package.cuda}"
        elif name == "torch":
            cuda = ", without CUDA"
        yield f"{name:<15}{package.version}{cuda}{', broken' if package.broken else ''}"
