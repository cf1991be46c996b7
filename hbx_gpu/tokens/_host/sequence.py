"""One row of a :class:`~hbx_gpu.tokens._program.Sequence` after the other, in numba."""

from __future__ import annotations

import numba
import numpy as np

from hbx_gpu.tokens._arithmetic import INV_LN10
from hbx_gpu.tokens._draws import MAX_INDEX, Step
from hbx_gpu.tokens._host.arithmetic import bend, log1p, normalize, rank_key
from hbx_gpu.tokens._host.bins import assign, find_edges
from hbx_gpu.tokens._host.draws import jit, keys, sums
from hbx_gpu.tokens._host.masking import hide_ids, hide_values
from hbx_gpu.tokens._host.sorting import smallest
from hbx_gpu.tokens._numbers import F, I
from hbx_gpu.tokens._program import Curve, Depth, Fill, Mask, Norm, Order, Side, Value

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
_BY_DRAW = int(Order.RANDOM)
_NO_VALUE, _SCALED_VALUE, _BINS, _KEPT_BINS = (
    int(Value.NONE),
    int(Value.SCALED),
    int(Value.BINS),
    int(Value.KEPT_BINS),
)
_TOKENS, _SPLIT = int(Mask.TOKENS), int(Mask.SPLIT)
_NO_FILL, _FILL_RANDOM = int(Fill.NONE), int(Fill.RANDOM)
_NO_DEPTH, _ADDED, _TIMES = int(Depth.NONE), int(Depth.ADDED), int(Depth.TIMES)
_COUNT_NORM, _KEPT_NORM, _F64_DIV = int(Norm.COUNT), int(Norm.F32_KEPT), int(Norm.F64_DIV)
_NO_CURVE, _BOTH = int(Curve.NONE), int(Side.BOTH)
_PICK, _ZEROS = int(Step.PICK), int(Step.ZEROS)
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
    key, key_2, key_3, item, index, places, binned, histogram, digits, table, edges, chosen, amounts,
    is_known,
):  # fmt: skip
    """Write all rows; `generated` is the width of the second part of a split. Outputs not made are empty.

    `index_of` is empty where draws number genes by their columns.
    """
    n_front, n_back = whole[_N_FRONT], whole[_N_BACK]
    pad_id, pad_value = whole[_PAD_ID], np.float32(fraction[_PAD_VALUE])
    for row in range(len(starts)):
        a = pointers[row]
        n = pointers[row + 1] - a
        columns, amount = genes[a : a + n], counts[a : a + n]
        total, total_known = totals[row], totals_known[row]
        cell = np.uint64(cells[row])
        head = front[row if len(front) > 1 else 0]
        out, width = starts[row], widths[row]
        how = 0
        if whole[_VALUE] == _BINS:
            how = find_edges(amount, n, whole[_TORCH], quantiles, digits, table, edges, item)

        if whole[_MASK] == _SPLIT:
            drawn = _numbers(index_of, columns, n, index)
            if whole[_VALUE] == _BINS:
                assign(how, amount, drawn, n, whole[_SIDE], seed, epoch, cell, table, edges, key, binned)
            else:
                _values(whole, fraction, amount, n, total, total_known, 0.0, binned)
            keys(seed, epoch, cell, _PICK, 0, drawn, n, key)
            smallest(key, n, n, key_2, key_3, histogram, item)
            n_generated = np.int64(n * gen_ratio)
            made = min(n_generated, generated)
            at = row * generated
            for k in range(made):
                gen_ids[at + k] = token[columns[item[k]]]
                gen_values[at + k] = binned[item[k]]
            for k in range(made, generated):
                gen_ids[at + k] = pad_id
                gen_values[at + k] = pad_value
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
                ids[k] = pad_id
                values[k] = pad_value
            continue

        # Which genes, in which order.
        kept = min(n, whole[_KEEP])
        order = whole[_ORDER]
        if n > kept and whole[_CUT_RANDOM]:
            order = _BY_DRAW
        if order == _BY_COLUMN:
            _copy(columns, kept, chosen)
            _copy(amount, kept, amounts)
        else:
            if order == _BY_VALUE:
                _rank_keys(
                    whole[_RANK], whole[_SCALED], amount, columns, scale, n, total, total_known,
                    fraction[_RANK_TARGET], key,
                )  # fmt: skip
            elif order == _BY_ID:
                for i in range(n):
                    key[i] = np.uint64(token[columns[i]])
            else:
                keys(seed, epoch, cell, _PICK, 0, _numbers(index_of, columns, n, index), n, key)
            smallest(key, n, kept, key_2, key_3, histogram, item)
            _look_up(columns, item, kept, chosen)
            if whole[_VALUE] != _NO_VALUE:
                _look_up(amount, item, kept, amounts)

        # Their values, where the row has them.
        made = values[out + n_front : out + width] if whole[_VALUE] != _NO_VALUE else binned
        if whole[_VALUE] == _SCALED_VALUE:
            kept_total = _sum(amounts, kept) if whole[_NORM] == _KEPT_NORM else 0.0
            _values(whole, fraction, amounts, kept, total, total_known, kept_total, made)
        elif whole[_VALUE] != _NO_VALUE:
            if whole[_VALUE] == _KEPT_BINS:
                how = find_edges(amounts, kept, whole[_TORCH], quantiles, digits, table, edges, item)
            drawn = chosen
            if whole[_SIDE] == _BOTH:
                drawn = _numbers(index_of, chosen, kept, index)
            assign(how, amounts, drawn, kept, whole[_SIDE], seed, epoch, cell, table, edges, key, made)

        # Unexpressed genes.
        n_genes = kept
        if whole[_FILL] != _NO_FILL and whole[_FILL_TO] > kept:
            wanted = whole[_FILL_TO] - kept
            for i in range(n):
                is_known[columns[i]] = 1
            absent = _absent(known, is_known, item)
            for i in range(n):
                is_known[columns[i]] = 0
            wanted = min(wanted, absent)
            if whole[_FILL] == _FILL_RANDOM:
                keys(seed, epoch, cell, _ZEROS, 0, _numbers(index_of, item, absent, index), absent, key)
                smallest(key, absent, wanted, key_2, key_3, histogram, index)
                for k in range(wanted):
                    chosen[kept + k] = item[index[k]]
            else:
                for k in range(wanted):
                    chosen[kept + k] = item[k]
            for k in range(kept, kept + wanted):
                amounts[k] = 0.0
                made[k] = 0.0
            n_genes = kept + wanted

        # The row itself.
        n_depth = 0
        if whole[_DEPTH] != _NO_DEPTH:
            n_depth = 1 if whole[_DEPTH_DROP] and total_known <= 1.0 else 2
        genes_at, end = n_front, n_front + n_genes
        length = end + n_back + n_depth
        row_ids = ids[out : out + width]
        _copy(head, n_front, row_ids)
        _look_up(token, chosen, n_genes, row_ids[genes_at:])
        _copy(back, n_back, row_ids[end:])
        if n_depth:
            row_ids[end + n_back] = whole[_DEPTH_FIRST]
            if n_depth == 2:
                row_ids[end + n_back + 1] = whole[_DEPTH_SECOND]
        row_ids[length:] = pad_id
        if whole[_VALUE] != _NO_VALUE:
            row_values = values[out : out + width]
            _copy(front_values, n_front, row_values)
            _copy(back_values, n_back, row_values[end:])
            if n_depth:
                _depth_values(whole, fraction, total_known, n_depth, row_values[end + n_back :])
            row_values[length:] = pad_value
            if whole[_COUNTS]:
                row_counts = raw[out : out + width]
                row_counts[:n_front] = pad_value
                _copy(amounts, n_genes, row_counts[genes_at:])
                row_counts[end:] = pad_value

        # What is hidden.
        if whole[_MASK] == _TOKENS:
            for k in range(n_front):
                index[k] = MAX_INDEX - 1 - k
            _copy(_numbers(index_of, chosen, n_genes, places), n_genes, index[n_front:])
            for k in range(n_front + n_genes, length):
                index[k] = MAX_INDEX - 1 - (k - n_genes)
            hide_ids(
                whole[_MASK_ID], whole[_MASKED], whole[_REPLACED], whole[_FIRST], whole[_SPAN], ratios[0],
                protect, seed, epoch, cell, index, length, key, key_2, item, places,
                ids[out : out + width], labels[out : out + width],
            )  # fmt: skip
        elif whole[_MASK] != 0:
            first = 0 if whole[_MASK_FRONT] else n_front
            last = n_front + n_genes
            if whole[_MASK_SHORT]:
                last = max(first, last - n_front)
            drawn = _numbers(index_of, chosen, max(last - n_front, 0), places)
            if first < n_front:
                for k in range(first, min(last, n_front)):
                    index[k - first] = MAX_INDEX - 1 - k
                _copy(drawn, len(drawn), index[n_front - first :])
                drawn = index[: last - first]
            hide_values(
                whole[_MASK], ratios, np.float32(fraction[_MASK_VALUE]), seed, epoch, cell, drawn, first,
                last - first, key, key_2, key_3, histogram, values[out : out + width],
                mask[out : out + width], masked_values[out : out + width],
            )  # fmt: skip


