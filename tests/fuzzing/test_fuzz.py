"""The fuzz, in small: 5,000 cases in CI, fewer at a desk (FUZZ_CASES), 20,000 with `make long`.

`make fuzz` runs a million.
"""

from __future__ import annotations

import os

import numpy as np
import pytest

from tests.fuzzing.__main__ import FAMILIES, Report, fuzz
from tests.fuzzing.mutate import damaged
from tests.fuzzing.targets import share_out, targets

CASES = int(os.environ.get("FUZZ_CASES", "5000" if os.environ.get("CI") else "1000"))


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("cases", [CASES, pytest.param(20_000, marks=pytest.mark.long)])
def test_no_damage_is_more_than_an_error(family: str, cases: int) -> None:
    report = fuzz(cases, families=[family])
    assert not report.faults, str(report)
    counts, mine = share_out(targets(), cases), [t for t in targets() if t.family == family]
    assert sum(report.counts.values()) == sum(counts[target.name] for target in mine)
    for target in mine:
        for pattern in target.files:
            of_kind = {k: n for k, n in report.counts.items() if k[:2] == (target.name, pattern)}
            assert sum(of_kind.values()) == counts[target.name] // len(target.files)
    refused = sum(n for (_, _, outcome), n in report.counts.items() if outcome == "refused")
    assert refused > sum(report.counts.values()) / 5, str(report)  # the damage is seen at all


def test_every_kind_of_file_gets_its_part() -> None:
    chosen = targets()
    assert {target.family for target in chosen} == set(FAMILIES)
    counts = share_out(chosen, 20_000)
    assert sum(counts.values()) >= 20_000
    assert min(counts[t.name] / len(t.files) for t in chosen) >= 100


def test_damage_is_damage() -> None:
    rng = np.random.default_rng(0)
    for whole in (b"", b"\0", bytes(1000), rng.bytes(5000)):
        for _ in range(500):
            assert damaged(rng, whole) != whole


def test_what_counts_as_a_fault() -> None:
    report = Report()
    for outcome, checked in [("same", True), ("refused", False), ("wrong", False)]:
        report.add("a", 0, {"outcome": outcome, "checked": checked})
    assert not report.faults
    for outcome, checked in [("wrong", True), ("foreign", False), ("crash", False), ("hang", False)]:
        report.add("a", 0, {"outcome": outcome, "checked": checked})
    assert len(report.faults) == 4
    assert "7 cases, 4 faults" in str(report)
