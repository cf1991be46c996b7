"""A training step of a plain JAX model from the loader on the CPU: its losses are those of NumPy."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("jax", reason="JAX is not installed")

import jax
import jax.numpy as jnp

from hbx_gpu.dataloader import make_loader
from hbx_gpu.pipeline import jax_batches
from hbx_gpu.sampler import CellSampler
from hbx_gpu.testing import N_FEATURES, example_dataset, example_groups, expected_dense

pytestmark = pytest.mark.slow
RATE = 0.05


def loss_of(weights: Any, x: Any) -> Any:
    return jnp.mean((x @ weights - x) ** 2)


@jax.jit  # type: ignore[untyped-decorator]
def step(weights: Any, x: Any) -> Any:
    loss, gradient = jax.value_and_grad(loss_of)(weights, x)
    return weights - RATE * gradient, loss


def test_a_model_is_trained_as_in_numpy(tmp_path: Path) -> None:
    dataset = example_dataset(tmp_path)
    order = CellSampler(dataset.groups_np, 16, seed=3)
    loader = make_loader(dataset, order, layout="dense", executor="direct", threads=2)
    weights: Any = jnp.zeros((N_FEATURES, N_FEATURES))
    losses: list[float] = []
    rows: list[np.ndarray] = []
    for epoch in range(3):
        loader.set_epoch(epoch)
        for batch in jax_batches(loader):
            assert isinstance(batch["X"], jax.Array)
            weights, loss = step(weights, jnp.log1p(batch["X"]))
            losses.append(float(loss))
            rows.append(np.asarray(batch["index"]))
    assert sorted(np.concatenate(rows[:8]).tolist()) == list(range(120))
    assert np.mean(losses[-8:]) < 0.5 * losses[0]

    plain = np.zeros((N_FEATURES, N_FEATURES))
    counts = np.log1p(expected_dense(example_groups(), N_FEATURES).astype(np.float64))
    for batch_rows, loss in zip(rows, losses, strict=True):
        x = counts[batch_rows]
        off = x @ plain - x
        assert np.isclose(loss, np.mean(off**2), rtol=1e-4)
        plain -= RATE * 2 * x.T @ off / off.size
