"""Numba kernels of counting: fragments to the columns they hit, then equal columns of a row to one count.

All positions are int64: a start may lie just below 2^32, and its end beyond.
"""

from __future__ import annotations

import numba
import numpy as np

FRAGMENTS, INSERTIONS, PAIRED, BINARY = range(4)
"""Positions of these modes in `hbx_gpu.chromatin._regions.COUNTS`."""

_jit = numba.njit(nogil=True, cache=True, boundscheck=False)


@_jit
def _bin(position, width, inverse):
    """position // width, for 0 <= position < 2^52: the product may miss by one, but is quicker."""
    number = np.int64(position * inverse)
    if number * width > position:
        return number - 1
    if (number + 1) * width <= position:
        return number + 1
    return number


@_jit
def _without_repeats(line, begin, number):
    """Keep one of each in line[begin:number], the columns of one fragment; -> the new number."""
    kept = begin
    for k in range(begin, number):
        known = False
        for j in range(begin, kept):
            known |= line[j] == line[k]
        if not known:
            line[kept] = line[k]
            kept += 1
    return kept


@_jit
def _sort(line, number):
    """Sort line[:number]; fragments mostly lie in genome order, and then little is out of place."""
    moves = 8 * number
    for k in range(1, number):
        value = line[k]
        j = k
        while j > 0 and line[j - 1] > value:
            line[j] = line[j - 1]
            j -= 1
        line[j] = value
        moves -= k - j
        if moves < 0:
            line[:number].sort()
            return


@_jit
def _piece(start, end, mode, piece):
    """Return the part of a fragment that counts: all of it, or its first (piece 0) or last (piece 1) base."""
    if mode == FRAGMENTS:
        return start, end
    return (start, start + 1) if piece == 0 else (end - 1, end)


@_jit
def _row_bins(chromosomes, starts, lengths, mode, where, line):
    """Bins that the fragments of a row hit; -> their number. What `line` has no room for is not written."""
    width, inverse, _, first, size, _ = where
    n = 0
    for k in range(len(chromosomes)):
        c = chromosomes[k]
        fragment_start = np.int64(starts[k])
        fragment_end = fragment_start + np.int64(lengths[k])
        if fragment_start >= fragment_end:
            continue
        begin = n
        for piece in range(1 if mode == FRAGMENTS else 2):
            start, end = _piece(fragment_start, fragment_end, mode, piece)
            start, end = max(start, 0), min(end, size[c])
            if start >= end:
                continue
            low = _bin(start, width, inverse)
            high = low if end <= (low + 1) * width else _bin(end - 1, width, inverse)
            for j in range(low, high + 1):
                if n < len(line):
                    line[n] = first[c] + j
                n += 1
        if mode == PAIRED and n <= len(line):
            n = _without_repeats(line, begin, n)
    return n


@_jit
def _row_peaks(chromosomes, starts, lengths, mode, where, peaks, line):
    """Do what `_row_bins` does, for peaks."""
    _, _, shift, first, size, stop = where
    slot_start, slot_end, reach, column, buckets = peaks
    n = 0
    for k in range(len(chromosomes)):
        c = chromosomes[k]
        fragment_start = np.int64(starts[k])
        fragment_end = fragment_start + np.int64(lengths[k])
        if fragment_start >= fragment_end:
            continue
        begin = n
        for piece in range(1 if mode == FRAGMENTS else 2):
            start, end = _piece(fragment_start, fragment_end, mode, piece)
            start, end = max(start, 0), min(end, size[c])
            if start >= end:
                continue
            bucket = first[c] + (start >> shift)
            slot, high = np.int64(buckets[bucket]), np.int64(buckets[bucket + 1])
            while slot < high:  # find the first slot from which on a peak may end after `start`
                middle = (slot + high) >> 1
                if reach[middle] > start:
                    high = middle
                else:
                    slot = middle + 1
            while slot < stop[c] and slot_start[slot] < end:
                if slot_end[slot] > start:
                    if n < len(line):
                        line[n] = column[slot]
                    n += 1
                slot += 1
        if mode == PAIRED and n <= len(line):
            n = _without_repeats(line, begin, n)
    return n


@_jit
def _sum_equal(line, n, binary, indices, values):
    """Columns of line[:n], ascending, each once, and how often they occur; -> number of different ones."""
    number = 0
    k = 0
    while k < n:
        same = k + 1
        while same < n and line[same] == line[k]:
            same += 1
        indices[number] = line[k]
        values[number] = 1 if binary else same - k
        number += 1
        k = same
    return number


@_jit
def count_rows(
    row, chromosomes, starts, lengths, row_bounds, mode, where, peaks,
    line, indices, values, offsets,
):  # fmt: skip
    """Count rows from `row` on until room runs out; -> the first row that was not counted.

    Parameters
    ----------
    chromosomes, starts, lengths, row_bounds
        Fragments; row ``i`` has ``row_bounds[i]:row_bounds[i + 1]``.
    mode
        One of the modes `FRAGMENTS`, `INSERTIONS`, `PAIRED` and `BINARY`.
    where, peaks
        From :meth:`hbx_gpu.chromatin._regions.Regions.lookup`.
    line
        int32. Scratch that has to hold every hit of a row.
    indices, values, offsets
        Written; ``offsets[row]`` says how much of them is full.
    """
    number = offsets[row]
    while row < len(row_bounds) - 1:
        a, b = row_bounds[row], row_bounds[row + 1]
        # A function for each: in one body the compiler counts references per fragment, at ten times the time.
        if where[0]:
            n = _row_bins(chromosomes[a:b], starts[a:b], lengths[a:b], mode, where, line)
        else:
            n = _row_peaks(chromosomes[a:b], starts[a:b], lengths[a:b], mode, where, peaks, line)
        if n > len(line) or number + n > len(indices):
            return row
        _sort(line, n)
        number += _sum_equal(line, n, mode == BINARY, indices[number:], values[number:])
        row += 1
        offsets[row] = number
    return row