@numba.njit(inline="always")  # `jit` returns no arrays
def _numbers(index_of, columns, n, room):
    """The numbers of columns in draws, in `room` unless they are the columns themselves."""
    if not len(index_of):
        return columns[:n]
    _look_up(index_of, columns, n, room)
    return room[:n]


@jit
def _copy(source, n, out):
    """out[:n] = source[:n]."""
    for k in range(n):
        out[k] = source[k]


@jit
def _look_up(table, places, n, out):
    """out[k] = table[places[k]]."""
    for k in range(n):
        out[k] = table[places[k]]


@jit
def _absent(known, is_known, item):
    """item = known genes that the row does not express; returns how many."""
    absent = np.uint64(0)
    for i in range(len(known)):
        one = np.uint32(known[i])
        item[absent] = one
        absent += np.uint64(1 - is_known[one])
    return np.int64(absent)


@sums
def _sum(amounts, n):
    total = 0.0
    for k in range(n):
        total += amounts[k]
    return total


@jit
def _rank_keys(norm, scaled, amount, columns, scale, n, total, total_known, target, key):
    """key = what sorts genes by falling rank value: the complement of a positive float64's bits."""
    if norm == _F64_DIV and scaled:  # the same steps, in a loop that becomes vectors
        values = key.view(np.float64)
        for i in range(n):
            values[i] = scale[columns[i]]
        for i in range(n):
            values[i] = amount[i] / total * target / values[i]
        for i in range(n):
            key[i] = ~key[i]
        return
    for i in range(n):
        value = normalize(norm, amount[i], total, total_known, 0.0, target)
        if scaled:
            value = rank_key(norm, value, scale[columns[i]])
        key[i] = _ALL - np.float64(value).view(np.uint64)


@jit
def _values(whole, fraction, amount, n, total, total_known, kept_total, out):
    """out = scaled counts; bins stand there already."""
    if whole[_VALUE] != _SCALED_VALUE:
        return
    norm, curve, clip = whole[_NORM], whole[_CURVE], fraction[_CLIP]
    if norm == _COUNT_NORM and curve == _NO_CURVE:
        most = np.float32(clip)
        for i in range(n):
            x = np.float32(amount[i])
            out[i] = x if x < most else most
        return
    for i in range(n):
        value = normalize(norm, amount[i], total, total_known, kept_total, fraction[_TARGET])
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
