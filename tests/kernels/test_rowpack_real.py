"""Rows of a real count matrix through the rowpack kernels. Needs h5py."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.kernels import rowpack_reference as reference

h5py = pytest.importorskip("h5py")


@pytest.fixture(scope="module")
def mouse(real_h5ad: tuple[Path, Path]) -> tuple[list[np.ndarray], list[np.ndarray], int]:
    """(genes of each cell, their counts, number of genes) of the first 1,500 cells."""
    with h5py.File(real_h5ad[0]) as file:
        matrix = file["X"]
        n_genes = int(matrix.attrs["shape"][1])
        indptr = matrix["indptr"][:1_501]
        indices = matrix["indices"][: indptr[-1]].astype(np.uint16)
        counts = matrix["data"][: indptr[-1]]
    assert (counts == np.rint(counts)).all()
    parts = [slice(a, b) for a, b in itertools.pairwise(indptr)]
    return [indices[p] for p in parts], [counts[p].astype(np.uint32) for p in parts], n_genes


@pytest.mark.parametrize("partial", [False, True])
def test_random_cells(
    launcher: Any, mouse: tuple[list[np.ndarray], list[np.ndarray], int], partial: bool
) -> None:
    rows, counts, n_genes = mouse
    rng = np.random.default_rng(0)
    order = rng.choice(len(rows), 60).tolist()
    panel = np.full(n_genes, -1, np.int32)
    chosen = rng.choice(n_genes, 200, replace=False)
    panel[chosen] = np.arange(200)
    for remap, width in ((np.arange(n_genes, dtype=np.int32), n_genes), (panel, 200)):
        batch = reference.csr_batch(rows, counts, chunk=40_960, remaps=[remap], order=order, partial=partial)
        truth = np.zeros((len(order), n_genes), np.uint32)
        for i, row in enumerate(order):
            truth[i, rows[row]] = counts[row]
        if width == 200:
            truth = truth[:, chosen]
        dense, status, flag = reference.run_dense(launcher, batch, width)
        assert flag == 0
        assert not status.any()
        np.testing.assert_array_equal(dense, truth)
        total = sum(len(rows[r]) for r in order)
        found = [np.zeros(total, np.int32), np.zeros(total, np.uint32)]
        status, flag = reference.run_csr(launcher, batch, found)
        assert flag == 0
        assert not status.any()
        np.testing.assert_array_equal(found[0], np.concatenate([remap[rows[r]] for r in order]))
        np.testing.assert_array_equal(found[1], np.concatenate([counts[r] for r in order]))
