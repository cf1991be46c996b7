"""Counting and finding cells by label, in compiled code."""

from __future__ import annotations

import numba
import numpy as np

_STEP = 32  # cells that are looked at together; blocks are multiples of it

_jit = numba.njit(nogil=True, cache=True, boundscheck=False)


@_jit
def count(codes, n_codes, block):
    """Cells of each code in each block of cells: int64 (n_codes, n_blocks); negative codes do not count."""
    counts = np.zeros((n_codes, (len(codes) + block - 1) // block), np.int64)
    for b in range(counts.shape[1]):
        for i in range(b * block, min((b + 1) * block, len(codes))):
            if codes[i] >= 0:
                counts[codes[i], b] += 1
    return counts


@_jit
def _block_of(before, total, target):
    """The last block before which there is no more than `target`; `total`, the last entry, is more."""
    last = len(before) - 1
    # Labels are mostly spread evenly, so the place is guessed first, and looked for around the guess.
    low, step = min(np.int64(np.float64(target) / np.float64(total) * last), last - 1), 1
    if before[low] <= target:
        high = low + 1
        while high < last and before[high] <= target:
            low, high, step = high, min(high + step, last), 2 * step
    else:
        high, low = low, low - 1
        while before[low] > target:
            high, low, step = low, max(low - step, 0), 2 * step
    while high - low > 1:
        middle = (low + high) // 2
        if before[middle] <= target:
            low = middle
        else:
            high = middle
    return low


@_jit
def select(codes, labels, before, block, label, which):
    """The `which`-th cells of labels; see :class:`~hbx_gpu.sampler._selection.LabelTable`."""
    result = np.empty(len(label), np.int64)
    last = before.shape[1] - 1
    # All blocks first: their reads do not wait for each other.
    for i in range(len(label)):
        mine = before[label[i]]
        result[i] = _block_of(mine, mine[last], which[i])
    for i in range(len(label)):
        code = codes.dtype.type(labels[label[i]])
        left = which[i] - before[label[i], result[i]]
        at = result[i] * block
        while at + _STEP <= len(codes):
            here = np.uint8(0)  # one byte, so that a vector register compares many codes
            for j in range(at, at + _STEP):
                here = np.uint8(here + (codes[j] == code))
            if here > left:
                break
            left -= np.int64(here)
            at += _STEP
        seen, place = np.int64(0), at
        for j in range(at, min(at + _STEP, len(codes))):
            seen += codes[j] == code
            place += seen <= left
        result[i] = place
    return result


@_jit
def weigh(weights, before, block, target):
    """The cells at which the sum of weights passes each target; never one of weight 0."""
    result = np.empty(len(target), np.int64)
    total = before[-1]
    below = np.nextafter(total, 0.0)  # rounding may reach the total itself
    for i in range(len(target)):
        result[i] = _block_of(before, total, min(target[i], below))
    for i in range(len(target)):
        passed, aim = before[result[i]], target[i]
        at, end = result[i] * block, min((result[i] + 1) * block, len(weights))
        begin = at
        while at + _STEP <= end:
            # Four sums, because each addition waits for the one before it in the same sum.
            a, b, c, d = 0.0, 0.0, 0.0, 0.0
            for j in range(at, at + _STEP, 4):
                a += weights[j]
                b += weights[j + 1]
                c += weights[j + 2]
                d += weights[j + 3]
            if passed + ((a + b) + (c + d)) > aim:
                break
            passed += (a + b) + (c + d)
            at += _STEP
        end = min(at + _STEP, end)
        while at < end:
            passed += weights[at]
            if passed > aim:
                break
            at += 1
        if at == end:  # sums in another order differ by rounding: the last cell that can be drawn
            at -= 1
            while at > begin and weights[at] <= 0:
                at -= 1
        result[i] = at
    return result
