"""Quantile bins of a row in numba: by histogram where counts are small, by sorting elsewhere."""

from __future__ import annotations

import numpy as np

from hbx_gpu.tokens._draws import Step
from hbx_gpu.tokens._host.draws import HALF, jit, words
from hbx_gpu.tokens._host.draws import keys as draw_keys
from hbx_gpu.tokens._program import Side

SMALL = 4096
"""Counts below this are binned by histogram."""
_BIN = int(Step.BIN)
_BOTH, _ONE = int(Side.BOTH), int(Side.ONE)


@jit
def bin_counts(
    counts, index, n, torch_edges, side, quantiles, seed, epoch, cell, histogram, table, edges, keys, out
):
    """out[:n] = bin of each count, 0 for zeros; all of :func:`hbx_gpu.tokens._reference.bins`.

    `histogram`: int64 (SMALL,) of zeros, left so; `table`: int32 (2, SMALL); `edges`: float64 of as many
    entries as `quantiles`, which are j / (bins - 2) in the arithmetic asked for.
    """
    top, expressed = 0.0, 0
    for i in range(n):
        top = max(top, counts[i])
        expressed += counts[i] > 0.0
        out[i] = 0.0
    if not expressed:
        return
    if top < SMALL:
        _edges_by_histogram(counts, n, expressed, torch_edges, quantiles, histogram, edges)
        below, above = 0, 0
        for value in range(1, np.int64(top) + 1):
            if histogram[value]:
                histogram[value] = 0
                while below < len(edges) and edges[below] < value:
                    below += 1
                while above < len(edges) and edges[above] <= value:
                    above += 1
                table[0, value], table[1, value] = below, above
        if side == _BOTH:
            draw_keys(seed, epoch, cell, _BIN, 0, index, n, keys)
        for i in range(n):
            value = np.int64(counts[i])
            if value:
                lt, le = table[0, value], table[1, value]
                if side == _BOTH:
                    out[i] = le - (
                        np.int64(((keys[i] >> HALF) * np.uint64(le - lt)) >> HALF) if le > lt else 0
                    )
                else:
                    out[i] = le if side == _ONE else lt + 1
        return
    values = np.empty(expressed, np.float32)
    k = 0
    for i in range(n):
        if counts[i] > 0.0:
            values[k] = np.float32(counts[i])
            k += 1
    values.sort()
    for j in range(len(quantiles)):
        t, a, b = _place(quantiles[j], expressed, torch_edges)
        edges[j] = _edge(values[a], values[b], t, torch_edges)
    for i in range(n):
        if counts[i] > 0.0:
            x = np.float64(np.float32(counts[i]))
            lt = np.searchsorted(edges, x, side="left")
            le = np.searchsorted(edges, x, side="right")
            if side == _BOTH:
                a, _, _, _ = words(seed, epoch, cell, _BIN, index[i], 0)
                out[i] = le - (np.int64((a * np.uint64(le - lt)) >> HALF) if le > lt else 0)
            else:
                out[i] = le if side == _ONE else lt + 1


@jit
def _place(quantile, n, torch_edges):
    """Between which of n sorted values a quantile lies, and how far along."""
    if torch_edges:
        t32 = np.float32(np.float32(quantile) * np.float32(n - 1))
        floor = np.floor(t32)
        return np.float64(np.float32(t32 - floor)), np.int64(floor), np.int64(np.ceil(t32))
    t = quantile * (n - 1)
    first = np.int64(np.floor(t))
    return t - first, first, min(first + 1, n - 1)


@jit
def _edge(a, b, t, torch_edges):
    """A quantile between two float32 values, t of the way; float64, of float32 where torch makes it."""
    d = np.float32(b - a)
    if torch_edges:
        w = np.float32(t)
        if w < np.float32(0.5):
            return np.float64(np.float32(a + np.float32(w * d)))
        return np.float64(np.float32(b - np.float32(d * np.float32(np.float32(1) - w))))
    wide = np.float64(d)
    if t < 0.5:
        return np.float64(a) + wide * t
    return np.float64(b) - wide * (1.0 - t)


@jit
def _edges_by_histogram(counts, n, expressed, torch_edges, quantiles, histogram, edges):
    """Edges of small whole numbers, whose histogram, without zeros, is left in place."""
    for i in range(n):
        histogram[np.int64(counts[i])] += 1
    histogram[0] = 0
    value, seen = 0, 0  # `seen` values are at most `value`
    for j in range(len(quantiles)):
        t, first, second = _place(quantiles[j], expressed, torch_edges)
        while seen <= first:
            value += 1
            seen += histogram[value]
        after, seen_after = value, seen
        while seen_after <= second:
            after += 1
            seen_after += histogram[after]
        edges[j] = _edge(np.float32(value), np.float32(after), t, torch_edges)
