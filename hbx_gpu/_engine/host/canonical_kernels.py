"""Numba kernels that bring CSR rows to canonical form: columns ascending, each once, within every row.

A row is sorted by rank: its columns are set as bits of one word per 64 columns, and the place of an element
is the number of bits before its own. That takes two passes over the row and no comparison, so nothing is
mispredicted. Rows with repeated columns, or with few elements for their width, are sorted by radix instead.
"""

from __future__ import annotations

import numba
import numpy as np
from numba import types
from numba.extending import intrinsic

_WORDS_PER_ELEMENT = 8
"""Counting bits is faster than sorting by radix up to so many words of 64 columns per element of a row."""

_COMPARED = 64  # columns looked at before a row may be found not to ascend: rows in no order end at once

_jit = numba.njit(nogil=True, cache=True, boundscheck=False)


@intrinsic
def _bits_of(typingctx, word):  # noqa: ARG001 - numba's signature
    """Number of bits that are set in a uint64."""

    def codegen(context, builder, signature, args):  # noqa: ARG001
        return builder.ctpop(args[0])

    return types.uint64(types.uint64), codegen


@_jit
def _ascends(line):
    """Return whether columns ascend and none repeats."""
    for first in range(0, len(line) - 1, _COMPARED):
        part = line[first : first + _COMPARED + 1]
        is_unsorted = False
        for k in range(1, len(part)):
            is_unsorted |= part[k] <= part[k - 1]  # no early exit in here, so that the loop is vectorized
        if is_unsorted:
            return False
    return True


@_jit
def _by_rank(line, values, words, before, columns, sums):
    """Sort one row by the rank of its columns; return False, and change nothing, where a column repeats.

    `words` must be all zeros, and is all zeros afterwards. `columns` and `sums` have room for the row.
    """
    one, low, six = np.uint64(1), np.uint64(63), np.uint64(6)
    for k in range(len(line)):
        column = np.uint64(line[k])
        words[column >> six] |= one << (column & low)
    total = np.uint32(0)
    for w in range(len(words)):
        before[w] = total
        total += np.uint32(_bits_of(words[w]))
    distinct = total == len(line)
    if distinct:
        for k in range(len(line)):
            column = np.uint64(line[k])
            word = column >> six
            smaller = words[word] & ((one << (column & low)) - one)
            place = np.uint64(before[word]) + _bits_of(smaller)
            columns[place] = column
            sums[place] = values[k]
        for k in range(len(line)):
            line[k] = columns[k]
        for k in range(len(line)):
            values[k] = sums[k]
    for w in range(len(words)):
        words[w] = 0
    return distinct


@_jit
def _by_radix(line, values, n_bytes, columns, sums):
    """Sort one row by the lowest `n_bytes` bytes of its columns; equal columns keep their order."""
    places = np.empty(256, np.int64)
    for byte in range(n_bytes):
        shift = np.uint64(8 * byte)
        places[:] = 0
        for k in range(len(line)):
            places[(np.uint64(line[k]) >> shift) & np.uint64(255)] += 1
        at = 0
        for digit in range(256):
            at, places[digit] = at + places[digit], at
        for k in range(len(line)):
            digit = (np.uint64(line[k]) >> shift) & np.uint64(255)
            columns[places[digit]] = line[k]
            sums[places[digit]] = values[k]
            places[digit] += 1
        for k in range(len(line)):
            line[k] = columns[k]
        for k in range(len(line)):
            values[k] = sums[k]


@_jit
def _repeats(line):
    """Whether neighboring columns of a sorted row are equal."""
    found = False
    for k in range(1, len(line)):
        found |= line[k] == line[k - 1]
    return found


@_jit
def sort_rows(offsets, n_features, unsorted_rows, columns, values, row_columns, row_values):
    """Sort the rows that `unsorted_rows` marks, by column, in place; equal columns keep their order.

    `row_columns` and `row_values` have room for the longest row. Columns lie in [0, n_features). Returns
    whether any column repeats within a row.
    """
    words = np.zeros((n_features + 63) // 64, np.uint64)
    before = np.empty(len(words), np.uint32)
    n_bytes = 1
    while n_features > 1 << 8 * n_bytes:
        n_bytes += 1
    repeats = False
    for row in range(len(offsets) - 1):
        if not unsorted_rows[row]:
            continue
        line, counts = columns[offsets[row] : offsets[row + 1]], values[offsets[row] : offsets[row + 1]]
        if _ascends(line):
            continue
        if len(words) <= _WORDS_PER_ELEMENT * len(line) and _by_rank(
            line, counts, words, before, row_columns, row_values
        ):
            continue
        _by_radix(line, counts, n_bytes, row_columns, row_values)
        repeats |= _repeats(line)
    return repeats


@_jit
def drop_values(columns, values):
    """Move the values whose columns are not negative to the front, in order."""
    at = 0
    for k in range(len(columns)):
        values[at] = values[k]
        at += columns[k] >= 0


@_jit
def drop_columns(offsets, columns, kept):
    """Move the columns that are not negative to the front, in order; `kept` becomes their offsets."""
    at = 0
    kept[0] = 0
    for row in range(len(offsets) - 1):
        for k in range(offsets[row], offsets[row + 1]):
            column = columns[k]
            columns[at] = column
            at += column >= 0
        kept[row + 1] = at


@_jit
def sum_repeats(offsets, columns, values):
    """Add the values of equal columns of a sorted row to the first of them, and move the sums to the front.

    Rows are sorted. Columns stay as they are: see `drop_repeats`.
    """
    at = -1
    for row in range(len(offsets) - 1):
        for k in range(offsets[row], offsets[row + 1]):
            if k > offsets[row] and columns[k] == columns[k - 1]:
                values[at] += values[k]
            else:
                at += 1
                values[at] = values[k]


@_jit
def drop_repeats(offsets, columns, kept):
    """Keep one of equal columns of a sorted row, moved to the front; `kept` becomes the rows' offsets."""
    at = 0
    kept[0] = 0
    for row in range(len(offsets) - 1):
        before = np.int64(-1)
        for k in range(offsets[row], offsets[row + 1]):
            column = columns[k]
            if column != before:
                columns[at] = column
                at += 1
            before = column
        kept[row + 1] = at
