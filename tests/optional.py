"""Skips for packages that the suite can do without: torch and those that come with it or with a GPU.

Imported by ``conftest.py``.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Generator

import pytest

MISSING = frozenset(
    name for name in ("torch", "nvidia", "matplotlib", "hypothesis") if importlib.util.find_spec(name) is None
)


def missing_package(error: BaseException | None) -> str | None:
    """Name of the optional package whose absence is the cause of an error; None for every other error."""
    while error is not None:
        if isinstance(error, ModuleNotFoundError) and (error.name or "").partition(".")[0] in MISSING:
            return error.name
        error = error.__cause__ or error.__context__
    return None


def _skip(report: pytest.TestReport | pytest.CollectReport, error: BaseException | None) -> None:
    if report.failed and (name := missing_package(error)):
        report.outcome = "skipped"
        report.longrepr = (__file__, 1, f"Skipped: needs {name}, which is not installed")


@pytest.hookimpl(wrapper=True)
def pytest_make_collect_report() -> Generator[None, pytest.CollectReport, pytest.CollectReport]:
    """Files that import an optional package at their top are skipped where it is not installed."""
    report = yield
    call = getattr(report, "call", None)
    _skip(report, call.excinfo.value if call and call.excinfo else None)
    return report


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(
    call: pytest.CallInfo[None],
) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    """So are tests that import one on their way, themselves or through the code they run."""
    report = yield
    _skip(report, call.excinfo.value if call.excinfo else None)
    return report
