"""What a model has to guess, in numba: ids or values of one row that are hidden."""

from __future__ import annotations

import numpy as np

from hbx_gpu.tokens._draws import Step
from hbx_gpu.tokens._host.draws import HALF, jit, keys, two_keys, unit_bits, words
from hbx_gpu.tokens._host.sorting import mark_smallest
from hbx_gpu.tokens._program import Mask

_MASK, _KIND, _RATIO = int(Step.MASK), int(Step.KIND), int(Step.RATIO)
_BERNOULLI = int(Mask.BERNOULLI)


@jit
def hide_ids(
    mask_id, masked, replaced, first, span, ratio, protect,
    seed, epoch, cell, index, length, key, key_2, item, places, ids, labels,
):  # fmt: skip
    """Hide ids[:length] in place; see :func:`hbx_gpu.tokens._reference.hide_tokens`."""
    keys(seed, epoch, cell, _MASK, 0, index, length, key)
    limit = np.uint64(np.ceil(ratio * 2.0**53))
    for k in range(len(labels)):
        labels[k] = -100
    found = np.uint64(0)
    for k in range(length):
        item[found] = k
        found += np.uint64(unit_bits(key[k]) < limit)
    chosen = np.int64(found)
    for j in range(chosen):
        places[j] = index[item[j]]
    two_keys(seed, epoch, cell, _KIND, places, chosen, key, key_2)
    for j in range(chosen):
        k = item[j]
        one = ids[k]
        safe = False
        for p in range(len(protect)):
            safe |= protect[p] == one
        if safe:
            continue
        labels[k] = one
        kind = unit_bits(key[j])
        if kind < np.uint64(masked):
            ids[k] = mask_id
        elif kind < np.uint64(replaced):
            ids[k] = first + np.int64(((key_2[j] >> HALF) * np.uint64(span)) >> HALF)


@jit
def hide_values(
    kind, ratios, hidden, seed, epoch, cell, index, first, n, key, key_2, key_3, histogram,
    values, mask, masked_values,
):  # fmt: skip
    """Write mask and masked_values; values[first : first + n] may be hidden, `index` numbers their genes."""
    ratio = ratios[0]
    if len(ratios) > 1:
        w0, _, _, _ = words(seed, epoch, cell, _RATIO, 0, 0)
        ratio = ratios[np.int64((w0 * np.uint64(len(ratios))) >> HALF)]
    keys(seed, epoch, cell, _MASK, 0, index, n, key)
    for k in range(first):
        mask[k] = False
    if kind == _BERNOULLI:
        limit = np.uint64(np.ceil(ratio * 2.0**53))
        some = mask[first : first + n]
        for k in range(n):
            some[k] = unit_bits(key[k]) < limit
    else:
        mark_smallest(key, n, np.int64(n * ratio), key_2, key_3, histogram, mask[first : first + n])
    for k in range(first + n, len(mask)):
        mask[k] = False
    for k in range(len(mask)):
        value = values[k]  # read in any case, so that no branch has to be guessed
        masked_values[k] = hidden if mask[k] else value
