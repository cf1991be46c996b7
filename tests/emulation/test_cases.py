"""Few cases have every value: of each decorator, and of each fixture with parameters."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.emulation import cases

TESTS = """
import pytest

@pytest.fixture(params="xyz")
def fixture(request):
    return request.param

@pytest.mark.parametrize(("row", "column"), [(0, 1), (1, 0), (0, 0)])
@pytest.mark.parametrize("width", range(4))
def test_many(fixture, row, column, width):
    pass

@pytest.mark.parametrize("width", [1, 2])
def test_few(width):
    pass

def test_one():
    pass
"""


@pytest.mark.parametrize(("together", "n_cases"), [(1, 4), (2, 12), (3, 36)])
def test_every_value_is_in_some_case(
    request: pytest.FixtureRequest, tmp_path: Path, together: int, n_cases: int
) -> None:
    (tmp_path / "test_made.py").write_text(TESTS)
    module = pytest.Module.from_parent(request.session, path=tmp_path / "test_made.py")
    items = [item for item in module.collect() if isinstance(item, pytest.Function)]
    assert len(items) == 36 + 2 + 1
    kept = cases.thinned(items, together)
    assert kept == [item for item in items if item in kept]
    functions = [item for item in kept if isinstance(item, pytest.Function)]
    many = [item.callspec.params for item in functions if item.originalname == "test_many"]
    assert len(many) == n_cases
    assert {params["width"] for params in many} == {*range(4)}
    assert {params["fixture"] for params in many} == {*"xyz"}
    pairs = {(params["width"], params["fixture"]) for params in many}
    assert len(pairs) == (12 if together > 1 else 4)
    assert {(params["row"], params["column"]) for params in many} == {(0, 1), (1, 0), (0, 0)}
    assert [item.name for item in kept[n_cases:]] == ["test_few[1]", "test_few[2]", "test_one"]


@pytest.mark.parametrize(
    ("watch", "asked", "expected"),
    [("", "", None), ("accesses", "", 1), ("races", "", 2), ("races", "all", None)],
)
def test_who_asks_for_it(
    monkeypatch: pytest.MonkeyPatch, watch: str, asked: str, expected: int | None
) -> None:
    monkeypatch.setenv("HBX_EMULATED_WATCH", watch)
    monkeypatch.setenv("HBX_EMULATED_CASES", asked)
    assert cases.values_together() == expected
