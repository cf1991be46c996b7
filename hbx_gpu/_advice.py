"""How a message names an option: as Python spells it, or as the command does through which the user came."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

from hbx_gpu.errors import HbxError, ResourceError

# Not a context variable: threads that convert files must name options as the command does, too.
_flags: list[Mapping[str, str]] = []


@contextmanager
def from_command(flags: Mapping[str, str]) -> Iterator[None]:
    """Let messages name options as a command does while the context lasts.

    Parameters
    ----------
    flags
        Name of a Python parameter -> the flag of this command. A flag with ``{}`` takes the value there.
    """
    _flags.append(flags)
    try:
        yield
    finally:
        _flags.pop()


def current() -> Mapping[str, str] | None:
    """Flags of the command that the user runs, to pass to its worker processes; None in Python."""
    return _flags[-1] if _flags else None


@contextmanager
def within_memory(what: str) -> Iterator[None]:
    """Turn a want of memory into an error that names what it was wanted for.

    Libraries that cannot be mapped for want of address space raise OSError or ImportError.

    Parameters
    ----------
    what
        What needs the memory, as the object of "there is too little memory for".

    Raises
    ------
    ResourceError
        The memory, or the limit of this process, does not suffice.
    """
    try:
        yield
    except HbxError:
        raise
    except (MemoryError, ImportError, OSError) as error:
        mapped = "shared object" in str(error) or "cannot allocate memory" in str(error).lower()
        if not isinstance(error, MemoryError) and not mapped:
            raise
        raise ResourceError(
            f"there is too little memory for {what} ({str(error) or type(error).__name__}); end other "
            "programs, or raise the limit of this process (ulimit -v; libraries alone take 4 GiB of it)"
        ) from error


def in_command() -> bool:
    """Whether the user came through a command."""
    return bool(_flags)


def spelled(python: str, command: str) -> str:
    """One of two texts, by the place where the user is."""
    return command if in_command() else python


def option(name: str, value: str | None = None) -> str:
    """How the user passes a parameter, with a value where one is advised.

    Parameters
    ----------
    name
        Of the Python parameter, for example ``feature_id_column``.
    value
        What to pass; None names the option alone, ``"True"`` is a switch.

    Returns
    -------
    str
        ``feature_id_column='gene_ids'`` in Python, ``--feature-id-column gene_ids`` in a command that has it;
        a command that lacks it sends the user to Python.
    """
    flag = _flags[-1].get(name) if _flags else None
    if flag is None:
        elsewhere = " in Python" if _flags else ""
        if value is None:
            return f"{name}={elsewhere}"
        plain = value in ("True", "False") or value[:1] in "[{'\"" or value.replace(".", "").isdigit()
        return f"{name}={value if plain else repr(value)}{elsewhere}"
    if "{}" in flag:
        return flag.replace("{}", value or name.upper())
    return flag if value in (None, "True") else f"{flag} {value}"
