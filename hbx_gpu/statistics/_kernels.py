"""Compiled code of the statistics: rows become columns, values are counted in bins, tables of bins are added.

All kernels release the GIL. A table of bins is an open hash table of *pages*: 32 counters that belong to
consecutive values of one cell of the result, so that memory goes only to values that occur.
"""

from __future__ import annotations

from typing import NamedTuple

import numba
import numpy as np

PAGE_BITS = 5
"""A page has 32 counters."""
KEY_BITS = 12
"""Pages of one cell of the result: a page number is the upper 12 bits of a value's code of 17."""
EXACT_BELOW = 1024
"""Whole numbers below this have a counter of their own."""
TOO_LARGE = 2.0**31
"""Whole numbers from here on are summed as floats."""
_CODE_SHIFT = 46  # of the bits of a float64, which leaves sign, exponent and 6 bits of the mantissa
_LOW = (1 << 32) - 1
_RECENT = 64

_jit = numba.njit(nogil=True, cache=True, boundscheck=False)


class Table(NamedTuple):
    """A hash table of pages.

    Attributes
    ----------
    slots
        int64, (a power of two,). Key of the page in each slot, -1 where it is free.
    place
        int32, (len(slots),). Number of that page.
    keys
        int64, (n,). Key of each page: ``cell << KEY_BITS | upper bits of the code``.
    counts
        uint32, (n, 32).
    used
        int64, (1,). Number of pages in use.
    """

    slots: np.ndarray
    place: np.ndarray
    keys: np.ndarray
    counts: np.ndarray
    used: np.ndarray


class Sums(NamedTuple):
    """Sums over the nonzero values of each cell of the result; all arrays have its length.

    Attributes
    ----------
    nonzero
        int64. Number of nonzero values.
    total, square_high, square_low
        int64. Sum of the whole numbers, and of their squares as ``high * 2**32 + low``.
    n, mean, m2
        int64, float64, float64. Number, mean, and sum of squared deviations of all other values.
    odd
        int64. Values that have no place among medians: at most 0, or not finite.
    """

    nonzero: np.ndarray
    total: np.ndarray
    square_high: np.ndarray
    square_low: np.ndarray
    n: np.ndarray
    mean: np.ndarray
    m2: np.ndarray
    odd: np.ndarray


class Listed(NamedTuple):
    """Values that are kept one by one, for exact medians.

    Attributes
    ----------
    cell, value
        int64 and float64, (n,). Cell of the result and value; n is 0 where bins are used instead.
    used
        int64, (1,). Number of values.
    """

    cell: np.ndarray
    value: np.ndarray
    used: np.ndarray


@_jit
def by_column(indices, values, offsets, n_features):
    """Elements of CSR rows sorted by column, rows ascending within each.

    Returns
    -------
    begin, row, value, totals
        First element of each column; row and value (float64) of each element; sum of each row.
    """
    n = len(offsets) - 1
    begin = np.zeros(n_features + 1, np.int64)
    for k in range(offsets[0], offsets[n]):
        begin[indices[k] + 1] += 1
    for column in range(n_features):
        begin[column + 1] += begin[column]
    place = begin[:-1].copy()
    row = np.empty(begin[-1], np.int32)
    value = np.empty(begin[-1], np.float64)
    totals = np.empty(n, np.float64)
    for r in range(n):
        total = 0.0
        for k in range(offsets[r], offsets[r + 1]):
            x = np.float64(values[k])
            total += x
            at = place[indices[k]]
            place[indices[k]] = at + 1
            row[at] = r
            value[at] = x
        totals[r] = total
    return begin, row, value, totals


@_jit
def _slot(slots, key):
    mask = np.int64(len(slots) - 1)
    at = np.int64((np.uint64(key) * np.uint64(0x9E3779B97F4A7C15)) >> np.uint64(30)) & mask
    while slots[at] != -1 and slots[at] != key:
        at = (at + 1) & mask
    return at


@_jit
def _page(table, key):
    """Number of the page of a key, which is made where it is missing; there must be room for it."""
    at = _slot(table.slots, key)
    if table.slots[at] == -1:
        table.slots[at] = key
        table.place[at] = table.used[0]
        table.keys[table.used[0]] = key
        table.used[0] += 1
    return np.int64(table.place[at])


@_jit
def fill_slots(table):
    """Enter the pages in use into slots that are free."""
    for page in range(table.used[0]):
        at = _slot(table.slots, table.keys[page])
        table.slots[at] = table.keys[page]
        table.place[at] = page


@_jit
def add_table(table, keys, counts):
    """Add the counters of pages; returns False if one of them became too large."""
    fits = True
    for i in range(len(keys)):
        page = _page(table, keys[i])
        for j in range(counts.shape[1]):
            total = np.uint64(table.counts[page, j]) + np.uint64(counts[i, j])
            fits &= total <= np.uint64(_LOW)
            table.counts[page, j] = np.uint32(total)
    return fits


@_jit
def _add_sums(sums, cell, nonzero, total, high, low):
    """Add sums over some values of a cell, none of them for cell -1; `low` may be up to 2**63."""
    if cell < 0:
        return
    low += sums.square_low[cell]
    sums.nonzero[cell] += nonzero
    sums.total[cell] += total
    sums.square_high[cell] += high + (low >> 32)
    sums.square_low[cell] = low & _LOW


