"""The `gxx` fixture: tests that compile kernels skip without g++, and fail where CI lacks it."""

from __future__ import annotations

import os

import pytest

from tests.emulation.build import CompilerMissing, compiler


@pytest.fixture(scope="session")
def gxx() -> str:
    """Path of g++."""
    try:
        return compiler()[0]
    except CompilerMissing as missing:
        if os.environ.get("CI"):
            pytest.fail(str(missing))
        pytest.skip(str(missing))
