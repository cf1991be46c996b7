"""The fuzz, in small: 2,000 cases in CI, fewer at a desk (HBX_FUZZ_CASES), a million with `make fuzz`."""

from __future__ import annotations

import os

import numpy as np

from tests.fuzzing.__main__ import Report, fuzz
from tests.fuzzing.mutate import damaged


def test_no_damage_is_more_than_an_error() -> None:
    cases = int(os.environ.get("HBX_FUZZ_CASES", "2000" if os.environ.get("CI") else "500"))
    report = fuzz(cases)
    assert not report.faults, str(report)
    assert sum(report.counts.values()) >= 0.99 * cases
    refused = sum(n for (_, _, outcome), n in report.counts.items() if outcome == "refused")
    assert refused > cases / 4, str(report)  # the damage is seen at all


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