@_jit
def add_columns(first, begin, row, value, totals, group, n_groups, target, sums, whole, ratios, listed):
    """Add the elements of columns, as :func:`by_column` sorted them, to all sums.

    Parameters
    ----------
    first
        Column to begin with.
    begin, row, value, totals
        From :func:`by_column`.
    group
        int32, (n_rows,). Group of each row; a cell of the result is ``column * n_groups + group``.
    target
        Values are divided by the sum of their row and multiplied by this before they go to medians; 0 leaves
        them as they are, and below 0 there are no medians.
    sums, whole, ratios, listed
        What is added to: whole numbers go to the bins `whole`, all values that medians are made of to
        `listed`, or to the bins `ratios` where `listed` has no room at all.

    Returns
    -------
    int
        The column at which a table has too little room, or the number of columns.
    """
    n_features = len(begin) - 1
    as_float = np.empty(1, np.float64)
    as_bits = as_float.view(np.int64)
    exact = len(listed.cell) > 0
    # Arrays are taken out of their tuples once: doing so counts references, which costs more than adding.
    whole_counts, ratio_counts = whole.counts, ratios.counts
    listed_cell, listed_value, n_listed = listed.cell, listed.value, listed.used[0]
    # Pages that were looked up last, by the lower bits of their keys.
    recent_key, recent_page = np.full(_RECENT, -1, np.int64), np.zeros(_RECENT, np.int64)
    for column in range(first, n_features):
        k, stop = begin[column], begin[column + 1]
        n = stop - k
        if n > len(whole.keys) - whole.used[0] or (not exact and n > len(ratios.keys) - ratios.used[0]):
            listed.used[0] = n_listed
            return column
        last_key, last_page = np.int64(-1), np.int64(0)
        # Sums of one cell of the result are kept in registers until another one comes.
        cell, nonzero, total, high, low = np.int64(-1), np.int64(0), np.int64(0), np.int64(0), np.int64(0)
        while k < stop:
            r, x = row[k], value[k]
            k += 1
            while k < stop and row[k] == r:  # a column that repeats within a row
                x += value[k]
                k += 1
            if x == 0.0:
                continue
            this = np.int64(column) * n_groups + group[r]
            if this != cell:
                _add_sums(sums, cell, nonzero, total, high, low)
                cell, nonzero, total, high, low = this, np.int64(0), np.int64(0), np.int64(0), np.int64(0)
            nonzero += 1
            if 0.0 < x < TOO_LARGE and x == np.floor(x):
                number = np.int64(x)
                square = number * number
                total += number
                low += square & _LOW
                high += square >> 32
                code = number
                if number >= EXACT_BELOW:
                    as_float[0] = x
                    code = as_bits[0] >> _CODE_SHIFT
                key = (cell << KEY_BITS) | (code >> PAGE_BITS)
                if key != last_key:
                    last_key, last_page = key, _page(whole, key)
                whole_counts[last_page, code & 31] += 1
            else:
                sums.n[cell] += 1
                delta = x - sums.mean[cell]
                sums.mean[cell] += delta / sums.n[cell]
                sums.m2[cell] += delta * (x - sums.mean[cell])
            if target < 0.0:
                continue
            y = x if target == 0.0 else x / totals[r] * target
            if not 0.0 < y < np.inf:
                sums.odd[cell] += 1
            elif exact:
                listed_cell[n_listed], listed_value[n_listed] = cell, y
                n_listed += 1
            else:
                as_float[0] = y
                code = as_bits[0] >> _CODE_SHIFT
                key = (cell << KEY_BITS) | (code >> PAGE_BITS)
                at = key & (_RECENT - 1)
                if recent_key[at] != key:
                    recent_key[at], recent_page[at] = key, _page(ratios, key)
                ratio_counts[recent_page[at], code & 31] += 1
        _add_sums(sums, cell, nonzero, total, high, low)
    listed.used[0] = n_listed
    return n_features


@_jit
def merge_floats(n, mean, m2, other_n, other_mean, other_m2):
    """Add number, mean and sum of squared deviations of other values, in place (Chan, Golub and LeVeque)."""
    for i in range(len(n)):
        if other_n[i] == 0:
            continue
        total = n[i] + other_n[i]
        delta = other_mean[i] - mean[i]
        m2[i] += other_m2[i] + delta * delta * (np.float64(n[i]) * other_n[i] / total)
        mean[i] += delta * (other_n[i] / total)
        n[i] = total


@_jit
def listed_medians(cell, value, n_cells):
    """float64, (n_cells,). Median of the values of each cell, NaN where there are none."""
    begin = np.zeros(n_cells + 1, np.int64)
    for i in range(len(cell)):
        begin[cell[i] + 1] += 1
    for c in range(n_cells):
        begin[c + 1] += begin[c]
    place = begin[:-1].copy()
    ordered = np.empty(len(cell), np.float64)
    for i in range(len(cell)):
        ordered[place[cell[i]]] = value[i]
        place[cell[i]] += 1
    result = np.full(n_cells, np.nan)
    for c in range(n_cells):
        if begin[c + 1] > begin[c]:
            result[c] = np.median(ordered[begin[c] : begin[c + 1]])
    return result
