"""``locality="auto"`` follows from what requests to object storage took, and the log says so."""

from __future__ import annotations

import logging

import numpy as np
import pytest

from hbx_gpu._remote import link
from hbx_gpu._remote.link import Link
from hbx_gpu.sampler import CellSampler


@pytest.mark.parametrize(("seconds", "expected"), [(None, "none"), (0.0005, "none"), (0.03, "block")])
def test_it_is_chosen_by_the_latency(
    seconds: float | None,
    expected: str,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    known = Link(clock=lambda: 0.0)
    if seconds is not None:
        known.ended(known.began(), seconds, 0)
    monkeypatch.setattr(link, "_links", {"s3://b": known})
    with caplog.at_level(logging.INFO):
        sampler = CellSampler(np.zeros(1000, np.int64), 10, seed=0, locality="auto")
    assert sampler.locality == expected
    assert f"locality=\"auto\": '{expected}'" in caplog.text
    named = CellSampler(np.zeros(1000, np.int64), 10, seed=0, locality=expected)
    assert np.array_equal(np.concatenate(list(sampler.batches())), np.concatenate(list(named.batches())))


def test_ranks_must_not_choose_differently() -> None:
    with pytest.raises(ValueError, match="ranks measure by themselves"):
        CellSampler(np.zeros(1000, np.int64), 10, locality="auto", rank=0, world_size=2)
