"""Stable sorting of 64-bit keys with a payload: radix on leading bits, then neighbours in full."""

from __future__ import annotations

import numpy as np

from hbx_gpu.tokens._host.draws import jit

DIGIT, PASSES = 11, 3
_BUCKETS = 1 << DIGIT
_MASK = np.uint64(_BUCKETS - 1)
_SMALL = 48
SCRATCH = PASSES * _BUCKETS
"""Entries of the histogram that :func:`sort_keys` needs."""


@jit
def sort_keys(key, item, n, key_2, item_2, histogram):
    """Sort key[:n] ascending, item[:n] along with it; equal keys keep their order.

    The leading 33 of the bits in which keys differ go through three passes of 11-bit digits; what is equal
    there and differs below is put right by insertion, which finds nearly everything in place.
    """
    if n > _SMALL:
        low, high = key[0], key[0]
        for i in range(n):
            low &= key[i]
            high |= key[i]
        differ = low ^ high
        top = 0
        while differ >> np.uint64(top) != 0:
            top += 1
            if top == 64:
                break
        shift = np.uint64(max(0, top - DIGIT * PASSES))
        n_passes = min(PASSES, (min(top, DIGIT * PASSES) + DIGIT - 1) // DIGIT)
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
                b = base + np.int64((source_key[i] >> at) & _MASK)
                place = histogram[b]
                histogram[b] = place + 1
                target_key[place] = source_key[i]
                target_item[place] = source_item[i]
            source_key, target_key = target_key, source_key
            source_item, target_item = target_item, source_item
        if n_passes % 2:
            for i in range(n):
                key[i] = key_2[i]
                item[i] = item_2[i]
    for i in range(1, n):
        one, own = key[i], item[i]
        j = i - 1
        while j >= 0 and key[j] > one:
            key[j + 1] = key[j]
            item[j + 1] = item[j]
            j -= 1
        key[j + 1] = one
        item[j + 1] = own
