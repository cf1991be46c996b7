"""Highly variable features against scanpy, scikit-misc and a plain reference."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import scipy.sparse as sp

from hbx_gpu._advice import from_command
from hbx_gpu.errors import InvalidDataError
from hbx_gpu.statistics import Statistics
from hbx_gpu.statistics._finish import Asked, finished
from hbx_gpu.statistics._loess import loess
from hbx_gpu.statistics._partial import Partial
from hbx_gpu.statistics._variable import normalized_variances
from tests.statistics import made


@pytest.fixture(scope="module")
def scanpy() -> dict[str, Any]:
    """Values of scanpy 1.11.5 and scikit-misc 0.5.3, made by made.py."""
    found: dict[str, Any] = json.loads((Path(__file__).parent / "scanpy.json").read_text())
    return found


def statistics_of(dense: np.ndarray, group: np.ndarray | None = None) -> Statistics:
    """Statistics of a matrix whose cells all measure everything, by batch if asked."""
    n, n_features = dense.shape
    names = () if group is None else tuple(sorted(set(group.tolist())))
    code = np.zeros(n, np.int32) if group is None else np.searchsorted(names, group).astype(np.int32)
    n_groups = 1 if group is None else len(names) + 1
    partial = Partial(n_features, n_groups, -1.0, exact=False)
    matrix = sp.csr_matrix(dense)
    partial.add(matrix.indices, matrix.data, matrix.indptr.astype(np.int64), code)
    cells = np.bincount(code, minlength=n_groups)
    uids = np.array([f"g{i}" for i in range(n_features)], dtype=object)
    by = None if group is None else "batch"
    return finished(partial, Asked(uids, by, names, cells, np.tile(cells, (n_features, 1)), None))


def test_loess_is_that_of_scikit_misc(scanpy: dict[str, Any]) -> None:
    np.testing.assert_allclose(loess(*made.points(), 0.3), scanpy["loess"], rtol=0, atol=1e-12)


def test_loess_refuses_what_it_cannot_fit() -> None:
    with pytest.raises(ValueError, match=r"choose a larger span: pass span=0\.6 to highly_variable"):
        loess(np.arange(5.0), np.arange(5.0), 0.3)
    assert np.isfinite(loess(np.arange(5.0), np.arange(5.0), 0.6)).all()
    with (
        from_command({"n": "--hvg"}),
        pytest.raises(ValueError, match=r"pass span=0\.6 in Python to highly_variable"),
    ):
        loess(np.arange(5.0), np.arange(5.0), 0.3)
    with pytest.raises(ValueError, match="take more features or more cells"):
        loess(np.array([1.0, 1.0, 2.0]), np.arange(3.0), 0.3)
    with pytest.raises(ValueError, match="span must be above 0"):
        loess(np.arange(5.0), np.arange(5.0), 2)
    # Most points at one place: neighborhoods without any extent.
    assert np.isfinite(loess(np.array([0.0] * 30 + [1, 2, 3]), np.arange(33.0), 0.3)).all()


@pytest.mark.parametrize("key", [None, "batch"])
def test_equal_to_scanpy(scanpy: dict[str, Any], key: str | None) -> None:
    expected = scanpy["whole" if key is None else "batch"]
    found = statistics_of(made.counts(), np.array(made.batches())).highly_variable(made.N_TOP, batch_key=key)
    number = np.array([int(uid[1:]) for uid in found.index])
    assert sorted(number.tolist()) == expected["top"]
    np.testing.assert_allclose(
        found["variances_norm"], np.array(expected["variances_norm"])[number], rtol=1e-9
    )
    assert found["highly_variable_rank"].tolist() == [expected["rank"][i] for i in number]


def test_normalized_variances_are_those_of_their_definition() -> None:
    dense = made.counts().astype(np.float64)
    mean, variance = dense.mean(axis=0), dense.var(axis=0, ddof=1)
    varies = variance > 0
    expected = np.ones(len(mean))
    expected[varies] = 10 ** loess(np.log10(mean[varies]), np.log10(variance[varies]), 0.3)
    clipped = np.minimum(dense, np.sqrt(expected * len(dense)) + mean)
    assert (clipped < dense).any()
    result = ((clipped - mean) ** 2).sum(axis=0) / ((len(dense) - 1) * expected)
    np.testing.assert_allclose(normalized_variances(statistics_of(dense), 0.3), result, rtol=1e-9, atol=1e-12)


def test_counts_in_bins_are_close() -> None:
    dense = made.counts() * 40  # most counts of variable features are above 1,023
    mean, variance = dense.mean(axis=0), dense.var(axis=0, ddof=1)
    varies = variance > 0
    expected = np.ones(len(mean))
    expected[varies] = 10 ** loess(np.log10(mean[varies]), np.log10(variance[varies]), 0.3)
    clipped = np.minimum(dense, np.sqrt(expected * len(dense)) + mean)
    result = ((clipped - mean) ** 2).sum(axis=0) / ((len(dense) - 1) * expected)
    np.testing.assert_allclose(normalized_variances(statistics_of(dense), 0.3), result, rtol=1e-2)


def test_constant_features_are_never_variable_and_fractions_are_refused() -> None:
    found = statistics_of(made.counts()).highly_variable(10_000)
    assert len(found) < made.N_GENES
    assert (found["variances_norm"] > 0).all()
    with pytest.raises(InvalidDataError, match="1 features have values other than counts"):
        statistics_of(np.array([[1, 0.5], [0, 2]])).highly_variable(1)
    with pytest.raises(ValueError, match="flavor must be"):
        statistics_of(np.eye(3)).highly_variable(1, "cell_ranger")
    with pytest.raises(ValueError, match="at least 1"):
        statistics_of(np.eye(3)).highly_variable(0)
