"""One row of a :class:`~hbx_gpu.tokens._program.Sequence` after the other, in numba."""

from __future__ import annotations

from enum import IntEnum

import numpy as np

from hbx_gpu.tokens._arithmetic import INV_LN10
from hbx_gpu.tokens._draws import MAX_INDEX, Step
from hbx_gpu.tokens._host.arithmetic import bend, log1p, normalise, rank_key
from hbx_gpu.tokens._host.bins import bin_counts
from hbx_gpu.tokens._host.draws import HALF, jit, keys, unit_bits, words
from hbx_gpu.tokens._host.sorting import sort_keys
from hbx_gpu.tokens._program import Curve, Depth, Fill, Mask, Norm, Order, Sequence, Value


class I(IntEnum):  # noqa: E742
    """Places of whole numbers of a program."""

    ORDER = 0
    KEEP = 1
    CUT_RANDOM = 2
    RANK = 3
    SCALED = 4
    FILL = 5
    FILL_TO = 6
    VALUE = 7
    NORM = 8
    CURVE = 9
    SIDE = 10
    TORCH_EDGES = 11
    COUNTS = 12
    N_FRONT = 13
    N_BACK = 14
    DEPTH = 15
    DEPTH_FIRST = 16
    DEPTH_SECOND = 17
    DEPTH_DROP = 18
    PAD_ID = 19
    MASK = 20
    MASK_FRONT = 21
    MASK_SHORT = 22
    MASK_ID = 23
    REPLACE_FIRST = 24
    REPLACE_SPAN = 25
    MASKED_BELOW = 26
    REPLACED_BELOW = 27


class F(IntEnum):
    """Places of fractions of a program."""

    RANK_TARGET = 0
    TARGET = 1
    CLIP = 2
    DEPTH_NUMBER = 3
    PAD_VALUE = 4
    MASK_VALUE = 5


def numbers_of(program: Sequence) -> tuple[np.ndarray, np.ndarray]:
    """int64 and float64. A program as numbers, in the places of :class:`I` and :class:`F`."""
    whole = [
        program.order, program.keep, program.cut_random, program.rank, program.scaled, program.fill,
        program.fill_to, program.value, program.norm, program.curve, program.side, program.torch_edges,
        program.counts, program.n_front, program.n_back, program.depth, *program.depth_ids,
        program.depth_drop, program.pad_id, program.mask, program.mask_front, program.mask_short,
        program.mask_id, program.replace_first, program.replace_span, below(program.masked),
        below(program.replaced),
    ]  # fmt: skip
    fractions = [
        program.rank_target, program.target, program.clip, program.depth_number, program.pad_value,
        program.mask_value,
    ]  # fmt: skip
    assert len(whole) == len(I)
    assert len(fractions) == len(F)
    return np.array([int(number) for number in whole], np.int64), np.array(fractions, np.float64)


def below(share: float) -> int:
    """How many of the 2**53 numbers of [0, 1) are below a share."""
    return int(np.ceil(share * 2.0**53))


# numba takes plain integers of a module for constants.
_ORDER, _KEEP, _CUT_RANDOM, _RANK = int(I.ORDER), int(I.KEEP), int(I.CUT_RANDOM), int(I.RANK)
_SCALED, _FILL, _FILL_TO, _VALUE = int(I.SCALED), int(I.FILL), int(I.FILL_TO), int(I.VALUE)
_NORM, _CURVE, _SIDE, _TORCH = int(I.NORM), int(I.CURVE), int(I.SIDE), int(I.TORCH_EDGES)
_COUNTS, _N_FRONT, _N_BACK, _DEPTH = int(I.COUNTS), int(I.N_FRONT), int(I.N_BACK), int(I.DEPTH)
_DEPTH_FIRST, _DEPTH_SECOND, _DEPTH_DROP, _PAD_ID = (
    int(I.DEPTH_FIRST),
    int(I.DEPTH_SECOND),
    int(I.DEPTH_DROP),
    int(I.PAD_ID),
)
_MASK, _MASK_FRONT, _MASK_SHORT, _MASK_ID = int(I.MASK), int(I.MASK_FRONT), int(I.MASK_SHORT), int(I.MASK_ID)
_FIRST, _SPAN, _MASKED, _REPLACED = (
    int(I.REPLACE_FIRST),
    int(I.REPLACE_SPAN),
    int(I.MASKED_BELOW),
    int(I.REPLACED_BELOW),
)
_RANK_TARGET, _TARGET, _CLIP, _DEPTH_NUMBER = (
    int(F.RANK_TARGET),
    int(F.TARGET),
    int(F.CLIP),
    int(F.DEPTH_NUMBER),
)
_PAD_VALUE, _MASK_VALUE = int(F.PAD_VALUE), int(F.MASK_VALUE)
_BY_COLUMN, _BY_ID, _BY_VALUE = int(Order.COLUMN), int(Order.ID), int(Order.VALUE)
_NO_VALUE, _SCALED_VALUE, _BINS, _KEPT_BINS = (
    int(Value.NONE),
    int(Value.SCALED),
    int(Value.BINS),
    int(Value.KEPT_BINS),
)
_TOKENS, _BERNOULLI, _EXACT, _SPLIT = int(Mask.TOKENS), int(Mask.BERNOULLI), int(Mask.EXACT), int(Mask.SPLIT)
_NO_FILL, _FILL_RANDOM = int(Fill.NONE), int(Fill.RANDOM)
_NO_DEPTH, _ADDED, _TIMES = int(Depth.NONE), int(Depth.ADDED), int(Depth.TIMES)
_COUNT_NORM, _KEPT_NORM, _F64_DIV = int(Norm.COUNT), int(Norm.F32_KEPT), int(Norm.F64_DIV)
_NO_CURVE = int(Curve.NONE)
_PICK, _ZEROS, _MASK_STEP, _KIND = int(Step.PICK), int(Step.ZEROS), int(Step.MASK), int(Step.KIND)
_RATIO = int(Step.RATIO)
_ALL = np.uint64(0xFFFFFFFFFFFFFFFF)


