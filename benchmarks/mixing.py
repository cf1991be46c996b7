"""How well an order mixes cells: the label entropy of its batches against uniformly drawn ones."""

from __future__ import annotations

import numpy as np

# Runs of cells that share a label. Enough that a batch of 64 cannot hold them all, few enough that
# a batch of 4,096 can.
LABELS = 64


def stored_labels(n_cells: int, n_labels: int = LABELS) -> np.ndarray:
    """A label per cell, int64 (n_cells,): equal runs of the stored order, as plates or donors lie."""
    return np.arange(n_cells) * n_labels // max(n_cells, 1)


def rows_of(found: np.ndarray, truth: np.ndarray) -> np.ndarray:
    """Source row of each delivered fingerprint, int64; -1 where the source has no such row.

    Equal rows of the source are handed out in turn, so that an epoch which delivers each once gets each once.
    """
    by_value = np.argsort(truth, kind="stable")
    ordered = truth[by_value]
    first = np.searchsorted(ordered, found, side="left")
    copies = np.searchsorted(ordered, found, side="right") - first
    turn = np.zeros(len(found), np.int64)
    repeated = np.flatnonzero(copies > 1)
    if len(repeated):
        _, group = np.unique(found[repeated], return_inverse=True)
        by_group = np.argsort(group, kind="stable")
        sizes = np.bincount(group)
        starts = np.repeat(np.cumsum(sizes) - sizes, sizes)
        turn[repeated[by_group]] = np.arange(len(repeated)) - starts
    known = copies > 0
    rows = np.full(len(found), -1, np.int64)
    rows[known] = by_value[first[known] + turn[known] % copies[known]]
    return rows


def entropies(labels: np.ndarray, sizes: np.ndarray, n_labels: int) -> np.ndarray:
    """Shannon entropy in bits of the labels of each batch, float64 (n_batches,)."""
    batch = np.repeat(np.arange(len(sizes)), sizes)
    counts = np.bincount(batch * n_labels + labels, minlength=len(sizes) * n_labels)
    shares = counts.reshape(len(sizes), n_labels) / np.maximum(sizes, 1)[:, None]
    logs = np.log2(shares, out=np.zeros_like(shares), where=shares > 0)
    result: np.ndarray = -(shares * logs).sum(axis=1)
    return result


def quality(rows: np.ndarray, sizes: np.ndarray, n_cells: int, *, seed: int = 0) -> float:
    """Mean label entropy of an epoch's batches over that of as many uniformly drawn ones.

    1 is a uniform draw; 0 is one label per batch. Batches smaller than the first are left out.

    Parameters
    ----------
    rows
        Source row of each delivered cell, in the order delivered.
    sizes
        Sizes of the batches.
    n_cells
        Cells of the source.
    seed
        Of the uniform draws.
    """
    labels = stored_labels(n_cells)
    full = sizes == sizes[0]
    kept = np.repeat(full, sizes)
    observed = entropies(labels[rows[kept]], sizes[full], LABELS).mean()
    rng = np.random.default_rng(seed)
    draws = [
        rng.permutation(n_cells)[: len(block)] for block in _blocks(int(sizes[0]), n_cells, int(full.sum()))
    ]
    drawn = np.concatenate(draws)
    uniform = entropies(labels[drawn], np.full(len(drawn) // sizes[0], sizes[0]), LABELS).mean()
    return float(observed / uniform) if uniform else 1.0


def _blocks(size: int, n_cells: int, n_batches: int) -> list[range]:
    # Draws without replacement, as an epoch makes them; several epochs where one holds few batches.
    per_epoch = max(1, n_cells // size) * min(size, n_cells)
    return [range(per_epoch) for _ in range(max(1, -(-max(n_batches, 64) * size // per_epoch)))]
