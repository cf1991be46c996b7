"""Plan rows in one pass of compiled code, without the GIL.

:func:`hbx_gpu._plan.rows.plan_rows` says what is right. Here, the rows that were looked up are sorted by
their place in storage and cut at the borders of chunks, and nothing is made but the plan itself.
"""

from __future__ import annotations

import numba
import numpy as np

from hbx_gpu._plan.rows import BatchPlan, SourceTable
from hbx_gpu._source import RowTable

_FEW = 96  # keys that are sorted by insertion, which needs no counters
_DIGIT = 11  # bits that a pass of the sort looks at; their counters fit the nearest cache

_jit = numba.njit(nogil=True, cache=True, boundscheck=False)


def plan_rows_numba(table: SourceTable, rows: RowTable, selection: np.ndarray) -> BatchPlan:
    """Return what :func:`~hbx_gpu._plan.rows.plan_rows` returns, made in one pass.

    Parameters
    ----------
    table
        Vectors of the dataset's Sources.
    rows
        All rows of the dataset; its segments lie inside their arrays (checked when it was made).
    selection
        int64, (n,), each in ``[0, len(rows))``.
    """
    places = rows.at(selection)
    return BatchPlan(
        *_plan(
            places.source, places.start, places.length,
            table.n_roles, table.element_base, table.chunk_elements, table.chunk_base, table.in_parts,
        )
    )  # fmt: skip


@_jit
def _ascending(keys):
    """Positions of the keys in ascending order; equal keys keep their order."""
    n = len(keys)
    order = np.empty(n, np.int64)
    if n <= _FEW:
        for i in range(n):
            key, at = keys[i], i
            while at > 0 and keys[order[at - 1]] > key:
                order[at] = order[at - 1]
                at -= 1
            order[at] = i
        return order
    low = high = keys[0]
    for i in range(n):
        order[i] = i
        low, high = min(low, keys[i]), max(high, keys[i])
    other = np.empty(n, np.int64)
    place = np.empty(1 << _DIGIT, np.int64)
    mask = (np.int64(1) << _DIGIT) - 1
    shift = 0
    while shift < 63 and (high - low) >> shift > 0:  # one pass per digit, the lowest one first
        place[:] = 0
        for i in range(n):
            place[((keys[i] - low) >> shift) & mask] += 1
        at = np.int64(0)
        for digit in range(len(place)):
            count = place[digit]
            place[digit] = at
            at += count
        for i in range(n):
            key = order[i]
            digit = ((keys[key] - low) >> shift) & mask
            other[place[digit]] = key
            place[digit] += 1
        order, other = other, order
        shift += _DIGIT
    return order


@_jit
def _chunk_of(element, size):
    """``element // size``; the product of floats, which may be off by one, takes a fraction of the time."""
    chunk = np.int64(element * (1.0 / size))
    if chunk * size > element:
        return chunk - 1
    return chunk + 1 if (chunk + 1) * size <= element else chunk


@_jit
def _plan(source, start, length, n_roles, element_base, chunk_elements, chunk_base, in_parts):
    n = len(source)
    sources, offsets = np.empty(n, np.int32), np.empty(n + 1, np.int64)
    row, key, begin = np.empty(n, np.int64), np.empty(n, np.int64), np.empty(n, np.int64)
    first_chunk = np.empty(n, np.int64)  # of the first array of the row's Source
    n_filled = n_pieces = np.int64(0)
    offsets[0] = 0
    for k in range(n):
        group = np.int64(source[k])
        sources[k] = group
        count = np.int64(length[k]) if group >= 0 else np.int64(0)
        offsets[k + 1] = offsets[k] + count
        if count == 0:  # empty rows have no pieces
            continue
        first = np.int64(start[k])
        row[n_filled], begin[n_filled] = k, first
        key[n_filled] = element_base[group * n_roles] + first
        n_filled += 1
        pieces, size = np.int64(0), np.int64(0)
        for array in range(group * n_roles, group * n_roles + n_roles):
            if chunk_elements[array] != size:  # most arrays of a Source are chunked alike
                size = chunk_elements[array]
                chunk = _chunk_of(first, size)
                pieces = np.int64(1)
                if first + count > (chunk + 1) * size:
                    pieces = _chunk_of(first + count - 1, size) - chunk + 1
                if array == group * n_roles:
                    first_chunk[n_filled - 1] = chunk
            n_pieces += pieces

    piece_chunk, piece_ptr = np.empty(n_pieces, np.int64), np.empty(n_pieces + 1, np.int64)
    chunks, chunk_array = np.empty(n_pieces, np.int64), np.empty(n_pieces, np.int64)
    piece_row, piece_skip = np.empty(n_pieces, np.int64), np.empty(n_pieces, np.int64)
    piece_count, piece_out = np.empty(n_pieces, np.int64), np.empty(n_pieces, np.int64)
    order = _ascending(key[:n_filled])
    p = a = n_chunks = np.int64(0)
    share = 0.0
    while a < n_filled:  # Source after Source, and array after array
        group = np.int64(sources[row[order[a]]])
        b = a + 1
        while b < n_filled and sources[row[order[b]]] == group:
            b += 1
        for array in range(group * n_roles, group * n_roles + n_roles):
            size, base = chunk_elements[array], chunk_base[array]
            alike = size == chunk_elements[group * n_roles]
            first_piece, before, left = p, np.int64(-1), _FEW * (b - a)
            for i in range(a, b):
                k, first = row[order[i]], begin[order[i]]
                at, out = first, offsets[k]
                end = first + offsets[k + 1] - out
                chunk = first_chunk[order[i]] if alike else _chunk_of(at, size)
                while at < end:
                    stop = min(end, (chunk + 1) * size)
                    piece_chunk[p], piece_row[p] = base + chunk, k
                    piece_skip[p], piece_count[p] = at - chunk * size, stop - at
                    piece_out[p] = out + at - first
                    q = p
                    if at < before:  # segments that overlap have pieces out of order, mostly by few places
                        while q > first_piece and left > 0:
                            if (piece_chunk[q - 1] - base) * size + piece_skip[q - 1] <= at:
                                break
                            for column in (piece_chunk, piece_row, piece_skip, piece_count, piece_out):
                                column[q - 1], column[q] = column[q], column[q - 1]
                            q, left = q - 1, left - 1
                    before, at = max(before, at), stop
                    chunk, p = chunk + 1, p + 1
            if left == 0:
                part = slice(first_piece, p)
                again = _ascending((piece_chunk[part] - base) * size + piece_skip[part])
                for column in (piece_chunk, piece_row, piece_skip, piece_count, piece_out):
                    column[part] = column[part][again]
            q = first_piece
            while q < p:
                chunks[n_chunks], chunk_array[n_chunks], piece_ptr[n_chunks] = piece_chunk[q], array, q
                taken = np.int64(0)
                while q < p and piece_chunk[q] == chunks[n_chunks]:
                    taken += piece_count[q]
                    q += 1
                share += min(taken / size, 1.0) if in_parts[array] else 1.0
                n_chunks += 1
        a = b

    piece_ptr[n_chunks] = n_pieces
    return (
        sources, offsets, chunks[:n_chunks], chunk_array[:n_chunks], piece_ptr[: n_chunks + 1],
        piece_row, piece_skip, piece_count, piece_out, share / n_chunks if n_chunks else 1.0,
    )  # fmt: skip
