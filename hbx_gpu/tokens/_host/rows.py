"""Stored rows as known genes, in numba: the first pass over a batch, after which lengths are known."""

from __future__ import annotations

import numpy as np

from hbx_gpu.tokens._host.draws import allocating, jit, sums

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
    # Unsigned numbers as places, and views that begin at 0, leave nothing to check for places counted from
    # the end: loops stay simple enough for vector instructions.
    n_features = np.uint32(len(column_of))
    limit = 2.0**53
    at = 0
    pointers[0] = 0
    for row in range(len(offsets) - 1):
        start = at
        own_columns = columns[offsets[row] : offsets[row + 1]]
        own_values = values[offsets[row] : offsets[row + 1]]
        total, fine = _total(own_values, logged)
        if not fine or (not logged and total >= limit):
            status = _why(own_values, logged)
            if status:
                return status
        if logged:
            total = 0.0
        inside = True
        for k in range(len(own_columns)):
            inside &= np.uint32(own_columns[k]) < n_features
        if not inside:
            return BAD_COLUMN
        found, rising = _compacted(own_columns, own_values, column_of, genes[start:], counts[start:])
        at = start + found
        if not rising:
            at = _summed(genes, counts, start, at)
        if zeros:
            at = _with_zeros(genes, counts, start, at, known)
        totals[row] = total
        totals_known[row] = 0.0 if logged else _sum(counts[start:at])
        pointers[row + 1] = at
    return 0


@jit
def _compacted(columns, values, column_of, genes, counts):
    """Known genes and counts above 0 in the order they have; how many, and whether columns ascend."""
    found = np.uint64(0)
    for k in range(len(columns)):
        own = column_of[np.uint32(columns[k])]
        x = np.float64(values[k])
        genes[found] = own
        counts[found] = x
        # Without a branch, which every second gene would mispredict.
        found += np.uint64((own >= 0) & (x > 0.0))
    falls = False
    for k in range(1, np.int64(found)):
        falls |= genes[k] <= genes[k - 1]
    return np.int64(found), not falls


@sums
def _total(values, logged):
    """Sum of values, and whether all are what they are taken for."""
    total, fine = 0.0, True
    for k in range(len(values)):
        x = np.float64(values[k])
        total += x
        fine &= (x >= 0.0) & (x < np.inf) & (logged | (x == np.floor(x)))
    return total, fine


@sums
def _sum(counts):
    total = 0.0
    for k in range(len(counts)):
        total += counts[k]
    return total


@jit
def _why(values, logged):
    """What is wrong with a row, one value at a time; 0: nothing, its sum is just below what is exact."""
    left = 2.0**53
    many = False
    for k in range(len(values)):
        x = np.float64(values[k])
        if not (x >= 0.0) or x == np.inf or (not logged and x != np.floor(x)):
            return NOT_COUNTS
        many |= x > left  # exact, which a sum beyond 2**53 might not be
        left -= x
    return TOO_MANY if many and not logged else 0


@allocating
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
