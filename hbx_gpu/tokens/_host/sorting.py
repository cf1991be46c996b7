"""Stable sorting of 64-bit keys with a payload: radix on leading bits, then neighbours in full."""

from __future__ import annotations

import numpy as np

from hbx_gpu.tokens._host.draws import jit

DIGIT, PASSES = 11, 6
_BUCKETS = 1 << DIGIT
_MASK = np.uint64(_BUCKETS - 1)
_SMALL, _MIDDLE = 48, 8192
SCRATCH = PASSES * _BUCKETS
"""Entries of the histogram that :func:`sort_keys` needs."""


@jit
def sort_keys(key, item, n, key_2, item_2, histogram):
    """Sort key[:n] ascending, item[:n] along with it; equal keys keep their order.

    The leading 22 of the bits in which keys differ (33 in long rows) go through passes of 11 bits. What is
    equal there and differs below is put right by insertion, which finds nearly everything in place; where it
    does not, all the bits that differ are sorted by.
    """
    if n <= _SMALL:
        _insert(key, item, n, n * n)
        return
    low, high = key[0], key[0]
    for i in range(n):
        low &= key[i]
        high |= key[i]
    differ = low ^ high
    top = 0
    while top < 64 and differ >> np.uint64(top) != 0:
        top += 1
    wanted = 2 if n <= _MIDDLE else 3
    n_passes = min(wanted, (top + DIGIT - 1) // DIGIT)
    _radix(key, item, n, key_2, item_2, histogram, max(0, top - DIGIT * wanted), n_passes)
    if top > DIGIT * wanted and not _insert(key, item, n, 8 * n):
        _radix(key, item, n, key_2, item_2, histogram, 0, (top + DIGIT - 1) // DIGIT)


@jit
def _radix(key, item, n, key_2, item_2, histogram, first_bit, n_passes):
    """Stable passes over digits of 11 bits, from `first_bit` up."""
    shift = np.uint64(first_bit)
    for b in range(n_passes * _BUCKETS):
        histogram[b] = 0
    for i in range(n):
        bits = key[i] >> shift
        for p in range(n_passes):
            histogram[p * _BUCKETS + np.int64((bits >> np.uint64(p * DIGIT)) & _MASK)] += 1
    source_key, source_item, target_key, target_item = key, item, key_2, item_2
    for p in range(n_passes):
        base, total = p * _BUCKETS, 0
        for b in range(base, base + _BUCKETS):
            count = histogram[b]
            histogram[b] = total
            total += count
        at = shift + np.uint64(p * DIGIT)
        for i in range(n):
            one = source_key[i]
            b = base + np.int64((one >> at) & _MASK)
            place = histogram[b]
            histogram[b] = place + 1
            target_key[place] = one
            target_item[place] = source_item[i]
        source_key, target_key = target_key, source_key
        source_item, target_item = target_item, source_item
    if n_passes % 2:
        for i in range(n):
            key[i] = key_2[i]
            item[i] = item_2[i]


@jit
def _insert(key, item, n, budget):
    """Sort what is nearly in place; False when more than `budget` moves did not do, order still stable."""
    for i in range(1, n):
        one = key[i]
        if key[i - 1] <= one:
            continue
        own = item[i]
        j = i - 1
        while j >= 0 and key[j] > one:
            key[j + 1] = key[j]
            item[j + 1] = item[j]
            j -= 1
        key[j + 1] = one
        item[j + 1] = own
        budget -= i - 1 - j
        if budget < 0:
            return False
    return True
