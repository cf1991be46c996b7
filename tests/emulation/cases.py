"""Which cases of a test run under a sanitizer, where each takes ten times as long.

The plain run has every combination of parameters. Sanitizers ask the same kernels something else. Whether
what they access is theirs is asked with every value of every parameter once; whether threads race, with every
two values together: it takes that to meet all barriers, as `test_a_missing_barrier_is_reported` shows.
`HBX_EMULATED_CASES=all` runs all cases; `make long`, `make races` and `make fuzz` set it.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence
from itertools import combinations

import pytest

ALL = {"HBX_EMULATED_CASES": "all"}
"""Environment of a run with every case."""
SOME_AND_ALL = [pytest.param({}, id="some"), pytest.param(ALL, id="all", marks=pytest.mark.long)]
"""For a test that starts such a run."""


def values_together() -> int | None:
    """How many values of parameters are seen together in this process; None: all, in every case."""
    if os.environ.get("HBX_EMULATED_CASES") == "all":
        return None
    return {"accesses": 1, "races": 2}.get(os.environ.get("HBX_EMULATED_WATCH", ""))


def thinned(items: Iterable[pytest.Item], together: int) -> list[pytest.Item]:
    """Some cases of each test, in their order: so many values that meet in any case meet in one of these."""
    tests: dict[str, list[pytest.Item]] = {}
    for item in items:
        tests.setdefault(item.nodeid.partition("[")[0], []).append(item)
    kept = []
    for cases in tests.values():
        chosen = _covering([_choices(_values(case), together) for case in cases])
        kept += [case for number, case in enumerate(cases) if number in chosen]
    return kept


def _choices(values: list[str], together: int) -> frozenset[tuple[str, ...]]:
    return frozenset(combinations(values, min(together, len(values))))


def _covering(cases: list[frozenset[tuple[str, ...]]]) -> set[int]:
    """Numbers of few cases that have all there is: again and again the case with most that is new."""
    left = frozenset().union(*cases)
    chosen = set()
    while left:
        best = max(range(len(cases)), key=lambda number: len(cases[number] & left))
        chosen.add(best)
        left -= cases[best]
    return chosen


def _values(item: pytest.Item) -> list[str]:
    """What each decorator and each fixture with parameters gives to a case.

    Parameters that one decorator names together, ``parametrize(("row", "column"), ...)``, are one value.
    """
    if not isinstance(item, pytest.Function) or not hasattr(item, "callspec"):
        return []
    given: dict[str, object] = item.callspec.params
    together = [_names(mark.args[0]) for mark in item.iter_markers("parametrize")]
    named = {name for names in together for name in names}
    together += [[name] for name in given if name not in named]
    return [repr([(name, given.get(name)) for name in names]) for names in together]


def _names(text: str | Sequence[str]) -> list[str]:
    """Names of the parameters of a decorator."""
    return [name.strip() for name in text.split(",")] if isinstance(text, str) else list(text)
