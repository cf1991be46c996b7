"""The token fixtures, a size at a time."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.tokens.fixtures import ENGINES, SIZES, Tokens


@pytest.fixture(scope="session", params=SIZES)
def data(request: pytest.FixtureRequest, shared: Path) -> Tokens:
    return Tokens(shared / "fixtures" / "tokens", request.param)


@pytest.fixture(scope="session")
def small(shared: Path) -> Tokens:
    return Tokens(shared / "fixtures" / "tokens", "small")


@pytest.fixture(params=ENGINES)
def engine(request: pytest.FixtureRequest) -> str:
    return request.param
