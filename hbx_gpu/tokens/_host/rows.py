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
        first, stop = offsets[row], offsets[row + 1]
        total = 0.0
        fine = True
        for k in range(first, stop):
            x = np.float64(values[k])
            fine &= (x >= 0.0) & (x < np.inf)
            if not logged:
                fine &= x == math.floor(x)
                fine &= x <= limit - total  # exact, which the sum might not be
                total += x
        if not fine:
            return _why(values, first, stop, logged)
        last = -1
        rising = True
        for k in range(first, stop):
            column = columns[k]
            if column < 0 or column >= n_features:
                return BAD_COLUMN
            own = column_of[column]
            x = np.float64(values[k])
            genes[at] = own
            counts[at] = x
            if own >= 0 and x > 0.0:
                rising &= own > last
                last = own
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
def _why(values, first, stop, logged):
    """What is wrong with values that are not fine."""
    for k in range(first, stop):
        x = np.float64(values[k])
        if not (x >= 0.0) or x == np.inf or (not logged and x != math.floor(x)):
            return NOT_COUNTS
    return TOO_MANY


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
