"""Counts that float16 does not hold: what becomes infinite is said."""

from __future__ import annotations

import logging

import numpy as np
import pytest

from hbx_gpu import _collates
from hbx_gpu._collates import DenseCollate
from hbx_gpu.batch import SparseBatch
from hbx_gpu.transforms import log1p


@pytest.mark.parametrize(("dtype", "said"), [("float16", True), ("bfloat16", False), ("float32", False)])
def test_overflow_is_said(
    dtype: str, said: bool, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(_collates, "_warned", set())
    batch = SparseBatch(np.array([1], np.int32), np.array([70_000], np.uint32), np.array([0, 1], np.int64), 2)
    with caplog.at_level(logging.WARNING):
        x = DenseCollate(dtype)(batch)["X"]
        DenseCollate("float16", log1p)(batch)
    assert bool(np.isinf(float(x[0, 1]))) == said
    assert ("float16 holds" in caplog.text) == said
