"""Stored rows as known genes, in numba: the first pass over a batch, after which lengths are known."""

from __future__ import annotations

import math

import numpy as np

from hbx_gpu.tokens._host.draws import jit

NOT_COUNTS, TOO_MANY, BAD_COLUMN = 1, 2, 3
"""What is wrong with a row."""


@jit
def known_genes(
    offsets, columns, values, column_of, known, zeros, logged, pointers, genes, counts, totals, totals_known
):
    """Rows as their known genes: ascending columns, counts above 0, repeats summed.

    Writes pointers (n + 1), genes and counts (up to one for each stored value, or for each known gene with
    `zeros`), totals and totals_known (n). Returns the status of the first bad row, or 0.
    """
    n_features = len(column_of)
    limit = 2.0**53
    at = 0
    pointers[0] = 0
    for row in range(len(offsets) - 1):
        start = at
        total = 0.0
        last = -1
        rising = True
        for k in range(offsets[row], offsets[row + 1]):
            x = np.float64(values[k])
            if not (x >= 0.0) or x == np.inf:
                return NOT_COUNTS
            if not logged:
                if x != math.floor(x):
                    return NOT_COUNTS
                if x > limit - total:  # exact, which the sum might not be
                    return TOO_MANY
                total += x
            column = columns[k]
            if column < 0 or column >= n_features:
                return BAD_COLUMN
            own = column_of[column]
            if own >= 0 and x > 0.0:
                rising &= own > last
                last = own
                genes[at] = own
                counts[at] = x
                at += 1
        if not rising:
            at = _summed(genes, counts, start, at)
        if zeros:
            at = _with_zeros(genes, counts, start, at, known)
        whole = 0.0
        if not logged:
            for k in range(start, at):
                whole += counts[k]
        totals[row] = total
        totals_known[row] = whole
        pointers[row + 1] = at
    return 0


@jit
def _summed(genes, counts, start, stop):
    """Sort genes[start:stop] and sum those that repeat; returns where they end."""
    order = np.argsort(genes[start:stop], kind="mergesort")
    sorted_genes = genes[start:stop][order]
    sorted_counts = counts[start:stop][order]
    at = start
    for k in range(len(order)):
        if at > start and genes[at - 1] == sorted_genes[k]:
            counts[at - 1] += sorted_counts[k]
        else:
            genes[at] = sorted_genes[k]
            counts[at] = sorted_counts[k]
            at += 1
    return at


@jit
def _with_zeros(genes, counts, start, stop, known):
    """All known genes with their counts, from the back so that nothing is overwritten; returns their end."""
    k = stop - 1
    for i in range(len(known) - 1, -1, -1):
        gene = known[i]
        if k >= start and genes[k] == gene:
            count = counts[k]
            k -= 1
        else:
            count = 0.0
        genes[start + i] = gene
        counts[start + i] = count
    return start + len(known)
