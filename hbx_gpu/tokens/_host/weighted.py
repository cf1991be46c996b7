"""Rows of UCE in numba: genes drawn by weight; see :func:`hbx_gpu.tokens._reference_sampled.weighted_row`."""

from __future__ import annotations

import numpy as np

from hbx_gpu.tokens._draws import Step
from hbx_gpu.tokens._host.arithmetic import log1p
from hbx_gpu.tokens._host.bits import list_bits
from hbx_gpu.tokens._host.draws import jit, keys, mulhi
from hbx_gpu.tokens._host.sampled import FIXED, SMALL
from hbx_gpu.tokens._host.sorting import smallest

GUIDE = 4096
"""Stretches of the summed weights that draws are looked up by."""
_GUIDE_SHIFT = np.uint64(52)
_WEIGHTED, _CHROM = int(Step.WEIGHTED), int(Step.CHROM)
_ONE, _SIX, _LAST = np.uint64(1), np.uint64(6), np.uint64(63)


@jit
def weighted_rows(
    pointers, genes, counts, cells, seed, epoch, samples, cls, close, offset, codes, bounds, place_of,
    token_at, weights, numbers, key, key_2, key_3, histogram, item, sums, guide, times, drawn_bits, present,
    ids, lengths,
):  # fmt: skip
    """ids (n, length) and lengths; what lies beyond a row's length is left alone.

    Places number all known genes by chromosome and start: those of ``codes[c]`` are ``bounds[c]`` up to
    ``bounds[c + 1]``. `place_of`: for each column; `token_at`: for each place; `weights`: of counts below
    SMALL; `numbers`: 0, 1, 2, ...; `times` and `drawn_bits`: zeros by place, left so; `present`: as long as
    `codes`, twice.
    """
    most = ids.shape[1]
    for row in range(len(cells)):
        a = pointers[row]
        n = pointers[row + 1] - a
        columns, amount = genes[a : a + n], counts[a : a + n]
        cell, out = np.uint64(cells[row]), ids[row]
        out[0] = cls
        lengths[row] = 1
        if n == 0:
            continue
        total = _summed(amount, weights, sums)
        _guide(sums, n, total, guide)
        keys(seed, epoch, cell, _WEIGHTED, 0, numbers, samples, key)
        _draw(key[:samples], total, sums, guide, columns, place_of, times, drawn_bits)
        distinct = _listed(drawn_bits, item)
        found = _runs(item, distinct, bounds, present)
        for c in range(found):
            guide[c] = codes[present[0, c]]
        keys(seed, epoch, cell, _CHROM, 0, guide, found, key)
        smallest(key, found, found, key_2, key_3, histogram, guide)
        at = 1
        fits = 1 + samples + 2 * found < most
        for turn in range(found):
            run = guide[turn]
            first = present[1, run]
            stop = present[1, run + 1] if run + 1 < found else distinct
            if at < most:
                out[at] = offset + codes[present[0, run]]
                at += 1
            at = _repeated(item[first:stop], times, token_at, out, at, fits)
            if at < most:
                out[at] = close
                at += 1
        for k in range(distinct):
            times[item[k]] = 0
        lengths[row] = at


@jit
def _summed(amount, weights, sums):
    """sums = sums of weights up to each gene; returns the last."""
    total = np.uint64(0)
    for i in range(len(amount)):
        x = amount[i]
        if x < SMALL:
            total += weights[np.uint32(np.int32(x))]
        else:
            total += np.uint64(np.rint(log1p(x) * FIXED))
        sums[i] = total
    return total


@jit
def _draw(key, total, sums, guide, columns, place_of, times, drawn_bits):
    """Count in `times` how often each place is drawn, and set its bit."""
    for j in range(len(key)):
        drawn = mulhi(key[j], total)
        i = np.uint64(guide[key[j] >> _GUIDE_SHIFT])
        while sums[i] <= drawn:
            i += _ONE
        place = np.uint64(np.uint32(place_of[columns[i]]))
        times[place] += np.uint32(1)
        drawn_bits[place >> _SIX] |= _ONE << (place & _LAST)


@jit
def _repeated(places, times, token_at, out, at, fits):
    """Write each place's token as often as it was drawn; returns where they end."""
    if fits:
        for k in range(len(places)):
            place = places[k]
            token, n = token_at[place], np.int64(times[place])
            out[at], out[at + 1] = token, token  # nearly all are drawn once or twice
            for j in range(2, n):
                out[at + j] = token
            at += n
        return at
    for k in range(len(places)):
        for _ in range(min(np.int64(times[places[k]]), len(out) - at)):
            out[at] = token_at[places[k]]
            at += 1
    return at


@jit
def _guide(sums, n, total, guide):
    """guide[g] = the first gene that a draw of stretch g may be; rounding makes it one earlier at most.

    A gene is passed in all stretches that begin at its sum or beyond.
    """
    for g in range(GUIDE):
        guide[g] = 0
    guide[GUIDE] = 0
    stretches = GUIDE / np.float64(total)
    for i in range(n):
        guide[min(np.int64(np.float64(sums[i]) * stretches + 1e-6) + 1, GUIDE)] += 1
    passed = np.uint32(0)  # sums, not the highest gene: a comparison would become a branch, and be guessed
    for g in range(GUIDE):
        passed += guide[g]
        guide[g] = passed


@jit
def _listed(bits, item):
    """item = the places whose bits are set, ascending, and SPARE more; returns how many. Clears the bits."""
    found = np.uint64(0)
    for w in range(len(bits)):
        found = list_bits(bits[w], np.uint64(w << 6), item, found)
        bits[w] = 0
    return np.int64(found)


@jit
def _runs(item, n, bounds, present):
    """present[:, k] = k-th chromosome that has one of the places item[:n], and its first; how many."""
    found, c, before = 0, 0, -1
    for k in range(n):
        while np.int64(item[k]) >= bounds[c + 1]:
            c += 1
        if c != before:
            present[0, found], present[1, found] = c, k
            found += 1
            before = c
    return found


@jit
def place_rows(drafts, lengths, starts, widths, pad, out):
    """Rows of full length to their places, padded."""
    for row in range(len(starts)):
        one = out[starts[row] : starts[row] + widths[row]]
        length = np.int64(lengths[row])
        draft = drafts[row]
        for k in range(length):
            one[k] = draft[k]
        for k in range(length, len(one)):
            one[k] = pad
