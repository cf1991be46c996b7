"""Quantile bins of a row in numba: by histogram where counts are small, by sorting elsewhere."""

from __future__ import annotations

import numpy as np

from hbx_gpu.tokens._draws import Step
from hbx_gpu.tokens._host.draws import HALF, allocating, jit
from hbx_gpu.tokens._host.draws import keys as draw_keys
from hbx_gpu.tokens._program import Side

SMALL = 4096
"""Counts below this are binned by histogram."""
_SMALL = float(SMALL)
_BIN = int(Step.BIN)
_BOTH, _ONE = int(Side.BOTH), int(Side.ONE)


@jit
def find_edges(counts, n, torch_edges, quantiles, histogram, table, edges, whole):
    """Bin edges of the counts above 0; returns how :func:`assign` finds bins: 0 none, 1 table, 2 edges.

    `histogram`: int32 (4, SMALL) of zeros, left so; `table`: int32 (2, SMALL + 1), filled with the edges
    below and not above each count; `edges`: float64 of as many entries as `quantiles`, which are
    j / (bins - 2) in the arithmetic asked for; `whole`: uint32 (n,), overwritten.
    """
    top = np.uint32(0)
    for i in range(n):
        one = np.uint32(np.int32(min(counts[i], _SMALL)))
        whole[i] = one
        top = max(top, one)
    if not top:
        return 0
    if top >= SMALL:
        _edges_of_sorted(counts, n, torch_edges, quantiles, edges)
        return 2
    # Four histograms in turn: equal counts that follow each other would wait for each other's increment.
    for i in range(n // 4):
        four = whole[4 * i : 4 * i + 4]
        histogram[0, four[0]] += 1
        histogram[1, four[1]] += 1
        histogram[2, four[2]] += 1
        histogram[3, four[3]] += 1
    for i in range(n - n % 4, n):
        histogram[0, whole[i]] += 1
    expressed = np.int64(n)
    for k in range(4):
        expressed -= histogram[k, 0]
        histogram[k, 0] = 0
    highest = np.int64(top)
    # Below: how many values are at most each; above: edges that begin to count at each value. Sums and
    # searches instead of walks, whose every step a branch would have to guess.
    upto, below, above = histogram[0], table[0], table[1]
    seen = 0
    for value in range(1, highest + 1):
        seen += upto[value] + histogram[1, value] + histogram[2, value] + histogram[3, value]
        upto[value] = seen
    for k in range(1, 4):
        histogram[k, 1 : highest + 1] = 0
    below[: highest + 2], above[: highest + 2] = 0, 0
    for j in range(len(quantiles)):
        t, first, second = _place(quantiles[j], expressed, torch_edges)
        value = _ranked(upto, highest, first)
        after = value if second < upto[value] else _ranked(upto, highest, second)
        edge = _edge(np.float32(value), np.float32(after), t, torch_edges)
        edges[j] = edge
        whole_part = np.int64(edge)  # an edge lies between counts, so it is at least 1
        below[whole_part + 1] += 1
        above[whole_part + np.int64(edge > whole_part)] += 1
    lt, le = 0, 0
    for value in range(1, highest + 1):
        lt += below[value]
        le += above[value]
        below[value], above[value] = lt, le
    upto[1 : highest + 1] = 0
    return 1


@allocating
def _edges_of_sorted(counts, n, torch_edges, quantiles, edges):
    """Edges of counts of any size."""
    values = np.empty(n, np.float32)
    expressed = 0
    for i in range(n):
        values[expressed] = np.float32(counts[i])
        expressed += counts[i] > 0.0
    values = values[:expressed]
    values.sort()
    for j in range(len(quantiles)):
        t, a, b = _place(quantiles[j], expressed, torch_edges)
        edges[j] = _edge(values[a], values[b], t, torch_edges)


@jit
def assign(how, counts, index, n, side, seed, epoch, cell, table, edges, keys, out):
    """out[:n] = bin of each count, 0 for zeros; `index` numbers genes in draws."""
    if how == 0:
        for i in range(n):
            out[i] = 0.0
        return
    if side == _BOTH:
        draw_keys(seed, epoch, cell, _BIN, 0, index, n, keys)
    if how == 1:
        table[0, 0], table[1, 0] = -1, 0
        if side == _BOTH:
            table[0, 0] = 0
            for i in range(n):
                value = np.uint32(np.int32(counts[i]))
                lt, le = table[0, value], table[1, value]
                out[i] = le - np.int32(((keys[i] >> HALF) * np.uint64(le - lt)) >> HALF)
        elif side == _ONE:
            for i in range(n):
                out[i] = table[1, np.uint32(np.int32(counts[i]))]
        else:
            for i in range(n):
                out[i] = table[0, np.uint32(np.int32(counts[i]))] + 1
        return
    for i in range(n):
        out[i] = 0.0
        if counts[i] > 0.0:
            x = np.float64(np.float32(counts[i]))
            lt = np.searchsorted(edges, x, side="left")
            le = np.searchsorted(edges, x, side="right")
            if side == _BOTH:
                out[i] = le - np.int64(((keys[i] >> HALF) * np.uint64(le - lt)) >> HALF)
            else:
                out[i] = le if side == _ONE else lt + 1


@jit
def _ranked(upto, highest, rank):
    """The value at a place among the sorted values, of which upto[v] are at most v."""
    first, n = 0, highest + 1
    while n > 1:
        half = n >> 1
        first += half * np.int64(upto[first + half - 1] <= rank)
        n -= half
    return first


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
