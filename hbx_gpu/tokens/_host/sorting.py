"""The smallest 64-bit keys in order, in numba: selected before they are sorted.

A key and its position share one number, so that equal keys come in ascending position. Numbers of 32 bits do
for nearly all rows: 16 leading bits of the key above 16 of the position, and neighbors whose bits agree are
compared by their whole keys. Rows with many such neighbors take 64 bits, 48 of them from the key.
"""

from __future__ import annotations

import numpy as np

from hbx_gpu.tokens._host.draws import allocating, jit

_DIGIT = 8
_BUCKETS = 1 << _DIGIT
_MASK, _UPPER = np.uint64(_BUCKETS - 1), np.uint64(_BUCKETS)
_POSITION = np.uint64(0xFFFF)
_SIXTEEN, _TOP, _LEADING = np.uint64(16), np.uint64(24), np.uint64(48)
_POSITIONS = 1 << 16
_SMALL = 48
HISTOGRAM = 2 * _BUCKETS
"""Entries of the histogram that sorting needs."""


@jit
def smallest(key, n, keep, packed, packed_2, histogram, item):
    """item[:keep] = positions of the `keep` smallest of key[:n], in ascending (key, position).

    `packed`, `packed_2`: uint64 of at least n entries; `histogram`: uint32 (HISTOGRAM,). keep <= n.
    """
    if n > _POSITIONS:
        _by_comparison(key, n, keep, item)
        return
    if n > _SMALL and _by_half_words(
        key, n, keep, packed.view(np.uint32), packed_2.view(np.uint32), histogram, item
    ):
        return
    shift = _pack(key, n, packed)
    found = _select(packed, n, keep, histogram)
    _sort(packed, found, packed_2, histogram)
    for k in range(keep):
        item[k] = packed[k] & _POSITION
    if shift < 16:
        _by_low_bits(key, packed, keep, found, item)


@jit
def _by_half_words(key, n, keep, packed, packed_2, histogram, item):
    """As `smallest`, by 16 bits of each key; False, with nothing done, where too many keys agree in those."""
    low, shift = _range(key, n)
    for i in range(n):
        packed[i] = (((key[i] - low) << shift) >> _LEADING << _SIXTEEN) | np.uint64(i)
    found = n
    if 2 * keep < n:  # else nearly all are sorted anyway
        for b in range(_BUCKETS):
            histogram[b] = 0
        for i in range(n):
            histogram[packed[i] >> _TOP] += 1
        last, seen = 0, np.int64(histogram[0])
        while seen < keep:
            last += 1
            seen += histogram[last]
        limit = np.uint64(last)
        place = np.uint64(0)
        for i in range(n):
            one = packed[i]
            packed[place] = one
            place += np.uint64((one >> _TOP) <= limit)
        found = np.int64(place)
    _pass_pair(packed, found, packed_2, histogram, 16)
    if shift < _LEADING and not _told_apart(key, packed, found):
        return False
    for k in range(keep):
        item[k] = packed[k] & _POSITION
    return True


@jit
def _told_apart(key, packed, n):
    """Sort neighbors whose 16 bits agree by their whole keys; False when that took too many moves."""
    budget = 8 * n
    for k in range(1, n):
        one = np.uint64(packed[k])
        if (one ^ packed[k - 1]) > _POSITION:
            continue
        own = key[one & _POSITION]
        j = k - 1
        while j >= 0 and (one ^ packed[j]) <= _POSITION and key[packed[j] & _POSITION] > own:
            packed[j + 1] = packed[j]
            j -= 1
        packed[j + 1] = one
        budget -= k - 1 - j
        if budget < 0:
            return False
    return True


@jit
def mark_smallest(key, n, keep, packed, packed_2, histogram, flags):
    """flags[i] = whether key[i] is among the `keep` smallest of key[:n]; equal keys count by position."""
    for i in range(n):
        flags[i] = False
    if keep <= 0:
        return
    if n > _POSITIONS:
        _mark_by_comparison(key, n, keep, flags)
        return
    shift = _pack(key, n, packed)
    for b in range(_BUCKETS):
        histogram[b] = 0
    for i in range(n):
        histogram[packed[i] >> np.uint64(56)] += 1
    last, below = 0, 0
    while below + histogram[last] < keep:
        below += histogram[last]
        last += 1
    cut, place = np.uint64(last), np.uint64(0)
    for i in range(n):
        bucket = packed[i] >> np.uint64(56)
        flags[i] = bucket < cut
        packed_2[place] = packed[i]
        place += np.uint64(bucket == cut)
    found, wanted = np.int64(place), keep - below
    if wanted == found:
        for k in range(found):
            flags[packed_2[k] & _POSITION] = True
        return
    _sort(packed_2, found, packed, histogram)
    if shift < 16 and (packed_2[wanted - 1] ^ packed_2[wanted]) <= _POSITION:
        # 48 bits do not tell who is the last one: all of that bucket by all of their bits.
        for k in range(1, found):
            one = packed_2[k]
            j = k - 1
            while j >= 0 and _later(key, packed_2[j], one):
                packed_2[j + 1] = packed_2[j]
                j -= 1
            packed_2[j + 1] = one
    for k in range(wanted):
        flags[packed_2[k] & _POSITION] = True


