"""Kernels of tokens on rows that nobody thought of: the bits of the reference."""

from __future__ import annotations

import os
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from hbx_gpu import SparseBatch
from tests.kernels.conftest import ORDERS, emulated
from tests.kernels.test_tokens import SMALL, compare
from tests.tokens.emulated import Emulated
from tests.tokens.recipes import COMPILED, RECIPES
from tests.tokens.rows import batches

EXAMPLES = int(os.environ.get("HBX_FUZZ_EXAMPLES", "8"))


@pytest.fixture(scope="module")
def engine() -> Emulated:
    """In one thread order, with room for few keys in shared memory."""
    emulated(ORDERS[0])
    return Emulated(ORDERS[0], shared_keys=48)


@pytest.mark.parametrize("name", RECIPES)
@settings(max_examples=EXAMPLES, deadline=None, suppress_health_check=list(HealthCheck))
@given(batch=batches(), padding=st.sampled_from(["longest", "max_length", "packed"]))
def test_rows_of_every_kind(name: str, batch: SparseBatch, padding: str, engine: Any) -> None:
    if name in SMALL:
        batch = replace(batch, values=np.minimum(batch.values, 300))
    compare(batch, COMPILED[name], engine, padding="longest" if name == "split" else padding)
