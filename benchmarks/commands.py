"""Commands of several benchmarks: each name is a module with a `main`, listed with its question."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from importlib import import_module


def dispatch(package: str, questions: Mapping[str, str], argv: Sequence[str] | None = None) -> int:
    """Run ``package.NAME`` with the arguments that follow its name; without a name, list the questions.

    Returns
    -------
    int
        The exit status: that of the benchmark, 0 for the list, 2 for a name that is not listed.
    """
    name, *arguments = [*(sys.argv[1:] if argv is None else argv), ""]
    if name in questions:
        module = import_module(f"{package}.{name}")
        if not hasattr(module, "main"):  # a package of several benchmarks
            module = import_module(f"{package}.{name}.__main__")
        status: int = module.main(arguments[:-1])
        return status
    lines = [f"python -m {package} {name:14s} {question}" for name, question in questions.items()]
    if name in ("", "-h", "--help"):
        print("\n".join(lines))
        return 0
    print(f"{name!r} is not one of these benchmarks:", *lines, sep="\n", file=sys.stderr)
    return 2
