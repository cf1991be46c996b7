"""What tests of the DALI executor share: a skip that says so, and how batches are compared."""

from __future__ import annotations

import os
from typing import Any

import numpy as np
import pytest
import torch

from hbx_gpu._devices import dali_missing


def need_dali() -> None:
    """Skip where DALI is not installed; in CI it must be."""
    reason = dali_missing()
    if reason and os.environ.get("CI"):
        pytest.fail(reason)
    if reason:
        pytest.skip(reason)


def same_batch(found: Any, expected: Any) -> None:
    """Same keys in the same order, same types, same numbers bit for bit."""
    assert list(found) == list(expected)
    for key, want in expected.items():
        got = found[key]
        assert type(got) is type(want)
        assert got.dtype == want.dtype
        assert got.shape == want.shape
        if not isinstance(want, torch.Tensor):
            assert np.array_equal(got, want)
        elif want.layout is torch.sparse_csr:
            assert got.layout is torch.sparse_csr
            for part in ("crow_indices", "col_indices", "values"):
                assert getattr(got, part)().dtype == getattr(want, part)().dtype
                assert torch.equal(getattr(got, part)(), getattr(want, part)())
        else:
            assert got.is_contiguous()
            assert torch.equal(got, want)
