"""The token fixtures, a size at a time."""

from __future__ import annotations

from pathlib import Path

import pytest

from hbx_gpu.tokens import _encode
from tests.tokens.emulated import Emulated
from tests.tokens.fixtures import ENGINES, SIZES, Tokens

# Beside the engines of the package, the kernels of devices on the CPU.
_encode.ENGINES.setdefault("device", Emulated())


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """The reference is slow: it meets the small fixtures, the host engine both, kernels both if asked to."""
    slow = [item for item in items if _is_slow(item)]
    items[:] = [item for item in items if item not in slow]
    config.hook.pytest_deselected(items=slow)
    for item in items:
        if _params(item) == ("device", "deep"):
            item.add_marker(pytest.mark.slow)


def _is_slow(item: pytest.Item) -> bool:
    return _params(item) == ("reference", "deep")


def _params(item: pytest.Item) -> tuple[object, str]:
    params = getattr(getattr(item, "callspec", None), "params", {})
    return params.get("engine"), str(params.get("data"))


@pytest.fixture(scope="session", params=SIZES)
def data(request: pytest.FixtureRequest, shared: Path) -> Tokens:
    return Tokens(shared / "fixtures" / "tokens", request.param)


@pytest.fixture(scope="session")
def small(shared: Path) -> Tokens:
    return Tokens(shared / "fixtures" / "tokens", "small")


@pytest.fixture(params=ENGINES)
def engine(request: pytest.FixtureRequest) -> str:
    result: str = request.param
    return result
