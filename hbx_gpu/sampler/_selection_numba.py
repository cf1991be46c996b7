"""Counting and finding cells by label, in compiled code."""

from __future__ import annotations

import numba
import numpy as np

_STEP = 256  # cells that are counted without looking where they are

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
def select(codes, labels, before, block, label, which):
    """The `which`-th cells of labels; see :class:`~hbx_gpu.sampler._selection.LabelTable`."""
    result = np.empty(len(label), np.int64)
    for i in range(len(label)):
        code = labels[label[i]]
        low, high = 0, before.shape[1] - 1
        while high - low > 1:
            middle = (low + high) // 2
            if before[label[i], middle] <= which[i]:
                low = middle
            else:
                high = middle
        left = which[i] - before[label[i], low]
        at = low * block
        while at + _STEP <= len(codes):
            here = 0
            for j in range(at, at + _STEP):
                here += codes[j] == code
            if here > left:
                break
            left -= here
            at += _STEP
        while codes[at] != code or left > 0:
            left -= codes[at] == code
            at += 1
        result[i] = at
    return result


@_jit
def weigh(weights, before, block, target):
    """The cells at which the sum of weights passes each target; never one of weight 0."""
    result = np.empty(len(target), np.int64)
    for i in range(len(target)):
        b = np.searchsorted(before, target[i], side="right") - 1
        # Rounding may reach the total itself, and blocks without weight begin where the next one does.
        b = min(b, len(before) - 2)
        total, found = before[b], np.int64(-1)
        for j in range(b * block, min((b + 1) * block, len(weights))):
            if weights[j] > 0:
                found = j
                total += weights[j]
                if total > target[i]:
                    break
        result[i] = found
    return result