@jit
def _later(key, left, right):
    a, b = left & _POSITION, right & _POSITION
    return key[a] > key[b] or (key[a] == key[b] and a > b)


@jit
def _range(key, n):
    """The smallest key, and how far the distance of the highest one from it can move up in 64 bits."""
    low, high = np.uint64(0xFFFFFFFFFFFFFFFF), np.uint64(0)
    for i in range(n):
        low = min(low, key[i])
        high = max(high, key[i])
    span = high - low if n else np.uint64(0)
    shift = np.uint64(0)
    while shift < np.uint64(63) and not (span >> np.uint64(63)):
        span <<= np.uint64(1)
        shift += np.uint64(1)
    return low, shift


@jit
def _pack(key, n, packed):
    """packed[i] = the leading 48 bits of key[i] above the smallest key, and i; returns how far bits moved."""
    low, shift = _range(key, n)
    for i in range(n):
        packed[i] = (((key[i] - low) << shift) & ~_POSITION) | np.uint64(i)
    return np.int64(shift)


@jit
def _select(packed, n, keep, histogram):
    """Move what may be among the `keep` smallest to the front, in order of position; returns how many."""
    if keep >= n or n <= _SMALL:
        return n
    for b in range(_BUCKETS):
        histogram[b] = 0
    for i in range(n):
        histogram[packed[i] >> np.uint64(56)] += 1
    last, seen = 0, np.int64(histogram[0])
    while seen < keep:
        last += 1
        seen += histogram[last]
    limit = np.uint64(last)
    found = np.uint64(0)
    for i in range(n):
        one = packed[i]
        packed[found] = one
        found += np.uint64((one >> np.uint64(56)) <= limit)
    return np.int64(found)


@jit
def _sort(packed, n, packed_2, histogram):
    """Sort distinct numbers: two passes over the leading 16 bits, then neighbors by insertion."""
    if n <= _SMALL:
        _insert(packed, n, n * n)
        return
    _pass_pair(packed, n, packed_2, histogram, 48)
    if n > 8 * _SMALL and not _insert(packed, n, 8 * n):
        # Keys that agree in their leading bits: by all bits, 8 at a time.
        for first in (0, 16, 32, 48):
            _pass_pair(packed, n, packed_2, histogram, first)
    elif n <= 8 * _SMALL:
        _insert(packed, n, n * n)


@jit
def _pass_pair(packed, n, packed_2, histogram, first):
    """Stable passes over the two digits of 8 bits that begin at bit `first`."""
    low, high = np.uint64(first), np.uint64(first + _DIGIT)
    for b in range(2 * _BUCKETS):
        histogram[b] = 0
    for i in range(n):
        one = packed[i]
        histogram[(one >> low) & _MASK] += 1
        histogram[_UPPER + ((one >> high) & _MASK)] += 1
    a, b = 0, 0
    for d in range(_BUCKETS):
        count = histogram[d]
        histogram[d] = a
        a += count
        count = histogram[_BUCKETS + d]
        histogram[_BUCKETS + d] = b
        b += count
    for i in range(n):
        one = packed[i]
        d = (one >> low) & _MASK
        packed_2[histogram[d]] = one
        histogram[d] += 1
    for i in range(n):
        one = packed_2[i]
        d = _UPPER + ((one >> high) & _MASK)
        packed[histogram[d]] = one
        histogram[d] += 1


@jit
def _insert(packed, n, budget):
    """Sort what is nearly in place; False when more than `budget` moves did not do."""
    for i in range(1, n):
        one = packed[i]
        if packed[i - 1] <= one:
            continue
        j = i - 1
        while j >= 0 and packed[j] > one:
            packed[j + 1] = packed[j]
            j -= 1
        packed[j + 1] = one
        budget -= i - 1 - j
        if budget < 0:
            return False
    return True


@jit
def _by_low_bits(key, packed, keep, found, item):
    """Put right what 48 bits do not tell apart: neighbors, in nearly all rows none."""
    same = 0
    for k in range(1, found):
        same += (packed[k] ^ packed[k - 1]) <= _POSITION
    if not same:
        return
    for k in range(1, found):
        one = packed[k]
        j = k - 1
        while j >= 0 and (packed[j] ^ one) <= _POSITION and _later(key, packed[j], one):
            packed[j + 1] = packed[j]
            j -= 1
        packed[j + 1] = one
    for k in range(keep):
        item[k] = packed[k] & _POSITION


@allocating
def _by_comparison(key, n, keep, item):
    order = np.argsort(key[:n], kind="mergesort")
    for k in range(keep):
        item[k] = order[k]


@allocating
def _mark_by_comparison(key, n, keep, flags):
    order = np.argsort(key[:n], kind="mergesort")
    for k in range(keep):
        flags[order[k]] = True