@jit
def lengths(whole, pointers, totals_known, n_known, out):
    """out[row] = tokens of each row; see :func:`hbx_gpu.tokens._reference.row_length`."""
    for row in range(len(out)):
        n = pointers[row + 1] - pointers[row]
        kept = min(n, whole[_KEEP])
        filled = min(max(whole[_FILL_TO] - kept, 0), n_known - n)
        length = whole[_N_FRONT] + kept + filled + whole[_N_BACK]
        if whole[_DEPTH] != _NO_DEPTH:
            length += 1 if whole[_DEPTH_DROP] and totals_known[row] <= 1.0 else 2
        out[row] = length


@jit
def fill_rows(
    whole, fraction, quantiles, ratios, protect, front_values, back_values,
    token, scale, index_of, known,
    pointers, genes, counts, totals, totals_known,
    front, back, seed, epoch, cells, starts, widths, generated, gen_ratio,
    ids, values, raw, labels, masked_values, mask, gen_ids, gen_values, gen_lengths, real_lengths,
    key, key_2, item, item_2, index, binned, histogram, digits, table, edges, chosen, amounts, is_known,
):  # fmt: skip
    """Write all rows; `generated` is the width of the second part of a split. Outputs not made are empty."""
    n_front, n_back = whole[_N_FRONT], whole[_N_BACK]
    for row in range(len(starts)):
        a = pointers[row]
        n = pointers[row + 1] - a
        columns, amount = genes[a : a + n], counts[a : a + n]
        total, total_known = totals[row], totals_known[row]
        cell = np.uint64(cells[row])
        for i in range(n):
            index[i] = index_of[columns[i]]
        head = front[row if len(front) > 1 else 0]
        out, width = starts[row], widths[row]
        if whole[_VALUE] == _BINS:
            bin_counts(
                amount, index, n, whole[_TORCH], whole[_SIDE], quantiles, seed, epoch, cell, digits, table,
                edges, key, binned,
            )  # fmt: skip

        if whole[_MASK] == _SPLIT:
            _values(whole, fraction, amount, n, total, total_known, 0.0, binned)
            keys(seed, epoch, cell, _PICK, 0, index, n, key)
            for i in range(n):
                item[i] = i
            sort_keys(key, item, n, key_2, item_2, histogram)
            n_generated = np.int64(n * gen_ratio)
            made = min(n_generated, generated)
            at = row * generated
            for k in range(made):
                gen_ids[at + k] = token[columns[item[k]]]
                gen_values[at + k] = binned[item[k]]
            for k in range(made, generated):
                gen_ids[at + k] = whole[_PAD_ID]
                gen_values[at + k] = np.float32(fraction[_PAD_VALUE])
            gen_lengths[row] = made
            seen = min(n - n_generated, width - n_front)
            for k in range(n_front):
                ids[out + k] = head[k]
                values[out + k] = front_values[k]
            for k in range(seen):
                ids[out + n_front + k] = token[columns[item[n_generated + k]]]
                values[out + n_front + k] = binned[item[n_generated + k]]
            real_lengths[row] = n_front + seen
            for k in range(out + n_front + seen, out + width):
                ids[k] = whole[_PAD_ID]
                values[k] = np.float32(fraction[_PAD_VALUE])
            continue

        # Which genes, in which order: `item` becomes their positions.
        kept = min(n, whole[_KEEP])
        for i in range(n):
            item[i] = i
        order = whole[_ORDER]
        if n > kept and whole[_CUT_RANDOM]:
            keys(seed, epoch, cell, _PICK, 0, index, n, key)
            sort_keys(key, item, n, key_2, item_2, histogram)
        elif order == _BY_VALUE:
            for i in range(n):
                value = normalise(whole[_RANK], amount[i], total, total_known, 0.0, fraction[_RANK_TARGET])
                if whole[_SCALED]:
                    value = rank_key(whole[_RANK], value, scale[columns[i]])
                key[i] = _ALL - np.float64(value).view(np.uint64)
            sort_keys(key, item, n, key_2, item_2, histogram)
        elif order == _BY_ID:
            for i in range(n):
                key[i] = np.uint64(token[columns[i]])
            sort_keys(key, item, n, key_2, item_2, histogram)
        elif order != _BY_COLUMN:
            keys(seed, epoch, cell, _PICK, 0, index, n, key)
            sort_keys(key, item, n, key_2, item_2, histogram)
        kept_total = 0.0
        for k in range(kept):
            chosen[k] = columns[item[k]]
            amounts[k] = amount[item[k]]
            kept_total += amounts[k]

        # Their values, before `item` is used again.
        if whole[_VALUE] == _BINS:
            for k in range(kept):
                amounts[len(amounts) // 2 + k] = binned[item[k]]
            for k in range(kept):
                binned[k] = np.float32(amounts[len(amounts) // 2 + k])
        elif whole[_VALUE] == _KEPT_BINS:
            for k in range(kept):
                index[k] = index_of[chosen[k]]
            bin_counts(
                amounts, index, kept, whole[_TORCH], whole[_SIDE], quantiles, seed, epoch, cell, digits,
                table, edges, key, binned,
            )  # fmt: skip
        elif whole[_VALUE] == _SCALED_VALUE:
            _values(whole, fraction, amounts, kept, total, total_known, kept_total, binned)

        # Unexpressed genes.
        n_genes = kept
        if whole[_FILL] != _NO_FILL and whole[_FILL_TO] > kept:
            wanted = whole[_FILL_TO] - kept
            for i in range(n):
                is_known[columns[i]] = 1
            absent = 0
            for i in range(len(known)):
                if not is_known[known[i]]:
                    item[absent] = known[i]
                    absent += 1
                    if whole[_FILL] != _FILL_RANDOM and absent == wanted:
                        break
            for i in range(n):
                is_known[columns[i]] = 0
            if whole[_FILL] == _FILL_RANDOM:
                for i in range(absent):
                    index[i] = index_of[item[i]]
                keys(seed, epoch, cell, _ZEROS, 0, index, absent, key)
                sort_keys(key, item, absent, key_2, item_2, histogram)
            wanted = min(wanted, absent)
            for k in range(wanted):
                chosen[kept + k] = item[k]
                amounts[kept + k] = 0.0
                binned[kept + k] = 0.0
            n_genes = kept + wanted

        # The row itself.
        genes_at = out + n_front
        for k in range(n_front):
            ids[out + k] = head[k]
        for k in range(n_genes):
            ids[genes_at + k] = token[chosen[k]]
        end = genes_at + n_genes
        for k in range(n_back):
            ids[end + k] = back[k]
        n_depth = 0
        if whole[_DEPTH] != _NO_DEPTH:
            n_depth = 1 if whole[_DEPTH_DROP] and total_known <= 1.0 else 2
            ids[end + n_back] = whole[_DEPTH_FIRST]
            if n_depth == 2:
                ids[end + n_back + 1] = whole[_DEPTH_SECOND]
        length = n_front + n_genes + n_back + n_depth
        pad_id = whole[_PAD_ID]
        for k in range(out + length, out + width):
            ids[k] = pad_id
        if whole[_VALUE] != _NO_VALUE:
            pad_value = np.float32(fraction[_PAD_VALUE])
            for k in range(n_front):
                values[out + k] = front_values[k]
            for k in range(n_genes):
                values[genes_at + k] = binned[k]
            for k in range(n_back):
                values[end + k] = back_values[k]
            if n_depth:
                _depth_values(whole, fraction, total_known, n_depth, values[end + n_back :])
            for k in range(out + length, out + width):
                values[k] = pad_value
            if whole[_COUNTS]:
                for k in range(out, out + width):
                    raw[k] = pad_value
                for k in range(n_genes):
                    raw[genes_at + k] = np.float32(amounts[k])

        # What is hidden.
        if whole[_MASK] == _TOKENS:
            for k in range(n_front):
                index[k] = MAX_INDEX - 1 - k
            for k in range(n_genes):
                index[n_front + k] = index_of[chosen[k]]
            for k in range(n_front + n_genes, length):
                index[k] = MAX_INDEX - 1 - (k - n_genes)
            keys(seed, epoch, cell, _MASK_STEP, 0, index, length, key)
            limit = np.uint64(np.ceil(ratios[0] * 2.0**53))
            for k in range(length):
                labels[out + k] = -100
                if unit_bits(key[k]) < limit:
                    one = ids[out + k]
                    safe = False
                    for j in range(len(protect)):
                        safe |= protect[j] == one
                    if not safe:
                        labels[out + k] = one
                        w0, w1, w2, _ = words(seed, epoch, cell, _KIND, index[k], 0)
                        kind = unit_bits((w0 << HALF) | w1)
                        if kind < np.uint64(whole[_MASKED]):
                            ids[out + k] = whole[_MASK_ID]
                        elif kind < np.uint64(whole[_REPLACED]):
                            ids[out + k] = whole[_FIRST] + np.int64((w2 * np.uint64(whole[_SPAN])) >> HALF)
            for k in range(out + length, out + width):
                labels[k] = -100
        elif whole[_MASK] != 0:
            first = 0 if whole[_MASK_FRONT] else n_front
            last = n_front + n_genes
            if whole[_MASK_SHORT]:
                last = max(first, last - n_front)
            n_eligible = last - first
            for k in range(n_eligible):
                at = first + k
                index[k] = MAX_INDEX - 1 - at if at < n_front else index_of[chosen[at - n_front]]
            ratio = ratios[0]
            if len(ratios) > 1:
                w0, _, _, _ = words(seed, epoch, cell, _RATIO, 0, 0)
                ratio = ratios[np.int64((w0 * np.uint64(len(ratios))) >> HALF)]
            keys(seed, epoch, cell, _MASK_STEP, 0, index, n_eligible, key)
            for k in range(out, out + width):
                mask[k] = False
            if whole[_MASK] == _BERNOULLI:
                limit = np.uint64(np.ceil(ratio * 2.0**53))
                for k in range(n_eligible):
                    mask[out + first + k] = unit_bits(key[k]) < limit
            else:
                for k in range(n_eligible):
                    item[k] = k
                sort_keys(key, item, n_eligible, key_2, item_2, histogram)
                for k in range(np.int64(n_eligible * ratio)):
                    mask[out + first + item[k]] = True
            hidden = np.float32(fraction[_MASK_VALUE])
            for k in range(out, out + width):
                masked_values[k] = hidden if mask[k] else values[k]


@jit
def _rank_keys(norm, scaled, amount, columns, scale, n, total, total_known, target, key):
    """key = what sorts genes by falling rank value: the complement of a positive float64's bits."""
    if norm == _F64_DIV and scaled:  # the same steps, in a loop that becomes vectors
        for i in range(n):
            value = amount[i] / total * target / scale[columns[i]]
            key[i] = _ALL - np.float64(value).view(np.uint64)
        return
    for i in range(n):
        value = normalise(norm, amount[i], total, total_known, 0.0, target)
        if scaled:
            value = rank_key(norm, value, scale[columns[i]])
        key[i] = _ALL - np.float64(value).view(np.uint64)


@jit
def _values(whole, fraction, amount, n, total, total_known, kept_total, out):
    """out = scaled counts; bins stand there already."""
    if whole[_VALUE] != _SCALED_VALUE:
        return
    norm, curve, clip = whole[_NORM], whole[_CURVE], fraction[_CLIP]
    plain = norm == _COUNT_NORM and curve == _NO_CURVE
    for i in range(n):
        if plain:
            out[i] = min(np.float32(amount[i]), np.float32(clip))
        elif norm == _KEPT_NORM and kept_total == 0.0:
            out[i] = 0.0
        else:
            value = normalise(norm, amount[i], total, total_known, kept_total, fraction[_TARGET])
            out[i] = bend(curve, value, clip)


@jit
def _depth_values(whole, fraction, total_known, n_depth, out):
    """scFoundation's two values; see :func:`hbx_gpu.tokens._reference._depth`."""
    known = max(total_known, 1.0)
    measured = log1p(known - 1.0) * INV_LN10
    number = fraction[_DEPTH_NUMBER]
    aimed = number
    if whole[_DEPTH] == _ADDED:
        aimed = measured + number
    elif whole[_DEPTH] == _TIMES:
        aimed = log1p(known * number - 1.0) * INV_LN10
    out[0] = aimed
    if n_depth == 2:
        out[1] = measured
