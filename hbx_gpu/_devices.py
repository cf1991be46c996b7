"""What this machine has for a loader: devices, DALI, cores; and why not what was asked for."""

from __future__ import annotations

import functools
import importlib.util
import logging
import os

from hbx_gpu._advice import option
from hbx_gpu.errors import DeviceUnavailableError

_LOG = logging.getLogger(__name__)


def resolve(device: object) -> int | None:
    """Index of the GPU that `device` stands for; None for the CPU.

    Parameters
    ----------
    device
        ``"cpu"``, ``"cuda"``, ``"cuda:1"``, a ``torch.device``, or ``"auto"``: a GPU where one can be used,
        else the CPU, said once in the log.

    Raises
    ------
    DeviceUnavailableError
        A GPU is asked for and cannot be used; names what is missing.
    ValueError
        No such kind of device.
    """
    if device is None or str(device) == "cpu":
        return None
    if str(device) == "auto":
        reason = _missing(None)
        if reason is None:
            return _index(None)
        say_once(_LOG, logging.WARNING, f"hbx_gpu loads on the CPU: {reason}")
        return None
    kind, _, number = str(device).partition(":")
    if kind != "cuda" or (number and not number.isdigit()):
        raise ValueError(f'device must be "cpu", "cuda", "cuda:N", "auto" or a torch.device, got {device!r}')
    index = int(number) if number else None
    reason = _missing(index)
    if reason is not None:
        raise DeviceUnavailableError(
            f"{option('device', str(device))} was asked for, but {reason}. "
            f"{option('device', 'auto')} takes the CPU where there is no GPU"
        )
    return _index(index)


def _index(index: int | None) -> int:
    import torch

    return int(torch.cuda.current_device()) if index is None else index


def _missing(index: int | None) -> str | None:
    """What keeps a GPU from being used; None if nothing does."""
    if importlib.util.find_spec("torch") is None:
        return "torch is not installed: pip install 'hbx_gpu[gpu]'"
    import torch

    if torch.version.cuda is None:
        return f"torch {torch.__version__} is built without CUDA: install a CUDA build of torch"
    if not torch.cuda.is_available():
        return "torch sees no NVIDIA GPU: check the driver (nvidia-smi) and CUDA_VISIBLE_DEVICES"
    if index is not None and index >= torch.cuda.device_count():
        return f"there are {torch.cuda.device_count()} GPUs, numbered from 0"
    if importlib.util.find_spec("cupy") is None:
        return "cupy, which compiles and launches the kernels, is not installed: pip install 'hbx_gpu[gpu]'"
    return None


@functools.cache
def dali_missing() -> str | None:
    """What keeps DALI from being used; None if nothing does. Imports it."""
    try:
        import nvidia.dali  # noqa: F401
    except ImportError as error:
        if isinstance(error, ModuleNotFoundError) and error.name in ("nvidia", "nvidia.dali"):
            return "nvidia.dali is not installed: pip install 'hbx_gpu[dali]'"
        return f"nvidia.dali cannot be imported ({error}): install it anew with pip install 'hbx_gpu[dali]'"
    return None


def require_dali(wish: str = "batches were to go through DALI", instead: str = "") -> None:
    """Import DALI.

    Parameters
    ----------
    wish, instead
        How the error message begins: what DALI was wanted for; and how it ends: what does without.

    Raises
    ------
    DeviceUnavailableError
        DALI cannot be imported; names the extra to install.
    """
    reason = dali_missing()
    if reason is not None:
        raise DeviceUnavailableError(f"{wish}, but {reason}{instead and '. '}{instead}")


def cores() -> int:
    """Cores that this process may use."""
    if hasattr(os, "sched_getaffinity"):  # Linux
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1  # where the system has no affinity


def free_host_memory() -> int:
    """Bytes of host memory that this process can take without swapping, as far as the system says.

    A container's limit (cgroup version 2) counts where it is lower than what the machine has free.
    """
    try:
        with open("/proc/meminfo", encoding="ascii") as lines:
            free = next(int(line.split()[1]) << 10 for line in lines if line.startswith("MemAvailable:"))
    except (OSError, StopIteration):
        free = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // 2
    try:
        with open("/sys/fs/cgroup/memory.max", encoding="ascii") as file:
            return min(free, int(file.read()))
    except (OSError, ValueError):  # no limit, or a system without cgroups
        return free


@functools.cache
def say_once(log: logging.Logger, level: int, message: str) -> None:
    """Log a message the first time that this process has it to say."""
    log.log(level, "%s", message)
